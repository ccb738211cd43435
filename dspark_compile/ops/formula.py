"""Formulas: what an expert computes between its products where no named activation is that.

    "= g 4.0 / tanh 4.0 * g sigmoid * u *"      4 tanh(g / 4) * sigmoid(g) * u

Text of "=" and words in reverse Polish order: ``g`` and ``u`` (the results of gate and up; ``g`` is
up's where there is no gate), numbers, and operations on what stands before them. A kernel prints it
as any other epilogue, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlp import ACTIVATIONS

T = TypeVar("T")

# Of two: max and min are of a number and what stands behind it, whose NaN comes through.
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": torch.div,
    "max": torch.maximum, "min": torch.minimum,
}  # fmt: skip
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: f for name, f in ACTIVATIONS.items() if name != "identity"},
    "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "erf": torch.erf, "square": torch.square, "softplus": F.softplus,
}  # fmt: skip
# Beyond these a formula is no line of them.
LINEAR = frozenset({"+", "-", "*", "/", "neg"})
MOST_WORDS = 64


def is_formula(activation: str) -> bool:
    """Whether an ``activation`` is a formula, and no name."""
    return activation.startswith("=")


def fold(
    formula: str, leaf: Callable[[str], T], number: Callable[[float], T],
    apply: Callable[[str, Sequence[T]], T],
) -> T:  # fmt: skip
    """Go through ``formula``: what ``apply`` makes of its last operation.

    Raises:
        ValueError: it is no formula; the message says which word is wrong.
    """
    first, *words = formula.split()
    if first != "=":
        raise ValueError(f"{formula!r} is no formula: it begins with '='")
    stack: list[T] = []
    for word in words:
        count = 2 if word in BINARY else 1 if word in UNARY else 0
        if len(stack) < count:
            raise ValueError(f"formula {formula!r}: {word!r} takes {count} values")
        if count:
            given = stack[-count:]
            del stack[-count:]
            stack.append(apply(word, given))
        elif word in ("g", "u"):
            stack.append(leaf(word))
        else:
            try:
                value = float(word)
            except ValueError:
                raise ValueError(f"formula {formula!r}: {word!r} is unknown") from None
            if not math.isfinite(value):
                raise ValueError(f"formula {formula!r}: {word!r} is not finite")
            stack.append(number(value))
    if len(stack) != 1:
        raise ValueError(f"formula {formula!r} leaves {len(stack)} values")
    return stack[0]


def evaluate(formula: str, g: Tensor, u: Tensor | None) -> Tensor:
    """``formula`` of g and u, of one shape and dtype.

    Raises:
        ValueError: it is none, or asks for a ``u`` that is not there.
    """

    def leaf(word: str) -> Tensor:
        if word == "u" and u is None:
            raise ValueError(f"formula {formula!r}: there is no gate, and 'g' is all there is")
        return g if word == "g" else u  # type: ignore[return-value]

    def apply(word: str, given: Sequence[Tensor]) -> Tensor:
        return BINARY[word](*given) if word in BINARY else UNARY[word](*given)

    return fold(formula, leaf, lambda x: torch.full_like(g, x), apply)
