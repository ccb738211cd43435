"""Launchers of the experts' kernels (`moe_kernel`).

Few tokens take the form without sorting; more are sorted by expert and cut into blocks of rows of
one expert, on the device and without a look at the counts from the host. The cost model decides at
every call which of the two it is (`moe_forms`); nothing is compiled again for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
from dspark_compile.kernels.triton.moe_forms import FEW, MAX_PAIRS, prefers_sorting
from dspark_compile.kernels.triton.moe_kernel import down_kernel, down_sorted_kernel, up_kernel
from dspark_compile.ops.formula import is_formula
from dspark_compile.ops.mlp import ACTIVATIONS
from dspark_compile.ops.moe import PLAIN_LIMITS


@dataclass(frozen=True)
class Blocks:
    """Rows of one expert each: the choices sorted by expert, and each block's expert and rows.

    ``experts`` [B] holds the number of experts where a block is empty; ``start``, ``end`` [B] are
    places in ``order`` [choices].
    """

    order: Tensor
    experts: Tensor
    start: Tensor
    end: Tensor


def blocks_of(indices: Tensor, experts: int, rows: int) -> Blocks:
    """Cut the choices ``indices`` (flat) into blocks of ``rows``; no size depends on data."""
    choices = indices.numel()
    flat = torch.where((indices >= 0) & (indices < experts), indices, experts).long()
    ordered, order = torch.sort(flat, stable=True)
    edges = torch.arange(experts + 1, device=flat.device)
    first = torch.searchsorted(ordered, edges)  # where each expert's choices begin
    counts = first[1:] - first[:-1]
    ends = ((counts + rows - 1) // rows).cumsum(0)  # blocks up to and with an expert
    block = torch.arange(cdiv(choices, rows) + min(experts, choices), device=flat.device)
    expert = torch.searchsorted(ends, block, right=True)
    known = expert.clamp(max=experts - 1)
    before = torch.where(known > 0, ends[(known - 1).clamp(min=0)], 0)
    start = first[known] + (block - before) * rows
    end = torch.minimum(start + rows, first[known + 1])
    empty = expert >= experts
    return Blocks(order, expert, start.masked_fill(empty, 0), end.masked_fill(empty, 0))


def _tiles(tokens: int, dtype: torch.dtype, target: Target) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)."""
    wide = dtype == torch.float32  # whose products take registers, not matrix units
    stages = 2 if wide or target.backend == "hip" else 3
    if tokens == 1:
        return 1, 16, 128 if wide else 256, 4, 1
    if tokens <= FEW:
        return 16, 32, 32 if wide else 128, 4, stages
    return (32, 32, 32, 4, stages) if wide else (64, 64, 64, 4, stages)


def plan(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor],
    down: Sequence[Tensor], gate_bias: Sequence[Tensor], up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor], activation: str, limits: Sequence[float] = (),
    weigh_input: bool = False, *, blocks: Blocks | None = None, target: Target | None = None,
) -> tuple[list[Launch], Tensor]:  # fmt: skip
    """The launches for ``x [T, K]`` with contiguous ``[T, k]`` indices and weights, and their
    result: ``[T, N]``, or with ``blocks`` float32 ``[T * k, N]``, to be summed over k."""
    target = target or target_of(x)
    tokens, k = indices.shape
    pairs = tokens * k
    experts, inner, features = up[0].shape
    outputs = down[0].shape[1]
    block_m, block_n, block_k, warps, stages = _tiles(tokens, x.dtype, target)
    hidden = x.new_empty((pairs, inner))
    slope, low, high, up_low, up_high, offset = limits or PLAIN_LIMITS
    finite = lambda v: None if math.isinf(v) else float(v)  # noqa: E731
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    few = {} if blocks else {"KP": next_power_of_2(k), "PAIRS": next_power_of_2(pairs)}
    table = {
        "Order_ptr": blocks and blocks.order, "Expert_ptr": blocks and blocks.experts,
        "Start_ptr": blocks and blocks.start, "End_ptr": blocks and blocks.end,
    }  # fmt: skip
    count = blocks.experts.shape[0] if blocks else pairs
    strides = up_bias[0].stride() if up_bias else (0, 0)
    first = Launch(
        up_kernel,
        (count, cdiv(inner, block_n)),
        {
            "X_ptr": x, "Index_ptr": indices, "Weight_ptr": weights, **table, "Hidden_ptr": hidden,
            "Gate_ptr": gate[0] if gate else None, "Up_ptr": up[0],
            "GateBias_ptr": gate_bias[0] if gate_bias else None,
            "UpBias_ptr": up_bias[0] if up_bias else None, "x_row_stride": x.stride(0),
            "w_e_stride": up[0].stride(0), "w_n_stride": up[0].stride(1),
            "w_k_stride": up[0].stride(2), "bias_e_stride": strides[0],
            "bias_n_stride": strides[1], "tokens": tokens, "k": k, "experts": experts,
            "inner": inner, "features": features,
        },
        {
            "ACTIVATION": activation, "SLOPE": float(slope), "GATE_LOW": finite(low),
            "GATE_HIGH": finite(high), "UP_LOW": finite(up_low), "UP_HIGH": finite(up_high),
            "OFFSET": float(offset), "GATED": bool(gate), "BIAS": bool(up_bias),
            "WEIGH_INPUT": weigh_input, "SORTED": blocks is not None,
            "KP": few.get("KP", 1), "PAIRS": few.get("PAIRS", 1), **tiles,
        },
        warps, stages,
    )  # fmt: skip
    out = x.new_empty((tokens, outputs))
    if blocks:
        # Rows of other ranks' experts stay 0.
        out = x.new_zeros((pairs, outputs), dtype=torch.float32)
    bias = down_bias[0] if down_bias else None
    strides = down_bias[0].stride() if down_bias else (0, 0)
    common = {
        "Down_ptr": down[0], "Bias_ptr": bias, "w_e_stride": down[0].stride(0),
        "w_n_stride": down[0].stride(1), "w_k_stride": down[0].stride(2),
        "bias_e_stride": strides[0], "bias_n_stride": strides[1],
    }  # fmt: skip
    sizes = {"experts": experts, "inner": inner, "outputs": outputs}
    flags = {"BIAS": bool(down_bias), "WEIGH_INPUT": weigh_input}
    if blocks:
        second = Launch(
            down_sorted_kernel,
            (count, cdiv(outputs, block_n)),
            {"Hidden_ptr": hidden, **table, "Weight_ptr": weights, "Part_ptr": out, **common,
             **sizes},
            {**flags, **tiles}, warps, stages,
        )  # fmt: skip
    else:
        second = Launch(
            down_kernel,
            (cdiv(outputs, block_n),),
            {"Hidden_ptr": hidden, "Index_ptr": indices, "Weight_ptr": weights, "Y_ptr": out,
             **common, "tokens": tokens, "k": k, **sizes},
            {**flags, **few, **tiles}, warps, stages,
        )  # fmt: skip
    return [first, second], out


