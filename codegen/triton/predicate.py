"""A mask predicate printed as Triton: the test itself, and bounds on the keys it can allow.

`print_predicate` turns text of the language in `dspark_compile.ops.predicate` into expressions
over ``b, h, q, k`` (integers or blocks of them) and the parameters that its tensors and
integers need. Bounds come from comparisons that are linear in ``k`` with coefficient ±1, joined
through ``&`` and ``|``: a key at or above ``upper``, or below ``lower``, is provably forbidden,
so a kernel need not visit it. ``exact`` says that the bounds are the whole predicate.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dspark_compile.ops.predicate import parse

_OPERATORS: dict[type, str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_NEGATED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


@dataclass(frozen=True)
class MaskCode:
    """A printed predicate.

    Attributes:
        text: the predicate itself.
        parameters: kernel parameters, in order.
        integers: those of them that are plain integers and should not be specialised on.
        allowed: the test, or "" for a predicate that allows everything.
        upper: exclusive bound on k, free of k; "" for none.
        lower: inclusive bound on k, free of k; "" for none.
        exact: whether ``lower <= k < upper`` is the predicate.
        ranks: for each tensor used, how many indices it takes (0: a single element).
    """

    text: str = ""
    parameters: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    allowed: str = ""
    upper: str = ""
    lower: str = ""
    exact: bool = True
    ranks: dict[int, int] = field(default_factory=dict)

    def reason(self, tensors: Sequence[Tensor], ints: Sequence[Any]) -> str | None:
        """Why these mask tensors and integers do not fit; None if they do."""
        for index, rank in self.ranks.items():
            if index >= len(tensors):
                return f"mask tensor t{index} is missing"
            tensor = tensors[index]
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return f"mask tensor t{index} is {str(tensor.dtype).removeprefix('torch.')}"
            if rank == 0 and tensor.numel() != 1:
                return f"mask tensor t{index} is used whole but has {tensor.numel()} elements"
            if rank and tensor.dim() != rank:
                return f"mask tensor t{index} has {tensor.dim()} dimensions but {rank} indices"
        for name in self.parameters:
            if name[0] == "n" and int(name[1:]) >= len(ints):
                return f"mask integer {name} is missing"
        return None

    def arguments(self, tensors: Sequence[Tensor], ints: Sequence[int]) -> dict[str, Any]:
        """The values of ``parameters``."""
        values: dict[str, Any] = {}
        for name in self.parameters:
            if name[0] == "n":
                values[name] = ints[int(name[1:])]
                continue
            tensor, kind, *axis = name[1:].split("_")
            operand = tensors[int(tensor)]
            if kind == "ptr":
                values[name] = operand
            elif kind == "stride":
                values[name] = operand.stride(int(axis[0]))
            else:
                values[name] = operand.shape[int(axis[0])]
        return values


@functools.lru_cache(maxsize=1024)
def print_predicate(text: str) -> MaskCode:
    """`MaskCode` of a predicate. Raises `ValueError` for what cannot be printed."""
    if not text:
        return MaskCode()
    tree = _fold(parse(text))
    if isinstance(tree, ast.Constant) and tree.value:
        return MaskCode(text)
    printer = _Printer()
    if isinstance(tree, ast.Constant):
        return MaskCode(text, allowed="(k < 0) & (q < 0)", upper="0", exact=True)
    allowed = printer.show(tree)
    if not isinstance(tree, ast.Compare):
        allowed = f"({allowed}) != 0"
    bounds = _bounds(tree)
    upper = "" if bounds.upper is None else printer.show(_fold(bounds.upper))
    lower = "" if bounds.lower is None else printer.show(_fold(bounds.lower))
    return MaskCode(
        text,
        tuple(printer.parameters),
        tuple(p for p in printer.parameters if p[0] == "n" or "_size_" in p),
        allowed,
        upper,
        lower,
        bounds.exact,
        dict(printer.ranks),
    )


class _Printer:
    """Prints expressions and collects the parameters they need."""

    def __init__(self) -> None:
        self.parameters: list[str] = []
        self.ranks: dict[int, int] = {}

    def parameter(self, name: str) -> str:
        if name not in self.parameters:
            self.parameters.append(name)
        return name

    def show(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(int(_value(node)))
        if isinstance(node, ast.Name):
            if node.id[0] == "t":
                return self.load(int(node.id[1:]), [])
            return node.id if node.id in "bhqk" else self.parameter(node.id)
        if isinstance(node, ast.BinOp):
            left, right = self.show(node.left), self.show(node.right)
            if isinstance(node.op, ast.FloorDiv):
                return f"floor_divide({left}, {right})"
            if isinstance(node.op, ast.Mod):
                return f"floor_modulo({left}, {right})"
            return f"({left} {_OPERATORS[type(node.op)]} {right})"
        if isinstance(node, ast.Compare):
            left, right = self.show(node.left), self.show(node.comparators[0])
            return f"({left} {_OPERATORS[type(node.ops[0])]} {right})"
        if isinstance(node, ast.UnaryOp):
            sign = "~" if isinstance(node.op, ast.Invert) else "-"
            return f"({sign}{self.show(node.operand)})"
        if isinstance(node, ast.Call):
            return self.call(node)
        assert isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
        index = node.slice
        parts = list(index.elts) if isinstance(index, ast.Tuple) else [index]
        return self.load(int(node.value.id[1:]), parts)

    def call(self, node: ast.Call) -> str:
        name = node.func.id  # type: ignore[attr-defined]
        values = [self.show(a) for a in node.args]
        if name == "abs":
            return f"tl.abs({values[0]})"
        function = "tl.minimum" if name == "min" else "tl.maximum"
        result = values[0]
        for value in values[1:]:
            result = f"{function}({result}, {value})"
        return result

    def load(self, tensor: int, indices: list[ast.expr]) -> str:
        if self.ranks.setdefault(tensor, len(indices)) != len(indices):
            raise ValueError(f"t{tensor} takes {self.ranks[tensor]} and {len(indices)} indices")
        pointer = self.parameter(f"t{tensor}_ptr")
        guards = ["inside"] if any(_names(i, "k") for i in indices) else []
        for axis, index in enumerate(indices):
            stride = self.parameter(f"t{tensor}_stride_{axis}")
            plain = isinstance(index, ast.Name) and index.id in "bhqk"
            if isinstance(index, ast.Constant) and _value(index) >= 0:
                pointer += f" + {_value(index)} * {stride}"
            elif plain:
                pointer += f" + {index.id}.to(tl.int64) * {stride}"  # type: ignore[attr-defined]
            else:
                # As in Python, a negative index counts from the end.
                size = self.parameter(f"t{tensor}_size_{axis}")
                position = f"wrap_index({self.show(index)}, {size})"
                pointer += f" + {position} * {stride}"
                guards.append(f"({position} >= 0) & ({position} < {size})")
        if not guards:
            return f"tl.load({pointer})"
        return f"tl.load({pointer}, mask={' & '.join(guards)}, other=0)"


def _value(node: ast.Constant) -> int:
    assert isinstance(node.value, int)
    return node.value


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


_FOLDS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


def _fold(node: ast.expr) -> ast.expr:
    """The tree with operations on constants done, and True and False absorbed by & and |."""
    if isinstance(node, ast.BinOp):
        left, right = _fold(node.left), _fold(node.right)
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            return ast.Constant(_FOLDS[type(node.op)](left.value, right.value))
        for one, other in ((left, right), (right, left)):
            if isinstance(one, ast.Constant) and isinstance(one.value, bool):
                if isinstance(node.op, ast.BitAnd):
                    if not one.value:
                        return ast.Constant(False)
                    if _boolean(other):
                        return other
                if isinstance(node.op, ast.BitOr):
                    if one.value:
                        return ast.Constant(True)
                    return other
        return ast.BinOp(left, node.op, right)
    if isinstance(node, ast.Compare):
        left, right = _fold(node.left), _fold(node.comparators[0])
        if isinstance(left, ast.Constant) and isinstance(right, ast.Constant):
            return ast.Constant(_FOLDS[type(node.ops[0])](left.value, right.value))
        return ast.Compare(left, node.ops, [right])
    if isinstance(node, ast.UnaryOp):
        operand = _fold(node.operand)
        if isinstance(operand, ast.Constant):
            value = _value(operand)
            if isinstance(node.op, ast.USub):
                return ast.Constant(-value)
            return ast.Constant((not value) if isinstance(value, bool) else ~value)
        return ast.UnaryOp(node.op, operand)
    if isinstance(node, ast.Call):
        arguments = [_fold(a) for a in node.args]
        values = [_value(a) for a in arguments if isinstance(a, ast.Constant)]
        if len(values) == len(arguments):
            name = node.func.id  # type: ignore[attr-defined]
            folded = abs(values[0]) if name == "abs" else (min if name == "min" else max)(values)
            return ast.Constant(folded)
        return ast.Call(node.func, arguments, [])
    if isinstance(node, ast.Subscript):
        index = node.slice
        if isinstance(index, ast.Tuple):
            return ast.Subscript(
                node.value, ast.Tuple([_fold(e) for e in index.elts], ast.Load()), ast.Load()
            )
        return ast.Subscript(node.value, _fold(index), ast.Load())
    return node


def _boolean(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return (
            isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor))
            and _boolean(node.left)
            and _boolean(node.right)
        )
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Invert) and _boolean(node.operand)
    return isinstance(node, ast.Compare)


@dataclass(frozen=True)
class _Bounds:
    upper: ast.expr | None = None
    lower: ast.expr | None = None
    exact: bool = False


def _extreme(function: str, a: ast.expr, b: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(function, ast.Load()), [a, b], [])


def _bounds(node: ast.expr, negated: bool = False) -> _Bounds:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert) and _boolean(node.operand):
        return _bounds(node.operand, not negated)
    if isinstance(node, ast.Compare):
        return _compare_bounds(node, negated)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        if negated and not _boolean(node):
            return _Bounds()
        a, b = _bounds(node.left, negated), _bounds(node.right, negated)
        if isinstance(node.op, ast.BitAnd) != negated:
            return _Bounds(
                _extreme("min", a.upper, b.upper) if a.upper and b.upper else a.upper or b.upper,
                _extreme("max", a.lower, b.lower) if a.lower and b.lower else a.lower or b.lower,
                a.exact and b.exact,
            )
        return _Bounds(
            _extreme("max", a.upper, b.upper) if a.upper and b.upper else None,
            _extreme("min", a.lower, b.lower) if a.lower and b.lower else None,
        )
    return _Bounds()


def _compare_bounds(node: ast.Compare, negated: bool) -> _Bounds:
    operator = _OPERATORS[type(node.ops[0])]
    if negated:
        operator = _NEGATED[operator]
    left, right = _linear(node.left), _linear(node.comparators[0])
    if left is None or right is None:
        return _Bounds()
    coefficient = left[0] - right[0]
    if coefficient not in (1, -1):
        return _Bounds()
    # coefficient * k + rest OP 0, so k OP' edge.
    rest = left[1] + [(-sign, term) for sign, term in right[1]]
    edge = _sum([(-sign * coefficient, term) for sign, term in rest])
    if coefficient == -1:
        operator = _MIRRORED[operator]
    after = ast.BinOp(edge, ast.Add(), ast.Constant(1))
    if operator == "<":
        return _Bounds(upper=edge, exact=True)
    if operator == "<=":
        return _Bounds(upper=after, exact=True)
    if operator == ">":
        return _Bounds(lower=after, exact=True)
    if operator == ">=":
        return _Bounds(lower=edge, exact=True)
    if operator == "==":
        return _Bounds(upper=after, lower=edge, exact=True)
    return _Bounds()


def _linear(node: ast.expr) -> tuple[int, list[tuple[int, ast.expr]]] | None:
    """``(c, terms)`` with ``node == c * k + sum(sign * term)`` and terms free of k."""
    if not _names(node, "k"):
        return 0, [(1, node)]
    if isinstance(node, ast.Name):
        return 1, []
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _linear(node.operand)
        return None if inner is None else (-inner[0], [(-s, t) for s, t in inner[1]])
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = _linear(node.left), _linear(node.right)
        if left is None or right is None:
            return None
        sign = 1 if isinstance(node.op, ast.Add) else -1
        return left[0] + sign * right[0], left[1] + [(sign * s, t) for s, t in right[1]]
    return None


def _sum(terms: list[tuple[int, ast.expr]]) -> ast.expr:
    constant = sum(sign * _value(t) for sign, t in terms if isinstance(t, ast.Constant))
    ordered = sorted((t for t in terms if not isinstance(t[1], ast.Constant)), key=lambda t: -t[0])
    total: ast.expr | None = None
    for sign, term in ordered:
        if total is None:
            total = term if sign > 0 else ast.UnaryOp(ast.USub(), term)
        else:
            total = ast.BinOp(total, ast.Add() if sign > 0 else ast.Sub(), term)
    if total is None:
        return ast.Constant(constant)
    return total if constant == 0 else ast.BinOp(total, ast.Add(), ast.Constant(constant))
