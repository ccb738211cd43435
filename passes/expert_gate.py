"""What experts compute between their products, recognised by its values.

Like `raise_mlp` for plain blocks, with what experts have besides: bounds of gate and up, a slope of
the activation, one added to up (gpt-oss: ``(clamp(up) + 1) * g * sigmoid(1.702 g)``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.ops.mlp import ACTIVATIONS
from dspark_compile.ops.moe import PLAIN_LIMITS, gate_and_up
from dspark_compile.passes.pointwise import Pointwise, close


@dataclass(frozen=True)
class Recognised:
    """An activation: its name, its limits, and which leaf is the gate (None without one)."""

    activation: str
    limits: tuple[float, ...]
    gate: int | None


_KNOWN: dict[Any, Recognised | None] = {}


def recognise(program: Pointwise) -> Recognised | None:
    """What a program over one or two leaves computes; None if it is none of the dialect's."""
    key = program.structure()
    if key not in _KNOWN:
        _KNOWN[key] = _recognise(program)
    return _KNOWN[key]


def _grid() -> Tensor:
    near = torch.linspace(-12, 12, 241, dtype=torch.float64)
    far = torch.tensor([16.0, 20.5, 40.0, 88.0, 300.0, 3e3], dtype=torch.float64)
    return torch.cat((near, far, -far))


def _recognise(program: Pointwise) -> Recognised | None:
    if not 1 <= len(program.leaves) <= 2:
        return None
    grid = _grid()
    constants = _constants(program)
    if len(program.leaves) == 1:
        out = program.evaluate([grid])
        for name, limits in _activations(constants):
            if close(out, gate_and_up(None, grid, name, limits)):
                return None if name == "identity" and not limits else Recognised(name, limits, None)
        return None
    line = torch.tensor([1.0, -3.7, -1.0, -0.25, 0.5, 2.0, 6.9, 7.1, -7.1, 50.0, -3e3]).double()
    gate, up = torch.broadcast_tensors(grid[:, None], line)
    for index in (0, 1):
        out = program.evaluate([gate, up] if index == 0 else [up, gate])
        if out is None or out.shape != gate.shape:
            return None
        # act(gate) * f(up): one row tells f up to a factor, and with f every column tells act.
        row = out[int((grid - 3.0).abs().argmin())]
        for low, high, offset in _bounds(constants):
            factor = line.clamp(low, high) + offset
            if not close(row * factor[0], row[0] * factor):
                continue
            for name, limits in _activations(constants):
                slope, gate_low, gate_high = (limits or PLAIN_LIMITS)[:3]
                whole: tuple[float, ...] = (slope, gate_low, gate_high, low, high, offset)
                whole = () if whole == PLAIN_LIMITS else whole
                if close(out, gate_and_up(gate, up, name, whole)):
                    return Recognised(name, whole, index)
    return None


def _constants(program: Pointwise) -> list[float]:
    """The numbers in the program, and their negatives."""
    found: set[float] = set()
    for node in program.nodes:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if math.isfinite(value):
                    found |= {float(value), -float(value)}
    return sorted(found)


def _bounds(constants: list[float]) -> Iterator[tuple[float, float, float]]:
    """(lower bound, upper bound, offset) of up, the plain ones first."""
    lows = [-math.inf, *(c for c in constants if c < 0)]
    highs = [math.inf, *(c for c in constants if c > 0)]
    return itertools.product(lows, highs, [0.0, *(c for c in constants if c)])


def _activations(constants: list[float]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Activations, plain ones first, then with slopes and bounds of the program's numbers."""
    for name in ACTIVATIONS:
        yield name, ()
    if len(constants) > 12:
        return
    highs = [math.inf, *(c for c in constants if c > 0)]
    lows = [-math.inf, *(c for c in constants if c < 0)]
    slopes = [1.0, *(c for c in constants if c > 0 and c != 1.0)]
    for name in ACTIVATIONS:
        for slope, low, high in itertools.product(slopes, lows, highs):
            limits = (slope, low, high, *PLAIN_LIMITS[3:])
            if limits != PLAIN_LIMITS:
                yield name, limits
