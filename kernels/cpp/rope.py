"""Launcher of RoPE (``rope.h``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import (
    FLOATS,
    device_reason,
    dtype_reason,
    name_of,
    row_grid,
    run,
    threads_for,
)
from dspark_compile.ops import OPS

MAX_FEATURES = 1024


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` features of ``x``, in float32."""
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1], sin.shape[:-1])
    wide = x.expand(*lead, x.shape[-1])
    angles = [a.expand(*lead, a.shape[-1]) for a in (cos, sin)]
    plain = all(t.stride(-1) == 1 for t in (wide, *angles))
    grid = row_grid(wide, *angles) if plain and wide.numel() else None
    if grid is None:
        return OPS["rope"].reference(x, cos, sin, rotary_dim, interleaved, compute_fp32, out_dtype)
    y = torch.empty(wide.shape, dtype=out_dtype or x.dtype)
    sizes, strides = grid
    numbers = [*sizes, *strides[0], *strides[1], *strides[2]]
    run(
        emit.rope(x.dtype, cos.dtype, y.dtype),
        *(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()),
        (ctypes.c_int64 * 12)(*numbers),
        *(x.shape[-1], rotary_dim, cos.shape[-1], int(interleaved)),
        threads_for(y.numel() * y.element_size() // 2),
    )
    return y


def angles_reason(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> str | None:
    """Why cos and sin do not fit a row of ``x``; None if they do."""
    if x.dim() == 0 or not isinstance(x.shape[-1], int) or x.shape[-1] > MAX_FEATURES:
        return f"x has {list(x.shape)[-1:]} features, not at most {MAX_FEATURES}"
    if rotary_dim % 2 or rotary_dim > x.shape[-1]:
        return f"{rotary_dim} of {x.shape[-1]} features are rotated"
    if cos.shape != sin.shape or cos.shape[-1] not in (rotary_dim, rotary_dim // 2):
        return f"cos is {list(cos.shape)}, sin {list(sin.shape)}, for {rotary_dim} features"
    if cos.dtype != sin.dtype:
        return f"cos is {name_of(cos.dtype)}, sin {name_of(sin.dtype)}"
    return None


def supports_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    reason = (
        device_reason(x=x, cos=cos, sin=sin)
        or dtype_reason(x=x, cos=cos, sin=sin)
        or angles_reason(x, cos, sin, rotary_dim, interleaved)
    )
    if reason:
        return reason
    if out_dtype is not None and out_dtype not in FLOATS:
        return f"out_dtype is {name_of(out_dtype)}"
    return emit.why_not_built(emit.rope(x.dtype, cos.dtype, out_dtype or x.dtype))
