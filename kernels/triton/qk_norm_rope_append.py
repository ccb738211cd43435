"""What lies between a layer's QKV and its attention, as one launch.

    k_cache[b, h, positions[m]] = rope(rms_norm(k[b, h, m]))        query alike, returned
    v_cache[b, h, positions[m]] = v[b, h, m]

Caches are exact or int8, as in `cache`. Positions outside the cache are not written.
Reference: `dspark_compile.ops.cache`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dspark_compile.kernels.triton._launch import (
    TL_DTYPE,
    Launch,
    device_reason,
    dtype_reason,
    next_power_of_2,
)
from dspark_compile.kernels.triton.cache import append_reason, strides, unit_stride
from dspark_compile.kernels.triton.qk_norm_rope_append_kernel import qk_norm_rope_append_kernel
from dspark_compile.kernels.triton.rope import product_dtype, rotation_reason


def _table(table: Tensor, batch: int, count: int) -> Tensor:
    """cos or sin as ``[B, 1, M, R]``."""
    table = unit_stride(table)
    return table.expand(batch, 1, count, table.shape[-1])


def plan_prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor | None,
    value_cache: Tensor,
    value_scale: Tensor | None,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> tuple[Launch, Tensor]:
    """The launch with the query's output."""
    batch, q_heads, count, features = query.shape
    kv_heads, value_features = key.shape[1], value.shape[-1]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    query, key, value = unit_stride(query), unit_stride(key), unit_stride(value)
    cos, sin = _table(cos, batch, count), _table(sin, batch, count)
    normed = torch.float32 if weight_in_compute else query.dtype

    def scaled(weight: Tensor | None) -> tuple[torch.dtype, torch.dtype]:
        dtype = normed if weight is None or weight_in_compute else weight.dtype
        return dtype, torch.promote_types(normed, dtype)

    (q_weight_dtype, q_scaled), (k_weight_dtype, k_scaled) = (
        scaled(query_weight),
        scaled(key_weight),
    )
    block_pairs = next_power_of_2(rotary_dim // 2)
    block_m = max(1, min(next_power_of_2(count), 8, 1024 // block_pairs))
    weights = (query_weight, key_weight) if norm else (None, None)
    arguments: dict[str, Any] = {
        "Q_ptr": query,
        "K_ptr": key,
        "V_ptr": value,
        "QW_ptr": None if weights[0] is None else weights[0].contiguous(),
        "KW_ptr": None if weights[1] is None else weights[1].contiguous(),
        "Cos_ptr": cos,
        "Sin_ptr": sin,
        "Out_ptr": out,
        "K_cache_ptr": key_cache,
        "V_cache_ptr": value_cache,
        "K_scale_ptr": key_scale,
        "V_scale_ptr": value_scale,
        "Positions_ptr": positions,
        **strides("Q", query, "bhm"),
        **strides("K", key, "bhm"),
        **strides("V", value, "bhm"),
        **strides("Cos", cos[:, 0], "bm"),
        **strides("Sin", sin[:, 0], "bm"),
        **strides("K_cache", key_cache, "bhn"),
        **strides("V_cache", value_cache, "bhn"),
        **strides("K_scale", key_scale, "bhn"),
        **strides("V_scale", value_scale, "bhn"),
        "Positions_stride": positions.stride(0),
        "M": count,
        "N": key_cache.shape[2],
        "eps": float(eps),
        "weight_offset": float(weight_offset),
    }
    launch = Launch(
        qk_norm_rope_append_kernel,
        (triton.cdiv(count, block_m), q_heads + 2 * kv_heads, batch),
        arguments,
        {
            "Q_HEADS": q_heads,
            "KV_HEADS": kv_heads,
            "D": features,
            "DV": value_features,
            "ROTARY": rotary_dim,
            "BLOCK_M": block_m,
            "BLOCK_PAIRS": block_pairs,
            "BLOCK_REST": next_power_of_2(max(1, features - rotary_dim)),
            "BLOCK_DV": next_power_of_2(value_features),
            "NORM": norm,
            "INTERLEAVED": interleaved,
            "FULL_COS": cos.shape[-1] == rotary_dim,
            "NORMED": TL_DTYPE[normed],
            "Q_WEIGHT": TL_DTYPE[q_weight_dtype],
            "Q_SCALED": TL_DTYPE[q_scaled],
            "K_WEIGHT": TL_DTYPE[k_weight_dtype],
            "K_SCALED": TL_DTYPE[k_scaled],
            "X_DTYPE": TL_DTYPE[query.dtype],
            "PRODUCT": TL_DTYPE[product_dtype(query, cos, compute_fp32)],
        },
        num_warps=1 if block_m == 1 else 4,
        num_stages=1,
    )
    return launch, out


def _prepare_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor | None,
    value_cache: Tensor,
    value_scale: Tensor | None,
    positions: Tensor,
    rotary_dim: int,
) -> str | None:
    if query.dtype != key.dtype:
        return f"query is {query.dtype}, key {key.dtype}"
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is not None and tuple(weight.shape) != (query.shape[-1],):
            return f"{name} is {list(weight.shape)}, not [{query.shape[-1]}]"
    if cos.dim() > 4 or (cos.dim() >= 3 and cos.shape[-3] != 1):
        return f"cos {list(cos.shape)} differs between heads"
    return (
        device_reason(query, key, value, query_weight, key_weight, cos, sin)
        or dtype_reason(query=query, value=value, q=query_weight, k=key_weight, cos=cos, sin=sin)
        or rotation_reason(query, cos, sin, rotary_dim)
        or append_reason(key_cache, key_scale, key, positions)
        or append_reason(value_cache, value_scale, value, positions)
    )


def qk_norm_rope_append_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    *attributes: Any,
) -> Tensor:
    """Normalise and rotate q and k, append k and v; returns the query."""
    launch, out = plan_prepare(
        query, key, value, query_weight, key_weight, cos, sin,
        key_cache, None, value_cache, None, positions, *attributes,
    )  # fmt: skip
    launch.run()
    return out


def qk_norm_rope_append_int8_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    *attributes: Any,
) -> Tensor:
    """`qk_norm_rope_append_` over int8 caches."""
    launch, out = plan_prepare(
        query, key, value, query_weight, key_weight, cos, sin,
        key_cache, key_scale, value_cache, value_scale, positions, *attributes,
    )  # fmt: skip
    launch.run()
    return out


def supports_qk_norm_rope_append_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> str | None:
    return _prepare_reason(
        query, key, value, query_weight, key_weight, cos, sin,
        key_cache, None, value_cache, None, positions, rotary_dim,
    )  # fmt: skip


def supports_qk_norm_rope_append_int8_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> str | None:
    return _prepare_reason(
        query, key, value, query_weight, key_weight, cos, sin,
        key_cache, key_scale, value_cache, value_scale, positions, rotary_dim,
    )  # fmt: skip
