"""Launcher of the router's kernel (`router_kernel`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_compile.kernels.triton._launch import (
    FLOATS,
    TL_DTYPE,
    Launch,
    Target,
    cdiv,
    device_reason,
    dtype_reason,
    next_power_of_2,
    target_of,
)
from dspark_compile.kernels.triton.router_kernel import router_kernel
from dspark_compile.ops.moe import GROUP_SCORES, NORMALISATIONS, SCORINGS

MAX_EXPERTS = 2048
MAX_TOP_K = 64
MAX_GROUPS = 32
CHOICE = 2048  # logits that a program holds while it chooses; half of that with groups


def _tiles(tokens: int, experts: int, wide: bool, target: Target) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages): few tokens are bound by reading the weight, so
    its rows go to as many programs as there are; many tokens by the products."""
    stages = 2 if wide or target.backend == "hip" else 3
    if tokens == 1:
        return 1, 4 if experts > 64 else 2, 256 if wide else 512, 4, 1
    if tokens <= 64:
        return 16, 16, 64 if wide else 128, 4, stages
    most = 32 if wide else 64
    return 32, min(most, max(16, next_power_of_2(experts))), most, 4, stages


def plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, top_k: int,
    scoring: str, normalise: str, logits_dtype: torch.dtype, weights_dtype: torch.dtype,
    scale: float = 1.0, eps: float = 0.0, groups: int = 1, top_groups: int = 1,
    group_score: str = "max", group_fill: float = 0.0, *, target: Target | None = None,
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The launch for ``x [T, K]``, and where its logits, weights and indices go."""
    target = target or target_of(x)
    tokens, features = x.shape
    experts = weight.shape[0]
    out = (
        x.new_empty((tokens, experts), dtype=logits_dtype),
        x.new_empty((tokens, top_k), dtype=weights_dtype),
        x.new_empty((tokens, top_k), dtype=torch.int64),
    )
    alike = x.dtype == weight.dtype and logits_dtype in (torch.float32, x.dtype)
    compute = None if alike else TL_DTYPE[logits_dtype]
    wide = (x.dtype if alike else logits_dtype) == torch.float32
    block_m, block_n, block_k, warps, stages = _tiles(tokens, experts, wide, target)
    grid = (cdiv(tokens, block_m), cdiv(experts, block_n))
    split = grid[1] > 1
    padded = max(next_power_of_2(experts), 2)
    held = CHOICE if groups == 1 else CHOICE // 2
    return Launch(
        router_kernel,
        grid,
        {
            "X_ptr": x, "W_ptr": weight, "Bias_ptr": bias, "Correction_ptr": correction,
            "Count_ptr": x.new_zeros((grid[0],), dtype=torch.int32) if split else None,
            "Logits_ptr": out[0], "Weights_ptr": out[1], "Index_ptr": out[2],
            "x_row_stride": x.stride(0), "w_row_stride": weight.stride(0), "tokens": tokens,
            "experts": experts, "features": features, "scale": float(scale), "eps": float(eps),
            "fill": float(group_fill),
        },
        {
            "COMPUTE": compute, "BIAS": bias is not None, "CORRECTED": correction is not None,
            "SPLIT": split, "TOP_K": top_k, "SCORING": scoring, "NORMALISE": normalise,
            "GROUPS": groups, "GROUP_SIZE": experts // groups, "TOP_GROUPS": top_groups,
            "TOP2": group_score == "top2", "ROWS": min(block_m, max(held // padded, 1)),
            "EP": padded, "KP": next_power_of_2(top_k), "BLOCK_M": block_m, "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        warps, stages,
    ), out  # fmt: skip


def moe_router(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, top_k: int,
    scoring: str, normalise: str, logits_dtype: torch.dtype, weights_dtype: torch.dtype,
    scale: float = 1.0, eps: float = 0.0, groups: int = 1, top_groups: int = 1,
    group_score: str = "max", group_fill: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(logits, weights, indices)``; see `ops.moe.moe_router`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    launch, out = plan(
        rows, weight, None if bias is None else bias.contiguous(),
        None if correction is None else correction.reshape(-1).contiguous(), top_k, scoring,
        normalise, logits_dtype, weights_dtype, scale, eps, groups, top_groups, group_score,
        group_fill,
    )  # fmt: skip
    launch.run()
    logits, weights, indices = (t.view(*x.shape[:-1], t.shape[-1]) for t in out)
    return logits, weights, indices


def supports_moe_router(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, top_k: int,
    scoring: str, normalise: str, logits_dtype: torch.dtype, weights_dtype: torch.dtype,
    scale: float = 1.0, eps: float = 0.0, groups: int = 1, top_groups: int = 1,
    group_score: str = "max", group_fill: float = 0.0,
) -> str | None:  # fmt: skip
    reason = device_reason(x, weight, bias, correction)
    reason = reason or dtype_reason(x=x, weight=weight, bias=bias, correction=correction)
    if reason:
        return reason
    for name, dtype in (("logits", logits_dtype), ("weights", weights_dtype)):
        if dtype not in FLOATS:
            return f"{name} are {str(dtype).removeprefix('torch.')}"
    for value, known in (
        (scoring, SCORINGS), (normalise, NORMALISATIONS), (group_score, GROUP_SCORES)
    ):  # fmt: skip
        if value not in known:
            return f"{value!r} is not one of {list(known)}"
    experts = weight.shape[0]
    if weight.dim() != 2 or experts > MAX_EXPERTS:
        return f"the router's weight is {list(weight.shape)}"
    if not 1 <= top_k <= min(experts, MAX_TOP_K):
        return f"{top_k} of {experts} experts a token"
    if correction is not None and correction.numel() != experts:
        return f"the correction is {list(correction.shape)}"
    if groups < 1 or groups > MAX_GROUPS or experts % groups or not 1 <= top_groups <= groups:
        return f"{top_groups} of {groups} groups of {experts} experts"
    if groups > 1 and group_score == "top2" and experts // groups < 2:
        return "groups of one expert have no second"
    if scoring == "sparsemixer" and (correction is not None or groups > 1):
        return "SparseMixer with a correction or groups"
    return None
