"""One expert's part of a sum over experts, as loops over experts write it.

    y.index_add_(0, token, expert(x[token]) * weight[token, slot, None])    chosen rows
    y[mask] += expert(x[mask]) * weight[mask, 0, None]        mask = choice[:, 0] == e
    y[mask] = expert(x[mask])                                 one choice for each row, written once
    y = y + expert(x) * (weight * (choice == e)).sum(-1)                    every row
    y = y + expert(x) * table[:, e, None]         every row, a table of scores (`expert_table`)
    y.index_add_(0, token, x[token] * weight[token, slot, None])            gives x back

`step` reads a node as one. Which rows an expert gets is read by `expert_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.expert_rows import (
    Mask,
    Rows,
    Weight,
    bare,
    dense_weight,
    halves,
    mask_of,
    row_weight,
    rows_of,
    single_choice,
    taken,
    tokens_weight,
)
from dspark_compile.passes.expert_table import column_of
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

MLPS = ("gated_mlp", "gated_mlp_merged", "mlp")


@dataclass(frozen=True)
class Step:
    """One expert's part of the sum.

    Attributes:
        node: the sum with the part.
        before: the sum so far.
        mlp: the dialect op; None for an expert that gives its input back.
        part: the expert's rows, as they are multiplied with their weights.
        x, choice: of all tokens.
        weight: the choices' weights; None: all are 1.
        expert: its number.
        slot: the column of ``choice`` that is gone through; None: all of them.
        single: ``choice`` is one for each token, without a dimension for the k.
        overwrites: the rows are written, not added.
        rows: the nodes that say which tokens' rows they are.
    """

    node: fx.Node
    before: fx.Node
    mlp: fx.Node | None
    part: fx.Node
    x: fx.Node
    choice: fx.Node
    weight: Weight | None
    expert: int
    slot: int | None = None
    single: bool = False
    overwrites: bool = False
    rows: tuple[fx.Node, ...] = ()


def step(node: fx.Node) -> Step | None:
    """``node`` as a sum that one more expert's rows are added to; None if it is none."""
    where: list[Any] | None = None
    overwrites = False
    added = addition(node)
    if added is not None:
        before, rows, part = added
        where = [rows]
    elif is_op(node, aten.index_put.default):
        before, where, part = node.args[0], list(node.args[1]), node.args[2]  # type: ignore[arg-type,assignment]
        if not argument(node, 3, "accumulate", False):
            kept = None
            if is_op(part, aten.add.Tensor) and part.kwargs.get("alpha", 1) == 1:
                kept, more = part.args[:2]
                if not _gathers(kept, before, where):
                    kept, more = more, kept
                if _gathers(kept, before, where):
                    part = more
                else:
                    kept = None
            overwrites = kept is None
    elif is_op(node, aten.index_copy.default) and node.args[1] == 0:
        before, where, part = node.args[0], [node.args[2]], node.args[3]  # type: ignore[assignment]
        overwrites = True
    elif is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1:
        before, part = node.args[:2]  # type: ignore[assignment]
        if not _is_part(part):
            before, part = part, before
    else:
        return None
    if not isinstance(before, fx.Node) or not isinstance(part, fx.Node):
        return None
    if where is None:
        return _dense(node, before, part)
    if any(not isinstance(w, fx.Node) for w in where):
        return None
    return _read(node, before, part, where, overwrites)


def first_step(node: Any) -> Step | None:
    """``node`` as the part that a sum begins with; None if it is none."""
    return _dense(node, node, node) if _is_part(node) else None


