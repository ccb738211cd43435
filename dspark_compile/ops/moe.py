"""Mixtures of experts: the router, and the experts that it chose.

    moe_router    logits = x W^T;  k experts a token, with their weights
    moe_experts   y = sum over the k of weight * expert(x)
    grouped_linear  rows sorted by expert, each times its expert's matrix

Shared experts are no part of these: they are an ordinary gated MLP and an addition.

``moe_experts`` takes its weights as lists: one stacked tensor ``[E, rows, columns]`` (any strides:
a transposed or interleaved parameter is passed as a view of it) or one matrix for each expert. An
index outside of ``[0, E)`` adds nothing, so that a rank of an expert-parallel group may hold a
slice of the experts and give the others' indices as ``E`` or as negative numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define
from .formula import evaluate, is_formula
from .mlp import _activation

SCORINGS = ("identity", "softmax", "sigmoid", "sqrt_softplus", "sparsemixer")
NORMALISATIONS = ("none", "sum", "softmax")
GROUP_SCORES = ("max", "top2")
# What `limits` holds: the activation's slope, the gate's bounds, up's bounds, what is added to up.
PLAIN_LIMITS = (1.0, -math.inf, math.inf, -math.inf, math.inf, 0.0)


def _scores(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits.softmax(-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    if scoring == "sqrt_softplus":
        return F.softplus(logits).sqrt()
    if scoring == "identity":
        return logits
    raise ValueError(f"scoring {scoring!r} is not one of {list(SCORINGS)}")


def _grouped(choice: Tensor, groups: int, top_groups: int, how: str, fill: float) -> Tensor:
    """``choice`` with the experts outside of the best ``top_groups`` groups set to ``fill``."""
    if how not in GROUP_SCORES:
        raise ValueError(f"group_score {how!r} is not one of {list(GROUP_SCORES)}")
    parts = choice.unflatten(-1, (groups, -1))
    best = parts.amax(-1) if how == "max" else parts.topk(2, -1).values.sum(-1)
    chosen = best.topk(top_groups, -1, sorted=False).indices
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, chosen, True)
    return parts.masked_fill(~kept.unsqueeze(-1), fill).flatten(-2)


def _sparsemixer(logits: Tensor, top_k: int, eps: float) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 at inference (PhiMoE): each choice's weight is its softmax over the logits
    that are within ``2 eps`` of the best one left, relative to their size."""
    weights, indices, left = [], [], logits
    for _ in range(top_k):
        best, index = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * eps
        weights.append(left.masked_fill(far, -math.inf).softmax(-1).gather(-1, index))
        indices.append(index)
        left = left.scatter(-1, index, -math.inf)
    return torch.cat(weights, -1), torch.cat(indices, -1)


