"""A whole decode step as one native call.

Where every node of a graph has a stage in C++ (`dspark_compile.codegen.cpp.plan`), the graph needs
neither the inner compiler nor a dispatcher: its kernels run one after another in one parallel
region, and only what Dynamo's guards do stays in Python.

Conditions: a graph on the CPU with at least one product of up to 16 rows, all of whose nodes can be
stages. What stands in the way is reported, and the graph takes the usual way.

Worth: no call between kernels (some 5 us each, and a wake-up of the threads), norms and residuals
inside the products, and weights that stream on from one kernel to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from dspark_compile.codegen.cpp import build, plan
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.codegen.cpp.layout import Result, lay_out
from dspark_compile.codegen.cpp.program import NativeProgram, PlanError, Program
from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.passes.base import PassContext
from dspark_compile.passes.graph import is_dialect_op
from dspark_compile.passes.turned_weights import split_blocks


def why_not(module: fx.GraphModule) -> str | None:
    """What keeps the graph from being one native call; None if nothing does."""
    calls = [n for n in module.graph.nodes if n.op == "call_function"]
    if not any(is_dialect_op(n, *plan.PRODUCTS, "matmul") for n in calls):
        return "it has no linear layer"
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        reason = plan.reason(node)
        if reason is not None:
            return f"{node.name}: {reason}"
    return None


def native_step(module: fx.GraphModule, ctx: PassContext) -> Callable[..., Any] | None:
    """The graph as one native call, or None with the reason in the report."""
    _print_constants(module, ctx)
    module = split_blocks(module, ctx.fake_mode)
    reason = why_not(module)
    if reason is None:
        try:
            return _build(module.graph, ctx)
        except (PlanError, build.BuildError) as error:
            reason = str(error)
    ctx.report.notes.append(f"not one native call: {reason}")
    return None


def _print_constants(module: fx.GraphModule, ctx: PassContext) -> None:
    """Tensors of one number that the graph holds (``x[mask] = -inf``) become part of its text."""
    for node in [n for n in module.graph.nodes if n.op == "get_attr"]:
        value = getattr(module, str(node.target), None)
        if not isinstance(value, Tensor) or value.numel() != 1 or isinstance(value, FakeTensor):
            continue
        with module.graph.inserting_before(node):
            number = module.graph.call_function(
                torch.ops.aten.full.default,
                (list(value.shape), value.item()),
                {"dtype": value.dtype, "device": value.device},
            )
        with ctx.fake_mode:
            number.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        node.replace_all_uses_with(number)
        module.graph.erase_node(node)


def _build(graph: fx.Graph, ctx: PassContext) -> Callable[..., Any]:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    with ctx.fake_mode:
        planner = plan.Planner(nodes, inputs)
        planner.plan()
    program = planner.program
    (output,) = (n for n in graph.nodes if n.op == "output")
    wanted = list(output.args[0])
    position = {n: i for i, n in enumerate(inputs)}
    form: list[tuple[str, Any]] = []
    results: list[Result] = []
    for item in wanted:
        if not isinstance(item, fx.Node):
            form.append(("value", item))
        elif item in position:
            form.append(("input", position[item]))
        else:
            value = planner.get(item)
            if not isinstance(value, Tensor):
                raise PlanError(f"an output is {type(value).__name__}")
            form.append(("result", len(results)))
            results.append(_result(program, value))
    numbers = {
        n.meta["val"].node.expr: i
        for n, i in position.items()
        if isinstance(n.meta["val"], torch.SymInt)
    }
    native = NativeProgram(lay_out(program, results, numbers))
    report_kernels(native, ctx.report)
    ctx.report.notes.append(
        f"one native call: {len(native.names)} stages, {len(native.layout.sources)} kernels,"
        f" {native.arena_bytes / 1024:.0f} KiB of intermediate results"
    )
    return assemble(native, form)


def assemble(native: NativeProgram, form: list[tuple[str, Any]]) -> Callable[..., Any]:
    """The graph's callable: each output is a result of ``native``, an input or a constant, as
    ``form`` says: ``("input", number)``, ``("result", index)`` or ``("value", constant)``."""
    plain = [kind for kind, _ in form] == ["result"] * len(form)

    def outputs(made: list[Tensor], args: Sequence[Any]) -> list[Any]:
        if plain:
            return made
        return [
            made[value] if kind == "result" else args[value] if kind == "input" else value
            for kind, value in form
        ]

    def run(*args: Any) -> list[Any]:
        return outputs(native(args), args)

    def bind(args: Sequence[Any]) -> Callable[[], list[Any]]:
        bound = native.bind(args)
        return bound if plain else lambda: outputs(bound(), args)

    run.native, run.bind, run.form = native, bind, form  # type: ignore[attr-defined]
    return run


def _result(program: Program, value: Tensor) -> Result:
    program.keep(value)
    place = program.place(value)
    if program.buffers[place.buffer].given is not None:
        raise PlanError("an output is a view of an input")
    sizes = (*value.shape, *value.stride())
    if not all(isinstance(n, int) for n in sizes):
        raise PlanError("an output has a dynamic size")
    return Result(
        place.buffer, place.offset, value.dtype, tuple(value.shape), tuple(value.stride())
    )


def report_kernels(native: NativeProgram, report: GraphReport) -> None:
    """Say which kernel each stage is."""
    level = isa_levels.detect()
    paths: dict[Any, str] = {}
    for name, source in zip(native.names, native.sources, strict=True):
        if source not in paths:
            path = build.library_path(source.name, source.text, level)
            paths[source] = str(path.with_suffix(".cpp"))
        report.add_kernel(source.name, name, "native", paths[source])
