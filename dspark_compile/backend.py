"""The ``torch.compile`` backend: Dynamo's graph in, a callable out.

    capture -> trace -> pipeline -> lower -> inner compiler -> runtime wrapper

Nothing in here may raise out of ``torch.compile`` except an error of the user's own input
(`OptionsError`, `UserError`) or, with ``fallback="error"``, anything: a graph that cannot
be rewritten is compiled unchanged and the report says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import _torch_compat as compat
from . import _torch_compat_breaks as breaks
from . import _torch_compat_experts as expert_turns
from . import hf_experts
from . import ops as _ops  # noqa: F401 - registers the dialect
from .diagnostics import state
from .diagnostics.breaks import note as note_break
from .diagnostics.report import CompileReport, GraphReport
from .loops import hook as loops
from .loops.split import CannotSplit, SplitProgram, has_loops
from .options import Options, OptionsError
from .passes import direct, expert_loops
from .passes.base import PassContext, UserError
from .passes.capture import capture
from .passes.graph import source
from .passes.lower import lower
from .passes.native_step import native_step
from .passes.pipeline import run_pipeline
from .passes.subclasses import CannotDesugar, desugar, naming
from .passes.trace import trace
from .passes.verifier import VerifyError
from .reuse.inputs import Inputs, with_inputs
from .reuse.steps import KeptStep

log = logging.getLogger("dspark_compile")


def _note_break(owner: Any, stack: Sequence[Any], reason: str, written: str) -> Callable[[], None]:
    """`note_break`, with what is known of loops of decode steps in the function that breaks."""
    unrolled = ""
    if stack:
        frame = stack[-1]
        unrolled = loops.why_unrolled(os.path.basename(frame.filename), frame.name)
    return note_break(owner, stack, reason, written, unrolled)


hf_experts.install()
loops.install()
expert_turns.watch_experts()
breaks.watch_breaks(_note_break)


# Passes that prove what a graph with a turn for every expert computes.
_TURNS = ("raise_moe_cuts", "raise_moe_loop")


class CannotCompile(Exception):
    """A graph is outside what the compiler rewrites; the message says why."""


def dspark(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | Options | None = None,
    mode: str | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph; see `Options` for ``options``. ``mode`` is Inductor's.

    Raises:
        OptionsError: for an unknown or illegal option.
    """
    hf_experts.install()
    if unknown:
        raise OptionsError(f"backend 'dspark' takes options= and mode=, not {sorted(unknown)}")
    parsed = Options.parse(options)
    try:
        config = compat.mode_config(mode)
    except RuntimeError as error:
        raise OptionsError(f"mode={mode!r}: {error}") from None
    compat.restart_with_constant_floats(gm)
    owner = compat.compile_call()
    group = state.start_report(None if owner is None else id(owner))
    group.owner = owner  # keeps the id from being used again
    group.options = parsed.to_dict()
    if not group.environment:
        from .diagnostics.environment import environment

        group.environment = environment()
    with loops.once_more(group, gm):
        if has_loops(gm) and _refusal(gm, example_inputs) is None:
            return _with_loops(gm, example_inputs, parsed, config, group)
        return _one_graph(gm, example_inputs, parsed, config, group)


def _with_loops(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    config: dict[str, Any],
    group: CompileReport,
) -> Callable[..., Any]:
    """A graph with loops: its pieces, and the steps of the loops, are compiled one by one."""

    def compile_graph(piece: fx.GraphModule, given: list[Any], which: str) -> Callable[..., Any]:
        if has_loops(piece):  # a loop in a loop
            return _with_loops(piece, given, options, config, group)
        return _one_graph(piece, given, options, config, group, which)

    known = len(group.graphs)
    try:
        program = SplitProgram(gm, inputs, compile_graph)
    except CannotSplit as error:
        del group.graphs[known:]
        loops.refuse(error.where, str(error))
        if loops.unrolls(gm):
            raise compat.traced_again() from error
        return _one_graph(gm, inputs, options, config, group)
    for finding in program.findings:
        group.graphs[known].note(finding)
    group.graphs[known].ops["decode_loop"] = len(program.loops)
    return program


def _one_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    parsed: Options,
    config: dict[str, Any],
    group: CompileReport,
    which: str = "",
) -> Callable[..., Any]:
    """One graph without loops; unchanged, with the reason in the report, where need be."""
    report = group.add_graph()
    if which:
        report.note(which)
    for note in expert_turns.said():
        report.note(note)
    report.num_nodes_before = len(gm.graph.nodes)
    try:
        refusal = _refusal(gm, example_inputs)
        if refusal:
            _written_turns(gm.graph, refusal)
            raise CannotCompile(refusal)
        return _compile(gm, example_inputs, parsed, config, report)
    except (OptionsError, UserError):
        raise
    except compat.restarts():
        group.graphs.remove(report)
        raise
    except Exception as error:
        deliberate = isinstance(error, (CannotCompile, CannotDesugar))
        reason = str(error) if deliberate else _describe(error)
        if parsed.fallback == "error" or (parsed.verify and isinstance(error, VerifyError)):
            raise
        report.add_fallback("graph", reason)
        (log.info if deliberate else log.warning)(
            "graph %d is compiled unchanged: %s", report.index, reason
        )
        if not deliberate:
            log.debug("the failure was", exc_info=True)
        return _inner(gm, example_inputs, parsed, config, None, report)


