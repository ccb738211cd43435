"""Fuse dequantised weights into the experts that read them.

    moe_experts(x, …, [(q - zero) * scale], …)              over stacks, torchao's int8 tensors of
                                                            three dimensions
    moe_experts(x, …, [dequantize_weight(q, s, z), …], …)   over modules
        -> moe_experts_int8, or moe_experts_int4 where all numbers fit 4 bits

Rows may be cut out of a weight (gate and up of one stack): they are cut out of its numbers, scales
and zero points then.

Conditions: a kernel of this device reads such experts; all weights are quantised; int8 stacks have
one scale a row. Otherwise all experts are dequantised at every call, as the code has it.

Worth: what is read is the numbers of the experts that are hit, in place of writing all experts
and reading them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.codegen.registry import implementations
from dspark_compile.kernels import cpp
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    peel,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.packed_weights import fits_4_bits, packed_fake, packed_input

_CAST = aten._to_copy.default
_HINT = "all experts are dequantised at every call"
_DEPTH = 12


def kernel_for(ctx: PassContext, device: torch.device) -> bool:
    """Whether some kernel reads quantised experts on ``device`` under these options, or the graph
    is for a runtime that does."""
    if ctx.shared.get("quantised_experts"):
        return True
    found = implementations("moe_experts_int8", ctx.options.kernels, device)
    return any(item.name == "cpp" for item in found)


class _Unknown(Exception):
    """A weight is none that the kernels read; the message says why."""


@dataclass(frozen=True)
class _Part:
    """A tensor of the graph with slices of it: ``(dim, start, stop, step)`` each."""

    node: fx.Node
    cuts: tuple[tuple[Any, ...], ...] = ()

    def value(self) -> torch.Tensor:
        found = val(self.node)
        for cut in self.cuts:
            found = aten.slice.Tensor(found, *cut)
        return found

    def emit(self, make: Callable[..., fx.Node]) -> fx.Node:
        node = self.node
        for cut in self.cuts:
            node = make(aten.slice.Tensor, node, *cut)
        return node


# Numbers, scales, zero points: each one stack, or a part for each expert; no zero points: empty.
_Weight = tuple[list[_Part], list[_Part], list[_Part]]


class FuseQuantizedExperts(Pass):
    """See the module's docstring."""

    name = "fuse_quantized_experts"
    kind = "experts"
    stage = "optimise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        if ctx.shared.get("quantised_experts"):
            return  # exported as they are
        for node in list(graph.nodes):
            if is_dialect_op(node, "moe_experts"):
                matrices = [m for stack in node.args[3:6] for m in stack]
                if any(_of_integers(m) for m in matrices):
                    yield Match(node, [node])

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node = match.anchor
        x = node.args[0]
        device = val(x).device  # type: ignore[arg-type]
        if not kernel_for(ctx, device):
            return Problem(f"no kernel reads quantised experts ({device.type})", _HINT)
        if len(node.args) > 12 and node.args[12] is not None:
            return Problem("a norm stands behind quantised experts", _HINT)
        try:
            weights = [_read(stack, dtype(x)) for stack in node.args[3:6]]  # type: ignore[arg-type]
        except _Unknown as error:
            return Problem(str(error), _HINT)
        reason = None
        for bits in (4, 8):
            if bits == 4 and not all(
                fits_4_bits(part.node) and not part.cuts and val(part.node).dim() == 2
                for numbers, _, _ in weights
                for part in numbers
            ):
                continue
            with ctx.fake_mode:
                fakes = _arguments(
                    node,
                    weights,
                    lambda p: packed_fake(p.node, ctx) if bits == 4 else p.value(),  # noqa: B023
                    _Part.value,
                )
            values = fx.node.map_arg(fakes, val)
            reason = cpp.supports(f"moe_experts_int{bits}", *values)
            if reason is None:
                match.captures.update(weights=weights, bits=bits)
                return None
        return Problem(reason or "", _HINT)

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, bits = match.anchor, match["bits"]
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        def numbers(part: _Part) -> fx.Node:
            return packed_input(part.node, ctx) if bits == 4 else part.emit(make)

        found = {p: numbers(p) for w in match["weights"] for p in w[0]}
        graph.inserting_before(node)
        args = _arguments(node, match["weights"], found.__getitem__, lambda part: part.emit(make))
        new = make(dialect(f"moe_experts_int{bits}"), *args)
        node.replace_all_uses_with(new)
        ctx.moved(node, new)


