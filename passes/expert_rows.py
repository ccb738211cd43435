"""Which tokens' rows an expert gets, and with which weights, in loops over experts.

    token, slot = torch.where(choice == e)          rows: token; a weight at (token, slot)
    token = (choice == e).any(-1)                   rows: a mask; the choices' weights, summed
    mask = choice[:, 0] == e                        rows: a mask over one choice for each token
    token = mask.nonzero().squeeze(-1)              the same as numbers

The mask ``choice == e`` may be a slice of a one-hot table, and masks over ``[B, T]`` may be used
flat for rows that are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.expert_table import chosen_among, is_zero
from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    dtype,
    is_op,
    is_tensor,
    known_equal,
    peel,
    same_shape,
    shape,
    val,
)

_CAST = aten._to_copy.default
_MOVES = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim)


@dataclass(frozen=True)
class Mask:
    """``choice == expert``, of the shape of ``choice``, or ``[k, T]`` if ``turned``."""

    choice: fx.Node
    expert: int
    turned: bool


@dataclass(frozen=True)
class Weight:
    """Weights, one for each choice; of all experts, to be taken at the choices, if ``dense``."""

    node: fx.Node
    dense: bool = False


@dataclass(frozen=True)
class Rows:
    """The tokens that chose an expert.

    Attributes:
        where: what indexes them.
        mask: which choices are the expert's.
        single: the mask has one item for each token.
        slot: of each row, which of its token's choices it is, if that is a node.
    """

    where: tuple[fx.Node, ...]
    mask: Mask
    single: bool
    slot: tuple[fx.Node, int] | None = None


def mask_of(node: Any) -> Mask | None:
    """``node`` as ``choice == expert``."""
    while is_op(node, _CAST, aten.squeeze.dim, aten.unsqueeze.default) or (
        isinstance(node, fx.Node) and peel(node) is not node
    ):
        node = node.args[0]
    if is_op(node, aten.eq.Scalar) and isinstance(node.args[1], int) and val(node).dim() >= 1:
        return Mask(node.args[0], node.args[1], False)
    if not is_op(node, aten.select.int):
        return None
    table, dim, expert = node.args
    rank = val(table).dim()
    order = list(range(rank))
    if is_op(table, aten.permute.default):
        order, table = [int(d) % rank for d in table.args[1]], table.args[0]  # type: ignore[union-attr]
    while is_op(table, _CAST):
        table = table.args[0]
    if not is_op(table, aten.eq.Tensor) or rank < 2 or not isinstance(expert, int):
        return None
    choice, numbers = table.args
    counted = is_op(numbers, aten.arange.default) and len(numbers.args) == 1
    if not counted or not is_op(choice, aten.unsqueeze.default):
        return None
    if val(choice.args[0]).dim() != rank - 1 or order[int(dim) % rank] != rank - 1:
        return None
    rest = [d for i, d in enumerate(order) if i != int(dim) % rank]
    if rest == list(range(rank - 1)):
        return Mask(choice.args[0], expert, False)
    return Mask(choice.args[0], expert, True) if rest == [1, 0] else None


def column(node: Any) -> tuple[fx.Node, int] | None:
    """(nonzero node, which of its columns)."""
    node = peel(node)
    if is_op(node, aten.select.int) and int(node.args[1]) % 2 == 1:
        base, which = peel(node.args[0]), int(node.args[2])
    elif is_op(node, *_MOVES) and val(node).dim() == 1:
        base, which = peel(node.args[0]), 0
        if not is_op(base, aten.nonzero.default) or not known_equal(shape(base)[1], 1):
            return None
    else:
        return None
    return (base, which) if is_op(base, aten.nonzero.default) else None


def rows_of(where: list[Any]) -> Rows | None:
    """The rows that ``where`` indexes; None if they are none of one expert's."""
    nodes = tuple(peel(w) for w in where)
    if len(nodes) == 1 and is_tensor(nodes[0]):
        found = None
        if dtype(nodes[0]) == torch.bool:
            found = _of_mask(nodes[0])
        elif (place := column(nodes[0])) is not None and val(place[0].args[0]).dim() == 1:  # type: ignore[arg-type]
            found = _of_mask(place[0].args[0])
        if found is not None:
            return Rows(nodes, found.mask, found.single)
    places = [column(n) for n in nodes]
    if any(p is None or p[0] is not places[0][0] for p in places):  # type: ignore[index]
        return None
    base, order = places[0][0], [p[1] for p in places]  # type: ignore[index]
    mask, rank = mask_of(base.args[0]), val(base.args[0]).dim()  # type: ignore[arg-type]
    if mask is None or val(mask.choice).dim() != rank:
        return None
    if mask.turned:
        return Rows(nodes, mask, False, (base, 0)) if order == [1] else None
    if order == list(range(rank - 1)):
        return Rows(nodes, mask, False, (base, rank - 1))
    return Rows(nodes, mask, True) if order == list(range(rank)) else None


