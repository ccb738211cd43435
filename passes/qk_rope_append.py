"""One kernel between the projections and attention: q/k norm, RoPE and cache append.

    q = rope(rms_norm(q), cos, sin)                       the norms may be absent
    k = rope(rms_norm(k), cos, sin)
    cache_append_(key_cache, k, p); cache_append_(value_cache, v, p)
    attention(q, key_cache, value_cache)
        -> q = qk_norm_rope_append_(q, k, v, …, key_cache, value_cache, p)

and the same with ``cache_append_int8_`` and ``attention_int8``, where the kernel quantises
too. Permutations ``[B, M, H, D] -> [B, H, M, D]`` between the steps are carried to the
front, so that the kernel reads the projections' results where they lie.

Conditions: q and k are rotated alike (the same cos and sin, width and layout), nothing else
reads the rotated q or k, both appends go to the same rows, and there is a place in the graph
after every input and every reader of the old caches and before every reader of the new ones.
The norms join if they agree in eps and form and nothing else reads them; else they stay
in front as they are.

Worth, for each layer and step, four or five launches and a round trip of q, k and v through
memory: at one token a step that is most of what stands between the products. Only a kernel
can do it, so the pass runs where lowering has one for the op (Triton, C++) and changes nothing
elsewhere: there Inductor fuses the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from dspark_compile.codegen.registry import implementations
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    order,
    readers,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.write_in_place import written_input

# The implementations that are one kernel.
_FUSED = ("triton", "cpp")


@dataclass(frozen=True)
class Rotated:
    """``after(rope(before(norm(base))))`` with the permutations and the norm optional."""

    rope: fx.Node
    base: fx.Node
    norm: fx.Node | None
    before: list[int] | None
    after: list[int] | None
    nodes: tuple[fx.Node, ...]

    def attributes(self) -> tuple[Any, ...]:
        """What must be equal for q and k: the rotation, and where its operands stand."""
        node = self.rope
        return (
            node.args[1],
            node.args[2],
            argument(node, 3, "rotary_dim"),
            argument(node, 4, "interleaved", False),
            argument(node, 5, "compute_fp32", False),
            self.after,
        )


class QKRopeAppend(Pass):
    """See the module's docstring."""

    name = "qk_rope_append"
    kind = "cache"
    stage = "finish"

    # For tests: rewrite without a kernel, so that the op's reference runs.
    without_kernel: ClassVar[bool] = False

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_dialect_op(node, "attention"):
                caches, parts = (node.args[1], node.args[2]), 1
            elif is_dialect_op(node, "attention_int8"):
                caches, parts = (node.args[1], node.args[3]), 2
            else:
                continue
            writes = [_write(cache) for cache in caches]
            if writes[0] is None or writes[1] is None or writes[0] is writes[1]:
                continue
            query, key = rotated(node.args[0]), rotated(writes[0].args[parts])
            if query is None and key is None:
                continue
            op = "qk_norm_rope_append_" if parts == 1 else "qk_norm_rope_append_int8_"
            rows = shape(node.args[0])[2]  # type: ignore[arg-type]
            if not self.without_kernel and not _kernel(op, ctx, val(caches[0]).device, rows):  # type: ignore[arg-type]
                continue
            yield Match(
                writes[0],
                captures={
                    "attention": node,
                    "query": query,
                    "key": key,
                    "writes": writes,
                    "parts": parts,
                    "op": op,
                },
            )

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        query, key, writes = match["query"], match["key"], match["writes"]
        attention, parts = match["attention"], match["parts"]
        if query is None:
            return Problem("the key is rotated and the query is not", "", attention.args[0])
        if key is None:
            return Problem("the query is rotated and the key is not", "", writes[0].args[parts])
        if query.attributes() != key.attributes():
            return Problem("query and key are rotated differently", "", key.rope)
        if writes[0].args[-1] is not writes[1].args[-1]:
            return Problem("keys and values are appended at different positions", "", writes[1])
        for found, reader in ((query, attention), (key, writes[0])):
            other = _other_reader(found, reader)
            if other is not None:
                return Problem(f"{found.rope} is read elsewhere too", "", other)
            if not same_shape(shape(found.rope), shape(found.rope.args[0])):
                return Problem("cos and sin have a larger batch than what they rotate")
            if dtype(found.rope) != dtype(found.rope.args[0]):
                return Problem("the rotation changes the dtype", "", found.rope)
        if len(shape(query.rope.args[1])) > 4 or len(shape(query.rope)) != 4:
            return Problem("the rotation is not of [B, H, M, D]", "", query.rope)
        match.captures["norm"] = _common_norm(query, key)
        place = _place(match)
        if place is None:
            return Problem(
                "no place is after every input and before every reader",
                "append keys and values before anything reads the caches",
            )
        match.captures["place"] = place
        if self.without_kernel:
            return None
        return self._unsupported(match, place, ctx)

    def _unsupported(self, match: Match, place: fx.Node, ctx: PassContext) -> Problem | None:
        """What the kernel says of the very call: it is made, shown and taken back."""
        graph = match.anchor.graph
        last = place.prev
        node = self._fused(match, graph, place, ctx)
        reasons = [
            item.supports(node)
            for item in implementations(match["op"], ctx.options.kernels, _device(match))
            if item.name in _FUSED
        ]
        while place.prev is not last:
            graph.erase_node(place.prev)
        if None in reasons:
            return None
        return Problem(f"no kernel fits: {'; '.join(map(str, reasons))}")

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        new = self._fused(match, graph, match["place"], ctx)
        attention, writes = match["attention"], match["writes"]
        query, key = match["query"], match["key"]
        done = [*writes, query.rope, key.rope]
        if match["norm"] is not None:
            done += [query.norm, key.norm]
        attention.args = (new, *attention.args[1:])
        for node in writes:
            graph.erase_node(node)
        for node in (*query.nodes, *key.nodes):
            if not node.users:
                graph.erase_node(node)
        for node in done:
            ctx.report.rename_site(node.name, new.name, match["op"])

    def _fused(self, match: Match, graph: fx.Graph, place: fx.Node, ctx: PassContext) -> fx.Node:
        """The fused call, made in front of ``place``."""
        query, key, writes, parts = match["query"], match["key"], match["writes"], match["parts"]
        norm = match["norm"]

        def call(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=writes[0], fake_mode=ctx.fake_mode)

        def moved(node: fx.Node, *orders: list[int] | None) -> fx.Node:
            for permutation in orders:
                if permutation is not None:
                    node = call(aten.permute.default, node, permutation)
            return node

        def operand(found: Rotated) -> fx.Node:
            if norm is None:
                return moved(found.rope.args[0], found.after)  # type: ignore[arg-type]
            return moved(found.base, found.before, found.after)

        def angle(node: fx.Node) -> fx.Node:
            if query.after is None:
                return node
            while len(shape(node)) < 4:
                node = call(aten.unsqueeze.default, node, 0)
            return moved(node, query.after)

        with graph.inserting_before(place):
            return call(
                dialect(match["op"]),
                operand(query),
                operand(key),
                writes[1].args[parts],
                query.norm.args[1] if norm else None,
                key.norm.args[1] if norm else None,
                angle(query.rope.args[1]),
                angle(query.rope.args[2]),
                *writes[0].args[:parts],
                *writes[1].args[:parts],
                writes[0].args[-1],
                *(norm or (0.0, 0.0, False)),
                norm is not None,
                *query.attributes()[2:5],
            )


