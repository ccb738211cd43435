"""Launchers of routers and experts (``moe_router.h``, ``moe.h``), for any number of tokens.

Weights are read where they lie: ``[E, out, in]`` with contiguous rows, or turned, ``[E, in, out]``,
gate and up side by side, above each other or alternating, stacked or one tensor an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit, emit_moe
from dspark_compile.kernels.cpp._launch import (
    FLOATS,
    Call,
    Value,
    device_reason,
    name_of,
    run,
)
from dspark_compile.ops import OPS
from dspark_compile.ops.moe import NORMALISATIONS, SCORINGS, experts_of
from dspark_compile.runtime.expert_load import cell

_MAX_K = 64


def _rows(x: Tensor) -> Any:
    count = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def _pass_rows(tokens: Any) -> int:
    """Rows of a pass: one kernel for decode, one for all else."""
    return 1 if isinstance(tokens, int) and tokens == 1 else 16


def _flat(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _known(*sizes: Any) -> bool:
    return all(isinstance(n, int) for n in sizes)


# -- the router -----------------------------------------------------------------------------------


def router_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: str,
    logits: Tensor,
    weights: Tensor,
    indices: Tensor,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    group_fill: float = 0.0,
) -> Call:
    """The router of ``x [T, K]`` into its three results, all contiguous."""
    tokens, experts = x.shape[0], weight.shape[0]
    spec = emit_moe.Router(
        x.dtype, weight.dtype, logits.dtype, weights.dtype,
        None if bias is None else bias.dtype, None if correction is None else correction.dtype,
        min(_pass_rows(tokens), 16),
    )  # fmt: skip
    values: tuple[Value, ...] = (
        x, x.stride(0), weight, weight.stride(0), bias, correction, logits, weights, indices,
        float(scale), float(eps), float(group_fill), tokens, experts, x.shape[1], top_k,
        SCORINGS.index(scoring), NORMALISATIONS.index(normalise), groups, top_groups,
        int(group_score == "top2"),
    )  # fmt: skip
    nbytes = weight.numel() * weight.element_size()
    return Call(emit_moe.router(spec), values, nbytes, (logits, weights, indices), (weight,))


def _router_results(x: Tensor, weight: Tensor, args: Sequence[Any]) -> tuple[Tensor, ...]:
    top_k, logits_dtype, weights_dtype = args[4], args[7], args[8]
    lead = x.shape[:-1]
    return (
        x.new_empty((*lead, weight.shape[0]), dtype=logits_dtype),
        x.new_empty((*lead, top_k), dtype=weights_dtype),
        x.new_empty((*lead, top_k), dtype=torch.int64),
    )


def router_of(rows: Tensor, x: Tensor, args: Sequence[Any]) -> tuple[Call, tuple[Tensor, ...]]:
    """The call of ``dspark::moe_router(*args)`` on ``rows``, x's, and its results."""
    _, weight, bias, correction, top_k, scoring, normalise, _, _, *rest = args
    outs = _router_results(x, weight, args)
    flat = [o.reshape(-1, o.shape[-1]) for o in outs]
    if correction is not None:
        correction = correction.reshape(-1)
    call = router_call(rows, weight, bias, correction, top_k, scoring, normalise, *flat, *rest)
    return call, outs


def moe_router(
    x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, *rest: Any
):
    """``(logits, weights, indices)``; see `ops.moe.moe_router`."""
    args = (
        x,
        weight,
        None if bias is None else bias.contiguous(),
        None if correction is None else correction.contiguous(),
        *rest,
    )
    rows = _flat(x)
    if rows.shape[0] == 0 or supports_moe_router(*args) is not None:
        return OPS["moe_router"].reference(*args)
    call, outs = router_of(rows, x, args)
    run(call)
    return outs


