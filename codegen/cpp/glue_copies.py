"""Nodes that move elements: rows of an embedding, indexing, cat, slices put in place, roll."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp.glue_loops import SMALL, NotGlue, Strides, loops
from dspark_compile.codegen.cpp.glue_pointwise import constant
from dspark_compile.codegen.cpp.scatter import TYPES as _TYPES
from dspark_compile.codegen.cpp.scatter import store
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
    Negative ones count from the end, or are outside. Of an input that grows (a cache), rows are
    read: the one dimension whose size is not known."""
    x, given = args
    indices = {axis: i for axis, i in enumerate(given) if i is not None}
    for axis in range(x.dim()):
        known = isinstance(x.shape[axis], int)
        if not (known or axis in indices) or not (
            isinstance(x.stride(axis), int) or (known and x.shape[axis] == 1)
        ):
            raise NotGlue(f"rows of a tensor of a dynamic size, {list(x.shape)}")
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
        limit = f"{size}LL" if isinstance(size, int) else pointer(size)
        looked = [
            f"const int64_t row = {read}[{{0}}];",
            f"if (row < {least}LL || row >= {limit}) return 3;",
        ]
        checks += ["{", *loops(i, [i], looked, alone=True), "}"]
        body.append(f"int64_t n{n} = {read}[{{{n + 1}}}];")
        if from_end:
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


def repeat(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    x, times = args[0], args[1]
    if not out.is_contiguous():
        raise NotGlue("a repeat with strides")
    lead = len(times) - x.dim()
    sizes, strides = [*[1] * lead, *x.shape], [*[0] * lead, *x.stride()]
    whole = out.view([n for pair in zip(times, sizes) for n in pair])
    source = Strides(tuple(n for stride in strides for n in (0, stride)))
    kind = _TYPES[x.dtype]
    body = f"(({kind}*){pointer(out)})[{{out}}] = ((const {kind}*){pointer(x)})[{{0}}];"
    return loops(whole, [source], [body])


def pad(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    """A frame of numbers around a tensor, or (negative) some of its slices left out."""
    x, sizes, value = [*args, 0][:3]
    if not all(isinstance(n, int) for n in sizes) or not isinstance(value, (int, float)):
        raise NotGlue("a pad of a dynamic size")
    _done_by_one("a pad", out)
    to, source = out, x
    for i in range(len(sizes) // 2):
        axis, (before, behind) = x.dim() - 1 - i, sizes[2 * i : 2 * i + 2]
        count = max(x.shape[axis] + min(before, 0) + min(behind, 0), 0)
        source = source.narrow(axis, min(max(-before, 0), x.shape[axis] - count), count)
        to = to.narrow(axis, min(max(before, 0), out.shape[axis] - count), count)
    kind = _TYPES[out.dtype]
    compute = "double" if out.dtype.is_floating_point else "int64_t"
    number = constant(float(value) if compute == "double" else int(value), compute)
    fill = store(pointer(out), out.dtype, "{out}", number.replace("C(", f"{compute}("))
    first, begin = to.storage_offset(), source.storage_offset() - x.storage_offset()
    y = f"(({kind}*){pointer(out)} + {first - out.storage_offset()})"
    z = f"((const {kind}*){pointer(x)} + {begin})"
    copy = f"{y}[{{out}}] = {z}[{{0}}];"
    return ["{", *loops(out, [], [fill]), "}", "{", *loops(to, [source], [copy]), "}"]


def _done_by_one(what: str, out: Tensor) -> None:
    """What writes an element twice is for one thread.

    Raises:
        NotGlue: there is more to write than one thread does alone.
    """
    if out.numel() > SMALL:
        raise NotGlue(f"{what} of {out.numel()} elements")


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
        if not isinstance(begin, (int, type(None))) or not isinstance(step, int):
            raise NotGlue(f"{node.target} of a dynamic slice")
        begin = min(max((begin or 0) + (size if (begin or 0) < 0 else 0), 0), size)
    if part.dtype != out.dtype or x.dtype != out.dtype:
        raise NotGlue(f"{node.target} of several dtypes")
    count = part.shape[axis]
    if node.target is aten.slice_scatter.default and step != 1:
        _done_by_one("slices apart", out)
        return _pieces([(x, 0, 0, size)], axis, out, pointer) + _apart(
            part, axis, begin, step, out, pointer
        )
    pieces = [(x, 0, 0, begin), (part, begin, 0, count)]
    pieces.append((x, begin + count, begin + count, size - begin - count))
    return _pieces(pieces, axis, out, pointer)


def _apart(
    part: Tensor, axis: int, begin: int, step: int, out: Tensor, pointer: Callable[[Tensor], str]
) -> list[str]:
    """``part`` to every ``step``-th slice of ``out`` from ``begin`` on."""
    kind, to = _TYPES[out.dtype], list(out.stride())
    first, to[axis] = begin * to[axis], step * to[axis]
    write = f"(({kind}*){pointer(out)} + {first})[{{1}}] = ((const {kind}*){pointer(part)})[{{0}}];"
    return ["{", *loops(part, [part, Strides(tuple(to))], [write], alone=True), "}"]


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
