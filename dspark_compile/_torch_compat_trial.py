"""The part of `_torch_compat` that keeps what is tried with loops over experts in one compilation.

A function is first traced for this back end with sizes that depend on data allowed, and with loops
as `_torch_compat_experts` has them traced. What fails then, or is not proved later, is refused:
Dynamo traces the function once more, as if nothing of this existed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dspark_compile._torch_compat import compiling, hands_graphs_to
from dspark_compile._torch_compat_loops import compilation_state

log = logging.getLogger("dspark_compile")
_refused: set[tuple[str, str]] = set()  # functions whose resumed parts are not tried either
_written: dict[tuple[str, str], str] = {}  # those, and what they call, that hold a loop: why
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")


@dataclasses.dataclass
class Trial:
    """What is tried in the compilation of one function.

    Attributes:
        refused: why the function is traced as it is written; None: it is not.
        said: the same, for the report; once.
        loops: how many loops were marked so far.
        breaks: graph breaks that were noted so far; each with what takes the note back.
    """

    refused: str | None = None
    said: str | None = None
    loops: int = 0
    breaks: dict[Any, Callable[[], None]] = dataclasses.field(default_factory=dict)


def trial() -> Trial:
    """Of the compilation under way, however often it is traced again."""
    return compilation_state("dspark_experts", Trial)


def refuse(reason: str, *codes: Any) -> None:
    """The function will be traced as it is written; Dynamo must be made to trace again. ``codes``
    are those of functions it calls that ``reason`` is about."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    state = trial()
    state.refused = state.said = reason
    while state.breaks:  # the function is traced anew
        state.breaks.popitem()[1]()
    with contextlib.suppress(AttributeError, LookupError):
        code = InstructionTranslator.current_tx().f_code
        _refused.add((code.co_filename, code.co_name))
        for known in (code, *codes):
            _written[known.co_filename, known.co_name] = reason
    if reason:
        log.info("traced as it is written: %s", reason)


def why_written(code: Any) -> str:
    """Why loops over experts of the function under way, or of the one that ``code`` resumes, are
    traced as they are written; empty where nothing was refused."""
    if trial().refused:
        return trial().refused or ""
    name = _RESUMED.sub(r"\1", code.co_name)
    return _written.get((code.co_filename, name), "")


def said() -> list[str]:
    """Why loops over experts of the function under way are traced as they are written."""
    reason = trial().said
    return [reason] if reason else []


def sizes_allowed() -> bool:
    """Whether the graph at hand may hold sizes that depend on data only because of this module."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, LookupError):
        return False
    return getattr(output, "_dspark_allowed", False)


def has_data_sizes(graph: fx.Graph) -> fx.Node | None:
    """A node of a Dynamo or ATen graph with a size that depends on data; None: there is none."""
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        for x in value if isinstance(value, (tuple, list)) else (value,):
            sizes = x.shape if isinstance(x, torch.Tensor) else (x,)
            if any(unbacked(n) for n in sizes):
                return node
    return None


def unbacked(x: Any) -> bool:
    """Whether ``x`` is a symbol for a number that is data."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(x, (torch.SymInt, torch.SymBool, torch.SymFloat)) and bool(
        free_unbacked_symbols(x)
    )


def active(tx: Any) -> bool:
    """Whether what ``tx`` traces is for this back end and nothing was refused yet."""
    return getattr(tx.output, "_dspark_watched", False) and trial().refused is None


def output_graph(original: Any) -> Any:
    """``OutputGraph.__init__`` that allows sizes that depend on data."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._dspark_watched = self._dspark_allowed = False
        if getattr(self, "export", False) or trial().refused is not None:
            return
        try:
            self._dspark_watched = hands_graphs_to(
                self.compiler_fn, "dspark_compile.backend", handed_on=True
            )
        except AttributeError:
            return
        code = self.tracing_context.traced_code[-1]
        if code.co_name.startswith("torch_dynamo_resume_in_") and any(
            code.co_filename == file and f"_in_{name}_at_" in code.co_name
            for file, name in _refused
        ):
            self._dspark_watched = False
            return
        env = self.fake_mode.shape_env
        wanted = {"allow_scalar_outputs": True, "allow_dynamic_output_shape_ops": True}
        if self._dspark_watched and any(not getattr(env, name) for name in wanted):
            self._dspark_allowed = True
            env.settings = dataclasses.replace(env.settings, **wanted)

    return __init__


def run_wrapper(original: Any) -> Any:
    """What would not have failed, or broken a graph elsewhere, without us is done without us."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import RestartAnalysis

        function = getattr(self.output, "compiler_fn", None)
        try:
            if function is None or not hands_graphs_to(function, "dspark_compile.backend", True):
                return original(self, *args, **kwargs)
            return compiling(original, self, *args, **kwargs)
        except RestartAnalysis:
            raise
        except Exception as error:
            tried = getattr(self.output, "_dspark_allowed", False) or trial().loops
            if not tried or trial().refused is not None:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            again(self, reason if trial().loops else "")

    return run


def again(tx: Any, reason: str) -> None:
    """Trace the function again, as it is written.

    Raises:
        RestartAnalysis: Dynamo's own, always.
    """
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    refuse(reason, tx.f_code)
    tx.speculation_log.clear()
    raise UnspecializeRestartAnalysis(restart_reason=reason)
