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

import math
from collections.abc import Iterator

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    aten,
    dtype,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
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
    read,
)
from dspark_compile.passes.weights import (
    Softmax,
    as_softmax,
    check_private,
    meets_product,
    release,
    sink_gate,
    uses,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RaiseAttention(Pass):
    """See the module's docstring."""

    name = "raise_attention"
    kind = "attention"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if node.op != "call_function" or not is_tensor(node):
                continue
            softmax = as_softmax(node)
            if softmax is None or not meets_product(node):
                continue
            path = find(softmax.input)
            if path is None:
                continue
            release(path, ctx)
            try:
                yield from self._read(softmax, path)
            except Miss as miss:
                problem = Problem(miss.condition, miss.hint, miss.node)
                yield Match(node, path, {"problem": problem})

    def _read(self, softmax: Softmax, path: list[fx.Node]) -> list[Match]:
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
        found = uses(softmax.node, scores, lead, keys)
        gate = sink_gate(path, found[0].product) if len(found) == 1 else None
        check_private(path, softmax, gated=gate is not None)
        if gate is not None:
            if scores.sinks is not None:
                raise Miss("there are a sink and a gate that is a sink", node=gate[0])
            scores.sinks = gate[1]
        for use in found:
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
