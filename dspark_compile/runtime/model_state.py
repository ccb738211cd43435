"""What a model's code reads besides parameters and buffers, and a caller may change between two
calls: attributes of its modules, the modules themselves, their hooks, their classes, the
configuration.

Dynamo guards all of it, at every call of what it compiled. A decode loop drives its step's graph
itself (`captured.py`), so what the graph was traced with is compared here, once a call.
"""

from __future__ import annotations

from collections.abc import Collection
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# What every module has (of these, only hooks and submodules make a difference), and what no step
# reads: how tokens are chosen.
_OTHER = frozenset((*vars(nn.Module()), "generation_config"))
_NUMBERS = frozenset((bool, int, float, str, complex, type(None), torch.dtype, torch.device))


def hooks(module: nn.Module) -> list[Any]:
    """What runs before and after ``module``'s forward."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def has_hooks(model: nn.Module) -> bool:
    """Whether any of its modules has a forward hook."""
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def model_state(model: nn.Module, read: Collection[int] = ()) -> list[Any]:
    """Values of numbers and texts, identities of everything else, in a list to be compared.

    Args:
        read: ``id`` of tensors that a program reads. Of others, which a model may make anew at
            every call, nothing is said.
    """
    found: list[Any] = []
    for module in model.modules():
        found += map(id, module._modules.values())
        if module._forward_hooks or module._forward_pre_hooks:
            found += map(id, hooks(module))
        own = vars(module)
        found.append({name: _mark(own[name], read) for name in own.keys() - _OTHER})
    found.append({kind: _written(kind) for kind in {type(m) for m in model.modules()}})
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "__dict__"):
        found.append({name: _mark(value, read) for name, value in vars(config).items()})
    return found


def _written(kind: type) -> list[Any]:
    """Methods and numbers of a class of modules: of a notebook's cell that has been run again, or
    with a method that was replaced (or its code, as IPython's autoreload does)."""
    found: list[Any] = []
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            if isinstance(value, FunctionType):
                found.append((name, value, value.__code__))
            elif type(value) in _NUMBERS:
                found.append((name, _mark(value, ())))
    return found


def _mark(value: Any, read: Collection[int]) -> Any:
    if type(value) in _NUMBERS:
        return value if value == value else "nan"
    if isinstance(value, Tensor):
        return (id(value), value.data_ptr()) if id(value) in read else None
    if isinstance(value, (list, tuple)) and all(type(x) in _NUMBERS for x in value):
        return tuple(value)
    if isinstance(value, dict) and all(type(x) in _NUMBERS for x in value.values()):
        return tuple(value.items())
    return id(value)
