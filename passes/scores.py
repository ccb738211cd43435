"""Read attention scores backwards: from the softmax's input to the product of queries and keys.

    softmax input = cap(scale * q @ k^T) + biases, with fills where keys are forbidden

`find` looks for the chain of operations between the two, loosely, so that near misses are
seen; `read` then says exactly what the chain means, or raises `Miss` with the first node
and condition that put it outside of the dialect's attention. Neither changes the graph.
"""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    dtype,
    is_dialect_op,
    is_fake,
    is_op,
    is_tensor,
    known_equal,
    peel_casts,
    same_shape,
    shape,
    val,
)

FORBIDS = -1e4
"""A score replaced by this or less gets no probability; above it, the fill is a rejection."""

_MAX_LENGTH = 32
_RESHAPES = (
    *VIEWS,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.expand.default,
)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self)
_FLOORS = (aten.maximum.default, aten.clamp.default, aten.clamp_min.default, aten.clamp.Tensor)


class Miss(Exception):
    """The chain of scores is not the dialect's attention."""

    def __init__(self, condition: str, hint: str = "", node: fx.Node | None = None) -> None:
        super().__init__(condition)
        self.condition, self.hint, self.node = condition, hint, node


@dataclass
class Term:
    """Something added: ``factor * node``; ``lead`` are the scores' dimensions before the
    last two at that point."""

    node: fx.Node
    lead: tuple[Any, ...]
    factor: float = 1.0


@dataclass
class Fill:
    """Scores replaced by ``value`` where ``node`` is True (False, if ``allowed``)."""

    node: fx.Node
    lead: tuple[Any, ...]
    allowed: bool
    value: float


@dataclass
class Scores:
    """What a chain of scores means, in the terms of the module's docstring.

    ``floor``: the biased scores are at least this. ``shifted``: the maximum was subtracted.
    ``sinks``: one more score for each head, before the others if ``sink_first``.
    """

    product: fx.Node
    query: fx.Node
    key_t: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    row_scales: list[Term] = field(default_factory=list)
    extras: list[Term | Fill] = field(default_factory=list)
    floor: float | None = None
    shifted: bool = False
    sinks: fx.Node | float | None = None
    sink_first: bool = False
    leads: list[tuple[Any, ...]] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def lead(self) -> tuple[Any, ...]:
        return self.leads[-1]


def lead_of(node: fx.Node) -> tuple[Any, ...]:
    """The dimensions before the last two."""
    return shape(node)[:-2]


def is_product(node: object) -> bool:
    """Whether a node multiplies two batches of matrices (or two matrices)."""
    return is_dialect_op(node, "matmul") or is_op(
        node, aten.bmm.default, aten.baddbmm.default, aten.mm.default
    )


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The left and right operand of a product."""
    first = 1 if is_op(node, aten.baddbmm.default) else 0
    return node.args[first], node.args[first + 1]  # type: ignore[return-value]


def constant(value: Any) -> float | None:
    """The number that ``value`` (an argument) holds in every element, if it is known."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or not is_tensor(value):
        return None
    if is_op(value, aten.full.default, aten.full_like.default, aten.new_full.default):
        index = 2 if is_op(value, aten.new_full.default) else 1
        return constant(value.args[index])
    if is_op(value, aten.scalar_tensor.default):
        return constant(value.args[0])
    if is_op(value, aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default):
        return 0.0
    if is_op(value, aten.ones.default, aten.ones_like.default, aten.new_ones.default):
        return 1.0
    if is_op(value, *TRANSPARENT, *_RESHAPES) or is_op(value, aten._to_copy.default):
        inner = constant(value.args[0])
        return inner if dtype(value).is_floating_point else None
    if is_op(value, aten.sqrt.default, aten.rsqrt.default):
        inner = constant(value.args[0])
        if inner is None or inner <= 0:
            return None
        return math.sqrt(inner) if is_op(value, aten.sqrt.default) else 1 / math.sqrt(inner)
    if value.op == "get_attr" and str(value.target).startswith("_tensor_constant"):
        # A number that the traced code made a tensor of; weights are inputs, not attributes.
        held = getattr(value.graph.owning_module, str(value.target), None)
        if isinstance(held, torch.Tensor) and not is_fake(held) and held.numel() == 1:
            return float(held)
    return None


# --- the loose search ------------------------------------------------------------------------


