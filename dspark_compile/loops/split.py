"""A graph with loops in it: each loop's step, and what lies before and behind, compiled by itself.

Dynamo's graph is cut at its `decode_loop` and ``while_loop`` calls. The pieces are graphs like any
other and go the usual way, so every pass works on a step as on a graph of its own, once. What is
left for Python is to run one piece after another.

    prompt, logits  ->  [segment]  ->  [loop: step × n]  ->  [segment]  ->  text
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile._torch_compat import graph_module
from dspark_compile.ops.decode_loop import decode_loop
from dspark_compile.passes.graph import source
from dspark_compile.runtime.user_loop import (
    CARRIED,
    CONSTANT,
    OTHER,
    RESULT,
    LoopPlan,
    Origin,
    UserLoop,
)

from .numbers import NotData, numbers_to_tensors

# What makes a segment worth compiling.
_HEAVY = ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention", "einsum",
          "conv", "embedding", "__matmul__", "_grouped_mm", "flex_attention")  # fmt: skip
_LIGHT = 24  # calls in a segment that runs as it is

Compile = Callable[[fx.GraphModule, list[Any], str], Callable[..., Any]]


class CannotSplit(Exception):
    """A graph cannot be cut at a loop; the message says why, and ``where`` which loop it is."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(reason)
        self.where = where


@dataclass
class _Piece:
    """One callable with what it takes and where its results go.

    Attributes:
        takes: slots, or ``("constant", value)``.
        gives: slots of its results; None: nobody reads it.
    """

    run: Callable[..., Any]
    takes: list[Any]
    gives: list[int | None]
    carried: int | None = None
    frees: list[int] = field(default_factory=list)


def has_loops(module: fx.GraphModule) -> bool:
    """Whether a Dynamo graph holds a loop."""
    return any(_is_loop(n) for n in module.graph.nodes)


def _is_loop(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target is decode_loop or (getattr(node.target, "__name__", "") == "while_loop"
        and isinstance(node.target, torch._ops.HigherOrderOperator))
    )  # fmt: skip


