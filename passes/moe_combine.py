"""What follows the last product of experts' rows: weights, bias, norm, the sum over the choices.

Rows of (token, expert) pairs (`moe_rows`) come back to tokens in one of these ways:

    rows[inverse].view(T, k, N).sum(1)          back[permutation] = rows, then the same
    y.index_add_(0, permutation // k, rows)     the same by `scatter_add`, `scatter_reduce`

with each row multiplied by its choice's weight at some point on the way, or before the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.ops.expert_loop import MARKS
from dspark_compile.passes.expert_steps import spread_rows
from dspark_compile.passes.expert_table import is_zero
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    is_dialect_op,
    is_op,
    known_equal,
    peel,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.moe_rows import (
    Miss,
    Order,
    RowProduct,
    is_inverse,
    is_sentinel,
    row_bias,
)

_COPY = (aten._to_copy.default,)
# They read the shape of their argument, not its values.
_SHAPE_ONLY = (
    aten.empty_like.default, aten.zeros_like.default, aten.full_like.default,
    aten.new_empty.default, aten.new_zeros.default, aten.sym_size.int,
)  # fmt: skip


@dataclass
class Combine:
    """What follows the last product.

    Attributes:
        weights: the choices' weights ``[S]``; None where they came in with the rows.
        bias: ``[E, N]``, or None.
        norm: an ``rms_norm`` node, or None.
        result: the node with the sums ``[T, N]``.
        choices: k.
        base: what the sums are added to; None: nothing.
    """

    weights: fx.Node | None
    bias: fx.Node | None
    norm: fx.Node | None
    result: fx.Node
    choices: Any = None
    base: fx.Node | None = None


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` that read its values."""
    users = [user for user in node.users if not is_op(user, *_SHAPE_ONLY)]
    return [user for user in users if not is_dialect_op(user, *MARKS)]


def combine_of(down: RowProduct, experts: Any) -> Combine:
    """Follow the last product's rows to the sums over the choices.

    Raises:
        Miss: something else happens to them.
    """
    node, found = down.result, Combine(None, None, None, down.result)
    restored = down.order.permutation is None
    for _ in range(24):
        following = readers(node)
        if len(following) != 1:
            raise Miss("the experts' rows are used more than once", node)
        user = following[0]
        if is_op(user, aten.add.Tensor) and found.bias is None and found.weights is None:
            other = user.args[1] if user.args[0] is node else user.args[0]
            found.bias = row_bias(other, down.order)
            if found.bias is None:
                raise Miss("something is added to the experts' rows", user)
        elif is_op(user, aten.masked_fill.Scalar) and user.args[2] == 0:
            if not is_sentinel(user.args[1], down.order, experts):
                raise Miss("the experts' rows are masked", user)
        elif is_dialect_op(user, "rms_norm") and found.norm is None and found.weights is None:
            rest = [*user.args[3:], *(0.0, False, True, None)[len(user.args) - 3 :]]
            if user.args[1] is None or rest[0] != 0.0 or rest[3] is not None:
                raise Miss("the norm behind the experts adds to its weight or has none", user)
            found.norm = user
        elif is_op(user, aten.mul.Tensor) and found.weights is None:
            other = user.args[1] if user.args[0] is node else user.args[0]
            found.weights = row_weights(other, down, restored)
        elif is_op(user, aten.index.Tensor) and not restored:
            if not is_inverse(user.args[1][0], down.order.permutation):  # type: ignore[index,arg-type]
                raise Miss("the experts' rows are not put back in the choices' order", user)
            restored = True
        elif not restored and _put_back(user, node, down.order):
            restored = True
        elif not restored and _added_to_tokens(user, node, down.order):
            base: Any = user.args[0]
            found.base = None if is_zero(base) else base
            found.choices = _choices_of(down.order, shape(base)[0], user)
            return _with_cast(found, user)
        elif is_op(user, *_COPY):
            pass
        elif is_op(user, *VIEWS):
            if not restored:
                raise Miss("the experts' rows are not put back in the choices' order", user)
        elif is_op(user, aten.sum.dim_IntList):
            if not restored:
                raise Miss("the experts' rows are not summed over the choices", user)
            dims = [int(d) % val(node).dim() for d in user.args[1]]  # type: ignore[union-attr,arg-type]
            if val(node).dim() != 3 or dims != [1] or argument(user, 2, "keepdim", False):
                raise Miss("the choices' rows are not summed over", user)
            t, k, n = shape(node)
            s, features = shape(down.result)
            if not (known_equal(n, features) and known_equal(t * k, s)):
                raise Miss("the sum is over something else than a token's choices", user)
            found.choices = k
            return _with_cast(found, user)
        elif is_op(user, aten.squeeze.dim, aten.unsqueeze.default):
            pass
        else:
            raise Miss(f"the experts' rows go through {user.name}", user)
        node = user
    raise Miss("the experts' rows are not summed over the choices", node)


def _with_cast(found: Combine, node: fx.Node) -> Combine:
    """``found`` with the sums ``node``, or the cast of them that alone is read."""
    if found.base is None and len(node.users) == 1 and is_op(next(iter(node.users)), *_COPY):
        node = next(iter(node.users))
    found.result = node
    return found


