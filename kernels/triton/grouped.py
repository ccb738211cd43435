"""One matrix an expert over rows that are sorted by expert: ``y[s] = W_e x[s] + b_e``.

A program takes columns of the result and up to BLOCK_M rows of one expert. Which expert, and which
of its rows, it reads off the ends of all experts' rows, in one of two ways:

    BY_ROW      program p is for the block that begins with row p, if one does
    otherwise   expert e's blocks are programs start_e // BLOCK_M + e and on, which never meet the
                next expert's

So there is one launch, nothing is sorted, counted or summed up before it, and the host does not
look at the counts; the grid is the smaller of the two, and programs without a block leave at once.
Experts without rows are not read, others once for each block.

Weights have any strides: transposed ones are read where they lie. Sums are float32. Reference:
`dspark_compile.ops.moe.grouped_linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_compile.kernels.triton._launch import (
    Launch,
    Target,
    cdiv,
    device_reason,
    dtype_reason,
    next_power_of_2,
    target_of,
)
from dspark_compile.kernels.triton.moe_kernel import product

MAX_EXPERTS = 4096  # whose ends one program holds
FEW = 16  # rows an expert has on average, up to which a block is no larger


@triton.jit
def grouped_kernel(
    X_ptr, Ends_ptr, W_ptr, Bias_ptr, Y_ptr, x_row_stride, w_e_stride, w_n_stride, w_k_stride,
    bias_e_stride, bias_n_stride, rows, experts, outputs, features,
    BIAS: tl.constexpr, BY_ROW: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    number = tl.arange(0, EXPERTS)
    known = number < experts
    ends = tl.minimum(tl.load(Ends_ptr + number, mask=known, other=0), rows).to(tl.int32)
    if BY_ROW:
        before = known & (ends <= p)
        expert = tl.sum(before.to(tl.int32), axis=0)
        first = p
        begin = tl.max(tl.where(before, ends, 0), axis=0)
        mine = (expert < experts) & ((p - begin) % BLOCK_M == 0)
    else:
        starts = tl.load(Ends_ptr + number - 1, mask=known & (number > 0), other=0)
        starts = tl.minimum(starts, rows).to(tl.int32)
        block = p - starts // BLOCK_M - number
        has = known & (block >= 0) & (starts + block * BLOCK_M < ends)
        expert = tl.max(tl.where(has, number, 0), axis=0)
        first = tl.max(tl.where(has, starts + block * BLOCK_M, 0), axis=0)
        mine = tl.max(has.to(tl.int32), axis=0) > 0
    if mine:
        e = expert.to(tl.int64)
        last = tl.max(tl.where(number == expert, ends, 0), axis=0)
        row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        live = row < last
        y = product(
            X_ptr, x_row_stride, row, live, W_ptr + e * w_e_stride, w_n_stride, w_k_stride, n,
            outputs, features, live.to(tl.float32), False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if BIAS:
            b = Bias_ptr + e * bias_e_stride + n * bias_n_stride
            y += tl.load(b, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(
            Y_ptr + row[None, :] * outputs + n[:, None],
            y.to(Y_ptr.dtype.element_ty),
            mask=(n[:, None] < outputs) & live[None, :],
        )


def _tiles(
    rows: int, experts: int, dtype: torch.dtype, target: Target
) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    wide = dtype == torch.float32  # whose products take registers, not matrix units
    stages = 2 if wide or target.backend == "hip" else 3
    if rows == 1:
        return 1, 16, 128 if wide else 256, 4, 1
    if rows <= FEW * min(experts, rows):
        return 16, 32, 32 if wide else 128, 4, stages
    return (32, 32, 32, 4, stages) if wide else (64, 64, 64, 4, stages)


def plan(
    x: Tensor, ends: Tensor, weight: Tensor, bias: Tensor | None, *, target: Target | None = None
) -> tuple[Launch, Tensor]:
    """The launch for ``x [S, K]`` with contiguous rows, ``ends [E]``, ``weight [E, N, K]`` and
    ``bias [E, N]``, and its result ``[S, N]``."""
    target = target or target_of(x)
    rows, features = x.shape
    experts, outputs, _ = weight.shape
    block_m, block_n, block_k, warps, stages = _tiles(rows, experts, x.dtype, target)
    y = x.new_empty((rows, outputs))
    strides = bias.stride() if bias is not None else (0, 0)
    slots = rows // block_m + experts
    by_row = rows <= slots
    launch = Launch(
        grouped_kernel,
        (min(rows, slots), cdiv(outputs, block_n)),
        {
            "X_ptr": x, "Ends_ptr": ends, "W_ptr": weight, "Bias_ptr": bias, "Y_ptr": y,
            "x_row_stride": x.stride(0), "w_e_stride": weight.stride(0),
            "w_n_stride": weight.stride(1), "w_k_stride": weight.stride(2),
            "bias_e_stride": strides[0], "bias_n_stride": strides[1], "rows": rows,
            "experts": experts, "outputs": outputs, "features": features,
        },
        {
            "BIAS": bias is not None, "BY_ROW": by_row, "EXPERTS": next_power_of_2(experts),
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        },
        warps, stages,
    )  # fmt: skip
    return launch, y


def grouped_linear(
    rows: Tensor, ends: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> Tensor:
    """``y[s] = W_e rows[s] + b_e``; see `ops.moe.grouped_linear`."""
    flat = rows if rows.stride(-1) == 1 else rows.contiguous()
    launch, y = plan(flat, ends.contiguous(), weight[0], bias[0] if bias else None)
    launch.run()
    return y


def supports_grouped_linear(
    rows: Tensor, ends: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> str | None:
    reason = device_reason(rows, ends, *weight, *bias) or dtype_reason(rows=rows)
    if reason:
        return reason
    if any(t.dtype != rows.dtype for t in (*weight, *bias)):
        return f"rows are {str(rows.dtype).removeprefix('torch.')}, weights are not"
    if ends.dtype not in (torch.int64, torch.int32):
        return f"ends are {str(ends.dtype).removeprefix('torch.')}"
    if len(weight) != 1 or weight[0].dim() != 3 or any(t.dim() != 2 for t in bias):
        return "the experts' weights are separate tensors"
    if weight[0].shape[0] > MAX_EXPERTS:
        return f"{weight[0].shape[0]} experts, more than {MAX_EXPERTS}"
    if any(n == 0 for n in weight[0].shape):
        return "a weight is empty"
    return None
