"""What `dspark_compile.passes.incremental` makes a graph with: sizes, values by mode, caches.

A *rule* makes one op of the new graph; they are in ``incremental_views``, ``incremental_ops`` and
``incremental_dialect``, each registered with `rule` under the ops that it is for.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from dspark_compile.passes.base import dialect
from dspark_compile.passes.graph import VIEWS, aten, dialect_name, is_dialect_op


@dataclass(frozen=True)
class Rows:
    """A mode: rows p + offset … p + M-1 + offset + extra of a dimension, p being the position of
    the first of M new tokens. Row -1 and those before it may be anything: who asks for them hides
    them."""

    offset: int = 0
    extra: int = 0

    def back(self, count: int, more: int = 0) -> Rows:
        """Rows that lie ``count`` before these, and ``more`` behind them."""
        return Rows(self.offset - count, self.extra + more)

    @property
    def ahead(self) -> int:
        """How far behind the last new token's row the last of them lies."""
        return self.offset + self.extra


NEW, ALL = Rows(), "all"
Mode = Rows | str | None
Modes = tuple[Mode, ...]

POINTWISE_TOO = frozenset(
    {
        aten.where.self, aten.clone.default, aten._to_copy.default, aten.masked_fill.Scalar,
        aten.masked_fill.Tensor, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.dropout.default,
    }
)  # fmt: skip
# What is read of their first operand is its shape.
LIKE = frozenset(
    {
        aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
        aten.empty_like.default, aten.new_zeros.default, aten.new_ones.default,
        aten.new_full.default, aten.new_empty.default, aten.fill.Scalar, aten.fill.Tensor,
        aten.copy.default,
    }
)  # fmt: skip
# Rows of these are rows of what they are made of: one cache will do for several of them.
_MOVES = frozenset(
    {
        *VIEWS, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.constant_pad_nd.default,
        aten.clone.default, aten.alias.default,
    }
)  # fmt: skip


class NotIncremental(Exception):
    """A graph cannot be decoded token by token; the message names the node and the reason."""


class InFront(NotIncremental):
    """Rows stand in front of the tokens', which only `Incremental.fronts` makes room for."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache that the new graph reads and writes.

    Attributes:
        name: of the value that it holds.
        shape: of the cache; None stands for the room N.
        dtype: of the cache.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    @property
    def dimension(self) -> int:
        """The one that grows."""
        return self.shape.index(None)


Rule = Callable[["Maker", fx.Node, Modes, Tensor], fx.Node]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ops: overloads, and dialect ops by name."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for a call."""
    return RULES.get(dialect_name(node) if is_dialect_op(node) else node.target)