def route(
    logits: Tensor,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: str,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    group_fill: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(weights, indices)``, both ``[..., k]``, from logits ``[..., E]``, in the logits' dtype.

    scores = scoring(logits); the k largest of scores + correction are chosen, in the best
    ``top_groups`` of ``groups`` equal groups if there are several (DeepSeek-V2, V3); the weights
    are the scores of those, without the correction, divided by their sum + eps (``normalise``
    "sum") or through a softmax over the k ("softmax"), times ``scale``.
    """
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise {normalise!r} is not one of {list(NORMALISATIONS)}")
    if scoring == "sparsemixer":
        weights, indices = _sparsemixer(logits, top_k, eps)
    else:
        scores = _scores(logits, scoring)
        choice = scores if correction is None else scores + correction.to(scores.dtype)
        if groups > 1:
            choice = _grouped(choice, groups, top_groups, group_score, group_fill)
        indices = choice.topk(top_k, -1).indices
        weights = scores.gather(-1, indices)
    if normalise == "sum":
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    elif normalise == "softmax":
        weights = weights.softmax(-1)
    return weights * scale, indices


def _router_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: str,
    logits_dtype: torch.dtype,
    weights_dtype: torch.dtype,
    *args: object,
) -> tuple[Tensor, Tensor, Tensor]:
    lead = x.shape[:-1]
    return (
        x.new_empty((*lead, weight.shape[0]), dtype=logits_dtype),
        x.new_empty((*lead, top_k), dtype=weights_dtype),
        x.new_empty((*lead, top_k), dtype=torch.int64),
    )


@define(
    "moe_router(Tensor x, Tensor weight, Tensor? bias, Tensor? correction, int top_k, "
    "str scoring, str normalise, ScalarType logits_dtype, ScalarType weights_dtype, "
    "float scale=1.0, float eps=0.0, int groups=1, int top_groups=1, str group_score='max', "
    "float group_fill=0.0) -> (Tensor, Tensor, Tensor)",
    family="moe",
    fake=_router_fake,
)
def moe_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: str,
    logits_dtype: torch.dtype,
    weights_dtype: torch.dtype,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    group_fill: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(logits [..., E], weights [..., k], indices [..., k])``; see `route`.

    ``x [..., K]`` and ``weight [E, K]`` are multiplied in ``logits_dtype``; all that follows is
    float32 (or wider), rounded once to ``weights_dtype``. Indices are int64.
    """
    bias = None if bias is None else bias.to(logits_dtype)
    logits = F.linear(x.to(logits_dtype), weight.to(logits_dtype), bias).contiguous()
    wide = logits.to(torch.promote_types(logits_dtype, torch.float32))
    weights, indices = route(
        wide, correction, top_k, scoring, normalise, scale, eps,
        groups, top_groups, group_score, group_fill,
    )  # fmt: skip
    return logits, weights.to(weights_dtype).contiguous(), indices.contiguous()


def gate_and_up(
    gate: Tensor | None, up: Tensor, activation: str, limits: Sequence[float]
) -> Tensor:
    """``act(clamp(gate)) * (clamp(up) + offset)``, or ``act(clamp(up))`` without a gate.

    An activation that is a formula (`ops.formula`) is all of it. ``limits`` is empty or
    `PLAIN_LIMITS`'s six numbers. With a slope a, act(x) is act(a x) / a,
    which for silu is ``x sigmoid(a x)``, gpt-oss's.
    """
    if is_formula(activation):
        return evaluate(activation, up, None) if gate is None else evaluate(activation, gate, up)
    slope, gate_low, gate_high, up_low, up_high, offset = limits or PLAIN_LIMITS
    act = _activation(activation)

    def activated(x: Tensor) -> Tensor:
        return act(x) if slope == 1.0 else act(x * slope) / slope

    def bounded(x: Tensor, low: float, high: float) -> Tensor:
        return x if (low, high) == (-math.inf, math.inf) else x.clamp(low, high)

    if gate is None:
        return activated(bounded(up, gate_low, gate_high))
    up = bounded(up, up_low, up_high)
    return activated(bounded(gate, gate_low, gate_high)) * (up + offset if offset else up)


def experts_of(weights: Sequence[Tensor]) -> int:
    """How many experts a list of weights holds."""
    return weights[0].shape[0] if len(weights) == 1 and weights[0].dim() == 3 else len(weights)


def one_weight(tensors: Sequence[Tensor], index: int) -> Tensor | None:
    """Expert ``index``'s matrix; None if the list is empty."""
    if not tensors:
        return None
    return tensors[0][index] if tensors[0].dim() == 3 else tensors[index]


def one_bias(tensors: Sequence[Tensor], index: int) -> Tensor | None:
    """Expert ``index``'s bias; None if the list is empty."""
    if not tensors:
        return None
    return tensors[0][index] if tensors[0].dim() == 2 else tensors[index]


def _experts_fake(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    *args: object,
    **kwargs: object,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], down[0].shape[-2]))


