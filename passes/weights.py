"""Attention weights: from the softmax to the products with the values.

What `scores` is on one side of the softmax, this is on the other: which node is a softmax,
where its weights go (`uses`), and that nothing else reads weights or scores.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import PassContext
from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    op_name,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.scores import (
    Fill,
    Miss,
    Scores,
    constant,
    factors,
    is_product,
    is_row_max,
    lead_of,
)

SOFTMAX = (aten._softmax.default, aten._safe_softmax.default, aten.softmax.int)
_MAX_LENGTH = 32


@dataclass
class Softmax:
    """A softmax: ``node`` is its result; ``inside`` the nodes that only it uses."""

    node: fx.Node
    input: fx.Node
    dim: int
    inside: tuple[fx.Node, ...] = ()


def as_softmax(node: fx.Node) -> Softmax | None:
    """``node`` as a softmax: the op, or ``exp(x - max(x)) / sum(exp(x - max(x)))``."""
    if is_op(node, *SOFTMAX):
        x = node.args[0]
        assert isinstance(x, fx.Node)
        return Softmax(node, x, int(argument(node, 1, "dim")) % max(val(x).dim(), 1))
    if not is_op(node, aten.div.Tensor) or not is_op(node.args[0], aten.exp.default):
        return None
    e, total = node.args[0], node.args[1]
    if not is_op(total, aten.sum.dim_IntList) or total.args[0] is not e:  # type: ignore[union-attr]
        return None
    assert isinstance(e, fx.Node) and isinstance(total, fx.Node)
    dims, kept = list(argument(total, 1, "dim", [])), argument(total, 2, "keepdim", False)
    if len(dims) != 1 or not kept:
        return None
    x = e.args[0]
    assert isinstance(x, fx.Node)
    return Softmax(node, x, int(dims[0]) % val(x).dim(), (e, total))


@dataclass
class Use:
    """Where softmax weights meet values: ``product`` is ``weights @ v``."""

    product: fx.Node
    leads: list[tuple[Any, ...]]


def meets_product(node: fx.Node, depth: int = 8) -> bool:
    """Whether a product is near behind ``node``: what makes a softmax look like attention's."""
    for user in node.users:
        if is_product(user):
            return True
        if depth and is_tensor(user) and not is_dialect_op(user) and not is_op(user, *SOFTMAX):
            if meets_product(user, depth - 1):
                return True
    return False


def uses(node: fx.Node, scores: Scores, lead: tuple[Any, ...], keys: Any) -> list[Use]:
    """Every product that takes the weights ``node``; raises `Miss` for any other use."""
    found: list[Use] = []
    with_sink = scores.sinks is not None

    def walk(node: fx.Node, leads: list[tuple[Any, ...]], dropped: bool, alone: bool) -> None:
        alone = alone and len(node.users) == 1
        for user in node.users:
            if user.op == "output":
                raise Miss(
                    "the attention weights are returned",
                    "call the model without output_attentions=True",
                    node,
                )
            if is_op(user, *TRANSPARENT) or (
                is_op(user, aten._to_copy.default) and dtype(user).is_floating_point
            ):
                walk(user, leads, dropped, alone)
            elif is_product(user) and not is_op(user, aten.baddbmm.default):
                left, right = factors(user)
                if left is not node or right is node:
                    raise Miss("the weights are the right operand of a product", node=user)
                if with_sink and not dropped:
                    raise Miss("the sink's weight is not dropped before the values", node=user)
                found.append(Use(user, [*leads, lead_of(user)]))
            elif is_op(user, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default):
                a, b = shape(node), shape(user)
                if len(b) < 2 or not same_shape(a[-2:], b[-2:]):
                    raise Miss("the attention weights are reshaped", node=user)
                if is_op(user, aten.expand.default) and len(a) == len(b):
                    raise Miss("the attention weights are expanded", node=user)
                walk(user, [*leads, b[:-2]], dropped, alone)
            elif is_op(user, aten.slice.Tensor) and with_sink and not dropped:
                rank = val(user).dim()
                start = argument(user, 2, "start", 0) or 0
                if (
                    int(argument(user, 1, "dim", 0)) % rank != rank - 1
                    or start != int(scores.sink_first)
                    or not known_equal(shape(user)[-1], keys)
                ):
                    raise Miss("the weights are sliced otherwise than by dropping the sink")
                walk(user, leads, True, alone)
            elif zeroed(user, node, scores, alone):
                walk(user, leads, dropped, alone)
            else:
                what = "dropout" if "dropout" in op_name(user) else op_name(user)
                raise Miss(
                    f"the attention weights go through {what} before they meet the values",
                    "attention multiplies the softmax's result with the values directly",
                    user,
                )

    walk(node, [lead], False, True)
    return found


def check_private(path: list[fx.Node], softmax: Softmax, gated: bool) -> None:
    """Raise `Miss` if code outside of the attention reads the scores."""
    following: dict[fx.Node, set[fx.Node]] = {}
    chain = [*path, *softmax.inside[:1], softmax.node]
    for before, node in itertools.pairwise(chain):
        following.setdefault(before, set()).add(node)
    for node in path:
        for user in node.users:
            if user in following[node] or _feeds_max(user, node) or _factory(user):
                continue
            if user in softmax.inside:
                continue
            if gated and is_op(user, aten.logsumexp.default):
                continue
            what = "returned" if user.op == "output" else f"used by {op_name(user)} as well"
            raise Miss(f"the scores are {what}", "the weights must have no other use", node)


