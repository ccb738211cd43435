"""Launchers of linear layers and feed-forward blocks of up to 16 rows (``linear.h``).

Weights are read where they lie: row-major ``[N, K]``, rows any stride apart, nothing repacked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import (
    FLOATS,
    MAX_ROWS,
    device_reason,
    name_of,
    pointer,
    run,
    size_reason,
    threads_for,
)
from dspark_compile.ops import OPS

MAX_PARTS = 8


def _flat(x: Tensor) -> Tensor:
    """``x`` as rows whose elements lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _plain(weight: Tensor | None) -> bool:
    return weight is None or weight.stride(-1) == 1 or weight.shape[-1] == 1


def linear_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outs: Sequence[Tensor],
    *,
    activation: str = "identity",
    residual: Tensor | None = None,
    norm: tuple[emit.Prologue, Tensor | None, Tensor | None, float, float] | None = None,
    threads: int | None = None,
) -> None:
    """``act(norm(x) W^T + bias) + residual`` into ``outs``, which share its columns.

    ``x`` is ``[M, K]``; ``norm`` is the prologue with its weight, bias, eps and weight offset;
    ``residual`` is contiguous ``[M, N]``.
    """
    count, (n, k) = x.shape[0], weight.shape
    starts = [0]
    for out in outs:
        starts.append(starts[-1] + out.shape[-1])
    more: tuple[object, ...] = ()
    if norm is not None:
        more = (pointer(norm[1]), pointer(norm[2]), norm[3], norm[4])
    run(
        emit.linear(x.dtype, count, activation, None if norm is None else norm[0]),
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0)),
        *(pointer(bias), pointer(residual)),
        (ctypes.c_void_p * len(outs))(*(o.data_ptr() for o in outs)),
        (ctypes.c_int64 * len(starts))(*starts),
        *(len(outs), n, k, *more),
        threads or threads_for(n * k * weight.element_size()),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight[N, K]^T + bias[N]``."""
    rows = _flat(x)
    if not _fits(rows, weight):
        return OPS["linear"].reference(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    linear_into(rows, weight, _contiguous(bias), [out])
    return out


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linears on one input, as one product."""
    rows = _flat(x)
    if not _fits(rows, weight) or len(sizes) > MAX_PARTS:
        return OPS["merged_linear"].reference(x, weight, bias, sizes)
    outs = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
    linear_into(rows, weight, _contiguous(bias), outs)
    return outs


def mlp_into(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
    out: Tensor,
    *,
    residual: Tensor | None = None,
    norm: tuple[emit.Prologue, Tensor | None, Tensor | None, float, float] | None = None,
    threads: int | None = None,
) -> None:
    """The feed-forward block of ``x [M, K]`` into ``out``; ``gate`` None leaves the gate out."""
    (inner, k), n = up.shape, down.shape[0]
    more: tuple[object, ...] = ()
    if norm is not None:
        more = (pointer(norm[1]), pointer(norm[2]), norm[3], norm[4])
    prologue = None if norm is None else norm[0]
    run(
        emit.mlp(x.dtype, x.shape[0], activation, gate is not None, prologue),
        *(x.data_ptr(), x.stride(0), pointer(gate), up.data_ptr(), up.stride(0)),
        *(down.data_ptr(), down.stride(0), *(pointer(b) for b in biases), pointer(residual)),
        *(out.data_ptr(), n, inner, k, *more),
        threads or threads_for((up.numel() + down.numel()) * x.element_size()),
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
    mlp_into(rows, None, up, down, biases, activation, out)
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
    mlp_into(rows, gate, up, down, biases, activation, out)
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
    return 0 < rows.shape[0] <= MAX_ROWS and weight.numel() > 0 and _plain(weight)


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
    if count > MAX_ROWS:
        return f"{count} rows, more than {MAX_ROWS}"
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
    if len(sizes) > MAX_PARTS:
        return f"{len(sizes)} linears, more than {MAX_PARTS}"
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
