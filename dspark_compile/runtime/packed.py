"""Stacked weights that the modules' own parameters share.

A merged linear reads one ``[sum(n), K]`` tensor. It is made once, and each parameter is
pointed at its rows of it (``parameter.data``), so the weights exist once and updating a
parameter in place updates the stack. Before every call the addresses are compared: a
parameter that was given other storage is stacked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def why_not_shareable(tensor: Any) -> str | None:
    """Why ``tensor`` cannot become a view of stacked storage, or None."""
    if not isinstance(tensor, torch.nn.Parameter) or type(tensor) is not torch.nn.Parameter:
        return f"a weight is a {type(tensor).__name__}, not a plain parameter"
    if not tensor.is_contiguous() or tensor.storage_offset() != 0:
        return "a weight is not contiguous"
    if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return "a weight shares its storage with another tensor"
    if tensor.is_shared() and tensor.device.type == "cpu":
        return "a weight lies in memory shared with another process"
    return None


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The stack that ``tensors`` are the rows of already (another graph made it), or None."""
    head = tensors[0]
    address, storage = head.data_ptr(), head.untyped_storage().data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != address:
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        address += tensor.numel() * tensor.element_size()
    rows = sum(t.shape[0] for t in tensors)
    view = head.detach()
    return view.as_strided((rows, *view.shape[1:]), view.stride(), view.storage_offset())


class PackedInput:
    """The graph input that holds the stack of the caller's inputs ``indices``."""

    def __init__(self, indices: Sequence[int], fake: torch.Tensor) -> None:
        self.indices = tuple(indices)
        self.fake = fake
        self._packed: torch.Tensor | None = None
        self._addresses: tuple[int, ...] = ()

    def example(self, inputs: Any) -> torch.Tensor:
        """What the inner compiler traces with."""
        return self.fake

    def value(self, args: Any) -> torch.Tensor:
        """The stack for the parameters of this call."""
        tensors = [args[i] for i in self.indices]
        if self._packed is None or tuple(t.data_ptr() for t in tensors) != self._addresses:
            self._pack(tensors)
        assert self._packed is not None
        return self._packed

    def _pack(self, tensors: Sequence[torch.Tensor]) -> None:
        with torch.no_grad():
            packed = stacked(tensors)
            if packed is None:
                packed = torch.cat([t.detach() for t in tensors])
                start = 0
                for tensor in tensors:
                    tensor.data = packed[start : start + tensor.shape[0]]
                    start += tensor.shape[0]
        self._packed = packed
        self._addresses = tuple(t.data_ptr() for t in tensors)
