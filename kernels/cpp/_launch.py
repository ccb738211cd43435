"""What every launcher shares: reasons to refuse, thread counts, rows with strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import emit
from dspark_compile.codegen.cpp import isa as isa_levels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROWS = 16

# Below this many bytes to read, waking the other threads costs more than they save.
SERIAL_BYTES = 32 * 1024


def run(source: emit.Source, *arguments: Any) -> None:
    """Build if need be, and call.

    Raises:
        build.BuildError: it cannot be built.
        MemoryError: the kernel found no memory to work in.
        IndexError: a cache position is out of range.
    """
    function: Callable[..., int] = emit.kernel(source, isa_levels.detect())
    status = function(*arguments)
    if status == 1:
        raise MemoryError(f"{source.name}: no memory for its scratch")
    if status == 2:
        raise IndexError(f"{source.name}: a position lies outside of the cache")


def threads_for(nbytes: int) -> int:
    """How many of torch's threads a kernel that reads this much should use."""
    return 1 if nbytes < SERIAL_BYTES else torch.get_num_threads()


def pointer(x: Tensor | None) -> int | None:
    """The address of a tensor's first element."""
    return None if x is None else x.data_ptr()


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
