"""Expert weights of 8 and 4 bits for ``com.microsoft::QMoE``.

A stack of experts ``[E, N, K]`` in the graph is a list of ``dspark::dequantize_weight`` nodes, or
one of them with views (halves, transpositions) behind it. `stacked` gives the numbers, scales and
zero points in the stack's own layout; `packed` writes them as the op reads them.

What the CPU kernel computes exactly (tried on ONNX Runtime 1.31): one scale a row, with 8 or 4
bits, and blocks of 4 bits. Over blocks of 8 bits it rounds the activations to 8 bits as well, an
error near 1e-2, so such stacks are refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import VIEWS, aten, is_dialect_op, is_op

from .program import Program
from .shapes import is_reshape
from .weights import _args, groups_of

_MOVES = (
    *VIEWS, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.clone.default, aten.unsqueeze.default, aten.reshape.default,
)  # fmt: skip


@dataclass
class Stack:
    """Quantised experts.

    Attributes:
        numbers: int8 ``[E, N, K]``.
        scales: ``[E, N, K / size]``.
        zeros: int8, of the shape of ``scales``; None if all are 0.
    """

    numbers: Tensor
    scales: Tensor
    zeros: Tensor | None

    @property
    def bits(self) -> int:
        """The width that all numbers and zero points fit."""
        every = [self.numbers, *([] if self.zeros is None else [self.zeros])]
        return 4 if all(int(t.min()) >= -8 and int(t.max()) <= 7 for t in every) else 8


def stacked(program: Program, nodes: list[fx.Node]) -> Stack | None:
    """The quantised experts that ``nodes`` dequantise, None if one is anything else."""
    found = [_wide(program, n) for n in nodes]
    if not found or any(f is None for f in found):
        return None
    parts: list[Tensor] = []
    for which in range(3):
        tensors = [f[which] for f in found]  # type: ignore[index]
        parts.append(
            tensors[0] if len(tensors) == 1 and tensors[0].dim() == 3 else torch.stack(tensors)
        )
    numbers, scales, zeros = parts
    if numbers.dim() != 3:
        return None
    size = _group(scales, zeros)
    return Stack(
        numbers.contiguous(),
        scales[..., ::size].contiguous(),
        zeros[..., ::size].contiguous() if bool(zeros.any()) else None,
    )


def _wide(program: Program, node: fx.Node) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(numbers, scales, zeros)``, each of the shape of ``node``'s value: views move all alike."""
    if is_dialect_op(node, "dequantize_weight"):
        numbers, scale, zero, _ = _args(node, 4)
        q, s = program.evaluate(numbers), program.evaluate(scale)
        z = None if zero is None else program.evaluate(zero)
        if q is None or s is None or (zero is not None and z is None):
            return None
        rows, columns = q.shape
        s = s.reshape(rows, -1).float()
        if columns % s.shape[1]:
            return None
        z = torch.zeros_like(s, dtype=torch.int8) if z is None else z.reshape(rows, -1)
        size = columns // s.shape[1]
        return q, s.repeat_interleave(size, 1), z.to(torch.int8).repeat_interleave(size, 1)
    if not (is_op(node, *_MOVES) or is_reshape(node)) or len(node.all_input_nodes) != 1:
        return None
    below = _wide(program, node.all_input_nodes[0])
    if below is None:
        return None
    target: Any = aten.reshape.default if is_op(node, aten.view.default) else node.target
    moved = []
    for tensor in below:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _, t=tensor: t)
        moved.append(target(*args, **kwargs))
    return moved[0], moved[1], moved[2]


def _group(scales: Tensor, zeros: Tensor) -> int:
    """How many columns in a row share a scale and zero point: the largest number that divides."""
    columns = scales.shape[-1]
    size = columns
    while size > 1:
        if columns % size == 0:
            groups = scales.unflatten(-1, (-1, size)), zeros.unflatten(-1, (-1, size))
            if all(torch.equal(g, g[..., :1].expand_as(g)) for g in groups):
                return size
        size -= 1
    return 1


