"""Rows sorted by expert and cut where the experts' counts say; and what is computed on the parts.

    parts = rows.split(counts.tolist())          or   rows[start:end], end = start + count
    y = cat([expert(part) for expert, part in zip(experts, parts)])

`Cuts` proves that E parts are those of E experts: starts and sizes are computed for choices drawn
at random (`expert_loops`) and compared with ``bincount``; the permutation that sorted the rows is
computed too. `Lift` then makes of E nodes, one for each expert, one node over all rows: slices
become what they are slices of, products become grouped ones, and what treats rows alike is done
once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dspark_compile._torch_compat import outside_of_tracing
from dspark_compile.passes.base import dialect
from dspark_compile.passes.expert_loops import NotProved, draws, evaluate
from dspark_compile.passes.expert_steps import MLPS
from dspark_compile.passes.expert_table import chosen_among
from dspark_compile.passes.expert_weights import activation_of, differ, stacked, stacks_of
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    module_path,
    peel,
    shape,
    val,
)

_SORTS = (aten.sort.default, aten.sort.stable)
_ARGSORTS = (aten.argsort.default, aten.argsort.stable)
_BY_ROW = (
    aten._to_copy.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default,
    aten.floor_divide.default,
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """``source[start:end]`` along the first dimension; numbers or sympy expressions."""

    source: fx.Node
    start: Any
    end: Any


@dataclass(frozen=True)
class Cuts:
    """Parts that are proved to be the experts'.

    Attributes:
        choice: ``[T, k]`` or ``[T]``.
        flat: the same, ``[S]``.
        permutation: ``[S]``, sorted row -> choice.
        pieces: where each expert's rows begin and end.
    """

    choice: fx.Node
    flat: fx.Node
    permutation: fx.Node
    pieces: tuple[Piece, ...]

    @property
    def experts(self) -> int:
        return len(self.pieces)


def piece(node: Any) -> Piece | None:
    """``node`` as rows of a tensor from one that depends on data to another; None: it is not."""
    node = peel(node)
    if not is_tensor(node):
        return None
    if node.target is operator.getitem and is_op(node.args[0], aten.split_with_sizes.default):
        parent, index = node.args
        if int(argument(parent, 2, "dim", 0)) != 0:
            return None
        sizes = [_expression(n) for n in parent.args[1]]
        start = sympy.Add(*sizes[:index])
        return Piece(parent.args[0], start, start + sizes[index])
    if is_op(node, aten.slice.Tensor) and int(argument(node, 1, "dim", 0)) == 0:
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        if argument(node, 4, "step", 1) != 1:
            return None
        rows = node.args[0]
        start = _expression(0 if start is None else start)
        size = _expression(shape(rows)[0])
        whole = end is None or (isinstance(end, int) and end >= 1 << 62)
        return Piece(rows, start, size if whole else _expression(end))
    return None


def _expression(x: Any) -> Any:
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(int(value))


def prove_cuts(pieces: Sequence[Piece], sizes: dict[int, list[fx.Node]]) -> Cuts:
    """The choices by whose experts ``pieces`` are cut, in order; ``sizes`` are numbers that are
    taken for those of a part's rows.

    Raises:
        NotProved: there are none, or they are not.
    """
    graph, experts = pieces[0].source.graph, len(pieces)
    rows = shape(pieces[0].source)[0]
    numbers = {
        node.meta["val"].node.expr: node
        for node in graph.nodes
        if is_op(node, aten._local_scalar_dense.default)
        and isinstance(node.meta.get("val"), torch.SymInt)
    }
    used = {s for p in pieces for e in (p.start, p.end) for s in e.free_symbols if s in numbers}
    if not used:
        raise NotProved("the parts' sizes are no data")
    above = _above([numbers[s] for s in used])
    reason = "the rows are not sorted by the choices that are counted"
    for sort in [n for n in graph.nodes if is_op(n, *_SORTS, *_ARGSORTS)]:
        flat = peel(sort.args[0])
        choice = flat
        while is_op(choice, *VIEWS):
            choice = peel(choice.args[0])
        permutation = sort if is_op(sort, *_ARGSORTS) else _second(sort)
        same = known_equal(val(flat).numel(), rows) and val(flat).dim() == 1
        if choice not in above or permutation is None or not same or val(choice).dim() > 2:
            continue
        most = chosen_among(choice, apart=val(choice).dim() > 1)
        if most != experts:
            among = "an unknown number of" if most is None else most
            reason = f"tokens choose among {among} experts, and there are {experts} parts"
            continue
        cuts = Cuts(choice, flat, permutation, tuple(pieces))
        try:
            with outside_of_tracing(), torch.no_grad():
                for draw in draws(choice, experts):
                    _compare(cuts, draw, numbers, used, sizes)
            return cuts
        except NotProved as error:
            reason = str(error)
        except Exception as error:
            reason = f"the parts' sizes are no function of the choices: {error}"
    raise NotProved(reason)


def _compare(
    cuts: Cuts,
    draw: torch.Tensor,
    numbers: dict[Any, fx.Node],
    used: set[Any],
    sizes: dict[int, list[fx.Node]],
) -> None:
    flat = draw.flatten().long()
    counts = torch.bincount(flat, minlength=cuts.experts).tolist()
    values: dict[fx.Node, Any] = {cuts.choice: draw}
    order = evaluate(cuts.permutation, values).flatten()
    if not torch.equal(order.sort().values, torch.arange(len(flat))):
        raise NotProved("the rows' order is no permutation")
    if bool((flat[order].diff() < 0).any()):
        raise NotProved("the rows are not sorted by rising expert")
    known = {s: int(evaluate(numbers[s], values)) for s in used}
    end = 0
    for number, part in enumerate(cuts.pieces):
        start, end = end, end + counts[number]
        if (_value(part.start, known, part), _value(part.end, known, part)) != (start, end):
            raise NotProved("the parts are not those of the experts")
        for size in sizes.get(number, ()):
            if abs(int(evaluate(size, values))) != counts[number]:
                raise NotProved("a branch asks for the size of something else than its rows")


def _value(expression: Any, known: dict[Any, int], part: Piece) -> int:
    """Of ``expression``, with sizes that are no data as they were when the graph was traced."""
    rest = expression.free_symbols - known.keys()
    env = val(part.source).fake_mode.shape_env
    hints = {s: int(env.size_hint(s)) for s in rest} if rest else {}
    return int(expression.subs({**known, **hints}))


def _above(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """``nodes`` and all that they are computed of."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def _second(sort: fx.Node) -> fx.Node | None:
    return next((u for u in sort.users if u.args[1] == 1), None)


