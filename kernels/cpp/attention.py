"""Launchers of decode attention over exact, int8 and latent caches, up to 16 query rows
(``attention.h``); more rows go to `attention_prefill`.

The mask predicate is printed into the kernel. Keys that its bounds forbid are not read: a static
cache of 8192 rows with 512 filled costs what 512 rows cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.codegen.cpp.predicate import Printed, print_predicate
from dspark_compile.kernels.cpp._launch import (
    MAX_ROWS,
    Call,
    device_reason,
    dtype_reason,
    name_of,
    run,
)
from dspark_compile.kernels.cpp.attention_prefill import attention_prefill, refusal
from dspark_compile.ops import OPS

MAX_FEATURES = 1024
MAX_GROUP = 64
# Query rows whose sums stay in cache: latent attention takes so many heads at a time.
LATENT_ROWS = 64


def _spec(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    mask_value: float | None,
    query_rope: Tensor | None = None,
) -> emit.Attention:
    rest = 0 if query_rope is None else query_rope.shape[3]
    return emit.Attention(
        query=query.dtype,
        cache=key.dtype,
        scales=None if key_scale is None else key_scale.dtype,
        bias=None if bias is None else bias.dtype,
        sinks=None if sinks is None else sinks.dtype,
        group=query.shape[1] // key.shape[1],
        rows=query.shape[2],
        features=query.shape[3] + rest,
        value_features=value.shape[3] if query_rope is None else query.shape[3],
        softcap=softcap > 0,
        adds=mask_value is not None,
        rest=rest,
    )


def _printed(mask: str, mask_tensors: Sequence[Tensor]) -> Printed:
    return print_predicate(mask, tuple(t.dtype for t in mask_tensors))


def _rows(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention_call(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    value_scale: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    scale: float,
    mask: str,
    softcap: float,
    mask_value: float | None,
    query_rope: Tensor | None = None,
) -> tuple[Call, Tensor]:
    """The call and its result ``[B, Hq, M, DV]``. With ``query_rope`` keys have two parts: ``key``,
    which is the value as well, and ``value``, which that meets."""
    batch, heads, count, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    features = (value if query_rope is None else key).shape[3]
    out = query.new_empty((batch, count, heads, features))
    query, key, value = _rows(query), _rows(key), _rows(value)
    strides: list[int] = [*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    for tensor in (key_scale, value_scale):
        strides += (0, 0, 0) if tensor is None else tensor.stride()
    if bias is None:
        strides += (0, 0, 0, 0)
    else:
        bias = bias.expand(batch, heads, count, keys)
        strides += bias.stride()
    if query_rope is not None:
        query_rope = _rows(query_rope)
    strides += (0, 0, 0) if query_rope is None else query_rope.stride()[:3]
    if sinks is not None:
        sinks = sinks.contiguous()
    printed = _printed(mask, mask_tensors)
    shape = [batch, kv_heads, keys, *strides]
    spec = _spec(query, key, key_scale, value, bias, sinks, softcap, mask_value, query_rope)
    source = emit.attention(spec, printed)
    call = Call(
        source,
        (
            *(query, query_rope, key, value, key_scale, value_scale, bias, sinks, out, shape),
            *(printed.tensors(mask_tensors), printed.values(mask_tensors, mask_ints)),
            *(scale, softcap, 0.0 if mask_value is None else mask_value),
        ),
        2 * key.numel() * key.element_size(),
        (out,),
    )
    return call, out.transpose(1, 2)


def _latent_heads(query: Tensor, latent: Tensor, key_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and rotary parts ``[B, N, D]`` as key heads ``[B, groups, N, D]``: each serves a
    group of the query's heads."""
    heads, count = query.shape[1:3]
    group = max(
        n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * count <= LATENT_ROWS)
    )
    key, value = (
        _rows(x).unsqueeze(1).expand(-1, heads // group, -1, -1) for x in (latent, key_rope)
    )
    return key, value


def call_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Call, Tensor]:
    """`attention_call` of a dialect op's own arguments."""
    query_rope = None
    if name == "attention":
        query, key, value, *rest = args
        given = [query, key, None, value, None]
    elif name == "mla_attention":
        query, query_rope, latent, key_rope, *rest = args
        key, value = _latent_heads(query, latent, key_rope)
        given = [query, key, None, value, None]
    else:
        given, rest = list(args[:5]), list(args[5:])
    rest += [None, None, (), ()][len(rest) :]
    numbers = (kwargs["scale"], kwargs.get("mask", ""), kwargs.get("softcap", 0.0))
    every: list[Any] = [*given, *rest, *numbers, kwargs.get("mask_value"), query_rope]
    return attention_call(*every)


