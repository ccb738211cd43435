"""Raise norms: RMSNorm and LayerNorm, however they were written, become one dialect op.

    x * rsqrt(mean(x^2) + eps) [* weight] [cast]          -> rms_norm
    (x - mean(x)) * rsqrt(var(x) + eps) [* w] [+ b]       -> layer_norm

Seen through: an up-cast before and a down-cast anywhere after (Llama casts before the weight,
Gemma after), division by ``sqrt``, ``sum / size`` for ``mean``, ``var``, ``var_mean``, a
vector norm over ``sqrt(size)``, a kept or restored last dimension, the weight on either side,
joined to the factor first, per head (``[H, D]``), or offset (``1 + weight``).

Conditions: the statistic is over the last dimension of the very tensor that is scaled, eps is
a number inside the root, the variance divides by the size, and nothing is computed in a wider
type than the op computes in. The walk starts at the statistic and follows the products: where
it stops, the report says why. A weight of a shape the op does not take stays a multiplication
outside. Norms that capture kept whole are recorded here too, with casts around them folded.

Worth: one kernel and one read of ``x`` in place of five; and later passes (residual + norm,
q/k-norm + RoPE) look only for the dialect op. In low precision the op rounds at most as often
as the code it replaces.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    module_class,
    peel_upcasts,
    same_shape,
    shape,
    val,
)

_ROOTS = (aten.rsqrt.default, aten.sqrt.default)
_SUMS = (aten.mean.dim, aten.sum.dim_IntList)
_FOREIGN = {
    aten.native_layer_norm.default: "layer_norm is over more than the last dimension",
    aten.native_group_norm.default: "group_norm is not in the dialect",
    aten.native_batch_norm.default: "batch_norm is not in the dialect",
    aten._native_batch_norm_legit_no_training.default: "batch_norm is not in the dialect",
    aten._fused_rms_norm.default: "rms_norm is over more than the last dimension",
}


@dataclass(frozen=True)
class Statistic:
    """What a root was taken of: ``mean(source^2)``, or the variance of ``source``.

    ``problem`` names the first thing that keeps it from being the dialect's.
    """

    source: fx.Node
    centred: bool
    eps: float
    problem: Problem | None = None


class RaiseNorm(Pass):
    """See the module's docstring."""

    name = "raise_norm"
    kind = "norm"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not node.users:
                continue
            if is_dialect_op(node, "rms_norm", "layer_norm"):
                yield Match(node, captures={"captured": True})
            elif is_op(node, *_FOREIGN):
                reason = _FOREIGN[node.target]
                yield Match(node, captures={"problem": Problem(reason, _USE_LAST, node)})
            else:
                yield from self._factor(node)

    def _factor(self, root: fx.Node) -> Iterator[Match]:
        statistic = statistic_of(root)
        if statistic is None:
            return
        ends = list(_ends(_Chain(root, statistic, root)))
        if not ends:
            problem = statistic.problem or Problem(
                f"the factor does not scale {_expected(statistic)}, which it was computed of",
                "scale the tensor whose statistic is taken",
                next(iter(root.users), root),
            )
            if _norm_like(root, statistic):
                yield Match(root, captures={"problem": problem})
        for end in ends:
            yield Match(end.node, captures={"chain": end, "problem": end.statistic.problem})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        problem = match.captures.get("problem")
        if problem is not None:
            return problem
        chain: _Chain | None = match.captures.get("chain")
        if chain is not None and dtype(chain.root) == torch.float64 != dtype(chain.source):
            return Problem("it is computed in float64", "compute in float32 at most", chain.root)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        if match.captures.get("captured"):
            node = _fold_casts(node, graph, ctx)
            ctx.raised("norm", node)
            return
        chain: _Chain = match["chain"]
        x = chain.source
        weight, offset = chain.weight, 0.0
        graph.inserting_before(node)
        if weight is not None:
            weight, offset = split_offset(weight)
            weight = _as_weight(weight, x, graph, ctx)
        bias = None if chain.bias is None else _as_weight(chain.bias, x, graph, ctx)
        out_dtype = None if dtype(node) == dtype(x) else dtype(node)
        tail = (chain.statistic.eps, offset, chain.in_compute, True, out_dtype)
        args = (x, weight, bias, *tail) if chain.statistic.centred else (x, weight, *tail)
        op = dialect("layer_norm" if chain.statistic.centred else "rms_norm")
        new = emit(graph, op, args, like=node, fake_mode=ctx.fake_mode)
        node.replace_all_uses_with(new)
        ctx.raised("norm", new)


