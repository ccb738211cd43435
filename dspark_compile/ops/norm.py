"""Normalisation ops: RMSNorm and LayerNorm, alone or behind a residual addition.

    rms_norm(x)   = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

over the last dimension. Two spellings differ in low precision and both are kept:
``weight_in_compute=False`` casts to ``x.dtype`` *before* the weight (Llama), ``True``
multiplies in the compute dtype and casts last (Gemma, ATen). ``compute_fp32=False``
computes in ``x.dtype`` throughout. ``out_dtype=None`` means ``x.dtype``.
``weight`` and ``bias`` broadcast against ``x`` (``[D]``, or ``[H, D]`` per head).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._define import define

_TAIL = (
    "float eps, float weight_offset=0.0, bool weight_in_compute=False, "
    "bool compute_fp32=True, ScalarType? out_dtype=None"
)


def _out_dtype(rest: tuple[Any, ...], named: dict[str, Any], index: int) -> torch.dtype | None:
    """The ``out_dtype`` of a call: the last, ``index``-th of what follows the tensors."""
    return rest[index] if len(rest) > index else named.get("out_dtype")


def _like(x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=torch.contiguous_format)


def _scale(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    weight_in_compute: bool,
    out_dtype: torch.dtype | None,
) -> Tensor:
    if not weight_in_compute:
        y = y.to(x.dtype)
    if weight is not None:
        w = weight.to(y.dtype) if weight_in_compute else weight
        y = y * (w + weight_offset if weight_offset else w)
    if bias is not None:
        y = y + (bias.to(y.dtype) if weight_in_compute else bias)
    return y.to(out_dtype or x.dtype).contiguous()


@define(
    f"rms_norm(Tensor x, Tensor? weight, {_TAIL}) -> Tensor",
    family="norm",
    fake=lambda x, *rest, **named: _like(x, _out_dtype(rest, named, 5)),
)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_compute: bool = False,
    compute_fp32: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square norm over the last dimension of ``x [..., D]``."""
    z = x.float() if compute_fp32 and x.dtype != torch.float64 else x
    y = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)
    return _scale(y, x, weight, None, weight_offset, weight_in_compute, out_dtype)


@define(
    f"layer_norm(Tensor x, Tensor? weight, Tensor? bias, {_TAIL}) -> Tensor",
    family="norm",
    fake=lambda x, *rest, **named: _like(x, _out_dtype(rest, named, 6)),
)
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
    """Layer norm over the last dimension of ``x [..., D]``."""
    z = x.float() if compute_fp32 and x.dtype != torch.float64 else x
    centred = z - z.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return _scale(y, x, weight, bias, weight_offset, weight_in_compute, out_dtype)


def _pair_like(x: Tensor, residual: Tensor, out_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(x, residual)
    shape = torch.broadcast_shapes(x.shape, residual.shape)
    total = x.new_empty(shape, dtype=dtype)
    return _like(total, out_dtype), total


@define(
    f"add_rms_norm(Tensor x, Tensor residual, Tensor? weight, {_TAIL}) -> (Tensor, Tensor)",
    family="norm",
    fake=lambda x, residual, *rest, **named: _pair_like(x, residual, _out_dtype(rest, named, 5)),
)
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
    """``(rms_norm(x + residual), x + residual)``: the sum is the next residual."""
    total = (x + residual).contiguous()
    normed = rms_norm(total, weight, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype)
    return normed, total.clone() if normed is total else total


@define(
    f"add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_TAIL})"
    " -> (Tensor, Tensor)",
    family="norm",
    fake=lambda x, residual, *rest, **named: _pair_like(x, residual, _out_dtype(rest, named, 6)),
)
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
    total = (x + residual).contiguous()
    normed = layer_norm(
        total, weight, bias, eps, weight_offset, weight_in_compute, compute_fp32, out_dtype
    )
    return normed, total
