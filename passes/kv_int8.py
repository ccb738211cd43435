"""KV int8: a static cache that the caller brings lives in int8.

Under ``options={"kv_cache": "int8"}`` a cache input that is only appended to in place and
only read by attention is replaced by an int8 tensor and one scale per token and head. The
runtime keeps those beside the caller's tensor (`runtime/kv_storage.py`), shared by every
graph that takes the same cache, releases the original's memory, and makes any outside read
of it an error. Numerics change (marked so): about 0.4 % of each token's largest key or
value feature. Worth half of the cache's bytes, in memory and in traffic.

    cache_append_(cache, new, positions)  -> cache_append_int8_(data, scale, new, positions)
    attention(q, cache_k, cache_v, …)     -> attention_int8(q, k, k_scale, v, v_scale, …)

It also fuses a `CompressedCache`'s explicit ``attention(q, dequantize_kv(…),
dequantize_kv(…))``, which changes nothing but the order of rounding; that part is always on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.ops.cache import SCALE_DTYPE
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import dtype, emit, is_dialect_op, shape, val
from dspark_compile.passes.write_in_place import written_input
from dspark_compile.runtime.kv_storage import compress, why_not


@dataclass(frozen=True)
class CompressedInput:
    """A graph input that the runtime takes from a cache tensor's compressed twin.

    Attributes:
        index: which of the caller's inputs is the cache tensor.
        part: ``"data"`` (int8 ``[B, H, N, D]``) or ``"scale"`` (``[B, H, N]``).
        fake: the fake value, for tracing.
    """

    index: int
    part: str
    fake: torch.Tensor

    def example(self, inputs: Any) -> torch.Tensor:
        """What the inner compiler traces with."""
        return self.fake

    def value(self, args: Any) -> torch.Tensor:
        """The twin's tensor for the cache of this call."""
        return getattr(compress(args[self.index]), self.part)


class FuseDequantize(Pass):
    """``attention(q, dequantize_kv(k), dequantize_kv(v))`` reads the int8 cache itself."""

    name = "fuse_dequantize"
    kind = "cache"
    stage = "optimise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_dialect_op(node, "attention"):
                key, value = node.args[1], node.args[2]
                if is_dialect_op(key, "dequantize_kv") or is_dialect_op(value, "dequantize_kv"):
                    yield Match(node)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        key, value = match.anchor.args[1], match.anchor.args[2]
        if not (is_dialect_op(key, "dequantize_kv") and is_dialect_op(value, "dequantize_kv")):
            return Problem("only one of key and value is compressed")
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        key, value = node.args[1], node.args[2]
        to_int8(node, key.args[:2], value.args[:2], graph, ctx)  # type: ignore[union-attr]


def to_int8(node: fx.Node, key: Any, value: Any, graph: fx.Graph, ctx: PassContext) -> fx.Node:
    """Replace an attention by `attention_int8` over ``(data, scale)`` pairs."""
    with graph.inserting_before(node):
        new = emit(
            graph,
            dialect("attention_int8"),
            (node.args[0], *key, *value, *node.args[3:]),
            dict(node.kwargs),
            like=node,
            fake_mode=ctx.fake_mode,
        )
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    ctx.report.rename_site(node.name, new.name, "attention_int8")
    return new


