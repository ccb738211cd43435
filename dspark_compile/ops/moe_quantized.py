"""Experts whose weights are whole numbers of 8 or 4 bits, activations as they are.

Numbers, scales and zero points are as in `ops.quantized`, of every expert: each is one stacked
tensor or a list with one for each expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._define import define
from .moe import moe_experts, one_bias
from .quantized import _dequantized, unpack_int4


def stacked(tensors: Sequence[Tensor]) -> bool:
    """Whether numbers or scales are one tensor ``[E, N, ...]`` and not one for each expert."""
    return len(tensors) == 1 and tensors[0].dim() == 3


def of_expert(tensors: Sequence[Tensor], index: int) -> Tensor | None:
    """Expert ``index``'s numbers, scales or zero points; None if the list is empty."""
    if not tensors:
        return None
    return tensors[0][index] if stacked(tensors) else tensors[index]


def _fake(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_scale: list[Tensor],
    up_scale: list[Tensor],
    down_scale: list[Tensor],
    *args: object,
    **kwargs: object,
) -> Tensor:
    # A packed weight's rows are counted in blocks.
    return x.new_empty((*x.shape[:-1], down_scale[0].shape[1 if stacked(down_scale) else 0]))


_ARGUMENTS = (
    "(Tensor x, Tensor indices, Tensor weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "Tensor[] gate_scale, Tensor[] up_scale, Tensor[] down_scale, Tensor[] gate_zero, "
    "Tensor[] up_zero, Tensor[] down_zero, Tensor[] gate_bias, Tensor[] up_bias, "
    "Tensor[] down_bias, str activation, float[] limits=[], bool weigh_input=False, "
    "str site='') -> Tensor"
)


def _experts(
    bits: int,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    numbers: Sequence[list[Tensor]],
    scales: Sequence[list[Tensor]],
    zeros: Sequence[list[Tensor]],
    biases: Sequence[list[Tensor]],
    activation: str,
    limits: Sequence[float],
    weigh_input: bool,
    site: str,
) -> Tensor:
    """`moe_experts` over the experts that are hit, dequantised."""
    count = numbers[2][0].shape[0] if stacked(numbers[2]) else len(numbers[2])
    valid = (indices >= 0) & (indices < count)
    chosen = indices[valid].unique()
    outputs = _fake(x, indices, weights, *numbers, *scales).shape
    if chosen.numel() == 0:
        return x.new_zeros(outputs)
    place = torch.full((count + 1,), -1, device=x.device)
    place[chosen.long()] = torch.arange(len(chosen), device=x.device)
    inner = scales[1][0].shape[1 if stacked(scales[1]) else 0]

    def dense(i: int) -> list[Tensor]:
        found = []
        for expert in chosen.tolist() if numbers[i] else ():
            q, scale, zero = (of_expert(part[i], expert) for part in (numbers, scales, zeros))
            assert q is not None and scale is not None
            if bits == 4:
                q = unpack_int4(q, scale.shape[0], inner if i == 2 else x.shape[-1])
            found.append(_dequantized(q, scale, zero, x.dtype))
        return found

    def own(bias: list[Tensor]) -> list[Tensor]:
        return [one_bias(bias, e) for e in chosen.tolist()] if bias else []  # type: ignore[misc]

    return moe_experts(
        x, place[torch.where(valid, indices, count).long()], weights, dense(0), dense(1), dense(2),
        *(own(b) for b in biases), activation, limits, weigh_input, None, 0.0, site,
    )  # fmt: skip


@define(f"moe_experts_int8{_ARGUMENTS}", family="moe", fake=_fake)
def moe_experts_int8(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_scale: list[Tensor],
    up_scale: list[Tensor],
    down_scale: list[Tensor],
    gate_zero: list[Tensor],
    up_zero: list[Tensor],
    down_zero: list[Tensor],
    gate_bias: list[Tensor],
    up_bias: list[Tensor],
    down_bias: list[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    site: str = "",
) -> Tensor:
    """`ops.moe.moe_experts` over ``(q - zero) * scale``.

    Args:
        x, indices, weights, the biases and what follows: as for ``moe_experts``.
        gate, up, down: int8, ``[I, K]``, ``[I, K]``, ``[N, I]`` for each expert, or stacked in
            three dimensions; ``gate`` is empty where there is none.
        gate_scale, up_scale, down_scale: floating, ``[rows]`` or ``[rows, G]`` for each expert, or
            stacked ``[E, rows, G]``: one for each of G runs of a row.
        gate_zero, up_zero, down_zero: like the scales, or empty.

    Returns:
        ``[..., N]`` in x's dtype.
    """
    return _experts(
        8, x, indices, weights, (gate, up, down), (gate_scale, up_scale, down_scale),
        (gate_zero, up_zero, down_zero), (gate_bias, up_bias, down_bias), activation, limits,
        weigh_input, site,
    )  # fmt: skip


@define(f"moe_experts_int4{_ARGUMENTS}", family="moe", fake=_fake)
def moe_experts_int4(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_scale: list[Tensor],
    up_scale: list[Tensor],
    down_scale: list[Tensor],
    gate_zero: list[Tensor],
    up_zero: list[Tensor],
    down_zero: list[Tensor],
    gate_bias: list[Tensor],
    up_bias: list[Tensor],
    down_bias: list[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    site: str = "",
) -> Tensor:
    """`moe_experts_int8` for a list of weights packed by `ops.quantized.pack_int4`."""
    return _experts(
        4, x, indices, weights, (gate, up, down), (gate_scale, up_scale, down_scale),
        (gate_zero, up_zero, down_zero), (gate_bias, up_bias, down_bias), activation, limits,
        weigh_input, site,
    )  # fmt: skip
