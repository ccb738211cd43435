"""What experts compute between their products, recognised by its values.

Like `raise_mlp` for plain blocks, with what experts have besides: bounds of gate and up, a slope of
the activation, one added to up (gpt-oss: ``(clamp(up) + 1) * g * sigmoid(1.702 g)``).

What is none of these, such as gates that are soft-capped beside their sigmoid, is read node by node
as a formula (`ops.formula`), where kernels print formulas.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.ops.formula import BINARY, LINEAR, MOST_WORDS, UNARY, evaluate
from dspark_compile.ops.mlp import ACTIVATIONS
from dspark_compile.ops.moe import PLAIN_LIMITS, gate_and_up
from dspark_compile.passes.graph import is_op, val
from dspark_compile.passes.pointwise import COPIES, Pointwise, close


@dataclass(frozen=True)
class Recognised:
    """An activation: its name or formula, its limits, and which leaf is the gate (None without
    one)."""

    activation: str
    limits: tuple[float, ...]
    gate: int | None


_KNOWN: dict[Any, Recognised | None] = {}


def recognise(program: Pointwise) -> Recognised | None:
    """What a program over one or two leaves computes; None if it is none of the dialect's."""
    printed = val(program.root).device.type == "cpu"
    key = (printed, program.structure())
    if key not in _KNOWN:
        _KNOWN[key] = _recognise(program) or (_read(program) if printed else None)
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


_SAME = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "neg": "neg", "abs": "abs", "exp": "exp",
    "log": "log", "sqrt": "sqrt", "erf": "erf", "tanh": "tanh", "sigmoid": "sigmoid",
    "relu": "relu", "silu": "silu", "softplus": "softplus", "square": "square",
}  # fmt: skip


def _read(program: Pointwise) -> Recognised | None:
    """The program as a formula; None if it has another operation than formulas have, or computes
    nothing that is worth one."""
    if not 1 <= len(program.leaves) <= 2:
        return None
    try:
        words = _words(program, program.root)
    except (_NoWord, RecursionError):
        return None
    formula = " ".join(("=", *words))
    operations = {w for w in words if w in BINARY or w in UNARY}
    if len(words) > MOST_WORDS or (operations <= LINEAR and "u" not in words):
        return None
    grid = _grid()
    leaves = [grid]
    if len(program.leaves) == 2:
        line = torch.tensor([1.0, -3.7, -0.25, 0.5, 6.9, -50.0, 3e3]).double()
        leaves = list(torch.broadcast_tensors(grid[:, None], line))
    if not close(program.evaluate(leaves), evaluate(formula, *leaves, *[None][len(leaves) - 1 :])):
        return None
    return Recognised(formula, (), 0 if len(leaves) == 2 else None)


class _NoWord(Exception):
    """A formula has no word for it."""


def _words(program: Pointwise, item: Any) -> list[str]:
    """A node or number of ``program`` in reverse Polish order."""
    if isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item):
        return [repr(float(item))]
    if not isinstance(item, fx.Node):
        raise _NoWord
    if item in program.leaves:
        return ["gu"[program.leaves.index(item)]]
    args, kwargs = list(item.args), dict(item.kwargs)
    if is_op(item, *COPIES):
        return _words(program, args[0])
    _, name, overload = str(item.target).split(".")  # aten.mul.Tensor
    if overload not in ("default", "Tensor", "Scalar", "Tensor_Scalar"):
        raise _NoWord
    if name in ("clamp", "clamp_min", "clamp_max"):
        words, bounds = _words(program, args[0]), [*args[1:], None]
        low = kwargs.get("min", None if name == "clamp_max" else bounds[0])
        high = kwargs.get("max", bounds[0 if name == "clamp_max" else 1])
        for bound, word in ((low, "max"), (high, "min")):
            if isinstance(bound, fx.Node):
                raise _NoWord
            words = words if bound is None else [repr(float(bound)), *words, word]
        return words
    word = _SAME.get(name, name)
    if name == "gelu":
        how = kwargs.pop("approximate", args[1] if len(args) > 1 else "none")
        args, word = args[:1], "gelu" if how == "none" else "gelu_tanh"
    elif name == "reciprocal":
        args, word = [1.0, *args], "/"
    elif name == "rsub":
        args, word = args[::-1], "-"
    elif name == "pow" and args[1] in (2, 3, 0.5):
        more = [*_words(program, args[0]), "*"] if args[1] == 3 else []
        return [*_words(program, args[0]), "sqrt" if args[1] == 0.5 else "square", *more]
    if len(args) != (2 if word in BINARY else 1 if word in UNARY else -1) or kwargs:
        raise _NoWord  # another operation, or one with alpha=, or a threshold
    found = [w for arg in args for w in _words(program, arg)]
    if len(found) > MOST_WORDS:
        raise _NoWord
    return [*found, word]


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