def supports_moe_router(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    scoring: str,
    normalise: str,
    logits_dtype: torch.dtype,
    weights_dtype: torch.dtype,
    scale: float = 1.0,
    eps: float = 0.0,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    group_fill: float = 0.0,
) -> str | None:
    reason = device_reason(x=x, weight=weight, bias=bias, correction=correction)
    if reason:
        return reason
    for name, dtype in (
        ("x", x.dtype), ("weight", weight.dtype), ("logits", logits_dtype),
        ("weights", weights_dtype), ("bias", None if bias is None else bias.dtype),
        ("correction", None if correction is None else correction.dtype),
    ):  # fmt: skip
        if dtype is not None and dtype not in FLOATS:
            return f"{name} is {name_of(dtype)}"
    if not _known(*weight.shape, x.shape[-1]) or weight.numel() == 0:
        return f"weight has a dynamic size or none, {list(weight.shape)}"
    if weight.stride(-1) != 1:
        return f"weight is not row-major: strides {list(weight.stride())}"
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        return f"x is {name_of(x.dtype)}, weight {name_of(weight.dtype)}"
    if logits_dtype != torch.float32 and not (logits_dtype == weight.dtype == x.dtype):
        return f"logits are {name_of(logits_dtype)}, weight {name_of(weight.dtype)}"
    if top_k > weight.shape[0]:
        return f"top-{top_k} of {weight.shape[0]} experts"
    rows = _pass_rows(_rows(x))
    spec = emit_moe.Router(
        x.dtype, weight.dtype, logits_dtype, weights_dtype,
        None if bias is None else bias.dtype, None if correction is None else correction.dtype,
        rows,
    )  # fmt: skip
    return emit.why_not_built(emit_moe.router(spec))


# -- the experts ----------------------------------------------------------------------------------


def _lie(tensor: Tensor) -> tuple[bool, int, int] | None:
    """(turned, ld, gap) of a matrix, the last two dimensions of ``tensor``; None if neither its
    rows nor its columns are runs."""
    rows, columns = tensor.stride(-2), tensor.stride(-1)
    if columns == 1 or tensor.shape[-1] == 1:
        return False, rows, 1
    if rows in (1, 2):
        return True, columns, rows
    return None


def _stack(tensors: Sequence[Tensor], dims: int) -> tuple[Value, Value, int]:
    """What a stack's three parameters get; ``dims`` of the stacked tensor."""
    if not tensors:
        return None, None, 0
    if tensors[0].dim() == dims:
        return tensors[0], None, tensors[0].stride(0)
    return None, list(tensors), 0


def _spec(
    x: Tensor, indices: Tensor, weights: Tensor, gate: Sequence[Tensor], up: Sequence[Tensor],
    down: Sequence[Tensor], activation: str, limits: Sequence[float], weigh_input: bool,
    norm: Tensor | None,
) -> emit_moe.Experts:  # fmt: skip
    up_lie, down_lie = _lie(up[0]), _lie(down[0])
    assert up_lie is not None and down_lie is not None
    return emit_moe.Experts(
        x.dtype, indices.dtype, weights.dtype, _pass_rows(_rows(x)), bool(gate), up_lie[0],
        down_lie[0], weigh_input, None if norm is None else norm.dtype, activation,
        emit_moe.limits_of(limits),
    )  # fmt: skip


def experts_call(
    x: Tensor,
    out: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    site: str = "",
) -> Call:
    """The experts of ``x [T, K]`` into contiguous ``out [T, N]``; indices and weights are
    contiguous ``[T, k]``, biases and the norm's weight contiguous."""
    spec = _spec(x, indices, weights, gate, up, down, activation, limits, weigh_input, norm)
    tokens, k = indices.shape
    inner, features = up[0].shape[-2:]
    outputs, experts = down[0].shape[-2], experts_of(down)
    one = (len([*gate[:1], *up[:1]]) * inner * features + outputs * inner) * x.element_size()
    stacks: list[Value] = []
    for tensors in (gate, up, down):
        stacks += _stack(tensors, 3)
    for tensors in (gate_bias, up_bias, down_bias):
        stacks += _stack(tensors, 2)
    (_, up_ld, up_gap), (_, down_ld, down_gap) = _lie(up[0]), _lie(down[0])  # type: ignore[misc]
    values: tuple[Value, ...] = (
        x, x.stride(0), indices, weights, *stacks, up_ld, up_gap, down_ld, down_gap, norm,
        float(eps), out, cell(site, experts, one).address, tokens, k, experts, features, inner,
        outputs,
    )  # fmt: skip
    return Call(emit_moe.experts(spec), values, min(experts, tokens * k) * one, (out,))


