"""Launcher of RoPE (``rope.h``)."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import (
    FLOATS,
    Call,
    device_reason,
    dtype_reason,
    name_of,
    row_grid,
    run,
)
from dspark_compile.ops import OPS

MAX_FEATURES = 1024


def rope_call(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Call, Tensor] | None:
    """The call and its result; None where the rows do not fold into three strides."""
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1], sin.shape[:-1])
    wide = x.expand(*lead, x.shape[-1])
    angles = [a.expand(*lead, a.shape[-1]) for a in (cos, sin)]
    plain = all(t.stride(-1) == 1 for t in (wide, *angles))
    grid = row_grid(wide, *angles) if plain and wide.numel() else None
    if grid is None:
        return None
    y = x.new_empty(wide.shape, dtype=out_dtype or x.dtype)
    sizes, strides = grid
    call = Call(
        emit.rope(x.dtype, cos.dtype, y.dtype),
        (
            *(x, cos, sin, y, [*sizes, *strides[0], *strides[1], *strides[2]]),
            *(x.shape[-1], rotary_dim, cos.shape[-1], int(interleaved)),
        ),
        y.numel() * y.element_size() // 2,
        (y,),
    )
    return call, y


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
    made = rope_call(x, cos, sin, rotary_dim, interleaved, compute_fp32, out_dtype)
    if made is None:
        return OPS["rope"].reference(x, cos, sin, rotary_dim, interleaved, compute_fp32, out_dtype)
    run(made[0])
    return made[1]


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
