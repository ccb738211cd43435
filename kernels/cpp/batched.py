"""The launcher of products with a matrix for each of a batch, of few rows (``batched.h``)."""

from __future__ import annotations

from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import (
    MAX_ROWS,
    Call,
    device_reason,
    dtype_reason,
    name_of,
    run,
    size_reason,
)
from dspark_compile.ops import OPS


def _turned(weight: Tensor) -> bool | None:
    """Whether the columns of a matrix lie side by side, else its rows; None if neither do."""
    if weight.stride(1) == 1 or weight.shape[1] == 1:
        return False
    return True if weight.stride(2) == 1 or weight.shape[2] == 1 else None


def bmm_call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Call, Tensor]:
    """The call of ``x [B, M, K]``, its rows contiguous, times ``weight [B, K, N]``, plus ``bias
    [N]``, and its result ``[B, M, N]``, which lies as ``[M, B, N]``: the next product finds the
    heads side by side."""
    batch, rows, size = x.shape
    outputs, turned = weight.shape[2], _turned(weight)
    assert turned is not None
    out = x.new_empty((rows, batch, outputs)).transpose(0, 1)
    values = (
        *(x, x.stride(0), x.stride(1), weight, weight.stride(0)),
        *(weight.stride(1 if turned else 2), out, out.stride(0), out.stride(1)),
        *(batch, size, outputs, bias),
    )
    nbytes = weight.numel() * weight.element_size()
    return Call(emit.batched(x.dtype, rows, turned), values, nbytes, (out,)), out


def other_way(a: Tensor, b: Tensor) -> bool:
    """Whether ``b``'s columns are the few rows, and ``a`` the matrix: a product transposed."""
    return a.dim() > 1 and b.dim() > 1 and a.shape[-2] > MAX_ROWS >= b.shape[-1]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a [..., M, K]`` times ``b [..., K, N]``, contiguous."""
    if other_way(a, b):
        return matmul(b.mT, a.mT).mT.contiguous()
    if supports_matmul(a, b) is not None:
        return OPS["matmul"].reference(a, b)
    x = a.flatten(0, -3)
    call, out = bmm_call(x if x.stride(2) == 1 else x.contiguous(), b.flatten(0, -3))
    run(call)
    return out.unflatten(0, a.shape[:-2]).contiguous()


def supports_matmul(a: Tensor, b: Tensor) -> str | None:
    if other_way(a, b):
        return supports_matmul(b.mT, a.mT)
    reason = device_reason(a=a, b=b) or dtype_reason(a=a, b=b) or size_reason(a=a, b=b)
    if reason:
        return reason
    if a.dtype != b.dtype:
        return f"a is {name_of(a.dtype)}, b {name_of(b.dtype)}"
    if a.dim() < 3 or a.dim() != b.dim() or a.shape[:-2] != b.shape[:-2]:
        return f"{list(a.shape)} times {list(b.shape)}"
    if not 0 < a.shape[-2] <= MAX_ROWS:
        return f"{a.shape[-2]} rows, not 1 to {MAX_ROWS}"
    if 0 in (*a.shape, *b.shape):
        return "a product of nothing"
    flat = b.flatten(0, -3)
    turned = _turned(flat)
    if turned is None or flat.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return f"the matrices' strides are {list(b.stride())}"
    return emit.why_not_built(emit.batched(a.dtype, a.shape[-2], turned))


def supports_turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why ``x [..., K]`` times a weight ``[N, K]`` that lies ``[K, N]`` is not `bmm_call`'s, as a
    batch of one; None if it is."""
    if bias is not None and (bias.dtype != x.dtype or bias.dim() != 1 or bias.stride(0) != 1):
        return f"a bias {list(bias.shape)} of {name_of(bias.dtype)}"
    return supports_matmul(x.reshape(1, -1, x.shape[-1]), weight.t()[None])
