"""Indexing by a number that a loop counts on with, as views that do not ask for its value.

``x[:, i]`` asks a symbolic ``i`` for its value; ``x.select(1, i)`` does not. Dynamo computes shapes
with these in place of a subscript while it traces a step; the graph keeps the subscript, and
`dspark_compile.loops.numbers` makes it one by data.
"""

from __future__ import annotations

from typing import Any

import torch


def select(x: Any, index: Any) -> Any:
    """``x[index]``."""
    view = _view(x, index)
    return x[index] if view is None else view


def assign(x: Any, index: Any, value: Any) -> None:
    """``x[index] = value``."""
    view = _view(x, index)
    if view is None:
        x[index] = value
    elif isinstance(value, torch.Tensor):
        view.copy_(value)
    else:
        view.fill_(value)


def _view(x: Any, index: Any) -> Any:
    """``x[index]`` as a view; None: an index is neither a number nor a slice."""
    if not isinstance(x, torch.Tensor):
        return None
    parts = list(index) if isinstance(index, tuple) else [index]
    for p in parts:
        if isinstance(p, bool) or not (isinstance(p, (int, slice, torch.SymInt)) or p is Ellipsis):
            return None
    # From the back, so that dimensions in front stay where they are.
    if any(p is Ellipsis for p in parts):
        at = [i for i, p in enumerate(parts) if p is Ellipsis][0]  # noqa: RUF015
        parts = parts[:at] + [slice(None)] * (x.dim() - len(parts) + 1) + parts[at + 1 :]
    for dim in range(len(parts) - 1, -1, -1):
        p = parts[dim]
        if isinstance(p, slice):
            if p.start is not None or p.stop is not None or p.step is not None:
                x = x[(slice(None),) * dim + (p,)]
        else:
            x = x.select(dim, p)
    return x
