"""Einsum: a batched matrix product written with letters, as one product.

    "bqhd,bkhd->bhqk"   ->  matmul(permute(q), permute(k))

Tracing tears an einsum into views around ``bmm``; here, where it is still one call, it
becomes the permutations and the ``matmul`` that attention is read from. Only products with
batch letters are taken (a letter in both operands and the result): a projection such as
``"bsd,do->bso"`` is a linear layer and stays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.passes.graph import aten


@dataclass(frozen=True)
class Plan:
    """How an equation is computed: ``permute(matmul(left', right'), out)``.

    Attributes:
        swap: whether the operands change places.
        left, right, out: permutations.
        lift: where ``right`` gets dimensions of size 1, after its permutation.
    """

    swap: bool
    left: tuple[int, ...]
    right: tuple[int, ...]
    lift: tuple[int, ...]
    out: tuple[int, ...]


def _letters(equation: str, ranks: tuple[int, int]) -> tuple[str, str, str] | None:
    equation = equation.replace(" ", "")
    if equation.count("->") != 1 or equation.count(",") != 1:
        return None
    inputs, out = equation.split("->")
    a, b = inputs.split(",")
    if "..." in equation:
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
        extra = [rank - len(term.replace("...", "")) for term, rank in zip((a, b), ranks)]
        if not all("..." in term for term in (a, b, out)) or extra[0] != extra[1]:
            return None
        a, b, out = (t.replace("...", "".join(free[: extra[0]])) for t in (a, b, out))
    for term in (a, b, out):
        if not term.isalpha() or len(set(term)) != len(term):
            return None
    return (a, b, out) if (len(a), len(b)) == ranks else None


@functools.cache
def plan(equation: str, ranks: tuple[int, int]) -> Plan | None:
    """The plan of a two-operand equation, or None if it is no batched matrix product."""
    terms = _letters(equation, ranks)
    if terms is None:
        return None
    a, b, out = terms
    if set(out) - set(a) - set(b) or (set(a) ^ set(b)) - set(out):
        return None
    batch = [c for c in out if c in a and c in b]
    summed = [c for c in a if c in b and c not in out]
    only_a = [c for c in out if c in a and c not in b]
    only_b = [c for c in out if c in b and c not in a]
    if not batch or len(summed) != 1 or not only_a or not only_b:
        return None
    # Rows come before columns in the result; the operand with one free letter gives these.
    swap = len(only_b) > 1 or (len(only_a) == 1 and out.index(only_b[0]) < out.index(only_a[0]))
    if swap:
        a, b, only_a, only_b = b, a, only_b, only_a
    if len(only_b) != 1:
        return None
    column, contracted = only_b[0], summed[0]
    row = _row(a, out, batch, only_a, made=b.index(contracted) > b.index(column))
    lead = [c for c in out if c in batch or (c in only_a and c != row)]
    result = [*lead, row, column]
    return Plan(
        swap,
        tuple(a.index(c) for c in (*lead, row, contracted)),
        tuple(b.index(c) for c in (*(c for c in lead if c in batch), contracted, column)),
        tuple(i for i, c in enumerate(lead) if c not in batch),
        tuple(result.index(c) for c in out),
    )


def _row(left: str, out: str, batch: list[str], free: list[str], made: bool) -> str:
    """Which free letter of the left operand counts rows: the others are groups of heads.

    Attention weights have their rows after the heads, be they the result or the operand. Keys and
    values have their feature last, so weights are ``made`` where that is summed over.
    """
    for term in (out, left) if made else (left, out):
        if max(term.index(c) for c in batch) < min(term.index(c) for c in free):
            return max(free, key=term.index)
    return max(free, key=out.index)


def einsum(*args: Any, **kwargs: Any) -> Tensor:
    """``torch.einsum``, with a batched matrix product as ``matmul``."""
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    found = None
    if isinstance(equation, str) and len(operands) == 2:
        left, right = operands
        found = plan(equation, (left.dim(), right.dim()))
    if found is None or left.dtype != right.dtype or not left.is_floating_point():
        return torch.einsum(*args, **kwargs)
    if found.swap:
        left, right = right, left
    left, right = _permute(left, found.left), _permute(right, found.right)
    if left.shape[-1] != right.shape[-2]:  # einsum broadcasts even the summed letter
        return torch.einsum(*args, **kwargs)
    for dim in found.lift:
        right = right.unsqueeze(dim)
    return _permute(torch.ops.dspark.matmul(left, right), found.out)


def _permute(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor if order == tuple(range(tensor.dim())) else aten.permute.default(tensor, order)


FUNCTIONS = {torch.einsum: einsum, torch.functional.einsum: einsum, aten.einsum.default: einsum}
