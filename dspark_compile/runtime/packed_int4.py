"""Weights whose values fit 4 bits but are stored in 8, packed for the kernels.

The caller's tensor stays as it is: it is what eager code and graphs with many rows read. The
packed copy, half its size, is made at the first call, shared by all graphs that read the weight,
and made anew when the weight is replaced or written to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dspark_compile.ops.quantized import pack_int4

# weight -> (version, packed copy)
_packed: Any = WeakIdKeyDictionary()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def packed(weight: torch.Tensor) -> torch.Tensor:
    """The packed copy of an int8 matrix.

    Raises:
        ValueError: a value does not fit 4 bits.
    """
    known = _packed.get(weight)
    if known is None or known[0] != _version(weight):
        with torch.no_grad():
            known = (_version(weight), pack_int4(weight.detach()))
        _packed[weight] = known
    return known[1]


class PackedInt4:
    """The graph input that holds the packed copy of the caller's input ``index``."""

    def __init__(self, index: int, fake: torch.Tensor) -> None:
        self.index = index
        self.fake = fake
        self._source: torch.Tensor | None = None
        self._seen = 0
        self._value: torch.Tensor | None = None

    def example(self, inputs: Any) -> torch.Tensor:
        """What the inner compiler traces with."""
        return self.fake

    def value(self, args: Any) -> torch.Tensor:
        """The packed weight of this call."""
        weight = args[self.index]
        if weight is not self._source or _version(weight) != self._seen:
            self._value = packed(weight)
            self._source, self._seen = weight, _version(weight)
        assert self._value is not None
        return self._value
