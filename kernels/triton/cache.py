"""Key/value appends, in place: exact or int8.

    cache[b, h, positions[m]] = new[b, h, m]

int8 caches take ``round(z / scale)`` with ``scale = max|z| / 127`` per token and head, rounded
to the scale's dtype first. One program owns BLOCK_M tokens of one head. Positions outside the
cache are not written. Reference: `dspark_compile.ops.cache`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_compile.kernels.triton._launch import (
    Launch,
    device_reason,
    dtype_reason,
    next_power_of_2,
)


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


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with adjacent features."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
    """Arguments ``<name>_stride_<axis>`` of a kernel; zeros without a tensor."""
    steps = (0,) * len(axes) if x is None else x.stride()
    return {f"{name}_stride_{axis}": step for axis, step in zip(axes, steps)}


def append_reason(
    cache: Tensor, scale: Tensor | None, new: Tensor, positions: Tensor
) -> str | None:
    """Why rows of ``new`` cannot be appended; None if they can."""
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
    new = unit_stride(new)
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
            **strides("New", new, "bhm"),
            **strides("Cache", cache, "bhn"),
            **strides("Scale", scale, "bhn"),
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
    return append_reason(cache, None, new, positions)


def supports_cache_append_int8_(
    cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor
) -> str | None:
    return append_reason(cache, scale, new, positions)
