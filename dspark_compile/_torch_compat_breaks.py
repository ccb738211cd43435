"""The part of `_torch_compat` that sees where and why Dynamo breaks a graph of this back end.

Dynamo logs a break, and runs a function with one in a loop as it is, without a word to the back
end. Here both are noted with the line of user code, in the report of the ``torch.compile`` call.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dspark_compile._torch_compat import _inside, hands_graphs_to
from dspark_compile._torch_compat_trial import trial, why_written

# told(owner, stack, reason, written) notes a break and gives back what takes that back.
Told = Callable[[Any, Sequence[Any], str, str], Callable[[], None]]
_TORCH = os.path.dirname(torch.__file__) + os.sep


def watch_breaks(told: Told) -> bool:
    """Call ``told(owner, stack, reason, written)`` at every graph break in what is traced for this
    back end: ``owner`` is the ``torch.compile`` call as `_torch_compat.compile_call` gives it,
    ``stack`` the user's frames, innermost last, ``reason`` Dynamo's, ``written`` why loops over
    experts there are traced as they are written. False: this version of torch has no such place.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase as Translator

    log, loop = (
        inspect.getattr_static(Translator, name, None)
        for name in ("log_graph_break", "raise_loop_graph_break")
    )
    if log is None:
        return False
    if not getattr(log, "_dspark", False):
        _wrap_log(Translator, log, told)
        if isinstance(loop, staticmethod):
            _wrap_loop(Translator, loop.__func__, told)
    return True


def _wrap_log(owner: Any, original: Any, told: Told) -> None:
    def log_graph_break(self: Any, *args: Any, **kwargs: Any) -> Any:
        error = kwargs.get("exc") or next((a for a in args if isinstance(a, Exception)), None)
        _tell(self, error, told)
        return original(self, *args, **kwargs)

    log_graph_break._dspark = True  # type: ignore[attr-defined]
    owner.log_graph_break = log_graph_break


def _wrap_loop(owner: Any, original: Any, told: Told) -> None:
    def raise_loop_graph_break(code: Any, error: Any) -> Any:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        # No translator is under way, or this version keeps it elsewhere: the break goes untold.
        with contextlib.suppress(AttributeError, LookupError):
            _tell(InstructionTranslator.current_tx(), error, told)
        return original(code, error)

    owner.raise_loop_graph_break = staticmethod(raise_loop_graph_break)


def _tell(tx: Any, error: Any, told: Told) -> None:
    """Note a break, once for a compilation however often Dynamo traces again."""
    function = getattr(tx.output, "compiler_fn", None)
    if function is None or not hands_graphs_to(function, "dspark_compile.backend"):
        return
    wrappers = [f for f in _inside(function) if type(f).__name__ == "_TorchCompileWrapper"]
    stack = list(getattr(error, "real_stack", None) or ())
    stack = stack or list(torch._guards.TracingContext.extract_stack())
    own = [frame for frame in stack if not frame.filename.startswith(_TORCH)]
    reason = str(getattr(error, "msg", None) or error or "")
    seen, code = trial().breaks, tx.f_code
    key = (*((f.filename, f.lineno) for f in own[-1:]), reason.split("\n", 1)[0])
    if key not in seen:
        owner = wrappers[0] if wrappers else None
        seen[key] = told(owner, own, reason, why_written(code))
