"""Launchers of linear layers and feed-forward blocks of up to `most_rows` rows (``linear.h``).

Weights are read where they lie: row-major ``[N, K]``, rows any stride apart, nothing repacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.codegen.cpp import isa as isa_levels
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

# Rows of x that AMX takes, 16 at a time: with more, ATen's product is compute-bound as well.
TILED_ROWS = 128


def most_rows(dtype: torch.dtype) -> int:
    """Rows of x that a product of this dtype takes on this machine."""
    tiled = dtype == torch.bfloat16 and isa_levels.detect() == "amx"
    return TILED_ROWS if tiled else MAX_ROWS


def _flat(x: Tensor) -> Tensor:
    """``x`` as rows whose elements lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _plain(weight: Tensor | None) -> bool:
    return weight is None or weight.stride(-1) == 1 or weight.shape[-1] == 1


@dataclass(frozen=True)
class Norm:
    """A norm of the input, in front of a product: its kind, weight, bias, eps, weight offset."""

    prologue: emit.Prologue
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float

    @property
    def values(self) -> tuple[Value, ...]:
        """What the kernel's last parameters get."""
        return self.weight, self.bias, self.eps, self.offset


def linear_call(
    x: Tensor,
    parts: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Call:
    """``act(norm(x) W^T + bias) + residual`` of ``x [M, K]``, for several weights at once.

    Each of ``parts`` is a weight ``[n, K]``, its bias ``[n]`` or None and the result ``[M, n]``,
    contiguous; ``residual`` is contiguous ``[M, sum of n]``.
    """
    table: list[Tensor | int | None] = []
    for weight, bias, out in parts:
        table += (weight, weight.stride(0), bias, out, weight.shape[0])
    rows = sum(weight.shape[0] for weight, _, _ in parts)
    source = emit.linear(x.dtype, x.shape[0], activation, norm.prologue if norm else None)
    sizes = (len(parts), residual, rows, x.shape[1])
    return Call(
        source,
        (x, x.stride(0), table, *sizes, *(norm.values if norm else ())),
        rows * x.shape[1] * x.element_size(),
        tuple(out for _, _, out in parts),
        tuple(weight for weight, _, _ in parts),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight[N, K]^T + bias[N]``."""
    rows = _flat(x)
    if not _fits(rows, weight):
        return OPS["linear"].reference(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    run(linear_call(rows, [(weight, _contiguous(bias), out)]))
    return out


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linears on one input, as one product."""
    rows = _flat(x)
    if not _fits(rows, weight):
        return OPS["merged_linear"].reference(x, weight, bias, sizes)
    outs = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
    run(linear_call(rows, merged_parts(weight, _contiguous(bias), sizes, outs)))
    return outs


def merged_parts(
    weight: Tensor, bias: Tensor | None, sizes: Sequence[int], outs: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """The parts of a merged linear, for `linear_call`."""
    biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
    return list(zip(weight.split(list(sizes)), biases, outs))


def mlp_call(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Call:
    """The feed-forward block of ``x [M, K]`` into ``out``; ``gate`` None leaves the gate out."""
    (inner, k), n = up.shape, down.shape[0]
    prologue = norm.prologue if norm else None
    return Call(
        emit.mlp(x.dtype, x.shape[0], activation, gate is not None, prologue),
        (
            *(x, x.stride(0), gate, up, up.stride(0), down, down.stride(0), *biases, residual),
            *(out, n, inner, k, *(norm.values if norm else ())),
        ),
        (up.numel() + down.numel()) * x.element_size(),
        (out,),
        (up,) if gate is None else (up, gate),
    )


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """``down(act(up(x)))``."""
    rows = _flat(x)
    if not (_fits(rows, up) and _fits(rows, down)):
        return OPS["mlp"].reference(x, up, down, up_bias, down_bias, activation, compute_fp32)
    out = x.new_empty((*x.shape[:-1], down.shape[0]))
    biases = (None, _contiguous(up_bias), _contiguous(down_bias))
    run(mlp_call(rows, None, up, down, biases, activation, out))
    return out


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, with gate and up read in one pass."""
    rows = _flat(x)
    fits = all(_fits(rows, w) for w in (gate, up, down)) and gate.stride(0) == up.stride(0)
    if not fits:
        return OPS["gated_mlp"].reference(
            x, gate, up, down, gate_bias, up_bias, down_bias, activation, compute_fp32
        )
    out = x.new_empty((*x.shape[:-1], down.shape[0]))
    biases = (_contiguous(gate_bias), _contiguous(up_bias), _contiguous(down_bias))
    run(mlp_call(rows, gate, up, down, biases, activation, out))
    return out


def gated_mlp_merged(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """`gated_mlp` with the gate's rows above the up's."""
    gate, up = gate_up.chunk(2)
    gate_bias, up_bias = (None, None) if gate_up_bias is None else gate_up_bias.chunk(2)
    return gated_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, activation, compute_fp32)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fits(rows: Tensor, weight: Tensor) -> bool:
    """Whether the call is one that `supports` promised: shapes and strides may have been fake."""
    return 0 < rows.shape[0] <= most_rows(rows.dtype) and weight.numel() > 0 and _plain(weight)


def _reason(x: Tensor, **weights: Tensor | None) -> str | None:
    if x.dim() == 0:
        return "x has no dimensions"
    reason = device_reason(x=x, **weights) or size_reason(x=x, **weights)
    if reason:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {name_of(x.dtype)}"
    count = 1
    for size in x.shape[:-1]:
        count *= size
    if count == 0 or x.shape[-1] == 0:
        return "x is empty"
    if count > (most := most_rows(x.dtype)):
        return f"{count} rows, more than {most}"
    for name, weight in weights.items():
        if weight is None:
            continue
        if weight.dtype != x.dtype:
            return f"x is {name_of(x.dtype)}, {name} {name_of(weight.dtype)}"
        if name.endswith("bias"):
            continue
        if weight.dim() != 2:
            return f"{name} has {weight.dim()} dimensions"
        if not _plain(weight):
            return f"{name} is not row-major: strides {list(weight.stride())}"
    return None


def _rows(x: Tensor) -> int:
    count = 1
    for size in x.shape[:-1]:
        count *= size
    return count


def supports_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    return _reason(x, weight=weight, bias=bias) or emit.why_not_built(
        emit.linear(x.dtype, _rows(x))
    )


def supports_merged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]
) -> str | None:
    return supports_linear(x, weight, bias)


def supports_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    return _reason(x, up=up, down=down, up_bias=up_bias, down_bias=down_bias) or emit.why_not_built(
        emit.mlp(x.dtype, _rows(x), activation, False)
    )


def supports_gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    reason = _reason(
        x, gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias
    )
    if reason:
        return reason
    if gate.stride(0) != up.stride(0):
        return f"gate's rows are {gate.stride(0)} apart, up's {up.stride(0)}"
    return emit.why_not_built(emit.mlp(x.dtype, _rows(x), activation, True))


def supports_gated_mlp_merged(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    return _reason(
        x, gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias
    ) or emit.why_not_built(emit.mlp(x.dtype, _rows(x), activation, True))
