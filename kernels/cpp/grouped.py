"""The launcher of products with one matrix an expert (``grouped.h``), for any number of rows.

Weights are read where they lie: rows or columns contiguous, stacked or one tensor an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit, emit_moe
from dspark_compile.kernels.cpp._launch import FLOATS, Call, Value, device_reason, name_of, run
from dspark_compile.kernels.cpp.moe import _contiguous, _flat, _known, _lie, _pass_rows, _stack
from dspark_compile.ops import OPS
from dspark_compile.ops.moe import experts_of


def call_of(
    rows: Tensor, ends: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> tuple[Call, Tensor]:
    """The call of ``dspark::grouped_linear`` on ``rows [S, K]``, whose rows are contiguous as ends
    and biases are, and its result."""
    lie = _lie(weight[0])
    assert lie is not None
    turned, ldw, _ = lie
    (count, size), outputs = rows.shape, weight[0].shape[-2]
    experts = experts_of(weight)
    out = rows.new_empty((count, outputs))
    source = emit_moe.grouped_linear(rows.dtype, ends.dtype, _pass_rows(count), turned)
    values: tuple[Value, ...] = (
        rows, rows.stride(0), ends, *_stack(weight, 3), *_stack(bias, 2), ldw, out, count, experts,
        size, outputs,
    )  # fmt: skip
    nbytes = min(experts, count) * size * outputs * rows.element_size()
    return Call(source, values, nbytes, (out,)), out


def grouped_linear(
    rows: Tensor, ends: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> Tensor:
    """``y[s] = W_e rows[s] + b_e``; see `ops.moe.grouped_linear`."""
    bias = _contiguous(bias)
    reason = supports_grouped_linear(rows, ends, weight, bias)
    if rows.shape[0] == 0 or reason is not None:
        return OPS["grouped_linear"].reference(rows, ends, weight, bias)
    call, out = call_of(_flat(rows), ends.contiguous(), weight, bias)
    run(call)
    return out


def supports_grouped_linear(
    rows: Tensor, ends: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> str | None:
    named = {f"weight {i}": t for i, t in enumerate((*weight, *bias))}
    reason = device_reason(rows=rows, ends=ends, **named)
    if reason:
        return reason
    if rows.dtype not in FLOATS:
        return f"rows are {name_of(rows.dtype)}"
    other = next((t for t in (*weight, *bias) if t.dtype != rows.dtype), None)
    if other is not None:
        return f"rows are {name_of(rows.dtype)}, a weight {name_of(other.dtype)}"
    if ends.dtype not in (torch.int64, torch.int32):
        return f"ends are {name_of(ends.dtype)}"
    if not _known(rows.shape[-1], *(n for t in weight for n in t.shape)):
        return "a weight has a dynamic size"
    if any(t.numel() == 0 for t in weight):
        return "a weight is empty"
    if len({(t.dim(), tuple(t.shape), tuple(t.stride())) for t in weight}) > 1:
        return "the weights differ from expert to expert"
    lie = _lie(weight[0])
    if lie is None or lie[2] != 1:
        return f"the weights' strides are {list(weight[0].stride())}"
    source = emit_moe.grouped_linear(rows.dtype, ends.dtype, _pass_rows(rows.shape[0]), lie[0])
    return emit.why_not_built(source)