class SplitProgram:
    """A graph with loops: call it as the graph.

    Args:
        module: Dynamo's graph.
        inputs: its inputs, real or fake.
        compile_graph: compiles a piece; its last argument says which, for the report.

    Raises:
        CannotSplit: a loop's step is not one graph.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Any], compile_graph: Compile
    ) -> None:
        self.module, self.compile_graph = module, compile_graph
        self.slots: dict[Any, int] = {}
        self.examples: dict[fx.Node, Any] = {}
        self.pieces: list[_Piece] = []
        self.loops: list[UserLoop] = []
        self.findings: list[str] = []
        self.taken: set[fx.Node] = set()
        self.places = [n for n in module.graph.nodes if n.op == "placeholder"]
        for node, x in zip(self.places, inputs, strict=True):
            self.slots[node] = len(self.slots)
            self.examples[node] = x
        self._cut()

    def __call__(self, *args: Any) -> list[Any]:
        values: list[Any] = [*args, *[None] * (len(self.slots) - len(args))]
        for piece in self.pieces:
            taken = [x[1] if isinstance(x, tuple) else values[x] for x in piece.takes]
            if piece.carried is None:
                results = piece.run(*taken)
            else:
                results = piece.run(taken[: piece.carried], taken[piece.carried :])
            del taken
            for slot, x in zip(piece.gives, results, strict=True):
                if slot is not None:
                    values[slot] = x
            for slot in piece.frees:
                values[slot] = None
        return [x[1] if isinstance(x, tuple) else values[x] for x in self.wanted]

    # ------------------------------------------------------------------------------- cutting

    def _cut(self) -> None:
        graph = self.module.graph
        leaves = _leaves(graph)
        segment: list[fx.Node] = []
        skip = {n for n in leaves if n.op == "call_function"}
        skip |= {x for n in graph.nodes if _is_loop(n) for x in n.args[:2] if _is_module(x)}
        for node in graph.nodes:
            if node.op == "placeholder" or node in skip or node in self.taken:
                continue
            if node.op == "output":
                self._segment(segment)
                self.wanted = [self._value(x) for x in node.args[0]]
            elif _is_loop(node):
                self._segment(segment)
                segment = []
                self._loop(node, leaves)
            else:
                segment.append(node)
        self._free()

    def _free(self) -> None:
        """Intermediate values go when nobody reads them any more."""
        kept = {x for x in self.wanted if isinstance(x, int)}
        last: dict[int, int] = {}
        for i, piece in enumerate(self.pieces):
            for slot in (*piece.takes, *piece.gives):
                if isinstance(slot, int) and slot not in kept:
                    last[slot] = i
        for slot, i in last.items():
            self.pieces[i].frees.append(slot)

    def _value(self, x: Any) -> Any:
        """The slot of a node, or a constant."""
        if not isinstance(x, fx.Node):
            return ("constant", x)
        return self.slots[x]

    def _segment(self, nodes: list[fx.Node]) -> None:
        """Compile the calls between two loops."""
        inside = set(nodes)
        for n in nodes:  # grows: parts of what several were made of belong to them
            if isinstance(n.meta.get("example_value"), (tuple, list)):
                parts = [u for u in n.users if u.target is operator.getitem and u not in inside]
                nodes += parts
                inside.update(parts)
        self.taken |= inside
        results = [n for n in nodes if any(u not in inside for u in n.users)]
        if not results and not any(n.op != "get_attr" for n in nodes):
            return
        for n in results:
            value = n.meta.get("example_value")
            if not isinstance(value, (Tensor, torch.SymInt, int)) and n.op != "get_attr":
                raise CannotSplit("", f"{n.name}, made before a loop and read behind, is no tensor")
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        taken: list[fx.Node] = []
        for n in nodes:
            for x in n.all_input_nodes:
                if x not in inside and x not in values:
                    values[x] = _placeholder(graph, x.name, x)
                    taken.append(x)
        for n in nodes:
            values[n] = graph.node_copy(n, values.__getitem__)
        graph.output(tuple(values[n] for n in results))
        module = graph_module(self.module, graph)
        module.meta.update(self.module.meta)
        if _is_light(nodes):
            run: Callable[..., Any] = module.forward
        else:
            which = "before a loop" if not self.loops else "behind a loop"
            run = self.compile_graph(module, [self._example(x) for x in taken], which)
        piece = _Piece(run, [self.slots[x] for x in taken], [])
        for n in results:
            self.slots[n] = len(self.slots)
            piece.gives.append(self.slots[n])
        self.pieces.append(piece)

    def _example(self, node: fx.Node) -> Any:
        return self.examples[node] if node in self.examples else node.meta["example_value"]

    # --------------------------------------------------------------------------------- loops

    def _loop(self, node: fx.Node, leaves: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]]) -> None:
        mine = node.target is decode_loop
        first = None
        if mine:
            step, carried, others, count = node.args
            body = _submodule(self.module, step)
            said = body.meta.get("dspark_loop", {})
            where = said.get("where") or source(node)
            title = f"{count} steps"
        else:
            condition, step, carried, others = node.args[:4]
            body, count = _submodule(self.module, step), None
            where = source(node) or "torch.while_loop"
            title = "as many steps as its condition has"
        try:
            made = _Step(body, len(carried), self._examples(carried, others))  # type: ignore[arg-type]
            if not mine:
                first = made.add_condition(_submodule(self.module, condition))
            run = made.compile(self.compile_graph, count)  # type: ignore[arg-type]
        except NotData as error:
            raise CannotSplit(where, str(error)) from error
        loop = UserLoop(run, made.plan, first)
        self.loops.append(loop)
        self.findings.append(
            f"loop at {where}: decode_loop, {title}, one compiled once: {loop.how}"
        )
        takes = [self._value(x) for x in (*carried, *others)]  # type: ignore[misc]
        piece = _Piece(loop, takes, [], carried=len(carried))  # type: ignore[arg-type]
        for path in made.paths if mine else [(i,) for i in range(len(carried))]:  # type: ignore[arg-type]
            found = [n for n, (owner, at) in leaves.items() if owner is node and at == path]
            slot = len(self.slots) if found else None
            for n in found:
                self.slots[n] = slot  # type: ignore[assignment]
            piece.gives.append(slot)
            if found and slot == len(self.slots):
                raise AssertionError("a slot was not taken")
        self.pieces.append(piece)

    def _examples(self, carried: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        return [
            (x, self._example(x)) if isinstance(x, fx.Node) else (None, x)
            for x in (*carried, *others)
        ]


class _Step:
    """The step of a loop, from Dynamo's graph of it to a `LoopPlan` and a compiled graph."""

    def __init__(self, body: fx.GraphModule, carried: int, given: list[tuple[Any, Any]]) -> None:
        self.carried, self.given = carried, given
        self.device = next(
            (x.device for _, x in given if isinstance(x, Tensor) and x.device.type != "cpu"),
            torch.device("cpu"),
        )
        self.module = _own_copy(body)
        places = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        self.fake = next(
            n.meta["example_value"].fake_mode
            for n in places
            if hasattr(n.meta.get("example_value"), "fake_mode")
        )
        self.integers = [
            i for i in range(carried)
            if isinstance(places[i].meta.get("example_value"), (torch.SymInt, int))
        ]  # fmt: skip
        self.go: Any = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def add_condition(self, condition: fx.GraphModule) -> Callable[..., Any]:
        """``while condition``: asked behind a step, of what it carries on; and by itself, before
        the first."""
        if any(n.op == "get_attr" for n in condition.graph.nodes):
            raise NotData("its condition has constants")
        places = [n for n in self.graph.nodes if n.op == "placeholder"]
        output = next(n for n in self.graph.nodes if n.op == "output")
        new = list(output.args[0])
        theirs = [n for n in condition.graph.nodes if n.op == "placeholder"]
        values = dict(zip(theirs, [*new, *places[self.carried :]], strict=True))
        if not all(isinstance(x, fx.Node) for x in values.values()):
            raise NotData("it carries a constant")
        with self.graph.inserting_before(output):
            self.go = self.graph.graph_copy(condition.graph, values)
        if isinstance(self.go, (tuple, list)):
            (self.go,) = self.go
        output.args = ((tuple(new), (), (), self.go),)
        alone = _own_copy(condition)
        numbers_to_tensors(alone, self.integers, self.device)
        result = next(n for n in alone.graph.nodes if n.op == "output")
        if isinstance(result.args[0], (tuple, list)):
            result.args = (result.args[0][0],)
        alone.recompile()
        return alone.forward

    def compile(self, compile_graph: Compile, count: int | None) -> Callable[..., Any]:
        """The compiled step; `plan` and `paths` are known then."""
        numbers_to_tensors(self.module, self.integers, self.device)
        places = [n for n in self.graph.nodes if n.op == "placeholder"]
        output = next(n for n in self.graph.nodes if n.op == "output")
        new, last, made, *go = output.args[0]
        results: list[fx.Node] = []

        def origin(x: Any) -> Origin:
            if not isinstance(x, fx.Node):
                return (CONSTANT, x)
            if x in places:
                at = places.index(x)
                return (CARRIED, at) if at < self.carried else (OTHER, at - self.carried)
            if x not in results:
                results.append(x)
            return (RESULT, results.index(x))

        flat = [x for several in made for x in several]
        self.paths = [
            *((0, i) for i in range(len(new))), *((1, i) for i in range(len(last))),
            *((2, i, j) for i, several in enumerate(made) for j in range(len(several))),
        ]  # fmt: skip
        self.plan = LoopPlan(
            [origin(x) for x in new], [origin(x) for x in last], [origin(x) for x in flat], count,
            origin(go[0]) if go else None, frozenset(self.integers), self.device,
        )  # fmt: skip
        output.args = (tuple(results),)
        self.module.recompile()
        examples = []
        for i, (place, (node, value)) in enumerate(zip(places, self.given, strict=True)):
            if i < self.carried:
                value = self._fresh(value)
                place.meta["example_value"] = value
                for key in ("grapharg", "tensor_dict"):
                    place.meta.pop(key, None)
            elif node is not None:
                _take_origin(place, node)
            examples.append(value)
        return compile_graph(self.module, examples, "the step of a loop")

    def _fresh(self, value: Any) -> Any:
        """A fake tensor as the loop's own buffer will be."""
        with self.fake:
            if not isinstance(value, Tensor):
                return torch.empty((), dtype=torch.int64, device=self.device)
            return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _own_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    made = graph_module(module, graph)
    made.meta.update(module.meta)
    return made