def moe_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor],
    down: Sequence[Tensor], gate_bias: Sequence[Tensor], up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor], activation: str, limits: Sequence[float] = (),
    weigh_input: bool = False, norm: Tensor | None = None, eps: float = 0.0, site: str = "",
) -> Tensor:  # fmt: skip
    """``sum of weight * expert(x)``; see `ops.moe.moe_experts`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    k = indices.shape[-1]
    chosen, share = indices.reshape(-1, k).contiguous(), weights.reshape(-1, k).contiguous()
    lead, outputs = x.shape[:-1], down[0].shape[-2]
    if rows.shape[0] == 0 or k == 0:
        return x.new_zeros((*lead, outputs))
    blocks = None
    experts, inner, features = up[0].shape
    matrices, itemsize, target = 2 if gate else 1, x.element_size(), target_of(x)
    if prefers_sorting(
        rows.shape[0], k, experts, inner, features, outputs, matrices, itemsize, target
    ):
        blocks = blocks_of(chosen.reshape(-1), experts, _tiles(FEW + 1, x.dtype, target)[0])
    args = (gate, up, down, gate_bias, up_bias, down_bias, activation, limits, weigh_input)
    launches, out = plan(rows, chosen, share, *args, blocks=blocks)
    for launch in launches:
        launch.run()
    if blocks is not None:
        out = out.view(rows.shape[0], k, outputs).sum(1).to(x.dtype)
    return out.reshape(*lead, outputs)


def supports_moe_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor],
    down: Sequence[Tensor], gate_bias: Sequence[Tensor], up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor], activation: str, limits: Sequence[float] = (),
    weigh_input: bool = False, norm: Tensor | None = None, eps: float = 0.0, site: str = "",
) -> str | None:  # fmt: skip
    stacks = [*gate, *up, *down, *gate_bias, *up_bias, *down_bias]
    reason = device_reason(x, indices, weights, *stacks)
    reason = reason or dtype_reason(x=x, weights=weights)
    if reason:
        return reason
    if any(t.dtype != x.dtype for t in stacks):
        return f"x is {str(x.dtype).removeprefix('torch.')}, weights are not"
    if is_formula(activation):
        return "what stands between the experts' products is a formula, no named activation"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is unknown"
    if norm is not None:
        return "a norm stands behind the experts"
    if any(t.dim() != 3 for t in (*gate, *up, *down)):
        return "the experts' weights are separate tensors"
    if gate and gate[0].stride() != up[0].stride():
        return "gate and up lie differently"
    if gate_bias and up_bias and gate_bias[0].stride() != up_bias[0].stride():
        return "the biases of gate and up lie differently"
    if bool(gate_bias) != (bool(up_bias) and bool(gate)):
        return "only one of gate and up has a bias"
    if indices.shape[-1] > MAX_PAIRS // FEW:
        return f"{indices.shape[-1]} experts a token, more than {MAX_PAIRS // FEW}"
    return None
