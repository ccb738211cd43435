"""Proof that an attention lets no token see a later one.

A predicate (`dspark_compile.ops.predicate`) must imply ``k <= q``: conjunctions, disjunctions and
comparisons are taken apart, so it holds for every size. A mask that is a tensor is computed at two
sizes, with everything in it that depends on tokens left open: what could be allowed there must not
lie above the diagonal.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dspark_compile.ops.predicate import parse
from dspark_compile.passes.graph import argument, aten
from dspark_compile.passes.scores import FORBIDS

SIZES = (23, 58)
# A bias that depends on tokens and is below this hides a key, whatever a model adds to it.
MASKED = -1e8
_SAME_SHAPE = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
        aten.expand.default, aten.permute.default, aten.transpose.int, aten.clone.default,
        aten.squeeze.dim, aten.slice.Tensor, aten.alias.default,
    }
)  # fmt: skip


def shifted(mask: str, name: str) -> str:
    """``mask`` with ``q + name`` for ``q``."""
    if not mask:
        return ""

    class Shift(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            if node.id != "q":
                return node
            return ast.BinOp(ast.Name("q"), ast.Add(), ast.Name(name))

    tree = Shift().visit(ast.parse(mask, mode="eval"))
    return ast.unparse(ast.fix_missing_locations(tree))


def implies_causal(mask: str, ahead: int = 0) -> bool:
    """Whether a predicate implies ``k <= q + ahead``."""
    return bool(mask) and _implies(parse(mask), ahead)


def _implies(node: ast.expr, ahead: int) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is False
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _implies(node.left, ahead) or _implies(node.right, ahead)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _implies(node.left, ahead) and _implies(node.right, ahead)
    if isinstance(node, ast.Compare):
        difference = _linear(node.left, node.comparators[0])
        if difference is None:
            return False
        # left - right is k - q + c or q - k + c.
        k, q = sympy.symbols("k q", integer=True)
        after, before = difference - (k - q) + ahead, difference - (q - k) - ahead
        if not (difference.has(q) or after.is_number or before.is_number):  # q is 0 at least
            after, before = difference - k + ahead, difference + k - ahead
        op = node.ops[0]
        if after.is_number:
            if isinstance(op, ast.LtE):
                return bool(after >= 0)  # k - q + c <= 0
            if isinstance(op, ast.Lt):
                return bool(after >= -1)
            if isinstance(op, ast.Eq):
                return bool(after >= 0)
        if before.is_number:
            if isinstance(op, ast.GtE):
                return bool(before <= 0)  # q - k + c >= 0
            if isinstance(op, ast.Gt):
                return bool(before <= 1)
            if isinstance(op, ast.Eq):
                return bool(before <= 0)
    return False


def _linear(left: ast.expr, right: ast.expr) -> sympy.Expr | None:
    names = {n.id for x in (left, right) for n in ast.walk(x) if isinstance(n, ast.Name)}
    kinds = (ast.Name, ast.BinOp, ast.Constant, ast.Load, ast.Add, ast.Sub, ast.UnaryOp, ast.USub)
    if not names <= {"q", "k"} or any(
        not isinstance(n, kinds) for x in (left, right) for n in ast.walk(x)
    ):
        return None
    symbols = {n: sympy.Symbol(n, integer=True) for n in ("q", "k")}
    return sympy.sympify(f"({ast.unparse(left)}) - ({ast.unparse(right)})", locals=symbols)


def proves_causal(
    node: fx.Node,
    symbol: sympy.Symbol,
    values: Mapping[fx.Node, Tensor],
    tokens: fx.Node,
    ahead: int = 0,
) -> str | None:
    """Why the attention ``node`` may see later tokens; None: it is proved not to.

    Args:
        symbol: the sequence's length.
        values: tensors of the graph's inputs.
        tokens: the input of tokens.
        ahead: keys in front of the first token's.
    """
    mask = str(node.kwargs.get("mask", ""))
    if implies_causal(mask, ahead):
        return None
    bias = argument(node, 3, "bias")
    if bias is None:
        return f"its mask is {mask!r}" if mask else "it has no mask"
    for size in SIZES:
        bounds = Bounds(symbol, size, values, tokens)
        known = bounds.concrete(bias)
        allowed = bounds.upper(bias) if known is None else _seen(known, ahead)
        if allowed.dim() < 2 or allowed.shape[-1] != size + ahead or allowed.shape[-2] != size:
            return f"its mask {bias.name} is not [queries, keys]"
        if bool(allowed.triu(1 + ahead).any()):
            return f"its mask {bias.name} allows a later key"
    return None


def _seen(mask: Tensor, ahead: int) -> Tensor:
    """Bool: which keys a mask ``[..., queries, keys]`` leaves. A finite bias hides a key if it lies
    far below that of one at or before the query (`FORBIDS`, as everywhere)."""
    if mask.dtype == torch.bool or mask.dim() < 2:
        return mask
    best = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1 + ahead), -torch.inf)
    return (mask > best.amax(-1, keepdim=True) + FORBIDS) & (mask > -torch.inf)


class Bounds:
    """Values of a mask's nodes at one length: concrete ones, and what is possible where they depend
    on tokens."""

    def __init__(
        self, symbol: sympy.Symbol, size: int, values: Mapping[fx.Node, Tensor], tokens: fx.Node
    ):
        self.symbol, self.size, self.values, self.tokens = symbol, size, values, tokens
        self.known: dict[fx.Node, Any] = {}

    def upper(self, node: fx.Node) -> Tensor:
        """Bool: what may be allowed."""
        return self._bound(node, True)

    def _bound(self, node: fx.Node, high: bool) -> Tensor:
        concrete = self.concrete(node)
        if concrete is not None:
            return concrete if concrete.dtype == torch.bool else concrete > MASKED
        bound, target, args = self._bound, node.target, node.args
        if target in _SAME_SHAPE:
            rest = [self._size(a) for a in args[1:]]
            return target(bound(args[0], high), *rest)  # type: ignore[operator, arg-type]
        if target in (aten.bitwise_and.Tensor, aten.logical_and.default):
            return bound(args[0], high) & bound(args[1], high)  # type: ignore[arg-type]
        if target in (aten.bitwise_or.Tensor, aten.logical_or.default):
            return bound(args[0], high) | bound(args[1], high)  # type: ignore[arg-type]
        if target in (aten.bitwise_not.default, aten.logical_not.default):
            return ~bound(args[0], not high)  # type: ignore[arg-type]
        if target is aten.masked_fill.Scalar and float(args[2]) < MASKED:  # type: ignore[arg-type]
            return bound(args[0], high) & ~bound(args[1], not high)  # type: ignore[arg-type]
        if target is aten.where.self:
            yes, no = (self._branch(x, high) for x in args[1:3])
            condition = self.concrete(args[0])  # type: ignore[arg-type]
            if condition is not None:
                return torch.where(condition, yes, no)
            may, must = bound(args[0], True), bound(args[0], False)  # type: ignore[arg-type]
            return (may & yes) | (~must & no) if high else (must | no) & (~may | yes)
        if target is aten.add.Tensor and node.meta["val"].dtype.is_floating_point:
            # -inf stays whatever is added to it.
            return self._branch(args[0], high) & self._branch(args[1], high)
        shape = [self._size(n) for n in node.meta["val"].shape]
        return torch.full(shape, high)

    def _branch(self, x: Any, high: bool) -> Tensor:
        if isinstance(x, fx.Node):
            return self._bound(x, high)
        return torch.tensor(x if isinstance(x, bool) else float(x) > MASKED)

    def _size(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._size(y) for y in x]
        if isinstance(x, fx.Node):
            x = x.meta["val"]
        if isinstance(x, torch.SymInt):
            return int(x.node.expr.subs(self.symbol, self.size))
        return x

    def concrete(self, node: Any) -> Any:
        """The value at this length; None: it depends on tokens."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.known:
            self.known[node] = self._concrete(node)
        return self.known[node]

    def _concrete(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, int)):
            return self._size(value)
        if node is self.tokens:
            return None
        if node.op == "placeholder":
            return self.values.get(node)
        if node.op == "get_attr":
            module: Any = node.graph.owning_module
            for name in str(node.target).split("."):
                module = getattr(module, name)
            return module
        if node.target is operator.getitem:
            source = self.concrete(node.args[0])
            return None if source is None else source[node.args[1]]
        if any(self.concrete(x) is None for x in node.all_input_nodes):
            return None
        args = fx.node.map_arg(node.args, self.concrete)
        kwargs = fx.node.map_arg(node.kwargs, self.concrete)
        return node.target(*args, **kwargs)  # type: ignore[operator]
