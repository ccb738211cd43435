"""Prove what an attention mask means: from the subgraph that builds it to a predicate.

`MaskProver.prove(node, (B, H, M, N))` reads the functional ATen graph behind a mask operand
and returns a `MaskProof`, text in the language of `dspark_compile.ops.predicate` with the
nodes behind its names, or `Unproved` with the node and reason that stood in the way.

How: the value of one mask element is asked for at the symbolic index ``(b, h, q, k)``. Each
op answers by asking its inputs at the indices that it reads (`_Interpreter.value`), until
factories (arange, full, ...) give numbers and real tensors stay as loads ``t0[b, k]``.

    bool element    a `Formula` in negation normal form over integer comparisons and bool loads
    other element   cases ``(Formula, number)``: exclusive, exhaustive; the number is a sympy
                    integer expression, or a `Real`, a float constant plus a rounded integer

Nothing is assumed:

- A node whose op is not understood becomes a leaf tensor, as long as one element does not
  depend on both q and k: such a tensor is as large as the mask and nothing is gained. A
  buffer named ``bias`` that happens to be lower triangular is such a leaf; it is
  recognised only if the caller hands over its values (``constants``) and guards them.
- Sizes are compared by what the shape environment already knows. No guard is added.
- Float arithmetic is followed only where it is exact or only its sign is asked.
- Integers are taken as unbounded in int32 and int64; arithmetic in narrower types wraps
  in earnest and is not followed.

Additive masks give ``mask_value`` V. Where several of them forbid the same key the graph
holds 2V, or -inf after overflow, and the proof says V with ``exact=False``. A row with at
least one allowed key is the same either way: exp(V - top) is 0 already (|V| >= 1e4). A row
with none averages over all keys instead of those forbidden once; such rows are padding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import sympy
import torch
from sympy import Expr, Integer
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
INF = math.inf


@dataclass(frozen=True)
class MaskProof:
    """What a mask means. See `dspark_compile.ops.attention` for how ops read the fields.

    Attributes:
        predicate: text in the language of ``ops/predicate.py``; "" allows everything.
        tensors: the nodes behind ``t0, t1, ...``.
        ints: the SymInt nodes or numbers behind ``n0, n1, ...``.
        mask_value: what is added to a forbidden key's score; None forbids it for good.
        bias: an additive float tensor that remains beside the predicate, or None.
        kind: a summary for people: "causal+sliding(512)", "causal+padding", "predicate".
        exact: False if fully masked rows may differ (see the module's docstring).
        constants: the nodes whose given values were used; the caller guards them.
    """

    predicate: str
    tensors: tuple[fx.Node, ...]
    ints: tuple[fx.Node | int, ...]
    mask_value: float | None
    bias: fx.Node | None
    kind: str
    exact: bool = True
    constants: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Unproved:
    """Why a mask stays a tensor, and the node that stood in the way."""

    reason: str
    node: fx.Node


class _Unknown(Exception):
    """A value is outside what the interpreter follows."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


# --- formulas -------------------------------------------------------------------------------


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


def _function(atom: Expr) -> type[Expr]:
    return _SAME_AS.get(type(atom).__name__, type(atom))


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
        raise _Unknown("the mask's formula is too large")
    return Join("&", frozenset(parts))


def disj(*formulas: Formula) -> Formula:
    """Any of ``formulas``."""
    return negate(conj(*map(negate, formulas)))


def _size(parts: Iterable[Formula]) -> int:
    return sum(_size(p.parts) if isinstance(p, Join) else 1 for p in parts)


def _literals(f: Formula) -> Iterable[Formula]:
    if isinstance(f, Join):
        for part in f.parts:
            yield from _literals(part)
    else:
        yield f


# --- numbers --------------------------------------------------------------------------------


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

_LIMIT = {
    torch.float64: 2.0**53,
    torch.float32: 2.0**24,
    torch.bfloat16: 2.0**8,
    torch.float16: 2.0**11,
}
_WIDE = (torch.int32, torch.int64)
_NARROW = (torch.int8, torch.uint8, torch.int16)
_HUGE = 2.0**66  # beyond this a float constant swallows any int64 added to it


def _round(x: float, dtype: torch.dtype) -> float:
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


def _merge(cases: Iterable[tuple[Formula, Number]]) -> Cases:
    """One case for each number, the impossible ones dropped."""
    by_number: dict[Number, Formula] = {}
    for condition, number in cases:
        if condition != FALSE:
            old = by_number.get(number)
            by_number[number] = condition if old is None else disj(old, condition)
    if len(by_number) > 8:
        raise _Unknown("the mask takes more than 8 different values")
    return tuple((c, n) for n, c in by_number.items())


def _choose(condition: Formula, yes: Value, no: Value) -> Value:
    """``where(condition, yes, no)``."""
    other = negate(condition)
    if isinstance(yes, tuple) and isinstance(no, tuple):
        return _merge(
            [(conj(condition, c), n) for c, n in yes] + [(conj(other, c), n) for c, n in no]
        )
    assert not isinstance(yes, tuple) and not isinstance(no, tuple)
    return disj(conj(condition, yes), conj(other, no))


@lru_cache(maxsize=8192)
def _linear(expr: Expr) -> tuple[tuple[tuple[Expr, int], ...], int]:
    """``expr`` as integer coefficients of atoms (symbols, loads, products) and a constant."""
    if any(isinstance(a, sympy.Add) for m in expr.atoms(sympy.Mul) for a in m.args):
        expr = sympy.expand(expr)
    terms: list[tuple[Expr, int]] = []
    const = 0
    for term in sympy.Add.make_args(expr):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            raise _Unknown(f"the index arithmetic {expr} is not over integers")
        if rest == 1:
            const += int(coefficient)
        else:
            terms.append((rest, int(coefficient)))
    return tuple(terms), const


def _unlinear(terms: Iterable[tuple[Expr, int]], const: int) -> Expr:
    return sympy.Add(*(c * a for a, c in terms), const)


# --- printing -------------------------------------------------------------------------------

_B, _H, _Q, _K = INDICES = sympy.symbols("b h q k", integer=True, nonnegative=True)
_LEAD = {_K: 0, _Q: 1, _H: 2, _B: 3}


@lru_cache(maxsize=8192)
def _atom_key(atom: Expr) -> tuple[Any, ...]:
    """The place of an atom in canonical order: k, q, h, b, then loads, then sizes."""
    if atom in _LEAD:
        return (0, _LEAD[atom], "")
    if atom.has(*INDICES):
        return (1, 0, str(atom))
    return (2 if atom.has(Load) else 3, 0, str(atom))


class _Printer:
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
            lead = min(_atom_key(a) for a, _ in f.terms)
            # k <= before k >=
            falling = any(a == _K and c < 0 for a, c in f.terms)
            return (0 if lead[:2] == (0, 0) and f.op == "<=" else 2 if loads else 1, int(falling))
        return (3 if isinstance(f, Bit) else 4, 0)

    def _inner(self, f: Formula) -> str:
        text = self.formula(f)
        return text if isinstance(f, Bit) else f"({text})"

    def compare(self, f: Cmp) -> str:
        ordered = sorted(f.terms, key=lambda t: _atom_key(t[0]))
        lead, coefficient = ordered[0]
        sign = 1 if coefficient > 0 else -1
        rest = [(a, -sign * c) for a, c in ordered[1:]]
        op = {"<=": "<=" if sign > 0 else ">="}.get(f.op, f.op)
        return f"{self.sum([(lead, abs(coefficient))], 0)} {op} {self.sum(rest, -sign * f.const)}"

    def sum(self, terms: Sequence[tuple[Expr, int]], const: int) -> str:
        pieces = [
            (c > 0, (f"{abs(c)}*" if abs(c) != 1 else "") + self.atom(a, product=abs(c) != 1))
            for a, c in sorted(terms, key=lambda t: (t[1] < 0, _atom_key(t[0])))
        ]
        if const or not pieces:
            pieces.append((const >= 0, str(abs(const))))
        text = "" if pieces[0][0] else "-"
        for i, (positive, piece) in enumerate(pieces):
            text += (f" {'+' if positive else '-'} " if i else "") + piece
        return text

    def expr(self, e: Expr) -> str:
        return self.sum(*_linear(e))

    def atom(self, a: Expr, product: bool = False) -> str:
        if a in _LEAD:
            return a.name
        if isinstance(a, Load):
            name, index = self.tensors[int(a.args[0])], a.args[1:]
            return f"{name}[{', '.join(map(self.expr, index))}]" if index else name
        if isinstance(a, sympy.Symbol):
            return self.symbols[a]
        function = _function(a)
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
        raise _Unknown(f"the size expression {a} has no place in a predicate")

    def _factor(self, e: Expr) -> str:
        simple = e in _LEAD or isinstance(e, (Load, sympy.Symbol)) or (e.is_Integer and e >= 0)
        return self.expr(e) if simple else f"({self.expr(e)})"


# --- constants the caller vouches for -------------------------------------------------------


def _band(tensor: torch.Tensor) -> tuple[int | None, int | None] | None:
    """``(low, high)`` if a 0-1 tensor equals ``low <= k - q <= high`` (None: no bound)."""
    if tensor.dim() < 2 or any(s != 1 for s in tensor.shape[:-2]) or tensor.numel() == 0:
        return None
    mask = tensor.detach().reshape(tensor.shape[-2:])
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            return None
        mask = mask != 0
    rows, columns = mask.shape
    allowed = mask.nonzero()
    if not len(allowed):
        return None
    difference = allowed[:, 1] - allowed[:, 0]
    low, high = int(difference.min()), int(difference.max())
    gap = torch.arange(columns, device=mask.device) - torch.arange(
        rows, device=mask.device
    ).unsqueeze(1)
    if not torch.equal(mask, (gap >= low) & (gap <= high)):
        return None
    return (None if low <= 1 - rows else low), (None if high >= columns - 1 else high)


def recognise_constant(tensor: torch.Tensor) -> str | None:
    """The predicate over ``q, k`` that a 0-1 tensor ``[..., q, k]`` equals, element by
    element, or None: ``tril(ones(n, n))`` is ``"k <= q"``, ``ones`` is ``""``."""
    band = _band(tensor)
    if band is None:
        return None
    low, high = band
    parts = []
    if high is not None:
        parts.append(Cmp("<=", frozenset({(_K, 1), (_Q, -1)}), -high))
    if low is not None:
        parts.append(Cmp("<=", frozenset({(_K, -1), (_Q, 1)}), low))
    formula = conj(*parts)
    return "" if formula == TRUE else _Printer({}, {}).formula(formula)


# --- the interpreter ------------------------------------------------------------------------

Handler = Callable[["_Interpreter", fx.Node, tuple[Expr, ...]], Value]
_HANDLERS: dict[Any, Handler] = {}


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            space, _, op = name.rpartition(".")
            packet = getattr(getattr(torch.ops, space or "aten"), op, None)
            if packet is not None:
                _HANDLERS[packet] = handler
        return handler

    return register


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _val(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if value is None:
        raise _Unknown("has no recorded value", node)
    return value


def _size_expr(size: Any) -> Expr:
    """A size (int, SymInt or the node of one) as a sympy integer."""
    if isinstance(size, fx.Node):
        size = _val(size)
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return sympy.sympify(size.node.expr) if known is None else Integer(known)
    if isinstance(size, int):
        return Integer(int(size))
    raise _Unknown(f"{size} is not an integer")


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))


