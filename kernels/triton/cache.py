"""Key/value appends, in place: exact or int8, alone or behind qk-norm and RoPE.

    k_cache[b, h, positions[m]] = rope(rms_norm(k[b, h, m]))        query alike, returned
    v_cache[b, h, positions[m]] = v[b, h, m]

int8 caches take ``round(z / scale)`` with ``scale = max|z| / 127`` per token and head, rounded
to the scale's dtype first. One program owns BLOCK_M tokens of one head, of query, key or value:
a whole attention layer's preparation is one launch. Positions outside the cache are not
written. Reference: `dspark_compile.ops.cache`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_compile.kernels.triton._launch import (
    TL_DTYPE,
    Launch,
    device_reason,
    dtype_reason,
    next_power_of_2,
    round_to,
)
from dspark_compile.kernels.triton.rope import product_dtype, rotation_reason, turn


@triton.jit
def nearest_even(x):
    """``x`` rounded to the nearest integer, ties to even, for ``|x| < 2**22``."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def scale_of(top, Scale_ptr):
    """``(scale, 1 / scale)`` of rows whose largest magnitude is ``top``; 0 has inverse 0."""
    scale = tl.div_rn(top, 127.0 + tl.zeros_like(top)).to(Scale_ptr.dtype.element_ty)
    wide = scale.to(tl.float32)
    inverse = tl.where(
        wide > 0, tl.div_rn(1.0 + tl.zeros_like(wide), tl.where(wide > 0, wide, 1.0)), 0.0
    )
    return scale, inverse


@triton.jit
def to_int8(x, inverse):
    """``x * inverse``, rounded and clamped to [-127, 127]."""
    q = nearest_even(tl.minimum(tl.maximum(x * inverse, -127.0), 127.0))
    return q.to(tl.int8)


