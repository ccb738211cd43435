"""Tables of scores, one for each expert, that are 0 but for those of the chosen experts.

    zeros(T, E).scatter(1, index, weight)        probabilities * zeros(T, E).scatter(1, index, 1)
    table / table.sum(-1, keepdim=True)
    softmax(full(-inf).scatter(1, index, logit))            softmax(logits where such a mask is 1)
    (one_hot(index, E) * weight[..., None]).sum(-2)         the same as a product of matrices

A scatter of a top-k writes every score once, since its indices differ from each other.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.axes import Axes
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
_MOVES = VIEWS | {aten.permute.default, aten.squeeze.dim, aten.unsqueeze.default}


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
            indices = _mask_of_chosen(mask)
            if indices is not None and same_shape(shape(dense), shape(mask)):
                return Table(node, indices, None, dense)
        return None
    if is_op(node, aten.div.Tensor) and is_tensor(node.args[1]):
        above, below = node.args
        table = table_of(peel(above, _COPIES)) if is_tensor(above) else None
        if table is None or not known_equal(shape(below)[-1], 1):
            return None
        return Table(node, table.indices, None, node)
    if is_op(node, aten._softmax.default):
        if int(node.args[1]) % val(node).dim() != val(node).dim() - 1:
            return None
        indices = _left_out(peel(node.args[0], _COPIES))
        return None if indices is None else Table(node, indices, None, node)
    if is_op(node, aten.where.self) and is_zero(node.args[2]):
        indices = _mask_of_chosen(node.args[0])
        fits = indices is not None and same_shape(shape(node.args[1]), shape(node))
        return Table(node, indices, None, node.args[1]) if fits else None  # type: ignore[arg-type]
    if not is_op(node, aten.scatter.src, aten.scatter_add.default):
        return _of_one_hot(node)
    indices = _chosen(node)
    if indices is None or not same_shape(shape(node.args[3]), shape(indices)):
        return None
    return Table(node, indices, node.args[3])


def _mask_of_chosen(mask: Any) -> fx.Node | None:
    """The indices of a mask that is 1 where they point, and 0 elsewhere."""
    mask = peel(mask, _COPIES)
    if is_op(mask, aten.ne.Scalar, aten.gt.Scalar) and mask.args[1] == 0:
        mask = peel(mask.args[0], _COPIES)
    if is_op(mask, aten.scatter.value) and mask.args[3] == 1:
        return _chosen(mask)
    if is_op(mask, aten.sum.dim_IntList, aten.any.dim):
        dims = mask.args[1] if is_op(mask, aten.sum.dim_IntList) else [mask.args[1]]
        table = mask.args[0]
        if not argument(mask, 2, "keepdim", False) and [d % val(table).dim() for d in dims] == [
            val(table).dim() - 2
        ]:
            return _one_hot(table)
    return None


def _left_out(node: Any) -> fx.Node | None:
    """The indices of the scores that are not -inf."""
    if is_op(node, aten.scatter.src):
        return _chosen(node, -math.inf)
    if is_op(node, aten.masked_fill.Scalar) and node.args[2] == -math.inf:
        left = peel(node.args[1], _COPIES)
        if is_op(left, aten.eq.Scalar) and left.args[1] == 0:
            return _mask_of_chosen(left.args[0])
        if is_op(left, aten.logical_not.default, aten.bitwise_not.default):
            return _mask_of_chosen(left.args[0])
        if is_op(left, aten.scatter.value) and left.args[3] == 0:  # ones where none was chosen
            return _chosen(left, 1.0)
    if is_op(node, aten.where.self) and _is_full(node.args[2], -math.inf):
        return _mask_of_chosen(node.args[0])
    return None


def _one_hot(node: Any) -> fx.Node | None:
    """The indices ``[..., k]`` of a one-hot table ``[..., k, E]`` of a top-k."""
    node = peel(node, _COPIES)
    if not is_op(node, aten.eq.Tensor) or not is_op(node.args[0], aten.unsqueeze.default):
        return None
    wide, numbers = node.args
    counted = is_op(numbers, aten.arange.default) and len(numbers.args) == 1
    if not counted or not same_shape(shape(wide), (*shape(node)[:-1], 1)):
        return None
    indices = wide.args[0]
    if not same_shape(shape(indices), shape(node)[:-1]):
        return None
    return indices if chosen_among(indices) == shape(node)[-1] else None


def _of_one_hot(node: Any) -> Table | None:
    """A table that is the sum of one-hot rows times their weights."""
    if is_op(node, aten.sum.dim_IntList):
        inner, dims = peel(node.args[0], _COPIES), node.args[1]
        rank = val(inner).dim()
        if argument(node, 2, "keepdim", False) or [d % rank for d in dims] != [rank - 2]:
            return None
        if not is_op(inner, aten.mul.Tensor) or not all(is_tensor(a) for a in inner.args):
            return None
        for hot, weight in (inner.args, inner.args[::-1]):
            indices = _one_hot(hot)
            if indices is None or not known_equal(shape(weight)[-1], 1):
                continue
            while is_op(weight, *VIEWS, aten.unsqueeze.default):
                if same_shape(shape(weight), shape(indices)):
                    break
                weight = weight.args[0]
            if same_shape(shape(weight), shape(indices)):
                return Table(node, indices, weight)
        return None
    product = peel(node, _MOVES)
    if product is node or not is_op(product, aten.bmm.default):
        return None
    axes = Axes()
    term = axes.term(node)
    for hot, weight in (term.factors, term.factors[::-1]) if len(term.factors) == 2 else ():
        indices = _one_hot(hot.node)
        if indices is None or not same_shape(shape(weight.node), shape(indices)):
            continue
        chosen, expert = axes.flat(hot.dims[:-1]), axes.flat(hot.dims[-1:])
        lead = axes.flat(hot.dims[:-2])
        if axes.flat(weight.dims) == chosen and axes.flat(term.dims) == [*lead, *expert]:
            return Table(node, indices, weight.node)
    return None


def _chosen(scatter: fx.Node, fill: float = 0.0) -> fx.Node | None:
    """The indices that a scatter writes to along the last dimension, if it writes into ``fill``
    and they are a top-k's."""
    into, dim, indices = scatter.args[:3]
    rank = val(scatter).dim()
    if int(dim) % rank != rank - 1 or not _is_full(into, fill):  # type: ignore[arg-type]
        return None
    return indices if chosen_among(indices) is not None else None  # type: ignore[return-value]