def _of_mask(node: Any) -> Rows | None:
    """The rows of a mask over tokens, perhaps a flat one."""
    node = _unviewed(node)
    inner = node
    if is_op(node, aten.gt.Scalar, aten.ne.Scalar) and node.args[1] == 0:
        inner = peel(node.args[0], (_CAST,))
        if not is_op(inner, aten.sum.dim_IntList) or len(inner.args[1]) != 1:
            return None
    if is_op(inner, aten.any.dim, aten.sum.dim_IntList):
        dim = inner.args[1] if is_op(inner, aten.any.dim) else inner.args[1][0]
        mask, rank = mask_of(inner.args[0]), val(inner.args[0]).dim()
        if mask is None or mask.turned or argument(inner, 2, "keepdim", False):
            return None
        fits = int(dim) % rank == rank - 1 and val(mask.choice).dim() == rank
        return Rows((node,), mask, False) if fits else None
    mask = mask_of(node)
    if mask is None or mask.turned:
        return None
    return Rows((node,), mask, True)


def _unviewed(node: Any) -> Any:
    while is_op(node, *_MOVES) or (isinstance(node, fx.Node) and peel(node) is not node):
        node = node.args[0]
    return node


def same_rows(where: Any, rows: Rows) -> bool:
    """Whether ``where`` indexes ``rows``, perhaps as a mask of another shape."""
    nodes = tuple(peel(w) if isinstance(w, fx.Node) else w for w in where)
    if nodes == rows.where:
        return True
    if len(nodes) != 1 or len(rows.where) != 1 or not is_tensor(nodes[0]):
        return False
    masks = all(dtype(n) == torch.bool for n in (nodes[0], rows.where[0]))
    return masks and _unviewed(nodes[0]) is _unviewed(rows.where[0])


def taken(node: Any, rows: Rows) -> fx.Node | None:
    """``x`` of all tokens if ``node`` is its ``rows``."""
    node = peel(node)
    features = shape(node)[-1]
    while is_op(node, *VIEWS):
        node = peel(node.args[0])
    if is_op(node, aten.index_select.default) and node.args[1] == 0:
        x, where = node.args[0], [node.args[2]]
    elif is_op(node, aten.index.Tensor):
        x, where = node.args[0], list(node.args[1])
    else:
        return None
    if len(where) == 2 and where[0] is None and is_op(x, aten.unsqueeze.default, *VIEWS):
        if val(x).dim() == 3 and shape(x)[0] == 1:
            x, where = x.args[0], where[1:]
            if not same_rows(where, rows) or val(x).dim() != 2:
                return None
            return x if known_equal(shape(x)[-1], features) else None
    if not same_rows(where, rows) or val(node).dim() != 2:
        return None
    return x if known_equal(shape(x)[-1], features) else None


def single_choice(mask: Mask) -> tuple[fx.Node, int | None]:
    """(choices, which of their columns the mask asks for); None: they are one for each token."""
    node: Any = mask.choice
    while peel(node, (_CAST,)) is not node or peel(node) is not node:
        node = peel(peel(node), (_CAST,))
    if is_op(node, aten.select.int) and is_tensor(node.args[0]):
        rank, slot = val(node.args[0]).dim(), node.args[2]
        size = shape(node.args[0])[-1]
        if int(node.args[1]) % rank == rank - 1 and isinstance(slot, int) and isinstance(size, int):
            return node.args[0], slot % size
    if is_op(node, aten.squeeze.dim, *VIEWS):
        if same_shape(shape(node.args[0]), (*shape(node), 1)):
            return node.args[0], 0
    return mask.choice, None


