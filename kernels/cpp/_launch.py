"""What every launcher shares: reasons to refuse, thread counts, rows with strides."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.codegen.cpp import isa as isa_levels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 16

# Below this many bytes to read, waking the other threads costs more than they save.
SERIAL_BYTES = 32 * 1024


# What a kernel's parameter may get: a pointer (a tensor, None), a number, or a pointer to an array
# of 8-byte values that are pointers and integers.
Value: TypeAlias = Tensor | int | float | Sequence[Tensor | int | None] | None


@dataclass(frozen=True)
class Call:
    """A kernel and what it is called with: to be run now, or to be a stage of a native program.

    Attributes:
        source: the kernel.
        values: one for each of its parameters.
        nbytes: about what it reads, from which the number of threads follows.
        outs: the tensors that it writes; all others are only read.
        weights: the large operands that it reads in rows, in this order, shared out in blocks of
            32: a program fetches the beginning of the next stage's ahead of time.
    """

    source: emit.Source
    values: tuple[Value, ...]
    nbytes: int
    outs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] = ()


def _plain_value(value: Value) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, (list, tuple)):
        flat = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in value]
        return (ctypes.c_int64 * len(flat))(*flat)
    return value


def run(call: Call, threads: int | None = None) -> None:
    """Build if need be, and call.

    Raises:
        build.BuildError: it cannot be built.
        MemoryError: the kernel found no memory to work in.
        IndexError: a cache position is out of range.
    """
    function: Callable[..., int] = emit.kernel(call.source, isa_levels.detect())
    values = [_plain_value(v) for v in call.values]
    raise_for(function(*values, threads or threads_for(call.nbytes)), call.source.name)


UNDRAWABLE = 4


def raise_for(status: int, name: str) -> None:
    """Raises what a kernel's status says; 0 is success."""
    if status == 1:
        raise MemoryError(f"{name}: no memory for its scratch")
    if status == 2:
        raise IndexError(f"{name}: a position lies outside of the cache")
    if status == 3:
        raise IndexError(f"{name}: a token or another index lies outside of its table")
    if status == UNDRAWABLE:
        raise RuntimeError(
            f"{name}: probabilities to draw from are inf, nan, below 0, or all 0 in a row"
        )


def threads_for(nbytes: int) -> int:
    """How many of torch's threads a kernel that reads this much should use."""
    return 1 if nbytes < SERIAL_BYTES else torch.get_num_threads()


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def device_reason(**tensors: Tensor | None) -> str | None:
    """Why a tensor is not in the CPU's memory; None if all are."""
    for name, x in tensors.items():
        if x is not None and x.device.type != "cpu":
            return f"{name} is on {x.device.type}"
    return None


def dtype_reason(**tensors: Tensor | None) -> str | None:
    """Why a floating tensor's dtype is outside float32, bfloat16, float16."""
    for name, x in tensors.items():
        if x is not None and x.dtype not in FLOATS:
            return f"{name} is {name_of(x.dtype)}"
    return None


def size_reason(**tensors: Tensor | None) -> str | None:
    """Why sizes are not known: a dimension of some tensor is a symbol."""
    for name, x in tensors.items():
        if x is not None and not all(isinstance(n, int) for n in x.shape):
            return f"{name} has a dynamic size, {list(x.shape)}"
    return None


def row_grid(*tensors: Tensor | None) -> tuple[list[int], list[list[int]]] | None:
    """Rows of tensors of one shape ``[..., D]`` as a grid of three sizes and strides.

    None where the leading dimensions do not fold into three. A missing tensor has strides 0.
    """
    given = [t for t in tensors if t is not None]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in given]
    for axis in range(given[0].dim() - 1):
        size = given[0].shape[axis]
        if size == 1:
            continue
        if sizes and all(s[-1] == t.stride(axis) * size for s, t in zip(strides, given)):
            sizes[-1] *= size
            for s, t in zip(strides, given):
                s[-1] = t.stride(axis)
            continue
        sizes.append(size)
        for s, t in zip(strides, given):
            s.append(t.stride(axis))
    if len(sizes) > 3:
        return None
    lead = 3 - len(sizes)
    padded = iter([[0] * lead + s for s in strides])
    return [1] * lead + sizes, [[0, 0, 0] if t is None else next(padded) for t in tensors]
