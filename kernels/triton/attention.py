"""Attention over exact and int8 keys and values: decoding (split keys) and prefill.

The kernel is in `attention_kernel`; a mask predicate is printed into it by
`dspark_compile.codegen.triton.attention`. Here are the launch plan and what it refuses. One plan
serves both ends: where the tiles of query rows alone do not fill the device, their keys are
dealt to several programs and a second kernel merges the parts. The number of parts depends on
shapes only, so the launch can be captured; each tile deals out just the keys its predicate
allows, whatever the capacity of the cache. Reference: `dspark_compile.ops.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.codegen.triton.attention import attention_module
from dspark_compile.codegen.triton.predicate import print_predicate
from dspark_compile.kernels.triton import attention_kernel as template
from dspark_compile.kernels.triton._launch import (
    TL_DTYPE,
    Launch,
    Target,
    cdiv,
    device_reason,
    dtype_reason,
    next_power_of_2,
    target_of,
)

MAX_FEATURES = 256
MAX_SPLITS = 128
# A finite mask value at or below this leaves nothing of a forbidden key beside an allowed one,
# for any scores that half precision can hold.
ABSORBING = -3.0e4


@dataclass(frozen=True)
class Tiles:
    """Sizes of one attention program."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose_tiles(
    target: Target,
    rows: int,
    block_d: int,
    block_dv: int,
    compute_bytes: int,
    *,
    int8: bool = False,
    biased: bool = False,
) -> Tiles:
    """Tiles for ``rows`` query rows of one key head; chosen so that no target spills."""
    wide = max(block_d, block_dv)
    height = min(max(16, next_power_of_2(rows)), 128)
    if target.backend == "hip":
        height = min(height, 64 if wide > 128 or compute_bytes == 4 else 128)
        keys = 64 if wide <= 128 and compute_bytes == 2 else 32
        if compute_bytes == 4 and wide > 128:
            keys = 16
        return Tiles(height, keys, 4, 2 if wide <= 128 and compute_bytes == 2 else 1)
    if compute_bytes == 4:
        # Each float32 product is three tf32 ones and holds both halves of its operands.
        return (
            Tiles(min(height, 16 if int8 else 32), 32, 8, 2) if wide <= 128 else Tiles(16, 16, 4, 2)
        )
    if wide > 128:
        height = min(height, 32 if int8 else 64)
    elif biased and wide > 64:
        height = min(height, 64)
    keys = 64 if wide <= 128 else 32
    if height <= 32 and wide <= 64:
        keys = 128
    warps = 8 if height * wide >= 128 * 64 and height > 32 else 4
    if int8 and target.arch == 100 and 64 < wide <= 128:
        warps = 8  # with 4, ptxas holds to 128 registers and spills one
    stage = keys * (block_d + block_dv) * (1 if int8 else compute_bytes)
    stages = 3 if 3 * stage + height * block_d * compute_bytes <= target.shared // 2 else 2
    return Tiles(height, keys, warps, stages)


def choose_splits(target: Target, tiles: int, blocks: int) -> int:
    """Programs that share a tile's key blocks: two waves at most, one block each at least."""
    if tiles >= target.units or blocks <= 1:
        return 1
    return max(1, min(blocks, cdiv(2 * target.units, tiles), MAX_SPLITS))


def _precision(target: Target, compute_bytes: int, wide: int) -> str:
    """Float32 stays float32: three tf32 products on tensor cores, fused multiply-adds
    elsewhere, and for heads so wide that both halves of a query tile fill the registers."""
    split = target.backend == "cuda" and compute_bytes == 4 and wide <= 128
    return "tf32x3" if split else "ieee"


@dataclass(frozen=True)
class Plan:
    """The launches of one attention, in order, and its output."""

    launches: tuple[Launch, ...]
    out: Tensor


