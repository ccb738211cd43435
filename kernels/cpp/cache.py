"""Launchers of appends to caches, alone or behind norm and RoPE of query and key (``rope.h``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import Call, device_reason, dtype_reason, name_of, run
from dspark_compile.kernels.cpp.rope import MAX_FEATURES, angles_reason


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _positions(positions: Tensor) -> Tensor:
    return positions.to(torch.int64).contiguous()


def append_call(cache: Tensor, scale: Tensor | None, new: Tensor, positions: Tensor) -> Call:
    """Rows ``positions`` of the cache ``[B, H, N, D]`` become ``new [B, H, M, D]``."""
    batch, heads, rows, features = new.shape
    new, positions = _rows(new), _positions(positions)
    shape = [batch, 0, heads, rows, cache.shape[2], features, 0, *(0, 0, 0)]
    shape += [*_strides(cache), *_strides(scale), *_strides(new), *[0] * 13]
    return Call(
        emit.append(new.dtype, cache.dtype, None if scale is None else scale.dtype),
        (new, cache, scale, positions, shape),
        new.numel() * new.element_size(),
        (cache,) if scale is None else (cache, scale),
    )


def _append(cache: Tensor, scale: Tensor | None, new: Tensor, positions: Tensor) -> None:
    if new.numel():
        run(append_call(cache, scale, new, positions))


def cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """Rows ``positions`` of the cache become ``new``."""
    _append(cache, None, new, positions)


def cache_append_int8_(cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor) -> None:
    """Rows ``positions`` of the int8 cache become ``new``, quantised."""
    _append(cache, scale, new, positions)


def prepare_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    key_scale: Tensor | None,
    value_cache: Tensor,
    value_scale: Tensor | None,
    positions: Tensor,
    eps: float,
    weight_offset: float,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
) -> tuple[Call, Tensor]:
    """Norm and RoPE of query and key, append of key and value: the call and the query."""
    batch, heads, rows, features = query.shape
    out = query.new_empty(query.shape)
    query, key, value = _rows(query), _rows(key), _rows(value)
    angles = [_rows(a).expand(batch, 1, rows, a.shape[-1]) for a in (cos, sin)]
    positions = _positions(positions)
    shape = [
        *(batch, heads, key.shape[1], rows, key_cache.shape[2], features, value.shape[3]),
        *_strides(query),
        *(*_strides(key_cache), *_strides(key_scale), *_strides(key)),
        *(*_strides(value_cache), *_strides(value_scale), *_strides(value)),
        *(angles[0].stride(0), angles[0].stride(2), angles[1].stride(0), angles[1].stride(2)),
    ]
    spec = _spec(
        query, query_weight, key_weight, cos, key_cache, key_scale, norm, weight_in_compute
    )
    call = Call(
        emit.prepare(spec),
        (
            *(query, key, value, query_weight, key_weight, *angles, key_cache, key_scale),
            *(value_cache, value_scale, positions, out, shape),
            *(eps, weight_offset, rotary_dim, cos.shape[-1], int(interleaved)),
        ),
        query.numel() * query.element_size(),
        tuple(t for t in (out, key_cache, key_scale, value_cache, value_scale) if t is not None),
    )
    return call, out


def prepare_of(name: str, args: Sequence[Any]) -> tuple[Call, Tensor]:
    """`prepare_call` of a dialect op's own arguments."""
    if name == "qk_norm_rope_append_":
        *front, key_cache, value_cache = args[:9]
        args = (*front, key_cache, None, value_cache, None, *args[9:])
    return prepare_call(*args[:18])


def _prepare(query: Tensor, *args: Any) -> Tensor:
    if query.numel() == 0:
        return query.new_empty(query.shape)
    call, out = prepare_call(query, *args)
    run(call)
    return out


