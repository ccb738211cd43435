"""Attention over exact and int8 key/value tensors, and latent (MLA) attention.

For query ``[B, Hq, M, D]``, key ``[B, Hkv, N, D]``, value ``[B, Hkv, N, Dv]`` with
``Hq % Hkv == 0`` (query head h reads key head ``h // (Hq / Hkv)``):

    s = scale * q @ k^T
    s = softcap * tanh(s / softcap)                     when softcap > 0
    s = s + bias                                        a float bias
    s = s where allowed, else -inf                      allowed = predicate & a bool bias
    p = softmax over keys (and, where given, one sink logit per head that takes
        probability and gives no value), in float32
    out = p @ v, in the query's dtype

``mask`` is a predicate (see `predicate`); "" allows everything. With
``mask_value=None`` a row without any allowed key gives zeros, as
``scaled_dot_product_attention`` does; a finite ``mask_value`` is *added* to the score of
a forbidden key, as eager code with ``finfo.min`` does, so such a row averages.
The output ``[B, Hq, M, Dv]`` lies in memory as ``[B, M, Hq, Dv]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._define import define
from .cache import dequantize_kv
from .predicate import evaluate

_MASK = (
    "Tensor? bias, Tensor? sinks, Tensor[] mask_tensors, SymInt[] mask_ints, "
    '*, float scale, str mask="", float softcap=0.0, float? mask_value=None'
)


def _empty(query: Tensor, heads_dim: int) -> Tensor:
    b, h, m, _ = query.shape
    return query.new_empty((b, m, h, heads_dim)).transpose(1, 2)


def allowed_keys(
    bias: Tensor | None,
    mask: str,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor | None:
    """The bool tensor (broadcastable to ``shape``) of allowed keys, or None for all."""
    allowed = evaluate(mask, mask_tensors, mask_ints, shape, device) if mask else None
    if bias is not None and bias.dtype == torch.bool:
        allowed = bias if allowed is None else allowed & bias
    return allowed


@define(
    f"attention(Tensor query, Tensor key, Tensor value, {_MASK}) -> Tensor",
    family="attention",
    fake=lambda query, key, value, *args, **kwargs: _empty(query, value.shape[-1]),
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Tensor:
    """See the module's docstring. ``bias`` broadcasts to ``[B, Hq, M, N]``; sinks ``[Hq]``."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    group = heads // key.shape[1]
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(compute).unflatten(1, (key.shape[1], group))
    s = torch.matmul(q, key.to(compute).unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None and bias.dtype != torch.bool:
        s = s + bias.to(compute)
    allowed = allowed_keys(
        bias, mask, mask_tensors, mask_ints, (batch, heads, rows, keys), query.device
    )
    if allowed is not None:
        blocked = s + mask_value if mask_value is not None else torch.full_like(s, -math.inf)
        s = torch.where(allowed, s, blocked)
    sink = None if sinks is None else sinks.to(compute).view(1, -1, 1, 1)
    top = s.amax(-1, keepdim=True) if keys else s.new_full((*s.shape[:-1], 1), -math.inf)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    p = e / torch.where(total == 0, torch.ones_like(total), total)
    p = p.unflatten(1, (key.shape[1], group))
    out = torch.matmul(p, value.to(compute).unsqueeze(2)).flatten(1, 2).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@define(
    "attention_int8(Tensor query, Tensor key, Tensor key_scale, Tensor value, "
    f"Tensor value_scale, {_MASK}) -> Tensor",
    family="attention",
    fake=lambda query, key, key_scale, value, value_scale, *args, **kwargs: _empty(
        query, value.shape[-1]
    ),
)
def attention_int8(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Tensor:
    """`attention` over an int8 cache: key, value int8 ``[B, Hkv, N, D]``, one scale
    ``[B, Hkv, N]`` per token and head (a kernel folds K's into the logits, V's into p)."""
    return attention(
        query,
        dequantize_kv(key, key_scale, torch.float32),
        dequantize_kv(value, value_scale, torch.float32),
        bias,
        sinks,
        mask_tensors,
        mask_ints,
        scale=scale,
        mask=mask,
        softcap=softcap,
        mask_value=mask_value,
    )


@define(
    f"mla_attention(Tensor query, Tensor query_rope, Tensor latent, Tensor key_rope, {_MASK})"
    " -> Tensor",
    family="attention",
    fake=lambda query, query_rope, latent, key_rope, *args, **kwargs: _empty(
        query, latent.shape[-1]
    ),
)
def mla_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Tensor:
    """Multi-head latent attention with the key and value up-projections absorbed.

    query ``[B, H, M, R]`` is already multiplied by W_uk, query_rope ``[B, H, M, Dr]``,
    latent ``[B, N, R]``, key_rope ``[B, N, Dr]``; the result ``[B, H, M, R]`` is in latent
    space, to be multiplied by W_uv. Source: DeepSeek-V2, section 2.1 (arXiv 2405.04434).
    """
    return attention(
        torch.cat((query, query_rope), -1),
        torch.cat((latent, key_rope), -1).unsqueeze(1),
        latent.unsqueeze(1),
        bias,
        sinks,
        mask_tensors,
        mask_ints,
        scale=scale,
        mask=mask,
        softcap=softcap,
        mask_value=mask_value,
    )
