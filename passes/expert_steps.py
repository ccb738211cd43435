"""One expert's part of a sum over experts, as loops over experts write it.

    y.index_add_(0, token, expert(x[token]) * weight[token, slot, None])    chosen rows
    y = y + expert(x) * (weight * (choice == e)).sum(-1)                    every row
    y = y + expert(x) * table[:, e, None]         every row, a table of scores (`expert_table`)
    y.index_add_(0, token, x[token] * weight[token, slot, None])            gives x back

`step` reads a node as one; the mask ``choice == e`` may be a slice of a one-hot table.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.expert_table import column_of, is_zero
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

_CAST = aten._to_copy.default
MLPS = ("gated_mlp", "gated_mlp_merged", "mlp")


@dataclass(frozen=True)
class Mask:
    """``choice == expert``: ``[..., k]``, or ``[k, T]`` if ``turned``."""

    choice: fx.Node
    expert: int
    turned: bool


@dataclass(frozen=True)
class Step:
    """One expert's part of the sum.

    Attributes:
        before: the sum so far.
        mlp: the dialect op; None for an expert that gives its input back.
        part: the expert's rows, as they are multiplied with their weights.
        x, choice, weight: of all tokens.
        expert: its number.
    """

    before: fx.Node
    mlp: fx.Node | None
    part: fx.Node
    x: fx.Node
    choice: fx.Node
    weight: fx.Node
    expert: int


def step(node: fx.Node) -> Step | None:
    """``node`` as a sum that one more expert's rows are added to; None if it is none."""
    rows: Any = None
    if is_op(node, aten.index_add.default) and node.args[1] == 0:
        if argument(node, 4, "alpha", node.kwargs.get("alpha", 1)) != 1:
            return None
        before, rows, part = node.args[0], node.args[2], node.args[3]
    elif is_op(node, aten.index_put.default) and len(node.args[1]) == 1:  # type: ignore[arg-type]
        before, rows, part = node.args[0], node.args[1][0], node.args[2]  # type: ignore[index]
        if not argument(node, 3, "accumulate", False):
            if not is_op(part, aten.add.Tensor):
                return None
            kept, part = part.args[:2]  # type: ignore[union-attr]
            if not _gathers(kept, before, rows):
                kept, part = part, kept
            if not _gathers(kept, before, rows):
                return None
    elif is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
        before, part = node.args[:2]
        if not _is_part(part):
            before, part = part, before
    else:
        return None
    if not isinstance(before, fx.Node) or not isinstance(part, fx.Node):
        return None
    return _read(before, part, peel(rows) if rows is not None else None)


def first_step(node: Any) -> Step | None:
    """``node`` as the part that a sum begins with; None if it is none."""
    return _read(node, node, None) if _is_part(node) else None


def _is_part(node: Any) -> bool:
    node = _bare(node)
    return is_op(node, aten.mul.Tensor) and any(is_dialect_op(_bare(x), *MLPS) for x in node.args)


def _bare(node: Any) -> Any:
    """``node`` without casts, copies and views."""
    while is_op(node, _CAST, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim) or (
        isinstance(node, fx.Node) and peel(node) is not node
    ):
        node = node.args[0]
    return node


def _gathers(node: Any, source: Any, rows: Any) -> bool:
    return is_op(node, aten.index.Tensor) and node.args[0] is source and node.args[1] == [rows]


def _read(before: fx.Node, part: fx.Node, rows: fx.Node | None) -> Step | None:
    product = _bare(part)
    if not is_op(product, aten.mul.Tensor):
        return None
    for a, b in (product.args, product.args[::-1]):
        part = _bare(a)
        mlp = part if is_dialect_op(part, *MLPS) else None
        if not is_tensor(b) or not is_tensor(part) or not same_shape(shape(a), shape(part)):
            continue
        if len(shape(b)) != len(shape(a)) or not known_equal(shape(b)[-1], 1):
            continue  # [T] beside [T, D] would meet the columns
        if rows is None:
            if mlp is None:
                continue
            mask, weight = _dense_weight(b)
            if mask is None:
                mask, weight = _table_weight(b)
            x = mlp.args[0]
        else:
            mask, weight = _row_weight(b, rows)
            x = _rows_of(part if mlp is None else mlp.args[0], rows)
        if mask is not None and weight is not None and x is not None:
            return Step(before, mlp, part, x, mask.choice, weight, mask.expert)  # type: ignore[arg-type]
    return None


def _rows_of(node: Any, rows: fx.Node) -> fx.Node | None:
    """``x [T, K]`` if ``node`` is ``x[rows]``."""
    node = peel(node)
    while is_op(node, *VIEWS):
        node = peel(node.args[0])
    if not is_op(node, aten.index.Tensor):
        return None
    x, where = node.args[0], list(node.args[1])
    if len(where) == 2 and where[0] is None and is_op(x, aten.unsqueeze.default, *VIEWS):
        if val(x).dim() == 3 and shape(x)[0] == 1:
            x, where = x.args[0], where[1:]
    return x if len(where) == 1 and peel(where[0]) is rows and val(x).dim() == 2 else None