def _known(node: fx.Node) -> bool:
    return is_op(
        node,
        *TRANSPARENT,
        *_RESHAPES,
        *_FILLS,
        *_FLOORS,
        aten._to_copy.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.tanh.default,
        aten.cat.default,
        aten.constant_pad_nd.default,
    )


def _operands(node: fx.Node) -> list[fx.Node]:
    """The operands of ``node`` that scores may come through."""
    if is_op(node, aten.where.self):
        return [a for a in node.args[1:3] if is_tensor(a)]  # type: ignore[misc]
    if is_op(node, aten.cat.default):
        return [a for a in node.args[0] if is_tensor(a)]  # type: ignore[union-attr,misc]
    if is_op(node, aten.add.Tensor, aten.mul.Tensor, aten.maximum.default):
        return [a for a in node.args[:2] if is_tensor(a)]  # type: ignore[misc]
    if _known(node):
        return [a for a in node.args[:1] if is_tensor(a)]  # type: ignore[misc]
    return [a for a in node.all_input_nodes if is_tensor(a)]


def _stops(node: fx.Node) -> bool:
    """Whether no scores can lie behind a node: inputs, weights, other matrix products."""
    if node.op != "call_function" or not is_tensor(node) or val(node).dim() < 2:
        return True
    if getattr(node.target, "namespace", None) == "dspark":
        return True
    return is_op(
        node,
        aten.addmm.default,
        aten.embedding.default,
        aten.convolution.default,
        aten._softmax.default,
        aten.topk.default,
        aten.sort.default,
        aten.index_copy.default,
        aten.index_put.default,
    )


_Path = tuple[int, tuple[fx.Node, ...]]


def find(start: fx.Node, memo: dict[fx.Node, _Path | None] | None = None) -> list[fx.Node] | None:
    """The nodes from the product of queries and keys up to ``start``, both included.

    Of several chains the one with the fewest operations that `read` does not know, then the
    shortest; None if no product is near.
    """
    memo = {} if memo is None else memo

    def search(node: fx.Node, depth: int) -> _Path | None:
        if is_product(node):
            return 0, (node,)
        if node in memo:
            return memo[node]
        memo[node] = None
        best: _Path | None = None
        if depth < _MAX_LENGTH and not _stops(node):
            for operand in _operands(node):
                found = search(operand, depth + 1)
                if found is None:
                    continue
                strange = found[0] + (not _known(node))
                if best is None or (strange, len(found[1])) < (best[0], len(best[1]) - 1):
                    best = strange, (*found[1], node)
        memo[node] = best
        return best

    found = search(start, 0)
    return list(found[1]) if found is not None else None


# --- the exact reading -----------------------------------------------------------------------


