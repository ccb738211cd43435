"""A native program: kernels with their arguments, run as one native call (``program.h``).

Everything that a call needs lies in one block of 8-byte words (`Layout`): the arguments of every
stage, the arrays that they point to, the table of stages. It is written once; a call only fills in
what can change, the addresses of its inputs and outputs and sizes that are symbols.

Intermediate results share one arena: a buffer's place is free again after its last reader.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import build, emit
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.codegen.cpp.layout import STAGE_WORDS, Layout, Result, rounded
from dspark_compile.runtime.expert_load import cell

if TYPE_CHECKING:
    from dspark_compile.kernels.cpp._launch import Call

# How much of the next weights a thread asks for while it waits.
AHEAD_BYTES = 128 * 1024


class PlanError(Exception):
    """A program cannot be made; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's first element lies: a buffer and an offset in bytes."""

    buffer: int
    offset: int


@dataclass
class Buffer:
    """Memory that stages read and write.

    Attributes:
        nbytes: its size; of an input unknown, 0.
        given: the input's number; None for the arena's.
        result: whether it outlives the call.
        random: whether it is filled with uniform numbers before every call.
        first, last: the stages that touch it.
    """

    nbytes: int = 0
    given: int | None = None
    result: bool = False
    random: bool = False
    first: int = -1
    last: int = -1


@dataclass
class Program:
    """Collects stages over fake tensors; `finish` makes the callable.

    A tensor is known by its storage. One that no stage wrote and that is no input cannot be read:
    it is a copy that somebody made while planning.
    """

    buffers: list[Buffer] = field(default_factory=list)
    stages: list[Call] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)
    _kept: list[Tensor] = field(default_factory=list)

    def add_input(self, x: Tensor, number: int) -> None:
        """``x`` is the call's tensor ``number``."""
        key = x.untyped_storage()._cdata
        if key not in self._known:
            self._known[key] = len(self.buffers)
            self.buffers.append(Buffer(given=number))
            self._kept.append(x)
        elif self.buffers[self._known[key]].given is None:
            raise PlanError("an input shares its memory with an intermediate result")

    def random(self, count: int) -> Tensor:
        """``count`` float32 numbers in [0, 1), others at every call: torch's generator's."""
        x = torch.empty(count)
        self._known[x.untyped_storage()._cdata] = len(self.buffers)
        self.buffers.append(Buffer(nbytes=x.nbytes, random=True))
        self._kept.append(x)
        return x

    def knows(self, x: Tensor) -> bool:
        """Whether ``x`` lies in an input or in what a stage wrote."""
        return x.untyped_storage()._cdata in self._known

    def place(self, x: Tensor) -> Place:
        """Where ``x`` lies.

        Raises:
            PlanError: nothing has written it.
        """
        key = x.untyped_storage()._cdata
        if key not in self._known:
            raise PlanError(f"a copy of a tensor {list(x.shape)} would be needed")
        buffer = self._known[key]
        given = self.buffers[buffer].given
        offset = x.storage_offset()
        if not isinstance(offset, int):
            raise PlanError("a tensor begins at a dynamic offset")
        if given is not None:
            # The call's tensor may itself begin inside its storage.
            offset -= self._kept_input(buffer).storage_offset()
        return Place(buffer, offset * x.element_size())

    def _kept_input(self, buffer: int) -> Tensor:
        for x in self._kept:
            if self._known[x.untyped_storage()._cdata] == buffer:
                return x
        raise KeyError(buffer)

    def add(self, call: Call, name: str) -> None:
        """Append a stage.

        Raises:
            PlanError: it reads what nothing wrote.
        """
        stage = len(self.stages)
        outs = {x.untyped_storage()._cdata for x in call.outs}
        for x in call.outs:
            key = x.untyped_storage()._cdata
            if key not in self._known:
                nbytes = x.untyped_storage().nbytes()
                if not isinstance(nbytes, int):
                    raise PlanError("an intermediate result has a dynamic size")
                self._known[key] = len(self.buffers)
                self.buffers.append(Buffer(nbytes=nbytes))
                self._kept.append(x)
        for x in tensors(call):
            if x.untyped_storage()._cdata not in outs:
                self.place(x)
            self._touch(x, stage)
        self.stages.append(call)
        self.names.append(name)

    def _touch(self, x: Tensor, stage: int) -> None:
        buffer = self.buffers[self._known[x.untyped_storage()._cdata]]
        if buffer.first < 0:
            buffer.first = stage
        buffer.last = stage

    def keep(self, x: Tensor) -> None:
        """``x`` is a result of the program."""
        buffer = self.buffers[self.place(x).buffer]
        if buffer.given is None:
            buffer.result = True

    def arena(self) -> tuple[dict[int, int], int]:
        """Offsets of the intermediate buffers, and the size of all: the first gap that fits."""
        live: list[tuple[int, int, int]] = []  # offset, end, last stage
        offsets: dict[int, int] = {}
        size = 0
        order = sorted(
            (
                i
                for i, b in enumerate(self.buffers)
                if b.given is None and not b.result and not b.random
            ),
            key=lambda i: self.buffers[i].first,
        )
        for i in order:
            buffer = self.buffers[i]
            live = sorted(x for x in live if x[2] >= buffer.first)
            need, at = rounded(buffer.nbytes), 0
            for offset, end, _ in live:
                if offset - at >= need:
                    break
                at = max(at, end)
            offsets[i] = at
            live.append((at, at + need, buffer.last))
            size = max(size, at + need)
        return offsets, size