class KVInt8(Pass):
    """See the module's docstring."""

    name = "kv_int8"
    kind = "cache"
    stage = "finish"
    changes_numerics = True

    def enabled(self, ctx: PassContext) -> bool:
        return ctx.options.kv_cache == "int8" and super().enabled(ctx)

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        """One match: every cache of the graph, since keys and values go together."""
        caches: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if not is_dialect_op(node, "cache_append_"):
                continue
            if node.args[0].op == "placeholder":
                caches.setdefault(node.args[0], []).append(node)
            elif written_input(node.args[0]) is not None:
                ctx.reject(
                    self.name, self.kind, node, "the cache is [B, N, H, D]", "use [B, H, N, D]"
                )
        if caches:
            yield Match(next(iter(caches)), captures={"caches": caches})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        caches = match["caches"]
        unfit: dict[fx.Node, str] = {}
        for cache in caches:
            reason = self._unfit(cache, ctx)
            if reason:
                unfit[cache] = reason
        # Attention reads both of its caches in int8 or neither.
        changed = True
        while changed:
            changed = False
            for cache in caches:
                if cache in unfit:
                    continue
                for user in cache.users:
                    if not is_dialect_op(user, "attention"):
                        continue
                    other = user.args[2] if user.args[1] is cache else user.args[1]
                    if other not in caches or other in unfit:
                        unfit[cache] = "the other tensor of its attention stays exact" + (
                            f": {unfit[other]}" if other in unfit else ""
                        )
                        changed = True
                        break
        for cache, reason in unfit.items():
            writer = caches[cache][0]
            ctx.reject(self.name, self.kind, writer, reason, "this cache stays exact")
        match.captures["fit"] = [c for c in caches if c not in unfit]
        if not match["fit"]:
            return Problem("no cache of this graph can be compressed")
        return None

    def _unfit(self, cache: fx.Node, ctx: PassContext) -> str | None:
        index = _input_index(cache)
        if dtype(cache) not in (torch.bfloat16, torch.float16, torch.float32):
            return f"the cache is {dtype(cache)}"
        tensor = ctx.example_inputs[index]
        if not isinstance(tensor, torch.Tensor):
            return "the cache is not a tensor input"
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            reason = why_not(tensor)
            if reason:
                return reason
        for user in cache.users:
            if is_dialect_op(user, "cache_append_") and user.args[0] is cache:
                continue
            if is_dialect_op(user, "attention") and cache in user.args[1:3]:
                if cache is user.args[0] or user.args[1] is user.args[2]:
                    return "one tensor serves attention twice"
                continue
            return f"it is also used by {user.name} ({user.target})"
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        twins: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for cache in match["fit"]:
            made: list[fx.Node] = []
            for part, kind, size in (
                ("data", torch.int8, shape(cache)),
                ("scale", SCALE_DTYPE, shape(cache)[:-1]),
            ):
                with graph.inserting_after(last):
                    node = graph.placeholder(f"{cache.name}_{part}")
                with ctx.fake_mode:
                    fake = torch.empty(size, dtype=kind, device=val(cache).device)
                node.meta["val"] = fake
                node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
                node._dynamo_source = None  # type: ignore[attr-defined]
                for key in ("stack_trace", "nn_module_stack"):
                    if key in cache.meta:
                        node.meta[key] = cache.meta[key]
                ctx.extra_inputs.append(CompressedInput(_input_index(cache), part, fake))
                made.append(node)
                last = node
            twins[cache] = (made[0], made[1])
            before = val(cache).numel() * val(cache).element_size()
            after = sum(p.meta["val"].numel() * p.meta["val"].element_size() for p in made)
            name = cache.meta.get("dspark_name", cache.name)
            ctx.report.add_kv(name, "int8", _number(before), _number(after))
        for cache, pair in twins.items():
            for user in list(cache.users):
                if is_dialect_op(user, "cache_append_"):
                    with graph.inserting_before(user):
                        new = emit(
                            graph,
                            dialect("cache_append_int8_"),
                            (*pair, *user.args[1:]),
                            like=user,
                            fake_mode=ctx.fake_mode,
                        )
                    graph.erase_node(user)
                    ctx.report.rename_site(user.name, new.name, "cache_append_int8_")
        done: set[fx.Node] = set()
        for cache in twins:
            for user in list(cache.users):
                if is_dialect_op(user, "attention") and user not in done:
                    done.add(user)
                    to_int8(user, twins[user.args[1]], twins[user.args[2]], graph, ctx)
        # The released tensor must not reach the inner program, which may ask its address.
        for cache, index in {c: _input_index(c) for c in twins}.items():
            if not cache.users and all(isinstance(n, int) for n in shape(cache)):
                ctx.dropped_inputs.add(index)
                graph.erase_node(cache)


def _number(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _input_index(placeholder: fx.Node) -> int:
    placeholders = [n for n in placeholder.graph.nodes if n.op == "placeholder"]
    return placeholders.index(placeholder)