def is_row_max(node: fx.Node, of: fx.Node) -> bool:
    """Whether ``node`` is the maximum of ``of`` over the last dimension, kept."""
    node = peel_casts(node)
    if is_op(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
        if not is_op(node, aten.max.dim):
            return False
        dims = [node.args[1]]
    elif is_op(node, aten.amax.default):
        dims = list(argument(node, 1, "dim", []))
    else:
        return False
    rank = val(of).dim()
    kept = bool(argument(node, 2, "keepdim", False))
    return (
        kept
        and [int(d) % rank for d in dims] == [rank - 1]
        and (peel_casts(node.args[0]) is peel_casts(of))
    )


def read(path: list[fx.Node]) -> Scores:
    """The meaning of a chain that `find` found.

    Raises:
        Miss: the chain is not the dialect's attention.
    """
    product = path[0]
    query, key_t = factors(product)
    scores = Scores(product, query, key_t, leads=[lead_of(product)], nodes=list(path))
    rank = val(product).dim()
    if rank < 2 or not known_equal(shape(query)[-1], shape(key_t)[-2]):
        raise Miss("the scores are no product of two matrices", node=product)
    if is_op(product, aten.baddbmm.default):
        _baddbmm(scores, product)
    for before, node in itertools.pairwise(path):
        _step(scores, before, node)
    for extra in scores.extras:
        if isinstance(extra, Fill) and not extra.value <= FORBIDS:
            raise Miss(
                f"masked scores get the value {extra.value:g}, which does not forbid them",
                "fill with -inf or torch.finfo(dtype).min",
                path[-1],
            )
    return scores


def _baddbmm(scores: Scores, node: fx.Node) -> None:
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        alpha = _of_head_size(alpha, scores.query)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        raise Miss("baddbmm's alpha or beta is not a number", node=node)
    scores.scale *= float(alpha)
    added = node.args[0]
    assert isinstance(added, fx.Node)
    if beta != 0 and constant(added) != 0:
        scores.extras.append(Term(added, scores.lead, float(beta)))


def _step(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """Take one operation into ``scores``; its score operand is ``before``."""
    if is_op(node, *TRANSPARENT):
        return
    if is_op(node, aten._to_copy.default):
        if not dtype(node).is_floating_point:
            raise Miss(f"the scores are cast to {dtype(node)}", node=node)
        return
    if is_op(node, aten.sub.Tensor) and isinstance(node.args[1], fx.Node):
        if is_row_max(node.args[1], before):
            scores.shifted = True
            return
    if scores.sinks is not None:
        raise Miss(f"{node.target} comes after the sink", "add the sink last", node)
    if is_op(node, *_RESHAPES):
        a, b = shape(before), shape(node)
        if len(b) < 2 or not same_shape(a[-2:], b[-2:]):
            raise Miss("the scores are reshaped in their rows or keys", node=node)
        if is_op(node, aten.expand.default) and len(a) == len(b) and not same_shape(a, b):
            raise Miss("the scores are expanded", node=node)
        scores.leads.append(b[:-2])
    elif is_op(node, aten.mul.Tensor, aten.div.Tensor):
        _scaled(scores, before, node)
    elif is_op(node, aten.tanh.default):
        if scores.extras or scores.softcap or scores.shifted:
            raise Miss("tanh comes after the mask or after another tanh", node=node)
        scores.softcap = 1.0
    elif is_op(node, aten.add.Tensor, aten.sub.Tensor):
        _added(scores, before, node)
    elif is_op(node, *_FILLS):
        _filled(scores, before, node)
    elif is_op(node, *_FLOORS):
        _floored(scores, before, node)
    elif is_op(node, aten.cat.default, aten.constant_pad_nd.default):
        _sinks(scores, before, node)
    else:
        raise Miss(
            f"{node.target} between the scores and the softmax is not attention's",
            "attention allows scaling, a soft-cap, added biases, masks and sinks",
            node,
        )


def _other(before: fx.Node, node: fx.Node) -> tuple[Any, bool]:
    """The operand that is not the scores, and whether it comes second."""
    second = node.args[0] is before
    return node.args[1] if second else node.args[0], second


def _keeps_shape(before: fx.Node, node: fx.Node) -> None:
    if not same_shape(shape(before), shape(node)):
        raise Miss(
            f"the scores are broadcast from {tuple(shape(before))} to {tuple(shape(node))}",
            node=node,
        )


def _scaled(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    other, second = _other(before, node)
    divides = is_op(node, aten.div.Tensor)
    if divides and (not second or argument(node, 2, "rounding_mode") is not None):
        raise Miss("the scores are a divisor, or divided with rounding", node=node)
    if other is before:
        raise Miss("the scores are squared", node=node)
    _keeps_shape(before, node)
    number = constant(other)
    if number is None:
        number = _of_head_size(other, scores.query)
    if number is None:
        _row_scaled(scores, other, divides, node)
        return
    if not math.isfinite(number) or number == 0:
        raise Miss(f"the scores are multiplied or divided by {number}", node=node)
    number = 1 / number if divides else number
    if (scores.softcap or scores.extras) and number < 0:
        raise Miss("the scores are negated after the mask or the soft-cap", node=node)
    scores.scale *= number
    scores.softcap *= number
    for extra in scores.extras:
        if isinstance(extra, Term):
            extra.factor *= number
        else:
            extra.value *= number


def _of_head_size(value: Any, query: fx.Node) -> float | None:
    """A symbolic number that depends on the head size alone, which is thereby made static."""
    symbolic = value.meta.get("val") if isinstance(value, fx.Node) else value
    if not isinstance(symbolic, (torch.SymFloat, torch.SymInt)):
        return None
    size = shape(query)[-1]
    free = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
    return float(symbolic) if symbolic.node.expr.free_symbols <= free else None


def _row_scaled(scores: Scores, other: Any, divides: bool, node: fx.Node) -> None:
    if not isinstance(other, fx.Node) or not is_tensor(other):
        raise Miss("the scale is a symbolic number", node=node)
    if divides or scores.softcap or scores.extras:
        raise Miss("the scores are divided by a tensor, or multiplied after the mask", node=node)
    last = shape(other)[-1] if val(other).dim() else 1
    if not known_equal(last, 1):
        raise Miss(
            "the scores are multiplied by a tensor that differs between keys",
            "add a bias, or mask with where or masked_fill",
            node,
        )
    scores.row_scales.append(Term(other, scores.lead))


def _added(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    other, second = _other(before, node)
    if is_op(node, aten.sub.Tensor) and not second:
        raise Miss("the scores are subtracted from something", node=node)
    alpha = node.kwargs.get("alpha", 1)
    if other is before or not isinstance(alpha, (int, float)) or (alpha != 1 and not second):
        raise Miss("the scores are added with a factor", node=node)
    if constant(other) == 0:
        _keeps_shape(before, node)
        return
    if not isinstance(other, fx.Node) or not is_tensor(other):
        raise Miss(f"{other} is added to the scores", node=node)
    _keeps_shape(before, node)
    sign = -1.0 if is_op(node, aten.sub.Tensor) else 1.0
    scores.extras.append(Term(other, scores.lead, sign * float(alpha)))


def _filled(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    if is_op(node, aten.where.self):
        mask, yes, no = node.args
        allowed = yes is before
        fill = no if allowed else yes
    else:
        _, mask, fill = node.args
        allowed = False
    value = constant(fill)
    if value is None or math.isnan(value):
        raise Miss(
            "masked scores get a value that is not a known number",
            "fill with -inf or torch.finfo(dtype).min",
            node,
        )
    if not isinstance(mask, fx.Node) or dtype(mask) != torch.bool:
        raise Miss("the mask is not boolean", node=node)
    _keeps_shape(before, node)
    scores.extras.append(Fill(mask, scores.lead, allowed, value))


def _floored(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """``max(scores, finfo.min)`` only turns -inf into a finite number."""
    ceiling = None
    if is_op(node, aten.maximum.default):
        floor = constant(_other(before, node)[0])
    else:
        floor = constant(argument(node, 1, "min"))
        if not is_op(node, aten.clamp_min.default):
            ceiling = argument(node, 2, "max")
    if ceiling is not None or floor is None or floor > torch.finfo(dtype(node)).min:
        raise Miss("the scores are clamped", node=node)
    _keeps_shape(before, node)
    for extra in scores.extras:
        if isinstance(extra, Fill):
            extra.value = max(extra.value, floor)
        else:
            scores.floor = floor


def _sinks(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    rank = val(node).dim()
    if scores.shifted:
        raise Miss("the sink is added after the maximum was subtracted", node=node)
    if is_op(node, aten.constant_pad_nd.default):
        pads = list(node.args[1])  # type: ignore[arg-type]
        value = argument(node, 2, "value", 0)
        if any(pads[2:]) or sorted(pads[:2]) != [0, 1] or not isinstance(value, (int, float)):
            raise Miss("the scores are padded", node=node)
        scores.sinks, scores.sink_first = float(value), pads[0] == 1
        return
    parts = list(node.args[0])  # type: ignore[arg-type]
    dim = int(argument(node, 1, "dim", 0)) % rank
    if len(parts) != 2 or dim != rank - 1 or parts[0] is parts[1]:
        raise Miss("scores are concatenated with others before the softmax", node=node)
    first = parts[1] is before
    sink = parts[0] if first else parts[1]
    if not known_equal(shape(sink)[-1], 1):
        raise Miss(f"{shape(sink)[-1]} extra scores are concatenated, not one sink", node=node)
    # Only what is the same for every batch entry and row is a sink per head.
    while is_op(sink, aten.expand.default, aten._to_copy.default, *TRANSPARENT):
        sink = sink.args[0]
    dims = list(shape(sink))
    dims = [1] * (rank - len(dims)) + dims
    heads = dims[:-2]
    grouped = rank == 5 and same_shape(heads[1:], scores.lead[1:]) and known_equal(heads[0], 1)
    alone = all(known_equal(d, 1) for d in heads[:-1])
    if not known_equal(dims[-2], 1) or not (alone or grouped):
        value = constant(sink)
        if value is None:
            raise Miss("the sink is not one number for each head", node=node)
        scores.sinks, scores.sink_first = value, first
        return
    if not heads or not (grouped or rank == 4):
        raise Miss("scores with a sink are not [B, H, M, N]", node=node)
    scores.sinks, scores.sink_first = sink, first