def tensors(call: Call) -> list[Tensor]:
    """The tensors among a call's values."""
    flat: list[Any] = []
    for value in call.values:
        flat += value if isinstance(value, (list, tuple)) else [value]
    return [x for x in flat if isinstance(x, Tensor)]


RUNNER = """// Runs a table of stages: the same library for every program.
#include "program.h"

using namespace dspark;

// Word `where` of the block becomes the address of buffer `which` plus `offset`.
struct Fix {
  int64_t where, which, offset;
};

static const Stage* table_of(int64_t* block, const Fix* fixes, int64_t count,
                             const int64_t* bases) {
  for (int64_t i = 0; i < count; ++i)
    block[fixes[i].where] = bases[fixes[i].which] + fixes[i].offset;
  return (const Stage*)block;
}

extern "C" __attribute__((visibility("default"))) int dspark_program(
    int64_t* block, const Fix* fixes, int64_t fix_count, const int64_t* bases, int64_t stages,
    void* memory, int64_t threads, int64_t ahead, int64_t* spent) {
  const Stage* table = table_of(block, fixes, fix_count, bases);
  if (spent != nullptr)
    return run_program<true>(table, stages, (char*)memory, int(threads), ahead, spent);
  return run_program<false>(table, stages, (char*)memory, int(threads), ahead, nullptr);
}

// The same with one argument: a step leaves nothing of Python's in the CPU's caches, and each
// object that the next call touches is a miss. `took` becomes the nanoseconds inside.
struct Once {
  int64_t* block;
  const Fix* fixes;
  int64_t fix_count;
  const int64_t* bases;
  int64_t stages;
  void* memory;
  int64_t threads, ahead, took;
};

extern "C" __attribute__((visibility("default"))) int dspark_once(Once* o) {
  const int64_t start = now();
  const int status = dspark_program(o->block, o->fixes, o->fix_count, o->bases, o->stages,
                                    o->memory, o->threads, o->ahead, nullptr);
  o->took = now() - start;
  return status;
}

// Up to `count` rounds: the program, then choose(arguments), which writes tokens [rows] and returns
// how many rows are not done, or -1 where there is nothing to draw from. The tokens of round i go
// to history + i * rows; *taken says how many rounds there were: after one with no row left there
// is none. `spent` as above.
extern "C" __attribute__((visibility("default"))) int dspark_rounds(
    int64_t* block, const Fix* fixes, int64_t fix_count, const int64_t* bases, int64_t stages,
    void* memory, int64_t threads, int64_t ahead, int64_t (*choose)(void*), void* arguments,
    const int64_t* tokens, int64_t rows, int64_t count, int64_t* history, int64_t* taken,
    int64_t* spent) {
  *taken = 0;
  if (count <= 0) return 0;
  const Stage* table = table_of(block, fixes, fix_count, bases);
  bool drawn = true;
  const auto again = [&] {
    const int64_t open = choose(arguments);
    if (open < 0) return drawn = false;
    for (int64_t i = 0; i < rows; ++i) history[*taken * rows + i] = tokens[i];
    return ++*taken < count && open != 0;
  };
  const int status =
      spent != nullptr
          ? run_rounds<true>(table, stages, (char*)memory, int(threads), ahead, spent, again)
          : run_rounds<false>(table, stages, (char*)memory, int(threads), ahead, nullptr, again);
  return drawn ? status : kUndrawable;
}
"""


