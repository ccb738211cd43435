"""Loops over a tensor's elements, as text: one thread's, or shared out over the team."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dspark_compile.codegen.cpp import scatter

SMALL = scatter.MOST  # elements that one thread does alone


class NotGlue(Exception):
    """A node that cannot be printed; the message says why."""


@dataclass(frozen=True)
class Strides:
    """Where a loop over a result's shape reads."""

    of: tuple[int, ...]

    def stride(self, axis: int) -> int:
        return self.of[axis]


def loops(out: Tensor, views: Sequence[Any], body: Sequence[str], alone: bool = False) -> list[str]:
    """Loops over ``out``'s shape, dimensions merged where all strides allow; shared out over the
    team if there is much to do, and every thread must not do all of it (``alone``)."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    every = [*views, out]
    for axis, size in enumerate(out.shape):
        if size == 1:
            continue
        now = [x.stride(axis) for x in every]
        if sizes and all(a == b * size for a, b in zip(strides[-1], now)):
            sizes[-1] *= size
            strides[-1] = now
        else:
            sizes.append(size)
            strides.append(now)
    if out.numel() == 0:
        return []
    shared = (
        max(range(len(sizes)), key=sizes.__getitem__) if out.numel() > SMALL and not alone else -1
    )
    lines: list[str] = []
    for i, size in enumerate(sizes):
        indent = "  " * len(lines)
        if i == shared:
            lines = [f"const auto [begin, end] = team.share({size}, 64);", *lines]
            lines.append(f"{indent}for (int64_t i{i} = begin; i{i} < end; ++i{i})")
        else:
            lines.append(f"{indent}for (int64_t i{i} = 0; i{i} < {size}; ++i{i})")

    def at(which: int) -> str:
        terms = [f"i{i} * {s[which]}" for i, s in enumerate(strides) if s[which]]
        return " + ".join(terms) or "0"

    places = {str(i): at(i) for i in range(len(views))}
    indent = "  " * (len(lines) + 1)
    printed = []
    for line in body:
        for key, text in places.items():
            line = line.replace(f"[{{{key}}}]", f"[{text}]")
        printed.append(indent + line.replace("[{out}]", f"[{at(len(views))}]"))
    return [*lines, "{", *printed, "}"]