_USE_LAST = "normalise over the last dimension only"


# -- the statistic ----------------------------------------------------------------------------


def statistic_of(root: fx.Node) -> Statistic | None:
    """The statistic under ``root`` (``rsqrt``, ``sqrt``, a norm, a deviation), if it is one."""
    if is_op(root, aten.linalg_vector_norm.default):
        return _vector_norm(root)
    if is_op(root, aten.std.correction):
        return _variance(root, 0.0)
    if not is_op(root, *_ROOTS):
        return None
    node, eps, problem = root.args[0], 0.0, None
    node = _unbroadcast(node)
    if is_op(node, aten.add.Tensor):
        terms = [a for a in node.args if not isinstance(a, fx.Node)]
        inner = [a for a in node.args if isinstance(a, fx.Node)]
        if len(terms) == 1 and len(inner) == 1 and not node.kwargs:
            node, eps = _unbroadcast(inner[0]), float(terms[0])  # type: ignore[arg-type]
        elif len(inner) == 2:
            found = [s for s in map(_mean_square, map(_unbroadcast, inner)) if s]
            if not found:
                return None
            reason = Problem("eps is a tensor", "make eps a Python float", node)
            return replace(found[0], problem=reason)
    elif is_op(node, aten.clamp_min.default, aten.clamp.default, aten.maximum.default):
        problem = Problem("the mean is clamped, not offset by eps", "add eps to the mean", node)
        node = _unbroadcast(node.args[0])
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
    if problem is None and abs(scale - 1) > 1e-9:
        problem = Problem(
            "the squares are summed, not averaged (an L2 normalisation)",
            "use rms_norm with eps and weight scaled by the size",
            reduced,
        )
    source = _centred_source(z)
    return Statistic(z if source is None else source, source is not None, 0.0, problem)


def _reduction(node: Any) -> tuple[fx.Node | None, float]:
    """``(reduction, c)`` where ``node`` is c times the mean: ``mean``, ``sum / n``, ``sum * c``."""
    scale = 1.0
    node = _unbroadcast(node)
    while is_op(node, aten.div.Tensor, aten.mul.Tensor):
        by = node.args[1]
        if not isinstance(by, (int, float)) or by == 0:
            break
        scale = scale / by if is_op(node, aten.div.Tensor) else scale * by
        node = _unbroadcast(node.args[0])
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
    left, right = _mean_square(node.args[0]), _unbroadcast(node.args[1])
    if left is None or left.centred or not is_op(right, aten.pow.Tensor_Scalar):
        return None
    if right.args[1] != 2 or _mean_of(right.args[0]) is not left.source:
        return None
    return replace(left, centred=True)


def _variance(node: Any, eps: float) -> Statistic | None:
    """``var(x)``, ``var_mean(x)[0]``, and ``std(x)`` as a root of its own."""
    reduced = _unbroadcast(node)
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
    """``norm(x)`` as the root: an L2 normalisation, unless divided by ``sqrt(size)``."""
    order = argument(root, 1, "ord", 2)
    source = peel_upcasts(root.args[0])
    if order != 2 or not is_tensor(source) or argument(root, 2, "dim") is None:
        return None
    return Statistic(source, False, 0.0, _last_dim(root, source))


