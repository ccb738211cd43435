"""Rows of (token, expert) pairs: what experts code computes between dispatch and combine.

Code that stacks its experts' weights works on ``S = tokens * k`` rows, one for each choice, sorted
by expert (``grouped_mm``) or not (``batched_mm``). This module reads that form: which rows a
product takes, with which expert's weight each, and which columns of an earlier product a value is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.expert_steps import spread_rows
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    peel,
    same_shape,
    shape,
    val,
)

_FALLBACK = "transformers::grouped_mm_fallback"
_COLUMN_MOVES = (aten.slice.Tensor, aten.select.int, aten.squeeze.dim, aten.alias.default, *VIEWS)


class Miss(Exception):
    """What keeps the code from being one of the known forms; ``node`` is where."""

    def __init__(self, condition: str, node: fx.Node | None = None, hint: str = ""):
        super().__init__(condition)
        self.condition, self.node, self.hint = condition, node, hint


@dataclass(frozen=True)
class Order:
    """How rows follow from choices.

    Attributes:
        experts: the node with each row's expert.
        choices: the flat ``[S]`` indices as the router gave them.
        permutation: row -> choice; None where rows are in the choices' order.
    """

    experts: fx.Node
    choices: fx.Node
    permutation: fx.Node | None


@dataclass(frozen=True)
class RowProduct:
    """``result[s] = rows[s] @ weight[expert of s]``.

    Attributes:
        result: the node, ``[S, out]``.
        rows: ``[S, in]``.
        weight: the stacked parameter's node, ``[E, out, in]``, or ``[E, in, out]`` if ``turned``.
        order: of the rows.
    """

    result: fx.Node
    rows: fx.Node
    weight: fx.Node
    turned: bool
    order: Order


def is_grouped(node: object) -> bool:
    """Whether ``node`` is a grouped product of rows sorted by expert."""
    if is_op(node, aten._grouped_mm.default):
        return True
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return schema is not None and schema.name == _FALLBACK


def _stack(node: Any, turned: bool) -> tuple[fx.Node, bool]:
    """A stacked weight without a transposition on top."""
    node = peel(node)
    while is_op(node, aten.permute.default) and list(node.args[1]) in ([0, 2, 1], [0, -1, -2]):
        node, turned = peel(node.args[0]), not turned
    if val(node).dim() != 3:
        raise Miss("the experts' weights are not stacked in three dimensions", node)
    return node, turned


def row_product(node: fx.Node) -> RowProduct | None:
    """``node`` as a product of rows with their experts' weights; None if it is none.

    Raises:
        Miss: it is one, in an order that is not known.
    """
    if is_dialect_op(node, "grouped_linear"):
        rows, ends, weights, bias = node.args
        if len(weights) != 1 or val(weights[0]).dim() != 3 or bias:  # type: ignore[arg-type,index]
            return None
        weight, turned = _stack(weights[0], False)  # type: ignore[index]
        return RowProduct(node, rows, weight, turned, _counted(ends))  # type: ignore[arg-type]
    if is_grouped(node):
        weight, turned = _stack(node.args[1], True)
        order = _sorted(argument(node, 2, "offs"), shape(weight)[0])
        return RowProduct(node, node.args[0], weight, turned, order)  # type: ignore[arg-type]
    if not is_op(node, aten.squeeze.dim, *VIEWS) or not is_tensor(node):
        return None
    product = node.args[0]
    if not is_dialect_op(product, "matmul") or val(node).dim() != 2:
        return None
    a, b = product.args  # type: ignore[union-attr]
    gathered, rows, turned = (a, b, False) if _gathered(a) else (b, a, True)
    if not _gathered(gathered) or not is_op(rows, aten.unsqueeze.default):
        return None
    if val(rows.args[0]).dim() != 2:
        return None
    source, flipped = peel(gathered), turned
    while is_op(source, aten.permute.default):
        if list(source.args[1]) != [0, 2, 1]:
            return None
        source, flipped = peel(source.args[0]), not flipped
    weight, flipped = _stack(source.args[0], flipped)
    experts = peel(source.args[1][0])
    choices = experts
    if is_op(choices, aten.clamp.default):
        choices = peel(choices.args[0])
    return RowProduct(node, rows.args[0], weight, flipped, Order(experts, choices, None))


def _gathered(node: Any) -> bool:
    node = peel(node)
    while is_op(node, aten.permute.default):
        node = peel(node.args[0])
    return is_op(node, aten.index.Tensor) and len(node.args[1]) == 1 and val(node).dim() == 3


def _sorted(offsets: Any, experts: Any) -> Order:
    """The order behind ``cumsum(histc(sort(choices)))``; the choices may be counted unsorted."""
    node = peel(offsets)
    if is_op(node, aten._to_copy.default):
        node = peel(node.args[0])
    if not is_op(node, aten.cumsum.default):
        raise Miss("the groups' offsets are no running sum of the experts' counts", node)
    counts = peel(node.args[0])
    if is_op(counts, aten._to_copy.default):
        counts = peel(counts.args[0])
    if is_op(counts, aten.histc.default):
        bins = [argument(counts, i, n) for i, n in ((1, "bins"), (2, "min"), (3, "max"))]
        last = isinstance(bins[2], (int, float)) and bins[0] - 1 <= bins[2] <= bins[0]
        if not (known_equal(bins[0], experts) and bins[1] == 0 and last):
            raise Miss("the experts are not counted from 0 to their number", counts)
    elif not is_op(counts, aten.bincount.default):
        raise Miss("the groups' offsets do not count the experts", counts)
    ids = counts.args[0]
    while is_op(ids, aten._to_copy.default):
        ids = ids.args[0]  # type: ignore[union-attr]
    ids = peel(ids)
    if not (ids.target is operator.getitem and is_op(ids.args[0], aten.sort.default)):
        return _permuted(ids)
    sort, permutation = ids.args[0], None
    if argument(sort, 2, "descending", False) or val(sort.args[0]).dim() != 1:
        raise Miss("the rows are not sorted by rising expert", sort)
    for user in sort.users:
        if user.args[1] == 1:
            permutation = user
    if permutation is None:
        raise Miss("the sorting's permutation is not used", sort)
    return Order(ids, peel(sort.args[0]), permutation)


def _counted(ends: Any) -> Order:
    """The order behind ``(choices[:, None] <= arange(E)).sum(0)``, as `expert_cuts` writes it."""
    node = peel(ends)
    node = node.args[0] if is_op(node, aten.sum.dim_IntList) else node
    if not is_op(node, aten.le.Tensor) or not is_op(node.args[0], aten.unsqueeze.default):
        raise Miss("the groups' ends do not count the experts", node)
    choices = node.args[0].args[0]
    return _permuted(choices)


def _permuted(choices: fx.Node) -> Order:
    """The order by which flat ``choices`` are sorted.

    Raises:
        Miss: none sorts them.
    """
    for sort in choices.users if val(choices).dim() == 1 else ():
        if is_op(sort, aten.argsort.default, aten.argsort.stable):
            down = argument(sort, 2, "descending", False)
            permutation: fx.Node | None = sort
        elif is_op(sort, aten.sort.default, aten.sort.stable):
            down = argument(sort, 2, "descending", False)
            permutation = next((u for u in sort.users if u.args[1] == 1), None)
        else:
            continue
        if permutation is not None and not down:
            return Order(_sorted_choices(choices, permutation), choices, permutation)
    raise Miss("the rows are not sorted by expert", choices)


def _sorted_choices(choices: fx.Node, permutation: fx.Node) -> fx.Node:
    """The node with each row's expert; ``choices`` where nothing reads one."""
    for user in choices.users:
        if is_op(user, aten.index.Tensor) and list(user.args[1]) == [permutation]:  # type: ignore[call-overload]
            return user
    return choices


