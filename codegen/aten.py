"""ATen forms of the dialect ops: what Inductor fuses, or what runs under ``inner="eager"``.

A form computes what the op's reference does, spelt so that the inner compiler does well:
norms and RoPE as pointwise chains, attention as ``scaled_dot_product_attention`` where its
features allow. ``FORMS`` maps op names to functions of the op's own arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.ops import OPS
from dspark_compile.ops.attention import allowed_keys
from dspark_compile.ops.attention import attention as attention_reference

FORMS: dict[str, Callable[..., Any]] = {}

# These references are already good ATen: pointwise chains and plain matrix products.
for _name in (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "add_layer_norm",
    "rope",
    "gated_mlp",
    "gated_mlp_merged",
    "mlp",
    "merged_linear",
    "moe_router",
    "dequantize_weight",
    "linear_int4",
    "gated_mlp_int8",
    "gated_mlp_int4",
    "quantize_kv",
    "dequantize_kv",
    "cache_append",
    "cache_append_int8",
    "cache_extend",
    "qk_norm_rope_append",
    "qk_norm_rope_append_int8",
    "qk_norm_rope_append_",
    "qk_norm_rope_append_int8_",
    "greedy_token",
    "sample_token",
):
    FORMS[_name] = OPS[_name].reference


def _form(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        FORMS[name] = function
        return function

    return register


@_form("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ATen's linear."""
    return F.linear(x, weight, bias)


@_form("linear_int8")
def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A product with the numbers themselves where a row has one scale; float16 could not hold
    its sums."""
    if zero_point is not None or scale.numel() != weight.shape[0] or x.dtype == torch.float16:
        return OPS["linear_int8"].reference(x, weight, scale, zero_point, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x, weight.to(x.dtype)).to(wide) * scale.reshape(-1).to(wide)
    return (y if bias is None else y + bias).to(x.dtype)


@_form("matmul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """ATen's matmul."""
    return torch.matmul(a, b)


@_form("attention")
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` with the mask as a tensor, unless the predicate is
    plainly causal; soft-caps and sinks take the reference's arithmetic."""
    heads, keys = query.shape[1], key.shape[2]
    if softcap > 0 or sinks is not None or query.numel() == 0 or keys == 0:
        return attention_reference(
            query, key, value, bias, sinks, mask_tensors, mask_ints,
            scale=scale, mask=mask, softcap=softcap, mask_value=mask_value,
        )  # fmt: skip
    gqa = heads != key.shape[1]
    causal = mask == "k <= q" and bias is None and mask_value is None
    attn_mask = None
    if not causal:
        attn_mask = _mask(query, keys, bias, mask, mask_tensors, mask_ints, mask_value)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _mask(
    query: Tensor,
    keys: int,
    bias: Tensor | None,
    mask: str,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    mask_value: float | None,
) -> Tensor | None:
    """What ``scaled_dot_product_attention`` takes for bias and predicate."""
    shape = (*query.shape[:3], keys)
    allowed = allowed_keys(bias, mask, mask_tensors, mask_ints, shape, query.device)
    additive = bias if bias is not None and bias.dtype != torch.bool else None
    attn_mask: Tensor | None
    if allowed is not None and additive is None and mask_value is None:
        attn_mask = allowed
    elif allowed is not None:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        blocked = torch.full_like(zero, -math.inf if mask_value is None else mask_value)
        attn_mask = torch.where(allowed, zero, blocked)
        if additive is not None:
            attn_mask = attn_mask + additive
    else:
        attn_mask = additive
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        attn_mask = attn_mask.to(query.dtype)
    return attn_mask


@_form("attention_int8")
def attention_int8(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    **attributes: Any,
) -> Tensor:
    """Dequantise in the query's dtype, then `attention`."""
    k = key.to(query.dtype) * key_scale.to(query.dtype).unsqueeze(-1)
    v = value.to(query.dtype) * value_scale.to(query.dtype).unsqueeze(-1)
    return attention(query, k, v, bias, sinks, mask_tensors, mask_ints, **attributes)


@_form("mla_attention")
def mla_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Tensor:
    """Attention with one key head ``[latent ; key_rope]`` and the latent as value. Heads are rows
    of one: ``enable_gqa`` would make a copy of the keys for each."""
    whole = torch.cat((query, query_rope), -1)
    key, value = torch.cat((latent, key_rope), -1).unsqueeze(1), latent.unsqueeze(1)
    batch, heads, rows, _ = query.shape
    keys = latent.shape[1]
    if softcap > 0 or sinks is not None or query.numel() == 0 or keys == 0:
        return attention(
            whole, key, value, bias, sinks, mask_tensors, mask_ints,
            scale=scale, mask=mask, softcap=softcap, mask_value=mask_value,
        )  # fmt: skip
    attn_mask = _mask(query, keys, bias, mask, mask_tensors, mask_ints, mask_value)
    if attn_mask is not None:
        attn_mask = torch.broadcast_to(attn_mask, (batch, heads, rows, keys)).flatten(1, 2)[:, None]
    out = F.scaled_dot_product_attention(
        whole.flatten(1, 2)[:, None], key, value, attn_mask, scale=scale
    )
    return out.squeeze(1).unflatten(1, (heads, rows))


@_form("cache_append_")
def cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """``index_copy_`` along the sequence."""
    torch.ops.aten.index_copy_.default(cache, 2, positions, new.to(cache.dtype))


@_form("cache_append_int8_")
def cache_append_int8_(cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor) -> None:
    """Quantise, then two ``index_copy_``."""
    q, s = FORMS["quantize_kv"](new, scale.dtype)
    torch.ops.aten.index_copy_.default(cache, 2, positions, q)
    torch.ops.aten.index_copy_.default(scale, 2, positions, s)
