"""The interpreter: the value of a graph element as a function of ``(b, h, q, k)``.

The value of one mask element is asked for at a symbolic index. Each op answers by asking its
inputs at the indices that it reads (`Interpreter.value`), until factories (arange, full, ...)
give numbers and real tensors stay as loads ``t0[b, k]``. What an op answers is registered by
`handles`: see ``mask_ops.py`` and ``mask_index_ops.py``. An op without a meaning, or with one
that cannot be followed here, is a leaf tensor if one element does not depend on both query
and key, and `Unknown` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy import Expr, Integer
from torch import fx

from dspark_compile.passes.graph import is_tensor, known_equal
from dspark_compile.passes.mask_formulas import (
    FALSE,
    INDICES,
    TRUE,
    Bit,
    Cmp,
    Formula,
    Greatest,
    Join,
    K,
    Least,
    Load,
    Q,
    Unknown,
    conj,
    disj,
    negate,
    unlinear,
)
from dspark_compile.passes.mask_numbers import NARROW, WIDE, Arithmetic, Real, Value, merge

Handler = Callable[["Interpreter", fx.Node, tuple[Expr, ...]], Value]
_HANDLERS: dict[Any, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers what the ops called ``names`` (of aten, or ``space.name``) mean."""

    def register(handler: Handler) -> Handler:
        for name in names:
            space, _, op = name.rpartition(".")
            packet = getattr(getattr(torch.ops, space or "aten"), op, None)
            if packet is not None:
                _HANDLERS[packet] = handler
        return handler

    return register


# --- reading nodes ---------------------------------------------------------------------------


def recorded(node: fx.Node) -> Any:
    """The fake value of a node that may have none."""
    value = node.meta.get("val")
    if value is None:
        raise Unknown("has no recorded value", node)
    return value


def size_expr(size: Any) -> Expr:
    """A size (int, SymInt or the node of one) as a sympy integer."""
    if isinstance(size, fx.Node):
        size = recorded(size)
    if isinstance(size, torch.SymInt):
        known = size.node.maybe_as_int()
        return sympy.sympify(size.node.expr) if known is None else Integer(known)
    if isinstance(size, int):
        return Integer(int(size))
    raise Unknown(f"{size} is not an integer")


def shape_env_of(values: Iterable[Any]) -> Any:
    """The shape environment of the first symbolic size."""
    for value in values:
        if isinstance(value, torch.SymInt) and value.node.shape_env is not None:
            return value.node.shape_env
    return None


def band_of(tensor: torch.Tensor) -> tuple[int | None, int | None] | None:
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


# --- the interpreter -------------------------------------------------------------------------