def is_experts_of(node: Any, order: Order) -> bool:
    """Whether ``node`` is each row's expert, perhaps clamped into range."""
    node = peel(node)
    if is_op(node, aten.clamp.default):
        node = peel(node.args[0])
    clamped = order.experts
    if is_op(clamped, aten.clamp.default):
        clamped = peel(clamped.args[0])
    return node is clamped or node is order.experts or node is order.choices


def row_bias(node: Any, order: Order) -> fx.Node | None:
    """The stacked bias ``[E, out]`` that ``node`` gathers for each row; None if it is none."""
    node = peel(node)
    while is_op(node, *VIEWS, aten._to_copy.default):
        node = peel(node.args[0])
    if not is_op(node, aten.index.Tensor) or len(node.args[1]) != 1:
        return None
    if not is_experts_of(node.args[1][0], order) or val(node.args[0]).dim() != 2:
        return None
    return node.args[0]


def is_sentinel(mask: Any, order: Order, experts: Any) -> bool:
    """Whether ``mask`` marks rows whose expert is ``>= experts``: another rank's."""
    mask = peel(mask)
    while is_op(mask, *VIEWS, aten.unsqueeze.default):
        mask = peel(mask.args[0])
    if not is_op(mask, aten.ge.Scalar):
        return False
    return is_experts_of(mask.args[0], order) and known_equal(mask.args[1], experts)