def _attention(query: Tensor, key: Tensor, key_scale: Tensor | None, *args: Any) -> Tensor:
    batch, heads, count, _ = query.shape
    if query.numel() == 0 or args[0].shape[3] == 0:
        return query.new_empty((batch, heads, count, args[0].shape[3]))
    call, out = attention_call(query, key, key_scale, *args)
    run(call)
    return out


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
    """``softmax(mask(scale * q @ k^T)) @ v``; query ``[B, Hq, M, D]``, key ``[B, Hkv, N, D]``."""
    if query.shape[2] > MAX_ROWS and refusal(0, mask, softcap, mask_value, sinks) is None:
        return attention_prefill(
            query, key, value, bias, mask_tensors, mask_ints, scale=scale, mask=mask,
        )  # fmt: skip
    if query.shape[2] > MAX_ROWS:
        return OPS["attention"].reference(
            query, key, value, bias, sinks, mask_tensors, mask_ints,
            scale=scale, mask=mask, softcap=softcap, mask_value=mask_value,
        )  # fmt: skip
    return _attention(
        query, key, None, value, None, bias, sinks, mask_tensors, mask_ints,
        scale, mask, softcap, mask_value,
    )  # fmt: skip


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
    """`attention` over int8 keys and values with one scale per token and head, ``[B, Hkv, N]``.

    Raises:
        ValueError: the scales have another shape.
    """
    for name, x, of in (("key_scale", key_scale, key), ("value_scale", value_scale, value)):
        if x.shape != of.shape[:3]:
            raise ValueError(f"{name} is {list(x.shape)}, not {list(of.shape[:3])}: [B, Hkv, N]")
    if query.shape[2] > MAX_ROWS and refusal(0, mask, softcap, mask_value, sinks) is None:
        return attention_prefill(
            query, key, value, bias, mask_tensors, mask_ints, scale=scale, mask=mask,
            key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip
    if query.shape[2] > MAX_ROWS:
        return OPS["attention_int8"].reference(
            query, key, key_scale, value, value_scale, bias, sinks, mask_tensors, mask_ints,
            scale=scale, mask=mask, softcap=softcap, mask_value=mask_value,
        )  # fmt: skip
    return _attention(
        query, key, key_scale, value, value_scale, bias, sinks, mask_tensors, mask_ints,
        scale, mask, softcap, mask_value,
    )  # fmt: skip


def mla_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    **attributes: Any,
) -> Tensor:
    """`attention` of one key head ``[latent ; key_rope]``, whose value is the latent.

    query ``[B, H, M, R]``, query_rope ``[B, H, M, Dr]``, latent ``[B, N, R]``, key_rope
    ``[B, N, Dr]``.
    """
    args = (query, query_rope, latent, key_rope, bias, sinks, mask_tensors, mask_ints)
    if query.shape[2] > MAX_ROWS or query.numel() == 0:
        return OPS["mla_attention"].reference(*args, **attributes)
    call, out = call_of("mla_attention", args, attributes)
    run(call)
    return out


