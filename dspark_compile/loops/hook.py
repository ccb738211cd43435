"""Has Dynamo trace the repeated steps of a loop as one `decode_loop` call.

Dynamo unrolls a Python loop: 256 steps of a model are traced 256 times before a back end sees
anything. So the loop is recognised before it is traced, at its first step or, where that one is
another (a prompt, a cache that is made), at its second. The step is traced with the loop's number,
and every other Python number that it counts on, as an unknown: what depends on it in a way that
would make another graph fails there. Then the function is traced again with the loop unrolled, as
it would have been, and the report has the reason.
"""

from __future__ import annotations

import contextlib
import re
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dspark_compile._torch_compat import restarts
from dspark_compile._torch_compat_loops import Differs, Loop, compilation_state, watch_loops
from dspark_compile.diagnostics.report import CompileReport
from dspark_compile.ops.decode_loop import decode_loop

from .names import NotALoop
from .numbers import NotData, check_numbers
from .source import LoopSource, find_loop
from .step import step_function

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n(.*)')
LEAST = 4  # steps
PEELED = 1  # first steps that may be others


@dataclass
class Found:
    """What was found in one compilation.

    Attributes:
        refused: why a loop is not taken from a step on, by `Loop.key`.
        said: loop → reason, for the report.
        first: how many steps a loop has, by its iterator.
    """

    refused: dict[Any, str] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    first: dict[int, tuple[Any, int]] = field(default_factory=dict)


_sources: dict[tuple[types.CodeType, int, int | None], LoopSource | str | None] = {}


def install() -> None:
    """Begin to look at loops that are traced for this back end."""
    watch_loops(_asked)


def found() -> Found:
    """Of the compilation under way, however often it is traced again."""
    return compilation_state("dspark_loops", Found)


def why_unrolled(file: str, function: str) -> str:
    """Why loops of a function stay as they are, as far as that is known; empty: it is not."""
    ours = [
        (where, why)
        for where, why in found().said.items()
        if where.startswith(f"{file}:") and where.partition(" in ")[2].split(":")[0] == function
    ]
    return "; ".join(f"the loop at {where} stays as it is: {why}" for where, why in ours)


def refuse(where: str, reason: str) -> None:
    """The loop at ``where`` will be unrolled; Dynamo must be made to trace again."""
    state = found()
    state.said[where] = reason
    state.refused[where] = reason


@contextlib.contextmanager
def once_more(report: CompileReport, module: fx.GraphModule) -> Iterator[None]:
    """Around the compilation of ``module``, Dynamo's graph: what was found out of loops in it goes
    to its report."""
    state, known = found(), len(report.graphs)
    yield
    for where, reason in state.said.items():
        for graph in report.graphs[known : known + 1]:
            graph.note(f"loop at {where} stays as it is: {reason}")
    for where, times in _repeated(module).items():
        file, function = where.split(":")[0], where.partition(" in ")[2].split(":")[0]
        if not why_unrolled(file, function):
            for graph in report.graphs[known : known + 1]:
                graph.note(
                    f"{where}: traced {times} times, in a loop that is not taken as one step: that "
                    "is `for … in range(…)` with its tensors in variables"
                )


def _repeated(module: fx.GraphModule) -> dict[str, int]:
    """Where tokens are chosen over and over by the same call, and how often."""
    calls: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method") and _name(node) in ("argmax", "multinomial"):
            calls[node.stack_trace or ""] += 1
    found = {}
    for trace, times in calls.items():
        frames = _FRAME.findall(trace)
        if times >= LEAST and frames:
            file, line, function, text = frames[-1]
            found[f"{file.rsplit('/', 1)[-1]}:{line} in {function}: {text.strip()}"] = times
    return found


def unrolls(module: fx.GraphModule) -> bool:
    """Whether a Dynamo graph has loops that would be unrolled if it were traced again."""
    return any(n.target is decode_loop for n in module.graph.nodes)


def _source(loop: Loop) -> LoopSource | str | None:
    key = (loop.code, loop.line, loop.column)
    if key not in _sources:
        try:
            _sources[key] = find_loop(loop.code, loop.line, loop.column)
        except NotALoop as error:
            _sources[key] = str(error)
    return _sources[key]