@triton.jit
def append_rows(
    New_ptr, Cache_ptr, Scale_ptr, in_new, in_cache, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Copy (or quantise) rows: pointers ``[M, 1]`` to row starts, masks ``[M, 1]``."""
    col = tl.arange(0, BLOCK_D)[None, :]
    x = tl.load(New_ptr + col, mask=in_new & (col < D), other=0.0)
    if Scale_ptr is None:
        tl.store(Cache_ptr + col, x.to(Cache_ptr.dtype.element_ty), mask=in_cache & (col < D))
    else:
        z = x.to(tl.float32)
        scale, inverse = scale_of(tl.max(tl.abs(z), axis=1)[:, None], Scale_ptr)
        tl.store(Cache_ptr + col, to_int8(z, inverse), mask=in_cache & (col < D))
        tl.store(Scale_ptr, scale, mask=in_cache)


@triton.jit(do_not_specialize=["M", "N"])
def cache_append_kernel(
    New_ptr,
    Cache_ptr,
    Scale_ptr,
    Positions_ptr,
    New_stride_b,
    New_stride_h,
    New_stride_m,
    Cache_stride_b,
    Cache_stride_h,
    Cache_stride_n,
    Scale_stride_b,
    Scale_stride_h,
    Scale_stride_n,
    Positions_stride,
    M,
    N,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    in_new = m < M
    n = tl.load(Positions_ptr + m * Positions_stride, mask=in_new, other=-1).to(tl.int64)
    in_cache = (n >= 0) & (n < N)
    New_ptr += b * New_stride_b + h * New_stride_h + m.to(tl.int64) * New_stride_m
    Cache_ptr += b * Cache_stride_b + h * Cache_stride_h + n * Cache_stride_n
    if Scale_ptr is None:
        append_rows(New_ptr, Cache_ptr, None, in_new, in_cache, D, BLOCK_D)
    else:
        scales = Scale_ptr + b * Scale_stride_b + h * Scale_stride_h + n * Scale_stride_n
        append_rows(New_ptr, Cache_ptr, scales, in_new, in_cache, D, BLOCK_D)


@triton.jit
def norm_rope_rows(
    X_ptr,
    W_ptr,
    Cos_ptr,
    Sin_ptr,
    in_rows,
    eps,
    weight_offset,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_COS: tl.constexpr,
    NORMED: tl.constexpr,
    WEIGHT: tl.constexpr,
    SCALED: tl.constexpr,
    X_DTYPE: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """``rope(rms_norm(x))`` of rows that start at X_ptr ``[M, 1]``, in float32.

    Returns the first and second member of each pair and the features that are not rotated.
    """
    PAIRS: tl.constexpr = ROTARY // 2
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    in_pairs = pair < PAIRS
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + PAIRS
    rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
    in_rest = rest < D

    x1 = tl.load(X_ptr + first, mask=in_rows & in_pairs, other=0.0).to(tl.float32)
    x2 = tl.load(X_ptr + second, mask=in_rows & in_pairs, other=0.0).to(tl.float32)
    x3 = tl.load(X_ptr + rest, mask=in_rows & in_rest, other=0.0).to(tl.float32)
    if NORM:
        total = tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1) + tl.sum(x3 * x3, axis=1)
        scale = tl.rsqrt(total / D + eps)[:, None]
        x1 = round_to(x1 * scale, NORMED)
        x2 = round_to(x2 * scale, NORMED)
        x3 = round_to(x3 * scale, NORMED)
        if W_ptr is not None:
            w1 = tl.load(W_ptr + first, mask=in_pairs, other=0.0).to(tl.float32)
            w2 = tl.load(W_ptr + second, mask=in_pairs, other=0.0).to(tl.float32)
            w3 = tl.load(W_ptr + rest, mask=in_rest, other=0.0).to(tl.float32)
            w1 = round_to(round_to(w1, WEIGHT) + weight_offset, WEIGHT)
            w2 = round_to(round_to(w2, WEIGHT) + weight_offset, WEIGHT)
            w3 = round_to(round_to(w3, WEIGHT) + weight_offset, WEIGHT)
            x1 = round_to(x1 * w1, SCALED)
            x2 = round_to(x2 * w2, SCALED)
            x3 = round_to(x3 * w3, SCALED)
        x1 = round_to(x1, X_DTYPE)
        x2 = round_to(x2, X_DTYPE)
        x3 = round_to(x3, X_DTYPE)

    in_table = in_rows & in_pairs
    if FULL_COS:
        cos1 = tl.load(Cos_ptr + first, mask=in_table, other=0.0).to(tl.float32)
        cos2 = tl.load(Cos_ptr + second, mask=in_table, other=0.0).to(tl.float32)
        sin1 = tl.load(Sin_ptr + first, mask=in_table, other=0.0).to(tl.float32)
        sin2 = tl.load(Sin_ptr + second, mask=in_table, other=0.0).to(tl.float32)
    else:
        cos1 = tl.load(Cos_ptr + pair, mask=in_table, other=0.0).to(tl.float32)
        sin1 = tl.load(Sin_ptr + pair, mask=in_table, other=0.0).to(tl.float32)
        cos2 = cos1
        sin2 = sin1
    y1, y2 = turn(x1, x2, cos1, cos2, sin1, sin2, PRODUCT)
    return round_to(y1, X_DTYPE), round_to(y2, X_DTYPE), x3


@triton.jit(do_not_specialize=["M", "N"])
def qk_norm_rope_append_kernel(
    Q_ptr,
    K_ptr,
    V_ptr,
    QW_ptr,
    KW_ptr,
    Cos_ptr,
    Sin_ptr,
    Out_ptr,
    K_cache_ptr,
    V_cache_ptr,
    K_scale_ptr,
    V_scale_ptr,
    Positions_ptr,
    Q_stride_b,
    Q_stride_h,
    Q_stride_m,
    K_stride_b,
    K_stride_h,
    K_stride_m,
    V_stride_b,
    V_stride_h,
    V_stride_m,
    Cos_stride_b,
    Cos_stride_m,
    Sin_stride_b,
    Sin_stride_m,
    K_cache_stride_b,
    K_cache_stride_h,
    K_cache_stride_n,
    V_cache_stride_b,
    V_cache_stride_h,
    V_cache_stride_n,
    K_scale_stride_b,
    K_scale_stride_h,
    K_scale_stride_n,
    V_scale_stride_b,
    V_scale_stride_h,
    V_scale_stride_n,
    Positions_stride,
    M,
    N,
    eps,
    weight_offset,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_COS: tl.constexpr,
    NORMED: tl.constexpr,
    Q_WEIGHT: tl.constexpr,
    Q_SCALED: tl.constexpr,
    K_WEIGHT: tl.constexpr,
    K_SCALED: tl.constexpr,
    X_DTYPE: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    in_new = m < M
    rows = m.to(tl.int64)
    Cos_ptr += b * Cos_stride_b + rows * Cos_stride_m
    Sin_ptr += b * Sin_stride_b + rows * Sin_stride_m
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + ROTARY // 2
    rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
    in_pairs = pair < ROTARY // 2
    in_rest = rest < D

    if head < Q_HEADS:
        y1, y2, y3 = norm_rope_rows(
            Q_ptr + b * Q_stride_b + head.to(tl.int64) * Q_stride_h + rows * Q_stride_m,
            QW_ptr, Cos_ptr, Sin_ptr, in_new, eps, weight_offset,
            D, ROTARY, BLOCK_PAIRS, BLOCK_REST, NORM, INTERLEAVED, FULL_COS,
            NORMED, Q_WEIGHT, Q_SCALED, X_DTYPE, PRODUCT,
        )  # fmt: skip
        out_rows = Out_ptr + ((b * Q_HEADS + head) * M + rows) * D
        tl.store(out_rows + first, y1.to(X_DTYPE), mask=in_new & in_pairs)
        tl.store(out_rows + second, y2.to(X_DTYPE), mask=in_new & in_pairs)
        if ROTARY < D:
            tl.store(out_rows + rest, y3.to(X_DTYPE), mask=in_new & in_rest)
    else:
        n = tl.load(Positions_ptr + m * Positions_stride, mask=in_new, other=-1).to(tl.int64)
        in_cache = (n >= 0) & (n < N)
        if head < Q_HEADS + KV_HEADS:
            h = (head - Q_HEADS).to(tl.int64)
            y1, y2, y3 = norm_rope_rows(
                K_ptr + b * K_stride_b + h * K_stride_h + rows * K_stride_m,
                KW_ptr, Cos_ptr, Sin_ptr, in_new, eps, weight_offset,
                D, ROTARY, BLOCK_PAIRS, BLOCK_REST, NORM, INTERLEAVED, FULL_COS,
                NORMED, K_WEIGHT, K_SCALED, X_DTYPE, PRODUCT,
            )  # fmt: skip
            k_cell = b * K_cache_stride_b + h * K_cache_stride_h + n * K_cache_stride_n
            k_rows = K_cache_ptr + k_cell
            if K_scale_ptr is None:
                z1 = y1.to(K_cache_ptr.dtype.element_ty)
                z2 = y2.to(K_cache_ptr.dtype.element_ty)
                z3 = y3.to(K_cache_ptr.dtype.element_ty)
            else:
                top = tl.maximum(tl.max(tl.abs(y1), axis=1), tl.max(tl.abs(y2), axis=1))
                top = tl.maximum(top, tl.max(tl.abs(y3), axis=1))
                scale, inverse = scale_of(top[:, None], K_scale_ptr)
                k_scale = b * K_scale_stride_b + h * K_scale_stride_h + n * K_scale_stride_n
                tl.store(K_scale_ptr + k_scale, scale, mask=in_cache)
                z1 = to_int8(y1, inverse)
                z2 = to_int8(y2, inverse)
                z3 = to_int8(y3, inverse)
            tl.store(k_rows + first, z1, mask=in_cache & in_pairs)
            tl.store(k_rows + second, z2, mask=in_cache & in_pairs)
            if ROTARY < D:
                tl.store(k_rows + rest, z3, mask=in_cache & in_rest)
        else:
            h = (head - Q_HEADS - KV_HEADS).to(tl.int64)
            new_rows = V_ptr + b * V_stride_b + h * V_stride_h + rows * V_stride_m
            v_cell = b * V_cache_stride_b + h * V_cache_stride_h + n * V_cache_stride_n
            v_rows = V_cache_ptr + v_cell
            if V_scale_ptr is None:
                append_rows(new_rows, v_rows, None, in_new, in_cache, DV, BLOCK_DV)
            else:
                v_scale = b * V_scale_stride_b + h * V_scale_stride_h + n * V_scale_stride_n
                v_scale = V_scale_ptr + v_scale
                append_rows(new_rows, v_rows, v_scale, in_new, in_cache, DV, BLOCK_DV)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    steps = (0,) * len(axes) if x is None else x.stride()
    return {f"{name}_stride_{axis}": step for axis, step in zip(axes, steps)}


def _append_reason(
    cache: Tensor, scale: Tensor | None, new: Tensor, positions: Tensor
) -> str | None:
    if cache.dim() != 4 or new.dim() != 4:
        return f"cache and new are {cache.dim()}- and {new.dim()}-dimensional, not 4"
    if cache.stride(-1) != 1:
        return "the cache's features are not contiguous"
    if not isinstance(cache.shape[-1], int) or cache.shape[-1] > 4096:
        return f"{cache.shape[-1]} features"
    if positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
        return f"positions are {list(positions.shape)} {positions.dtype}"
    if scale is None:
        return device_reason(cache, new, positions) or dtype_reason(cache=cache, new=new)
    if cache.dtype != torch.int8:
        return f"the cache is {str(cache.dtype).removeprefix('torch.')}, not int8"
    if scale.dim() != 3:
        return f"scale is {list(scale.shape)}"
    return device_reason(cache, scale, new, positions) or dtype_reason(scale=scale, new=new)


def plan_append(cache: Tensor, scale: Tensor | None, new: Tensor, positions: Tensor) -> Launch:
    """The launch that appends ``new`` to ``cache``, quantised if ``scale`` is given."""
    batch, heads, count, features = new.shape
    new = _unit(new)
    block_d = next_power_of_2(features)
    block_m = max(1, min(next_power_of_2(count), 2048 // block_d))
    return Launch(
        cache_append_kernel,
        (triton.cdiv(count, block_m), heads, batch),
        {
            "New_ptr": new,
            "Cache_ptr": cache,
            "Scale_ptr": scale,
            "Positions_ptr": positions,
            **_strides("New", new, "bhm"),
            **_strides("Cache", cache, "bhn"),
            **_strides("Scale", scale, "bhn"),
            "Positions_stride": positions.stride(0),
            "M": count,
            "N": cache.shape[2],
        },
        {"D": features, "BLOCK_M": block_m, "BLOCK_D": block_d},
        num_warps=max(1, min(4, block_m * block_d // 256)),
        num_stages=1,
    )


def cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """Rows ``positions`` of dimension 2 of ``cache`` become ``new``."""
    plan_append(cache, None, new, positions).run()


def cache_append_int8_(cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor) -> None:
    """`cache_append_` of ``new``, quantised per token and head."""
    plan_append(cache, scale, new, positions).run()


def supports_cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> str | None:
    return _append_reason(cache, None, new, positions)


def supports_cache_append_int8_(
    cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor
) -> str | None:
    return _append_reason(cache, scale, new, positions)


def _table(table: Tensor, batch: int, count: int) -> Tensor:
    """cos or sin as ``[B, 1, M, R]``."""
    table = _unit(table)
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
    query, key, value = _unit(query), _unit(key), _unit(value)
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
        **_strides("Q", query, "bhm"),
        **_strides("K", key, "bhm"),
        **_strides("V", value, "bhm"),
        **_strides("Cos", cos[:, 0], "bm"),
        **_strides("Sin", sin[:, 0], "bm"),
        **_strides("K_cache", key_cache, "bhn"),
        **_strides("V_cache", value_cache, "bhn"),
        **_strides("K_scale", key_scale, "bhn"),
        **_strides("V_scale", value_scale, "bhn"),
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
        or _append_reason(key_cache, key_scale, key, positions)
        or _append_reason(value_cache, value_scale, value, positions)
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
