"""The statistic that a norm divides by: what a root was taken of, and whether it is a mean of
squares or a variance over the last dimension. `raise_norm` walks on from there."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dspark_compile.passes.base import Problem
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    is_op,
    is_tensor,
    known_equal,
    peel_upcasts,
    same_shape,
    shape,
    val,
)

_ROOTS = (aten.rsqrt.default, aten.sqrt.default)
_SUMS = (aten.mean.dim, aten.sum.dim_IntList)
USE_LAST = "normalise over the last dimension only"


@dataclass(frozen=True)
class Statistic:
    """What a root was taken of: ``scale * mean(source^2) + eps``, or the same of the variance.

    ``problem`` names the first thing that keeps it from being the dialect's.
    """

    source: fx.Node
    centred: bool
    eps: float
    problem: Problem | None = None
    scale: float = 1.0


def statistic_of(root: fx.Node) -> Statistic | None:
    """The statistic under ``root`` (``rsqrt``, ``sqrt``, a norm, a deviation), if it is one."""
    if is_op(root, aten.linalg_vector_norm.default):
        return _vector_norm(root)
    if is_op(root, aten.std.correction):
        return _variance(root, 0.0)
    if not is_op(root, *_ROOTS):
        return None
    node, eps, problem = root.args[0], 0.0, None
    node = unbroadcast(node)
    if is_op(node, aten.add.Tensor):
        terms = [a for a in node.args if not isinstance(a, fx.Node)]
        inner = [a for a in node.args if isinstance(a, fx.Node)]
        if len(terms) == 1 and len(inner) == 1 and not node.kwargs:
            node, eps = unbroadcast(inner[0]), float(terms[0])  # type: ignore[arg-type]
        elif len(inner) == 2:
            found = [s for s in map(_mean_square, map(unbroadcast, inner)) if s]
            if not found:
                return None
            reason = Problem("eps is a tensor", "make eps a Python float", node)
            return replace(found[0], problem=reason)
    elif is_op(node, aten.clamp_min.default, aten.clamp.default, aten.maximum.default):
        problem = Problem("the mean is clamped, not offset by eps", "add eps to the mean", node)
        node = unbroadcast(node.args[0])
    found_one = _mean_square(node) or _variance(node, 0.0)
    if found_one is None:
        return None
    return replace(found_one, eps=eps, problem=found_one.problem or problem)


def _mean_square(node: Any) -> Statistic | None:
    """``mean(z^2)`` in its spellings; with ``z = x - mean(x)`` it is the variance of x."""
    reduced, scale = _reduction(node)
    if reduced is None:
        return _expanded_variance(node)
    squared = peel_upcasts(reduced.args[0])
    z = None
    if is_op(squared, aten.pow.Tensor_Scalar) and squared.args[1] == 2:
        z = peel_upcasts(squared.args[0])
    elif is_op(squared, aten.mul.Tensor):
        a, b = (peel_upcasts(v) for v in squared.args)
        z = a if a is b else None
    if not is_tensor(z):
        return None
    problem = _last_dim(reduced, z)
    if problem is None and scale <= 0:
        problem = Problem("the squares are summed over a size that is not known", "", reduced)
    source = centred_source(z)
    centred = source is not None
    return Statistic(source or z, centred, 0.0, problem, scale)


def _reduction(node: Any) -> tuple[fx.Node | None, float]:
    """``(reduction, c)`` where ``node`` is c times the mean: ``mean``, ``sum / n``, ``sum * c``."""
    scale = 1.0
    node = unbroadcast(node)
    while is_op(node, aten.div.Tensor, aten.mul.Tensor):
        by = node.args[1]
        if not isinstance(by, (int, float)) or by == 0:
            break
        scale = scale / by if is_op(node, aten.div.Tensor) else scale * by
        node = unbroadcast(node.args[0])
    if not is_op(node, *_SUMS):
        return None, 0.0
    if is_op(node, aten.sum.dim_IntList):
        sizes = shape(node.args[0])
        known = bool(sizes) and isinstance(sizes[-1], int)
        scale = scale * sizes[-1] if known else 0.0
    return node, scale


def _expanded_variance(node: Any) -> Statistic | None:
    """``mean(x^2) - mean(x)^2``."""
    if not is_op(node, aten.sub.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    left, right = _mean_square(node.args[0]), unbroadcast(node.args[1])
    if left is None or left.centred or left.scale != 1 or not is_op(right, aten.pow.Tensor_Scalar):
        return None
    if right.args[1] != 2 or _mean_of(right.args[0]) is not left.source:
        return None
    return replace(left, centred=True)


def _variance(node: Any, eps: float) -> Statistic | None:
    """``var(x)``, ``var_mean(x)[0]``, and ``std(x)`` as a root of its own."""
    reduced = unbroadcast(node)
    if is_op(reduced, operator.getitem) and reduced.args[1] == 0:
        reduced = reduced.args[0]
    if not is_op(reduced, aten.var.correction, aten.var_mean.correction, aten.std.correction):
        return None
    source = peel_upcasts(reduced.args[0])
    problem = _last_dim(reduced, source)
    if problem is None and argument(reduced, 2, "correction", 1) != 0:
        problem = Problem(
            "the variance is unbiased (it divides by the size less one)",
            "pass unbiased=False or correction=0",
            reduced,
        )
    return Statistic(source, True, eps, problem)


def _vector_norm(root: fx.Node) -> Statistic | None:
    """``norm(x)`` as the root: of the size times the mean of squares."""
    order = argument(root, 1, "ord", 2)
    source = peel_upcasts(root.args[0])
    if order != 2 or not is_tensor(source) or argument(root, 2, "dim") is None:
        return None
    size, problem = shape(source)[-1], _last_dim(root, source)
    if not isinstance(size, int):
        return Statistic(source, False, 0.0, problem or Problem("the size is not known", "", root))
    return Statistic(source, False, 0.0, problem, float(size))


def _last_dim(reduced: fx.Node, source: fx.Node) -> Problem | None:
    index = 2 if is_op(reduced, aten.linalg_vector_norm.default) else 1
    dims, rank = argument(reduced, index, "dim"), val(source).dim()
    if dims is None or [int(d) % max(rank, 1) for d in dims] != [rank - 1]:
        return Problem(f"the mean is over dimensions {dims}, not the last", USE_LAST, reduced)
    return None


def _mean_of(node: Any) -> fx.Node | None:
    """``x`` if ``node`` is ``mean(x)`` over the last dimension."""
    node = unbroadcast(node)
    if is_op(node, operator.getitem) and node.args[1] == 1:
        if is_op(node.args[0], aten.var_mean.correction):
            reduced = node.args[0]
            source = peel_upcasts(reduced.args[0])
            return source if _last_dim(reduced, source) is None else None
        return None
    reduced, scale = _reduction(node)
    if reduced is None or abs(scale - 1) > 1e-9:
        return None
    source = peel_upcasts(reduced.args[0])
    return source if _last_dim(reduced, source) is None else None


def centred_source(node: Any) -> fx.Node | None:
    """``x`` if ``node`` is ``x - mean(x)``."""
    if not is_op(node, aten.sub.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    source = peel_upcasts(node.args[0])
    return source if _mean_of(node.args[1]) is source else None


def unbroadcast(node: Any) -> Any:
    """Below casts and whatever only restores or spreads a reduced last dimension."""
    while isinstance(node, fx.Node):
        below = node.args[0] if node.args else None
        if not is_tensor(node) or not is_tensor(below):
            return node
        sizes, inner = shape(node), shape(below)  # type: ignore[arg-type]
        restored = (
            is_op(node, aten._to_copy.default, aten.clone.default)
            or (
                is_op(node, aten.unsqueeze.default) and int(node.args[1]) % len(sizes) == len(inner)
            )  # type: ignore[arg-type]
            or (is_op(node, aten.expand.default) and same_shape(sizes[:-1], inner[:-1]))
            or (
                is_op(node, *VIEWS)
                and known_equal(sizes[-1], 1)
                and (same_shape(inner, sizes[:-1]) or same_shape(inner, sizes))
            )
        )
        if not restored:
            return node
        node = below
    return node


def _unroot(node: Any) -> Any:
    """Below the scalings and offsets of a root."""
    while isinstance(node, fx.Node):
        below = unbroadcast(node)
        scaled = is_op(
            below, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.clamp_min, aten.clamp
        )
        if scaled and isinstance(below.args[1], (int, float)):
            node = below.args[0]
        else:
            return below
    return node


def is_root(node: fx.Node) -> bool:
    """Whether ``x / node`` normalises (and ``x * node`` does not)."""
    return is_op(
        _unroot(node), aten.sqrt.default, aten.linalg_vector_norm.default, aten.std.correction
    )


def is_factor(node: fx.Node) -> bool:
    """Whether ``x * node`` normalises: the root is inverted, times at most a weight."""
    node = unbroadcast(node)
    if is_op(node, aten.mul.Tensor):
        return any(isinstance(a, fx.Node) and is_factor(a) for a in node.args)
    return is_op(node, aten.rsqrt.default, aten.reciprocal.default)
