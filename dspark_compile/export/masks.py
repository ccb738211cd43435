"""Masks: what a proved predicate says, and the bool tensor where an op needs one.

A predicate is a conjunction (see `dspark_compile.ops.predicate`). `structure` reads it as the terms
that fused attention ops know; every term that is anything else is named. `materialize` computes it
as a tensor, once for all sites that have the same.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dspark_compile.ops.predicate import parse
from dspark_compile.passes.graph import aten, is_op, known_equal

from .ops import op
from .program import Program
from .weights import _args


@dataclass(frozen=True)
class Structure:
    """A mask in terms of a decoder: rows are the last of ``keys`` positions.

    Attributes:
        causal: a key is not behind its query.
        window: how many keys a query sees, itself included; -1 for all.
        padding: the tensor ``[B, keys]`` whose zeros are forbidden keys, or None.
        other: why this is no such mask; "" if it is.
    """

    causal: bool = False
    window: int = -1
    padding: fx.Node | None = None
    other: str = ""


def structure(
    text: str, tensors: list[fx.Node], ints: list[Any], rows: Any, keys: Any
) -> Structure:
    """What the predicate ``text`` of ``rows`` queries over ``keys`` keys says."""
    causal, window, padding = False, -1, None
    if not text:
        return Structure()
    for term in _terms(parse(text)):
        if isinstance(term, ast.Constant) and term.value is True:
            continue
        number = _loaded(term)
        if number is not None:
            if padding not in (None, tensors[number]):
                return Structure(other="two padding masks")
            padding = tensors[number]
            continue
        bound = _bound(term, ints, keys - rows)
        if bound is None:
            return Structure(other=f"its term {ast.unparse(term)!r} is neither causal nor a window")
        kind, value = bound
        if kind == "causal" and value == 0:
            causal = True
        elif kind == "window" and value > 0:
            window = value if window < 0 else min(window, value)
        else:
            return Structure(other=f"its term {ast.unparse(term)!r} is at an offset")
    return Structure(causal, window, padding)


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _terms(node.left) + _terms(node.right)
    return [node]


def _loaded(node: ast.expr) -> int | None:
    """n of ``tn[b, k]`` or ``tn[b, k] != 0``."""
    if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotEq):
        right = node.comparators[0]
        if not (isinstance(right, ast.Constant) and right.value == 0):
            return None
        node = node.left
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    index = node.slice
    if isinstance(index, ast.Tuple) and [getattr(e, "id", "") for e in index.elts] == ["b", "k"]:
        return int(node.value.id[1:])
    return None


def _bound(node: ast.expr, ints: list[Any], offset: Any) -> tuple[str, int] | None:
    """``("causal", c)`` for ``k <= q + offset + c``, ``("window", w)`` for
    ``k > q + offset - w``; None for anything else."""
    if not isinstance(node, ast.Compare):
        return None
    try:
        difference = _linear(node.left, ints) - _linear(node.comparators[0], ints)
    except ValueError:
        return None
    q, k = sympy.symbols("q k")
    sign = difference.coeff(k)
    rest = sympy.expand(difference - sign * k + sign * q)
    if sign not in (1, -1) or rest.has(q) or rest.has(k):
        return None
    rest = sympy.simplify(rest + sign * _symbol(offset))
    if not rest.is_Integer:
        return None
    number, kind = int(rest), type(node.ops[0])
    if sign == -1:
        kind = {ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE}.get(kind, kind)
        number = -number
    # Now: (k - q - offset) + number  <op>  0
    if kind is ast.LtE:
        return "causal", -number
    if kind is ast.Lt:
        return "causal", -number - 1
    if kind is ast.Gt:
        return "window", number
    if kind is ast.GtE:
        return "window", number + 1
    return None


def _linear(node: ast.expr, ints: list[Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in ("q", "k"):
        return sympy.Symbol(node.id)
    if isinstance(node, ast.Name) and node.id[0] == "n":
        return _symbol(ints[int(node.id[1:])])
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return sympy.Integer(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_linear(node.operand, ints)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
        left, right = _linear(node.left, ints), _linear(node.right, ints)
        if isinstance(node.op, ast.Add):
            return left + right
        return left - right if isinstance(node.op, ast.Sub) else left * right
    raise ValueError("not linear")


def _symbol(value: Any) -> Any:
    """A size as a sympy expression."""
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        return value.node.expr
    return sympy.Integer(int(value))


def is_attention_mask(node: fx.Node, placeholder: fx.Node | None) -> bool:
    """Whether ``node`` is the attention mask itself, cast or whole-sliced."""
    while node is not placeholder and node.op == "call_function":
        below = node.args[0]
        if not isinstance(below, fx.Node):
            return False
        same = known_equal(node.meta["val"].dim(), below.meta["val"].dim()) and all(
            known_equal(a, b) for a, b in zip(node.meta["val"].shape, below.meta["val"].shape)
        )
        cast = is_op(node, aten._to_copy.default, aten.slice.Tensor, aten.alias.default)
        cast = cast or (is_op(node, aten.ne.Scalar) and node.args[1] == 0)
        if not (cast and same):
            return False
        node = below
    return node is placeholder


class Masks:
    """Bool tensors of predicates, one for each that differs."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.made: dict[tuple[Any, ...], fx.Node] = {}

    def materialize(self, node: fx.Node) -> fx.Node | None:
        """The mask of an attention node as one tensor that ONNX's Attention takes, its float bias
        included; None where everything is allowed."""
        query, key = node.args[0], node.args[1]
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        arguments = dict(zip(names, _args(node, len(names)), strict=True))
        bias, text = arguments["bias"], arguments["mask"]
        value = arguments["mask_value"]
        allowed = self._predicate(node, arguments, query, key) if text else None
        if allowed is None and (bias is None or bias.meta["val"].dtype == torch.bool):
            return bias
        program = self.program
        if bias is not None and bias.meta["val"].dtype == torch.bool:
            assert allowed is not None
            allowed = program.emit(node, aten.logical_and.default, (allowed, bias))
            bias = None
        if bias is None and value is None:
            return allowed
        dtype = query.meta["val"].dtype
        if allowed is not None:
            low = torch.finfo(dtype).min if value is None else max(value, torch.finfo(dtype).min)
            zero = program.scalar(0.0, dtype)
            blocked = program.scalar(low, dtype)
            added = program.emit(node, aten.where.self, (allowed, zero, blocked))
            bias = added if bias is None else program.emit(node, aten.add.Tensor, (bias, added))
        if bias.meta["val"].dtype != dtype:
            bias = program.emit(node, aten._to_copy.default, (bias,), dtype=dtype)
        return bias

    def _predicate(
        self, node: fx.Node, arguments: dict[str, Any], query: fx.Node, key: fx.Node
    ) -> fx.Node:
        tensors, ints = list(arguments["mask_tensors"]), list(arguments["mask_ints"])
        rows, keys = query.meta["val"].shape[2], key.meta["val"].shape[2]
        heads = query.meta["val"].shape[1] if _names_head(arguments["mask"]) else 1
        size = (*(str(_symbol(n)) for n in (rows, keys)), str(heads))
        key_of = (arguments["mask"], *tensors, *(str(_symbol(n)) for n in ints), *size)
        found = self.made.get(key_of)
        if found is not None:
            return found
        program = self.program
        sizes = [
            program.emit(node, aten.sym_size.int, (x, d))
            for x, d in ((query, 0), (query, 2), (key, 2))
        ]
        call = (tensors, ints, sizes[0], heads, sizes[1], sizes[2], arguments["mask"])
        made = program.emit(node, op("mask"), call)
        made.meta["dspark_op"], made.meta["dspark_site"] = "dspark::mask", made.name
        self.made[key_of] = made
        return made


def _names_head(text: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "h" for n in ast.walk(parse(text)))