@define(
    "moe_experts(Tensor x, Tensor indices, Tensor weights, Tensor[] gate, Tensor[] up, "
    "Tensor[] down, Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation, "
    "float[] limits=[], bool weigh_input=False, Tensor? norm=None, float eps=0.0, str site='') "
    "-> Tensor",
    family="moe",
    fake=_experts_fake,
)
def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: list[Tensor],
    up_bias: list[Tensor],
    down_bias: list[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    site: str = "",
) -> Tensor:
    """``y[t] = sum_j weights[t, j] * expert_{indices[t, j]}(x[t])``.

    Args:
        x: ``[..., K]``.
        indices: ``[..., k]``, whole numbers; what is outside of ``[0, E)`` adds nothing.
        weights: ``[..., k]``, any floating dtype.
        gate, up, down: ``[I, K]``, ``[I, K]``, ``[N, I]`` for each expert, stacked or as a list;
            ``gate`` is empty where there is none.
        gate_bias, up_bias, down_bias: ``[I]``, ``[I]``, ``[N]`` for each expert, or empty.
        activation: one of `ops.mlp.ACTIVATIONS`, or a formula (`ops.formula`).
        limits: see `gate_and_up`.
        weigh_input: the weight multiplies the expert's input, not its output (Llama 4).
        norm, eps: the weight ``[N]`` of an RMS norm of each expert's output; 1 is added to none.
        site: names the layer in load statistics.

    Returns:
        ``[..., N]`` in x's dtype. The sum over k is float32 (or wider).
    """
    rows = x.reshape(-1, x.shape[-1])
    k = indices.shape[-1]
    chosen, share = indices.reshape(-1), weights.reshape(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros((rows.shape[0], down[0].shape[-2]), dtype=wide, device=x.device)
    count = experts_of(down)
    order = chosen.argsort(stable=True)
    experts, counts = chosen[order].unique_consecutive(return_counts=True)
    end = 0
    for expert, size in zip(experts.tolist(), counts.tolist(), strict=True):
        start, end = end, end + size
        if not 0 <= expert < count:
            continue
        pairs = order[start:end]
        tokens = pairs // k
        h, w = rows[tokens], share[pairs].unsqueeze(-1)
        if weigh_input:
            h = h * w.to(h.dtype)
        other = None
        if gate:
            other = F.linear(h, one_weight(gate, expert), one_bias(gate_bias, expert))  # type: ignore[arg-type]
        h = F.linear(h, one_weight(up, expert), one_bias(up_bias, expert))  # type: ignore[arg-type]
        h = gate_and_up(other, h, activation, limits).to(x.dtype)
        h = F.linear(h, one_weight(down, expert), one_bias(down_bias, expert))  # type: ignore[arg-type]
        if norm is not None:
            square = h.to(wide).square().mean(-1, keepdim=True)
            h = (h.to(wide) * torch.rsqrt(square + eps)).to(h.dtype) * norm
        total.index_add_(0, tokens, h.to(wide) if weigh_input else h.to(wide) * w.to(wide))
    return total.to(x.dtype).reshape(*x.shape[:-1], total.shape[-1])


def _grouped_fake(rows: Tensor, ends: Tensor, weight: list[Tensor], bias: list[Tensor]) -> Tensor:
    return rows.new_empty((rows.shape[0], weight[0].shape[-2]))


@define(
    "grouped_linear(Tensor rows, Tensor ends, Tensor[] weight, Tensor[] bias) -> Tensor",
    family="moe",
    fake=_grouped_fake,
)
def grouped_linear(rows: Tensor, ends: Tensor, weight: list[Tensor], bias: list[Tensor]) -> Tensor:
    """``y[s] = W_e rows[s] + b_e`` for the expert e with ``ends[e - 1] <= s < ends[e]``.

    Args:
        rows: ``[S, K]``, those of one expert beside one another.
        ends: ``[E]``, whole numbers that do not fall: behind each expert's last row; the last
            is S.
        weight, bias: ``[N, K]`` and ``[N]`` for each expert, stacked or as a list; ``bias`` may
            be empty.

    Returns:
        ``[S, N]`` in the dtype of ``rows``.
    """
    out = rows.new_empty((rows.shape[0], weight[0].shape[-2]))
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            matrix, offset = one_weight(weight, expert), one_bias(bias, expert)
            out[start:end] = F.linear(rows[start:end], matrix, offset)  # type: ignore[arg-type]
        start = end
    return out