class Maker:
    """Makes the new graph; `make_incremental` says of what."""

    def __init__(
        self,
        module: fx.GraphModule,
        tokens: fx.Node,
        symbol: sympy.Symbol,
        values: Mapping[fx.Node, Tensor],
        every: bool = False,
        fronts: bool | None = None,
    ):
        self.module, self.tokens, self.symbol, self.values = module, tokens, symbol, values
        self.graph = fx.Graph()
        self.made: dict[Any, fx.Node] = {}
        self.caches: list[CacheSpec] = []
        self.cache_nodes: list[fx.Node] = []
        self.limit: int | None = None
        self.last = False  # whether the logits are those of the last token alone
        # Whether caches may have rows in front of the tokens' (`Incremental.fronts`); None: such
        # rows are copied at every step.
        self.fronted = fronts
        self.fronts: set[int] = set()
        self.cuts: list[tuple[fx.Node, int]] = []
        self.every = every  # whether those of every new token are wanted all the same
        self.dependent: dict[fx.Node, bool] = {}
        for node in module.graph.nodes:  # in order
            reads = node.all_input_nodes
            if node.target in LIKE:
                reads = [x for x in node.args[1:] if isinstance(x, fx.Node)]
            self.dependent[node] = node is tokens or any(self.dependent[x] for x in reads)

    def make(self, output: int) -> fx.GraphModule:
        """The new graph; output number ``output`` of the old one is the logits."""
        (result,) = (n for n in self.module.graph.nodes if n.op == "output")
        logits = result.args[0][output]  # type: ignore[index]
        if not isinstance(logits, fx.Node) or not self.dependent[logits]:
            raise NotIncremental("the logits do not depend on the tokens")
        self.inputs: dict[fx.Node, fx.Node] = {}
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                new = self.graph.placeholder(node.name)
                self.inputs[node] = new
        self.position = self.graph.placeholder("position")
        # Caches are found on the way; their placeholders belong here.
        self.anchor = self.position
        # Everything else comes behind what follows.
        self.rows = self.graph.call_function(aten.sym_size.int, (self.inputs[self.tokens], 1))
        self.room: fx.Node | None = None
        self.room_at = self.rows
        arange = self.graph.call_function(
            aten.arange.default, (self.rows,), {"device": self.device(self.tokens)}
        )
        self.positions = self.graph.call_function(aten.add.Tensor, (arange, self.position))
        value = logits.meta["val"]
        modes = self.default(logits, NEW)
        if sum(m is not None for m in modes) > 1:
            raise NotIncremental(f"{logits.name}: the logits carry the sequence twice")
        made = self.get(logits, modes)
        if modes.count(NEW) == 0:
            if not self.last or value.dim() not in (2, 3):
                raise NotIncremental(f"{logits.name}: the logits are not of every token")
            if value.dim() == 2:
                made = self.graph.call_function(aten.unsqueeze.default, (made, int(not self.every)))
        if self.room is not None and self.fronted:
            longest = max(self.fronts, default=0)
            self.room.args = (self.room.args[0], longest)
            for cut, more in self.cuts:
                if more == longest:
                    cut.replace_all_uses_with(cut.args[0])  # type: ignore[arg-type]
        self.graph.output((made,))
        module = fx.GraphModule(self.module, self.graph)
        module.graph.eliminate_dead_code(
            lambda n: n.is_impure() or n.target is aten.index_copy_.default
        )
        module.graph.lint()
        module.recompile()
        return module

    def constant(self, node: Any) -> Tensor | None:
        """The value of a constant of the graph; None: it is none."""
        copies = (aten.lift_fresh_copy.default, aten.clone.default, aten.alias.default)
        while isinstance(node, fx.Node) and node.target in copies:
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        return value if isinstance(value, Tensor) else None

    def takes_last(self, node: fx.Node) -> bool:
        """Whether ``node``, which picks the last row of the sequence, does so for results of that
        token alone: nothing that is computed from it has a row for others."""
        todo, seen = [node], {node}
        while todo:
            for user in todo.pop().users:
                if user in seen or user.op == "output":
                    continue
                value = user.meta.get("val")
                if not isinstance(value, Tensor) or any(self.carries(n) for n in value.shape):
                    return False
                seen.add(user)
                todo.append(user)
        self.last = True
        return True

    def device(self, node: fx.Node) -> torch.device:
        return node.meta["val"].device

    def carries(self, size: Any) -> bool:
        """Whether a size has S in it."""
        return isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols

    def pure(self, size: Any) -> bool:
        """Whether a size is S."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.symbol

    def line(self, size: Any) -> tuple[int, int] | None:
        """``(n, c)`` where ``size`` is n (S + c)."""
        if not self.carries(size):
            return None
        expression = sympy.expand(size.node.expr)
        times = expression.coeff(self.symbol, 1)
        rest = sympy.expand(expression - times * self.symbol)
        if not (times.is_Integer and times > 0 and rest.is_Integer and rest % times == 0):
            return None
        return int(times), int(rest // times)

    def more(self, size: Any) -> int | None:
        """c where ``size`` is S + c; None: it is not."""
        found = self.line(size)
        return found[1] if found is not None and found[0] == 1 else None

    def default(self, node: fx.Node, mode: Mode) -> Modes:
        """``mode`` for every dimension that carries the sequence."""
        value = node.meta["val"]
        return tuple(mode if self.carries(n) else None for n in value.shape)

    def N(self) -> fx.Node:
        """The room, as a node."""
        if self.room is None:
            if not self.cache_nodes:  # one that only says how much room there is
                self._new_cache(CacheSpec("room", (None,), torch.uint8))
            with self.graph.inserting_after(self.room_at):
                self.room = self.graph.call_function(
                    aten.sym_size.int, (self.cache_nodes[0], self.caches[0].dimension)
                )
            if self.fronted:  # how many rows are in front is known in the end
                with self.graph.inserting_after(self.room):
                    self.room = self.graph.call_function(operator.sub, (self.room, 0))
        return self.room

    def count(self, mode: Rows) -> Any:
        """How many rows there are in ``mode``."""
        if not mode.extra:
            return self.rows
        key = ("count", mode.extra)
        if key not in self.made:
            self.made[key] = self.graph.call_function(operator.add, (self.rows, mode.extra))
        return self.made[key]

    def at(self, mode: Rows, last: int | None = None, raw: bool = False) -> fx.Node:
        """The rows of ``mode`` as numbers: from 0 on, and up to ``last``; or as they are."""
        key = ("at", mode, last, raw)
        if key in self.made:
            return self.made[key]
        call = self.graph.call_function
        # Rows in front of the tokens' are made at negative positions.
        if last is not None or (not raw and (mode.offset < 0 or self.fronted)):
            limits = (0,) if last is None else (0, last)
            made = call(aten.clamp.default, (self.at(mode, raw=True), *limits))
        elif mode.extra:
            device = {"device": self.device(self.tokens)}
            steps = call(aten.arange.default, (self.count(mode),), device)
            first = call(aten.add.Tensor, (self.position, mode.offset))
            made = call(aten.add.Tensor, (steps, first))
        elif mode.offset:
            made = call(aten.add.Tensor, (self.positions, mode.offset))
        else:
            made = self.positions
        self.made[key] = made
        return made

    def before(self, mode: Rows, row: int, behind: int) -> fx.Node:
        """Bool: which rows of ``mode`` lie before ``row``; ``behind`` dimensions follow."""
        key = ("before", mode, row, behind)
        if key not in self.made:
            call = self.graph.call_function
            made = call(aten.lt.Scalar, (self.at(mode, raw=True), row))
            for _ in range(behind):
                made = call(aten.unsqueeze.default, (made, -1))
            self.made[key] = made
        return self.made[key]

    def size(self, value: Any, mode: Mode) -> Any:
        """A size argument of the old graph in the new one."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(mode, Rows):
            found = (1, 0) if isinstance(value, int) else self.line(value)
            if found is not None:
                rows, times = self.count(mode), found[0]
                return self.graph.call_function(operator.mul, (rows, times)) if times > 1 else rows
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            if self.symbol not in expression.free_symbols:
                if expression.is_number:
                    return int(expression)
                raise NotIncremental(f"the size {expression} is not known")
            return self._expression(expression, self.rows if mode != ALL else self.N())
        return value

    def number(self, x: Any) -> int | None:
        if isinstance(x, fx.Node):
            x = x.meta["val"]
        if isinstance(x, torch.SymInt):
            return int(x.node.expr) if x.node.expr.is_number else None
        return int(x)

    def _expression(self, expression: sympy.Expr, rows: fx.Node) -> Any:
        if expression == self.symbol:
            return rows
        if expression.is_Integer:
            return int(expression)
        if expression.is_Add or expression.is_Mul:
            function = operator.add if expression.is_Add else operator.mul
            parts = [self._expression(x, rows) for x in expression.args]
            result = parts[0]
            for part in parts[1:]:
                result = self.graph.call_function(function, (result, part))
            return result
        raise NotIncremental(f"the size {expression} is no sum or product")

    def get(self, node: Any, modes: Modes | None = None) -> Any:
        """The new graph's node for ``node`` in ``modes``; what is no node is itself."""
        if not isinstance(node, fx.Node):
            return node
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            if isinstance(value, (torch.SymInt, int)):
                raise NotIncremental(f"{node.name} is a number that an op reads")
            raise NotIncremental(f"{node.name} is {type(value).__name__}")
        modes = modes if modes is not None else self.default(node, NEW)
        key = (node, modes)
        if key not in self.made:
            self.made[key] = self._make(node, modes, value)
        return self.made[key]

    def _make(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        if len(modes) != value.dim():
            raise NotIncremental(f"{node.name}: {len(modes)} modes for {value.dim()} dimensions")
        if not self.dependent[node]:
            own = tuple(
                m if self.carries(n) else None for m, n in zip(modes, value.shape, strict=True)
            )
            if own != modes:
                return self._rows_of(node, own, modes, value)
        if node.op == "placeholder":
            if node is self.tokens:
                if modes != (None, NEW):
                    return self._cached(node, modes, value)
                return self.inputs[node]
            if any(modes):
                raise NotIncremental(f"the input {node.name} has a row for every token")
            return self.inputs[node]
        if node.op == "get_attr":
            return self.graph.get_attr(str(node.target))
        if self.dependent[node] and self._is_kept(node, modes, value):
            return self._cached(node, modes, value)
        try:
            return self._op(node, modes, value)
        except NotIncremental:
            if self.dependent[node]:
                raise
        # No token in it: compute every row, and take those that are wanted. That rows do not change
        # as the sequence grows is found out when the result is compared with the original.
        every: Modes = tuple(ALL if m else None for m in modes)
        if every == modes:
            return self._again(node)
        for dimension, mode in enumerate(modes):
            if isinstance(mode, Rows) and self.more(value.shape[dimension]) is None:
                raise NotIncremental(f"{node.name}: its rows are not the sequence's")
        return self._rows_of(node, every, modes, value)

    def _rows_of(self, node: fx.Node, own: Modes, modes: Modes, value: Tensor) -> fx.Node:
        """``node`` in the modes ``own``, and of it the rows that ``modes`` want."""
        made = self.get(node, own)
        for dimension, mode in enumerate(modes):
            if mode == own[dimension]:
                continue
            assert isinstance(mode, Rows)
            n = value.shape[dimension]
            if isinstance(n, int) and n == 0:
                raise NotIncremental(f"{node.name} has no rows")
            at = self.at(mode, None if self.carries(n) else int(n) - 1)
            made = self.graph.call_function(aten.index_select.default, (made, dimension, at))
        return made

    def _again(self, node: fx.Node) -> fx.Node:
        """The op as it stands, N being the length of the sequence."""

        def convert(x: fx.Node) -> Any:
            if isinstance(x.meta["val"], Tensor):
                return self.get(x, self.default(x, ALL))
            if isinstance(x.meta["val"], (tuple, list)):  # several results, of weights alone
                if (x, ()) not in self.made:
                    self.made[x, ()] = self._again(x)
                return self.made[x, ()]
            return self.size(x, ALL)

        if node.op != "call_function":
            raise NotIncremental(f"{node.name} has a row for every token")
        kwargs = fx.node.map_arg(node.kwargs, convert)
        return self.emit(node, fx.node.map_arg(node.args, convert), kwargs)

    def _is_kept(self, node: fx.Node, modes: Modes, value: Tensor) -> bool:
        """Whether rows of ``node``, which depends on tokens, are kept in a cache."""
        if all(m is None or m == NEW for m in modes):
            return False
        where = [d for d, m in enumerate(modes) if m is not None]
        if len(where) != 1:
            return NEW not in modes
        (dimension,) = where
        if self.pure(value.shape[dimension]):
            return modes[dimension] == ALL or node.target not in _MOVES
        if self.fronted and (self.more(value.shape[dimension]) or 0) > 0:
            return modes[dimension] == ALL
        return modes[dimension] == ALL and self.more(value.shape[dimension]) is None

    def _cached(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        """A value that depends on tokens, all rows of it, or rows of earlier tokens: kept."""
        where = [d for d, m in enumerate(modes) if m is not None]
        more = self.more(value.shape[where[0]]) if len(where) == 1 else None
        if more is None or more < 0 or (more and not self.fronted):
            raise NotIncremental(f"{node.name} is wanted whole, and it is not made of tokens' rows")
        dimension = where[0]
        mode = modes[dimension]
        if isinstance(mode, Rows):
            if mode.ahead > more:
                raise NotIncremental(f"{node.name}: rows of later tokens are read")
            return self.kept_rows(node, dimension, self.at(mode), self.count(mode))
        new = self._front(more)
        fresh = self.get(node, tuple(new if m else None for m in modes))
        shape = tuple(None if d == dimension else int(n) for d, n in enumerate(value.shape))
        cache = self._new_cache(CacheSpec(node.name, shape, value.dtype))
        made = self.graph.call_function(
            aten.index_copy_.default, (cache, dimension, self.at(new), fresh)
        )
        if self.fronted:  # the caches are all as long as the longest: cut, if this one is not that
            end = self.graph.call_function(operator.add, (self.N(), more))
            made = self.graph.call_function(aten.slice.Tensor, (made, dimension, 0, end))
            self.cuts.append((made, more))
        return made

    def uncut(self, made: fx.Node) -> fx.Node:
        """The whole cache that ``made`` is the first rows of, for whoever leaves the others out."""
        if any(made is cut for cut, _ in self.cuts):
            made = made.args[0]  # type: ignore[assignment]
        return made

    def _front(self, more: int) -> Rows:
        """The new tokens' rows of what has ``more`` rows in front of the first one's."""
        if more:
            self.fronts.add(more)
        return Rows(more)

    def kept_rows(self, node: fx.Node, dimension: int, at: fx.Node, count: Any) -> fx.Node:
        """``count`` rows ``at`` of ``node``, all of them of tokens that are known.

        Their cache is ``[1, 1, N, features]``, which appends are made for: a row lies in one piece.
        """
        value, call = node.meta["val"], self.graph.call_function
        rest = [int(n) for d, n in enumerate(value.shape) if d != dimension]
        # Appends are of floating numbers, and these hold every token.
        dtype = torch.float32 if node is self.tokens else value.dtype
        key = ("kept", node, dimension)
        if key not in self.made:
            new = self._front(self.more(value.shape[dimension]) or 0)
            fresh = self.get(
                node, tuple(new if d == dimension else None for d in range(value.dim()))
            )
            front = [dimension, *(d for d in range(value.dim()) if d != dimension)]
            if dimension:
                fresh = call(aten.permute.default, (fresh, front))
            flat = [1, 1, self.rows, math.prod(rest)]
            fresh = call(aten.reshape.default, (fresh, flat))
            if dtype != value.dtype:
                fresh = call(aten._to_copy.default, (fresh,), {"dtype": dtype})
            cache = self._new_cache(CacheSpec(node.name, (1, 1, None, math.prod(rest)), dtype))
            call(dialect("cache_append_"), (cache, fresh, self.at(new)))
            self.made[key] = cache
        made = call(aten.index_select.default, (self.made[key], 2, at))
        made = call(aten.reshape.default, (made, [count, *rest]))
        if dtype != value.dtype:
            made = call(aten._to_copy.default, (made,), {"dtype": value.dtype})
        order = [*range(1, dimension + 1), 0, *range(dimension + 1, value.dim())]
        return call(aten.permute.default, (made, order)) if dimension else made

    def first_row(self, node: fx.Node, modes: Modes, dimension: int) -> fx.Node:
        """The first token's row of ``node``, as a dimension of size 1; ``modes`` but for that."""
        value = node.meta["val"]
        if any(m is not None for d, m in enumerate(modes) if d != dimension) or not self.pure(
            value.shape[dimension]
        ):
            raise NotIncremental(f"{node.name}: one row of what is not made of tokens' rows")
        zero = self.graph.call_function(
            aten.full.default, ([1], 0), {"dtype": torch.int64, "device": self.device(self.tokens)}
        )
        return self.kept_rows(node, dimension, zero, 1)

    def _new_cache(self, spec: CacheSpec) -> fx.Node:
        self.caches.append(spec)
        with self.graph.inserting_after(self.anchor):
            cache = self.graph.placeholder(f"cache_{len(self.caches) - 1}")
        self.anchor = cache
        self.cache_nodes.append(cache)
        return cache

    def _op(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        rule = rule_of(node)
        if rule is not None:
            return rule(self, node, modes, value)
        target: Any = node.target
        if target in POINTWISE_TOO or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise(node, modes, value)
        name = dialect_name(node) if is_dialect_op(node) else target
        raise NotIncremental(f"{node.name}: {name} is not known to keep tokens apart")

    def emit(self, node: fx.Node, args: Sequence[Any], kwargs: Any = None) -> fx.Node:
        """The same op on other arguments."""
        kwargs = node.kwargs if kwargs is None else kwargs
        for x in pytree.tree_leaves((args, kwargs)):
            # Code cannot say it: symbols are the old graph's.
            if isinstance(x, (torch.SymInt, torch.SymFloat)) and x.node.expr.free_symbols:
                raise NotIncremental(
                    f"{node.name}: it reads {x}, which depends on the length of the sequence"
                )
        return self.graph.call_function(node.target, tuple(args), dict(kwargs))  # type: ignore[arg-type]

    def operand(self, node: Any, modes: Modes) -> Any:
        """``node`` as it is broadcast to dimensions of ``modes``."""
        if not isinstance(node, fx.Node):
            return node
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise NotIncremental(f"{node.name} is a number that an op reads")
        own: list[Mode] = []
        for d, n in enumerate(value.shape):
            at = len(modes) - value.dim() + d
            mode = modes[at] if at >= 0 else None
            if self.carries(n) and mode is None:
                raise NotIncremental(f"{node.name}: a dimension of the sequence is lost")
            own.append(mode if self.carries(n) or n != 1 else None)
        return self.get(node, tuple(own))

    def _pointwise(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        def convert(x: Any) -> Any:
            return self.operand(x, modes) if isinstance(x, fx.Node) else x

        kwargs = fx.node.map_arg(node.kwargs, convert)
        return self.emit(node, fx.node.map_arg(node.args, convert), kwargs)
