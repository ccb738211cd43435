"""Token choice on the CPU (``choose.h``): a native function over buffers that do not move."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.kernels.cpp._launch import UNDRAWABLE, raise_for

TYPE_NAMES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_SOURCE = """// Token choice from logits of type {type}.
#include "choose.h"

extern "C" __attribute__((visibility("default"))) int64_t dspark_choose(
    dspark::ChooseArguments* arguments) {{
  return dspark::choose<dspark::{type}>(*arguments);
}}
"""


class _Arguments(ctypes.Structure):
    """``ChooseArguments``."""

    _fields_ = (
        ("logits", ctypes.c_void_p), ("ld", ctypes.c_int64), ("rows", ctypes.c_int64),
        ("V", ctypes.c_int64), ("temperature", ctypes.c_double), ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_double), ("min_p", ctypes.c_double), ("penalty", ctypes.c_double),
        ("uniform", ctypes.c_void_p), ("advance", ctypes.c_int64), ("seen", ctypes.c_void_p),
        ("eos", ctypes.c_void_p), ("eos_count", ctypes.c_int64), ("pad", ctypes.c_int64),
        ("done", ctypes.c_void_p), ("tokens", ctypes.c_void_p), ("z", ctypes.c_void_p),
    )  # fmt: skip


@functools.cache
def _function(dtype: torch.dtype, level: str) -> Any:
    source = _SOURCE.format(type=TYPE_NAMES[dtype])
    function = build.load("choose", source.replace("dspark::float", "float"), level).dspark_choose
    function.argtypes = [ctypes.c_void_p]
    function.restype = ctypes.c_int64
    return function


class NativeChooser:
    """Reads ``logits [R, V]`` and writes ``tokens [R]`` (int64) and ``done [R]`` (bool), all where
    they lie now; a call returns how many rows are not done.

    ``uniform [R]`` (float32) makes it sample, ``seen [R, V]`` (bool) holds what the repetition
    penalty hits. The tensors must keep their memory.

    Raises:
        build.BuildError: it cannot be built.
        RuntimeError: by a call that samples: scores are NaN, infinite or all -inf.
    """

    def __init__(
        self,
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
    ) -> None:
        self.function = _function(logits.dtype, isa_levels.detect())
        self._eos = (ctypes.c_int64 * max(len(eos), 1))(*(eos or [0]))
        scratch = torch.empty(logits.shape[1], dtype=torch.float32)
        self._kept = (logits, tokens, done, uniform, seen, scratch)
        self.rows = logits.shape[0]
        self.arguments = _Arguments(
            logits.data_ptr(), logits.stride(0), logits.shape[0], logits.shape[1],
            temperature, top_k, top_p, min_p, penalty,
            None if uniform is None else uniform.data_ptr(), 0,
            None if seen is None else seen.data_ptr(),
            ctypes.addressof(self._eos), len(eos), pad, done.data_ptr(), tokens.data_ptr(),
            scratch.data_ptr(),
        )  # fmt: skip
        self.address = ctypes.addressof(self.arguments)

    def __call__(self) -> int:
        count = self.function(self.address)
        if count < 0:
            raise_for(UNDRAWABLE, "token choice")
        return count

    def draw_from(self, uniform: Tensor | None) -> None:
        """Take the numbers of ``uniform [K, R]``, a row a call; None: back to the one row."""
        if uniform is not None:
            self.arguments.uniform, self.arguments.advance = uniform.data_ptr(), self.rows
        elif self._kept[3] is not None:
            self.arguments.uniform, self.arguments.advance = self._kept[3].data_ptr(), 0
