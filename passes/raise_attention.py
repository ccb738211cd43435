"""Raise attention: softmax(scores) @ values, however it was written, becomes one op.

    out = softmax(cap(scale * q @ k^T) + bias) @ v        ->  dspark.attention(q, k, v, bias)

The scores may be scaled before or after the product, soft-capped, biased (ALiBi, relative
positions), masked by addition, ``masked_fill`` or ``where``, and given a sink; products may
be ``matmul``, ``bmm`` or ``baddbmm`` on ``[M, N]``, ``[B, M, N]``, ``[B * H, M, N]``,
``[B, H, M, N]`` or grouped ``[B, Hkv, G, M, N]``. Masks become the op's ``bias`` tensor, for
``prove_masks`` to read. Not rewritten, each with its reason: weights that are returned or
changed, scores that other code uses, softmax over another dimension.

Worth: no ``B * H * M * N`` tensor is stored, and every later pass sees one spelling.

Numerics: scores and softmax are float32, whatever the code had; the result has the code's
dtype. A row whose keys are all forbidden by -inf gives zeros where the code gives NaN; one
whose scores were *replaced* by a finite number (``masked_fill(mask, -1e9)``) averages over
all keys, as in the code (in float16 that is approximate).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
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
from dspark_compile.passes.heads import Heads, Layout, unscaled
from dspark_compile.passes.normalize import common_subexpressions
from dspark_compile.passes.scores import (
    Fill,
    Miss,
    Scores,
    Term,
    factors,
    find,
    is_product,
    is_row_max,
    lead_of,
    read,
    sink_gate,
    zeroed,
)

_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default, aten.softmax.int)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class _Softmax:
    """A softmax: ``node`` is its result; ``inside`` the nodes that only it uses."""

    node: fx.Node
    input: fx.Node
    dim: int
    inside: tuple[fx.Node, ...] = ()


def _softmax(node: fx.Node) -> _Softmax | None:
    """``node`` as a softmax: the op, or ``exp(x - max(x)) / sum(exp(x - max(x)))``."""
    if is_op(node, *_SOFTMAX):
        x = node.args[0]
        assert isinstance(x, fx.Node)
        return _Softmax(node, x, int(argument(node, 1, "dim")) % max(val(x).dim(), 1))
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
    return _Softmax(node, x, int(dims[0]) % val(x).dim(), (e, total))


@dataclass
class _Use:
    """Where softmax weights meet values: ``product`` is ``weights @ v``."""

    product: fx.Node
    leads: list[tuple[Any, ...]]


def _meets_product(node: fx.Node, depth: int = 8) -> bool:
    """Whether a product is near behind ``node``: what makes a softmax look like attention's."""
    for user in node.users:
        if is_product(user):
            return True
        if depth and is_tensor(user) and not is_dialect_op(user) and not is_op(user, *_SOFTMAX):
            if _meets_product(user, depth - 1):
                return True
    return False


def _uses(node: fx.Node, scores: Scores, lead: tuple[Any, ...], keys: Any) -> list[_Use]:
    """Every product that takes the weights ``node``; raises `Miss` for any other use."""
    found: list[_Use] = []
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
                found.append(_Use(user, [*leads, lead_of(user)]))
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


def _private(path: list[fx.Node], softmax: _Softmax, gated: bool) -> None:
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


def _release(path: list[fx.Node], ctx: PassContext) -> None:
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


class RaiseAttention(Pass):
    """See the module's docstring."""

    name = "raise_attention"
    kind = "attention"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if node.op != "call_function" or not is_tensor(node):
                continue
            softmax = _softmax(node)
            if softmax is None or not _meets_product(node):
                continue
            path = find(softmax.input)
            if path is None:
                continue
            _release(path, ctx)
            try:
                yield from self._read(softmax, path)
            except Miss as miss:
                problem = Problem(miss.condition, miss.hint, miss.node)
                yield Match(node, path, {"problem": problem})

    def _read(self, softmax: _Softmax, path: list[fx.Node]) -> list[Match]:
        rank = val(softmax.input).dim()
        if softmax.dim != rank - 1:
            raise Miss(
                f"the softmax goes over dimension {softmax.dim} of {rank}, not over the keys",
                "put the keys last",
                softmax.node,
            )
        scores = read(path)
        keys = shape(scores.product)[-1]
        lead = shape(softmax.node)[:-2]
        matches: list[Match] = []
        uses = _uses(softmax.node, scores, lead, keys)
        gate = sink_gate(path, uses[0].product) if len(uses) == 1 else None
        _private(path, softmax, gated=gate is not None)
        if gate is not None:
            if scores.sinks is not None:
                raise Miss("there are a sink and a gate that is a sink", node=gate[0])
            scores.sinks = gate[1]
        for use in uses:
            layout = Layout.choose(
                scores.query, scores.key_t, use.product, [*scores.leads, *use.leads]
            )
            captures = {"scores": scores, "layout": layout, "product": use.product}
            anchor = use.product if gate is None else gate[0]
            nodes = [*path, softmax.node, use.product, anchor]
            matches.append(Match(anchor, list(dict.fromkeys(nodes)), captures))
        return matches

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        if "problem" in match.captures:
            return match["problem"]
        scores: Scores = match["scores"]
        value = factors(match["product"])[1]
        for node in (scores.query, scores.key_t, value):
            if dtype(node) not in _FLOATS:
                return Problem(f"an operand is {dtype(node)}", node=node)
        if scores.softcap < 0:
            return Problem("the soft-cap is negative", node=scores.product)
        layout: Layout = match["layout"]
        sinks = scores.sinks
        if isinstance(sinks, fx.Node) and not known_equal(val(sinks).numel(), layout.heads):
            return Problem(f"the sink has {val(sinks).numel()} numbers, not one for each head")
        # Emitting is what shows whether every view can be written; nothing is replaced yet,
        # and what is not used is dead code.
        anchor = match.anchor
        near = (match["product"], scores.query, scores.key_t, value)
        heads = Heads(anchor.graph, anchor, ctx.fake_mode, layout, near)
        try:
            with anchor.graph.inserting_before(anchor):
                out = _emit(scores, value, heads)
                match.captures["out"] = out
                match.captures["results"] = _results(anchor, out, heads)
        except Miss as miss:
            return Problem(miss.condition, miss.hint, miss.node)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        for old, new in match["results"]:
            old.replace_all_uses_with(new)
            graph.erase_node(old)
        for node in reversed(match.nodes):
            if not node.users and node is not match.anchor:
                graph.erase_node(node)
        out = match["out"]
        scale = out.kwargs["scale"]
        for index in (0, 1):
            operand, factor = unscaled(out.args[index])
            out.update_arg(index, operand)
            scale *= factor
        out.update_kwarg("scale", scale)

    def run(self, graph: fx.Graph, ctx: PassContext):  # type: ignore[no-untyped-def]
        record = super().run(graph, ctx)
        if record.found:
            graph.eliminate_dead_code()
            common_subexpressions(graph)
        for node in graph.nodes:
            if is_dialect_op(node, "attention"):
                ctx.raised("attention", node)
        return record


