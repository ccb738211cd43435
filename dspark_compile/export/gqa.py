"""GroupQueryAttention: RoPE, cache append and attention of a layer as one op.

    q, k, v = linear(x) -> [B, S, heads * D] (-> norm) -> rope
    keys = cache_extend(past, k); values = cache_extend(past, v); attention(q, keys, values)

becomes one node between the projections and the output projection; heads are not taken apart where
nothing between needs it. Where q, k and v come straight out of linears, their weights are stacked
and the op takes one packed tensor.

The op's mask is causal over the rows that are valid, with or without a window. It counts a row's
valid tokens from the attention mask, so **padding is on the right**: with left padding choose
``portable``. A mask that is anything else stays outside, as ONNX's Attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.graph import aten, is_dialect_op, is_op, known_equal

from .calibrate import CacheScales
from .errors import ExportError
from .masks import Structure, is_attention_mask, structure
from .ops import op
from .program import Program
from .rotary import Angles, rope_reason
from .shapes import constant_sizes, is_reshape
from .weights import _args, _item


@dataclass
class Site:
    """One attention that GroupQueryAttention does."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    keys: fx.Node
    values: fx.Node
    mask: Structure
    bias: fx.Node | None
    sinks: fx.Node | None


class GroupQuery:
    """Lowers a program's attentions to GroupQueryAttention.

    Args:
        angles: tables of RoPE.
        ids, attention_mask, positions: the placeholders of these inputs, or None.
        scales: store the caches in so many bits, with these static scales.
    """

    def __init__(
        self,
        program: Program,
        angles: Angles,
        ids: fx.Node | None,
        attention_mask: fx.Node | None,
        positions: fx.Node | None,
        scales: CacheScales | None = None,
    ) -> None:
        self.scales = scales
        self.program, self.angles = program, angles
        self.ids, self.attention_mask, self.positions = ids, attention_mask, positions
        self.lengths: tuple[fx.Node, fx.Node] | None = None
        self.sites: list[fx.Node] = []
        self.casts: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        """Lower every site that fits; the others are left, with their reasons."""
        for node in list(self.program.graph.nodes):
            if not is_dialect_op(node, "attention"):
                continue
            site = self._match(node)
            if isinstance(site, str):
                if self.scales is not None:
                    raise ExportError(
                        f"kv_cache='int{self.scales.bits}': {node.name} is not "
                        f"GroupQueryAttention ({site}); choose kv_cache='model', or int8 with "
                        "target='portable'"
                    )
                self.program.fallbacks.append(
                    (f"dspark::attention at {node.name}", f"not GroupQueryAttention: {site}")
                )
            else:
                self._rewrite(site)

    def _match(self, node: fx.Node) -> Site | str:
        if self.attention_mask is None:
            return "the model has no attention_mask to count valid tokens by"
        query, keys, values, bias, sinks, tensors, ints = _args(node, 7)
        # With padding on the right a row sees itself at least: what is added to the scores of
        # forbidden keys is then -inf to float32's exp if it is large.
        value = node.kwargs.get("mask_value")
        if value is not None and value > -1e4:
            return f"forbidden keys have {value} added to their score"
        if not is_dialect_op(keys, "cache_extend") or not is_dialect_op(values, "cache_extend"):
            return "keys and values are no growing cache"
        for cache in (keys, values):
            if cache.args[0] not in self.program.inputs:
                return "the past is no input of the graph"
            users = [u for u in cache.users if u.op != "output"]
            if users != [node]:
                return "another node reads the cache"
        q, k, v = (x.meta["val"] for x in (query, keys.args[1], values.args[1]))
        if k.shape[3] != v.shape[3]:
            return f"keys have {k.shape[3]} features, values {v.shape[3]}"
        if int(k.shape[3]) % 8:
            return f"a head has {k.shape[3]} features, no multiple of 8"
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or k.dtype != q.dtype:
            return f"dtypes {q.dtype} and {k.dtype}"
        rows, total = q.shape[2], keys.meta["val"].shape[2]
        found = structure(node.kwargs.get("mask", ""), list(tensors), list(ints), rows, total)
        if found.other:
            return f"the mask is not causal with padding or a window: {found.other}"
        if not found.causal:
            return "the mask is not causal"
        if found.padding is not None and not is_attention_mask(found.padding, self.attention_mask):
            return "the padding does not come from the attention mask"
        if bias is not None:
            if bias.meta["val"].dtype == torch.bool:
                return "part of the mask depends on data"
            if bias.meta["val"].dim() != 4:
                return f"the bias has {bias.meta['val'].dim()} dimensions"
        return Site(node, query, keys.args[1], values.args[1], keys, values, found, bias, sinks)

    def _rewrite(self, site: Site) -> None:
        program, node = self.program, site.node
        heads = int(site.query.meta["val"].shape[1])
        kv_heads = int(site.key.meta["val"].shape[1])
        dtype = site.query.meta["val"].dtype
        tables = self._tables(site, dtype)
        query, key = site.query, site.key
        cos = sin = None
        interleaved = False
        if tables is not None:
            cos, sin, interleaved = tables
            query, key = self._unrotated(node, query), self._unrotated(node, key)
        flat = [self._flat(node, x) for x in (query, key, site.value)]
        packed = self._packed(node, flat)
        qkv = [packed, None, None] if packed is not None else flat
        seqlens, total = self._lengths(node)
        bias = site.bias
        if bias is not None and bias.meta["val"].dtype != dtype:
            bias = program.emit(node, aten._to_copy.default, (bias,), dtype=dtype)
        past = (site.keys.args[0], site.values.args[0])
        held, bits = self._quantized(past), 0 if self.scales is None else self.scales.bits
        out = program.emit(
            node,
            op("gqa"),
            (
                *qkv, *past, seqlens, total, cos, sin,
                self.positions if cos is not None else None, bias, site.sinks, *held,
                heads, kv_heads, float(node.kwargs["scale"]),
                float(node.kwargs.get("softcap", 0.0)), site.mask.window, interleaved, bits, True,
            ),
        )  # fmt: skip
        self.sites.append(out)
        result, keys, values = (_item(program, node, out, i) for i in range(3))
        self._replace_result(node, result, heads)
        for old, new in ((site.keys, keys), (site.values, values)):
            if not bits:
                new.meta["val"] = old.meta["val"]
            old.replace_all_uses_with(new)

    def _quantized(self, past: tuple[Any, Any]) -> tuple[fx.Node | None, fx.Node | None]:
        """Scales of a layer as constants; its pasts become integers."""
        if self.scales is None:
            return None, None
        program, scales = self.program, self.scales
        layer, made = len(self.sites), []
        for node, kind, values in zip(past, ("key", "value"), (scales.keys, scales.values)):
            value = node.meta["val"]
            width = int(value.shape[3]) // (2 if scales.bits == 4 else 1)
            with program.fake_mode:
                node.meta["val"] = torch.empty(
                    (*value.shape[:3], width),
                    dtype=torch.uint8 if scales.bits == 4 else torch.int8,
                )
            made.append(program.constant(f"cache_scale.{layer}.{kind}", values[layer]))
        return made[0], made[1]

    def _tables(self, site: Site, dtype: torch.dtype) -> tuple[fx.Node, fx.Node, bool] | None:
        """cos and sin tables if query and key are roped alike, right before attention."""
        q, k = (self._rope_below(x) for x in (site.query, site.key))
        if q is None or k is None:
            return None
        q_args, k_args = _args(q, 7), _args(k, 7)
        where = f"dspark::rope at {q.name}"
        reason = rope_reason(q) or rope_reason(k)
        if reason is None and q_args[1:] != k_args[1:]:
            reason = "query and key are rotated by different angles"
        if reason is None and (len(q.users) > 1 or len(k.users) > 1):
            reason = "the rotated query or key is read elsewhere too"
        if reason is None and self.positions is None:
            reason = "the model has no position_ids"
        _, cos, sin, rotary_dim, interleaved, _, _ = q_args
        # ONNX Runtime's kernels rotate whole heads, or parts that are multiples of 16.
        size = int(site.query.meta["val"].shape[3])
        if reason is None and rotary_dim != size and rotary_dim % 16:
            reason = f"{rotary_dim} of {size} features are rotated, no multiple of 16"
        if reason is None:
            made = [self.angles.table(x, rotary_dim, bool(interleaved)) for x in (cos, sin)]
            if all(isinstance(x, fx.Node) for x in made):
                return self._cast(made[0], dtype), self._cast(made[1], dtype), bool(interleaved)
            reason = next(x for x in made if isinstance(x, str))
        self.program.fallbacks.append((where, f"outside of GroupQueryAttention: {reason}"))
        return None

    def _rope_below(self, x: fx.Node) -> fx.Node | None:
        """The rope that makes ``x [B, H, S, D]``, before or behind the exchange of dimensions."""
        if _swaps_heads(x) and len(x.users) == 1:
            below = x.args[0]
            assert isinstance(below, fx.Node)
            return below if is_dialect_op(below, "rope") else None
        return x if is_dialect_op(x, "rope") else None

    def _unrotated(self, like: fx.Node, x: fx.Node) -> fx.Node:
        """``x [B, H, S, D]`` without its rope."""
        if not _swaps_heads(x):
            return x.args[0]  # type: ignore[return-value]
        below = x.args[0].args[0]  # type: ignore[union-attr]
        return self.program.emit(like, aten.permute.default, (below, [0, 2, 1, 3]))

    def _cast(self, table: Any, dtype: torch.dtype) -> fx.Node:
        value = self.program.value(table)
        assert value is not None
        if value.dtype == dtype:
            return table
        if table not in self.casts:
            self.casts[table] = self.program.constant(self.program.names[table], value.to(dtype))
        return self.casts[table]

    def _flat(self, like: fx.Node, x: fx.Node) -> fx.Node:
        """``[B, S, heads * D]`` of ``x [B, heads, S, D]``, without moving data where possible."""
        program, value = self.program, x.meta["val"]
        width = int(value.shape[1] * value.shape[3])
        if _swaps_heads(x):
            below = x.args[0]
        else:
            below = program.emit(like, aten.permute.default, (x, [0, 2, 1, 3]))
        assert isinstance(below, fx.Node)
        if is_reshape(below) or is_op(below, aten.view.default):
            origin = below.args[0]
            assert isinstance(origin, fx.Node)
            shape = origin.meta["val"].shape
            if len(shape) == 3 and known_equal(shape[2], width):
                batch, rows = value.shape[0], value.shape[2]
                if known_equal(shape[0], batch) and known_equal(shape[1], rows):
                    return origin
        sizes = constant_sizes(below.meta["val"], [value.shape[0], value.shape[2], width])
        return program.emit(like, op("reshape"), (below, sizes or [0, 0, width]))

    def _packed(self, like: fx.Node, flat: list[fx.Node]) -> fx.Node | None:
        """One product for q, k and v if they are linears of one input with known weights."""
        program = self.program
        if not all(is_dialect_op(x, "linear") and len(x.users) >= 1 for x in flat):
            return None
        calls = [_args(x, 3) for x in flat]
        if len({c[0] for c in calls}) != 1 or len(set(flat)) != 3:
            return None
        weights = [program.value(c[1]) for c in calls]
        biases = [c[2] for c in calls]
        if any(w is None for w in weights) or any(len(c[1].users) > 1 for c in calls):
            return None
        if any((b is None) != (biases[0] is None) for b in biases):
            return None
        values = [program.value(b) for b in biases]
        if biases[0] is not None and any(b is None for b in values):
            return None
        stem = program.names[calls[0][1]].removesuffix(".weight").rsplit(".", 1)[0]
        weight = program.constant(f"{stem}.qkv.weight", torch.cat(weights))  # type: ignore[arg-type]
        bias = None
        if biases[0] is not None:
            bias = program.constant(f"{stem}.qkv.bias", torch.cat(values))  # type: ignore[arg-type]
        return program.emit(flat[0], torch.ops.dspark.linear.default, (calls[0][0], weight, bias))

    def _replace_result(self, node: fx.Node, result: fx.Node, heads: int) -> None:
        """``result [B, S, H * D]`` in place of ``node [B, H, S, D]`` and of the transposition and
        reshape behind it."""
        program = self.program
        width = int(result.meta["val"].shape[2])
        for user in list(node.users):
            if not _swaps_heads(user):
                continue
            for last in list(user.users):
                joins = is_reshape(last) or is_op(last, aten.view.default, aten.reshape.default)
                shape = list(last.meta["val"].shape) if joins else []
                if len(shape) == 3 and known_equal(shape[2], width):
                    program.replace(last, result)
            if not user.users:
                program.graph.erase_node(user)
        if node.users:
            first = next(iter(node.users))
            split = program.emit(first, op("reshape"), (result, [0, 0, heads, width // heads]))
            program.replace(node, program.emit(first, aten.permute.default, (split, [0, 2, 1, 3])))
        else:
            program.graph.erase_node(node)

    def _lengths(self, like: fx.Node) -> tuple[fx.Node, fx.Node]:
        if self.lengths is None:
            assert self.attention_mask is not None
            program = self.program
            call = (self.attention_mask,)
            self.lengths = (
                program.emit(like, op("seqlens"), call),
                program.emit(like, op("total_length"), call),
            )
        return self.lengths


def _swaps_heads(node: fx.Node) -> bool:
    """Whether a node exchanges dimensions 1 and 2 of four."""
    if is_op(node, aten.permute.default):
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    if is_op(node, aten.transpose.int) and node.meta["val"].dim() == 4:
        return {node.args[1] % 4, node.args[2] % 4} == {1, 2}  # type: ignore[operator]
    return False
