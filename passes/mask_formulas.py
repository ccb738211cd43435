"""Formulas: what a mask says of one element, and the algebra that keeps it short.

A `Formula` is in negation normal form. Its literals are comparisons of integer linear forms
(`Cmp`) and elements of bool tensors (`Bit`); the atoms of a linear form are the four indices,
size symbols, loads from tensors, and calls of `Least`, `Quotient` and their like, which sympy
leaves alone. `conj`, `disj` and `negate` build formulas and resolve what is implied or
contradictory on sight; that is no decision procedure, and none is needed: a formula that
could be shorter is still right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
from sympy import Expr
from torch import fx


class Unknown(Exception):
    """A value is outside what the interpreter follows."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


# --- atoms: indices, loads, functions -------------------------------------------------------

B, H, Q, K = INDICES = sympy.symbols("b h q k", integer=True, nonnegative=True)
LEAD = {K: 0, Q: 1, H: 2, B: 3}


class Load(sympy.Function):
    """``Load(i, *index)``: an element of leaf tensor number i."""

    is_integer = True
    is_extended_real = True


class _Call(sympy.Function):
    """An integer function that sympy does not look into."""

    is_integer = True
    is_extended_real = True


class Least(_Call):
    """``min``."""


class Greatest(_Call):
    """``max``."""


class Magnitude(_Call):
    """``abs``."""


class Quotient(_Call):
    """``a // b``, rounded down."""


class Remainder(_Call):
    """``a % b``, of b's sign."""


# What the shape environment calls the same things in sizes.
_SAME_AS: dict[str, type[Expr]] = {
    "Min": Least, "Max": Greatest, "Abs": Magnitude, "FloorDiv": Quotient, "CleanDiv": Quotient,
    "Mod": Remainder, "PythonMod": Remainder,
}  # fmt: skip


def function_of(atom: Expr) -> type[Expr]:
    """The function that ``atom`` is a call of, by the names used here."""
    return _SAME_AS.get(type(atom).__name__, type(atom))


@lru_cache(maxsize=8192)
def atom_key(atom: Expr) -> tuple[Any, ...]:
    """The place of an atom in canonical order: k, q, h, b, then loads, then sizes."""
    if atom in LEAD:
        return (0, LEAD[atom], "")
    if atom.has(*INDICES):
        return (1, 0, str(atom))
    return (2 if atom.has(Load) else 3, 0, str(atom))


# --- linear forms ----------------------------------------------------------------------------


@lru_cache(maxsize=8192)
def linear(expr: Expr) -> tuple[tuple[tuple[Expr, int], ...], int]:
    """``expr`` as integer coefficients of atoms (symbols, loads, products) and a constant."""
    if any(isinstance(a, sympy.Add) for m in expr.atoms(sympy.Mul) for a in m.args):
        expr = sympy.expand(expr)
    terms: list[tuple[Expr, int]] = []
    const = 0
    for term in sympy.Add.make_args(expr):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            raise Unknown(f"the index arithmetic {expr} is not over integers")
        if rest == 1:
            const += int(coefficient)
        else:
            terms.append((rest, int(coefficient)))
    return tuple(terms), const


def unlinear(terms: Iterable[tuple[Expr, int]], const: int) -> Expr:
    return sympy.Add(*(c * a for a, c in terms), const)


# --- formulas --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Const:
    """True or False."""

    value: bool


@dataclass(frozen=True)
class Cmp:
    """``sum(coefficient * atom) + const  op  0`` with op one of ``<= == !=``."""

    op: str
    terms: frozenset[tuple[Expr, int]]
    const: int


@dataclass(frozen=True)
class Bit:
    """An element of a bool leaf tensor, or its negation."""

    load: Expr
    positive: bool = True


@dataclass(frozen=True)
class Join:
    """A conjunction (``&``) or disjunction (``|``) of at least two formulas."""

    op: str
    parts: frozenset[Formula]


Formula: TypeAlias = Const | Cmp | Bit | Join
TRUE, FALSE = Const(True), Const(False)


def negate(f: Formula) -> Formula:
    """Not ``f``, in negation normal form."""
    if isinstance(f, Const):
        return FALSE if f.value else TRUE
    if isinstance(f, Bit):
        return Bit(f.load, not f.positive)
    if isinstance(f, Join):
        return Join("|" if f.op == "&" else "&", frozenset(map(negate, f.parts)))
    if f.op == "<=":  # not (e <= 0)  =  e >= 1  =  1 - e <= 0
        return Cmp("<=", frozenset((a, -c) for a, c in f.terms), 1 - f.const)
    return Cmp("!=" if f.op == "==" else "==", f.terms, f.const)


def _implies(a: Formula, b: Formula) -> bool:
    """Whether ``a`` obviously implies ``b``."""
    if a == b:
        return True
    if isinstance(a, Join) and a.op == "|":
        return all(_implies(p, b) for p in a.parts)
    if isinstance(b, Join) and b.op == "&":
        return all(_implies(a, p) for p in b.parts)
    if isinstance(b, Join) and any(_implies(a, p) for p in b.parts):
        return True
    if isinstance(a, Join):
        return any(_implies(p, b) for p in a.parts)
    if isinstance(a, Cmp) and isinstance(b, Cmp) and a.terms == b.terms:
        if a.op == "<=":
            return {"<=": a.const >= b.const, "!=": a.const > b.const, "==": False}[b.op]
        if a.op == "==":
            return {"<=": a.const >= b.const, "!=": a.const != b.const, "==": False}[b.op]
    return False


def conj(*formulas: Formula) -> Formula:
    """All of ``formulas``: flattened, with implied and contradictory parts resolved."""
    pending: list[Formula] = list(formulas)
    parts: list[Formula] = []
    while pending:
        f = pending.pop(0)
        if isinstance(f, Join) and f.op == "&":
            pending = [*f.parts, *pending]
            continue
        if f == FALSE or any(_implies(p, negate(f)) for p in parts):
            return FALSE
        if isinstance(f, Join):  # a & (~a | c)  =  a & c
            rest = [o for o in f.parts if not any(_implies(p, negate(o)) for p in parts)]
            if len(rest) < len(f.parts):
                pending.insert(0, disj(*rest))
                continue
        if f == TRUE or any(_implies(p, f) for p in parts):
            continue
        # What is there already may follow from f, or become simpler by it: see it again.
        again = [
            p for p in parts if isinstance(p, Join) and any(_implies(f, negate(o)) for o in p.parts)
        ]
        parts = [p for p in parts if p not in again and not _implies(f, p)] + [f]
        pending += again
    if len(parts) < 2:
        return parts[0] if parts else TRUE
    if _size(parts) > 96:
        raise Unknown("the mask's formula is too large")
    return Join("&", frozenset(parts))


def disj(*formulas: Formula) -> Formula:
    """Any of ``formulas``."""
    return negate(conj(*map(negate, formulas)))


def _size(parts: Iterable[Formula]) -> int:
    return sum(_size(p.parts) if isinstance(p, Join) else 1 for p in parts)


def atoms(f: Formula) -> Iterable[Expr]:
    """What the literals of ``f`` speak of: indices, sizes, loads and functions of them."""
    if isinstance(f, Join):
        for part in f.parts:
            yield from atoms(part)
    elif isinstance(f, Bit):
        yield f.load
    elif isinstance(f, Cmp):
        yield from (atom for atom, _ in f.terms)
