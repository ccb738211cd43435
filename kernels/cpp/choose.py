"""Token choice on the CPU (``choose.h``): a native function over buffers that do not move."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp import isa as isa_levels

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_SOURCE = """// Token choice from logits of type {type}.
#include "choose.h"

using namespace dspark;

extern "C" __attribute__((visibility("default"))) int64_t dspark_choose(
    const {type}* logits, int64_t ld, int64_t rows, int64_t V, double temperature, int64_t top_k,
    double top_p, double min_p, double penalty, const float* uniform, uint8_t* seen,
    const int64_t* eos, int64_t eos_count, int64_t pad, uint8_t* done, int64_t* tokens, float* z) {{
  const Choice how{{temperature, top_k, top_p, min_p, penalty}};
  return choose(logits, ld, rows, V, how, uniform, seen, eos, eos_count, pad, done, tokens, z);
}}
"""


@functools.cache
def _function(dtype: torch.dtype, level: str) -> Any:
    library = build.load("choose", _SOURCE.format(type=_TYPES[dtype]), level)
    function = library.dspark_choose
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    function.argtypes = [
        *(pointer, number, number, number, real, number, real, real, real),
        *(pointer, pointer, pointer, number, number, pointer, pointer, pointer),
    ]
    function.restype = number
    return function


def chooser(
    logits: Tensor,
    tokens: Tensor,
    done: Tensor,
    *,
    uniform: Tensor | None,
    seen: Tensor | None,
    eos: list[int],
    pad: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    penalty: float = 1.0,
) -> Callable[[], int]:
    """A function that reads ``logits [R, V]`` and writes ``tokens [R]`` (int64) and ``done [R]``
    (bool), all where they lie now, and returns how many rows are not done.

    ``uniform [R]`` (float32) makes it sample, ``seen [R, V]`` (bool) holds what the repetition
    penalty hits. The tensors must keep their memory.

    Raises:
        build.BuildError: it cannot be built.
    """
    function = _function(logits.dtype, isa_levels.detect())
    stops = (ctypes.c_int64 * max(len(eos), 1))(*(eos or [0]))
    scratch = torch.empty(logits.shape[1], dtype=torch.float32)
    kept = (logits, tokens, done, uniform, seen, stops, scratch)
    arguments = (
        logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1],
        temperature, top_k, top_p, min_p, penalty,
        None if uniform is None else uniform.data_ptr(),
        None if seen is None else seen.data_ptr(),
        stops, len(eos), pad, done.data_ptr(), tokens.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip

    def choose(_kept: Any = kept) -> int:
        return function(*arguments)

    return choose
