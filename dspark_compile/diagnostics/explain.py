"""Compile a model for the arguments at hand, run it once, and report what happened.

The call leaves things as it found them:

* Compiled code of the caller stays valid: nothing is reset. The model is compiled with a back end
  object of its own, so that no earlier compilation satisfies Dynamo and all graphs are seen.
* Tensors and caches among the arguments are copied, and so are the model's buffers. The random
  state is put back.

One trace remains: Dynamo remembers the shapes it saw, so a later call with other shapes may be
compiled with dynamic ones at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dspark_compile._torch_compat import graph_breaks
from dspark_compile.diagnostics.environment import environment
from dspark_compile.diagnostics.report import CompileReport
from dspark_compile.diagnostics.state import recording

if TYPE_CHECKING:
    from dspark_compile.options import Options


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> CompileReport:
    """What ``torch.compile(model, backend="dspark")`` does for ``model(*args, **kwargs)``.

    Args:
        model: a module or function; one that is already compiled is looked through.
        args, kwargs: what to call it with, once, without gradients.
        options: as for ``torch.compile``.

    Raises:
        OptionsError: an option's name or value is not legal.
        Exception: whatever the model raises for these arguments.
    """
    from dspark_compile.options import Options

    chosen = Options.parse(options)
    target = _uncompiled(model)
    report = CompileReport(environment=environment(), options=chosen.to_dict())
    copier = _Copier()
    args, kwargs = copier.copy(args), copier.copy(kwargs)
    compiled = _compile(target, options)
    breaks_before = graph_breaks()
    with recording(report), _copied_buffers(target, copier), _same_random_state(), torch.no_grad():
        compiled(*args, **kwargs)
    if not report.graph_breaks:  # breaks that no line of code was found for
        report.graph_breaks = list((graph_breaks() - breaks_before).elements())
    for graph in report.graphs[:1]:
        for name in copier.not_copied:
            graph.note(
                f"explain() could not copy a {name} among the arguments; it may have changed"
            )
    return report


def _compile(
    target: Callable[..., Any], options: Mapping[str, Any] | Options | None
) -> Callable[..., Any]:
    from dspark_compile.backend import dspark
    from dspark_compile.options import Options

    # Dynamo tells compilations apart by their back end object; this one is new with each call.
    @functools.wraps(dspark)
    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any], **kw: Any) -> Any:
        return dspark(gm, example_inputs, **kw)

    settings: dict[str, Any] = {"backend": backend}
    if options is not None:
        settings["options"] = options.to_dict() if isinstance(options, Options) else dict(options)
    # Newer versions of PyTorch also count recompilations by call; older ones lack the argument.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        settings["isolate_recompiles"] = True
    return torch.compile(target, **settings)


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module or function under ``torch.compile``, or ``model`` itself."""
    for name in ("_orig_mod", "_torchdynamo_orig_callable"):
        original = getattr(model, name, None)
        if original is not None:
            return original
    return model


@contextmanager
def _copied_buffers(target: Callable[..., Any], copier: _Copier) -> Iterator[None]:
    """Within the block the model's buffers are copies, so that caches among them stay as they are.

    A buffer that is also an argument is the same copy in both places.
    """
    modules = list(target.modules()) if isinstance(target, torch.nn.Module) else []
    originals = [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]
    try:
        for buffers, original in originals:
            buffers.update(copier.copy(original))
        yield
    finally:
        for buffers, original in originals:
            buffers.update(original)


@contextmanager
def _same_random_state() -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


class _Copier:
    """Copies tensors and caches, within lists, tuples and dicts; what they share stays shared."""

    def __init__(self) -> None:
        self.memo: dict[int, Any] = {}
        self.not_copied: list[str] = []

    def copy(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self.copy(v) for v in value)
        if type(value) is dict:
            return {k: self.copy(v) for k, v in value.items()}
        if isinstance(value, torch.Tensor) or _is_cache(value):
            try:
                return copy.deepcopy(value, self.memo)
            except Exception:
                # Such as a tensor that autograd made, or a subclass that refuses.
                self.not_copied.append(type(value).__name__)
        return value


def _is_cache(value: Any) -> bool:
    cache_utils = sys.modules.get("transformers.cache_utils")
    return cache_utils is not None and isinstance(value, cache_utils.Cache)
