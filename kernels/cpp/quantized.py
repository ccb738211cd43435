"""Launchers of linear layers and gated feed-forward blocks over int8 and int4 weights
(``linear_int.h``), up to 16 rows.

Weights are read where they lie: int8 rows any stride apart, or what `ops.quantized.pack_int4` made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit, emit_quantized
from dspark_compile.kernels.cpp._launch import (
    FLOATS,
    MAX_ROWS,
    Call,
    Value,
    device_reason,
    name_of,
    run,
    size_reason,
)
from dspark_compile.ops import OPS
from dspark_compile.ops.quantized import packed_shape

# Groups of a row begin where a step of the kernels does.
GROUP = 32


def _flat(x: Tensor) -> Tensor:
    """``x`` as rows whose elements lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _count(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def _features(weight: Sequence[Tensor]) -> int:
    """Rows of a weight; a packed one counts blocks of them, its scales count rows."""
    return (weight[0] if weight[0].dim() == 2 else weight[1]).shape[0]


def _groups(weight: Sequence[Tensor]) -> int:
    """How many scales a row has."""
    return weight[1].numel() // max(_features(weight), 1)


def _weight(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """``[weight, scale]`` or ``[weight, scale, zero_point]``, contiguous but for the weight."""
    weight, *rest = (t for t in tensors if t is not None)
    return [weight, *(t.contiguous() for t in rest)]


def _values(weight: Sequence[Tensor]) -> tuple[Value, ...]:
    """What a kernel's four parameters of a weight get."""
    zero = weight[2] if len(weight) > 2 else None
    return weight[0], weight[0].stride(0), weight[1], zero


def _kind(bits: int, dtype: torch.dtype, rows: int, weight: Sequence[Tensor]):
    zero = weight[2].dtype if len(weight) > 2 else None
    return emit_quantized.Weights(bits, dtype, weight[1].dtype, zero, rows)


def linear_call(
    bits: int,
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    out: Tensor,
    activation: str = "identity",
) -> Call:
    """``act(x W^T + bias)`` of ``x [M, K]`` into contiguous ``out [M, N]``.

    ``weight`` is its numbers, scales and, if there are any, zero points, as the dialect op takes
    them, the latter two contiguous.
    """
    groups, (rows, size) = _groups(weight), x.shape
    source = emit_quantized.linear(_kind(bits, x.dtype, rows, weight), groups > 1, activation)
    values = (x, x.stride(0), *_values(weight), bias, out, _features(weight), size, groups)
    return Call(source, values, weight[0].numel(), (out,), (weight[0],))


def gated_mlp_call(
    bits: int,
    x: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    out: Tensor,
) -> Call:
    """The block of ``x [M, K]`` into contiguous ``out [M, N]``; weights as in `linear_call`."""
    groups, down_groups = _groups(up), _groups(down)
    source = emit_quantized.gated_mlp(
        _kind(bits, x.dtype, x.shape[0], up), groups > 1, down_groups > 1, activation
    )
    weights = (*_values(gate), *_values(up), *_values(down))
    sizes = (_features(down), _features(up), x.shape[1], groups, down_groups)
    nbytes = sum(w[0].numel() for w in (gate, up, down))
    values = (x, x.stride(0), *weights, *biases, out, *sizes)
    return Call(source, values, nbytes, (out,), (up[0], gate[0], down[0]))


def _linear(
    bits: int,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if not _fits(x, weight):
        return OPS[f"linear_int{bits}"].reference(x, weight, scale, zero_point, bias)
    tensors = _weight((weight, scale, zero_point))
    out = x.new_empty((*x.shape[:-1], _features(tensors)))
    run(linear_call(bits, _flat(x), tensors, _contiguous(bias), out))
    return out


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x [..., K] @ ((weight - zero_point) * scale)^T + bias``."""
    return _linear(8, x, weight, scale, zero_point, bias)


def linear_int4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same for a weight packed by `pack_int4`."""
    return _linear(4, x, weight, scale, zero_point, bias)


def _gated_mlp(
    bits: int,
    x: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    if not all(_fits(x, w[0]) for w in (gate, up, down)):
        return OPS[f"gated_mlp_int{bits}"].reference(
            x, gate, up, down, gate_bias, up_bias, down_bias, activation, compute_fp32
        )
    out = x.new_empty((*x.shape[:-1], _features(down)))
    biases = (_contiguous(gate_bias), _contiguous(up_bias), _contiguous(down_bias))
    parts = (_weight(gate), _weight(up), _weight(down))
    run(gated_mlp_call(bits, _flat(x), *parts, biases, activation, out))
    return out


def gated_mlp_int8(x: Tensor, *args: object) -> Tensor:
    """``down(act(gate(x)) * up(x))`` over int8 weights."""
    return _gated_mlp(8, x, *args)  # type: ignore[arg-type]


def gated_mlp_int4(x: Tensor, *args: object) -> Tensor:
    """The same over packed int4 weights."""
    return _gated_mlp(4, x, *args)  # type: ignore[arg-type]


def call_of(name: str, args: Sequence[Any]) -> tuple[Call, Tensor]:
    """What a stage of a native program needs: the call of dialect op ``name`` and its result.

    ``args`` are the op's, in its schema's order, all contiguous but for the weights' rows.
    """
    bits = int(name[-1])
    x = args[0]
    rows = x.reshape(-1, x.shape[-1])
    if name.startswith("linear"):
        weight, bias = [t for t in args[1:4] if t is not None], (*args[4:], None)[0]
        out = x.new_empty((*x.shape[:-1], _features(weight)))
        return linear_call(bits, rows, weight, bias, out), out
    _, gate, up, down, *biases, activation = args[:8]
    out = x.new_empty((*x.shape[:-1], _features(down)))
    return gated_mlp_call(bits, rows, gate, up, down, tuple(biases), activation, out), out  # type: ignore[arg-type]


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the call is one that `supports` promised: shapes and strides may have been fake."""
    plain = weight.stride(-1) == 1 or weight.shape[-1] == 1
    return 0 < _count(x) <= MAX_ROWS and weight.numel() > 0 and plain


def _input_reason(x: Tensor) -> str | None:
    if x.dim() == 0:
        return "x has no dimensions"
    reason = device_reason(x=x) or size_reason(x=x)
    if reason:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {name_of(x.dtype)}"
    if _count(x) == 0 or x.shape[-1] == 0:
        return "x is empty"
    if _count(x) > MAX_ROWS:
        return f"{_count(x)} rows, more than {MAX_ROWS}"
    return None


def _weight_reason(bits: int, size: int, name: str, tensors: Sequence[Tensor]) -> str | None:
    """Why a weight for inputs of ``size`` features cannot be read; None if it can."""
    weight, scale = tensors[0], tensors[1]
    zero = tensors[2] if len(tensors) > 2 else None
    reason = device_reason(**{name: weight}, scale=scale, zero_point=zero) or size_reason(
        **{name: weight}, scale=scale, zero_point=zero
    )
    if reason:
        return reason
    if weight.numel() == 0:
        return f"{name} is empty"
    if bits == 4:
        rows = scale.shape[0] if scale.dim() else 1
        if weight.dtype != torch.uint8 or weight.shape != packed_shape(rows, size):
            return f"{name} is {name_of(weight.dtype)} {list(weight.shape)}"
        if not weight.is_contiguous():
            return f"{name} is not contiguous: strides {list(weight.stride())}"
    else:
        if weight.dtype != torch.int8 or weight.dim() != 2 or weight.shape[1] != size:
            return f"{name} is {name_of(weight.dtype)} {list(weight.shape)}"
        if weight.stride(-1) != 1 and size != 1:
            return f"{name} is not row-major: strides {list(weight.stride())}"
    if scale.dtype not in FLOATS:
        return f"{name}'s scales are {name_of(scale.dtype)}"
    if zero is not None and zero.dtype not in (torch.int8, *FLOATS):
        return f"{name}'s zero points are {name_of(zero.dtype)}"
    groups = _groups(tensors)
    if not scale.is_contiguous() or not (zero is None or zero.is_contiguous()):
        return f"{name}'s scales or zero points are not contiguous"
    if scale.numel() != _features(tensors) * groups or (
        zero is not None and zero.shape != scale.shape
    ):
        return f"{name}'s scales are {list(scale.shape)}"
    if groups > 1 and (size % groups or size // groups % GROUP):
        return f"{name}'s groups are no multiple of {GROUP}: {groups} in {size}"
    return None


def _bias_reason(x: Tensor, **biases: Tensor | None) -> str | None:
    for name, bias in biases.items():
        if bias is not None and bias.dtype != x.dtype:
            return f"x is {name_of(x.dtype)}, {name} {name_of(bias.dtype)}"
    return None


def _supports_linear(
    bits: int, x: Tensor, weight: Sequence[Tensor | None], bias: Tensor | None
) -> str | None:
    tensors = [t for t in weight if t is not None]
    reason = (
        _input_reason(x)
        or _weight_reason(bits, x.shape[-1], "weight", tensors)
        or _bias_reason(x, bias=bias)
    )
    return reason or emit.why_not_built(
        emit_quantized.linear(_kind(bits, x.dtype, _count(x), tensors), _groups(tensors) > 1)
    )


def supports_linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> str | None:
    return _supports_linear(8, x, (weight, scale, zero_point), bias)


def supports_linear_int4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> str | None:
    return _supports_linear(4, x, (weight, scale, zero_point), bias)


def _supports_gated_mlp(
    bits: int,
    x: Tensor,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    reason = _input_reason(x)
    if reason:
        return reason
    sizes = {
        "gate": x.shape[-1],
        "up": x.shape[-1],
        "down": _features([t for t in up if t is not None]),
    }
    for (name, size), weight in zip(sizes.items(), (gate, up, down), strict=True):
        reason = _weight_reason(bits, size, name, weight)
        if reason:
            return reason
    reason = _bias_reason(x, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)
    if reason:
        return reason
    if len({tuple(t.dtype for t in weight) for weight in (gate, up, down)}) != 1:
        return "the weights' scales or zero points differ in dtype"
    if _groups(gate) != _groups(up):
        return f"gate has {_groups(gate)} groups, up {_groups(up)}"
    return emit.why_not_built(
        emit_quantized.gated_mlp(
            _kind(bits, x.dtype, _count(x), up), _groups(up) > 1, _groups(down) > 1, activation
        )
    )


def supports_gated_mlp_int8(x: Tensor, *args: object) -> str | None:
    return _supports_gated_mlp(8, x, *args)  # type: ignore[arg-type]


def supports_gated_mlp_int4(x: Tensor, *args: object) -> str | None:
    return _supports_gated_mlp(4, x, *args)  # type: ignore[arg-type]