def _last_dim(reduced: fx.Node, source: fx.Node) -> Problem | None:
    index = 2 if is_op(reduced, aten.linalg_vector_norm.default) else 1
    dims, rank = argument(reduced, index, "dim"), val(source).dim()
    if dims is None or [int(d) % max(rank, 1) for d in dims] != [rank - 1]:
        return Problem(f"the mean is over dimensions {dims}, not the last", _USE_LAST, reduced)
    return None


def _mean_of(node: Any) -> fx.Node | None:
    """``x`` if ``node`` is ``mean(x)`` over the last dimension."""
    node = _unbroadcast(node)
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


def _centred_source(node: Any) -> fx.Node | None:
    """``x`` if ``node`` is ``x - mean(x)``."""
    if not is_op(node, aten.sub.Tensor) or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    source = peel_upcasts(node.args[0])
    return source if _mean_of(node.args[1]) is source else None


def _unbroadcast(node: Any) -> Any:
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


# -- the products -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chain:
    """How far the walk from the root has come.

    Attributes:
        node: the product so far.
        root: where the walk began.
        scaled: whether ``x`` is among its factors.
        weight, bias: the learned parts met on the way.
        in_compute: the weight (or, without one, the bias) came before the down-cast.
        root_scale: what a vector norm or deviation was multiplied by, still to be settled.
    """

    node: fx.Node
    statistic: Statistic
    root: fx.Node
    scaled: bool = False
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    in_compute: bool = False
    root_scale: float = 1.0

    @property
    def source(self) -> fx.Node:
        return self.statistic.source


def _ends(chain: _Chain) -> Iterator[_Chain]:
    """Where the walk ends: one end for each weight that one normalised tensor is scaled by."""
    steps = [(user, _step(chain, user)) for user in chain.node.users]
    onward = [next_ for _, next_ in steps if next_ is not None]
    if chain.scaled and len(onward) < len(steps):
        # Something else uses the value as it is here; a parallel weight gets its own norm.
        onward = [c for c in onward if _reaches_weight(c)]
        yield chain
    for item in onward:
        yield from _ends(item)


def _reaches_weight(chain: _Chain) -> bool:
    if chain.weight is not None:
        return True
    return any(
        step is not None and _reaches_weight(step)
        for step in (_step(chain, user) for user in chain.node.users)
    )


def _step(chain: _Chain, user: fx.Node) -> _Chain | None:
    """The chain extended by ``user``, or None where ``user`` is no part of a norm."""
    node = chain.node
    if is_op(user, aten._to_copy.default) and user.meta["val"].device == val(node).device:
        if dtype(user).is_floating_point:
            return replace(chain, node=user)
        return None
    if not chain.scaled:
        step = _before_scaling(chain, user)
        if step is not None:
            return step
    if is_op(user, aten.mul.Tensor) and len(user.args) == 2:
        other = user.args[1] if user.args[0] is node else user.args[0]
        if not isinstance(other, fx.Node):
            return None
        if not chain.scaled and _is_factor(node) and _scales(chain.statistic, other, user):
            return replace(chain, node=user, scaled=True)
        if not chain.scaled and chain.weight is None and _is_factor(node):
            weight = _weighted(chain.statistic, other, user)
            if weight is not None:
                return replace(chain, node=user, scaled=True, weight=weight, in_compute=True)
        if chain.weight is None and chain.bias is None and is_weight(other, chain.source):
            if chain.scaled and not same_shape(shape(user), shape(chain.source)):
                return None
            before = chain.scaled and dtype(node) != dtype(chain.source)
            return replace(chain, node=user, weight=other, in_compute=before or not chain.scaled)
    if (
        is_op(user, aten.add.Tensor)
        and chain.statistic.centred
        and chain.scaled
        and chain.bias is None
        and not user.kwargs
    ):
        other = user.args[1] if user.args[0] is node else user.args[0]
        if is_weight(other, chain.source) and same_shape(shape(user), shape(chain.source)):
            before = dtype(node) != dtype(chain.source)
            in_compute = before if chain.weight is None else chain.in_compute
            return replace(chain, node=user, bias=other, in_compute=in_compute)
    return None