def _shape_env(values: Iterable[Any]) -> Any:
    for value in values:
        if isinstance(value, torch.SymInt) and value.node.shape_env is not None:
            return value.node.shape_env
    return None


class _Interpreter:
    """Values of graph elements as functions of ``(b, h, q, k)`` in one score shape."""

    def __init__(
        self,
        score_shape: Sequence[Any],
        constants: Mapping[fx.Node, torch.Tensor],
        leaves: dict[fx.Node, int],
    ) -> None:
        self.shape = tuple(_val(s) if isinstance(s, fx.Node) else s for s in score_shape)
        self.constants = constants
        self.leaves = leaves  # leaf node -> number, shared by all interpreters of a prover
        self.extent = {i: _size_expr(s) for i, s in zip(INDICES, self.shape)}
        self.shape_env = _shape_env(self.shape)
        self.memo: dict[Any, Value | _Unknown] = {}
        self.fresh: dict[tuple[Expr, Expr], Expr] = {}  # (place, size) -> a symbol for it
        self.origin: dict[Expr, frozenset[Expr]] = {}  # such a symbol -> what it depends on
        self.used_constants: dict[fx.Node, None] = {}

    # bounds

    def range(self, terms: Iterable[tuple[Expr, int]], const: int) -> tuple[float, float]:
        """Bounds of a linear form, from 0 <= index < extent and the ranges of sizes."""
        return -self._top([(a, -c) for a, c in terms], -const), self._top(terms, const)

    def bounds(self, expr: Expr) -> tuple[float, float]:
        return self.range(*_linear(expr))

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
        flat, constant = _linear(total)
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
        function = _function(atom)
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
        terms, const = _linear(expr)
        for atom, coefficient in terms:
            function = _function(atom)
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
        terms, const = _linear(expr)
        if not terms:
            return TRUE if const == 0 else FALSE
        divisor = math.gcd(*(c for _, c in terms))
        if const % divisor:
            return FALSE
        if dict(terms)[min((a for a, _ in terms), key=_atom_key)] < 0:
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
            if not (a.const == b.const == 0 and self._exact(a) and self._exact(b)):
                raise _Unknown("compares floats that may have been rounded")
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
            raise _Unknown("compares floats that may have been rounded")
        if d != math.floor(d):
            if op in ("eq", "ne"):
                return FALSE if op == "eq" else TRUE
            op, d = ("le", math.floor(d)) if op in ("lt", "le") else ("ge", math.ceil(d))
        return self.order(op, a.part, Integer(int(d)))

    def _exact(self, x: Real) -> bool:
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
            value = _merge([(value, Integer(1)), (negate(value), Integer(0))])
        return _merge((c, self._cast(n, target)) for c, n in value)

    def _cast(self, n: Number, target: torch.dtype) -> Number:
        if target in _LIMIT:
            limit = _LIMIT[target]
            if not isinstance(n, Real):
                exact = n.is_Integer
                return Real(_round(float(n), target)) if exact else Real(0.0, n, limit)
            if n.part == 0:
                return Real(_round(n.const, target))
            if n.const != 0:
                raise _Unknown("casts a rounded float")
            return Real(0.0, n.part, min(limit, n.limit))
        if isinstance(n, Real):
            if n.part != 0:
                if n.const == 0 and self._exact(n):
                    return self._cast(n.part, target)
                raise _Unknown("casts a float that may have been rounded to an integer")
            if not math.isfinite(n.const) or abs(n.const) >= 2**31:
                raise _Unknown(f"casts {n.const} to an integer")
            n = Integer(math.trunc(n.const))
        if target == torch.int64:
            return n
        if target in (torch.int32, *_NARROW):
            info = torch.iinfo(target)
            low, high = self.bounds(n)
            if info.min <= low and high <= info.max:
                return n
            if target == torch.int32 and not n.is_Integer:
                return n
        raise _Unknown(f"casts to {target}")

    def arithmetic(self, op: str, a: Number, b: Number, dtype: torch.dtype) -> Number:
        """``a op b`` computed in ``dtype``."""
        if not isinstance(a, Real) and not isinstance(b, Real):
            if dtype not in _WIDE:
                raise _Unknown(f"computes in {dtype}")
            result = self._integers(op, a, b)
            if result.is_Integer and abs(result) >= 2 ** (31 if dtype == torch.int32 else 62):
                raise _Unknown("may overflow")
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
        limit = min(_LIMIT[dtype], a.limit, b.limit)
        if op == "add" and a.part == 0:
            a, b = b, a
        if op in ("add", "sub") and b.part == 0 and a.const == 0 and abs(b.const) >= _HUGE:
            return Real(b.const if op == "add" else -b.const, a.part, limit)
        if op == "sub" and a.part == 0 and b.const == 0 and abs(a.const) >= _HUGE:
            return Real(a.const, -b.part, limit)
        parts = []
        for x in (a, b):
            whole = math.isfinite(x.const) and x.const == math.floor(x.const)
            if not whole or not self._exact(x) or abs(x.const) > limit:
                raise _Unknown("computes with floats that may be rounded")
            parts.append(x.part + int(x.const))
        result = Real(0.0, self._integers(op, *parts), limit)
        if not self._exact(result):
            raise _Unknown("computes with floats that may be rounded")
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
            raise _Unknown(f"computes {op} on floats")
        return _round(x, dtype)

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
            raise _Unknown("divides by a number that may not be positive")
        if op == "trunc":
            if self.bounds(a)[0] < 0 or low <= 0:
                raise _Unknown("divides towards zero")
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
            raise _Unknown("divides by zero")
        if a.is_Integer and b.is_Integer:
            return Integer(int(a) // int(b)), Integer(int(a) % int(b))
        terms, const = _linear(a)
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

    # values

    def value(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """Element ``index`` of ``node``. Raises `_Unknown`."""
        key = (node, index)
        known = self.memo.get(key)
        if known is None:
            try:
                known = self._value(node, index)
            except _Unknown as error:
                known = error
            self.memo[key] = known
        if isinstance(known, _Unknown):
            raise _Unknown(known.reason, known.node)
        return known

    def _value(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        tensor = _val(node)
        if not isinstance(tensor, torch.Tensor):
            raise _Unknown("is not a tensor", node)
        index = tuple(Integer(0) if _same(size, 1) else i for i, size in zip(index, tensor.shape))
        if node in self.constants:
            constant = self._constant(node, index)
            if constant is not None:
                self.used_constants[node] = None
                return constant
        handler = None
        if node.op == "call_function":
            target = node.target
            handler = _HANDLERS.get(getattr(target, "overloadpacket", target))
        if handler is None:
            return self.leaf(node, index)
        try:
            return handler(self, node, index)
        except _Unknown as error:
            cause = _Unknown(error.reason, error.node or node)
            return self.leaf(node, index, cause)

    def leaf(self, node: fx.Node, index: tuple[Expr, ...], cause: _Unknown | None = None) -> Value:
        """``node`` as a tensor of the predicate, if it is small enough to be worth it."""
        tensor = _val(node)
        name = node.op if node.op != "call_function" else str(node.target)
        if self.depends_on_both(index):
            raise cause or _Unknown(
                f"every element of {node.name} ({name}) is data: it depends on query and key", node
            )
        if tensor.dtype != torch.bool and tensor.dtype not in (*_WIDE, *_NARROW):
            raise cause or _Unknown(f"{node.name} ({name}) holds {tensor.dtype} values", node)
        number = self.leaves.setdefault(node, len(self.leaves))
        load = Load(Integer(number), *index)
        return Bit(load) if tensor.dtype == torch.bool else ((TRUE, load),)

    def depends_on_both(self, index: tuple[Expr, ...]) -> bool:
        """Whether an element is a function of query and key: its tensor is as large as the mask."""
        symbols: set[Expr] = set()
        for symbol in set().union(*(i.free_symbols for i in index)):
            symbols |= self.origin.get(symbol, {symbol})
        return {_Q, _K} <= symbols

    def anywhere(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """`value` at an index that may leave the tensor's range; it means nothing there.

        The value is asked for at a fresh symbol within the range, and the real place put in
        afterwards, held inside the range where a tensor is read.
        """
        places: dict[Expr, tuple[Expr, Expr]] = {}
        inner = []
        for place, extent in zip(index, _val(node).shape):
            size = _size_expr(extent)
            below, above = self.bounds(place)[0] < 0, self.bounds(place - size)[1] >= 0
            if not (below or above):
                inner.append(place)
                continue
            symbol = self.fresh.get((place, size))
            if symbol is None:
                symbol = sympy.Symbol(f"i{len(self.fresh)}?", integer=True, nonnegative=True)
                self.fresh[place, size] = symbol
                self.extent[symbol] = size
                self.origin[symbol] = frozenset().union(
                    *(self.origin.get(s, {s}) for s in place.free_symbols)
                )
            held = Greatest(Integer(0), place) if below else place
            held = Least(held, size - 1) if above else held
            places[symbol] = (place, held)
            inner.append(symbol)
        value = self.value(node, tuple(inner))
        if not places:
            return value
        free = {s: place for s, (place, _) in places.items()}
        held = {s: h for s, (_, h) in places.items()}

        def put(expr: Expr) -> Expr:
            return expr.xreplace({a: a.xreplace(held) for a in expr.atoms(Load)}).xreplace(free)

        def formula(f: Formula) -> Formula:
            if isinstance(f, Join):
                return (conj if f.op == "&" else disj)(*map(formula, f.parts))
            if isinstance(f, Bit):
                return Bit(f.load.xreplace(held), f.positive)
            if isinstance(f, Cmp):
                expr = put(_unlinear(f.terms, f.const))
                result = self.le(expr) if f.op == "<=" else self.eq(expr)
                return negate(result) if f.op == "!=" else result
            return f

        if not isinstance(value, tuple):
            return formula(value)
        return _merge(
            (
                formula(c),
                Real(n.const, put(n.part), n.limit) if isinstance(n, Real) else put(n),
            )
            for c, n in value
        )

    def _constant(self, node: fx.Node, index: tuple[Expr, ...]) -> Value | None:
        tensor = self.constants[node].detach()
        dtype = tensor.dtype
        if tensor.numel() == 1:
            return self.literal(tensor.reshape(()).item(), dtype)
        if tensor.dim() >= 2:
            band = _band(tensor)
            if band is not None:
                low, high = band
                gap = index[-1] - index[-2]
                formula = conj(
                    TRUE if high is None else self.le(gap - high),
                    TRUE if low is None else self.le(low - gap),
                )
                return self.cast(formula, dtype)
        if dtype in _WIDE and all(s == 1 for s in tensor.shape[:-1]):
            flat = tensor.reshape(-1)
            start, step = int(flat[0]), int(flat[1] - flat[0])
            ramp = torch.arange(len(flat), device=flat.device) * step + start
            if torch.equal(flat.to(torch.int64), ramp):
                return ((TRUE, start + step * index[-1]),)
        return None

    def literal(self, x: Any, dtype: torch.dtype) -> Value:
        """The number ``x`` (a Python number, a SymInt or its node) as a ``dtype`` element."""
        if isinstance(x, fx.Node):
            x = _val(x)
        if isinstance(x, bool):
            return self.cast(TRUE if x else FALSE, dtype)
        if isinstance(x, (int, torch.SymInt)):
            return self.cast(((TRUE, _size_expr(x)),), dtype)
        if isinstance(x, float):
            return self.cast(((TRUE, Real(x)),), dtype)
        raise _Unknown(f"{x} is not a number")

    def broadcast(self, size: Sequence[Any], index: tuple[Expr, ...], out: Sequence[Any]) -> Any:
        """The index into a tensor of ``size`` that broadcasts to ``out``."""
        skipped = len(out) - len(size)
        result = []
        for s, o, i in zip(size, out[skipped:], index[skipped:]):
            if _same(s, 1):
                result.append(Integer(0))
            elif _same(s, o):
                result.append(i)
            else:
                raise _Unknown(f"cannot tell how size {s} broadcasts to {o}")
        return tuple(result)

    def operand(
        self,
        x: Any,
        node: fx.Node,
        index: tuple[Expr, ...],
        dtype: torch.dtype,
        precise: bool = False,
    ) -> Value:
        """An elementwise argument of ``node`` at ``node``'s ``index``, cast to ``dtype``.

        ``precise``: arithmetic in half types takes Python numbers in float32.
        """
        if isinstance(x, fx.Node) and isinstance(_val(x), torch.Tensor):
            tensor = _val(x)
            own = self.broadcast(tensor.shape, index, _val(node).shape)
            return self.cast(self.value(x, own), dtype, tensor.dtype)
        if precise and dtype in (torch.float16, torch.bfloat16) and isinstance(x, float):
            dtype = torch.float32
        return self.literal(x, dtype)

    def integer(self, node: fx.Node, index: tuple[Expr, ...], size: Any) -> Expr:
        """Element of an index tensor that provably points into ``[0, size)`` from below."""
        value = self.value(node, index)
        if not isinstance(value, tuple) or len(value) != 1 or isinstance(value[0][1], Real):
            raise _Unknown("is indexed by values that are not a formula of the position", node)
        expr = value[0][1]
        low, high = self.bounds(expr)
        if high < 0:
            return expr + _size_expr(size)
        if low < 0:
            raise _Unknown("is indexed by values that may be negative", node)
        return expr

    def formula(self, x: Any, node: fx.Node, index: tuple[Expr, ...]) -> Formula:
        value = self.operand(x, node, index, torch.bool)
        assert not isinstance(value, tuple)
        return value


# --- what each op means ---------------------------------------------------------------------


def _binary(run: _Interpreter, op: str, a: Value, b: Value, dtype: torch.dtype) -> Value:
    assert isinstance(a, tuple) and isinstance(b, tuple)
    return _merge((conj(ca, cb), run.arithmetic(op, x, y, dtype)) for ca, x in a for cb, y in b)


def _compare(op: str) -> Handler:
    def handler(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        args = [_val(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
        _, dtype = elementwise_dtypes(
            *args, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
        )
        if dtype == torch.bool:
            x, y = (run.formula(a, node, index) for a in node.args[:2])
            if op in ("eq", "ne"):
                same = disj(conj(x, y), conj(negate(x), negate(y)))
                return same if op == "eq" else negate(same)
            dtype = torch.int64
        a, b = (run.operand(x, node, index, dtype) for x in node.args[:2])
        assert isinstance(a, tuple) and isinstance(b, tuple)
        return disj(*(conj(ca, cb, run.compare(op, x, y)) for ca, x in a for cb, y in b))

    return handler


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _handles(_name)(_compare(_name))


def _logical(op: str, always: bool) -> Handler:
    def handler(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        if not always and _val(node).dtype != torch.bool:
            raise _Unknown("operates on the bits of integers")
        parts = [run.formula(a, node, index) for a in node.args]
        if op == "not":
            return negate(parts[0])
        a, b = parts
        if op == "xor":
            return disj(conj(a, negate(b)), conj(negate(a), b))
        return conj(a, b) if op == "and" else disj(a, b)

    return handler


for _name in ("and", "or", "xor", "not"):
    _handles(f"logical_{_name}")(_logical(_name, True))
    _handles(f"bitwise_{_name}", f"__{_name}__")(_logical(_name, False))


def _arithmetic(op: str, boolean: str | None = None) -> Handler:
    def handler(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        dtype = _val(node).dtype
        a, b = _arg(node, 0, "self"), _arg(node, 1, "other")
        name = str(node.target)
        if dtype == torch.bool:
            if boolean is None:
                raise _Unknown("computes with bool values")
            p, r = run.formula(a, node, index), run.formula(b, node, index)
            return conj(p, r) if boolean == "and" else disj(p, r)
        mode = op
        if "aten.rsub" in name:
            a, b = b, a
        if "aten.div" in name:
            mode = {"floor": "floor", "trunc": "trunc"}.get(node.kwargs.get("rounding_mode"), "")
            if not mode or dtype not in _WIDE:
                raise _Unknown("divides with fractions")
        x, y = (run.operand(v, node, index, dtype, precise=True) for v in (a, b))
        alpha = _arg(node, 2, "alpha", 1) if op in ("add", "sub") else 1
        if alpha != 1:
            y = _binary(run, "mul", y, run.literal(alpha, dtype), dtype)
        return _binary(run, mode, x, y, dtype)

    return handler


_handles("add")(_arithmetic("add", "or"))
_handles("sub", "rsub")(_arithmetic("sub"))
_handles("mul")(_arithmetic("mul", "and"))
_handles("floor_divide", "div")(_arithmetic("floor"))
_handles("remainder")(_arithmetic("mod"))
_handles("minimum")(_arithmetic("min", "and"))
_handles("maximum")(_arithmetic("max", "or"))


@_handles("min", "max")
def _extreme(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if not str(node.target).endswith(".other"):
        raise _Unknown("reduces over a dimension")
    low = "aten.min" in str(node.target)
    return (
        _arithmetic("min", "and")(run, node, index)
        if low
        else _arithmetic("max", "or")(run, node, index)
    )


@_handles("neg", "abs")
def _unary(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = _val(node).dtype
    value = run.operand(node.args[0], node, index, dtype)
    assert isinstance(value, tuple)

    def apply(n: Number) -> Number:
        absolute = "abs" in str(node.target)
        if isinstance(n, Real):
            if n.part != 0 and (absolute or n.const):
                raise _Unknown("negates a rounded float")
            return Real(abs(n.const) if absolute else -n.const, -n.part, n.limit)
        if dtype not in _WIDE:
            raise _Unknown(f"computes in {dtype}")
        if not absolute:
            return -n
        low, high = run.bounds(n)
        return n if low >= 0 else -n if high <= 0 else Magnitude(n)

    return _merge((c, apply(n)) for c, n in value)


@_handles("clamp", "clamp_min", "clamp_max", "clip")
def _clamp(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype, name = _val(node).dtype, str(node.target)
    value = run.operand(node.args[0], node, index, dtype)
    low, high = _arg(node, 1, "min"), _arg(node, 2, "max")
    if "clamp_max" in name:
        low, high = None, _arg(node, 1, "max")
    for bound, op in ((low, "max"), (high, "min")):
        if bound is not None:
            value = _binary(run, op, value, run.operand(bound, node, index, dtype), dtype)
    return value


@_handles("where")
def _where(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if len(node.args) < 3:
        raise _Unknown("lists positions")
    dtype = _val(node).dtype
    condition = run.formula(node.args[0], node, index)
    if condition in (TRUE, FALSE):
        return run.operand(node.args[1 if condition == TRUE else 2], node, index, dtype)
    yes, no = (run.operand(a, node, index, dtype) for a in node.args[1:3])
    return _choose(condition, yes, no)


@_handles("masked_fill")
def _masked_fill(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = _val(node).dtype
    condition = run.formula(node.args[1], node, index)
    fill = run.operand(node.args[2], node, index, dtype)
    if condition == TRUE:
        return fill
    return _choose(condition, fill, run.operand(node.args[0], node, index, dtype))


@_handles(
    "_to_copy", "to", "clone", "detach", "alias", "contiguous", "lift", "lift_fresh",
    "lift_fresh_copy", "prims.convert_element_type", "expand", "expand_as", "prims.device_put",
)  # fmt: skip
def _same_value(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source = node.args[0]
    if "lift" in str(node.target) and isinstance(source, fx.Node) and source.op == "get_attr":
        # A number written in the model's code; nothing else is lifted.
        constant = getattr(node.graph.owning_module, str(source.target), None)
        if isinstance(constant, torch.Tensor) and constant.numel() == 1:
            if type(constant) is torch.Tensor:
                return run.literal(constant.item(), constant.dtype)
    return run.operand(source, node, index, _val(node).dtype)


@_handles("copy", "fill")
def _overwrite(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.operand(node.args[1], node, index, _val(node).dtype)


@_handles("full", "full_like", "new_full", "scalar_tensor")
def _full(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
    packet = str(node.target).split(".")[1]
    name = "s" if packet == "scalar_tensor" else "fill_value"
    return run.literal(_arg(node, place[packet], name), _val(node).dtype)


@_handles("ones", "ones_like", "new_ones")
def _ones(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.literal(1, _val(node).dtype)


@_handles("zeros", "zeros_like", "new_zeros")
def _zeros(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.literal(0, _val(node).dtype)


@_handles("arange", "prims.iota")
def _arange(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    start: Any = 0
    step: Any = 1
    if "iota" in str(node.target):
        start, step = node.kwargs["start"], node.kwargs["step"]
    elif str(node.target).endswith((".start", ".start_step")):
        start, step = node.args[0], _arg(node, 2, "step", 1)
    if isinstance(start, float) or isinstance(step, float):
        raise _Unknown("counts in fractions")
    expr = _size_expr(start) + _size_expr(step) * index[0]
    dtype = _val(node).dtype
    if dtype in _LIMIT and not run._exact(Real(0.0, expr, _LIMIT[dtype])):
        raise _Unknown("counts in floats that may be rounded")
    return run.cast(((TRUE, expr),), dtype)


@_handles("eye")
def _eye(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.cast(run.eq(index[0] - index[1]), _val(node).dtype)


@_handles("tril", "triu")
def _triangle(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = _val(node).dtype
    diagonal = _size_expr(_arg(node, 1, "diagonal", 0))
    gap = index[-1] - index[-2] - diagonal
    kept = run.le(gap if "tril" in str(node.target) else -gap)
    if kept == FALSE:
        return run.literal(0, dtype)
    value = run.operand(node.args[0], node, index, dtype)
    return value if kept == TRUE else _choose(kept, value, run.literal(0, dtype))


@_handles("unsqueeze")
def _unsqueeze(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dim = node.args[1] % len(index)  # type: ignore[operator]
    return run.value(node.args[0], index[:dim] + index[dim + 1 :])  # type: ignore[arg-type]


@_handles("view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten", "view_copy")
def _reshape(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    """Between dimensions of equal products the index is linearised and split again."""
    source: Any = node.args[0]
    if _val(source).dtype != _val(node).dtype:
        raise _Unknown("reinterprets bits")
    inner = [_size_expr(s) for s in _val(source).shape]
    outer = [_size_expr(s) for s in _val(node).shape]
    result = [Integer(0)] * len(inner)
    i = j = 0
    while i < len(inner) or j < len(outer):
        if i < len(inner) and inner[i] == 1:
            i += 1
            continue
        if j < len(outer) and outer[j] == 1:
            j += 1
            continue
        if i == len(inner) or j == len(outer):
            raise _Unknown("is reshaped in a way that cannot be followed")
        first, (left, right) = i, (inner[i], outer[j])
        linear, i, j = index[j], i + 1, j + 1
        while sympy.expand(left - right) != 0:
            step = left / right
            grow = step.is_Integer or (i == len(inner)) or not (right / left).is_Integer
            if grow and j < len(outer):
                linear = linear * outer[j] + index[j]
                right, j = right * outer[j], j + 1
            elif i < len(inner):
                left, i = left * inner[i], i + 1
            else:
                raise _Unknown("is reshaped in a way that cannot be followed")
        for dim in range(i - 1, first, -1):
            if inner[dim] != 1:
                result[dim] = run.remainder(linear, inner[dim])
                linear = run.quotient(linear, inner[dim])
        result[first] = linear
    return run.value(source, tuple(result))


@_handles("permute", "transpose", "t", "numpy_T")
def _permute(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    rank = len(index)
    name = str(node.target)
    if "permute" in name:
        dims = [d % rank for d in node.args[1]]  # type: ignore[operator,union-attr]
    elif "transpose" in name:
        dims = list(range(rank))
        a, b = (d % rank for d in node.args[1:3])  # type: ignore[operator]
        dims[a], dims[b] = dims[b], dims[a]
    else:
        dims = list(reversed(range(rank)))
    result = [Integer(0)] * rank
    for position, dim in enumerate(dims):
        result[dim] = index[position]
    return run.value(node.args[0], tuple(result))  # type: ignore[arg-type]


def _from_start(run: _Interpreter, start: Any, size: Any) -> Expr:
    """A slice's start counted from the front."""
    start = 0 if start is None else start
    value = _val(start) if isinstance(start, fx.Node) else start
    expr = _size_expr(value)
    if statically_known_true(value >= 0) or run.bounds(expr)[0] >= 0:
        return expr
    if statically_known_true(value < 0) or run.bounds(expr)[1] < 0:
        expr = expr + _size_expr(size)
        known = statically_known_true(value + size >= 0) or run.bounds(expr)[0] >= 0
        return expr if known else Greatest(Integer(0), expr)
    raise _Unknown("is sliced from a place of unknown sign")


@_handles("slice")
def _slice(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    dim = _arg(node, 1, "dim", 0) % len(index)
    start = _from_start(run, _arg(node, 2, "start"), _val(source).shape[dim])
    inner = start + _size_expr(_arg(node, 4, "step", 1)) * index[dim]
    return run.value(source, index[:dim] + (inner,) + index[dim + 1 :])


@_handles("select")
def _select(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    dim = node.args[1] % (len(index) + 1)  # type: ignore[operator]
    place = _from_start(run, node.args[2], _val(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim:])


@_handles("slice_scatter", "select_scatter")
def _scatter(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    base, source = node.args[0], node.args[1]
    assert isinstance(base, fx.Node) and isinstance(source, fx.Node)
    dim = _arg(node, 2, "dim", 0) % len(index)
    size = _val(base).shape[dim]
    if "select" in str(node.target):
        place = _from_start(run, node.args[3], size)
        inside = run.eq(index[dim] - place)
        inner = index[:dim] + index[dim + 1 :]
    else:
        if _arg(node, 5, "step", 1) != 1:
            raise _Unknown("writes a slice with steps")
        start = _from_start(run, _arg(node, 3, "start"), size)
        length = _size_expr(_val(source).shape[dim])
        inside = conj(run.le(start - index[dim]), run.le(index[dim] - start - length + 1))
        inner = index[:dim] + (index[dim] - start,) + index[dim + 1 :]
    return _pieces(run, [(inside, source, inner), (negate(inside), base, index)])


def _pieces(
    run: _Interpreter, pieces: Sequence[tuple[Formula, fx.Node, tuple[Expr, ...]]]
) -> Value:
    """The piece whose condition holds; conditions are exclusive and exhaustive."""
    possible = [p for p in pieces if p[0] != FALSE]
    if len(possible) == 1:
        return run.value(*possible[0][1:])
    values = [(c, run.anywhere(node, index)) for c, node, index in possible]
    result = values[-1][1]
    for condition, value in reversed(values[:-1]):
        result = _choose(condition, value, result)
    return result


def _small(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> bool:
    """Whether the node itself can be a leaf, which is simpler than cases."""
    exact = _val(node).dtype == torch.bool or not _val(node).dtype.is_floating_point
    return exact and not run.depends_on_both(index)


@_handles("cat")
def _cat(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if _small(run, node, index):
        return run.leaf(node, index)
    dim = _arg(node, 1, "dim", 0) % len(index)
    dtype, offset, pieces = _val(node).dtype, Integer(0), []
    before: Formula = TRUE
    for source in node.args[0]:  # type: ignore[union-attr]
        if _val(source).dtype != dtype or _val(source).dim() != len(index):
            raise _Unknown("joins tensors of different kinds")
        end = offset + _size_expr(_val(source).shape[dim])
        inside = run.le(index[dim] - end + 1)
        inner = index[:dim] + (index[dim] - offset,) + index[dim + 1 :]
        pieces.append((conj(before, inside), source, inner))
        before, offset = conj(before, negate(inside)), end
    return _pieces(run, pieces)


@_handles("constant_pad_nd")
def _pad(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if _small(run, node, index):
        return run.leaf(node, index)
    source: Any = node.args[0]
    pads = [_size_expr(p) for p in node.args[1]]  # type: ignore[union-attr]
    inner, inside = list(index), []
    for n in range(len(pads) // 2):
        dim = len(index) - 1 - n
        inner[dim] = index[dim] - pads[2 * n]
        size = _size_expr(_val(source).shape[dim])
        inside += [run.le(-inner[dim]), run.le(inner[dim] - size + 1)]
    condition = conj(*inside)
    fill = run.literal(_arg(node, 2, "value", 0), _val(node).dtype)
    if condition == TRUE:
        return run.value(source, tuple(inner))
    value = run.anywhere(source, tuple(inner))
    return _choose(condition, value, fill)


@_handles("repeat")
def _repeat(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source: Any = node.args[0]
    size = _val(source).shape
    own = index[len(index) - len(size) :]
    counts = node.args[1][len(index) - len(size) :]  # type: ignore[index]
    inner = [
        i if isinstance(c, int) and c == 1 else Integer(0) if _same(s, 1)
        else run.remainder(i, _size_expr(s))
        for i, s, c in zip(own, size, counts)
    ]  # fmt: skip
    return run.value(source, tuple(inner))


@_handles("index", "_unsafe_index")
def _index(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, parts = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, fx.Node)
    size = _val(source).shape
    parts += [None] * (len(size) - len(parts))
    used = [d for d, p in enumerate(parts) if p is not None]
    if any(_val(p).dtype not in (torch.int32, torch.int64) for p in parts if p is not None):
        raise _Unknown("is indexed with a mask")
    shapes = [_val(parts[d]).shape for d in used]
    rank = max(len(s) for s in shapes)
    adjacent = used == list(range(used[0], used[-1] + 1))
    first = used[0] if adjacent else 0
    out = _val(node).shape
    common, common_index = out[first : first + rank], index[first : first + rank]
    rest = iter(index[:first] + index[first + rank :])
    inner = [
        next(rest) if p is None
        else run.integer(p, run.broadcast(_val(p).shape, common_index, common), size[d])
        for d, p in enumerate(parts)
    ]  # fmt: skip
    return run.value(source, tuple(inner))


@_handles("index_select")
def _index_select(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, dim, picks = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
    dim = dim % len(index)  # type: ignore[operator]
    own = (index[dim],) * _val(picks).dim()
    place = run.integer(picks, own, _val(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim + 1 :])


@_handles("gather")
def _gather(run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source, dim, picks = node.args[:3]
    assert isinstance(source, fx.Node) and isinstance(picks, fx.Node)
    dim = dim % len(index)  # type: ignore[operator]
    place = run.integer(picks, index, _val(source).shape[dim])
    return run.value(source, index[:dim] + (place,) + index[dim + 1 :])


# --- the prover -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    """An additive mask taken apart: forbidden where ``allowed`` is false, plus ``bias``."""

    allowed: Formula | None  # None: nothing was understood, all is bias
    value: float = -INF
    bias: fx.Node | None = None
    exact: bool = True


class MaskProver:
    """Proofs for the masks of one graph, each made once (all layers share them).

    ``constants`` gives the values of placeholders or attributes that the caller will guard.
    Proofs name nodes: they hold as long as those nodes do. At most, ``prove`` adds
    ``sym_size`` nodes, where a size it needs has none.
    """

    def __init__(
        self,
        graph: fx.Graph | fx.GraphModule,
        constants: Mapping[fx.Node, torch.Tensor] | None = None,
    ) -> None:
        self.graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
        self.constants = dict(constants or {})
        self._leaves: dict[fx.Node, int] = {}
        self._proofs: dict[Any, MaskProof | Unproved] = {}
        self._runs: dict[Any, _Interpreter] = {}

    def prove(self, node: fx.Node, score_shape: Sequence[Any]) -> MaskProof | Unproved:
        """What the mask ``node``, broadcast to ``score_shape = (B, H, M, N)``, means."""
        try:
            shape = tuple(_size_expr(s) for s in score_shape)
        except _Unknown as error:
            return Unproved(error.reason, node)
        key = (node, shape)
        if self._stale():
            self._proofs.clear()
            self._runs.clear()
            self._leaves.clear()
        if key not in self._proofs:
            run = self._runs.get(shape)
            if run is None:
                run = self._runs[shape] = _Interpreter(score_shape, self.constants, self._leaves)
            try:
                self._proofs[key] = self._prove(node, run)
            except _Unknown as error:
                self._proofs[key] = Unproved(error.reason, error.node or node)
            except RecursionError:
                self._proofs[key] = Unproved("the mask's subgraph is too deep", node)
        return self._proofs[key]

    def _stale(self) -> bool:
        """Whether a rewrite has erased a node that a proof names or may name."""
        named: list[Any] = list(self._leaves)
        for proof in self._proofs.values():
            if isinstance(proof, MaskProof):
                named += [*proof.ints, proof.bias]
        return any(isinstance(n, fx.Node) and n._erased for n in named)

    def _prove(self, node: fx.Node, run: _Interpreter) -> MaskProof:
        tensor = _val(node)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > 4:
            raise _Unknown("is not a tensor of up to four dimensions", node)
        self._check_mutation(node)
        if run.shape_env is None:
            run.shape_env = _shape_env(tensor.shape)
        # M = 1 makes q the constant 0, and so on.
        point = tuple(
            Integer(0) if _same(s, 1) else i for i, s in zip(INDICES, run.shape, strict=True)
        )
        index = run.broadcast(tensor.shape, point, run.shape)
        run.used_constants.clear()
        if tensor.dtype == torch.bool:
            allowed = run.value(node, index)
            assert not isinstance(allowed, tuple)
            return self._proof(node, run, _Split(allowed))
        if not tensor.dtype.is_floating_point:
            raise _Unknown(f"is an attention mask of {tensor.dtype}", node)
        try:
            split = self._additive(run, node, index)
        except _Unknown as error:
            split = self._take_apart(run, node, point)
            if split.allowed is None or split.bias is None:
                raise error
        return self._proof(node, run, split)

    def _additive(self, run: _Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> _Split:
        """A float mask whose values are 0 and V (and sums of Vs)."""
        value = run.value(node, index)
        assert isinstance(value, tuple)
        allowed: Formula = FALSE
        forbidden: list[float] = []
        for condition, number in value:
            assert isinstance(number, Real)
            if number.part != 0 or math.isnan(number.const) or number.const > 0:
                raise _Unknown("adds values that are neither 0 nor a negative constant", node)
            if number.const == 0:
                allowed = disj(allowed, condition)
            else:
                forbidden.append(number.const)
        if not forbidden:
            return _Split(allowed)
        top = max(forbidden)
        dtype = _val(node).dtype
        sums = {_round(n * top, dtype) for n in (1, 2, 3, 4)}
        if not set(forbidden) <= sums or (len(forbidden) > 1 and top > -1e4):
            values = ", ".join(f"{v:g}" for v in sorted(forbidden))
            raise _Unknown(f"adds several values to forbidden keys: {values}", node)
        return _Split(allowed, top, None, len(set(forbidden)) == 1)

    def _take_apart(self, run: _Interpreter, node: fx.Node, point: tuple[Expr, ...]) -> _Split:
        """``mask + bias``, ``where(mask, bias, V)``: a predicate, and an existing node."""
        whole = _Split(None, bias=node)
        try:
            index = run.broadcast(_val(node).shape, point, run.shape)
            return self._additive(run, node, index)
        except _Unknown:
            pass
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.expand, aten.clone, aten.alias, aten.detach, aten.slice):
            source: Any = node.args[0]
            same = len(_val(source).shape) == len(_val(node).shape)
            if packet is aten.slice:
                same = same and all(map(_same, _val(source).shape, _val(node).shape))
            return self._take_apart(run, source, point) if same else whole
        if packet is aten.add and _arg(node, 2, "alpha", 1) == 1:
            a, b = node.args[:2]
            if not all(
                isinstance(x, fx.Node) and isinstance(_val(x), torch.Tensor) for x in (a, b)
            ) or any(_val(x).dtype != _val(node).dtype for x in (a, b)):  # type: ignore[arg-type]
                return whole
            first, second = (self._take_apart(run, x, point) for x in (a, b))  # type: ignore[arg-type]
            if first.allowed is None:
                first, second = second, first
            if first.allowed is None or (first.bias is not None and second.bias is not None):
                return whole
            if second.allowed is None:
                return _Split(first.allowed, first.value, second.bias, first.exact)
            if first.value == second.value:
                overlap = disj(first.allowed, second.allowed) != TRUE
                exact = first.exact and second.exact and (first.value == -INF or not overlap)
                return _Split(
                    conj(first.allowed, second.allowed),
                    first.value,
                    first.bias or second.bias,
                    exact,
                )
            return whole
        if packet in (aten.where, aten.masked_fill) and len(node.args) == 3:
            fill_first = packet is aten.masked_fill
            condition = node.args[1] if fill_first else node.args[0]
            kept, value = (node.args[0] if fill_first else node.args[1]), node.args[2]
            if not isinstance(kept, fx.Node) or not isinstance(_val(kept), torch.Tensor):
                return whole
            dtype = _val(node).dtype
            if _val(kept).dtype != dtype:
                return whole
            try:
                index = run.broadcast(_val(node).shape, point, run.shape)
                allowed = run.formula(condition, node, index)
                fill = run.operand(value, node, index, dtype)
            except _Unknown:
                return whole
            assert isinstance(fill, tuple)
            if len(fill) != 1 or not isinstance(fill[0][1], Real) or fill[0][1].part != 0:
                return whole
            v = fill[0][1].const
            if not v <= -1e4:
                return whole
            rest = self._take_apart(run, kept, point)
            if rest.allowed is not None and rest.value != v:
                return whole
            return _Split(
                conj(negate(allowed) if fill_first else allowed, rest.allowed or TRUE),
                v,
                rest.bias,
                v == -INF and rest.exact,
            )
        return whole

    def _proof(self, node: fx.Node, run: _Interpreter, split: _Split) -> MaskProof:
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        formula = split.allowed
        assert formula is not None
        if split.bias is not None:
            run.broadcast(_val(split.bias).shape, INDICES, run.shape)
        loads: set[Expr] = set()
        symbols: set[Expr] = set()
        for f in _literals(formula):
            atoms = [f.load] if isinstance(f, Bit) else []
            atoms += [a for a, _ in f.terms] if isinstance(f, Cmp) else []
            for atom in atoms:
                loads |= atom.atoms(Load)
                symbols |= atom.free_symbols - set(INDICES)
        nodes = {number: leaf for leaf, number in self._leaves.items()}
        numbers = sorted({int(a.args[0]) for a in loads}, key=lambda i: order[nodes[i]])
        sizes = sorted(symbols, key=lambda s: (len(str(s)), str(s)))
        printer = _Printer(
            {number: f"t{i}" for i, number in enumerate(numbers)},
            {symbol: f"n{i}" for i, symbol in enumerate(sizes)},
        )
        value = None if split.value == -INF else split.value
        kind = _kind(formula) + ("" if split.bias is None else "+bias")
        return MaskProof(
            "" if formula == TRUE else printer.formula(formula),
            tuple(nodes[i] for i in numbers),
            tuple(self._size_node(s, node, order) for s in sizes),
            None if formula == TRUE else value,
            split.bias,
            kind,
            split.exact,
            tuple(run.used_constants),
        )

    def _size_node(self, symbol: Expr, mask: fx.Node, order: Mapping[fx.Node, int]) -> fx.Node:
        """A node before ``mask`` that holds the size ``symbol``."""
        source = None
        for node in self.graph.nodes:
            if order[node] > order[mask]:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return node
            if source is None and isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                        source = (node, dim, size)
                        break
        if source is None:
            raise _Unknown(f"no tensor has the size {symbol} that the mask depends on", mask)
        node, dim, size = source
        after = node
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            made = self.graph.call_function(aten.sym_size.int, (node, dim))
        made.meta["val"] = size
        return made

    def _check_mutation(self, mask: fx.Node) -> None:
        """Refuse masks whose inputs are written before the mask's last use: leaves are read
        there. In a functional graph only the final ``copy_`` into an input is left."""
        order = {n: i for i, n in enumerate(self.graph.nodes)}
        written: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            if schema is None or not schema.is_mutable:
                continue
            for argument, value in zip(schema.arguments, node.args):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                while isinstance(value, fx.Node):
                    written.setdefault(value, node)
                    inner = getattr(value.target, "_schema", None)
                    is_view = (
                        inner is not None and inner.arguments and inner.arguments[0].alias_info
                    )
                    value = value.args[0] if is_view and value.args else None
        if not written:
            return
        last = max((order[u] for u in mask.users), default=order[mask])
        seen: set[fx.Node] = set()
        stack = [mask]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in written and order[written[node]] <= last:
                raise _Unknown(f"is written in place by {written[node].name}", node)
            stack.extend(node.all_input_nodes)


def prove(
    node: fx.Node,
    score_shape: Sequence[Any],
    constants: Mapping[fx.Node, torch.Tensor] | None = None,
) -> MaskProof | Unproved:
    """`MaskProver.prove` for a single mask."""
    return MaskProver(node.graph, constants).prove(node, score_shape)


# --- a summary for people -------------------------------------------------------------------


def _kind(formula: Formula) -> str:
    if formula == TRUE:
        return "full"
    parts = formula.parts if isinstance(formula, Join) and formula.op == "&" else {formula}
    names: list[tuple[int, str]] = []
    causal: Expr | None = None
    windows: list[Expr] = []
    for part in parts:
        symbols: set[Expr] = set()
        for f in _literals(part):
            atoms = [a for a, _ in f.terms] if isinstance(f, Cmp) else []
            atoms += [f.load] if isinstance(f, Bit) else []
            symbols |= set().union(*(a.free_symbols for a in atoms)) if atoms else set()
        if isinstance(part, Cmp):
            terms = dict(part.terms)
            sign = terms.pop(_K, 0)
            rest = _unlinear([(a, -c) for a, c in terms.items()], -part.const)
            in_rest = rest.free_symbols
            if part.op == "<=" and abs(sign) == 1 and _K not in in_rest:
                follows = rest.coeff(_Q) == sign or (_Q not in terms and rest.has(Load))
                if not in_rest & {_B, _H, _Q} and not rest.has(Load):
                    # M = 1: the row's number is a constant
                    follows = True
                if follows:
                    if sign > 0:
                        causal = rest
                    else:
                        windows.append(-rest)
                    continue
            loads = [a for a, _ in part.terms if isinstance(a, Load)]
            if part.op == "==" and len(part.terms) == 2 and sum(c for _, c in part.terms) == 0:
                atoms = [a for a, _ in part.terms]
                if len(loads) == 2 and loads[0].args[0] == loads[1].args[0]:
                    names.append((3, "packed"))
                    continue
                if all(_function(a) is Quotient for a in atoms):
                    names.append((2, f"chunked({atoms[0].args[1]})"))
                    continue
        has_load = any(
            isinstance(f, Bit) or any(a.has(Load) for a, _ in f.terms)
            for f in _literals(part)
            if isinstance(f, (Bit, Cmp))
        )
        if has_load and symbols <= {_B, _K} and _K in symbols:
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