@dataclass
class Packed:
    """What QMoE reads: uint8 ``[E, N, K * bits / 8]``, float ``[E, N]`` or ``[E, N, K / block]``,
    and zero points packed like numbers or None. ``block`` 0 is one scale a row."""

    data: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int


def packed(first: Stack, second: Stack) -> tuple[Packed, Packed] | str:
    """Both products of the experts as QMoE reads them, or why it does not."""
    bits = max(first.bits, second.bits)
    block = 0
    if any(s.scales.shape[-1] > 1 for s in (first, second)):
        if bits == 8:
            return "QMoE rounds activations over blocks of 8 bits: experts are dequantised"
        found = [groups_of(s.numbers[0], s.scales[0], None) for s in (first, second)]
        if any(f is None for f in found):
            return "the groups are no blocks of 16 or more, a power of two: experts are dequantised"
        block = min(f[0] for f in found)  # type: ignore[index]
    if any(s.numbers.shape[-1] * bits % 8 for s in (first, second)):
        return "a row of 4-bit weights is no whole number of bytes: experts are dequantised"
    return _pack(first, bits, block), _pack(second, bits, block)


def _pack(stack: Stack, bits: int, block: int) -> Packed:
    scales, zeros = stack.scales, stack.zeros
    columns = stack.numbers.shape[-1]
    if block:
        repeat = columns // scales.shape[-1] // block
        scales = scales.repeat_interleave(repeat, -1)
        zeros = None if zeros is None else zeros.repeat_interleave(repeat, -1)
    else:
        scales = scales.squeeze(-1)
        zeros = None if zeros is None else zeros.squeeze(-1)
    return Packed(
        _unsigned(stack.numbers, bits),
        scales.contiguous(),
        None if zeros is None else _unsigned(zeros, bits),
        bits,
        block,
    )


def _unsigned(values: Tensor, bits: int) -> Tensor:
    """Numbers with ``2^(bits-1)`` added; two 4-bit numbers to a byte, the first in the low half."""
    if bits == 8:
        return (values.to(torch.int16) + 128).to(torch.uint8)
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1), value=-8)
    unsigned = (values + 8).to(torch.uint8)
    return unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def interleaved(gate: Stack, up: Stack) -> Stack | None:
    """Rows of gate and up in turns ``[E, 2 I, K]``; None if their groups differ."""
    size = min(gate.scales.shape[-1], up.scales.shape[-1])
    most = max(gate.scales.shape[-1], up.scales.shape[-1])
    if most % size:
        return None

    def alike(t: Tensor) -> Tensor:
        return t.repeat_interleave(most // t.shape[-1], -1)

    def turns(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack((a, b), 2).flatten(1, 2)

    zeros = None
    if gate.zeros is not None or up.zeros is not None:
        both = [
            alike(torch.zeros_like(s.scales, dtype=torch.int8) if s.zeros is None else s.zeros)
            for s in (gate, up)
        ]
        zeros = turns(*both)
    return Stack(
        turns(gate.numbers, up.numbers), turns(alike(gate.scales), alike(up.scales)), zeros
    )


def dequantised(packed: Packed) -> Tensor:
    """The float32 stack ``[E, N, K]`` that `packed` stands for."""
    q = packed.data
    zero: Any = 2.0 ** (packed.bits - 1)
    scales = packed.scales if packed.block else packed.scales.unsqueeze(-1)

    def spread(t: Tensor) -> Tensor:
        return torch.stack((t & 15, t >> 4), -1).flatten(-2) if packed.bits == 4 else t

    q = spread(q).float()
    size = q.shape[-1] // scales.shape[-1]
    if packed.zeros is not None:
        zero = spread(packed.zeros).float()
        if packed.block:
            zero = zero[..., : scales.shape[-1]].repeat_interleave(size, -1)
        else:
            zero = zero[..., : q.shape[-2]].unsqueeze(-1)
    return (q - zero) * scales.repeat_interleave(size, -1)
