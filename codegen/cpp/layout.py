"""`Layout`: a native program as plain data, before any address is known.

All that a call needs lies in one block of 8-byte words. A layout says what stands in it: numbers,
which words point to others, which get the address of a buffer, which a size that is a symbol. It
holds no tensor and no address, so it can be kept between processes (`stored`).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspark_compile.runtime.expert_load import CellAddress

if TYPE_CHECKING:
    from dspark_compile.codegen.cpp.emit import Source
    from dspark_compile.codegen.cpp.program import Program

# Words of a stage in the table: function, arguments, what comes next, how much of it.
STAGE_WORDS = 4


@dataclass(frozen=True)
class Result:
    """An output of the program: a view of a result buffer."""

    buffer: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """A program.

    Attributes:
        names: of the stages.
        sources: the kernels, each once; ``kernels``: which one each stage runs.
        words: the block. Its first ``STAGE_WORDS`` for each stage are the table of stages.
        inner: ``(word, word)``: the first becomes the address of the second.
        fixes: ``(word, buffer, offset)``: it becomes an address in a buffer, at every call.
        cells: ``(word, site, experts, bytes)``: it becomes the address of what counts a site's load
            (`runtime.expert_load.cell`).
        dynamic: ``(word, expression)`` over the symbols of ``numbers``.
        numbers: symbol: the number of the input that has its value.
        buffers: how many there are. Each is one of:
        arena: ``(buffer, offset)``, intermediate results; ``arena_bytes`` of all together,
        draws: ``(buffer, count)``, uniform numbers, new at every call,
        inputs: ``(buffer, input)``, the memory of an input,
        made: ``(buffer, bytes)``, results.
        results: views of these.
    """

    names: list[str]
    sources: list[Source]
    kernels: list[int]
    words: list[int]
    inner: list[tuple[int, int]]
    fixes: list[tuple[int, int, int]]
    cells: list[tuple[int, str, int, int]]
    dynamic: list[tuple[int, Any]]
    numbers: dict[Any, int]
    buffers: int
    arena: list[tuple[int, int]]
    arena_bytes: int
    draws: list[tuple[int, int]]
    inputs: list[tuple[int, int]]
    made: list[tuple[int, int]]
    results: list[Result]

    @property
    def stage_sources(self) -> list[Source]:
        """The kernel of each stage."""
        return [self.sources[i] for i in self.kernels]


def rounded(nbytes: int) -> int:
    """``nbytes``, up to a multiple of 64."""
    return (nbytes + 63) // 64 * 64


def lay_out(program: Program, results: Sequence[Result], numbers: dict[Any, int]) -> Layout:
    """The layout of a program whose outputs are ``results``."""
    words: list[int] = [0] * (STAGE_WORDS * len(program.stages))
    fixes: list[tuple[int, int, int]] = []
    inner: list[tuple[int, int]] = []
    cells: list[tuple[int, str, int, int]] = []
    dynamic: list[tuple[int, Any]] = []
    sources: dict[Source, int] = {}

    def put(value: Any) -> None:
        if isinstance(value, Tensor):
            place = program.place(value)
            fixes.append((len(words), place.buffer, place.offset))
            words.append(0)
        elif isinstance(value, CellAddress):
            cells.append((len(words), *value.key))
            words.append(0)
        elif isinstance(value, float):
            words.append(struct.unpack("q", struct.pack("d", value))[0])
        elif isinstance(value, torch.SymInt):
            dynamic.append((len(words), value.node.expr))
            words.append(0)
        else:
            words.append(int(value or 0))

    for i, call in enumerate(program.stages):
        arrays: list[tuple[int, Any]] = []
        sources.setdefault(call.source, len(sources))
        inner.append((STAGE_WORDS * i + 1, len(words)))
        for (kind, _), value in zip(call.source.parameters, call.values, strict=True):
            if isinstance(value, (list, tuple)):
                arrays.append((len(words), value))
                words.append(0)
            else:
                put(float(value) if kind == "f" else value)  # type: ignore[arg-type]
        for where, values in arrays:
            inner.append((where, len(words)))
            for value in values:
                put(value)
        following = program.stages[i + 1].weights if i + 1 < len(program.stages) else ()
        inner.append((STAGE_WORDS * i + 2, len(words)))
        words[STAGE_WORDS * i + 3] = len(following)
        for weight in following:
            put(weight)
            put(weight.shape[0])
            put(weight.stride(0) * weight.element_size())
    offsets, size = program.arena()
    buffers = list(enumerate(program.buffers))
    return Layout(
        names=list(program.names),
        sources=list(sources),
        kernels=[sources[call.source] for call in program.stages],
        words=words,
        inner=inner,
        fixes=fixes,
        cells=cells,
        dynamic=dynamic,
        numbers=dict(numbers),
        buffers=len(buffers),
        arena=list(offsets.items()),
        arena_bytes=size,
        draws=[(i, b.nbytes // 4) for i, b in buffers if b.random],
        inputs=[(i, b.given) for i, b in buffers if b.given is not None],
        made=[(i, b.nbytes) for i, b in buffers if b.result and b.given is None],
        results=list(results),
    )
