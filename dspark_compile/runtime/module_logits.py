"""Any module as a function from token ids to logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def of_hugging_face(model: Any) -> bool:
    """Whether ``model.generate`` is transformers', or hands on to it: nanoGPT and its kin have a
    ``generate`` and a ``config`` of their own."""
    try:
        takes = inspect.signature(model.generate).parameters
    except (AttributeError, TypeError, ValueError):
        return False
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return "custom_generate" in takes or (
        any_name and hasattr(getattr(model, "config", None), "to_dict")
    )


def logits_of(out: Any) -> Tensor:
    """The logits in what a module returns: a tensor, an object or mapping that names them, or the
    first of several results.

    Raises:
        ValueError: a mapping names no ``logits``.
    """
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, Mapping):
        if "logits" not in out:
            raise ValueError(f"the model returns a mapping of {sorted(out)}: name one 'logits'")
        return out["logits"]
    return out[0]


def token_function(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids ``[B, S]`` to logits, by ``model``."""

    def function(ids: Tensor) -> Tensor:
        return logits_of(model(ids))

    return function
