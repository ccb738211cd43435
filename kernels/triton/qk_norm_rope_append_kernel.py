"""The kernel of `qk_norm_rope_append`: a program owns BLOCK_M tokens of one head, of query, key or
value."""

from __future__ import annotations

import triton
import triton.language as tl

from dspark_compile.kernels.triton._launch import round_to
from dspark_compile.kernels.triton.cache import append_rows, scale_of, to_int8
from dspark_compile.kernels.triton.rope import turn


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
