"""Training: fitting a DSpark draft to a target (``dspark train-draft``)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluate import Evaluation
    from .loop import TrainResult, train_draft
    from .options import TrainError, TrainOptions

_HOMES = {
    "Evaluation": "evaluate",
    "TrainError": "options",
    "TrainOptions": "options",
    "TrainResult": "loop",
    "train_draft": "loop",
}

__all__ = ["Evaluation", "TrainError", "TrainOptions", "TrainResult", "train_draft"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