def _written_turns(graph: fx.Graph, reason: str = "") -> None:
    """Nothing if ``graph`` holds no loop over experts that was traced on trust, nor sizes that
    depend on data and would not be there without.

    Raises:
        RestartAnalysis: it does; Dynamo traces the function once more, as it is written.
    """
    mark = expert_loops.left(graph)
    if mark is not None:
        where = source(mark)
        reason = reason or "it was not proved to be a sum over the experts that tokens chose"
        expert_turns.refuse(f"loop over experts{where and ' at '}{where}: {reason}")
        raise compat.traced_again()
    if expert_turns.sizes_allowed() and expert_turns.has_data_sizes(graph) is not None:
        expert_turns.refuse(reason and f"sizes that depend on data: {reason}")
        raise compat.traced_again()


def _describe(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _refusal(gm: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """Why this graph must be handed on unchanged, or None."""
    if compat.grad_needed(inputs):
        return "gradients are needed: run under torch.no_grad() or inference_mode() to rewrite"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on: cast the model instead"
    for node in gm.graph.nodes:
        if "autocast" in str(node.target):
            return "the graph enters autocast: cast the model instead"
    if not any(n.op in ("call_function", "call_method", "call_module") for n in gm.graph.nodes):
        return "the graph computes nothing"
    return None


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    config: dict[str, Any],
    report: GraphReport,
) -> Callable[..., Any]:
    given = inputs
    with compat.collecting(False):
        kept = KeptStep(gm, inputs, options, report)
        earlier = kept.load()
        if earlier is not None:
            return earlier
        gm, inputs, wrap = desugar(gm, given)
        with report.timed("trace"), naming(given):
            traced, mode = trace(capture(gm, report), inputs)
        if options.keep_programs:
            report.programs["dynamo"] = str(gm.graph)
            report.programs["traced"] = str(traced.graph)
        ctx = PassContext(options, report, mode, list(inputs))
        with report.timed("passes"):
            run_pipeline(traced, ctx)
            found = (r.condition for r in report.rejections if r.pass_name in _TURNS)
            _written_turns(traced.graph, next(found, ""))
        native = None
        as_it_is = False
        if options.kernels in ("auto", "cpp") and options.inner != "eager" and _on_cpu(inputs):
            with report.timed("native"):
                native = native_step(traced, ctx)
                if native is None and options.inner == "auto" and not config:
                    as_it_is = _direct(traced, ctx)
        with report.timed("passes"):
            decompositions = lower(traced, ctx, native=native is not None, direct=as_it_is)
    report.num_nodes_after = len(traced.graph.nodes)
    if options.keep_programs:
        report.programs["lowered"] = str(traced.graph)
    if native is not None:
        run = wrap(_wrapped(native, inputs, ctx))
        kept.save(native, run, ctx, Inputs.of(ctx, wrap, len(inputs)))
        return run
    if as_it_is:
        return wrap(_inner(traced, inputs, options, config, None, report, ctx, compiled=False))
    return wrap(_inner(traced, inputs, options, config, decompositions, report, ctx))


def _direct(traced: fx.GraphModule, ctx: PassContext) -> bool:
    """Whether the graph runs as it is; the report says so, or why not."""
    reason = direct.why_not(traced, ctx)
    if reason is None:
        direct.write_fresh_in_place(traced.graph, ctx)
    note = "no inner compiler: its kernels and the library's products are all there is"
    ctx.report.notes.append(note if reason is None else f"compiled by Inductor: {reason}")
    return reason is None


def _inner(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    config: dict[str, Any],
    decompositions: set[Any] | None,
    report: GraphReport,
    ctx: PassContext | None = None,
    compiled: bool = True,
) -> Callable[..., Any]:
    """The rewritten graph through the inner compiler, behind the runtime wrapper."""
    whole = inputs
    if ctx is not None and ctx.extra_inputs:
        kept = _kept(inputs, ctx)
        inputs = [*(inputs[i] for i in kept), *(item.example(inputs) for item in ctx.extra_inputs)]
    with report.timed("inner"):
        if options.inner == "eager" or not compiled:
            run: Callable[..., Any] = gm.forward
        else:
            salt = f"{compat.source_hash()}:{sorted(options.to_dict().items())}"
            run = compat.inductor(gm, inputs, config, decompositions, salt)
    return run if ctx is None else _wrapped(run, whole, ctx)


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))


def _kept(inputs: Sequence[Any], ctx: PassContext) -> list[int]:
    return [i for i in range(len(inputs)) if i not in ctx.dropped_inputs]


def _wrapped(
    run: Callable[..., Any], inputs: Sequence[Any], ctx: PassContext
) -> Callable[..., Any]:
    """``run`` behind what gives it the inputs that passes added, without those they dropped."""
    return with_inputs(run, _kept(inputs, ctx), ctx.extra_inputs)
