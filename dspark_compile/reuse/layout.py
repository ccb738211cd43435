"""A native program's `Layout` as JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch

from dspark_compile.codegen.cpp.emit import Source
from dspark_compile.codegen.cpp.layout import Layout, Result

_PLAIN = ("names", "kernels", "words", "buffers", "arena_bytes")
_TUPLES = ("inner", "fixes", "cells", "arena", "draws", "inputs", "made")
_DTYPES = {str(x): x for x in vars(torch).values() if isinstance(x, torch.dtype)}


class CannotKeep(Exception):
    """Something has no form in a file; the message says what."""


def to_data(layout: Layout) -> dict[str, Any]:
    """``layout`` as lists, dicts, strings and numbers.

    Raises:
        CannotKeep: a size is no polynomial of the symbols.
    """
    inputs = layout.numbers
    return {
        **{name: getattr(layout, name) for name in (*_PLAIN, *_TUPLES)},
        "sources": [[s.name, s.text, s.parameters] for s in layout.sources],
        "dynamic": [[where, terms(expression, inputs)] for where, expression in layout.dynamic],
        "numbers": sorted(inputs.values()),
        "results": [[r.buffer, r.offset, str(r.dtype), r.shape, r.stride] for r in layout.results],
    }


def from_data(data: Mapping[str, Any]) -> Layout:
    """The inverse of `to_data`.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    symbols = {i: sympy.Symbol(f"input{i}", integer=True) for i in data["numbers"]}
    same: dict[str, Any] = {name: data[name] for name in _PLAIN}
    same.update((name, [tuple(x) for x in data[name]]) for name in _TUPLES)
    layout = Layout(
        **same,
        sources=[
            Source(name, text, tuple((kind, label) for kind, label in parameters))
            for name, text, parameters in data["sources"]
        ],
        dynamic=[(where, polynomial(given, symbols)) for where, given in data["dynamic"]],
        numbers={symbol: i for i, symbol in symbols.items()},
        results=[
            Result(buffer, offset, _DTYPES[dtype], tuple(shape), tuple(stride))
            for buffer, offset, dtype, shape, stride in data["results"]
        ],
    )
    _check(layout)
    return layout


def _check(layout: Layout) -> None:
    """ValueError if a number of ``layout`` points outside of what it has."""
    words, buffers = len(layout.words), range(layout.buffers)
    places = [w for w, *_ in (*layout.inner, *layout.fixes, *layout.dynamic)]
    places += [target for _, target in layout.inner]
    places += [w for w, _, _, _ in layout.cells]
    used = [b for _, b, _ in layout.fixes]
    for pairs in (layout.arena, layout.draws, layout.inputs, layout.made):
        used += [b for b, _ in pairs]
    # An array at the very end may be empty.
    if not all(0 <= w <= words for w in places) or not all(b in buffers for b in used):
        raise ValueError("a program points outside of itself")
    if len(layout.names) != len(layout.kernels):
        raise ValueError("a program has other stages than names")


def terms(expression: Any, inputs: Mapping[Any, int]) -> list[Any]:
    """A polynomial as ``[[coefficient, [[input, exponent], ...]], ...]``.

    Raises:
        CannotKeep: it is none with whole coefficients over ``inputs``.
    """
    symbols = sorted(expression.free_symbols, key=str)
    if not set(symbols) <= set(inputs):
        raise CannotKeep(f"a size, {expression}, of what is no input")
    if expression.is_Integer:
        return [[int(expression), []]]
    try:
        poly = sympy.Poly(expression, *symbols)
    except sympy.PolynomialError as error:
        raise CannotKeep(f"a size, {expression}, that is no polynomial") from error
    found = []
    for exponents, coefficient in poly.terms():
        if not coefficient.is_Integer:
            raise CannotKeep(f"a size, {expression}, with fractions")
        powers = [[inputs[s], e] for s, e in zip(symbols, exponents, strict=True) if e]
        found.append([int(coefficient), powers])
    return found


def polynomial(terms: list[Any], symbols: Mapping[int, Any]) -> Any:
    """The inverse of `terms`."""
    return sympy.Add(
        *(
            sympy.Mul(coefficient, *(symbols[i] ** exponent for i, exponent in powers))
            for coefficient, powers in terms
        )
    )