def _arguments(
    node: fx.Node,
    weights: list[_Weight],
    numbers: Callable[[_Part], Any],
    others: Callable[[_Part], Any],
) -> tuple[Any, ...]:
    """The arguments of the op over quantised weights."""
    x, indices, share, _, _, _, *rest = node.args
    site = node.args[14] if len(node.args) > 14 else ""
    activation, limits, weigh_input = [*rest[3:6], *([], False)[len(rest) - 4 :]][:3]
    lists = [
        *([numbers(p) for p in w[0]] for w in weights),
        *([others(p) for p in w[1]] for w in weights),
        *([others(p) for p in w[2]] for w in weights),
    ]
    return (x, indices, share, *lists, *rest[:3], activation, limits, weigh_input, site)


def _of_integers(node: Any) -> bool:
    """Whether a weight is computed from int8 numbers."""
    for _ in range(_DEPTH):
        if not is_tensor(node):
            return False
        if dtype(node) == torch.int8 or is_dialect_op(node, "dequantize_weight"):
            return True
        if not is_op(node, _CAST, aten.slice.Tensor, aten.sub.Tensor, aten.mul.Tensor,
                     aten.permute.default, aten.select.int, aten.alias.default):  # fmt: skip
            return False
        if is_op(node, aten.mul.Tensor) and _of_integers(node.args[1]):
            return True
        node = node.args[0]
    return False


def _read(stack: list[Any], kind: torch.dtype) -> _Weight:
    """The weights ``stack`` as numbers, scales and zero points.

    Raises:
        _Unknown: they are none, or to be rounded to another dtype than ``kind``.
    """
    found = [_matrix(m) for m in stack]
    if any(dtype(m) != kind for m in stack):
        raise _Unknown(f"weights are dequantised to another dtype than {kind}")
    zeros = [z for _, _, z in found if z is not None]
    if len(zeros) not in (0, len(found)):
        raise _Unknown("some experts have zero points and some have none")
    return [q for q, _, _ in found], [s for _, s, _ in found], zeros


def _matrix(node: Any) -> tuple[_Part, _Part, _Part | None]:
    """``(q - zero) * scale`` of one matrix or one stack."""
    cuts: list[tuple[Any, ...]] = []
    node = peel(node)
    while is_op(node, aten.slice.Tensor):
        cuts.insert(0, node.args[1:])
        node = peel(node.args[0])
    rank = val(node).dim()
    if any(int(cut[0]) % rank == rank - 1 for cut in cuts if cut):
        raise _Unknown("the quantised weight is cut along its input")
    if is_dialect_op(node, "dequantize_weight"):
        q, scale, zero, _ = node.args
    else:
        q, scale, zero = _stack(node)
    made = [None if n is None else _Part(n, tuple(c for c in cuts if c)) for n in (q, scale, zero)]
    return made[0], made[1], made[2]  # type: ignore[return-value]


def _stack(node: Any) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """The inputs of ``(q - zero) * scale`` over ``q [E, N, K]``, scale and zero ``[E, N, 1]``."""
    node = _plain(node)
    scale = zero = None
    if is_op(node, aten.mul.Tensor):
        left, right = node.args
        left, scale = (left, right) if _of_integers(left) else (right, left)
        node = _plain(left)
    if is_op(node, aten.sub.Tensor) and not node.kwargs:
        node, zero = _plain(node.args[0]), node.args[1]
    if not is_tensor(node) or dtype(node) != torch.int8 or val(node).dim() != 3:
        what = getattr(node, "target", node)
        raise _Unknown(f"the stack is made of integers with {what}, not as (q - zero) * scale")
    if scale is None:
        raise _Unknown("the stack has no scale")
    experts, rows, _ = shape(node)
    for what, item in (("scales", scale), ("zero points", zero)):
        if item is None:
            continue
        base = _plain(item)
        if not is_tensor(base) or not same_shape(shape(base), (experts, rows, 1)):
            found = list(shape(base)) if is_tensor(base) else "a number"
            raise _Unknown(f"the stack's {what} are {found}: not one for each row")
    return node, _plain(scale), None if zero is None else _plain(zero)


def _plain(node: Any) -> Any:
    """``node`` without casts to floating types: the kernels compute in float32."""
    node = peel(node)
    while is_op(node, _CAST) and dtype(node).is_floating_point:
        if not (dtype(node.args[0]).is_floating_point or dtype(node.args[0]) == torch.int8):
            break
        node = peel(node.args[0])
    return node