def rotated(node: Any) -> Rotated | None:
    """``node`` as a rotation, or None."""
    nodes = [node]
    node, after = _permuted(node)
    if not is_dialect_op(node, "rope"):
        return None
    rope = node
    base, before = _permuted(rope.args[0])
    nodes += [rope, rope.args[0]]
    if before is not None and before[-1] != len(before) - 1:
        base, before = rope.args[0], None
    norm = base if is_dialect_op(base, "rms_norm") else None
    if norm is None:
        base, before = rope.args[0], None
    else:
        nodes.append(norm)
        base = norm.args[0]  # type: ignore[assignment]
    return Rotated(rope, base, norm, before, after, tuple(dict.fromkeys(nodes)))


def _permuted(node: Any) -> tuple[Any, list[int] | None]:
    if is_op(node, aten.permute.default):
        return node.args[0], list(node.args[1])
    return node, None


def _write(cache: Any) -> fx.Node | None:
    """The one in-place append to a cache input, or to its view ``[B, H, N, D]``."""
    if not isinstance(cache, fx.Node) or written_input(cache) is None:
        return None
    writes = [u for u in cache.users if is_dialect_op(u, "cache_append_", "cache_append_int8_")]
    writes = [u for u in writes if u.args[0] is cache]
    return writes[0] if len(writes) == 1 else None


