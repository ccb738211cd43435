"""Products with weights of 8 or 4 bits, activations as they are.

A quantised weight is whole numbers ``q [N, K]`` with one scale for each row, or for each group of
``K / G`` neighbours in a row: ``scale [N]`` or ``[N, G]``, a zero point of the same shape or none.
It stands for ``(q - zero_point) * scale``. The ops take it as

    int8    ``q`` itself, ``int8 [N, K]``
    int4    ``q`` in -8 … 7, packed by `pack_int4`: ``uint8 [ceil(N / 16), ceil(K / 32), 4, 16, 4]``

`pack_int4` makes units of 16 rows by 32 numbers: four lines of 8 numbers, of which each row has
four bytes; byte ``j`` holds number ``j`` in its low half and number ``4 + j`` in its high half,
both in two's complement, and zeros behind ``N`` and ``K``. Rows lie side by side in the lanes of a
vector register so: a product needs no sum over lanes, a group's scales are one vector, and four
bytes of a lane are what the integer dot products of CPUs and their tile units take.

``dequantize_weight`` is what passes raise the spellings of dequantisation to: the passes that look
for linears and MLPs then see ordinary ones over it, and `fuse_dequantize_weight` joins the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define
from .mlp import _activation

ROWS, GROUP, LINE = 16, 32, 8  # of a unit: its rows, its numbers a row, those of a line


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int, int]:
    """The shape of an int4 matrix of that size, packed."""
    return -(-rows // ROWS), -(-columns // GROUP), GROUP // LINE, ROWS, LINE // 2


def pack_int4(weight: Tensor) -> Tensor:
    """``int8 [N, K]`` with values in -8 … 7 as ``uint8`` of `packed_shape`.

    Raises:
        ValueError: a value does not fit 4 bits, or the weight is not an int8 matrix.
    """
    if weight.dim() != 2 or weight.dtype != torch.int8:
        raise ValueError(f"pack_int4 takes an int8 matrix, not {weight.dtype} {weight.dim()}-d")
    if weight.numel() and bool(((weight < -8) | (weight > 7)).any()):
        raise ValueError("a weight does not fit 4 bits")
    rows, columns = weight.shape
    nibbles = F.pad(weight.view(torch.uint8) & 15, (0, -columns % GROUP, 0, -rows % ROWS))
    blocks, units, lines, _, _ = packed_shape(rows, columns)
    halves = nibbles.view(blocks, ROWS, units, lines, 2, LINE // 2).permute(0, 2, 3, 4, 1, 5)
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).contiguous()


def unpack_int4(packed: Tensor, rows: int, columns: int) -> Tensor:
    """What `pack_int4` packed: ``int8 [rows, columns]``."""
    blocks, units = packed.shape[:2]
    halves = torch.stack((packed & 15, packed >> 4), 3).permute(0, 4, 1, 2, 3, 5)
    numbers = halves.reshape(blocks * ROWS, units * GROUP)[:rows, :columns]
    return (numbers ^ 8).to(torch.int8) - 8


def _dequantized(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(weight - zero_point) * scale`` in float32 (or wider), rounded once to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, columns = weight.shape
    scales = scale.reshape(rows, -1, 1).to(wide)
    groups = weight.reshape(rows, scales.shape[1], -1).to(wide)
    if zero_point is not None:
        groups = groups - zero_point.reshape(rows, -1, 1).to(wide)
    return (groups * scales).reshape(rows, columns).to(dtype)


@define(
    "dequantize_weight(Tensor weight, Tensor scale, Tensor? zero_point, ScalarType dtype) "
    "-> Tensor",
    family="linear",
    fake=lambda weight, scale, zero_point, dtype: weight.new_empty(weight.shape, dtype=dtype),
)
def dequantize_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(weight - zero_point) * scale`` in ``dtype``, for ``weight`` int8 ``[N, K]``."""
    return _dequantized(weight, scale, zero_point, dtype)


def _product_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    # A packed weight's rows are counted in blocks.
    rows = weight.shape[0] if weight.dim() == 2 else scale.shape[0]
    return x.new_empty((*x.shape[:-1], rows))


_TAIL = "Tensor weight, Tensor scale, Tensor? zero_point=None, Tensor? bias=None) -> Tensor"


@define(f"linear_int8(Tensor x, {_TAIL}", family="linear", fake=_product_fake)
def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``x [..., K] @ ((weight - zero_point) * scale)^T + bias`` for ``weight`` int8 ``[N, K]``."""
    return F.linear(x, _dequantized(weight, scale, zero_point, x.dtype), bias).contiguous()


@define(f"linear_int4(Tensor x, {_TAIL}", family="linear", fake=_product_fake)
def linear_int4(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`linear_int8` for a weight packed by `pack_int4`."""
    q = unpack_int4(weight, scale.shape[0], x.shape[-1])
    return linear_int8(x, q, scale, zero_point, bias)


def _block_fake(
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
    rows = down[0].shape[0] if down[0].dim() == 2 else down[1].shape[0]
    return x.new_empty((*x.shape[:-1], rows))


_BLOCK = (
    "(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? down_bias, str activation, bool compute_fp32=False) -> Tensor"
)


@define(f"gated_mlp_int8{_BLOCK}", family="mlp", fake=_block_fake)
def gated_mlp_int8(
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
    """``down(act(gate(x)) * up(x))``; each weight is ``[weight, scale]`` or, with a zero point,
    ``[weight, scale, zero_point]`` as `linear_int8` takes it."""
    gated = linear_int8(x, *gate, **_rest(gate, gate_bias))
    other = linear_int8(x, *up, **_rest(up, up_bias))
    if compute_fp32:
        gated, other = gated.float(), other.float()
    hidden = (_activation(activation)(gated) * other).to(x.dtype)
    return linear_int8(hidden, *down, **_rest(down, down_bias))


@define(f"gated_mlp_int4{_BLOCK}", family="mlp", fake=_block_fake)
def gated_mlp_int4(
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
    """`gated_mlp_int8` for weights packed by `pack_int4`."""
    inner = up[1].shape[0]
    sizes = (x.shape[-1], x.shape[-1], inner)
    whole = [
        [unpack_int4(weight[0], weight[1].shape[0], size), *weight[1:]]
        for weight, size in zip((gate, up, down), sizes, strict=True)
    ]
    return gated_mlp_int8(x, *whole, gate_bias, up_bias, down_bias, activation, compute_fp32)


def _rest(weight: list[Tensor], bias: Tensor | None) -> dict[str, Tensor | None]:
    """What `linear_int8` takes behind a weight's two or three tensors."""
    return {"bias": bias} if len(weight) == 3 else {"zero_point": None, "bias": bias}
