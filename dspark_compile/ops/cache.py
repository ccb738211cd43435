"""Key/value cache ops: appends (functional and in place), int8 quantisation, and the
fused qk-norm + RoPE + append.

Caches are ``[B, H, N, D]``, new entries ``[B, H, M, D]``, positions int ``[M]`` (row of
each new token, the same for every batch row). The int8 scheme is symmetric, one scale
per token and head: ``x ≈ int8 * scale``, ``scale = max|x| / 127`` rounded to the scale
tensor's dtype *before* quantising, so rounding the scale costs no accuracy.
A position outside ``[0, N)`` is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._define import define

SCALE_DTYPE = torch.bfloat16


@define(
    "cache_append(Tensor cache, Tensor new, Tensor positions) -> Tensor",
    family="cache",
    fake=lambda cache, new, positions: torch.empty_like(cache),
)
def cache_append(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """The cache with rows ``positions`` of dimension 2 replaced by ``new``."""
    return cache.index_copy(2, positions, new.to(cache.dtype))


@define(
    "cache_extend(Tensor past, Tensor new) -> Tensor",
    family="cache",
    fake=lambda past, new: torch.cat((past, new), 2),
)
def cache_extend(past: Tensor, new: Tensor) -> Tensor:
    """A growing cache: ``past`` followed by ``new`` along dimension 2."""
    return torch.cat((past, new), 2)


@define(
    "cache_append_(Tensor(a!) cache, Tensor new, Tensor positions) -> ()",
    family="cache",
    fake=lambda cache, new, positions: None,
)
def cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """`cache_append` in place."""
    cache.index_copy_(2, positions, new.to(cache.dtype))


@define(
    "quantize_kv(Tensor x, ScalarType scale_dtype) -> (Tensor, Tensor)",
    family="cache",
    fake=lambda x, scale_dtype: (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=scale_dtype, device=x.device),
    ),
)
def quantize_kv(x: Tensor, scale_dtype: torch.dtype = SCALE_DTYPE) -> tuple[Tensor, Tensor]:
    """``(int8 [..., D], scale [...])`` of ``x [..., D]``; an all-zero row has scale 0."""
    z = x.float()
    scale = (z.abs().amax(-1) / 127.0).to(scale_dtype)
    s = scale.float().unsqueeze(-1)
    inverse = torch.where(s > 0, 1.0 / s, torch.zeros_like(s))
    q = torch.round(z * inverse).clamp(-127, 127).to(torch.int8)
    return q.contiguous(), scale.contiguous()


@define(
    "dequantize_kv(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    family="cache",
    fake=lambda x, scale, dtype: torch.empty(x.shape, dtype=dtype, device=x.device),
)
def dequantize_kv(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x [..., D] int8`` times ``scale [...]``, in ``dtype``."""
    return (x.float() * scale.float().unsqueeze(-1)).to(dtype).contiguous()