def _runner(level: str) -> tuple[Any, Any, Any]:
    library = build.load("program", RUNNER, level)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    once, rounds = library.dspark_program, library.dspark_rounds
    once.argtypes = [
        *(pointer, pointer, number, pointer, number, pointer, number, number, pointer),
    ]
    rounds.argtypes = [
        *(pointer, pointer, number, pointer, number, pointer, number, number, pointer, pointer),
        *(pointer, number, number, pointer, pointer, pointer),
    ]
    library.dspark_once.argtypes = [pointer]
    once.restype = rounds.restype = library.dspark_once.restype = ctypes.c_int
    return once, rounds, library.dspark_once


class NativeProgram:
    """A finished program: call it with the tensors and numbers of the graph's inputs.

    Raises:
        build.BuildError: a kernel cannot be built.
    """

    def __init__(self, layout: Layout):
        level = isa_levels.detect()
        self.layout = layout
        self.names, self.sources = layout.names, layout.stage_sources
        emit.build_all(layout.sources, level)
        self._run, self._run_rounds, self._run_once = _runner(level)
        self._results, self._dynamic = layout.results, layout.dynamic
        self._lock = threading.Lock()
        self._entries = [emit.stage(source, level) for source in self.sources]
        self._block = (ctypes.c_int64 * len(layout.words))(*layout.words)
        start = ctypes.addressof(self._block)
        for stage, entry in enumerate(self._entries):
            self._block[STAGE_WORDS * stage] = entry.address
        for where, target in layout.inner:
            self._block[where] = start + 8 * target
        for where, site, experts, nbytes in layout.cells:
            self._block[where] = cell(site, experts, nbytes).address
        flat = [x for fix in layout.fixes for x in fix]
        self._fixes = (ctypes.c_int64 * len(flat))(*flat)
        self._fix_count = len(layout.fixes)
        self._arena = _bytes(layout.arena_bytes + 64)
        arena = rounded(self._arena.data_ptr())
        self._bases = (ctypes.c_int64 * layout.buffers)()
        for buffer, offset in layout.arena:
            self._bases[buffer] = arena + offset
        self.draws: list[Tensor] = []
        for buffer, count in layout.draws:
            self.draws.append(torch.empty(count, device="cpu"))
            self._bases[buffer] = self.draws[-1].data_ptr()
        self._inputs, self._made, self._numbers = layout.inputs, layout.made, layout.numbers
        self._memory: torch.Tensor | None = None
        self._memory_threads = 0
        self._bound: object = None  # whose addresses stand in the block
        self.arena_bytes = layout.arena_bytes

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        """Run once; returns the results.

        Raises:
            IndexError: a position lies outside of a cache, or an index outside of an embedding.
        """
        with self._lock:
            return self._call(args, None)

    def timed(self, args: Sequence[Any], spent: Any) -> list[Tensor]:
        """`__call__`, adding each stage's nanoseconds to the array ``spent``."""
        with self._lock:
            return self._call(args, spent)

    def bind(self, args: Sequence[Any]) -> BoundProgram:
        """`__call__` on these tensors and numbers, as a function without arguments.

        The tensors must keep their memory. Every call writes its results to the same tensors and
        returns those: read them before the next one.
        """
        return BoundProgram(self, args)

    def _point(self, args: Sequence[Any], made: dict[int, Tensor]) -> None:
        """Fill in where inputs and results lie, and sizes."""
        bases = self._bases
        for buffer, given in self._inputs:
            bases[buffer] = args[given].data_ptr()
        for buffer, tensor in made.items():
            bases[buffer] = tensor.data_ptr()
        if self._dynamic:
            known = {symbol: int(args[number]) for symbol, number in self._numbers.items()}
            for where, expression in self._dynamic:
                self._block[where] = int(expression.xreplace(known))

    def _call(self, args: Sequence[Any], spent: Any) -> list[Tensor]:
        made = {i: _bytes(nbytes) for i, nbytes in self._made}
        self._bound = None
        self._point(args, made)
        self._go(spent)
        return [self._view(r, made, args) for r in self._results]

    def _prepare(self) -> tuple[int, int]:
        """(address of the stages' own memory, threads)."""
        threads = torch.get_num_threads()
        if threads != self._memory_threads:
            need = max(entry.need(self._block, i, threads) for i, entry in enumerate(self._entries))
            self._memory = _bytes(need + 4096)
            self._memory_threads = threads
        assert self._memory is not None
        return (self._memory.data_ptr() + 4095) // 4096 * 4096, threads

    def _go(self, spent: Any) -> None:
        memory, threads = self._prepare()
        for x in self.draws:
            x.uniform_()
        status = self._run(
            self._block, self._fixes, self._fix_count, self._bases, len(self._entries),
            memory, threads, AHEAD_BYTES, spent,
        )  # fmt: skip
        if status:
            _raise(status)

    def _view(self, r: Result, made: dict[int, Tensor], args: Sequence[Any]) -> Tensor:
        flat = made[r.buffer].view(r.dtype)
        return flat.as_strided(r.shape, r.stride, r.offset // r.dtype.itemsize)


def _bytes(count: int) -> Tensor:
    """Memory, whatever device the caller has made the default."""
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _raise(status: int) -> None:
    from dspark_compile.kernels.cpp._launch import raise_for

    raise_for(status, "decode step")


class BoundProgram:
    """A `NativeProgram` on tensors that stay where they are.

    Attributes:
        spent: None, or an array of int64: `rounds` adds each stage's nanoseconds to it.
    """

    def __init__(self, program: NativeProgram, args: Sequence[Any]):
        self._program, self._args = program, list(args)
        self.spent: Any | None = None
        self._packed: Tensor | None = None
        self._made = {i: _bytes(nbytes) for i, nbytes in program._made}
        self.results = [program._view(r, self._made, args) for r in program._results]

    def __call__(self) -> list[Tensor]:
        """Run once; the same tensors every time."""
        program = self._program
        with program._lock:
            if program.draws:
                self._enter()
                program._go(None)
                return self.results
            if program._bound is not self or self._packed is not program._memory:
                self._pack()
            if status := program._run_once(self._once_address):
                _raise(status)
        return self.results

    def _pack(self) -> None:
        """Everything that a call passes on, as one block: ``Once`` of the runner. Good as long as
        the stages' memory is the same, whose size is that of a number of threads."""
        places = self.addresses()
        self._once = (ctypes.c_int64 * 9)(*places, self._program._memory_threads, AHEAD_BYTES, 0)
        self._once_address = ctypes.addressof(self._once)
        self._packed = self._program._memory

    @property
    def took(self) -> float:
        """Seconds that the last call, of a program that draws nothing, spent in native code."""
        return self._once[8] * 1e-9

    @property
    def draws(self) -> list[Tensor]:
        """Uniform numbers that every call wants others of."""
        return self._program.draws

    def stage_seconds(self) -> list[float]:
        """Run once; the seconds of each stage, its wait for the other threads included."""
        program = self._program
        spent = (ctypes.c_int64 * len(program.names))()
        with program._lock:
            self._enter()
            program._go(spent)
        return [x * 1e-9 for x in spent]

    def _enter(self) -> None:
        program = self._program
        if program._bound is not self:
            program._point(self._args, self._made)
            program._bound = self

    @property
    def lock(self) -> threading.Lock:
        """To be held while something else runs the program by its `addresses`."""
        return self._program._lock

    def addresses(self) -> tuple[int, int, int, int, int, int]:
        """What ``BoundStages`` of ``speculate.h`` holds: the block, its fixes and their number, the
        bases, the number of stages and the stages' memory. Good as long as nobody else runs it.

        Raises:
            RuntimeError: the program draws random numbers, which nobody would renew.
        """
        program = self._program
        if program.draws:
            raise RuntimeError("a program that draws random numbers is run by its own call")
        self._enter()
        memory, _ = program._prepare()
        block, fixes, bases = (
            ctypes.addressof(x) for x in (program._block, program._fixes, program._bases)
        )
        return block, fixes, program._fix_count, bases, len(program._entries), memory

    def rounds(self, chooser: Any, tokens: Tensor, count: int) -> Tensor:
        """Up to ``count`` times: run, then ``chooser`` (`NativeChooser` over the results), which
        writes ``tokens [R, 1]``. Their history ``[taken, R]``: it ends with the round after which
        every row is done.

        Raises:
            IndexError: a position lies outside of a cache, or an index outside of an embedding.
            RuntimeError: the program draws random numbers, which nobody would renew.
        """
        program, rows = self._program, tokens.shape[0]
        if program.draws:
            raise RuntimeError("a program that draws random numbers is run by its own call")
        history = torch.empty(count, rows, dtype=torch.long, device="cpu")
        taken = ctypes.c_int64()
        with program._lock:
            self._enter()
            memory, threads = program._prepare()
            status = program._run_rounds(
                program._block, program._fixes, program._fix_count, program._bases,
                len(program._entries), memory, threads, AHEAD_BYTES,
                ctypes.cast(chooser.function, ctypes.c_void_p), chooser.address,
                tokens.data_ptr(), rows, count, history.data_ptr(), ctypes.byref(taken), self.spent,
            )  # fmt: skip
        if status:
            _raise(status)
        return history[: taken.value]
