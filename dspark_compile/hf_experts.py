"""Hugging Face's eager loop over experts, without a graph break.

``experts_implementation="eager"`` runs a Python loop over the experts that are hit, whose number
depends on data: Dynamo cannot trace it. The other implementations compute the same from the same
parameters, and `passes.raise_moe_experts` knows them. So while Dynamo traces for this back end, or
an export traces (`traced_grouped`), and only then, "eager" means ``grouped_mm``; outside of our
graphs, and under other back ends, nothing changes.

The loop takes one expert's matrix after another, and so runs with weights that know little more
than a product of matrices: torchao's quantised ones. ``grouped_mm`` does not, and gets such weights
dequantised.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _torch_compat as compat

_MODULE = "transformers.integrations.moe"
_EXPORTING = contextvars.ContextVar("dspark_exporting", default=False)


@contextlib.contextmanager
def traced_grouped() -> Iterator[None]:
    """Inside, "eager" means ``grouped_mm``: for a trace that is not Dynamo's."""
    install()
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _traced_for_dspark() -> bool:
    return compat.traced_backend() == "dspark"


class _Dequantised:
    """An experts module whose quantised parameters are read as plain tensors."""

    def __init__(self, module: Any, names: list[str]) -> None:
        self._module = module
        for name in names:
            setattr(self, name, getattr(module, name).dequantize())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _grouped(original: Callable[..., Any], registry: Any, default: Any) -> Callable[..., Any]:
    grouped = original(registry, "grouped_mm", default)

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        names = [
            name
            for name, p in module._parameters.items()
            if type(p) not in (torch.nn.Parameter, torch.Tensor) and hasattr(p, "dequantize")
        ]
        return grouped(_Dequantised(module, names) if names else module, *args, **kwargs)

    return forward


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_interface(self: Any, experts_implementation: Any, default: Any) -> Any:
        if experts_implementation == "eager":
            if torch.compiler.is_dynamo_compiling():
                if _traced_for_dspark():
                    return _grouped(original, self, default)
            elif _EXPORTING.get():
                return original(self, "grouped_mm", default)
        return original(self, experts_implementation, default)

    get_interface._dspark = True  # type: ignore[attr-defined]
    return get_interface


def install() -> None:
    """Teach transformers' registry of experts, where it is loaded."""
    module = sys.modules.get(_MODULE)
    interface = getattr(module, "ExpertsInterface", None)
    original = getattr(interface, "get_interface", None)
    if original is None or getattr(original, "_dspark", False):
        return
    interface.get_interface = _wrapped(original)  # type: ignore[union-attr]
