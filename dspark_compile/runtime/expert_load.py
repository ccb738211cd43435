"""How experts are loaded: which are hit, by how many tokens, and what is read for it.

    with expert_load() as load:
        model.generate(...)
    for layer in load.layers():
        print(layer.site, layer.calls, layer.experts_hit / layer.calls, layer.tokens_per_expert)

Kernels look at one number a layer and call to see whether to count: that is all it costs when off.
Nothing is compiled again. Counted are the C++ kernels on a CPU (also inside of native decode steps)
and the eager forms of ``moe_experts``.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_HEAD = 4  # on, calls, tokens, hit


@dataclass(frozen=True)
class LayerLoad:
    """The load of one experts layer.

    Attributes:
        site: the module's path, ``""`` if unknown.
        calls: steps.
        tokens: tokens of all steps.
        experts_hit: experts read, summed over the steps.
        tokens_per_expert: int64 ``[E]``; their sum is tokens times top-k.
        bytes_read: of experts' weights: experts hit times the bytes of one.
    """

    site: str
    calls: int
    tokens: int
    experts_hit: int
    tokens_per_expert: Tensor
    bytes_read: int


class CellAddress(int):
    """Where a `Cell` is in this process; ``key`` says which it is in any: `cell`'s arguments."""

    key: tuple[str, int, int]


class Cell:
    """The numbers that a site's kernel counts into, at a fixed address."""

    def __init__(self, site: str, experts: int, expert_bytes: int):
        self.site, self.expert_bytes = site, expert_bytes
        # No tensor: sites are made while graphs are traced over fake ones.
        self.numbers = (ctypes.c_int64 * (_HEAD + experts))()

    @property
    def address(self) -> CellAddress:
        address = CellAddress(ctypes.addressof(self.numbers))
        address.key = (self.site, len(self.numbers) - _HEAD, self.expert_bytes)
        return address

    @property
    def on(self) -> bool:
        return _ON > 0

    def count(self, indices: Tensor) -> None:
        """Count a call that sent tokens to ``indices [..., k]``."""
        experts = len(self.numbers) - _HEAD
        flat = indices.reshape(-1).to("cpu", torch.int64)
        each = torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts)
        self.numbers[1] += 1
        self.numbers[2] += flat.numel() // indices.shape[-1]
        self.numbers[3] += int((each > 0).sum())
        for expert, number in enumerate(each.tolist()):
            self.numbers[_HEAD + expert] += number

    def read(self) -> LayerLoad:
        _, calls, tokens, hit, *numbers = self.numbers
        each = torch.tensor(numbers)
        return LayerLoad(self.site, calls, tokens, hit, each, hit * self.expert_bytes)


_CELLS: dict[tuple[str, int, int], Cell] = {}
_ON = 0


def cell(site: str, experts: int, expert_bytes: int) -> Cell:
    """The cell of a site; the same for all graphs (prefill, decode) of one layer."""
    key = (site, experts, expert_bytes)
    if key not in _CELLS:
        _CELLS[key] = Cell(*key)
        _CELLS[key].numbers[0] = int(_ON > 0)
    return _CELLS[key]


class ExpertLoad:
    """What `expert_load` gives."""

    def layers(self) -> list[LayerLoad]:
        """The layers that ran, in the order in which they were compiled."""
        return [load for c in _CELLS.values() if (load := c.read()).calls]

    def clear(self) -> None:
        """Start again from nothing."""
        for c in _CELLS.values():
            c.numbers[1:] = [0] * (len(c.numbers) - 1)


@contextlib.contextmanager
def expert_load() -> Iterator[ExpertLoad]:
    """Count the experts' load within the block, of every model that runs in this process; it starts
    from nothing. Layers of two models that have one path and one shape are counted together."""
    global _ON
    load = ExpertLoad()
    _ON += 1
    if _ON == 1:
        load.clear()
    for c in _CELLS.values():
        c.numbers[0] = 1
    try:
        yield load
    finally:
        _ON -= 1
        if _ON == 0:
            for c in _CELLS.values():
                c.numbers[0] = 0
