"""Numbers of mask elements: integer expressions and floats, compared and computed with.

A non-bool element is a set of cases ``(Formula, number)``: exclusive and exhaustive. A number
is a sympy integer expression, or a `Real`: a float constant plus a rounded integer. Float
arithmetic is followed only where it is exact or only its sign is asked. Integers are taken as
unbounded in int32 and int64; arithmetic in narrower types wraps in earnest and is not
followed. What else decides a comparison is the range of its symbols, see `Arithmetic`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from sympy import Expr, Integer

from dspark_compile.passes.mask_formulas import (
    FALSE,
    TRUE,
    Cmp,
    Formula,
    Greatest,
    Least,
    Load,
    Magnitude,
    Quotient,
    Remainder,
    Unknown,
    atom_key,
    conj,
    disj,
    function_of,
    linear,
    negate,
)

INF = math.inf


@dataclass(frozen=True)
class Real:
    """A float: the constant ``const`` plus the integer ``part`` rounded to the dtype.

    Integers of magnitude up to ``limit`` are exact in every dtype the value went through.
    """

    const: float
    part: Expr = sympy.S.Zero
    limit: float = 2.0**53


Number: TypeAlias = Expr | Real
Cases: TypeAlias = tuple[tuple[Formula, Number], ...]
Value: TypeAlias = Formula | Cases

LIMIT = {
    torch.float64: 2.0**53,
    torch.float32: 2.0**24,
    torch.bfloat16: 2.0**8,
    torch.float16: 2.0**11,
}
WIDE = (torch.int32, torch.int64)
NARROW = (torch.int8, torch.uint8, torch.int16)
_HUGE = 2.0**66  # beyond this a float constant swallows any int64 added to it


def rounded(x: float, dtype: torch.dtype) -> float:
    """``x`` as ``dtype`` holds it, half types by way of float32 as kernels compute them."""
    if dtype == torch.float64 or math.isnan(x) or math.isinf(x):
        return x
    try:
        x = struct.unpack("f", struct.pack("f", x))[0]
        if dtype == torch.float16:
            return struct.unpack("e", struct.pack("e", x))[0]
    except OverflowError:
        return math.copysign(INF, x)
    if dtype == torch.bfloat16:
        bits = struct.unpack("I", struct.pack("f", x))[0]
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return struct.unpack("f", struct.pack("I", bits))[0]
    return x


def merge(cases: Iterable[tuple[Formula, Number]]) -> Cases:
    """One case for each number, the impossible ones dropped."""
    by_number: dict[Number, Formula] = {}
    for condition, number in cases:
        if condition != FALSE:
            old = by_number.get(number)
            by_number[number] = condition if old is None else disj(old, condition)
    if len(by_number) > 8:
        raise Unknown("the mask takes more than 8 different values")
    return tuple((c, n) for n, c in by_number.items())


def choose(condition: Formula, yes: Value, no: Value) -> Value:
    """``where(condition, yes, no)``."""
    other = negate(condition)
    if isinstance(yes, tuple) and isinstance(no, tuple):
        return merge(
            [(conj(condition, c), n) for c, n in yes] + [(conj(other, c), n) for c, n in no]
        )
    assert not isinstance(yes, tuple) and not isinstance(no, tuple)
    return disj(conj(condition, yes), conj(other, no))


class Arithmetic:
    """Numbers over symbols of known range: an index i is in ``0 <= i < extent[i]``, and what
    ``shape_env`` knows of the sizes holds."""

    def __init__(self, extent: dict[Expr, Expr], shape_env: Any) -> None:
        self.extent = extent
        self.shape_env = shape_env

    # bounds

    def range(self, terms: Iterable[tuple[Expr, int]], const: int) -> tuple[float, float]:
        """Bounds of a linear form, from 0 <= index < extent and the ranges of sizes."""
        return -self._top([(a, -c) for a, c in terms], -const), self._top(terms, const)

    def bounds(self, expr: Expr) -> tuple[float, float]:
        return self.range(*linear(expr))

    def _top(self, terms: Iterable[tuple[Expr, int]], const: int) -> float:
        """An upper bound: indices to their extreme first, so that sizes may cancel."""
        total: Expr = Integer(const)
        for atom, coefficient in terms:
            if atom in self.extent:
                total += coefficient * (self.extent[atom] - 1) if coefficient > 0 else 0
            elif (
                isinstance(atom, sympy.Mul)
                and atom.free_symbols & self.extent.keys()
                and all(f.is_Symbol and self.bounds(f)[0] >= 0 for f in atom.args)
            ):
                if coefficient > 0:
                    total += coefficient * atom.subs({i: e - 1 for i, e in self.extent.items()})
            else:
                total += coefficient * atom
        top = 0.0
        flat, constant = linear(total)
        for atom, coefficient in flat:
            low, high = self._atom_range(atom)
            top += coefficient * (high if coefficient > 0 else low)
        return top + constant

    def _atom_range(self, atom: Expr) -> tuple[float, float]:
        if atom in self.extent:
            return 0, self.bounds(self.extent[atom])[1] - 1
        if isinstance(atom, sympy.Symbol):
            known = self.shape_env and self.shape_env.var_to_range.get(atom)
            if not known:
                return (0 if atom.is_nonnegative else -INF), INF
            return tuple(
                float(e) if e.is_Integer else s * INF
                for e, s in ((known.lower, -1), (known.upper, 1))
            )  # type: ignore[return-value]
        if isinstance(atom, Load):
            return -INF, INF
        function = function_of(atom)
        if function is Magnitude:
            low, high = self.bounds(atom.args[0])
            return 0, max(-low, high)
        if function in (Least, Greatest):
            pick = min if function is Least else max
            lows, highs = zip(*map(self.bounds, atom.args))
            return pick(lows), pick(highs)
        if function in (Quotient, Remainder):
            (low, high), (least, most) = self.bounds(atom.args[0]), self.bounds(atom.args[1])
            if least < 1:
                return -INF, INF
            if function is Remainder:
                return 0, min(most - 1, high) if low >= 0 else most - 1
            return (
                (0.0 if most == INF else low // most)
                if low >= 0
                else (-INF if low == -INF else low // least),
                INF if high == INF else max(high // least, 0.0),
            )
        if isinstance(atom, sympy.Mul):
            ranges = [self.bounds(f) for f in atom.args]
            if all(low >= 0 for low, _ in ranges):
                return math.prod(low for low, _ in ranges), (
                    INF if any(h == INF for _, h in ranges) else math.prod(h for _, h in ranges)
                )
        return -INF, INF

    # comparisons

    def le(self, expr: Expr) -> Formula:
        """``expr <= 0``."""
        terms, const = linear(expr)
        for atom, coefficient in terms:
            function = function_of(atom)
            if function in (Least, Greatest, Magnitude):
                split = (atom.args[0], -atom.args[0]) if function is Magnitude else atom.args
                parts = [self.le(expr + coefficient * (s - atom)) for s in split]
                together = (coefficient > 0) == (function is not Least)
                return conj(*parts) if together else disj(*parts)
        if terms:
            divisor = math.gcd(*(c for _, c in terms))
            terms = tuple((a, c // divisor) for a, c in terms)
            const = -(-const // divisor)
        low, high = self.range(terms, const)
        if high <= 0 or low > 0:
            return TRUE if high <= 0 else FALSE
        return Cmp("<=", frozenset(terms), const)

    def eq(self, expr: Expr) -> Formula:
        """``expr == 0``."""
        terms, const = linear(expr)
        if not terms:
            return TRUE if const == 0 else FALSE
        divisor = math.gcd(*(c for _, c in terms))
        if const % divisor:
            return FALSE
        if dict(terms)[min((a for a, _ in terms), key=atom_key)] < 0:
            divisor = -divisor
        terms, const = tuple((a, c // divisor) for a, c in terms), const // divisor
        low, high = self.range(terms, const)
        if low > 0 or high < 0:
            return FALSE
        return TRUE if low == high == 0 else Cmp("==", frozenset(terms), const)

    def order(self, op: str, a: Expr, b: Expr) -> Formula:
        if op == "eq":
            return self.eq(a - b)
        if op == "ne":
            return negate(self.eq(a - b))
        if op in ("gt", "ge"):
            a, b = b, a
        return self.le(a - b + (1 if op in ("lt", "gt") else 0))

    def compare(self, op: str, a: Number, b: Number) -> Formula:
        """``a op b`` for op in lt le gt ge eq ne."""
        if not isinstance(a, Real) and not isinstance(b, Real):
            return self.order(op, a, b)
        assert isinstance(a, Real) and isinstance(b, Real)
        if a.part == 0 and b.part != 0:
            a, b = b, a
            op = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}.get(op, op)
        if b.part != 0:
            if not (a.const == b.const == 0 and self.exact(a) and self.exact(b)):
                raise Unknown("compares floats that may have been rounded")
            return self.order(op, a.part, b.part)
        constant, d = a.part == 0, b.const
        if not constant and abs(a.const) >= _HUGE and abs(d) <= 2.0**64:
            constant = True  # |part| < 2^63: the sum's sign is that of the constant
        if constant or (math.isinf(d) and a.const == 0):
            x = a.const if constant else 0.0
            table = {
                "lt": x < d, "le": x <= d, "gt": x > d,
                "ge": x >= d, "eq": x == d, "ne": x != d,
            }  # fmt: skip
            return TRUE if table[op] else FALSE
        # Rounding is monotone and exact up to the limit, so it cannot cross a small constant.
        if a.const != 0 or math.isnan(d) or abs(d) >= a.limit - 1:
            raise Unknown("compares floats that may have been rounded")
        if d != math.floor(d):
            if op in ("eq", "ne"):
                return FALSE if op == "eq" else TRUE
            op, d = ("le", math.floor(d)) if op in ("lt", "le") else ("ge", math.ceil(d))
        return self.order(op, a.part, Integer(int(d)))

    def exact(self, x: Real) -> bool:
        low, high = self.bounds(x.part)
        return -x.limit <= low and high <= x.limit

    # conversions and arithmetic

    def cast(self, value: Value, target: torch.dtype, source: torch.dtype | None = None) -> Value:
        """``value``, of dtype ``source``, as an element of dtype ``target``."""
        if source == target:
            return value
        if target == torch.bool:
            if not isinstance(value, tuple):
                return value
            return disj(
                *(
                    conj(c, self.compare("ne", n, Real(0.0) if isinstance(n, Real) else Integer(0)))
                    for c, n in value
                )
            )
        if not isinstance(value, tuple):
            value = merge([(value, Integer(1)), (negate(value), Integer(0))])
        return merge((c, self._cast(n, target)) for c, n in value)

    def _cast(self, n: Number, target: torch.dtype) -> Number:
        if target in LIMIT:
            limit = LIMIT[target]
            if not isinstance(n, Real):
                exact = n.is_Integer
                return Real(rounded(float(n), target)) if exact else Real(0.0, n, limit)
            if n.part == 0:
                return Real(rounded(n.const, target))
            if n.const != 0:
                raise Unknown("casts a rounded float")
            return Real(0.0, n.part, min(limit, n.limit))
        if isinstance(n, Real):
            if n.part != 0:
                if n.const == 0 and self.exact(n):
                    return self._cast(n.part, target)
                raise Unknown("casts a float that may have been rounded to an integer")
            if not math.isfinite(n.const) or abs(n.const) >= 2**31:
                raise Unknown(f"casts {n.const} to an integer")
            n = Integer(math.trunc(n.const))
        if target == torch.int64:
            return n
        if target in (torch.int32, *NARROW):
            info = torch.iinfo(target)
            low, high = self.bounds(n)
            if info.min <= low and high <= info.max:
                return n
            if target == torch.int32 and not n.is_Integer:
                return n
        raise Unknown(f"casts to {target}")

    def arithmetic(self, op: str, a: Number, b: Number, dtype: torch.dtype) -> Number:
        """``a op b`` computed in ``dtype``."""
        if not isinstance(a, Real) and not isinstance(b, Real):
            if dtype not in WIDE:
                raise Unknown(f"computes in {dtype}")
            result = self._integers(op, a, b)
            if result.is_Integer and abs(result) >= 2 ** (31 if dtype == torch.int32 else 62):
                raise Unknown("may overflow")
            return result
        assert isinstance(a, Real) and isinstance(b, Real)
        if a.part == 0 and b.part == 0:
            return Real(self._constants(op, a.const, b.const, dtype))
        if op in ("add", "sub") and b == Real(0.0):
            return a
        if op == "add" and a == Real(0.0):
            return b
        if op == "mul" and Real(1.0) in (a, b):
            return b if a == Real(1.0) else a
        if op == "mul" and Real(0.0) in (a, b) and a.const == 0 and b.const == 0:
            return Real(0.0)
        limit = min(LIMIT[dtype], a.limit, b.limit)
        if op == "add" and a.part == 0:
            a, b = b, a
        if op in ("add", "sub") and b.part == 0 and a.const == 0 and abs(b.const) >= _HUGE:
            return Real(b.const if op == "add" else -b.const, a.part, limit)
        if op == "sub" and a.part == 0 and b.const == 0 and abs(a.const) >= _HUGE:
            return Real(a.const, -b.part, limit)
        parts = []
        for x in (a, b):
            whole = math.isfinite(x.const) and x.const == math.floor(x.const)
            if not whole or not self.exact(x) or abs(x.const) > limit:
                raise Unknown("computes with floats that may be rounded")
            parts.append(x.part + int(x.const))
        result = Real(0.0, self._integers(op, *parts), limit)
        if not self.exact(result):
            raise Unknown("computes with floats that may be rounded")
        return result

    def _constants(self, op: str, a: float, b: float, dtype: torch.dtype) -> float:
        if op == "add":
            x = a + b
        elif op == "sub":
            x = a - b
        elif op == "mul":
            x = a * b
        elif op in ("min", "max"):
            x = math.nan if math.isnan(a) or math.isnan(b) else (min if op == "min" else max)(a, b)
        else:
            raise Unknown(f"computes {op} on floats")
        return rounded(x, dtype)

    def _integers(self, op: str, a: Expr, b: Expr) -> Expr:
        if op == "add":
            return a + b
        if op == "sub":
            return a - b
        if op == "mul":
            return a * b
        if op in ("min", "max"):
            gap = self.bounds(a - b)
            if gap[1] <= 0 or gap[0] >= 0:
                return a if (gap[1] <= 0) == (op == "min") else b
            return (Least if op == "min" else Greatest)(*sorted((a, b), key=str))
        low = self.bounds(b)[0]
        if low <= 0 and not (b.is_Integer and b != 0):
            raise Unknown("divides by a number that may not be positive")
        if op == "trunc":
            if self.bounds(a)[0] < 0 or low <= 0:
                raise Unknown("divides towards zero")
            op = "floor"
        return self.quotient(a, b) if op == "floor" else self.remainder(a, b)

    def quotient(self, a: Expr, b: Expr) -> Expr:
        """``a // b``; multiples of b leave the division."""
        whole, rest = self._divide(a, b)
        return whole if self._below(rest, b) else whole + Quotient(rest, b)

    def remainder(self, a: Expr, b: Expr) -> Expr:
        """``a % b``."""
        _, rest = self._divide(a, b)
        return rest if self._below(rest, b) else Remainder(rest, b)

    def _below(self, x: Expr, b: Expr) -> bool:
        return self.bounds(x)[0] >= 0 and self.bounds(x - b)[1] < 0

    def _divide(self, a: Expr, b: Expr) -> tuple[Expr, Expr]:
        """``a = whole * b + rest``, as far as can be seen."""
        if b == 0:
            raise Unknown("divides by zero")
        if a.is_Integer and b.is_Integer:
            return Integer(int(a) // int(b)), Integer(int(a) % int(b))
        terms, const = linear(a)
        whole, rest = Integer(0), Integer(const)
        if b.is_Integer:
            whole, rest = Integer(const // int(b)), Integer(const % int(b))
        for term in [c * atom for atom, c in terms]:
            ratio = term / b
            if sympy.denom(ratio) == 1:
                whole += ratio
            else:
                rest += term
        return whole, rest
