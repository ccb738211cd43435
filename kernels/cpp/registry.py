"""What lowering asks: which C++ op takes the place of a dialect op at a graph node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.kernels.cpp import OPS, overload, supports


@dataclass(frozen=True)
class Entry:
    """A C++ op as an implementation: ``supports(node)`` is None, or the reason why not."""

    supports: Callable[[fx.Node], str | None]
    target: Callable[..., Any]


def find(op: str) -> Entry | None:
    """The entry for dialect op ``op``; None where there is no kernel."""
    if op not in OPS:
        return None

    def site(node: fx.Node) -> str | None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        return supports(op, *args, **kwargs)

    return Entry(site, overload(op))
