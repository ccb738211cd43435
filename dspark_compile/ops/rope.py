"""Rotary position embedding, half-split or interleaved, whole or partial.

With ``R = rotary_dim`` the first ``R`` features of ``x [..., D]`` are rotated, the rest
pass through. ``cos`` and ``sin`` broadcast against ``x[..., :R]`` and have ``R`` features,
or ``R/2`` that serve both members of each pair. A scaling (YaRN's, LongRoPE's) lives
inside cos and sin.

    half-split:   pairs (i, i + R/2),   out = x * cos + cat(-x2, x1) * sin
    interleaved:  pairs (2i, 2i + 1),   out = x * cos + interleave(-x_odd, x_even) * sin
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._define import define


def rotate_half(x: Tensor) -> Tensor:
    """``cat(-x2, x1)`` over the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_pairs(x: Tensor) -> Tensor:
    """``(-x1, x0, -x3, x2, …)`` over the last dimension."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _fake(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    # cos may carry batch or sequence dimensions that x broadcasts over.
    lead = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
    return x.new_empty((*lead, x.shape[-1]), dtype=out_dtype or x.dtype)


@define(
    "rope(Tensor x, Tensor cos, Tensor sin, int rotary_dim, bool interleaved=False, "
    "bool compute_fp32=False, ScalarType? out_dtype=None) -> Tensor",
    family="rope",
    fake=_fake,
)
def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    interleaved: bool = False,
    compute_fp32: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the first ``rotary_dim`` features of ``x``; computed in promote(x, cos)
    or, with ``compute_fp32``, in float32; the result has ``out_dtype`` (x's by default)."""
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if compute_fp32:
        rotated, cos, sin = rotated.float(), cos.float(), sin.float()
    if cos.shape[-1] != rotary_dim:
        if interleaved:
            cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    turn = rotate_pairs if interleaved else rotate_half
    out = (rotated * cos + turn(rotated) * sin).to(out_dtype or x.dtype)
    if rest.shape[-1]:
        rest = rest.to(out.dtype).expand(*out.shape[:-1], rest.shape[-1])
        out = torch.cat((out, rest), dim=-1)
    return out.contiguous()
