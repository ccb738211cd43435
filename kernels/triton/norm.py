"""RMSNorm and LayerNorm, alone or behind a residual addition.

    total = x + residual                                    add_ variants only
    y     = (total - mean) / sqrt(var + eps) * (weight + weight_offset) + bias

RMSNorm has no mean and no bias. One program owns BLOCK_M whole rows, kept in registers, so
each element is read once and written once. Reference: `dspark_compile.ops.norm`; the roundings
between its steps are repeated here, step by step.
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

MAX_FEATURES = 16384


@triton.jit(do_not_specialize=["n_rows"])
def norm_kernel(
    X_ptr,
    Residual_ptr,
    W_ptr,
    B_ptr,
    Y_ptr,
    Total_ptr,
    X_stride_0,
    X_stride_1,
    X_row_stride,
    Residual_stride_0,
    Residual_stride_1,
    Residual_row_stride,
    n_rows,
    size_1,
    size_2,
    eps,
    weight_offset,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    TOTAL: tl.constexpr,  # dtype of x + residual
    COMPUTE: tl.constexpr,  # dtype of the statistics
    NORMED: tl.constexpr,  # dtype before the weight
    WEIGHT: tl.constexpr,  # dtype of weight + offset
    SCALED: tl.constexpr,  # dtype after the weight
    BIAS: tl.constexpr,  # dtype of the bias as it is added
    SHIFTED: tl.constexpr,  # dtype after the bias
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outer = row // size_2
    i2 = (row % size_2).to(tl.int64)
    i1 = (outer % size_1).to(tl.int64)
    i0 = (outer // size_1).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    in_row = col < D
    mask = (row < n_rows)[:, None] & in_row

    X_ptr += (i0 * X_stride_0 + i1 * X_stride_1 + i2 * X_row_stride)[:, None] + col
    x = tl.load(X_ptr, mask=mask, other=0.0).to(tl.float32)
    out = row.to(tl.int64)[:, None] * D + col
    if ADD:
        Residual_ptr += (
            i0 * Residual_stride_0 + i1 * Residual_stride_1 + i2 * Residual_row_stride
        )[:, None] + col
        x += tl.load(Residual_ptr, mask=mask, other=0.0).to(tl.float32)
        tl.store(Total_ptr + out, x.to(TOTAL), mask=mask)
        x = round_to(x, TOTAL)

    if CENTRE:
        mean = round_to(tl.sum(x, axis=1) / D, COMPUTE)
        x = tl.where(in_row, round_to(x - mean[:, None], COMPUTE), 0.0)
    variance = round_to(tl.sum(round_to(x * x, COMPUTE), axis=1) / D, COMPUTE)
    scale = round_to(tl.rsqrt(round_to(variance + eps, COMPUTE)), COMPUTE)
    y = round_to(round_to(x * scale[:, None], COMPUTE), NORMED)

    if W_ptr is not None:
        w = round_to(tl.load(W_ptr + col, mask=in_row, other=0.0).to(tl.float32), WEIGHT)
        y = round_to(y * round_to(w + weight_offset, WEIGHT), SCALED)
    if B_ptr is not None:
        shift = tl.load(B_ptr + col, mask=in_row, other=0.0).to(tl.float32)
        y = round_to(y + round_to(shift, BIAS), SHIFTED)
    tl.store(Y_ptr + out, y.to(Y_ptr.dtype.element_ty), mask=mask)


def _vector_reason(name: str, vector: Tensor | None, x: Tensor) -> str | None:
    if vector is None:
        return None
    if vector.dim() != 1 or vector.shape[0] != x.shape[-1]:
        return f"{name} is {list(vector.shape)}, not [{x.shape[-1]}]"
    return None


def _reason(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> str | None:
    if x.dim() == 0 or not isinstance(x.shape[-1], int):
        return "the last dimension is not a fixed size"
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features, more than {MAX_FEATURES}"
    if out_dtype is not None and out_dtype not in TL_DTYPE:
        return f"out_dtype is {str(out_dtype).removeprefix('torch.')}"
    if residual is not None and residual.shape[-1:] != x.shape[-1:]:
        return f"x has {x.shape[-1]} features, the residual {list(residual.shape)[-1:]}"
    return (
        device_reason(x, residual, weight, bias)
        or dtype_reason(x=x, residual=residual, weight=weight, bias=bias)
        or _vector_reason("weight", weight, x)
        or _vector_reason("bias", bias, x)
    )


def plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    compute_fp32: bool,
    out_dtype: torch.dtype | None,
    *,
    centre: bool,
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch with its outputs, ``(launch, normed, total)``."""
    if residual is None:
        rows, (x,) = rows_of(x)
        strides, total_dtype, shape = (*rows.strides, (0, 0, 0)), x.dtype, x.shape
    else:
        total_dtype = torch.result_type(x, residual)
        rows, (x, residual) = rows_of(*torch.broadcast_tensors(x, residual))
        strides, shape = rows.strides, x.shape
    features = shape[-1]
    compute = torch.float32 if compute_fp32 else total_dtype
    normed = compute if weight_in_compute else total_dtype
    weight_dtype = normed if weight is None or weight_in_compute else weight.dtype
    scaled = torch.promote_types(normed, weight_dtype)
    bias_dtype = scaled if bias is None or weight_in_compute else bias.dtype
    shifted = torch.promote_types(scaled, bias_dtype)

    y = torch.empty(shape, dtype=out_dtype or total_dtype, device=x.device)
    total = None if residual is None else torch.empty(shape, dtype=total_dtype, device=x.device)
    block_d = next_power_of_2(features)
    block_m = max(1, min(8, 2048 // block_d))
    if rows.count < 64:
        block_m = 1
    launch = Launch(
        norm_kernel,
        (triton.cdiv(rows.count, block_m),),
        {
            "X_ptr": x,
            "Residual_ptr": residual,
            "W_ptr": None if weight is None else weight.contiguous(),
            "B_ptr": None if bias is None else bias.contiguous(),
            "Y_ptr": y,
            "Total_ptr": total,
            "X_stride_0": strides[0][0],
            "X_stride_1": strides[0][1],
            "X_row_stride": strides[0][2],
            "Residual_stride_0": strides[1][0],
            "Residual_stride_1": strides[1][1],
            "Residual_row_stride": strides[1][2],
            "n_rows": rows.count,
            "size_1": rows.sizes[1],
            "size_2": rows.sizes[2],
            "eps": float(eps),
            "weight_offset": float(weight_offset),
        },
        {
            "D": features,
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
            "ADD": residual is not None,
            "CENTRE": centre,
            "TOTAL": TL_DTYPE[total_dtype],
            "COMPUTE": TL_DTYPE[compute],
            "NORMED": TL_DTYPE[normed],
            "WEIGHT": TL_DTYPE[weight_dtype],
            "SCALED": TL_DTYPE[scaled],
            "BIAS": TL_DTYPE[bias_dtype],
            "SHIFTED": TL_DTYPE[shifted],
        },
        num_warps=max(1, min(16, block_m * block_d // 512)),
        num_stages=1,
    )
    return launch, y, total


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
    launch, y, _ = plan(
        x, None, weight, None, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype,
        centre=False,
    )  # fmt: skip
    launch.run()
    return y


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
    launch, y, _ = plan(
        x, None, weight, bias, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype,
        centre=True,
    )  # fmt: skip
    launch.run()
    return y


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
    launch, y, total = plan(
        x, residual, weight, None, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype,
        centre=False,
    )  # fmt: skip
    assert total is not None
    launch.run()
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
    launch, y, total = plan(
        x, residual, weight, bias, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype,
        centre=True,
    )  # fmt: skip
    assert total is not None
    launch.run()
    return y, total


def supports_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> str | None:
    return _reason(x, None, weight, None, out_dtype)


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
    return _reason(x, None, weight, bias, out_dtype)


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
    return _reason(x, residual, weight, None, out_dtype)


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
    return _reason(x, residual, weight, bias, out_dtype)