def _spec(
    query: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    cache: Tensor,
    scale: Tensor | None,
    norm: bool,
    weight_in_compute: bool,
) -> emit.Prepare:
    weight = query_weight if query_weight is not None else key_weight
    order = 2 if weight_in_compute or query.dtype == torch.float32 else 1
    return emit.Prepare(
        query.dtype,
        query.dtype if weight is None else weight.dtype,
        cos.dtype,
        cache.dtype,
        None if scale is None else scale.dtype,
        order if norm else 0,
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
    """Norm and RoPE of query and key, append of key and value; returns the query."""
    return _prepare(
        query, key, value, query_weight, key_weight, cos, sin, key_cache, None, value_cache, None,
        positions, eps, weight_offset, weight_in_compute, norm, rotary_dim, interleaved,
    )  # fmt: skip


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
    """`qk_norm_rope_append_` over int8 caches."""
    return _prepare(
        query, key, value, query_weight, key_weight, cos, sin, key_cache, key_scale, value_cache,
        value_scale, positions, eps, weight_offset, weight_in_compute, norm, rotary_dim,
        interleaved,
    )  # fmt: skip


def _append_reason(
    caches: Sequence[Tensor], scales: Sequence[Tensor | None], news: Sequence[Tensor], at: Tensor
) -> str | None:
    for cache, scale, new in zip(caches, scales, news):
        if cache.dim() != 4 or new.dim() != 4:
            return f"cache is {list(cache.shape)}, new {list(new.shape)}"
        features = new.shape[3]
        if not isinstance(features, int) or features > MAX_FEATURES:
            return f"{features} features, more than {MAX_FEATURES}"
        if cache.stride(-1) != 1:
            return f"the cache's rows are strided: {list(cache.stride())}"
        reason = device_reason(cache=cache, scale=scale, new=new, positions=at) or dtype_reason(
            new=new, scale=scale
        )
        if reason:
            return reason
        if scale is not None and cache.dtype != torch.int8:
            return f"the cache is {name_of(cache.dtype)}, not int8"
        if scale is not None and scale.dim() != 3:
            return f"the scales are {list(scale.shape)}, not one per token and head: [B, Hkv, N]"
        if scale is None and dtype_reason(cache=cache):
            return dtype_reason(cache=cache)
    if at.dim() != 1 or at.dtype not in (torch.int32, torch.int64):
        return f"positions are {name_of(at.dtype)} {list(at.shape)}"
    return None


def supports_cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> str | None:
    return _append_reason([cache], [None], [new], positions) or emit.why_not_built(
        emit.append(new.dtype, cache.dtype, None)
    )


def supports_cache_append_int8_(
    cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor
) -> str | None:
    return _append_reason([cache], [scale], [new], positions) or emit.why_not_built(
        emit.append(new.dtype, cache.dtype, scale.dtype)
    )


def _prepare_reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    positions: Tensor,
    weight_in_compute: bool,
    norm: bool,
    rotary_dim: int,
    interleaved: bool,
) -> str | None:
    reason = (
        _append_reason(caches, scales, (key, value), positions)
        or device_reason(query=query, qw=query_weight, kw=key_weight, cos=cos, sin=sin)
        or dtype_reason(query=query, qw=query_weight, kw=key_weight, cos=cos, sin=sin)
        or angles_reason(query, cos, sin, rotary_dim, interleaved)
    )
    if reason:
        return reason
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {name_of(query.dtype)}, key {name_of(key.dtype)}"
    if caches[0].dtype != caches[1].dtype:
        return "the caches differ in dtype"
    if cos.dim() > 4 or (cos.dim() >= 3 and cos.shape[-3] != 1) or (cos.dim() == 3):
        return f"cos is {list(cos.shape)}"
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        if weight is None:
            continue
        if weight.dim() != 1 or weight.stride(0) != 1 or weight.shape[0] != query.shape[3]:
            return f"{name} is {list(weight.shape)}, not [{query.shape[3]}]"
    if query_weight is not None and key_weight is not None:
        if query_weight.dtype != key_weight.dtype:
            return "the norm weights differ in dtype"
    return emit.why_not_built(
        emit.prepare(
            _spec(
                query, query_weight, key_weight, cos, caches[0], scales[0], norm, weight_in_compute
            )
        )
    )


def supports_qk_norm_rope_append_(
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
) -> str | None:
    return _prepare_reason(
        query, key, value, query_weight, key_weight, cos, sin, (key_cache, value_cache),
        (None, None), positions, weight_in_compute, norm, rotary_dim, interleaved,
    )  # fmt: skip


def supports_qk_norm_rope_append_int8_(
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
) -> str | None:
    return _prepare_reason(
        query, key, value, query_weight, key_weight, cos, sin, (key_cache, value_cache),
        (key_scale, value_scale), positions, weight_in_compute, norm, rotary_dim, interleaved,
    )  # fmt: skip