def _before_scaling(chain: _Chain, user: fx.Node) -> _Chain | None:
    """Steps over the bare factor: its restored dimension, its root, ``x / root``."""
    node, statistic = chain.node, chain.statistic
    if _unbroadcast(user) is _unbroadcast(node) and _unbroadcast(user) is not user:
        return replace(chain, node=user)
    if is_op(user, aten.reciprocal.default) and _is_root(node):
        return replace(chain, node=user)
    if is_op(user, aten.div.Tensor) and user.args[1] is node and _is_root(node):
        if _scales(statistic, user.args[0], user):
            settled = _settle(chain, user)
            return replace(settled, node=user, scaled=True)
        return None
    scaled_root = is_op(user, aten.mul.Tensor, aten.div.Tensor) and user.args[0] is node
    if scaled_root and isinstance(user.args[1], (int, float)) and _is_norm(chain):
        by = float(user.args[1])
        by = 1.0 / by if is_op(user, aten.div.Tensor) else by
        return replace(chain, node=user, root_scale=chain.root_scale * by)
    if is_op(user, aten.add.Tensor, aten.clamp_min.default, aten.clamp.default) and _is_root(node):
        if not isinstance(user.args[1], (int, float)):
            return None
        problem = Problem("eps is applied outside the root", "use sqrt(mean(x^2) + eps)", user)
        changed = replace(statistic, problem=statistic.problem or problem)
        return replace(chain, node=user, statistic=changed)
    return None


def _settle(chain: _Chain, user: fx.Node) -> _Chain:
    """A norm is the root of the mean only if it was divided by ``sqrt(size)``."""
    if not _is_norm(chain) or chain.statistic.problem is not None:
        return chain
    size = shape(chain.source)[-1]
    if isinstance(size, int) and abs(chain.root_scale**2 * size - 1) < 1e-9:
        return chain
    problem = Problem(
        "the vector is divided by its norm, not by its root mean square (an L2 normalisation)",
        "use rms_norm and fold sqrt(size) into the weight",
        user,
    )
    return replace(chain, statistic=replace(chain.statistic, problem=problem))


def _is_norm(chain: _Chain) -> bool:
    base = _unroot(chain.node)
    return is_op(base, aten.linalg_vector_norm.default)


def _unroot(node: Any) -> Any:
    """Below the scalings and offsets of a root."""
    while isinstance(node, fx.Node):
        below = _unbroadcast(node)
        scaled = is_op(
            below, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.clamp_min, aten.clamp
        )
        if scaled and isinstance(below.args[1], (int, float)):
            node = below.args[0]
        else:
            return below
    return node


def _is_root(node: fx.Node) -> bool:
    """Whether ``x / node`` normalises (and ``x * node`` does not)."""
    return is_op(
        _unroot(node), aten.sqrt.default, aten.linalg_vector_norm.default, aten.std.correction
    )


def _is_factor(node: fx.Node) -> bool:
    """Whether ``x * node`` normalises: the root is inverted, times at most a weight."""
    node = _unbroadcast(node)
    if is_op(node, aten.mul.Tensor):
        return any(isinstance(a, fx.Node) and _is_factor(a) for a in node.args)
    return is_op(node, aten.rsqrt.default, aten.reciprocal.default)


def _scales(statistic: Statistic, other: Any, product: fx.Node) -> bool:
    """Whether ``other`` is what the statistic normalises."""
    if not is_tensor(other) or not same_shape(shape(product), shape(statistic.source)):
        return False
    z = peel_upcasts(other)
    if statistic.centred:
        return _centred_source(z) is statistic.source
    return z is statistic.source


def _weighted(statistic: Statistic, other: Any, product: fx.Node) -> fx.Node | None:
    """``w`` if ``other`` is ``w`` times what the statistic normalises."""
    other = peel_upcasts(other)
    if not is_op(other, aten.mul.Tensor):
        return None
    for weight, scaled in (other.args, tuple(reversed(other.args))):
        if is_weight(weight, statistic.source) and _scales(statistic, scaled, product):
            return weight
    return None


