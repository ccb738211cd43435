"""Formulas as text: predicates that kernels read, and summaries for people.

`Printer` writes a formula in the language of ``ops/predicate.py``, in one canonical order:
bounds on k first, loads last, as kernels read left to right. Equal masks print alike.
`summary` names the usual shapes: causal, sliding, chunked, packed, padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
from sympy import Expr

from dspark_compile.passes.mask_formulas import (
    LEAD,
    TRUE,
    B,
    Bit,
    Cmp,
    Const,
    Formula,
    Greatest,
    H,
    Join,
    K,
    Least,
    Load,
    Magnitude,
    Q,
    Quotient,
    Remainder,
    Unknown,
    atom_key,
    atoms,
    function_of,
    linear,
    unlinear,
)


class Printer:
    """Formulas as predicate text, with names for leaves and size symbols."""

    def __init__(self, tensors: Mapping[int, str], symbols: Mapping[Expr, str]) -> None:
        self.tensors, self.symbols = tensors, symbols

    def formula(self, f: Formula) -> str:
        if isinstance(f, Const):
            return str(f.value)
        if isinstance(f, Bit):
            return ("" if f.positive else "~") + self.atom(f.load)
        if isinstance(f, Cmp):
            return self.compare(f)
        parts = sorted((self._rank(p), self._inner(p)) for p in f.parts)
        return f" {f.op} ".join(text for _, text in parts)

    def _rank(self, f: Formula) -> tuple[int, int]:
        """Bounds on k first, then other comparisons, loads last: kernels read left to right."""
        if isinstance(f, Cmp):
            loads = any(a.has(Load) for a, _ in f.terms)
            lead = min(atom_key(a) for a, _ in f.terms)
            # k <= before k >=
            falling = any(a == K and c < 0 for a, c in f.terms)
            return (0 if lead[:2] == (0, 0) and f.op == "<=" else 2 if loads else 1, int(falling))
        return (3 if isinstance(f, Bit) else 4, 0)

    def _inner(self, f: Formula) -> str:
        text = self.formula(f)
        return text if isinstance(f, Bit) else f"({text})"

    def compare(self, f: Cmp) -> str:
        ordered = sorted(f.terms, key=lambda t: atom_key(t[0]))
        lead, coefficient = ordered[0]
        sign = 1 if coefficient > 0 else -1
        rest = [(a, -sign * c) for a, c in ordered[1:]]
        op = {"<=": "<=" if sign > 0 else ">="}.get(f.op, f.op)
        return f"{self.sum([(lead, abs(coefficient))], 0)} {op} {self.sum(rest, -sign * f.const)}"

    def sum(self, terms: Sequence[tuple[Expr, int]], const: int) -> str:
        pieces = [
            (c > 0, (f"{abs(c)}*" if abs(c) != 1 else "") + self.atom(a, product=abs(c) != 1))
            for a, c in sorted(terms, key=lambda t: (t[1] < 0, atom_key(t[0])))
        ]
        if const or not pieces:
            pieces.append((const >= 0, str(abs(const))))
        text = "" if pieces[0][0] else "-"
        for i, (positive, piece) in enumerate(pieces):
            text += (f" {'+' if positive else '-'} " if i else "") + piece
        return text

    def expr(self, e: Expr) -> str:
        return self.sum(*linear(e))

    def atom(self, a: Expr, product: bool = False) -> str:
        if a in LEAD:
            return a.name
        if isinstance(a, Load):
            name, index = self.tensors[int(a.args[0])], a.args[1:]
            return f"{name}[{', '.join(map(self.expr, index))}]" if index else name
        if isinstance(a, sympy.Symbol):
            return self.symbols[a]
        function = function_of(a)
        if function in (Quotient, Remainder):
            x, y = (self._factor(e) for e in a.args)
            return f"({x} {'//' if function is Quotient else '%'} {y})"
        call = {Least: "min", Greatest: "max", Magnitude: "abs"}.get(function)
        if call:
            return f"{call}({', '.join(sorted(map(self.expr, a.args)))})"
        if isinstance(a, sympy.Mul):
            return "*".join(sorted(map(self._factor, a.args)))
        if isinstance(a, sympy.Pow) and a.args[1].is_Integer and 0 < a.args[1] < 4:
            return "*".join([self._factor(a.args[0])] * int(a.args[1]))
        raise Unknown(f"the size expression {a} has no place in a predicate")

    def _factor(self, e: Expr) -> str:
        simple = e in LEAD or isinstance(e, (Load, sympy.Symbol)) or (e.is_Integer and e >= 0)
        return self.expr(e) if simple else f"({self.expr(e)})"


def summary(formula: Formula) -> str:
    """What the formula is called: "full", "causal+sliding(512)", "causal+padding", "predicate"."""
    if formula == TRUE:
        return "full"
    parts = formula.parts if isinstance(formula, Join) and formula.op == "&" else {formula}
    names: list[tuple[int, str]] = []
    causal: Expr | None = None
    windows: list[Expr] = []
    for part in parts:
        about = list(atoms(part))
        if isinstance(part, Cmp):
            terms = dict(part.terms)
            sign = terms.pop(K, 0)
            rest = unlinear([(a, -c) for a, c in terms.items()], -part.const)
            in_rest = rest.free_symbols
            if part.op == "<=" and abs(sign) == 1 and K not in in_rest:
                follows = rest.coeff(Q) == sign or (Q not in terms and rest.has(Load))
                if not in_rest & {B, H, Q} and not rest.has(Load):
                    # M = 1: the row's number is a constant
                    follows = True
                if follows:
                    if sign > 0:
                        causal = rest
                    else:
                        windows.append(-rest)
                    continue
            loads = [a for a in about if isinstance(a, Load)]
            if part.op == "==" and len(part.terms) == 2 and sum(c for _, c in part.terms) == 0:
                if len(loads) == 2 and loads[0].args[0] == loads[1].args[0]:
                    names.append((3, "packed"))
                    continue
                if all(function_of(a) is Quotient for a in about):
                    names.append((2, f"chunked({about[0].args[1]})"))
                    continue
        symbols: set[Expr] = set().union(*(a.free_symbols for a in about))
        if any(a.has(Load) for a in about) and symbols <= {B, K} and K in symbols:
            names.append((4, "padding"))
        else:
            return "predicate"
    if causal is not None:
        names.append((0, "causal"))
    for low in windows:
        width = sympy.expand(causal - low + 1) if causal is not None else None
        if width is None:
            return "predicate"
        names.append((1, f"sliding({width})" if width.is_Integer else "sliding"))
    return "+".join(dict.fromkeys(name for _, name in sorted(names)))
