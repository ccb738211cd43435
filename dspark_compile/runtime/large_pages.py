"""Memory for caches in large pages, where Linux gives them on request.

A cache of many tokens is read from end to end at every step: in pages of 4 KiB the CPU looks up a
quarter of a million addresses a gigabyte, and the first write to each page asks the kernel for it.
Linux takes pages of 2 MiB for memory that is marked before it is first touched (``madvise``, where
transparent huge pages are set to ``madvise`` or ``always``). Elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAGE = 2 * 2**20
SMALLEST = 2 * PAGE  # bytes: less seldom holds a whole page
_MADV_HUGEPAGE = 14


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


def zeros(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """``torch.zeros``, in large pages where the tensor is large and lies on a CPU."""
    if torch.compiler.is_compiling():
        return torch.zeros(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    real = type(made) is Tensor and made.device.type == "cpu"
    if real and made.nbytes >= SMALLEST and advise is not None:
        # Only pages that lie in the tensor whole: its neighbours are somebody else's.
        start = -(-made.data_ptr() // PAGE) * PAGE
        end = (made.data_ptr() + made.nbytes) // PAGE * PAGE
        advise(start, end - start, _MADV_HUGEPAGE)  # a refusal leaves small pages
    return made.zero_()