def _reason(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    attributes: dict[str, Any],
    query_rope: Tensor | None = None,
) -> str | None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, not 4"
        if not isinstance(x.shape[3], int) or x.shape[3] > MAX_FEATURES or x.shape[3] == 0:
            return f"{name} has {x.shape[3]} features, not 1 to {MAX_FEATURES}"
    heads, kv_heads, count = query.shape[1], key.shape[1], query.shape[2]
    if not isinstance(count, int) or count == 0:
        return f"{count} query rows, not 1 to {MAX_ROWS}"
    if count > MAX_ROWS:
        reason = refusal(
            count,
            attributes.get("mask", ""),
            attributes.get("softcap", 0.0),
            attributes.get("mask_value"),
            sinks,
        )
        if reason:
            return reason
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return f"{heads} query heads over {kv_heads} key heads"
    if value.shape[1] != kv_heads:
        return f"{kv_heads} key heads, {value.shape[1]} value heads"
    if heads // kv_heads > MAX_GROUP:
        return f"{heads // kv_heads} query heads for a key head, more than {MAX_GROUP}"
    reason = dtype_reason(query=query, sinks=sinks) or device_reason(
        query=query, key=key, key_scale=key_scale, value=value, bias=bias, sinks=sinks
    )
    if reason:
        return reason
    if value.dtype != key.dtype:
        return f"key is {name_of(key.dtype)}, value {name_of(value.dtype)}"
    if bias is not None and bias.dtype != torch.bool and dtype_reason(bias=bias):
        return dtype_reason(bias=bias)
    if sinks is not None and sinks.dim() != 1:
        return f"sinks are {list(sinks.shape)}"
    for tensor in mask_tensors:
        if tensor.device.type != "cpu":
            return f"a mask tensor is on {tensor.device.type}"
    try:
        printed = _printed(attributes.get("mask", ""), mask_tensors)
    except ValueError as error:
        return str(error)
    reason = printed.code.reason(mask_tensors, mask_ints)
    if reason:
        return reason
    if count > MAX_ROWS:
        return None
    spec = _spec(
        query, key, key_scale, value, bias, sinks,
        attributes.get("softcap", 0.0), attributes.get("mask_value"), query_rope,
    )  # fmt: skip
    return emit.why_not_built(emit.attention(spec, printed))


def supports_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    **attributes: Any,
) -> str | None:
    return dtype_reason(key=key, value=value) or _reason(
        query, key, None, value, bias, sinks, mask_tensors, mask_ints, attributes
    )


def supports_attention_int8(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor,
    value: Tensor,
    value_scale: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    **attributes: Any,
) -> str | None:
    for name, x in (("key", key), ("value", value)):
        if x.dtype != torch.int8:
            return f"{name} is {name_of(x.dtype)}, not int8"
    reason = dtype_reason(key_scale=key_scale, value_scale=value_scale) or device_reason(
        value_scale=value_scale
    )
    if reason:
        return reason
    if key_scale.dtype != value_scale.dtype:
        return f"key_scale is {name_of(key_scale.dtype)}, value_scale {name_of(value_scale.dtype)}"
    for name, x in (("key_scale", key_scale), ("value_scale", value_scale)):
        if x.dim() != 3:
            return f"{name} is {list(x.shape)}, not one scale per token and head: [B, Hkv, N]"
    return _reason(query, key, key_scale, value, bias, sinks, mask_tensors, mask_ints, attributes)


def supports_mla_attention(
    query: Tensor,
    query_rope: Tensor,
    latent: Tensor,
    key_rope: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    mask_tensors: Sequence[Tensor] = (),
    mask_ints: Sequence[int] = (),
    **attributes: Any,
) -> str | None:
    for name, x, rank in (
        *(("query", query, 4), ("query_rope", query_rope, 4)),
        *(("latent", latent, 3), ("key_rope", key_rope, 3)),
    ):
        if x.dim() != rank:
            return f"{name} has {x.dim()} dimensions, not {rank}"
        if not isinstance(x.shape[-1], int) or x.shape[-1] == 0:
            return f"{name} has {x.shape[-1]} features"
    heads, count, features = query.shape[1], query.shape[2], query.shape[3]
    if not isinstance(heads, int) or heads == 0:
        return f"{heads} query heads"
    if not isinstance(count, int) or not 0 < count <= MAX_ROWS:
        return f"{count} query rows, not 1 to {MAX_ROWS}"
    if features + query_rope.shape[3] > MAX_FEATURES:
        return f"{features + query_rope.shape[3]} features, more than {MAX_FEATURES}"
    if latent.shape[-1] != features or key_rope.shape[-1] != query_rope.shape[3]:
        return "a query and its part of the keys differ in features"
    if query_rope.dtype != query.dtype:
        return f"query is {name_of(query.dtype)}, query_rope {name_of(query_rope.dtype)}"
    key, value = _latent_heads(query, latent, key_rope)
    return (
        dtype_reason(latent=latent, key_rope=key_rope)
        or device_reason(query_rope=query_rope)
        or _reason(
            query, key, None, value, bias, sinks, mask_tensors, mask_ints, attributes, query_rope
        )
    )
