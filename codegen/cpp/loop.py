"""A native program repeated: its steps, and the copies between them, as one native call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.codegen.cpp.program import AHEAD_BYTES, BoundProgram
from dspark_compile.kernels.cpp._launch import raise_for

if TYPE_CHECKING:
    from dspark_compile.runtime.user_loop import LoopPlan, Origin

VISIT = 64  # steps between two looks at Python's signals

LOOP = """// Repeats a program: the same library for every loop.
#include <cstdint>
#include <cstring>

// After (or before) step k, `bytes` bytes go from `from` to `to + k * stride`. What lies ready for
// many steps is read on by `ahead` bytes a step, from the first of a call.
struct Move {
  char* to;
  const char* from;
  int64_t bytes, stride, ahead;
};

typedef int (*Program)(int64_t*, const void*, int64_t, const int64_t*, int64_t, void*, int64_t,
                       int64_t, int64_t*);

static void all(const Move* moves, int64_t count, int64_t k, int64_t first) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(moves[i].to + k * moves[i].stride, moves[i].from + (k - first) * moves[i].ahead,
                size_t(moves[i].bytes));
}

// Steps `first` … `last` - 1; fewer where *go is 0 after one. *taken says how many there were.
extern "C" __attribute__((visibility("default"))) int dspark_repeat(
    Program program, int64_t* block, const void* fixes, int64_t fix_count, const int64_t* bases,
    int64_t stages, void* memory, int64_t threads, int64_t ahead, const Move* before,
    int64_t before_count, const Move* after, int64_t after_count, const char* go, int64_t first,
    int64_t last, int64_t* taken) {
  *taken = 0;
  for (int64_t k = first; k < last; ++k) {
    all(before, before_count, k, first);
    const int status =
        program(block, fixes, fix_count, bases, stages, memory, threads, ahead, nullptr);
    if (status != 0) return status;
    all(after, after_count, k, first);
    ++*taken;
    if (go != nullptr && *go == 0) break;
  }
  return 0;
}
"""


def _library() -> Any:
    library = build.load("loop", LOOP, isa_levels.detect())
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.dspark_repeat.argtypes = [
        *(pointer, pointer, pointer, number, pointer, number, pointer, number, number),
        *(pointer, number, pointer, number, pointer, number, number, pointer),
    ]
    library.dspark_repeat.restype = ctypes.c_int
    return library.dspark_repeat


def repeat(
    bound: BoundProgram, plan: LoopPlan, buffers: Sequence[Tensor], others: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Run a `LoopPlan` over a program that is bound to ``buffers`` and ``others``; what the last
    step made, and what every step made, ``[count, ...]``. All tensors are contiguous.

    Raises:
        IndexError: a position lies outside of a cache, or an index outside of an embedding.
    """

    def value(origin: Origin) -> Tensor:
        kind, which = origin
        return {"result": bound.results, "carried": buffers, "other": others}[kind][which]

    before: list[tuple[Tensor, Tensor, int]] = []  # to, from, stride
    after: list[tuple[Tensor, Tensor, int]] = []
    last: list[Tensor] = []
    made: list[Tensor] = []
    for origins, kept, rows in ((plan.last, last, None), (plan.made, made, plan.count)):
        for origin in origins:
            source = value(origin)
            to = torch.empty(
                source.shape if rows is None else (rows, *source.shape), dtype=source.dtype
            )
            kept.append(to)
            # What was carried into a step is gone behind it.
            moves = before if origin[0] == "carried" else after
            moves.append((to, source, 0 if rows is None else source.nbytes))
    after += _carry([(b, value(o)) for b, o in zip(buffers, plan.carried, strict=True)])
    go = None if plan.go is None else value(plan.go)
    program, taken, step = bound._program, ctypes.c_int64(), 0
    run = _library()
    # Uniform numbers for all steps of a call.
    drawn = [(x, x.new_empty(VISIT, x.numel())) for x in bound.draws]
    tables = [_table(before, drawn), _table(after, [])]
    with program._lock:
        while plan.count is None or step < plan.count:
            end = step + VISIT if plan.count is None else min(step + VISIT, plan.count)
            bound._enter()
            memory, threads = program._prepare()
            for _, numbers in drawn:
                numbers.uniform_()
            status = run(
                ctypes.cast(program._run, ctypes.c_void_p), program._block, program._fixes,
                program._fix_count, program._bases, len(program._entries), memory, threads,
                AHEAD_BYTES, tables[0], len(before) + len(drawn), tables[1], len(after),
                None if go is None else go.data_ptr(), step, end, ctypes.byref(taken),
            )  # fmt: skip
            if status:
                raise_for(status, "decode step")
            step += taken.value
            if go is not None and not bool(go):
                break
    return last, made


def _carry(moves: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor, int]]:
    """Copies that have the effect of all at once: ``a, b = b, a``."""
    moves = [(to, source) for to, source in moves if to is not source]
    done: list[tuple[Tensor, Tensor, int]] = []
    while moves:
        at = next(
            (i for i, (to, _) in enumerate(moves) if all(s is not to for _, s in moves)), None
        )
        if at is not None:
            to, source = moves.pop(at)
            done.append((to, source, 0))
            continue
        # A circle: what the first one reads is kept elsewhere.
        to, source = moves[0]
        kept = torch.empty_like(source)
        done.append((kept, source, 0))
        moves = [(t, kept if s is source else s) for t, s in moves]
    return done


def _table(moves: list[tuple[Tensor, Tensor, int]], drawn: Sequence[tuple[Tensor, Tensor]]) -> Any:
    words: list[int] = []
    for to, source, step in moves:
        words += [to.data_ptr(), source.data_ptr(), source.nbytes, step, 0]
    for to, numbers in drawn:
        words += [to.data_ptr(), numbers.data_ptr(), to.nbytes, 0, to.nbytes]
    return (ctypes.c_int64 * max(1, len(words)))(*words)
