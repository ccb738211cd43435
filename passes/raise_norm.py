"""Raise norms: RMSNorm and LayerNorm, however they were written, become one dialect op.

    x * rsqrt(mean(x^2) + eps) [* weight] [cast]          -> rms_norm
    (x - mean(x)) * rsqrt(var(x) + eps) [* w] [+ b]       -> layer_norm

Seen through: an up-cast before and a down-cast anywhere after (Llama casts before the weight,
Gemma after), division by ``sqrt``, ``sum / size`` for ``mean``, ``var``, ``var_mean``, a
vector norm over ``sqrt(size)``, a kept or restored last dimension, the weight on either side,
joined to the factor or to ``x`` first, per head (``[H, D]``), or offset (``1 + weight``).

A sum in place of the mean, or a vector norm, is a norm times a constant: the constant follows
the op as a multiplication.

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

import math
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
from dspark_compile.passes.norm_statistic import (
    USE_LAST,
    Statistic,
    centred_source,
    is_factor,
    is_root,
    statistic_of,
    unbroadcast,
)

_FOREIGN = {
    aten.native_layer_norm.default: "layer_norm is over more than the last dimension",
    aten.native_group_norm.default: "group_norm is not in the dialect",
    aten.native_batch_norm.default: "batch_norm is not in the dialect",
    aten._native_batch_norm_legit_no_training.default: "batch_norm is not in the dialect",
    aten._fused_rms_norm.default: "rms_norm is over more than the last dimension",
}


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
                yield Match(node, captures={"problem": Problem(reason, USE_LAST, node)})
            else:
                yield from self._factor(node)

    def _factor(self, root: fx.Node) -> Iterator[Match]:
        statistic = statistic_of(root)
        if statistic is None:
            return
        ends = list(_ends(_Chain(root, statistic, root)))
        if not ends:
            problem = statistic.problem or Problem(
                f"the factor does not scale {_expected(statistic)}, which it was computed of, "
                f"but goes to {next(iter(root.users)).name}",
                "scale the tensor whose statistic is taken",
                root,
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
        x, by = chain.source, chain.multiplier
        statistic, wide = chain.statistic, dtype(node)
        graph.inserting_before(node)
        weight, offset = chain.weight, 0.0
        if weight is not None:
            weight, offset = split_offset(weight, chain.in_compute)
            weight = _as_weight(weight, x, graph, ctx)
        bias = chain.bias
        if bias is not None:
            bias = peel_upcasts(bias) if chain.in_compute else bias
            bias = _as_weight(bias, x, graph, ctx)
        if by != 1 and wide.itemsize < 4:
            wide = torch.float32
        out_dtype = None if wide == dtype(x) else wide
        tail = (statistic.eps / statistic.scale, offset, chain.in_compute, True, out_dtype)
        args = (x, weight, bias, *tail) if statistic.centred else (x, weight, *tail)
        op = dialect("layer_norm" if statistic.centred else "rms_norm")
        new = emit(graph, op, args, like=node, fake_mode=ctx.fake_mode)
        out = new
        if by != 1:
            out = emit(graph, aten.mul.Tensor, (new, by), like=node, fake_mode=ctx.fake_mode)
        if dtype(out) != dtype(node):
            kind = {"dtype": dtype(node)}
            cast = aten._to_copy.default
            out = emit(graph, cast, (out,), kind, like=node, fake_mode=ctx.fake_mode)
        node.replace_all_uses_with(out)
        ctx.raised("norm", new)


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
        root_scale: what the root was multiplied by before it divides.
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

    @property
    def multiplier(self) -> float:
        """What a norm by the root mean square is still to be multiplied by."""
        scale = self.statistic.scale
        by = 1.0 / (self.root_scale * math.sqrt(scale)) if scale > 0 else 1.0
        return 1.0 if abs(by - 1) < 1e-9 else by


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
        if not chain.scaled and is_factor(node) and _scales(chain.statistic, other, user):
            return replace(chain, node=user, scaled=True)
        if not chain.scaled and chain.weight is None and is_factor(node):
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
        and chain.multiplier == 1
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
    if unbroadcast(user) is unbroadcast(node) and unbroadcast(user) is not user:
        return replace(chain, node=user)
    if is_op(user, aten.reciprocal.default) and is_root(node):
        return replace(chain, node=user)
    if is_op(user, aten.div.Tensor) and user.args[1] is node and is_root(node):
        if _scales(statistic, user.args[0], user):
            return replace(chain, node=user, scaled=True)
        weight = _weighted(statistic, user.args[0], user) if chain.weight is None else None
        if weight is not None:
            return replace(chain, node=user, scaled=True, weight=weight, in_compute=True)
        return None
    scaled_root = is_op(user, aten.mul.Tensor, aten.div.Tensor) and user.args[0] is node
    number = isinstance(user.args[1], (int, float)) if len(user.args) > 1 else False
    if scaled_root and number and user.args[1] > 0 and is_root(node):  # type: ignore[operator]
        by = float(user.args[1])
        by = 1.0 / by if is_op(user, aten.div.Tensor) else by
        return replace(chain, node=user, root_scale=chain.root_scale * by)
    if is_op(user, aten.add.Tensor, aten.clamp_min.default, aten.clamp.default) and is_root(node):
        if not isinstance(user.args[1], (int, float)):
            return None
        problem = Problem("eps is applied outside the root", "use sqrt(mean(x^2) + eps)", user)
        changed = replace(statistic, problem=statistic.problem or problem)
        return replace(chain, node=user, statistic=changed)
    return None


def _scales(statistic: Statistic, other: Any, product: fx.Node) -> bool:
    """Whether ``other`` is what the statistic normalises."""
    if not is_tensor(other) or not same_shape(shape(product), shape(statistic.source)):
        return False
    z = peel_upcasts(other)
    if statistic.centred:
        return centred_source(z) is statistic.source
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


def split_offset(weight: fx.Node, in_compute: bool) -> tuple[fx.Node, float]:
    """``(w, c)`` of a weight written ``w + c``; casts to a wider type are removed only where
    the op makes them itself (``in_compute``)."""
    node = peel_upcasts(weight) if in_compute else weight
    if is_op(node, aten.add.Tensor) and not node.kwargs and len(node.args) == 2:
        numbers = [a for a in node.args if isinstance(a, (int, float))]
        tensors = [a for a in node.args if isinstance(a, fx.Node)]
        if len(numbers) == 1 and len(tensors) == 1:
            inner = peel_upcasts(tensors[0]) if in_compute else tensors[0]
            if in_compute or dtype(inner) == dtype(node):
                return inner, float(numbers[0])
    return node, 0.0


def _as_weight(node: fx.Node, x: fx.Node, graph: fx.Graph, ctx: PassContext) -> fx.Node:
    """``node`` without leading ones."""
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
            values["weight"], values["weight_offset"] = split_offset(values["weight"], True)
    values["out_dtype"] = None if wide == dtype(values["x"]) else wide
    args = tuple(values.values())
    if out is node and args == tuple(node.args):
        return node
    graph.inserting_before(out)
    new = emit(graph, node.target, args, like=node, fake_mode=ctx.fake_mode)  # type: ignore[arg-type]
    out.replace_all_uses_with(new)
    return new