def _kernel(op: str, ctx: PassContext, device: torch.device, rows: Any) -> bool:
    """Whether lowering has a kernel for ``op`` on ``device`` under the options.

    On a CPU it is worth its call for the few rows of a decode step.
    """
    if device.type == "cpu" and ctx.options.kernels == "auto" and not _few(rows):
        return False
    return any(i.name in _FUSED for i in implementations(op, ctx.options.kernels, device))


def _few(rows: Any) -> bool:
    return isinstance(rows, int) and rows <= 16


def _device(match: Match) -> torch.device:
    return val(match["writes"][0].args[0]).device


def _other_reader(found: Rotated, reader: fx.Node) -> fx.Node | None:
    """A reader of the rotated tensor beside ``reader``, or None."""
    node: fx.Node = reader
    for item in found.nodes[: found.nodes.index(found.rope) + 1]:
        for user in item.users:
            if user is not node:
                return user
        node = item
    return None


def _common_norm(query: Rotated, key: Rotated) -> tuple[float, float, bool] | None:
    """``(eps, weight_offset, weight_in_compute)`` if both norms can join the kernel."""
    forms = []
    for found in (query, key):
        norm = found.norm
        if norm is None or not _only(norm, found):
            return None
        weight = norm.args[1]
        if isinstance(weight, fx.Node) and len(shape(weight)) != 1:
            return None
        out = argument(norm, 6, "out_dtype")
        if not argument(norm, 5, "compute_fp32", True) or out not in (None, dtype(found.base)):
            return None
        eps, offset = argument(norm, 2, "eps"), argument(norm, 3, "weight_offset", 0.0)
        forms.append((eps, offset, argument(norm, 4, "weight_in_compute", False)))
        if (weight is None) != (query.norm.args[1] is None):  # type: ignore[union-attr]
            return None
    return forms[0] if forms[0] == forms[1] else None


def _only(norm: fx.Node, found: Rotated) -> bool:
    """Whether the norm, and its permutation, serve this rotation alone."""
    operand = found.rope.args[0]
    return len(norm.users) == 1 and len(operand.users) == 1  # type: ignore[union-attr]


def _place(match: Match) -> fx.Node | None:
    """The first node that must come after the fused call, or None if one that must come
    before it comes later."""
    attention, writes, parts = match["attention"], match["writes"], match["parts"]
    query, key = match["query"], match["key"]
    position = order(attention.graph)
    old = {*writes, *query.nodes, *key.nodes}
    inputs = [query.base, key.base, query.rope.args[0], key.rope.args[0], *query.attributes()[:2]]
    if match["norm"] is not None:
        inputs = [query.base, key.base, *query.attributes()[:2]]
        inputs += [n.norm.args[1] for n in (query, key) if n.norm.args[1] is not None]
    inputs += [writes[1].args[parts], writes[0].args[-1]]
    lower = max(position[n] for n in inputs)
    upper = position[attention]
    for write in writes:
        for cache in write.args[:parts]:
            for reader in readers(written_input(cache) or cache) - old:
                if position[reader] < position[write]:
                    lower = max(lower, position[reader])
                else:
                    upper = min(upper, position[reader])
    # An input that is itself overwritten keeps its order to that.
    for item in inputs:
        for reader in readers(item):
            if is_op(reader, aten.copy_.default):
                upper = min(upper, position[reader])
    if lower >= upper:
        return None
    return next(n for n in attention.graph.nodes if position[n] == upper)