def _submodule(module: fx.GraphModule, node: Any) -> fx.GraphModule:
    return module.get_submodule(str(node.target))


def _is_module(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _take_origin(place: fx.Node, node: fx.Node) -> None:
    """What is known of an input of the whole graph is known of it inside of a piece."""
    for key in ("tensor_dict", "grapharg", "dspark_bits"):
        if key in node.meta:
            place.meta[key] = node.meta[key]
    if hasattr(node, "_dynamo_source"):
        place._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]


def _placeholder(graph: fx.Graph, name: str, node: fx.Node) -> fx.Node:
    place = graph.placeholder(name)
    place.meta.update(node.meta)
    _take_origin(place, node)
    return place


def _leaves(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, tuple[int, ...]]]:
    """Parts of loops' results: which loop, and where in the result."""
    found: dict[fx.Node, tuple[fx.Node, tuple[int, ...]]] = {}
    for node in graph.nodes:
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source_node, index = node.args
            if _is_loop(source_node):
                found[node] = (source_node, (index,))
            elif source_node in found and not isinstance(
                source_node.meta.get("example_value"), Tensor
            ):
                owner, path = found[source_node]
                found[node] = (owner, (*path, index))
    return found


def _is_light(nodes: list[fx.Node]) -> bool:
    """Whether a segment is little enough to run as it is."""
    calls = [n for n in nodes if n.op != "get_attr" and n.target is not operator.getitem]
    names = [n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
             for n in calls]  # fmt: skip
    return len(calls) <= _LIGHT and not any(
        any(word in str(name) for word in _HEAVY) for name in names
    )
