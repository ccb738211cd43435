"""Which ops make the host wait for the device: a round of a decode loop has none of them.

A CUDA graph cannot hold such an op, and outside of a graph each one empties the queue of launched
kernels. `Watch` sees every op that is dispatched, those that a compiled graph's wrapper calls too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Their result's size, or a Python number, depends on data.
_READS = frozenset(
    {
        "_local_scalar_dense", "item", "nonzero", "nonzero_static", "masked_select", "equal",
        "is_nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
        "multinomial", "allclose",
    }
)  # fmt: skip
_READS -= {"nonzero_static"}  # its size is given


def waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> str | None:
    """Why an op makes the host wait, or is none of the device's; None: it does not."""
    name = func._schema.name if hasattr(func, "_schema") else str(func)
    short = name.split("::")[-1]
    if short in _READS:
        return f"{name} reads a result on the host"
    if short == "repeat_interleave" and func._overloadname == "Tensor":
        if kwargs.get("output_size") is None:
            return f"{name} without output_size reads a size on the host"
    if short in ("index", "index_put", "index_put_") and any(
        isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
    ):
        return f"{name} by a mask reads a size on the host"
    if short in ("copy_", "_to_copy", "_copy_from"):
        source = args[1] if short == "copy_" else args[0]
        target = args[0] if short == "copy_" else result
        if (
            isinstance(source, Tensor)
            and isinstance(target, Tensor)
            and source.device.type != target.device.type
            and (source.dim() or source.device.type != "cpu")
        ):
            return f"{name} from {source.device.type} to {target.device.type}"
    return None


class Watch(TorchDispatchMode):
    """Inside, ops that make the host wait are noted in `found` (the first one's reason), or, with
    ``refuse``, raise.

    Raises:
        RuntimeError: inside, with ``refuse``: an op makes the host wait.
    """

    def __init__(self, refuse: bool = False) -> None:
        super().__init__()
        self.refuse = refuse
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reason = waits(func, args, kwargs, result)
        if reason is not None:
            if self.refuse:
                raise RuntimeError(f"the host waits: {reason}")
            self.found = self.found or reason
        return result
