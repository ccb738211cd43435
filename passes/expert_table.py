"""Tables of scores, one for each expert, that are 0 but for those of the chosen experts.

    zeros(T, E).scatter(1, index, weight)        probabilities * zeros(T, E).scatter(1, index, 1)
    table / table.sum(-1, keepdim=True)

A scatter of a top-k writes every score once, since its indices differ from each other.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    is_op,
    is_tensor,
    known_equal,
    peel,
    same_shape,
    shape,
    val,
)

_COPIES = TRANSPARENT | {aten._to_copy.default}


@dataclass(frozen=True)
class Table:
    """Scores ``[..., E]`` that are 0 but for the k at ``indices [..., k]``.

    Attributes:
        weights: the scores there ``[..., k]``; None: ``dense`` there.
        dense: scores of all experts ``[..., E]``.
    """

    node: fx.Node
    indices: fx.Node
    weights: fx.Node | None
    dense: fx.Node | None = None


def table_of(node: Any) -> Table | None:
    """``node`` as a table; None if it is none whose other scores are 0."""
    if is_op(node, aten.mul.Tensor) and all(is_tensor(a) for a in node.args):
        for mask, dense in (node.args, node.args[::-1]):
            mask = peel(mask, _COPIES)
            if is_op(mask, aten.scatter.value) and mask.args[3] == 1:
                indices = _chosen(mask)
                if indices is not None and same_shape(shape(dense), shape(mask)):
                    return Table(node, indices, None, dense)
        return None
    if is_op(node, aten.div.Tensor) and is_tensor(node.args[1]):
        above, below = node.args
        table = table_of(peel(above, _COPIES)) if is_tensor(above) else None
        if table is None or not known_equal(shape(below)[-1], 1):
            return None
        return Table(node, table.indices, None, node)
    if not is_op(node, aten.scatter.src, aten.scatter_add.default):
        return None
    indices = _chosen(node)
    if indices is None or not same_shape(shape(node.args[3]), shape(indices)):
        return None
    return Table(node, indices, node.args[3])


def _chosen(scatter: fx.Node) -> fx.Node | None:
    """The indices that a scatter writes to along the last dimension, if it writes into zeros and
    they are a top-k's."""
    into, dim, indices = scatter.args[:3]
    rank = val(scatter).dim()
    if int(dim) % rank != rank - 1 or not is_zero(into):  # type: ignore[arg-type]
        return None
    node = peel(indices, _COPIES | VIEWS)
    top = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    if not is_op(top, aten.topk.default) or not known_equal(shape(node)[-1], shape(indices)[-1]):  # type: ignore[arg-type]
        return None
    along = int(argument(top, 2, "dim", -1)) % val(node).dim()  # type: ignore[arg-type]
    return indices if along == val(node).dim() - 1 else None  # type: ignore[return-value]


def is_zero(node: Any) -> bool:
    """Whether ``node`` is full of zeros."""
    node = peel(node) if isinstance(node, fx.Node) else node
    if is_op(node, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return True
    if is_op(node, aten.full.default, aten.full_like.default):
        return node.args[1] == 0
    return node == 0 or (is_op(node, aten.scalar_tensor.default) and node.args[0] == 0)


def column_of(node: Any) -> tuple[Table, int] | None:
    """The table whose column of one expert ``node`` is, with the expert's number."""
    node = peel(node, _COPIES)
    while is_op(node, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim):
        node = peel(node.args[0], _COPIES)
    if not is_op(node, aten.select.int, aten.slice.Tensor) or not is_tensor(node.args[0]):
        return None
    rank = val(node.args[0]).dim()
    if int(argument(node, 1, "dim", 0)) % rank != rank - 1:
        return None
    expert = argument(node, 2, "start", 0)
    if is_op(node, aten.slice.Tensor) and shape(node)[-1] != 1:
        return None
    table = table_of(peel(node.args[0], _COPIES))
    if table is None or not isinstance(expert, int) or expert < 0:
        return None
    return table, expert