class Interpreter(Arithmetic):
    """Values of graph elements as functions of ``(b, h, q, k)`` in one score shape."""

    def __init__(
        self,
        score_shape: Sequence[Any],
        constants: Mapping[fx.Node, torch.Tensor],
        leaves: dict[fx.Node, int],
    ) -> None:
        self.shape = tuple(recorded(s) if isinstance(s, fx.Node) else s for s in score_shape)
        super().__init__(
            {i: size_expr(s) for i, s in zip(INDICES, self.shape)}, shape_env_of(self.shape)
        )
        self.constants = constants
        self.leaves = leaves  # leaf node -> number, shared by all interpreters of a prover
        self.memo: dict[Any, Value | Unknown] = {}
        self.fresh: dict[tuple[Expr, Expr], Expr] = {}  # (place, size) -> a symbol for it
        self.origin: dict[Expr, frozenset[Expr]] = {}  # such a symbol -> what it depends on
        self.used_constants: dict[fx.Node, None] = {}

    def value(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """Element ``index`` of ``node``. Raises `Unknown`."""
        key = (node, index)
        known = self.memo.get(key)
        if known is None:
            try:
                known = self._value(node, index)
            except Unknown as error:
                known = error
            self.memo[key] = known
        if isinstance(known, Unknown):
            raise Unknown(known.reason, known.node)
        return known

    def _value(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        tensor = recorded(node)
        if not isinstance(tensor, torch.Tensor):
            raise Unknown("is not a tensor", node)
        index = tuple(
            Integer(0) if known_equal(size, 1) else i for i, size in zip(index, tensor.shape)
        )
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
        except Unknown as error:
            cause = Unknown(error.reason, error.node or node)
            return self.leaf(node, index, cause)

    def leaf(self, node: fx.Node, index: tuple[Expr, ...], cause: Unknown | None = None) -> Value:
        """``node`` as a tensor of the predicate, if it is small enough to be worth it."""
        tensor = recorded(node)
        name = node.op if node.op != "call_function" else str(node.target)
        if self.depends_on_both(index):
            raise cause or Unknown(
                f"every element of {node.name} ({name}) is data: it depends on query and key", node
            )
        if tensor.dtype != torch.bool and tensor.dtype not in (*WIDE, *NARROW):
            raise cause or Unknown(f"{node.name} ({name}) holds {tensor.dtype} values", node)
        number = self.leaves.setdefault(node, len(self.leaves))
        load = Load(Integer(number), *index)
        return Bit(load) if tensor.dtype == torch.bool else ((TRUE, load),)

    def depends_on_both(self, index: tuple[Expr, ...]) -> bool:
        """Whether an element is a function of query and key: its tensor is as large as the mask."""
        symbols: set[Expr] = set()
        for symbol in set().union(*(i.free_symbols for i in index)):
            symbols |= self.origin.get(symbol, {symbol})
        return {Q, K} <= symbols

    def anywhere(self, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        """`value` at an index that may leave the tensor's range; it means nothing there.

        The value is asked for at a fresh symbol within the range, and the real place put in
        afterwards, held inside the range where a tensor is read.
        """
        places: dict[Expr, tuple[Expr, Expr]] = {}
        inner = []
        for place, extent in zip(index, recorded(node).shape):
            size = size_expr(extent)
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
                expr = put(unlinear(f.terms, f.const))
                result = self.le(expr) if f.op == "<=" else self.eq(expr)
                return negate(result) if f.op == "!=" else result
            return f

        if not isinstance(value, tuple):
            return formula(value)
        return merge(
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
            band = band_of(tensor)
            if band is not None:
                low, high = band
                gap = index[-1] - index[-2]
                formula = conj(
                    TRUE if high is None else self.le(gap - high),
                    TRUE if low is None else self.le(low - gap),
                )
                return self.cast(formula, dtype)
        if dtype in WIDE and all(s == 1 for s in tensor.shape[:-1]):
            flat = tensor.reshape(-1)
            start, step = int(flat[0]), int(flat[1] - flat[0])
            ramp = torch.arange(len(flat), device=flat.device) * step + start
            if torch.equal(flat.to(torch.int64), ramp):
                return ((TRUE, start + step * index[-1]),)
        return None

    def literal(self, x: Any, dtype: torch.dtype) -> Value:
        """The number ``x`` (a Python number, a SymInt or its node) as a ``dtype`` element."""
        if isinstance(x, fx.Node):
            x = recorded(x)
        if isinstance(x, bool):
            return self.cast(TRUE if x else FALSE, dtype)
        if isinstance(x, (int, torch.SymInt)):
            return self.cast(((TRUE, size_expr(x)),), dtype)
        if isinstance(x, float):
            return self.cast(((TRUE, Real(x)),), dtype)
        raise Unknown(f"{x} is not a number")

    def broadcast(self, size: Sequence[Any], index: tuple[Expr, ...], out: Sequence[Any]) -> Any:
        """The index into a tensor of ``size`` that broadcasts to ``out``."""
        skipped = len(out) - len(size)
        result = []
        for s, o, i in zip(size, out[skipped:], index[skipped:]):
            if known_equal(s, 1):
                result.append(Integer(0))
            elif known_equal(s, o):
                result.append(i)
            else:
                raise Unknown(f"cannot tell how size {s} broadcasts to {o}")
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
        if is_tensor(x):
            tensor = recorded(x)
            own = self.broadcast(tensor.shape, index, recorded(node).shape)
            return self.cast(self.value(x, own), dtype, tensor.dtype)
        if precise and dtype in (torch.float16, torch.bfloat16) and isinstance(x, float):
            dtype = torch.float32
        return self.literal(x, dtype)

    def integer(self, node: fx.Node, index: tuple[Expr, ...], size: Any) -> Expr:
        """Element of an index tensor that provably points into ``[0, size)`` from below."""
        value = self.value(node, index)
        if not isinstance(value, tuple) or len(value) != 1 or isinstance(value[0][1], Real):
            raise Unknown("is indexed by values that are not a formula of the position", node)
        expr = value[0][1]
        low, high = self.bounds(expr)
        if high < 0:
            return expr + size_expr(size)
        if low < 0:
            raise Unknown("is indexed by values that may be negative", node)
        return expr

    def formula(self, x: Any, node: fx.Node, index: tuple[Expr, ...]) -> Formula:
        value = self.operand(x, node, index, torch.bool)
        assert not isinstance(value, tuple)
        return value