def addition(node: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(before, places, part) if ``node`` adds rows of a part to rows of ``before``."""
    if is_op(node, aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two):
        if node.args[1] != 0:
            return None
        before, _, places, part = node.args[:4]
        if is_op(node, aten.index_add.default):
            if argument(node, 4, "alpha", node.kwargs.get("alpha", 1)) != 1:
                return None
        else:
            summed = is_op(node, aten.scatter_add.default) or node.args[4:] == ("sum",)
            spread = spread_rows(places)
            if not summed or node.kwargs or spread is None or val(node).dim() != 2:
                return None
            places = spread
    elif is_op(node, aten.index_put.default) and argument(node, 3, "accumulate", False):
        before, where, part = node.args[:3]
        if len(where) != 1:
            return None
        (places,) = where
    else:
        return None
    if not is_tensor(places) or val(places).dim() != 1 or not is_tensor(part):
        return None
    return before, places, part


def spread_rows(places: Any) -> fx.Node | None:
    """``rows [S]`` if ``places`` has each for all columns: ``rows[:, None].expand(S, N)``."""
    places = peel(places)
    if not is_op(places, aten.expand.default, aten.repeat.default) or val(places).dim() != 2:
        return None
    if is_op(places, aten.repeat.default) and list(places.args[1])[:-1] != [1]:
        return None
    places = peel(places.args[0])
    if shape(places)[-1] != 1:
        return None
    while is_op(places, *VIEWS, aten.unsqueeze.default):
        places = peel(places.args[0])
    return places if val(places).dim() == 1 else None  # type: ignore[no-any-return]


def _is_part(node: Any) -> bool:
    factors = _factors(bare(node))
    return len(factors) > 1 and any(is_dialect_op(bare(f), *MLPS) for f in factors)


def _factors(node: Any) -> list[Any]:
    """An MLP's result and what it is multiplied with; one item: it is none, or with nothing."""
    parts = halves(node)
    if parts is None:
        return [node]
    found: list[Any] = []
    for part in parts:
        inner = _factors(part)
        whole = not any(is_dialect_op(bare(f), *MLPS) for f in inner)
        found += [part] if whole else inner
    return found


def _gathers(node: Any, source: Any, where: list[Any]) -> bool:
    return is_op(node, aten.index.Tensor) and node.args[0] is source and list(node.args[1]) == where


def _read(
    node: fx.Node, before: fx.Node, part: fx.Node, where: list[Any], overwrites: bool
) -> Step | None:
    """A step over the rows of the tokens that ``where`` indexes."""
    rows = rows_of(where)
    if rows is None:
        return None
    product = bare(part)
    pairs: list[tuple[Any, Any]] = [(product, None)]
    if is_op(product, aten.mul.Tensor):
        pairs = [product.args[:2], product.args[:2][::-1]]
    for a, b in pairs:
        if not is_tensor(a) or (b is not None and not _a_row_each(b, a)):
            continue
        inner = bare(a)
        mlp = inner if is_dialect_op(inner, *MLPS) else None
        if not is_tensor(inner) or not same_shape(shape(a), shape(inner)):
            continue
        if mlp is None and b is None:
            continue
        x = taken(inner if mlp is None else mlp.args[0], rows)
        weight = None if b is None else row_weight(b, rows)
        if x is None or (b is not None and weight is None):
            continue
        choice, slot = single_choice(rows.mask) if rows.single else (rows.mask.choice, None)
        return Step(
            node, before, mlp, inner, x, choice, weight, rows.mask.expert, slot,
            rows.single and slot is None, overwrites, (*rows.where, *(peel(w) for w in where)),
        )  # fmt: skip
    return None


def _a_row_each(b: Any, a: Any) -> bool:
    """One number for each row of ``a``: [T] beside [T, D] would meet the columns."""
    return is_tensor(b) and len(shape(b)) == len(shape(a)) and known_equal(shape(b)[-1], 1)


def _dense(node: fx.Node, before: fx.Node, part: fx.Node) -> Step | None:
    """A step over the rows of all tokens, most of which are multiplied with 0."""
    factors = _factors(bare(part))
    mlps = [f for f in factors if is_dialect_op(bare(f), *MLPS)]
    others = [f for f in factors if f not in mlps]
    if len(mlps) != 1 or not 1 <= len(others) <= 2:
        return None
    mlp = bare(mlps[0])
    if not same_shape(shape(mlps[0]), shape(mlp)):
        return None
    if not all(_a_row_each(o, mlp) for o in others):
        return None

    def found(mask: Mask, weight: Weight, choice: fx.Node, slot: int | None, single: bool) -> Step:
        return Step(
            node, before, mlp, mlp, mlp.args[0], choice, weight, mask.expert, slot, single
        )  # fmt: skip

    if len(others) == 1:
        mask, weight = dense_weight(others[0])
        if mask is not None and weight is not None:
            return found(mask, Weight(weight), mask.choice, None, False)
        table = column_of(others[0])
        if table is not None:
            given = Weight(table[0].weights) if table[0].weights is not None else None
            given = given or Weight(table[0].dense, True)  # type: ignore[arg-type]
            mask = Mask(table[0].indices, table[1], False)
            return found(mask, given, mask.choice, None, False)
        others = list(halves(bare(others[0])) or ())
    for which, scores in (others, others[::-1]) if others else ():
        mask = mask_of(bare(which))
        if mask is None or mask.turned:
            continue
        if not known_equal(val(which).numel(), val(mask.choice).numel()):
            continue
        rows = Rows((), mask, True)
        given = tokens_weight(scores, rows)
        if given is not None:
            choice, slot = single_choice(mask)
            return found(mask, given, choice, slot, slot is None)
    return None
