"""Marks of loops over experts (`ops.expert_loop`): what a traced loop assumes, and its proof.

A loop over the experts that are hit was traced with a turn for every expert, and a branch that
skips a turn as if it were never taken. That is the same sum if a turn that the code does not make
adds nothing: if the experts that are hit are at least those that somebody chose, and a turn is
skipped only when nobody chose its expert. Both are functions of the choice alone; they are computed
for choices drawn at random, and for ones in which all tokens agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dspark_compile._torch_compat import outside_of_tracing
from dspark_compile.ops.expert_loop import MARKS
from dspark_compile.passes.base import Pass, PassContext
from dspark_compile.passes.expert_steps import Step
from dspark_compile.passes.graph import (
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    order,
    peel,
    shape,
    val,
)


class NotProved(Exception):
    """What keeps a loop from being a sum over all experts."""


@dataclass
class MarkedLoop:
    """One loop's marks.

    Attributes:
        begin: the first mark.
        values: what the loop leaves behind, in the last mark's arguments.
        skips: turn → the marks of the branches that would skip it.
        marks: all of its marks.
        proved: accumulators whose sum is proved.
    """

    begin: fx.Node
    end: fx.Node | None = None
    skips: dict[int, list[fx.Node]] = field(default_factory=dict)
    marks: list[fx.Node] = field(default_factory=list)
    proved: set[fx.Node] = field(default_factory=set)

    @property
    def values(self) -> list[fx.Node]:
        return [] if self.end is None else list(self.end.args[1])  # type: ignore[arg-type]

    @property
    def hit(self) -> fx.Node | None:
        return self.begin.args[1]  # type: ignore[return-value]

    @property
    def count(self) -> int:
        return self.begin.args[2]  # type: ignore[return-value]


def marked_loops(graph: fx.Graph) -> list[MarkedLoop]:
    """The loops that have marks."""
    loops: dict[int, MarkedLoop] = {}
    for node in graph.nodes:
        if is_dialect_op(node, "expert_loop_begin"):
            loops[node.args[0]] = MarkedLoop(node)
    for node in graph.nodes:
        if is_dialect_op(node, *MARKS) and node.args[0] in loops:
            loop = loops[node.args[0]]
            loop.marks.append(node)
            if is_dialect_op(node, "expert_loop_end"):
                loop.end = node
            elif not is_dialect_op(node, "expert_loop_begin"):
                loop.skips.setdefault(node.args[1], []).append(node)
    return list(loops.values())


def left(graph: fx.Graph) -> fx.Node | None:
    """A mark that nothing has proved and removed; None: there is none."""
    return next((n for n in graph.nodes if is_dialect_op(n, *MARKS)), None)


def prove(loop: MarkedLoop, chain: list[Step]) -> None:
    """Nothing if the code of ``loop`` computes the whole of ``chain``, a sum that it leaves behind.

    Raises:
        NotProved: it may not.
    """
    choice, asked = chain[0].choice, []
    for mark, guarded in _guarded(loop, chain):
        if not guarded:
            raise NotProved("a branch depends on the data of no expert of the sum")
        if is_dialect_op(mark, "expert_loop_skip_empty"):
            # What is no expert's rows themselves may still be their number: it is counted below.
            rows = mark.args[2]
            if all(known_equal(val(rows), shape(s.part)[0]) for s in guarded):  # type: ignore[arg-type]
                continue
            asked.append((guarded, rows, True))
        else:
            asked.append((guarded, mark.args[2], mark.args[3]))
    if loop.hit is None and not asked:
        return
    if loop.hit is not None:
        _own_turns(loop, chain)
    count = 1 + max(s.expert for s in chain)
    try:
        with outside_of_tracing(), torch.no_grad():
            for draw in draws(choice, count, chain[0].single):
                values: dict[fx.Node, Any] = {choice: draw}
                chosen = set(draw.flatten().tolist())
                if loop.hit is not None:
                    hit = set(evaluate(loop.hit, values).flatten().tolist())
                    if not chosen <= hit or not hit <= set(range(loop.count)):
                        raise NotProved("the loop goes through other experts than those chosen")
                for guarded, condition, runs in asked:
                    if bool(evaluate(condition, values)) != runs:
                        if any(_chosen(s, draw) for s in guarded):
                            raise NotProved("a branch skips an expert that tokens have chosen")
    except NotProved:
        raise
    except Exception as error:
        raise NotProved(f"which experts are hit is no function of the choices: {error}") from error


def _own_turns(loop: MarkedLoop, chain: list[Step]) -> None:
    """A turn that is not made must be that of an expert whom nobody chose: turn e adds expert e.
    Turns were traced from the first expert to the last, so their sum goes through them in order.

    Raises:
        NotProved: it does not.
    """
    place = order(loop.begin.graph)
    last = len(place) if loop.end is None else place[loop.end]
    inside = [s for s in chain if place[loop.begin] < place[s.node] < last] or chain
    experts = [s.expert for s in sorted(inside, key=lambda s: place[s.node])]
    if any(a > b for a, b in itertools.pairwise(experts)):
        raise NotProved("a turn runs another expert than its own")


def _chosen(step: Step, draw: torch.Tensor) -> bool:
    """Whether a token's choice is the step's expert."""
    return bool(((draw if step.slot is None else draw[..., step.slot]) == step.expert).any())


def _guarded(loop: MarkedLoop, chain: list[Step]) -> Iterator[tuple[fx.Node, list[Step]]]:
    """Each branch's mark with the steps of its turn that it guards: those behind it, up to the next
    turn's first mark. What comes before that mark in the next turn would be among them, which asks
    for more than is needed."""
    place = order(loop.begin.graph)
    last = len(place) if loop.end is None else place[loop.end]
    for turn, marks in loop.skips.items():
        for mark in marks:
            behind = [
                place[m] for t, ms in loop.skips.items() if t != turn for m in ms
                if place[m] > place[mark]
            ]  # fmt: skip
            end = min([last, *behind])
            yield mark, [s for s in chain if place[mark] < place[s.node] < end]


def finish(graph: fx.Graph, loops: list[MarkedLoop]) -> None:
    """Remove the marks of loops all of whose results are proved, or older than the loop."""
    place = order(graph)
    for loop in loops:
        if loop.end is None:
            continue
        if all(v in loop.proved or place[v] < place[loop.begin] for v in loop.values):
            sized = [] if loop.hit is None else _of_unknown_size(loop.hit)
            for mark in reversed(loop.marks):
                graph.erase_node(mark)
            drop_checks(graph, [*sized, *_unread_numbers(graph)])


def _unread_numbers(graph: fx.Graph) -> list[fx.Node]:
    """Tensors whose number or size is data and was read by marks and assertions alone."""
    found: list[Any] = []
    for node in graph.nodes:
        number = is_op(node, torch.ops.aten._local_scalar_dense.default)
        sized = is_tensor(node) and any(
            free_unbacked_symbols(n) for n in shape(node) if isinstance(n, torch.SymInt)
        )
        if (number or sized) and not _reaches_tensor(node):
            found.append(node.args[0] if number else node)
    return found


def _reaches_tensor(node: fx.Node) -> bool:
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user.op == "output" or is_tensor(user) or is_dialect_op(user):
                return True
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def drop_checks(graph: fx.Graph, sized: list[fx.Node]) -> None:
    """Remove assertions about sizes of ``sized`` that depend on data: nothing has them any more."""
    doubtful: set[fx.Node] = set()
    todo = list(sized)
    while todo:
        node = todo.pop()
        for user in node.users:
            if user not in doubtful and not is_tensor(user) and not is_dialect_op(user, *MARKS):
                doubtful.add(user)
                todo.append(user)
    graph.eliminate_dead_code()
    for node in reversed(list(graph.nodes)):
        if node in doubtful and not node.users and node.op == "call_function":
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _of_unknown_size(node: fx.Node) -> list[fx.Node]:
    """``node`` and what it is computed of, as far as sizes depend on data."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        item = todo.pop()
        if item in found or not is_tensor(item):
            continue
        if any(free_unbacked_symbols(n) for n in shape(item) if isinstance(n, torch.SymInt)):
            found[item] = None
            todo += item.all_input_nodes
    return list(found)