def _bias(scores: Scores, heads: Heads, compute: torch.dtype) -> fx.Node | None:
    """The added terms and the fills as one tensor that broadcasts to ``[B, H, M, N]``."""
    added: fx.Node | None = None
    allowed: dict[bool, fx.Node] = {}  # by whether a forbidden score becomes -inf

    def replaced(added: fx.Node | None) -> fx.Node:
        # Replaced by a finite number: so low that only the mask is left of the score.
        kind = compute if added is None else dtype(added)
        low = torch.finfo(torch.float32 if kind == torch.float64 else kind).min
        added = heads.number(0.0, compute) if added is None else added
        return heads.call(aten.where.self, allowed.pop(False), added, heads.number(low, kind))

    for extra in scores.extras:
        tensor = heads.spread(extra.node, extra.lead)
        if isinstance(extra, Fill):
            tensor = tensor if extra.allowed else heads.negated(tensor)
            final = extra.value == -math.inf
            if final in allowed:
                tensor = heads.call(aten.bitwise_and.Tensor, allowed[final], tensor)
            allowed[final] = tensor
            continue
        assert isinstance(extra, Term)
        if False in allowed:  # what is added to the low number decides between such scores
            added = replaced(added)
        if not dtype(tensor).is_floating_point:
            tensor = heads.cast(tensor, compute)
        if extra.factor != 1:
            tensor = heads.call(aten.mul.Tensor, tensor, extra.factor)
        added = tensor if added is None else heads.call(aten.add.Tensor, added, tensor)
    if added is not None and scores.floor is not None:
        added = heads.call(aten.clamp_min.default, added, scores.floor)
    if False in allowed:
        added = replaced(added)
    if True not in allowed:
        return added
    if added is None:
        return allowed[True]
    never = heads.number(-math.inf, dtype(added))
    return heads.call(aten.where.self, allowed[True], added, never)


def _sinks(scores: Scores, heads: Heads) -> fx.Node | None:
    if scores.sinks is None:
        return None
    if isinstance(scores.sinks, float):
        kwargs = {"dtype": torch.float32, "device": val(scores.product).device}
        return heads.call(aten.full.default, [heads.layout.heads], scores.sinks, **kwargs)
    sink = scores.sinks
    while is_op(sink, *VIEWS, aten.unsqueeze.default) and val(sink).dim() > 1:
        sink = sink.args[0]  # type: ignore[assignment]
    return heads.view(sink, (heads.layout.heads,))


def _emit(scores: Scores, value: fx.Node, heads: Heads) -> fx.Node:
    """The attention op, before the product with ``value``."""
    query, key, value = heads.operands(scores.query, scores.key_t, value)
    for term in scores.row_scales:
        factor = heads.cast(heads.spread(term.node, term.lead), dtype(query))
        query = heads.call(aten.mul.Tensor, query, factor)
    query, key, value = heads.one_dtype(query, key, value)
    bias = _bias(scores, heads, dtype(query))
    sinks = _sinks(scores, heads)
    return heads.call(
        dialect("attention"), query, key, value, bias, sinks, [], [],
        scale=scores.scale, mask="", softcap=scores.softcap, mask_value=None,
    )  # fmt: skip


def _results(anchor: fx.Node, out: fx.Node, heads: Heads) -> list[tuple[fx.Node, fx.Node]]:
    """``(old, new)`` for each node to be replaced: the product, and before it the views of
    it that lie as ``out [B, H, M, Dv]`` does."""
    result = heads.cast(out, dtype(anchor))
    views = [u for u in anchor.users if is_op(u, *VIEWS) and same_shape(shape(u), shape(result))]
    pairs = [(view, result) for view in views]
    rest = result if len(views) == len(anchor.users) else heads.back(result, anchor)
    return [*pairs, (anchor, rest)]