def _asked(loop: Loop) -> bool:
    """Whether the steps of ``loop`` that are left have become one call."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    state = found()
    # The iterator is kept, so that no other one gets its id.
    _, count = state.first.setdefault(id(loop.iterator), (loop.iterator, loop.count))
    if loop.count < LEAST or count - loop.count > PEELED or loop.key in state.refused:
        return False
    known = _source(loop)
    if not isinstance(known, LoopSource):
        if known is not None:
            file = loop.code.co_filename.rsplit("/", 1)[-1]
            state.said[f"{file}:{loop.line} in {loop.code.co_name}"] = known
        return False
    if known.where in state.refused or not _promising(known, loop):
        return False
    for text in sorted(known.indexed):
        if loop.kind(text) != "tensor":
            state.said[known.where] = f"its number selects from {text}, which may not be a tensor"
            return False
    try:
        _take(known, loop)
    except restarts():
        raise
    except Exception as error:
        # Whatever it is, the loop can be unrolled.
        named = isinstance(error, (Differs, NotALoop))
        reason = str(error) if named else f"{type(error).__name__}: {error}"
        state.refused[loop.key] = state.said[known.where] = reason
        loop.restart()
    state.said.pop(known.where, None)
    return True


def _promising(known: LoopSource, loop: Loop) -> bool:
    """Whether a try is worth tracing a step: it calls something, with tensors at hand."""
    return known.calls and any(loop.kind(n) == "tensor" for n in known.names)


def _take(known: LoopSource, loop: Loop) -> None:
    names = known.names | known.carried | {known.variable}
    kinds = {n: k for n in names if (k := loop.kind(n)) is not None}
    own = {*loop.code.co_varnames, *loop.code.co_cellvars, *loop.code.co_freevars}
    for name in sorted(known.read & own):
        if name not in kinds:
            raise NotALoop(f"{name} may have no value when the loop begins")
    for name in sorted(known.appended):
        if kinds.get(name) != "list":
            raise NotALoop(f"{name}.append is not a list's")
    data = [n for n in known.carried if kinds.get(n) in ("tensor", "number")]
    fixed = [n for n in known.carried if n in kinds and n not in data]
    kinds.setdefault(known.variable, "number")
    step = step_function(known, data, fixed, kinds, loop.stride)
    function = types.FunctionType(step.code, loop.globals, "loop")
    arguments = [
        loop.constant(loop.start) if n == known.variable else loop.get(n) for n in step.arguments
    ]
    results, graph = loop.run(function, arguments, decode_loop)
    reason = _not_decoding(graph)
    if reason is not None:
        raise Differs(reason)
    try:
        check_numbers(graph)
    except NotData as error:
        raise Differs(str(error)) from error
    graph.meta["dspark_loop"] = {"where": known.where, "steps": loop.count, "text": step.text}
    for name, value in zip(step.results, results, strict=True):
        loop.store(name, value)
    if known.variable in known.after:
        final = loop.start + (loop.count - 1) * loop.stride
        loop.store(known.variable, loop.constant(final))


_CHOOSE = ("argmax", "multinomial", "topk", "max", "sort", "searchsorted", "exponential_")
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention", "einsum")


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _not_decoding(step: fx.GraphModule) -> str | None:
    """Why a step does not decode: a loop over layers with the same weights, say, had better be
    unrolled. Decoding multiplies matrices, and chooses something or writes to a cache."""
    graphs = [m.graph for m in step.modules() if isinstance(m, fx.GraphModule)]  # loops' inside too
    calls = [n for g in graphs for n in g.nodes if n.op in ("call_function", "call_method")]
    names = {_name(n) for n in calls}
    if not names & {*_PRODUCTS, "__matmul__"}:
        return "its step has no matrix product"
    writes = any(n.endswith("_") and not n.endswith("__") for n in names)
    if not (writes or "setitem" in names or names & set(_CHOOSE)):
        return "its step chooses no token and writes to no cache"
    return None