class Lift:
    """Nodes over all rows in place of one node for each expert.

    Args:
        cuts: of the rows.
        make: makes a node before the root.
        quantised: whether weights may be dequantised for it.
    """

    def __init__(self, cuts: Cuts, make: Callable[..., fx.Node], quantised: bool = False):
        self.cuts, self.make, self.quantised = cuts, make, quantised
        self.known: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.experts: list[tuple[fx.Node, fx.Node]] = []  # (experts' op, its rows)
        self.mlps: list[fx.Node] = []
        self._ends: fx.Node | None = None
        self._column: fx.Node | None = None
        self._numbers: fx.Node | None = None

    def __call__(self, parts: Sequence[Any]) -> fx.Node:
        """``parts``, one for each expert, as one.

        Raises:
            NotProved: the experts do different things.
        """
        nodes = tuple(peel(p) for p in parts)
        if nodes not in self.known:
            self.known[nodes] = self._lifted(nodes)
        return self.known[nodes]

    def _lifted(self, nodes: tuple[Any, ...]) -> fx.Node:
        first = nodes[0]
        if not all(is_tensor(n) for n in nodes):
            raise NotProved("an expert's rows are no tensor")
        pieces = [piece(n) for n in nodes]
        if all(p is not None for p in pieces):
            return self._source(pieces)  # type: ignore[arg-type]
        if any(n.target is not first.target or len(n.args) != len(first.args) for n in nodes):
            raise NotProved("the experts compute different things")
        if is_dialect_op(first, *MLPS):
            return self._mlp(nodes)
        if is_dialect_op(first, "linear", "matmul"):
            return self._linear(nodes)
        if is_op(first, aten.index.Tensor) and all(len(n.args[1]) == 1 for n in nodes):
            if any(n.args[0] is not first.args[0] for n in nodes):
                raise NotProved("the experts' rows are gathered from different tensors")
            return self.make(first.target, first.args[0], [self([n.args[1][0] for n in nodes])])
        if self._by_row(first):
            return self._same(nodes)
        raise NotProved(f"{first.name}: it is not known to treat rows alike")

    def _source(self, pieces: list[Piece]) -> fx.Node:
        source = pieces[0].source
        for mine, proved in zip(pieces, self.cuts.pieces, strict=True):
            if mine.source is not source:
                raise NotProved("the experts' rows are parts of different tensors")
            if (mine.start, mine.end) != (proved.start, proved.end):
                raise NotProved("the experts' rows are cut in different places")
        if not known_equal(shape(source)[0], val(self.cuts.flat).numel()):
            raise NotProved("the experts' rows are parts of more or fewer rows")
        return source

    def _by_row(self, node: fx.Node) -> bool:
        if is_dialect_op(node, "rms_norm"):
            return True
        tags = getattr(node.target, "tags", ())
        if is_op(node, aten.unsqueeze.default):
            return int(node.args[1]) % val(node).dim() > 0  # type: ignore[arg-type]
        if is_op(node, aten.squeeze.dim):
            return int(node.args[1]) % val(node.args[0]).dim() > 0  # type: ignore[arg-type]
        if is_op(node, aten.slice.Tensor):
            return int(argument(node, 1, "dim", 0)) % val(node).dim() > 0
        return is_op(node, *_BY_ROW) or torch.Tag.pointwise in tags

    def _same(self, nodes: tuple[Any, ...]) -> fx.Node:
        """One op that treats rows alike."""
        first, args = nodes[0], []
        rank = val(first).dim()
        if any(n.kwargs != first.kwargs for n in nodes):
            raise NotProved("the experts compute different things")
        for position, value in enumerate(first.args):
            values = [n.args[position] for n in nodes]
            if all(v is value or (not isinstance(v, fx.Node) and v == value) for v in values):
                if is_tensor(value) and val(value).dim() >= rank and shape(value)[0] != 1:
                    raise NotProved("the experts' rows meet a tensor of all rows")
                args.append(value)
            elif position > 0 and is_dialect_op(first, "rms_norm"):
                raise NotProved("the experts have different norms")
            elif (is_tensor(value) and val(value).dim() == rank) or position == 0:
                args.append(self(values))
            else:
                raise NotProved("the experts compute different things")
        return self.make(first.target, *args, **first.kwargs)

    def _stack(self, items: list[Any], turned: bool = False) -> list[fx.Node]:
        if any(is_dialect_op(w, "dequantize_weight") for w in items) and not self.quantised:
            raise NotProved("the experts' weights are quantised, and all would be dequantised")
        whole = stacked(items, self.make)
        if whole is not None:
            return [self.make(aten.permute.default, whole, [0, 2, 1])] if turned else [whole]
        return [self.make(aten.permute.default, w, [1, 0]) for w in items] if turned else items

    def _linear(self, nodes: tuple[Any, ...]) -> fx.Node:
        first, turned = nodes[0], is_dialect_op(nodes[0], "matmul")
        if any(val(n).dim() != 2 for n in nodes) or val(first.args[1]).dim() != 2:
            raise NotProved("the experts' rows are no matrix")
        if len({shape(n.args[1]) for n in nodes}) > 1:
            raise NotProved("the experts differ in size")
        biases = [argument(n, 2, "bias") for n in nodes]
        if len({b is None for b in biases}) > 1:
            raise NotProved("some experts have a bias and some have none")
        rows = self([n.args[0] for n in nodes])
        weight = self._stack([n.args[1] for n in nodes], turned)
        bias = [] if biases[0] is None else biases
        whole = stacked(bias, self.make)
        bias = [] if whole is not None else bias
        new = self.make(dialect("grouped_linear"), rows, self.ends(), weight, bias)
        if whole is None:
            return new
        return self.make(
            aten.add.Tensor, new, self.make(aten.index.Tensor, whole, [self.numbers()])
        )

    def _mlp(self, nodes: tuple[Any, ...]) -> fx.Node:
        first = nodes[0]
        for node in nodes[1:]:
            difference = differ(node, first)
            if difference is not None:
                raise NotProved(difference)
        weights = [w for n in nodes for w in n.args[1:4] if isinstance(w, fx.Node)]
        if any(is_dialect_op(w, "dequantize_weight") for w in weights) and not self.quantised:
            raise NotProved("the experts' weights are quantised, and all would be dequantised")
        rows = self([n.args[0] for n in nodes])
        stacks = stacks_of(nodes, self.make)
        column = self.column()
        ones = self.make(aten.ones_like.default, column, dtype=val(rows).dtype)
        new = self.make(
            dialect("moe_experts"), rows, column, ones, *stacks, activation_of(first), [], False,
            None, 0.0, module_path(first),
        )  # fmt: skip
        self.experts.append((new, rows))
        self.mlps += nodes
        return new

    def column(self) -> fx.Node:
        """``[S, 1]``: each row's expert."""
        if self._column is None:
            self._column = self.make(aten.unsqueeze.default, self.numbers(), 1)
        return self._column

    def numbers(self) -> fx.Node:
        """``[S]``: each row's expert."""
        if self._numbers is None:
            order = [self.cuts.permutation]
            self._numbers = self.make(aten.index.Tensor, self.cuts.flat, order)
        return self._numbers

    def ends(self) -> fx.Node:
        """``[E]``: behind each expert's last row."""
        if self._ends is None:
            numbers = self.make(
                aten.arange.default, self.cuts.experts, device=val(self.cuts.flat).device
            )
            wide = self.make(aten.unsqueeze.default, self.cuts.flat, 1)
            self._ends = self.make(
                aten.sum.dim_IntList, self.make(aten.le.Tensor, wide, numbers), [0]
            )
        return self._ends