def is_weight(node: Any, x: fx.Node) -> bool:
    """Whether ``node`` scales ``x`` per feature: ``[D]``, or a parameter ``[H, D]``."""
    if not is_tensor(node) or not dtype(node).is_floating_point:
        return False
    dims, full = shape(node), shape(x)
    if not dims or len(dims) > len(full) or not known_equal(dims[-1], full[-1]):
        return False
    while len(dims) > 1 and known_equal(dims[0], 1):
        dims = dims[1:]
    if len(dims) == 1:
        return len(shape(node)) == 1 or _is_parameter(node)
    return len(dims) == 2 and known_equal(dims[0], full[-2]) and _is_parameter(node)


def _is_parameter(node: Any) -> bool:
    """Whether ``node`` is an input of rank at most 2 (or of ones before), cast or offset."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        pointwise = is_op(node, aten.add.Tensor, aten.mul.Tensor, aten._to_copy.default)
        alone = pointwise and all(not isinstance(a, fx.Node) for a in node.args[1:])
        if not alone and not is_op(node, aten.unsqueeze.default, *VIEWS):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def split_offset(weight: fx.Node) -> tuple[fx.Node, float]:
    """``(w, c)`` of a weight written ``w + c``, casts to a wider type removed."""
    node = peel_upcasts(weight)
    if is_op(node, aten.add.Tensor) and not node.kwargs and len(node.args) == 2:
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        if len(numbers) == 1 and len(tensors) == 1:
            return peel_upcasts(tensors[0]), float(numbers[0])
    return node, 0.0


def _as_weight(node: fx.Node, x: fx.Node, graph: fx.Graph, ctx: PassContext) -> fx.Node:
    """``node`` without leading ones."""
    node = peel_upcasts(node)
    dims = list(shape(node))
    while len(dims) > 1 and known_equal(dims[0], 1):
        dims = dims[1:]
    if len(dims) == len(shape(node)):
        return node
    return emit(graph, aten.view.default, (node, dims), like=node, fake_mode=ctx.fake_mode)


def _expected(statistic: Statistic) -> str:
    name = statistic.source.name
    return f"{name} - mean({name})" if statistic.centred else name


def _norm_like(root: fx.Node, statistic: Statistic) -> bool:
    """Whether an unfinished match is worth a line: not a plain norm or deviation in passing."""
    if is_op(root, aten.linalg_vector_norm.default, aten.std.correction, aten.sqrt.default):
        return "Norm" in module_class(root)
    return statistic.problem is None or "Norm" in module_class(root)


# -- norms that capture kept whole ----------------------------------------------------------------


def _fold_casts(node: fx.Node, graph: fx.Graph, ctx: PassContext) -> fx.Node:
    """Fold an up-cast of the input, a single cast of the result and an offset weight."""
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    values = {name: argument(node, i, name) for i, name in enumerate(schema)}
    for item in node.target._schema.arguments:  # type: ignore[union-attr]
        if values[item.name] is None and item.has_default_value():
            values[item.name] = item.default_value
    x, out = values["x"], node
    source = peel_upcasts(x)
    wide = dtype(node)
    if source is not x and dtype(x) == torch.float32 and values["weight_in_compute"]:
        values["x"] = source
    users = list(node.users)
    if len(users) == 1 and is_op(users[0], aten._to_copy.default):
        cast = users[0]
        if dtype(cast).is_floating_point and val(cast).device == val(node).device:
            out, wide = cast, dtype(cast)
    if values["weight"] is not None and values["weight_offset"] == 0.0:
        if values["weight_in_compute"]:
            values["weight"], values["weight_offset"] = split_offset(values["weight"])
    values["out_dtype"] = None if wide == dtype(values["x"]) else wide
    args = tuple(values.values())
    if out is node and args == tuple(node.args):
        return node
    graph.inserting_before(out)
    new = emit(graph, node.target, args, like=node, fake_mode=ctx.fake_mode)  # type: ignore[arg-type]
    out.replace_all_uses_with(new)
    return new
