"""Rotary position embedding, half-split or interleaved, whole or partial.

    half-split:   pairs (i, i + R/2)      interleaved:  pairs (2i, 2i + 1)
    out_1 = x_1 * cos_1 - x_2 * sin_1
    out_2 = x_2 * cos_2 + x_1 * sin_2

cos and sin have R features, or R/2 that serve both members of each pair; they broadcast over
the leading dimensions by stride 0. Features from R on are copied. Reference:
`dspark_compile.ops.rope` (RoFormer, arXiv 2104.09864).
"""

from __future__ import annotations

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
    rows_of,
)


@triton.jit
def turn(x1, x2, cos1, cos2, sin1, sin2, PRODUCT: tl.constexpr):
    """Both members of each pair (float32), rounded to PRODUCT wherever eager code rounds."""
    y1 = round_to(round_to(x1 * cos1, PRODUCT) - round_to(x2 * sin1, PRODUCT), PRODUCT)
    y2 = round_to(round_to(x2 * cos2, PRODUCT) + round_to(x1 * sin2, PRODUCT), PRODUCT)
    return y1, y2


@triton.jit(do_not_specialize=["n_rows"])
def rope_kernel(
    X_ptr,
    Cos_ptr,
    Sin_ptr,
    Y_ptr,
    X_stride_0,
    X_stride_1,
    X_row_stride,
    Cos_stride_0,
    Cos_stride_1,
    Cos_row_stride,
    Sin_stride_0,
    Sin_stride_1,
    Sin_row_stride,
    n_rows,
    size_1,
    size_2,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL_COS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    PAIRS: tl.constexpr = ROTARY // 2
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outer = row // size_2
    i2 = (row % size_2).to(tl.int64)[:, None]
    i1 = (outer % size_1).to(tl.int64)[:, None]
    i0 = (outer // size_1).to(tl.int64)[:, None]
    in_rows = (row < n_rows)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = in_rows & (pair < PAIRS)
    if INTERLEAVED:
        first = 2 * pair
        second = 2 * pair + 1
    else:
        first = pair
        second = pair + PAIRS

    X_ptr += i0 * X_stride_0 + i1 * X_stride_1 + i2 * X_row_stride
    Cos_ptr += i0 * Cos_stride_0 + i1 * Cos_stride_1 + i2 * Cos_row_stride
    Sin_ptr += i0 * Sin_stride_0 + i1 * Sin_stride_1 + i2 * Sin_row_stride
    Y_ptr += row.to(tl.int64)[:, None] * D

    x1 = tl.load(X_ptr + first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(X_ptr + second, mask=mask, other=0.0).to(tl.float32)
    if FULL_COS:
        cos1 = tl.load(Cos_ptr + first, mask=mask, other=0.0).to(tl.float32)
        cos2 = tl.load(Cos_ptr + second, mask=mask, other=0.0).to(tl.float32)
        sin1 = tl.load(Sin_ptr + first, mask=mask, other=0.0).to(tl.float32)
        sin2 = tl.load(Sin_ptr + second, mask=mask, other=0.0).to(tl.float32)
    else:
        cos1 = tl.load(Cos_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        sin1 = tl.load(Sin_ptr + pair, mask=mask, other=0.0).to(tl.float32)
        cos2 = cos1
        sin2 = sin1
    y1, y2 = turn(x1, x2, cos1, cos2, sin1, sin2, PRODUCT)
    tl.store(Y_ptr + first, y1.to(Y_ptr.dtype.element_ty), mask=mask)
    tl.store(Y_ptr + second, y2.to(Y_ptr.dtype.element_ty), mask=mask)

    if ROTARY < D:
        rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
        mask_rest = in_rows & (rest < D)
        x3 = tl.load(X_ptr + rest, mask=mask_rest, other=0.0)
        tl.store(Y_ptr + rest, x3.to(Y_ptr.dtype.element_ty), mask=mask_rest)


def rotation_reason(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> str | None:
    """Why the features of x, cos and sin do not fit each other."""
    if not isinstance(x.shape[-1], int) or not isinstance(cos.shape[-1], int):
        return "the last dimension is not a fixed size"
    if rotary_dim <= 0 or rotary_dim % 2 or rotary_dim > x.shape[-1]:
        return f"rotary_dim {rotary_dim} of {x.shape[-1]} features"
    if cos.shape != sin.shape:
        return f"cos is {list(cos.shape)}, sin {list(sin.shape)}"
    if cos.shape[-1] not in (rotary_dim, rotary_dim // 2):
        return f"cos has {cos.shape[-1]} features for rotary_dim {rotary_dim}"
    if x.shape[-1] > 4096:
        return f"{x.shape[-1]} features, more than 4096"
    return None


def product_dtype(x: Tensor, cos: Tensor, compute_fp32: bool) -> torch.dtype:
    return torch.float32 if compute_fp32 else torch.promote_types(x.dtype, cos.dtype)


def plan(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
    out_dtype: torch.dtype | None,
) -> tuple[Launch, Tensor]:
    """The launch with its output."""
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
    features, width = x.shape[-1], cos.shape[-1]
    y = torch.empty((*lead, features), dtype=out_dtype or x.dtype, device=x.device)
    rows, (x, cos, sin) = rows_of(
        x.expand(*lead, features), cos.expand(*lead, width), sin.expand(*lead, width)
    )
    block_pairs = next_power_of_2(rotary_dim // 2)
    block_m = 1 if rows.count < 64 else max(1, min(16, 1024 // block_pairs))
    names = ("X", "Cos", "Sin")
    launch = Launch(
        rope_kernel,
        (triton.cdiv(rows.count, block_m),),
        {
            "X_ptr": x,
            "Cos_ptr": cos,
            "Sin_ptr": sin,
            "Y_ptr": y,
            **{
                f"{name}_{suffix}": stride
                for name, strides in zip(names, rows.strides)
                for suffix, stride in zip(("stride_0", "stride_1", "row_stride"), strides)
            },
            "n_rows": rows.count,
            "size_1": rows.sizes[1],
            "size_2": rows.sizes[2],
        },
        {
            "D": features,
            "ROTARY": rotary_dim,
            "BLOCK_M": block_m,
            "BLOCK_PAIRS": block_pairs,
            "BLOCK_REST": next_power_of_2(max(1, features - rotary_dim)),
            "INTERLEAVED": interleaved,
            "FULL_COS": width == rotary_dim,
            "PRODUCT": TL_DTYPE[product_dtype(x, cos, compute_fp32)],
        },
        num_warps=max(1, min(8, block_m * block_pairs // 128)),
        num_stages=1,
    )
    return launch, y


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` features of ``x``."""
    launch, y = plan(x, cos, sin, rotary_dim, interleaved, compute_fp32, out_dtype)
    launch.run()
    return y


def supports_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    if out_dtype is not None and out_dtype not in TL_DTYPE:
        return f"out_dtype is {str(out_dtype).removeprefix('torch.')}"
    return (
        device_reason(x, cos, sin)
        or dtype_reason(x=x, cos=cos, sin=sin)
        or rotation_reason(x, cos, sin, rotary_dim)
    )