def _row_weight(node: Any, rows: fx.Node) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights ``[T, k]``) if ``node`` is ``weight[token, slot]`` for the mask's places."""
    node = _bare(node)
    if not is_op(node, aten.index.Tensor):
        return None, None
    source, where = node.args[0], [peel(w) for w in node.args[1]]
    if len(where) == 1 and where[0] is rows and is_op(rows, aten.any.dim):
        mask, weight = _dense_weight(source)
        chosen = _mask(rows.args[0])
        if chosen is None or chosen.turned or mask != chosen or int(rows.args[1]) not in (-1, 1):  # type: ignore[arg-type]
            return None, None
        if val(chosen.choice).dim() != 2:
            return None, None
        return mask, weight
    if len(where) != 2 or where[0] is not rows:
        return None, None
    token, slot = column(where[0]), column(where[1])
    if token is None or slot is None or token[0] is not slot[0]:
        return None, None
    mask = _mask(token[0].args[0])
    if mask is None or (token[1], slot[1]) != ((1, 0) if mask.turned else (0, 1)):
        return None, None
    while is_op(source, *VIEWS, aten.unsqueeze.default) and val(source).dim() > 2:
        source = source.args[0]
    return (mask, source) if same_shape(shape(source), shape(mask.choice)) else (None, None)


def column(node: Any) -> tuple[fx.Node, int] | None:
    """(nonzero node, which of its columns)."""
    node = peel(node)
    if is_op(node, aten.select.int) and int(node.args[1]) % 2 == 1:
        base, which = peel(node.args[0]), int(node.args[2])
    elif node.target is operator.getitem and is_op(node.args[0], aten.unbind.int):
        base, which = peel(node.args[0].args[0]), int(node.args[1])
    else:
        return None
    return (base, which) if is_op(base, aten.nonzero.default) else None


def _dense_weight(node: Any) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights) if ``node`` is ``(weight * mask).sum(-1)``, however spelt."""
    node = _bare(node)
    if not is_op(node, aten.sum.dim_IntList) or len(node.args[1]) != 1:
        return None, None
    if int(node.args[1][0]) % (rank := val(node.args[0]).dim()) != rank - 1:
        return None, None
    inner = _bare(node.args[0])
    if is_op(inner, aten.where.self):
        mask, weight, other = inner.args
        zero = is_zero(other)
    elif is_op(inner, aten.mul.Tensor):
        a, b = inner.args
        mask, weight, zero = (a, b, True) if _mask(a) is not None else (b, a, True)
    elif is_op(inner, aten.masked_fill.Scalar) and inner.args[2] == 0:
        weight, opposite, _ = inner.args
        mask, zero = peel(opposite), is_op(opposite, aten.logical_not.default)
        mask = mask.args[0] if zero else mask
    else:
        return None, None
    found = _mask(mask)
    if not zero or found is None or found.turned or not is_tensor(weight):
        return None, None
    return (found, weight) if same_shape(shape(weight), shape(found.choice)) else (None, None)


def _table_weight(node: Any) -> tuple[Mask | None, fx.Node | None]:
    """(mask, weights) if ``node`` is one expert's column of a table of scores."""
    found = column_of(node)
    if found is None or found[0].weights is None:
        return None, None
    table, expert = found
    return Mask(table.indices, expert, False), table.weights


def _mask(node: Any) -> Mask | None:
    """``node`` as ``choice == expert``."""
    while is_op(node, _CAST, aten.squeeze.dim, aten.unsqueeze.default) or (
        isinstance(node, fx.Node) and peel(node) is not node
    ):
        node = node.args[0]
    if is_op(node, aten.eq.Scalar) and isinstance(node.args[1], int) and val(node).dim() >= 2:
        return Mask(node.args[0], node.args[1], False)
    if not is_op(node, aten.select.int):
        return None
    table, dim, expert = node.args
    order = [0, 1, 2]
    if is_op(table, aten.permute.default):
        order, table = [int(d) % 3 for d in table.args[1]], table.args[0]  # type: ignore[union-attr]
    while is_op(table, _CAST):
        table = table.args[0]
    if not is_op(table, aten.eq.Tensor) or val(table).dim() != 3 or not isinstance(expert, int):
        return None
    choice, numbers = table.args
    counted = is_op(numbers, aten.arange.default) and len(numbers.args) == 1
    if not counted or not is_op(choice, aten.unsqueeze.default) or val(choice.args[0]).dim() != 2:
        return None
    rest = [d for i, d in enumerate(order) if i != int(dim) % 3]
    if order[int(dim) % 3] != 2:
        return None
    return Mask(choice.args[0], expert, rest == [1, 0])
