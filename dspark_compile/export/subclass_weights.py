"""Weights that are tensor subclasses (torchao's), taken apart into plain tensors for tracing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dspark_compile._torch_compat import is_subclass
from dspark_compile.passes.subclasses import Rebuild


class Unwrapped(nn.Module):
    """A module whose tensor subclasses (torchao's weights) are taken apart into the tensors inside
    of them, and put together again as part of the computation: tracing sees plain tensors.

    A stack of matrices (experts) is put together dequantised: few subclasses know more than
    products of matrices.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "inner", model)  # its own parameters are not to be registered
        self.places: list[tuple[str, Callable[..., Any] | None, list[str]]] = []
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            rebuild = Rebuild(tensor) if is_subclass(tensor) else None
            paths = [()] if rebuild is None else rebuild.paths
            keys, held = [], []
            for path in paths:
                value: Any = tensor
                for step in path:
                    value = getattr(value, step)
                keys.append("__".join((*name.split("."), *path)))
                held.append(value.detach())
                self.register_buffer(keys[-1], held[-1])
            made: Callable[..., Any] | None = rebuild
            if rebuild is not None and tensor.dim() > 2 and hasattr(tensor, "dequantize"):
                made = _dequantised(tensor, rebuild, held)
            self.places.append((name, made, keys))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = {}
        for name, rebuild, keys in self.places:
            held = [getattr(self, key) for key in keys]
            made[name] = held[0] if rebuild is None else rebuild(*held)
        return torch.func.functional_call(self.inner, made, args, kwargs)


def _dequantised(tensor: Any, rebuild: Rebuild, held: list[Tensor]) -> Callable[..., Tensor]:
    """How a stack ``[..., N, K]`` comes from its inner tensors: by ``dspark::dequantize_weight``
    where that gives what the subclass does, else by the subclass."""
    rows = math.prod(tensor.shape[:-1])
    with torch.no_grad():
        wanted = tensor.dequantize()
    numbers = [i for i, t in enumerate(held) if t.dtype == torch.int8 and t.shape == tensor.shape]
    scales = [i for i, t in enumerate(held) if t.is_floating_point() and t.numel() % rows == 0]
    if len(numbers) != 1 or len(scales) != 1:
        return lambda *flat: rebuild(*flat).dequantize()
    q, s = numbers[0], scales[0]
    zeros = [
        i for i, t in enumerate(held)
        if i != q and t.dtype == torch.int8 and t.shape == held[s].shape and bool(t.any())
    ]  # fmt: skip

    def plain(*flat: Tensor) -> Tensor:
        zero = flat[zeros[0]].reshape(rows, -1) if zeros else None
        wide = torch.ops.dspark.dequantize_weight(
            flat[q].reshape(rows, -1), flat[s].reshape(rows, -1), zero, wanted.dtype
        )
        return wide.reshape(tensor.shape)

    with torch.no_grad():
        same = len(zeros) < 2 and torch.equal(plain(*held), wanted)
    return plain if same else lambda *flat: rebuild(*flat).dequantize()


def without_subclasses(model: nn.Module) -> nn.Module:
    """The model, behind `Unwrapped` if it holds tensor subclasses."""
    return Unwrapped(model) if any(is_subclass(p) for p in model.parameters()) else model
