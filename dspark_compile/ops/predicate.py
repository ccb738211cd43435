"""The language of proved masks: a boolean expression over (b, h, q, k).

A predicate is text such as ``"(k <= q + n0) & t0[b, k]"``. Its names are the indices of
one attention score — batch ``b``, query head ``h``, query row ``q``, key row ``k`` — the
integers ``n0, n1, …`` (the op's ``mask_ints``) and the tensors ``t0, t1, …`` (its
``mask_tensors``), indexed with expressions that are in range; a bare ``t0`` is a tensor of
no dimensions. Integer tensors are read as int64, so arithmetic on them does not wrap.
Operators: ``+ - * // %`` (``//`` and ``%`` round down, as Python's), ``min max abs``, one
comparison at a time, ``& | ~`` on booleans, ``True False``. The empty text is "always".

`passes/masks.py` proves and prints predicates, kernels inline them, and `evaluate` here
gives their meaning.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> ast.expr:
    """The expression tree of a predicate. Raises `ValueError` for anything outside the language."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"mask predicate {text!r} is not an expression: {error}") from None
    _check(tree, text)
    return tree


def _check(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        children: list[ast.expr] = [node.left, node.right]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.USub)):
        children = [node.operand]
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        children = [node.left, node.comparators[0]]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in ("min", "max", "abs"):
            raise ValueError(f"mask predicate {text!r}: unknown function {node.func.id!r}")
        children = list(node.args)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        index = node.slice
        children = list(index.elts) if isinstance(index, ast.Tuple) else [index]
    elif (isinstance(node, ast.Name) and re.fullmatch(r"[bhqk]|[nt]\d+", node.id)) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (bool, int))
    ):
        children = []
    else:
        raise ValueError(f"mask predicate {text!r}: {ast.dump(node)} is not in the language")
    for child in children:
        _check(child, text)


def evaluate(
    text: str,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """The mask as a bool tensor that broadcasts to ``shape = (B, H, M, N)``; True attends.

    Dimensions that the predicate does not name stay 1.
    """
    value = number(parse(text), tensors, ints, shape, device) if text else True
    if not isinstance(value, Tensor):
        return torch.full((1, 1, 1, 1), bool(value), dtype=torch.bool, device=device)
    return value.reshape((1,) * (4 - value.dim()) + tuple(value.shape)).to(torch.bool)


def number(
    tree: ast.expr,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Any:
    """The value of a tree of the language, a number or a tensor that broadcasts to ``shape``."""
    grid = {}
    for axis, name in enumerate("bhqk"):
        view = [1, 1, 1, 1]
        view[axis] = shape[axis]
        grid[name] = torch.arange(shape[axis], device=device).view(view)

    def loads(number: int) -> Tensor:
        tensor = tensors[number].to(device)
        integral = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        return tensor.to(torch.int64) if integral else tensor

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return _BINARY[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.UnaryOp):
            value = walk(node.operand)
            if isinstance(node.op, ast.USub):
                return -value
            return (not value) if isinstance(value, bool) else ~value
        if isinstance(node, ast.Compare):
            return _COMPARE[type(node.ops[0])](walk(node.left), walk(node.comparators[0]))
        if isinstance(node, ast.Call):
            return _call(node.func.id, [walk(a) for a in node.args])  # type: ignore[attr-defined]
        if isinstance(node, ast.Subscript):
            tensor = walk(node.value)
            index = node.slice
            parts = list(index.elts) if isinstance(index, ast.Tuple) else [index]
            viewed = _as_view(tensor, parts, shape)
            if viewed is not None:
                return viewed
            return tensor[tuple(walk(p) for p in parts)]
        if isinstance(node, ast.Name):
            if node.id in grid:
                return grid[node.id]
            number = int(node.id[1:])
            return loads(number) if node.id[0] == "t" else ints[number]
        assert isinstance(node, ast.Constant)
        return node.value

    return walk(tree)


def _as_view(tensor: Tensor, parts: list[ast.expr], shape: tuple[int, ...]) -> Tensor | None:
    """``t[b, k]`` of a tensor ``[B, N]`` needs no gather: it is a view. None for other indices."""
    axes = ["bhqk".find(part.id) if isinstance(part, ast.Name) else -1 for part in parts]
    if len(set(axes)) != len(axes) or min(axes) < 0 or tensor.dim() != len(axes):
        return None
    if not all(_equal(tensor.shape[i], shape[axis]) for i, axis in enumerate(axes)):
        return None
    order = sorted(range(len(axes)), key=axes.__getitem__)
    tensor = tensor.permute(order)
    for axis in range(4):
        if axis not in axes:
            tensor = tensor.unsqueeze(axis)
    return tensor


def _equal(a: int, b: int) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def _call(name: str, values: list[Any]) -> Any:
    if name == "abs":
        return abs(values[0])
    pick, plain = (torch.minimum, min) if name == "min" else (torch.maximum, max)
    result = values[0]
    for value in values[1:]:
        if isinstance(result, Tensor) or isinstance(value, Tensor):
            like = result if isinstance(result, Tensor) else value
            result = pick(
                torch.as_tensor(result, device=like.device),
                torch.as_tensor(value, device=like.device),
            )
        else:
            result = plain(result, value)
    return result