@define(
    "cache_append_int8(Tensor cache, Tensor scale, Tensor new, Tensor positions)"
    " -> (Tensor, Tensor)",
    family="cache",
    fake=lambda cache, scale, new, positions: (torch.empty_like(cache), torch.empty_like(scale)),
)
def cache_append_int8(
    cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantise ``new`` and append: int8 cache ``[B, H, N, D]``, scale ``[B, H, N]``."""
    q, s = quantize_kv(new, scale.dtype)
    return cache.index_copy(2, positions, q), scale.index_copy(2, positions, s)


@define(
    "cache_append_int8_(Tensor(a!) cache, Tensor(b!) scale, Tensor new, Tensor positions) -> ()",
    family="cache",
    fake=lambda cache, scale, new, positions: None,
)
def cache_append_int8_(cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor) -> None:
    """`cache_append_int8` in place."""
    q, s = quantize_kv(new, scale.dtype)
    cache.index_copy_(2, positions, q)
    scale.index_copy_(2, positions, s)


_PREPARE = (
    "Tensor query, Tensor key, Tensor value, Tensor? query_weight, Tensor? key_weight, "
    "Tensor cos, Tensor sin, {caches}, Tensor positions, float eps, float weight_offset, "
    "bool weight_in_compute, bool norm, int rotary_dim, bool interleaved, bool compute_fp32"
)


def _prepared(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> tuple[Tensor, Tensor]:
    from .norm import rms_norm
    from .rope import rope

    if norm:
        query = rms_norm(query, query_weight, eps, weight_offset, weight_in_compute)
        key = rms_norm(key, key_weight, eps, weight_offset, weight_in_compute)
    return (
        rope(query, cos, sin, rotary_dim, interleaved, compute_fp32),
        rope(key, cos, sin, rotary_dim, interleaved, compute_fp32),
    )


@define(
    "qk_norm_rope_append("
    + _PREPARE.format(caches="Tensor key_cache, Tensor value_cache")
    + ") -> (Tensor, Tensor, Tensor)",
    family="cache",
    fake=lambda query, *rest: (query.new_empty(query.shape), *map(torch.empty_like, rest[6:8])),
)
def qk_norm_rope_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything between QKV and attention: optional RMS norm of q and k (``norm``), RoPE
    of both, append of k and v. query ``[B, Hq, M, D]``, key, value ``[B, Hkv, M, D]``.
    Returns (query, key cache, value cache)."""
    q, k = _prepared(
        query, key, query_weight, key_weight, cos, sin, eps, weight_offset,
        weight_in_compute, norm, rotary_dim, interleaved, compute_fp32,
    )  # fmt: skip
    return q, cache_append(key_cache, k, positions), cache_append(value_cache, value, positions)


@define(
    "qk_norm_rope_append_int8("
    + _PREPARE.format(
        caches="Tensor key_cache, Tensor key_scale, Tensor value_cache, Tensor value_scale"
    )
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    family="cache",
    fake=lambda query, *rest: (query.new_empty(query.shape), *map(torch.empty_like, rest[6:10])),
)
def qk_norm_rope_append_int8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`qk_norm_rope_append` over int8 caches."""
    q, k = _prepared(
        query, key, query_weight, key_weight, cos, sin, eps, weight_offset,
        weight_in_compute, norm, rotary_dim, interleaved, compute_fp32,
    )  # fmt: skip
    key_cache, key_scale = cache_append_int8(key_cache, key_scale, k, positions)
    value_cache, value_scale = cache_append_int8(value_cache, value_scale, value, positions)
    return q, key_cache, key_scale, value_cache, value_scale


@define(
    "qk_norm_rope_append_("
    + _PREPARE.format(caches="Tensor(a!) key_cache, Tensor(b!) value_cache")
    + ") -> Tensor",
    family="cache",
    fake=lambda query, *rest: query.new_empty(query.shape),
)
def qk_norm_rope_append_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> Tensor:
    """`qk_norm_rope_append` with the caches written in place; returns the query."""
    q, k = _prepared(
        query, key, query_weight, key_weight, cos, sin, eps, weight_offset,
        weight_in_compute, norm, rotary_dim, interleaved, compute_fp32,
    )  # fmt: skip
    cache_append_(key_cache, k, positions)
    cache_append_(value_cache, value, positions)
    return q


@define(
    "qk_norm_rope_append_int8_("
    + _PREPARE.format(
        caches="Tensor(a!) key_cache, Tensor(b!) key_scale, "
        "Tensor(c!) value_cache, Tensor(d!) value_scale"
    )
    + ") -> Tensor",
    family="cache",
    fake=lambda query, *rest: query.new_empty(query.shape),
)
def qk_norm_rope_append_int8_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor,
    value_cache: Tensor,
    value_scale: Tensor,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
    compute_fp32: bool,
) -> Tensor:
    """`qk_norm_rope_append_int8` with the caches written in place; returns the query."""
    q, k = _prepared(
        query, key, query_weight, key_weight, cos, sin, eps, weight_offset,
        weight_in_compute, norm, rotary_dim, interleaved, compute_fp32,
    )  # fmt: skip
    cache_append_int8_(key_cache, key_scale, k, positions)
    cache_append_int8_(value_cache, value_scale, value, positions)
    return q