def _put_back(user: fx.Node, rows: fx.Node, order: Order) -> bool:
    """Whether ``user`` is the rows in the choices' order, written to their places: every row of
    its first argument is written, as the places are a permutation."""
    permutation = order.permutation
    if is_op(user, aten.index_put.default) and user.args[2] is rows:
        where: Any = user.args[1]
        written = len(where) == 1 and peel(where[0]) is permutation
        if argument(user, 3, "accumulate", False) and not is_zero(user.args[0]):
            return False
    elif is_op(user, aten.index_copy.default) and user.args[3] is rows:
        written = user.args[1] == 0 and peel(user.args[2]) is permutation
    elif is_op(user, aten.index_add.default) and user.args[3] is rows:
        written = user.args[1] == 0 and peel(user.args[2]) is permutation
        if not is_zero(user.args[0]) or user.kwargs.get("alpha", 1) != 1:
            return False
    else:
        return False
    return written and same_shape(shape(user.args[0]), shape(rows))  # type: ignore[arg-type]


def _added_to_tokens(user: fx.Node, rows: fx.Node, order: Order) -> bool:
    """Whether ``user`` adds each row to its token's."""
    index: Any = None
    if is_op(user, aten.index_add.default):
        if user.args[3] is rows and user.args[1] == 0 and user.kwargs.get("alpha", 1) == 1:
            index = user.args[2]
    elif is_op(user, aten.index_put.default) and argument(user, 3, "accumulate", False):
        if user.args[2] is rows and len(user.args[1]) == 1:  # type: ignore[arg-type]
            index = user.args[1][0]  # type: ignore[index]
    elif is_op(user, aten.scatter_add.default, aten.scatter_reduce.two):
        summed = is_op(user, aten.scatter_add.default) or user.args[4:] == ("sum",)
        if user.args[3] is rows and user.args[1] == 0 and summed and not user.kwargs:
            index = spread_rows(user.args[2])
    if index is None or val(user.args[0]).dim() != 2:  # type: ignore[arg-type]
        return False
    return divided(index) is order.permutation and known_equal(
        shape(user.args[0])[1],
        shape(rows)[1],  # type: ignore[arg-type]
    )


def divided(index: Any) -> Any:
    """``permutation`` if ``index`` is ``permutation // k``, else itself."""
    index = peel(index)
    if is_op(index, aten.floor_divide.default, aten.div.Tensor_mode):
        return peel(index.args[0])
    return index


def _choices_of(order: Order, tokens: Any, user: fx.Node) -> Any:
    """k where the sums are over ``tokens``.

    Raises:
        Miss: the choices are of another number of tokens, or their tokens are not ``row // k``.
    """
    total = shape(order.choices)[0]
    base: Any = order.choices
    while is_op(base, *VIEWS) and val(base).dim() == 1:
        base = base.args[0]
    k = shape(base)[1] if val(base).dim() == 2 else None
    if k is None and val(base).dim() == 1 and known_equal(total, tokens):
        k = 1
    if k is None or not known_equal(k * tokens, total):
        raise Miss("the experts' rows are added to something else than tokens", user)
    where: Any = user.args[1][0] if is_op(user, aten.index_put.default) else user.args[2]  # type: ignore[index]
    for node in _before(where, order.permutation):
        if is_op(node, aten.floor_divide.default, aten.div.Tensor_mode):
            if not known_equal(node.args[1], k):
                raise Miss("the experts' rows are not added to their choices' tokens", user)
            return k
    if known_equal(k, 1):
        return k
    raise Miss("the experts' rows are not added to their choices' tokens", user)


def _before(node: Any, stop: Any) -> list[fx.Node]:
    """First arguments from ``node`` on, up to ``stop``."""
    found = []
    while isinstance(node, fx.Node) and node is not stop and node.op == "call_function":
        found.append(node)
        node = node.args[0]
    return found


def row_weights(other: Any, down: RowProduct, restored: bool) -> fx.Node:
    """The flat choices' weights ``[S]`` that ``other`` spreads over the rows.

    Raises:
        Miss: it is something else.
    """
    node = other
    while is_op(node, aten.unsqueeze.default, aten.expand.default, *VIEWS, *_COPY):
        if not known_equal(val(node.args[0]).numel(), val(node).numel()):
            break
        node = node.args[0]
    if not isinstance(node, fx.Node):
        raise Miss("the experts' rows are multiplied with a number", down.result)
    if is_op(node, aten.masked_fill.Scalar) and node.args[2] == 0:
        if is_sentinel(node.args[1], down.order, shape(down.weight)[0]):
            node = peel(node.args[0])
    permutation = down.order.permutation
    if permutation is not None and not restored:
        ordered = is_op(node, aten.index.Tensor) and peel(node.args[1][0]) is permutation  # type: ignore[index]
        if not ordered:
            raise Miss("the experts' rows meet weights that are not in their order", node)
        node = node.args[0]  # type: ignore[assignment]
    if not same_shape((val(node).numel(),), (shape(down.result)[0],)):
        raise Miss("the experts' rows are multiplied with more than their weights", node)
    return node


def scaled(rows: fx.Node, down: RowProduct, combine: Combine) -> tuple[fx.Node, fx.Node]:
    """(rows without weights, the weights): those of the output, or else of the input.

    Raises:
        Miss: there are none.
    """
    if combine.weights is not None:
        return rows, combine.weights
    node = peel(rows)
    if is_op(node, aten.mul.Tensor):
        for a, b in (node.args, node.args[::-1]):
            try:
                return a, row_weights(b, down, False)  # type: ignore[return-value]
            except Miss:
                continue
    raise Miss("the experts' rows are summed without the router's weights", combine.result)