def plan(
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
    *,
    target: Target | None = None,
    splits: int | None = None,
) -> Plan:
    """What to launch; ``target`` and ``splits`` are chosen where they are not given."""
    batch, heads, count, features = query.shape
    kv_heads, keys, value_features = key.shape[1], key.shape[2], value.shape[-1]
    group = heads // kv_heads
    out = torch.empty(
        (batch, count, heads, value_features), dtype=query.dtype, device=query.device
    ).transpose(1, 2)
    if out.numel() == 0:
        return Plan((), out)
    if keys == 0:
        return Plan((), out.zero_())
    module, code = attention_module(mask)
    int8 = key_scale is not None
    compute = query.dtype if int8 else torch.promote_types(query.dtype, key.dtype)
    value_compute = query.dtype if int8 else torch.promote_types(query.dtype, value.dtype)
    block_d = max(16, next_power_of_2(features))
    block_dv = max(16, next_power_of_2(value_features))
    target = target or target_of(query)
    width = max(compute.itemsize, value_compute.itemsize)
    tiles = choose_tiles(
        target, count * group, block_d, block_dv, width, int8=int8, biased=bias is not None
    )
    programs = batch * kv_heads * cdiv(count * group, tiles.rows)
    if splits is None:
        splits = choose_splits(target, programs, cdiv(keys, tiles.keys))
    bool_bias = bias is not None and bias.dtype == torch.bool
    if bias is not None:
        bias = bias.expand(batch, heads, count, keys)

    log2e = math.log2(math.e)
    skip = mask_value is None or mask_value <= ABSORBING
    upper, lower = bool(code.upper) and skip, bool(code.lower) and skip
    exact = code.exact and not code.lower and not bool_bias and (upper or not code.upper)
    parts: dict[str, Tensor | None] = {"Part_ptr": None, "Max_ptr": None, "Sum_ptr": None}
    if splits > 1:
        shape = (batch, heads, count, splits)
        parts = {
            "Part_ptr": query.new_empty((*shape, value_features), dtype=torch.float32),
            "Max_ptr": query.new_empty(shape, dtype=torch.float32),
            "Sum_ptr": query.new_empty(shape, dtype=torch.float32),
        }

    def strides(name: str, x: Tensor | None, axes: str) -> dict[str, int]:
        steps = (0,) * len(axes) if x is None else x.stride()
        return {f"{name}_stride_{axis}": step for axis, step in zip(axes, steps)}

    out_strides = strides("Out", out, "bhm")
    attend = Launch(
        module.attention_kernel,
        (programs, splits),
        {
            "Q_ptr": query,
            "K_ptr": key,
            "V_ptr": value,
            "K_scale_ptr": key_scale,
            "V_scale_ptr": value_scale,
            "Bias_ptr": bias,
            "Sinks_ptr": sinks,
            "Out_ptr": out,
            **parts,
            **strides("Q", query, "bhmd"),
            **strides("K", key, "bhnd"),
            **strides("V", value, "bhnd"),
            **strides("K_scale", key_scale, "bhn"),
            **strides("V_scale", value_scale, "bhn"),
            **strides("Bias", bias, "bhmn"),
            **out_strides,
            **code.arguments(mask_tensors, mask_ints),
            "M": count,
            "N": keys,
            "splits": splits,
            "scale": scale / softcap if softcap > 0 else scale * log2e,
            "softcap": softcap * log2e,
            "mask_value": 0.0 if mask_value is None else max(mask_value * log2e, -2.0e38),
        },
        {
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "D": features,
            "DV": value_features,
            "BLOCK_R": tiles.rows,
            "BLOCK_N": tiles.keys,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "HAS_MASK": bool(code.allowed),
            "UPPER": upper,
            "LOWER": lower,
            "WITNESS": (upper or lower) and mask_value is not None,
            "EXACT": exact and tiles.rows >= 64,
            "BOOL_BIAS": bool_bias,
            "SOFTCAP": softcap > 0,
            "ADD_MASK": mask_value is not None,
            "SPLIT": splits > 1,
            "PRECISION": _precision(target, width, max(block_d, block_dv)),
            "COMPUTE": TL_DTYPE[compute],
            "VALUE": TL_DTYPE[value_compute],
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits == 1:
        return Plan((attend,), out)
    combine = Launch(
        template.combine_kernel,
        (batch * heads * count,),
        {
            **parts,
            "Sinks_ptr": sinks,
            "Out_ptr": out,
            **out_strides,
            "M": count,
            "splits": splits,
        },
        {
            "HEADS": heads,
            "DV": value_features,
            "BLOCK_DV": block_dv,
            "BLOCK_S": max(16, next_power_of_2(splits)),
            "CHUNK": 16,
        },
        num_warps=4,
        num_stages=1,
    )
    return Plan((attend, combine), out)


def _run(plan: Plan) -> Tensor:
    for launch in plan.launches:
        launch.run()
    return plan.out


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
    return _run(
        plan(
            query, key, None, value, None, bias, sinks, mask_tensors, mask_ints,
            scale, mask, softcap, mask_value,
        )
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
    """`attention` over int8 keys and values with one scale per token and head."""
    return _run(
        plan(
            query, key, key_scale, value, value_scale, bias, sinks, mask_tensors, mask_ints,
            scale, mask, softcap, mask_value,
        )
    )  # fmt: skip


def _reason(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    mask: str,
) -> str | None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            return f"{name} has {x.dim()} dimensions, not 4"
        features = x.shape[-1]
        if not isinstance(features, int) or features > MAX_FEATURES:
            return f"{name} has {features} features, more than {MAX_FEATURES}"
    heads, kv_heads = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        return f"{heads} query heads over {kv_heads} key heads"
    if value.shape[1] != kv_heads:
        return f"{kv_heads} key heads, {value.shape[1]} value heads"
    if sinks is not None and (sinks.dim() != 1 or sinks.stride(0) != 1):
        return f"sinks are {list(sinks.shape)}"
    if bias is not None and bias.dtype != torch.bool and dtype_reason(bias=bias):
        return dtype_reason(bias=bias)
    try:
        code = print_predicate(mask)
    except ValueError as error:
        return str(error)
    return (
        code.reason(mask_tensors, mask_ints)
        or dtype_reason(query=query, sinks=sinks)
        or device_reason(query, key, value, bias, sinks, *mask_tensors)
    )


def supports_attention(
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
) -> str | None:
    return dtype_reason(key=key, value=value) or _reason(
        query, key, value, bias, sinks, mask_tensors, mask_ints, mask
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
    *,
    scale: float,
    mask: str = "",
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> str | None:
    for name, x in (("key", key), ("value", value)):
        if x.dtype != torch.int8:
            return f"{name} is {str(x.dtype).removeprefix('torch.')}, not int8"
    for name, x in (("key_scale", key_scale), ("value_scale", value_scale)):
        if x.dim() != 3:
            return f"{name} is {list(x.shape)}, not one scale per token and head: [B, Hkv, N]"
    return (
        dtype_reason(key_scale=key_scale, value_scale=value_scale)
        or device_reason(key, key_scale, value, value_scale)
        or _reason(query, key, value, bias, sinks, mask_tensors, mask_ints, mask)
    )