def row_weight(node: Any, rows: Rows) -> Weight | None:
    """The weights of all choices if ``node`` is those of ``rows``; None if it is not."""
    place: int | None = None
    gathered = False
    while not gathered:
        node = bare(node)
        at = _column_of(node)
        if at is not None and place is None:
            node, place = at
            continue
        if is_op(node, aten.index_select.default) and node.args[1] == 0:
            node, where = node.args[0], [node.args[2]]
        elif is_op(node, aten.index.Tensor):
            node, where = node.args[0], list(node.args[1])
        else:
            return None
        gathered = True
        if rows.slot is not None and len(where) == len(rows.where) + 1:
            last = column(where.pop())
            if last is None or last != rows.slot or not same_rows(where, rows):
                return None
            if place is not None:
                return None
            fits = (c for c in _below(node) if same_shape(shape(c), shape(rows.mask.choice)))
            return next((Weight(c) for c in fits), None)
        if not same_rows(where, rows):
            return None
    return tokens_weight(node, rows, place)


def tokens_weight(node: Any, rows: Rows, place: int | None = None) -> Weight | None:
    """The weights of all choices, of which ``node`` has each token's for the mask's expert;
    ``place``: its column that is meant."""
    if place is None:
        mask, weight = dense_weight(node)
        if mask is not None and not rows.single and mask == rows.mask:
            return Weight(weight)  # type: ignore[arg-type]
        moved = node
        while is_op(moved, *_MOVES):
            moved = moved.args[0]
        at = _column_of(moved)
        if at is not None:
            node, place = at
    mask = rows.mask
    choice, slot = single_choice(mask) if rows.single else (mask.choice, None)
    one = rows.single and slot is None
    tokens = val(choice).numel() if one else val(choice).numel() // shape(choice)[-1]
    for item in _below(node):
        sizes = shape(item)
        if place is None:
            if rows.single and known_equal(val(item).numel(), tokens):
                if one or known_equal(shape(choice)[-1], 1):
                    return Weight(item)
            continue
        if slot == place and same_shape(sizes, shape(choice)):
            return Weight(item)
        if place == mask.expert and known_equal(val(item).numel(), tokens * sizes[-1]):
            # A token that chose an expert twice has its score once.
            if rows.single or chosen_among(choice) is not None:
                return Weight(item, True)
    return None


def _column_of(node: Any) -> tuple[fx.Node, int] | None:
    """(tensor, which column of it) if ``node`` is one."""
    if not is_op(node, aten.select.int, aten.slice.Tensor) or not is_tensor(node.args[0]):
        return None
    rank = val(node.args[0]).dim()
    if rank < 2 or int(argument(node, 1, "dim", 0)) % rank != rank - 1:
        return None
    place = argument(node, 2, "start", 0)
    if is_op(node, aten.slice.Tensor) and not known_equal(shape(node)[-1], 1):
        return None
    if not isinstance(place, int) or place < 0:
        return None
    return node.args[0], place


def bare(node: Any) -> Any:
    """``node`` without casts, copies and views."""
    while is_op(node, _CAST, *_MOVES) or (isinstance(node, fx.Node) and peel(node) is not node):
        node = node.args[0]
    return node


def halves(node: Any) -> tuple[Any, Any] | None:
    """The two tensors whose product ``node`` is: a ``where`` beside zeros multiplies with its
    condition."""
    node = peel(node, TRANSPARENT | {_CAST})
    if is_op(node, aten.mul.Tensor) and all(is_tensor(a) for a in node.args[:2]):
        return node.args[0], node.args[1]
    if is_op(node, aten.where.self) and is_zero(node.args[2]):
        return node.args[1], node.args[0]
    if is_op(node, aten.masked_fill.Scalar) and node.args[2] == 0:
        opposite = peel(node.args[1])
        if is_op(opposite, aten.logical_not.default, aten.bitwise_not.default):
            return node.args[0], opposite.args[0]
    return None


def dense_weight(node: Any) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights) if ``node`` is ``(weight * mask).sum(-1)``, however spelt."""
    node = bare(node)
    if not is_op(node, aten.sum.dim_IntList) or len(node.args[1]) != 1:
        return None, None
    if int(node.args[1][0]) % (rank := val(node.args[0]).dim()) != rank - 1:
        return None, None
    parts = halves(bare(node.args[0])) or ()
    for mask, weight in (parts, parts[::-1]) if parts else ():
        found = mask_of(mask)
        if found is None or found.turned or not is_tensor(weight):
            continue
        if same_shape(shape(weight), shape(found.choice)):
            return found, weight
    return None, None


def _below(node: Any) -> Iterator[fx.Node]:
    """``node``, and what it is a view of."""
    while True:
        yield node
        below = peel(node)
        if below is node:
            if not is_op(node, *_MOVES):
                return
            below = node.args[0]
        node = below