def chosen_among(node: Any, apart: bool = True) -> int | None:
    """How many experts the indices ``node`` are of; None: it is not known, or, if they are to be
    ``apart``, a token (all of the last dimension) may choose one twice."""
    base = peel(node, _COPIES | VIEWS | {aten.unsqueeze.default, aten.squeeze.dim})
    if is_op(base, aten.select.int, aten.slice.Tensor) and not apart:
        base = peel(base.args[0], _COPIES | VIEWS)
    if is_op(base, aten.argmax.default):
        inner, dim, k = base, argument(base, 1, "dim"), 1
    elif getattr(base, "target", None) is operator.getitem and base.args[1] == 1:
        inner = base.args[0]
        if is_op(inner, aten.topk.default):
            dim = argument(inner, 2, "dim", -1)
        elif is_op(inner, aten.max.dim):
            dim = argument(inner, 1, "dim")
        elif is_op(inner, aten.sort.default):
            dim = argument(inner, 1, "dim", -1)
        else:
            return None
        k = 1 if is_op(inner, aten.max.dim) else shape(base)[-1]
    else:
        return None
    scores = inner.args[0]
    if dim is None or int(dim) % val(scores).dim() != val(scores).dim() - 1:
        return None
    if apart and not known_equal(shape(node)[-1] if val(node).dim() else 1, k):
        return None
    size = shape(scores)[-1]
    return size if isinstance(size, int) else None


def _is_full(node: Any, number: float) -> bool:
    """Whether ``node`` is full of ``number``."""
    if number == 0:
        return is_zero(node)
    node = peel(node, _COPIES) if isinstance(node, fx.Node) else node
    if is_op(node, aten.full.default, aten.full_like.default):
        return node.args[1] == number
    if is_op(node, aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return number == 1
    return node == number or (is_op(node, aten.scalar_tensor.default) and node.args[0] == number)


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
