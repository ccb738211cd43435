"""Launchers of RMS norm and layer norm, alone or behind a residual addition (``norm.h``)."""

from __future__ import annotations

from typing import Any

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
    size_reason,
)


def _source(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_in_compute: bool,
    out_dtype: torch.dtype | None,
    centre: bool,
    add: bool,
) -> emit.Source:
    other = weight if weight is not None else bias
    kind = x.dtype if other is None else other.dtype
    first = not weight_in_compute and x.dtype != torch.float32
    return emit.norm(x.dtype, kind, out_dtype or x.dtype, centre, first, add)


def norm_call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    out_dtype: torch.dtype | None,
    centre: bool,
) -> tuple[Call | None, Tensor, Tensor | None]:
    """The call, the normed rows, and with a residual the sum; no call where there is nothing."""
    if residual is not None:
        x, residual = torch.broadcast_tensors(x, residual)
        if residual.stride(-1) != 1:
            residual = residual.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    total = None if residual is None else x.new_empty(x.shape)
    if y.numel() == 0:
        return None, y, total
    grid = row_grid(x, residual)
    if grid is None:
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        grid = row_grid(x, residual)
        assert grid is not None
    sizes, (x_strides, residual_strides) = grid
    call = Call(
        _source(x, weight, bias, weight_in_compute, out_dtype, centre, residual is not None),
        (
            *(x, residual, total, y, weight, bias, x.shape[-1], *sizes, *x_strides),
            *(*residual_strides, eps, weight_offset),
        ),
        x.numel() * x.element_size() // 4,
        (y,) if total is None else (y, total),
    )
    return call, y, total


def _norm(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    call, y, total = norm_call(*args, **kwargs)
    if call is not None:
        run(call)
    return y, total


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_offset)``."""
    return _norm(
        x, None, weight, None, eps, weight_offset, weight_in_compute, out_dtype, centre=False
    )[0]


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias``."""
    return _norm(
        x, None, weight, bias, eps, weight_offset, weight_in_compute, out_dtype, centre=True
    )[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual), x + residual)``."""
    y, total = _norm(
        x, residual, weight, None, eps, weight_offset, weight_in_compute, out_dtype, centre=False
    )
    assert total is not None
    return y, total


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(x + residual), x + residual)``."""
    y, total = _norm(
        x, residual, weight, bias, eps, weight_offset, weight_in_compute, out_dtype, centre=True
    )
    assert total is not None
    return y, total


def _reason(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_in_compute: bool,
    compute_fp32: bool,
    out_dtype: torch.dtype | None,
    centre: bool,
) -> str | None:
    reason = device_reason(x=x, residual=residual, weight=weight, bias=bias) or dtype_reason(
        x=x, residual=residual, weight=weight, bias=bias
    )
    if reason:
        return reason
    if x.dim() == 0 or not isinstance(x.shape[-1], int) or x.shape[-1] == 0:
        return "the last dimension is not a fixed size"
    if not compute_fp32 and x.dtype != torch.float32:
        return f"it computes in {name_of(x.dtype)}"
    if residual is not None:
        if residual.dtype != x.dtype:
            return f"x is {name_of(x.dtype)}, the residual {name_of(residual.dtype)}"
        reason = size_reason(x=x, residual=residual)
        if reason:
            return reason
        if residual.shape[-1] != x.shape[-1]:
            return f"x has {x.shape[-1]} features, the residual {residual.shape[-1]}"
    if out_dtype is not None and out_dtype not in FLOATS:
        return f"out_dtype is {name_of(out_dtype)}"
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.dim() != 1 or vector.shape[0] != x.shape[-1] or vector.stride(0) != 1:
            return f"{name} is {list(vector.shape)}, not [{x.shape[-1]}]"
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return f"weight is {name_of(weight.dtype)}, bias {name_of(bias.dtype)}"
    source = _source(x, weight, bias, weight_in_compute, out_dtype, centre, residual is not None)
    return emit.why_not_built(source)


def supports_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _reason(x, None, weight, None, weight_in_compute, compute_fp32, out_dtype, False)


def supports_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _reason(x, None, weight, bias, weight_in_compute, compute_fp32, out_dtype, True)


def supports_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _reason(x, residual, weight, None, weight_in_compute, compute_fp32, out_dtype, False)


def supports_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _reason(x, residual, weight, bias, weight_in_compute, compute_fp32, out_dtype, True)