def _contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    site: str = "",
) -> Tensor:
    """``sum of weight * expert(x)``; see `ops.moe.moe_experts`."""
    rows = _flat(x)
    args = (
        x, indices.contiguous(), weights.contiguous(), gate, up, down, _contiguous(gate_bias),
        _contiguous(up_bias), _contiguous(down_bias), activation, limits, weigh_input,
        None if norm is None else norm.contiguous(), eps, site,
    )  # fmt: skip
    if rows.shape[0] == 0 or indices.shape[-1] == 0 or supports_moe_experts(*args) is not None:
        return OPS["moe_experts"].reference(*args)
    k = indices.shape[-1]
    out = x.new_empty((*x.shape[:-1], down[0].shape[-2]))
    flat = (args[1].reshape(-1, k), args[2].reshape(-1, k))  # type: ignore[union-attr]
    run(experts_call(rows, out.reshape(rows.shape[0], -1), *flat, *args[3:]))  # type: ignore[arg-type]
    return out


def supports_moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias: Sequence[Tensor],
    up_bias: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    activation: str,
    limits: Sequence[float] = (),
    weigh_input: bool = False,
    norm: Tensor | None = None,
    eps: float = 0.0,
    site: str = "",
) -> str | None:
    matrices = [*gate, *up, *down]
    biases = [*gate_bias, *up_bias, *down_bias]
    named = {f"weight {i}": t for i, t in enumerate((*matrices, *biases))}
    reason = device_reason(x=x, indices=indices, weights=weights, norm=norm, **named)
    if reason:
        return reason
    if x.dtype not in FLOATS:
        return f"x is {name_of(x.dtype)}"
    other = next((t for t in (*matrices, *biases) if t.dtype != x.dtype), None)
    if other is not None:
        return f"x is {name_of(x.dtype)}, a weight {name_of(other.dtype)}"
    if weights.dtype not in FLOATS or (norm is not None and norm.dtype not in FLOATS):
        return "the choices' weights or the norm's are no float32, bfloat16 or float16"
    if indices.dtype not in (torch.int64, torch.int32):
        return f"indices are {name_of(indices.dtype)}"
    if not _known(x.shape[-1], indices.shape[-1], *(n for t in matrices for n in t.shape)):
        return "a weight has a dynamic size"
    if any(t.numel() == 0 for t in matrices):
        return "a weight is empty"
    if norm is not None and indices.shape[-1] > _MAX_K:
        return f"a norm behind more than {_MAX_K} experts a token"
    for name, tensors in (("gate", gate), ("up", up), ("down", down)):
        if len({(t.dim(), tuple(t.shape), tuple(t.stride())) for t in tensors}) > 1:
            return f"{name} differs from expert to expert"
        if tensors and _lie(tensors[0]) is None:
            return f"{name}'s strides are {list(tensors[0].stride())}"
    if gate:
        if len(gate) != len(up) or gate[0].stride() != up[0].stride():
            return "gate and up lie differently"
        turned, _, gap = _lie(up[0])  # type: ignore[misc]
        if turned and gap == 2:
            a, b = gate[0], up[0]
            apart = abs(_offset(a) - _offset(b))
            same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
            if len(gate) > 1 or not same or apart != 1:
                return "gate and up do not alternate in one tensor"
    elif up and _lie(up[0])[2] != 1:  # type: ignore[index]
        return f"up's strides are {list(up[0].stride())}"
    if _lie(down[0])[2] != 1:  # type: ignore[index]
        return f"down's strides are {list(down[0].stride())}"
    spec = _spec(x, indices, weights, gate, up, down, activation, limits, weigh_input, norm)
    return emit.why_not_built(emit_moe.experts(spec))


def _offset(x: Tensor) -> int:
    offset = x.storage_offset()
    return offset if isinstance(offset, int) else -2
