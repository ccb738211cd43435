"""Nodes that move elements: rows of an embedding, indexing, cat, slices put in place, roll."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp.glue_loops import NotGlue, Strides, loops
from dspark_compile.codegen.cpp.scatter import TYPES as _TYPES
from dspark_compile.passes.graph import aten

LARGEST_INDEX = 4096  # numbers, each of which every thread checks


def embedding(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    weight, index = args[0], args[1]
    if weight.dtype != out.dtype or not out.is_contiguous() or weight.stride(-1) != 1:
        raise NotGlue("an embedding whose rows are not contiguous")
    if index.numel() > 256:
        raise NotGlue(f"an embedding of {index.numel()} rows")
    w, i, y = pointer(weight), pointer(index), pointer(out)
    kind, features = _TYPES[weight.dtype], weight.shape[1]
    lines = []
    if not all(isinstance(n, int) for n in (*index.shape, *index.stride())):
        raise NotGlue("an embedding of indices at dynamic places")
    places = [
        sum(n * stride for n, stride in zip(at, index.stride(), strict=True))
        for at in itertools.product(*(range(n) for n in index.shape))
    ]
    lines.append("{")
    lines.append(f"static const int64_t places[] = {{{', '.join(map(str, places))}}};")
    lines.append(f"for (int64_t n = 0; n < {len(places)}; ++n) {{")
    lines.append(f"  const int64_t row = ((const {_TYPES[index.dtype]}*){i})[places[n]];")
    lines.append(f"  if (row < 0 || row >= {weight.shape[0]}) return 3;")
    lines.append(
        f"  std::memcpy(({kind}*){y} + n * {features}, (const {kind}*){w} + row *"
        f" {weight.stride(0)}, {features * weight.element_size()});"
    )
    return [*lines, "}", "}"]


def index(
    args: list[Any], out: Tensor, pointer: Callable[[Tensor], str], from_end: bool = True
) -> list[str]:
    """``x[:, i]``, ``x[i, :, j]``: integer tensors in any places, broadcast with each other.
    Negative ones count from the end, or are outside."""
    x, given = args
    indices = {axis: i for axis, i in enumerate(given) if i is not None}
    for i in indices.values():
        if not isinstance(i, Tensor) or i.dtype not in (torch.int64, torch.int32):
            raise NotGlue("an index that is no tensor of integers")
        if i.numel() > LARGEST_INDEX:
            raise NotGlue(f"an index of {i.numel()} numbers")
    shape = torch.broadcast_shapes(*(i.shape for i in indices.values()))
    axes = sorted(indices)
    together = axes == list(range(axes[0], axes[-1] + 1))
    front = axes[0] if together else 0  # where the indices' dimensions stand in the result
    kept = [x.stride(a) for a in range(x.dim()) if a not in indices]
    kind = _TYPES[x.dtype]
    source = Strides((*kept[:front], *[0] * len(shape), *kept[front:]))
    checks, views, at = [], [source], []
    body = [f"const {kind}* from = &((const {kind}*){pointer(x)})[{{0}}];"]
    for n, (axis, i) in enumerate(indices.items()):
        size, spread = x.shape[axis], i.expand(shape)
        steps = [0] * out.dim()
        steps[front : front + len(shape)] = spread.stride()
        views.append(Strides(tuple(steps)))
        read = f"((const {_TYPES[i.dtype]}*){pointer(i)})"
        # Every thread looks at all of them, so that all leave together.
        least = -size if from_end else 0
        looked = [
            f"const int64_t row = {read}[{{0}}];",
            f"if (row < {least}LL || row >= {size}LL) return 3;",
        ]
        checks += ["{", *loops(i, [i], looked, alone=True), "}"]
        body.append(f"int64_t n{n} = {read}[{{{n + 1}}}];")
        body.append(f"if (n{n} < 0) n{n} += {size};")
        at.append(f"n{n} * {x.stride(axis)}")
    body.append(f"(({kind}*){pointer(out)})[{{out}}] = from[{' + '.join(at)}];")
    return [*checks, *loops(out, views, body)]


def cat(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    parts, axis = args[0], args[1] if len(args) > 1 else 0
    pieces, start = [], 0
    for part in parts:
        if not isinstance(part, Tensor) or part.dtype != out.dtype:
            raise NotGlue("a cat of several dtypes")
        if part.dim() != out.dim():
            raise NotGlue("a cat with an empty part")
        if not all(isinstance(n, int) for n in part.shape):
            raise NotGlue("a cat of a dynamic size")
        pieces.append((part, start, 0, part.shape[axis]))
        start += part.shape[axis]
    return _pieces(pieces, axis, out, pointer)


def in_place_of(
    node: fx.Node, args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]
) -> list[str]:
    """A tensor with some of its slices replaced, which lie side by side."""
    x, part, rest = args[0], args[1], args[3:]
    axis = (args[2] if len(args) > 2 else 0) % out.dim()
    size = out.shape[axis]
    if node.target is aten.select_scatter.default:
        begin, part = rest[0] % size, part.unsqueeze(axis)
    else:
        begin, step = rest[0] if rest else None, rest[2] if len(rest) > 2 else 1
        if step != 1 or not isinstance(begin, (int, type(None))):
            raise NotGlue(f"{node.target} of slices apart")
        begin = min(max((begin or 0) + (size if (begin or 0) < 0 else 0), 0), size)
    if part.dtype != out.dtype or x.dtype != out.dtype:
        raise NotGlue(f"{node.target} of several dtypes")
    count = part.shape[axis]
    pieces = [(x, 0, 0, begin), (part, begin, 0, count)]
    pieces.append((x, begin + count, begin + count, size - begin - count))
    return _pieces(pieces, axis, out, pointer)


def roll(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    x, shifts, axes = [*args, []][:3]
    if len(shifts) != 1 or len(axes) != 1 or not isinstance(shifts[0], int):
        raise NotGlue("a roll of several dimensions")
    size = x.shape[axes[0]]
    shift = shifts[0] % max(size, 1)
    pieces = [(x, shift, 0, size - shift), (x, 0, size - shift, shift)]
    return _pieces(pieces, axes[0], out, pointer)


def _pieces(
    pieces: Sequence[tuple[Tensor, int, int, int]],
    axis: int,
    out: Tensor,
    pointer: Callable[[Tensor], str],
) -> list[str]:
    """Copies of ``size`` slices of a tensor from ``begin`` on to ``start`` in ``out``."""
    lines: list[str] = []
    kind = _TYPES[out.dtype]
    for part, start, begin, size in pieces:
        if size == 0:
            continue
        to, source = out.narrow(axis, start, size), part.narrow(axis, begin, size)
        y = f"((({kind}*){pointer(out)}) + {start * out.stride(axis)})"
        x = f"(((const {kind}*){pointer(part)}) + {begin * part.stride(axis)})"
        lines += ["{", *loops(to, [source], [f"{y}[{{out}}] = {x}[{{0}}];"]), "}"]
    return lines