def _feeds_max(user: fx.Node, node: fx.Node) -> bool:
    return is_op(user, aten.max.dim, aten.amax.default) and (
        is_row_max(user, node) or any(is_row_max(u, node) for u in user.users)
    )


_FACTORIES = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
}


def _factory(user: fx.Node) -> bool:
    """Whether ``user`` reads only the shape, dtype and device of its first argument."""
    return user.target in _FACTORIES


def release(path: list[fx.Node], ctx: PassContext) -> None:
    """Let no factory such as ``full_like(scores, -inf)`` keep the scores alive."""
    for node in path:
        for user in [u for u in node.users if _factory(u)]:
            sizes = shape(user)
            value = _FACTORIES[user.target]
            if value is None:
                value = user.args[1 if is_op(user, aten.full_like.default) else 2]
            if not all(isinstance(d, int) for d in sizes) or not isinstance(value, (int, float)):
                continue
            kwargs = {"dtype": dtype(user), "device": val(user).device}
            graph = user.graph
            with graph.inserting_before(user):
                args = (list(sizes), value)
                made = emit(
                    graph, aten.full.default, args, kwargs, like=user, fake_mode=ctx.fake_mode
                )
            user.replace_all_uses_with(made)
            graph.erase_node(user)


def alike(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two arguments are the same value, by the same computation."""
    if a is b:
        return True
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and a == b and not isinstance(a, float)
    number = constant(a)
    if number is not None and number == constant(b) and val(a).dim() == val(b).dim() == 0:
        return dtype(a) == dtype(b)
    if not (depth and isinstance(a.target, torch._ops.OpOverload) and a.target is b.target):
        return False
    if torch.Tag.nondeterministic_seeded in a.target.tags or a.kwargs != b.kwargs:
        return False
    return len(a.args) == len(b.args) and all(
        alike(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True)
    )


def zeroed(node: fx.Node, weights: fx.Node, scores: Scores, alone: bool) -> bool:
    """Whether ``node`` sets the weights of keys to 0 that the scores forbid already.

    It then only decides that a row without any allowed key is 0, as it is with -inf; scores
    filled with a finite number are taken so, if ``alone`` (no other use of the weights).
    """
    if is_op(node, aten.where.self):
        mask, allowed = node.args[0], node.args[1] is weights
        fill = node.args[2] if allowed else node.args[1]
    elif is_op(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        _, mask, fill = node.args
        allowed = False
    else:
        return False
    if constant(fill) != 0 or not same_shape(shape(node), shape(weights)):
        return False
    for extra in scores.extras:
        if isinstance(extra, Fill) and extra.allowed == allowed and alike(extra.node, mask):
            if extra.value == -math.inf or alone:
                extra.value = -math.inf
                return True
    return False


def sink_gate(path: list[fx.Node], product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(result, sink)`` if the attention's result is multiplied with a gate that is a sink.

    ``out * sigmoid(logsumexp(scores) - sink)`` is attention whose softmax has the sink as one
    more score: both divide by ``sum(exp(scores)) + exp(sink)``.
    """
    total = None
    for node in reversed(path):
        total = next((u for u in node.users if is_op(u, aten.logsumexp.default)), None)
        if total is not None or not is_op(node, aten._to_copy.default):
            break
    if total is None or len(product.users) != 1:
        return None
    if [int(d) % val(total.args[0]).dim() for d in total.args[1]] != [  # type: ignore[union-attr,arg-type]
        val(total.args[0]).dim() - 1  # type: ignore[arg-type]
    ]:
        return None
    gate, sink = total, None
    result = next(iter(product.users))
    for _ in range(_MAX_LENGTH):
        if len(gate.users) != 1:
            return None
        user = next(iter(gate.users))
        if user is result:
            break
        if is_op(user, aten.sub.Tensor) and user.args[0] is gate and sink is None:
            sink = user.args[1]
        elif is_op(user, aten.sigmoid.default):
            if sink is None:
                return None
        elif not is_op(user, aten._to_copy.default, *VIEWS, aten.unsqueeze.default):
            return None
        gate = user
    gated = is_op(result, aten.mul.Tensor) and peels_to(gate, aten.sigmoid.default)
    if not (gated and isinstance(sink, fx.Node) and same_shape(shape(result), shape(product))):
        return None
    if not (val(product).dim() == 4 and same_shape(shape(gate)[:3], shape(product)[:3])):
        return None
    # One number for each head: [.., H, 1] beside [B, H, M], or [.., H, 1, 1] if kept.
    kept = bool(argument(total, 2, "keepdim", False))
    dims = [d for i, d in enumerate(reversed(shape(sink))) if i != (2 if kept else 1)]
    return (result, sink) if all(known_equal(d, 1) for d in dims) else None


def peels_to(node: fx.Node, target: Any) -> bool:
    """Whether ``node`` is a call of ``target``, through casts and views."""
    while is_op(node, aten._to_copy.default, *VIEWS, aten.unsqueeze.default, *TRANSPARENT):
        node = node.args[0]  # type: ignore[assignment]
    return is_op(node, target)