def columns(leaf: fx.Node, stops: Any) -> tuple[fx.Node, torch.Tensor]:
    """``(base, which of its columns)`` for a leaf that moves columns of a base, of whom ``stops``
    is true.

    Raises:
        Miss: ``leaf`` is no such thing.
    """
    chain: list[fx.Node] = []
    node: Any = leaf
    while not stops(node):
        if node.target is operator.getitem and is_op(node.args[0], aten.split.Tensor):
            chain.append(node)
            node = node.args[0]
        if not is_op(node, *_COLUMN_MOVES, aten.split.Tensor):
            raise Miss(f"{leaf.name} between the experts' products comes of neither", leaf)
        chain.append(node)
        node = node.args[0]
    rows, size = 2, int(shape(node)[-1])
    table = torch.arange(size).expand(rows, size) + size * torch.arange(rows)[:, None]
    value: Any = table
    for item in reversed(chain):
        if item.target is operator.getitem:
            value = value[item.args[1]]
        elif is_op(item, *VIEWS):
            value = value.reshape(rows, *(int(n) for n in shape(item)[1:]))
        else:
            value = item.target(value, *item.args[1:], **item.kwargs)  # type: ignore[operator]
    if value.dim() != 2 or value.shape[0] != rows or bool((value[1] - value[0] != size).any()):
        raise Miss(f"{leaf.name} mixes rows", leaf)
    return node, value[0]


def tokens_of(rows: Any, order: Order, k: Any) -> tuple[fx.Node, fx.Node | None]:
    """``(x [T, K], weights [S] or None)`` whose rows ``rows`` are, each for its choice's token;
    weights where they multiply the rows.

    Raises:
        Miss: they are something else.
    """
    node = peel(rows)
    while is_op(node, aten._to_copy.default, aten.masked_fill.Scalar):
        # What a masked row would be does not matter: its expert is another rank's.
        node = peel(node.args[0])
    if order.permutation is not None:
        if is_op(node, aten.index.Tensor) and len(node.args[1]) == 1:
            picked = peel(node.args[1][0])
        elif is_op(node, aten.gather.default) and node.args[1] == 0 and val(node).dim() == 2:
            picked = spread_rows(node.args[2])
        elif is_op(node, aten.index_select.default) and node.args[1] == 0:
            picked = peel(node.args[2])
        else:
            raise Miss("the experts' rows are not gathered from the tokens", node)
        permutation = order.permutation
        divided = is_op(picked, aten.floor_divide.default, aten.div.Tensor_mode)
        if divided and picked.args[1] == k:
            picked = peel(picked.args[0])
        elif not known_equal(k, 1):
            raise Miss("the experts' rows are not those of their choices' tokens", node)
        if picked is not permutation:
            raise Miss("the experts' rows are gathered in another order", node)
        return node.args[0], None
    return _repeated(node, k), None


def _repeated(node: fx.Node, k: Any) -> fx.Node:
    """``x [T, K]`` of which ``node`` repeats each row k times."""
    if known_equal(k, 1):
        return node
    spread = _spread(node, k)
    if spread is not None:
        return spread
    if is_op(node, aten.index.Tensor, aten.index_select.default):
        where = node.args[1][0] if is_op(node, aten.index.Tensor) else node.args[2]  # type: ignore[index]
        where = peel(where)
        floored = argument(where, 9, "rounding_mode", "floor") == "floor"
        divided = is_op(where, aten.floor_divide.default, aten.div.Tensor_mode) and floored
        if divided and where.args[1] == k and is_op(peel(where.args[0]), aten.arange.default):
            return node.args[0]  # type: ignore[return-value]
        if is_op(_spread(where, k), aten.arange.default):
            return node.args[0]  # type: ignore[return-value]
    raise Miss("the experts' rows are not the tokens, each repeated for its choices", node)


def _spread(node: Any, k: Any) -> fx.Node | None:
    """What ``node`` has k times, item by item, by an expansion; None if it is no such thing. With
    another dimension, of 1, behind the first, where it is a view of something else."""
    if not is_op(node, *VIEWS) or not is_op(node.args[0], aten.expand.default):
        return None
    wide, sizes = node.args[0].args[0], shape(node.args[0])
    fits = len(sizes) == val(node).dim() + 1 and known_equal(sizes[1], k)
    if not fits or not known_equal(shape(wide)[1], 1):
        return None
    source = wide.args[0]
    if is_op(wide, aten.unsqueeze.default, *VIEWS):
        if same_shape(shape(source), (*shape(wide)[:1], *shape(wide)[2:])):
            return source  # type: ignore[no-any-return]
    return wide  # type: ignore[no-any-return]


def is_inverse(node: Any, permutation: fx.Node) -> bool:
    """Whether ``node`` undoes ``permutation``: ``empty[permutation] = arange``, or its argsort."""
    node = peel(node)
    if is_op(node, aten.argsort.default, aten.argsort.stable):
        return peel(node.args[0]) is permutation
    if node.target is operator.getitem and is_op(node.args[0], aten.sort.default):
        return node.args[1] == 1 and peel(node.args[0].args[0]) is permutation
    if not is_op(node, aten.index_put.default) or argument(node, 3, "accumulate", False):
        return False
    _, where, values = node.args[:3]
    values = peel(values)
    return (
        len(where) == 1
        and peel(where[0]) is permutation
        and is_op(values, aten.arange.default)
        and same_shape(shape(values), shape(permutation))
    )