def draws(choice: fx.Node, experts: int, single: bool = False) -> Iterator[torch.Tensor]:
    """Choices ``[..., k]`` or ``[T]`` of that many experts, of the shape, dtype and device of
    ``choice``, in which no token chooses an expert twice; if ``single``, each item is a token's.

    Raises:
        NotProved: they have another shape, or more columns than there are experts.
    """
    fake = val(choice)
    sizes = [n if isinstance(n, int) else int(n.node.hint) for n in fake.shape]
    k = sizes[-1] if len(sizes) > 1 and not single else 1
    if not sizes or k > experts:
        raise NotProved("the choices are no matrix of fewer columns than there are experts")
    tokens = math.prod(sizes) // max(k, 1)
    random = torch.Generator().manual_seed(0)

    def shaped(draw: torch.Tensor) -> torch.Tensor:
        return draw.reshape(sizes).to(fake.device, fake.dtype, copy=True)

    for row in [(torch.arange(k) + at).remainder(experts) for at in range(0, experts, k)]:
        yield shaped(row.expand(tokens, k))
    for _ in range(4):
        rows = [torch.randperm(experts, generator=random)[:k] for _ in range(tokens)]
        if rows:
            yield shaped(torch.stack(rows))


def evaluate(node: Any, values: dict[fx.Node, Any]) -> Any:
    """The value of ``node`` where those of ``values`` are known."""
    if isinstance(node, (list, tuple)):
        return type(node)(evaluate(x, values) for x in node)
    if not isinstance(node, fx.Node):
        return node
    if node in values:
        return values[node]
    if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.SymInt):
        values[node] = int(node.meta["val"].node.hint)
        return values[node]
    if node.op != "call_function":
        raise NotProved(f"they depend on {node.name}")
    base = peel(node)
    if base is not node:
        return evaluate(base, values)
    for item in _needed(node, values):
        args = evaluate(list(item.args), values)
        kwargs = {k: evaluate(v, values) for k, v in item.kwargs.items()}
        target: Any = item.target
        if target is torch.ops.aten.view.default:
            target = torch.ops.aten.reshape.default
        values[item] = target(*args, **kwargs)
    return values[node]


def _needed(node: fx.Node, values: dict[fx.Node, Any]) -> list[fx.Node]:
    """What must be computed for ``node``, in order."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        item = todo.pop()
        if item in seen or item in values or item.op != "call_function":
            continue
        size = item.meta.get("val")
        if isinstance(size, torch.SymInt) and not free_unbacked_symbols(size):
            values[item] = int(size.node.hint)  # of the tensors that were traced, as the draws are
            continue
        seen.add(item)
        todo += item.all_input_nodes
    return [n for n in node.graph.nodes if n in seen]


class LoopPass(Pass):
    """A pass that raises experts' loops: the marks of those that it proves are removed."""

    kind = "experts"
    stage = "raise"

    def run(self, graph: fx.Graph, ctx: PassContext) -> Any:
        self.loops = marked_loops(graph)
        record = super().run(graph, ctx)
        finish(graph, self.loops)
        return record
