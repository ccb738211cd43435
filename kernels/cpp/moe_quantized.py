"""Launchers of experts over int8 and int4 weights (``moe_int.h``), for any number of tokens.

Weights are read where they lie: int8 rows any stride apart, stacked or one tensor an expert, or
what `ops.quantized.pack_int4` made of each expert's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit, emit_moe, emit_quantized
from dspark_compile.kernels.cpp._launch import FLOATS, Call, Value, device_reason, name_of, run
from dspark_compile.kernels.cpp.moe import _contiguous, _flat, _known, _pass_rows, _rows, _stack
from dspark_compile.kernels.cpp.quantized import GROUP
from dspark_compile.ops import OPS
from dspark_compile.ops.moe_quantized import of_expert, stacked
from dspark_compile.ops.quantized import packed_shape
from dspark_compile.runtime.expert_load import cell

# Of an op's arguments: what stands in front of the nine lists of a weight, and where biases begin.
_FIRST, _BIASES, _REST = 3, 12, 15
_NAMES = ("gate", "up", "down")

# Numbers, scales and zero points of a weight.
Weight = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def _weights(args: Sequence[Any]) -> list[Weight]:
    """Gate's, up's and down's numbers, scales and zero points."""
    lists = args[_FIRST:_BIASES]
    return [(lists[i], lists[3 + i], lists[6 + i]) for i in range(3)]


def _experts(weight: Weight) -> int:
    return weight[0][0].shape[0] if stacked(weight[0]) else len(weight[0])


def _size(weight: Weight) -> tuple[int, int]:
    """``(rows, scales of a row)``."""
    scale = of_expert(weight[1], 0)
    assert scale is not None
    return scale.shape[0], scale.numel() // max(scale.shape[0], 1)


def _one_bytes(weight: Weight) -> int:
    """What one expert's weight takes."""
    each = [of_expert(part, 0) for part in weight]
    return sum(t.numel() * t.element_size() for t in each if t is not None)


def _spec(bits: int, args: Sequence[Any]) -> emit_moe.IntExperts:
    x, indices, share = args[:_FIRST]
    gate, up, down = _weights(args)
    activation, limits, weigh_input = [*args[_REST:], *((), False)[len(args) - _REST - 1 :]][:3]
    zero = up[2][0].dtype if up[2] else None
    weights = emit_quantized.Weights(bits, x.dtype, up[1][0].dtype, zero, _pass_rows(_rows(x)))
    return emit_moe.IntExperts(
        weights, indices.dtype, share.dtype, bool(gate[0]), _size(up)[1] > 1, _size(down)[1] > 1,
        weigh_input, activation, emit_moe.limits_of(limits),
    )  # fmt: skip


def experts_call(bits: int, args: Sequence[Any], out: Tensor) -> Call:
    """The experts of ``args``, the op's own with ``x [T, K]``, into contiguous ``out [T, N]``.

    Indices and weights are contiguous ``[T, k]``, biases contiguous.
    """
    x, indices, share = args[:_FIRST]
    weights = _weights(args)
    site = args[_REST + 3] if len(args) > _REST + 3 else ""
    tokens, k = indices.shape
    (inner, groups), (outputs, down_groups) = _size(weights[1]), _size(weights[2])
    count = _experts(weights[2])
    one = sum(_one_bytes(weight) for weight in weights if weight[0])
    stacks: list[Value] = []
    for numbers, scale, zero in weights:
        stacks += [*_stack(numbers, 3), *_stack(scale, 3), *_stack(zero, 3)]
        each = of_expert(numbers, 0)
        stacks.append(0 if each is None else each.stride(0))
    for bias in args[_BIASES:_REST]:
        stacks += _stack(bias, 2)
    values: tuple[Value, ...] = (
        x, x.stride(0), indices, share, *stacks, groups, down_groups, out,
        cell(site, count, one).address, tokens, k, count, x.shape[1], inner, outputs,
    )  # fmt: skip
    return Call(
        emit_moe.int_experts(_spec(bits, args)), values, min(count, tokens * k) * one, (out,)
    )


def call_of(name: str, rows: Tensor, args: Sequence[Any]) -> tuple[Call, Tensor]:
    """The call of dialect op ``name`` on ``rows``, x's, and its result.

    ``args`` are the op's; indices, weights, scales, zero points and biases are contiguous as
    `supports` asks for it.
    """
    x, indices, share = args[:_FIRST]
    k = indices.shape[-1]
    out = x.new_empty((*x.shape[:-1], _size(_weights(args)[2])[0]))
    flat = [rows, indices.reshape(-1, k), share.reshape(-1, k), *args[_FIRST:]]
    return experts_call(int(name[-1]), flat, out.reshape(rows.shape[0], -1)), out


def _run(name: str, args: Sequence[Any]) -> Tensor:
    x, indices, share = args[:_FIRST]
    biases = [_contiguous(b) for b in args[_BIASES:_REST]]
    args = (
        x, indices.contiguous(), share.contiguous(), *args[_FIRST:_BIASES], *biases, *args[_REST:],
    )  # fmt: skip
    rows = _flat(x)
    if rows.shape[0] == 0 or indices.shape[-1] == 0 or _reason(int(name[-1]), args) is not None:
        return OPS[name].reference(*args)
    call, out = call_of(name, rows, args)
    run(call)
    return out


def moe_experts_int8(*args: Any) -> Tensor:
    """``sum of weight * expert(x)`` over int8 weights; see `ops.moe_quantized`."""
    return _run("moe_experts_int8", args)


def moe_experts_int4(*args: Any) -> Tensor:
    """The same over packed int4 weights."""
    return _run("moe_experts_int4", args)


def supports_moe_experts_int8(*args: Any) -> str | None:
    return _reason(8, args)


def supports_moe_experts_int4(*args: Any) -> str | None:
    return _reason(4, args)


def _reason(bits: int, args: Sequence[Any]) -> str | None:
    x, indices, share = args[:_FIRST]
    weights = _weights(args)
    biases = [t for bias in args[_BIASES:_REST] for t in bias]
    tensors = [t for weight in weights for part in weight for t in part]
    named = {f"weight {i}": t for i, t in enumerate((*tensors, *biases))}
    reason = device_reason(x=x, indices=indices, weights=share, **named)
    if reason:
        return reason
    if x.dtype not in FLOATS or share.dtype not in FLOATS:
        return f"x is {name_of(x.dtype)}, the choices' weights {name_of(share.dtype)}"
    if indices.dtype not in (torch.int64, torch.int32):
        return f"indices are {name_of(indices.dtype)}"
    if not _known(x.shape[-1], indices.shape[-1], *(n for t in tensors for n in t.shape)):
        return "a weight has a dynamic size"
    other = next((b for b in biases if b.dtype != x.dtype), None)
    if other is not None:
        return f"x is {name_of(x.dtype)}, a bias {name_of(other.dtype)}"
    gate, up, _ = weights
    sizes = (x.shape[-1], x.shape[-1], _size(up)[0])
    for name, weight, size in zip(_NAMES, weights, sizes, strict=True):
        reason = _weight_reason(bits, name, weight, size) if weight[0] else None
        if reason:
            return reason
    kinds = {tuple(part[0].dtype if part else None for part in w[1:]) for w in weights if w[0]}
    if len(kinds) != 1:
        return "the weights' scales or zero points differ in dtype"
    if gate[0] and (_size(gate) != _size(up) or _experts(gate) != _experts(up)):
        return "gate and up differ in size or groups"
    return emit.why_not_built(emit_moe.int_experts(_spec(bits, args)))


def _weight_reason(bits: int, name: str, weight: Weight, size: int) -> str | None:
    """Why a weight for inputs of ``size`` features cannot be read; None if it can."""
    numbers, scale, zero = weight
    for what, tensors in (("", numbers), ("'s scales", scale), ("'s zero points", zero)):
        if len({(t.shape, t.stride(), t.dtype) for t in tensors}) > 1:
            return f"{name}{what} differ from expert to expert"
    if any(t.numel() == 0 for t in (*numbers, *scale)):
        return f"{name} is empty"
    q, s, z = (of_expert(part, 0) for part in weight)
    assert q is not None and s is not None
    rows, groups = _size(weight)
    if bits == 4:
        if q.dtype != torch.uint8 or q.shape != packed_shape(rows, size) or not q.is_contiguous():
            return f"{name} is {name_of(q.dtype)} {list(q.shape)}"
    elif q.dtype != torch.int8 or q.shape != (rows, size) or (q.stride(-1) != 1 and size != 1):
        return f"{name} is {name_of(q.dtype)} {list(q.shape)}, strides {list(q.stride())}"
    if s.dtype not in FLOATS or not s.is_contiguous():
        return f"{name}'s scales are {name_of(s.dtype)}, strides {list(s.stride())}"
    if z is not None:
        if z.dtype not in (torch.int8, *FLOATS) or not z.is_contiguous():
            return f"{name}'s zero points are {name_of(z.dtype)}, strides {list(z.stride())}"
        if z.numel() != s.numel():
            return f"{name} has {s.numel()} scales and {z.numel()} zero points"
    if groups > 1 and (size % groups or size // groups % GROUP):
        return f"{name}'s groups are no multiple of {GROUP}: {groups} in {size}"
    return None
