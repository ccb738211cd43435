"""From a graph over whole sequences to one over the tokens that are new: a cache is inserted.

The graph maps tokens ``[B, S]`` to logits ``[B, S, V]`` and remembers nothing. The new one takes
the M tokens at positions p … p+M-1 and gives their logits. It is made backwards from the logits:
each value is asked for with a *mode* for every dimension that carries the sequence,

    NEW   rows p … p+M-1 of it
    ALL   rows 0 … N-1, N being the room of the caches; rows from p+M on hold anything

and each op says which modes of its operands that takes. Ops that treat the rows alike pass modes
on. A value that depends on tokens and is wanted ALL (keys, values) gets a **cache**: its NEW rows
are written to it at p. One that does not (positions, tables, biases) is computed for N rows, or for
the new ones where the op allows. Attention takes queries NEW and keys ALL, its predicate with
``q + p`` for ``q``.

What this asks for is proved or refused (`NotIncremental`, with the node):

- no row may see a later one: the mask of each attention must imply ``k <= q`` (`causal`);
- no op may mix rows of the sequence in another way, or read its length.

Sizes are those that the graph was traced with, S its one symbol; B is a number.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dspark_compile.passes.causal import proves_causal, shifted
from dspark_compile.passes.graph import aten, is_dialect_op

NEW, ALL = "new", "all"
Modes = tuple[str | None, ...]

POINTWISE_TOO = frozenset(
    {
        aten.where.self, aten.clone.default, aten._to_copy.default, aten.masked_fill.Scalar,
        aten.masked_fill.Tensor, aten.alias.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.dropout.default, aten.zeros_like.default,
        aten.ones_like.default, aten.full_like.default,
    }
)  # fmt: skip
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
# op -> which argument names a dimension that the op works along
ALONG = {
    aten._softmax.default: 1, aten.softmax.int: 1, aten._log_softmax.default: 1,
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.argmax.default: 1, aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1,
    aten.cumsum.default: 1, aten.cumprod.default: 1, aten.gather.default: 1,
    aten.scatter.src: 1, aten.scatter.value: 1, aten.any.dim: 1, aten.var_mean.correction: 1,
    aten.linalg_vector_norm.default: 2, aten.logsumexp.default: 1, aten.max.dim: 1,
    aten.glu.default: 1,
}  # fmt: skip
FILLS = frozenset(
    {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format}
)
# Dialect ops that treat leading dimensions alike; the last one is theirs.
ROWWISE = (
    "linear", "merged_linear", "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "mlp",
    "gated_mlp", "gated_mlp_merged", "linear_int8", "linear_int4", "gated_mlp_int8",
    "gated_mlp_int4", "moe_router", "moe_experts",
)  # fmt: skip


class NotIncremental(Exception):
    """A graph cannot be decoded token by token; the message names the node and the reason."""


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


@dataclass
class Incremental:
    """The new graph: call it with the old one's arguments, the new tokens in place of the tokens,
    then the position p (an int64 tensor without dimensions) and the caches, written in place.

    Attributes:
        module: gives the logits ``[B, M, V]``.
        caches: in the order of the arguments.
        limit: positions that its tables have; None where there is no such limit.
    """

    module: fx.GraphModule
    caches: list[CacheSpec]
    limit: int | None


def make_incremental(
    module: fx.GraphModule,
    tokens: fx.Node,
    output: int,
    symbol: sympy.Symbol,
    values: Mapping[fx.Node, Tensor],
) -> Incremental:
    """See the module's docstring.

    Args:
        module: raised graph, functional, fake values in ``meta["val"]``.
        tokens: its placeholder of tokens ``[B, S]``.
        output: which of its outputs are the logits.
        symbol: S.
        values: tensors of the graph's inputs, from which masks are computed.

    Raises:
        NotIncremental: it is no causal function of its tokens, or this cannot be proved.
    """
    return _Maker(module, tokens, symbol, values).make(output)


class _Maker:
    def __init__(
        self,
        module: fx.GraphModule,
        tokens: fx.Node,
        symbol: sympy.Symbol,
        values: Mapping[fx.Node, Tensor],
    ):
        self.module, self.tokens, self.symbol, self.values = module, tokens, symbol, values
        self.graph = fx.Graph()
        self.made: dict[tuple[fx.Node, Modes], fx.Node] = {}
        self.caches: list[CacheSpec] = []
        self.cache_nodes: list[fx.Node] = []
        self.limit: int | None = None
        self.dependent: dict[fx.Node, bool] = {}
        for node in module.graph.nodes:  # in order
            self.dependent[node] = node is tokens or any(
                self.dependent[x] for x in node.all_input_nodes
            )

    def make(self, output: int) -> Incremental:
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
            aten.arange.default, (self.rows,), {"device": self._device(self.tokens)}
        )
        self.positions = self.graph.call_function(aten.add.Tensor, (arange, self.position))
        value = logits.meta["val"]
        modes = self.default(logits, NEW)
        if sum(m is not None for m in modes) > 1:
            raise NotIncremental(f"{logits.name}: the logits carry the sequence twice")
        if modes.count(NEW) == 0 and value.dim() == 3:
            raise NotIncremental(f"{logits.name}: the logits are not of every token")
        made = self.get(logits, modes)
        self.graph.output((made,))
        module = fx.GraphModule(self.module, self.graph)
        module.graph.eliminate_dead_code(
            lambda n: n.is_impure() or n.target is aten.index_copy_.default
        )
        module.graph.lint()
        module.recompile()
        return Incremental(module, self.caches, self.limit)

    # -------------------------------------------------------------------------------- sizes

    def _device(self, node: fx.Node) -> torch.device:
        return node.meta["val"].device

    def carries(self, size: Any) -> bool:
        """Whether a size has S in it."""
        return isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols

    def pure(self, size: Any) -> bool:
        """Whether a size is S."""
        return isinstance(size, torch.SymInt) and size.node.expr == self.symbol

    def default(self, node: fx.Node, mode: str) -> Modes:
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
        return self.room

    def size(self, value: Any, mode: str | None) -> Any:
        """A size argument of the old graph in the new one."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            if self.symbol not in expression.free_symbols:
                if expression.is_number:
                    return int(expression)
                raise NotIncremental(f"the size {expression} is not known")
            return self._expression(expression, self.rows if mode != ALL else self.N())
        return value

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

    # ------------------------------------------------------------------------------- values

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
        if ALL in modes and NEW not in modes and self.dependent[node]:
            return self._cached(node, modes, value)
        try:
            return self._op(node, modes, value)
        except NotIncremental:
            if self.dependent[node]:
                raise
        # No token in it: compute every row, and take those that are wanted. That rows do not change
        # as the sequence grows is found out when the result is compared with the original.
        every = tuple(ALL if m else None for m in modes)
        if every == modes:
            return self._again(node)
        made = self.get(node, every)
        for dimension, mode in enumerate(modes):
            if mode == NEW:
                if not self.pure(value.shape[dimension]):
                    raise NotIncremental(f"{node.name}: its rows are not the sequence's")
                made = self.graph.call_function(
                    aten.index_select.default, (made, dimension, self.positions)
                )
        return made

    def _again(self, node: fx.Node) -> fx.Node:
        """The op as it stands, N being the length of the sequence."""

        def convert(x: fx.Node) -> Any:
            if isinstance(x.meta["val"], Tensor):
                return self.get(x, self.default(x, ALL))
            return self.size(x, ALL)

        if node.op != "call_function":
            raise NotIncremental(f"{node.name} has a row for every token")
        kwargs = fx.node.map_arg(node.kwargs, convert)
        return self.emit(node, fx.node.map_arg(node.args, convert), kwargs)

    def _cached(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        """A value that depends on tokens, all rows of it: kept."""
        where = [d for d, m in enumerate(modes) if m is not None]
        if len(where) != 1 or modes[where[0]] != ALL or not self.pure(value.shape[where[0]]):
            raise NotIncremental(f"{node.name} is wanted whole, and it is not made of tokens' rows")
        dimension = where[0]
        fresh = self.get(node, tuple(NEW if m else None for m in modes))
        shape = tuple(None if d == dimension else int(n) for d, n in enumerate(value.shape))
        cache = self._new_cache(CacheSpec(node.name, shape, value.dtype))
        return self.graph.call_function(
            aten.index_copy_.default, (cache, dimension, self.positions, fresh)
        )

    def _new_cache(self, spec: CacheSpec) -> fx.Node:
        self.caches.append(spec)
        with self.graph.inserting_after(self.anchor):
            cache = self.graph.placeholder(f"cache_{len(self.caches) - 1}")
        self.anchor = cache
        self.cache_nodes.append(cache)
        return cache

    # ----------------------------------------------------------------------------------- ops

    def _op(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        target: Any = node.target
        if is_dialect_op(node):
            return self._dialect(node, modes, value)
        for targets, rule in _RULES:
            if target in targets:
                return rule(self, node, modes, value)
        if target is operator.getitem:
            return self._getitem(node, modes)
        if target in POINTWISE_TOO or torch.Tag.pointwise in getattr(target, "tags", ()):
            return self._pointwise(node, modes, value)
        raise NotIncremental(f"{node.name}: {target} is not known to keep tokens apart")

    def emit(self, node: fx.Node, args: Sequence[Any], kwargs: Any = None) -> fx.Node:
        """The same op on other arguments."""
        kwargs = node.kwargs if kwargs is None else kwargs
        return self.graph.call_function(node.target, tuple(args), dict(kwargs))  # type: ignore[arg-type]

    def operand(self, node: Any, modes: Modes) -> Any:
        """``node`` as it is broadcast to dimensions of ``modes``."""
        if not isinstance(node, fx.Node):
            return node
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise NotIncremental(f"{node.name} is a number that an op reads")
        own: list[str | None] = []
        for d, n in enumerate(value.shape):
            at = len(modes) - value.dim() + d
            mode = modes[at] if at >= 0 else None
            if self.carries(n) and mode is None:
                raise NotIncremental(f"{node.name}: a dimension of the sequence is lost")
            own.append(mode if self.carries(n) else None)
        return self.get(node, tuple(own))

    def _pointwise(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        def convert(x: Any) -> Any:
            return self.operand(x, modes) if isinstance(x, fx.Node) else x

        kwargs = fx.node.map_arg(node.kwargs, convert)
        return self.emit(node, fx.node.map_arg(node.args, convert), kwargs)

    def _view(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own = self._view_modes(source, source.meta["val"].shape, value.shape, modes)
        sizes = [self.size(n, modes[d]) for d, n in enumerate(value.shape)]
        return self.graph.call_function(aten.reshape.default, (self.get(source, own), sizes))

    def _view_modes(
        self, source: fx.Node, before: Sequence[Any], after: Sequence[Any], modes: Modes
    ) -> Modes:
        """Modes of a view's source: dimensions are matched in groups of equal size."""
        expression = lambda n: n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n)  # noqa: E731
        own: list[str | None] = [None] * len(before)
        i = j = 0
        while i < len(before) or j < len(after):
            left: list[int] = []
            right: list[int] = []
            a = b = sympy.Integer(1)
            while True:
                if i < len(before) and (not left or (a != b and not _less(b, a))):
                    left.append(i)
                    a *= expression(before[i])
                    i += 1
                elif j < len(after) and (not right or a != b):
                    right.append(j)
                    b *= expression(after[j])
                    j += 1
                else:
                    break
                if left and right and a == b:
                    break
                if i == len(before) and j == len(after):
                    break
            if a != b:
                raise NotIncremental(f"{source.name}: its view cannot be followed")
            wanted = {modes[d] for d in right if modes[d] is not None}
            carrying = [d for d in left if self.carries(before[d])]
            if len(wanted) > 1 or len(carrying) > 1:
                raise NotIncremental(f"{source.name}: a view joins two sequences")
            for d in carrying:
                if not wanted:
                    raise NotIncremental(f"{source.name}: a view hides the sequence")
                own[d] = next(iter(wanted))
        return tuple(own)

    def _permute(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source = node.args[0]
        rank = len(modes)
        if node.target is aten.permute.default:
            order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
        else:
            a, b = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, 1)
            order = list(range(rank))
            if rank > 1:
                order[a % rank], order[b % rank] = order[b % rank], order[a % rank]  # type: ignore[operator]
        own: list[str | None] = [None] * rank
        for d, s in enumerate(order):
            own[s] = modes[d]
        return self.emit(node, (self.get(source, tuple(own)), *node.args[1:]))

    def _unsqueeze(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        d = node.args[1] % value.dim()  # type: ignore[operator]
        return self.emit(node, (self.get(node.args[0], modes[:d] + modes[d + 1 :]), d))

    def _squeeze(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source = node.args[0].meta["val"]  # type: ignore[union-attr]
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        gone = {d % source.dim() for d in dims if source.shape[d] == 1}  # type: ignore[index]
        left = iter(modes)
        own = tuple(None if d in gone else next(left) for d in range(source.dim()))
        return self.emit(node, (self.get(node.args[0], own), *node.args[1:]))

    def _expand(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        sizes = [self.size(n, modes[d]) for d, n in enumerate(value.shape)]
        return self.emit(node, (self.operand(node.args[0], modes), sizes))

    def _slice(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source, dim, start, _, step = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]][:5]
        assert isinstance(source, fx.Node)
        before = source.meta["val"].shape
        dim = dim % len(before)  # type: ignore[operator]
        start = 0 if start is None else start
        if not self.carries(before[dim]) and not self.carries(value.shape[dim]):
            return self.emit(node, (self.get(source, modes), *node.args[1:]))
        known = self._number(start)
        if self.pure(value.shape[dim]) and not self.carries(before[dim]) and step == 1:
            # The first S rows of a table.
            if known is None or known < 0:
                raise NotIncremental(f"{node.name}: its start depends on the length")
            rows = int(before[dim]) - known
            self.limit = rows if self.limit is None else min(self.limit, rows)
            own = tuple(None if d == dim else m for d, m in enumerate(modes))
            table = self.get(source, own)
            if modes[dim] == NEW:
                at = self.positions
                if known:
                    at = self.graph.call_function(aten.add.Tensor, (at, known))
                return self.graph.call_function(aten.index_select.default, (table, dim, at))
            stop = self.graph.call_function(operator.add, (self.N(), known))
            return self.graph.call_function(aten.slice.Tensor, (table, dim, known, stop))
        if self.pure(before[dim]) and self.pure(value.shape[dim]) and known == 0:
            return self.get(source, modes)  # all of it
        raise NotIncremental(f"{node.name}: a slice of the sequence")

    def _number(self, x: Any) -> int | None:
        if isinstance(x, fx.Node):
            x = x.meta["val"]
        if isinstance(x, torch.SymInt):
            return int(x.node.expr) if x.node.expr.is_number else None
        return int(x)

    def _select(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source, dim, index = node.args
        assert isinstance(source, fx.Node)
        before = source.meta["val"].shape
        dim = dim % len(before)  # type: ignore[operator]
        if self.carries(before[dim]):
            raise NotIncremental(f"{node.name}: one row of the sequence")
        return self.emit(node, (self.get(source, (*modes[:dim], None, *modes[dim:])), dim, index))

    def _cat(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % value.dim()  # type: ignore[operator]
        if modes[dim] is not None:
            raise NotIncremental(f"{node.name}: it joins along the sequence")
        parts = [self.get(x, modes) for x in node.args[0]]  # type: ignore[union-attr]
        return self.graph.call_function(aten.cat.default, (parts, dim))

    def _along(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        """Ops along given dimensions: not the sequence's."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape = source.meta["val"].shape
        number = ALONG[node.target]  # type: ignore[index]
        dims = node.args[number] if len(node.args) > number else None
        if dims is None and node.target is aten.sort.default:
            dims = -1
        if dims is None and node.target is aten.topk.default:
            dims = -1
        dims = list(range(len(shape))) if dims is None else dims
        dims = [d % len(shape) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]  # type: ignore[operator]
        if any(self.carries(shape[d]) for d in dims):
            raise NotIncremental(f"{node.name}: {node.target} works along the sequence")
        if value.dim() == len(shape):
            own = modes
        else:
            left = iter(modes)
            own = tuple(None if d in dims else next(left) for d in range(len(shape)))
        args = [
            self.get(x, own) if isinstance(x, fx.Node) and isinstance(x.meta["val"], Tensor) else x
            for x in node.args
        ]
        return self.emit(node, args)

    def _getitem(self, node: fx.Node, modes: Modes) -> fx.Node:
        """A part of what a split, or an op with several results, gives."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        target = source.target
        key = (source, ("parts", *modes))
        if target in (aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
                      aten.chunk.default):  # fmt: skip
            inner = source.args[0]
            assert isinstance(inner, fx.Node)
            shape = inner.meta["val"].shape
            number = 1 if target is aten.unbind.int else 2
            dim = (source.args[number] if len(source.args) > number else 0) % len(shape)  # type: ignore[operator]
            if self.carries(shape[dim]):
                raise NotIncremental(f"{source.name}: it splits the sequence")
            own = modes if target is not aten.unbind.int else (*modes[:dim], None, *modes[dim:])
            if key not in self.made:
                self.made[key] = self.emit(source, (self.get(inner, own), *source.args[1:]))  # type: ignore[index]
        elif target in ALONG or (is_dialect_op(source) and self._name(source) in ROWWISE):
            if key not in self.made:
                rule = self._along if target in ALONG else self._rowwise
                self.made[key] = rule(source, modes, node.meta["val"])  # type: ignore[index]
        else:
            raise NotIncremental(f"{source.name}: {target} has several results")
        return self.graph.call_function(operator.getitem, (self.made[key], index))  # type: ignore[index]

    def _matmul(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        left, right = node.args[:2]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        a, b = left.meta["val"], right.meta["val"]
        if self.carries(a.shape[-1]):
            raise NotIncremental(f"{node.name}: it sums over the sequence")
        if a.dim() < 2 or b.dim() < 2:
            raise NotIncremental(f"{node.name}: a product with a vector")
        batch = modes[:-2]
        both = [
            self.operand(x, (*batch, modes[-2], None) if x is left else (*batch, None, modes[-1]))
            for x in (left, right)
        ]
        return self.emit(node, (*both, *node.args[2:]))

    def _addmm(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        bias, left, right = node.args[:3]
        if self.carries(left.meta["val"].shape[-1]):  # type: ignore[union-attr]
            raise NotIncremental(f"{node.name}: it sums over the sequence")
        args = (
            self.operand(bias, modes), self.operand(left, (modes[0], None)),
            self.operand(right, (None, modes[1])),
        )  # fmt: skip
        return self.emit(node, args)

    def _embedding(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        table, index = node.args[:2]
        return self.emit(node, (self.get(table), self.get(index, modes[:-1]), *node.args[2:]))

    def _index(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source, indices = node.args
        if any(self.carries(n) for n in source.meta["val"].shape):  # type: ignore[union-attr]
            raise NotIncremental(f"{node.name}: it picks rows of the sequence")
        if len(indices) != 1:  # type: ignore[arg-type]
            raise NotIncremental(f"{node.name}: several indices")
        index = indices[0]  # type: ignore[index]
        rank = index.meta["val"].dim()
        return self.emit(node, (self.get(source), [self.get(index, modes[:rank])]))

    def _index_select(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        source, dim, index = node.args
        shape = source.meta["val"].shape  # type: ignore[union-attr]
        dim = dim % len(shape)  # type: ignore[operator]
        if self.carries(shape[dim]):
            raise NotIncremental(f"{node.name}: it picks rows of the sequence")
        own = tuple(None if d == dim else m for d, m in enumerate(modes))
        return self.emit(node, (self.get(source, own), dim, self.get(index, (modes[dim],))))

    def _arange(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        args = list(node.args)
        if node.target is aten.arange.default:
            args = [0, *args]
        start, step = self._number(args[0]), self._number(args[2]) if len(args) > 2 else 1
        if not self.carries(value.shape[0]):
            if any(isinstance(a, fx.Node) for a in args):
                raise NotIncremental(f"{node.name}: a range that depends on the length")
            return self.emit(node, node.args)
        if start is None or step != 1 or not self.pure(value.shape[0]):
            raise NotIncremental(f"{node.name}: a range that is not the positions")
        keep = {k: v for k, v in node.kwargs.items() if k in ("device", "dtype")}
        if modes[0] == NEW:
            made = self.positions
            if value.dtype != torch.int64:
                made = self.graph.call_function(
                    aten._to_copy.default, (made,), {"dtype": value.dtype}
                )
        else:
            made = self.graph.call_function(aten.arange.default, (self.N(),), keep)
        return self.graph.call_function(aten.add.Tensor, (made, start)) if start else made

    def _fill(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        sizes = [self.size(n, modes[d]) for d, n in enumerate(value.shape)]
        return self.emit(node, (sizes, *node.args[1:]))

    def _triangle(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        """``tril``, ``triu``: by comparing positions."""
        diagonal = node.args[1] if len(node.args) > 1 else 0
        if not (self.pure(value.shape[-1]) and self.pure(value.shape[-2])):
            raise NotIncremental(f"{node.name}: a triangle that is not of the sequence")
        below = node.target is aten.tril.default
        rows, columns = self._index_pair(modes)
        offset = self.graph.call_function(aten.sub.Tensor, (columns, rows))
        compare = aten.le.Scalar if below else aten.ge.Scalar
        keep = self.graph.call_function(compare, (offset, diagonal))
        x = self.get(node.args[0], modes)
        other = self.graph.call_function(aten.zeros_like.default, (x,))
        return self.graph.call_function(aten.where.self, (keep, x, other))

    def _index_pair(self, modes: Modes) -> tuple[fx.Node, fx.Node]:
        both = []
        for at in (-2, -1):
            made = self.positions
            if modes[at] == ALL:
                made = self.graph.call_function(
                    aten.arange.default, (self.N(),), {"device": self._device(self.tokens)}
                )
            both.append(
                self.graph.call_function(aten.unsqueeze.default, (made, 1 if at == -2 else 0))
            )
        return both[0], both[1]

    def _eye(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        if len(node.args) > 1 or not self.pure(value.shape[0]):
            raise NotIncremental(f"{node.name}: not the sequence's diagonal")
        rows, columns = self._index_pair(modes)
        same = self.graph.call_function(aten.eq.Tensor, (rows, columns))
        return self.graph.call_function(aten._to_copy.default, (same,), {"dtype": value.dtype})

    # --------------------------------------------------------------------------------- dialect

    @staticmethod
    def _name(node: fx.Node) -> str:
        return node.target._schema.name.split("::")[1]  # type: ignore[union-attr]

    def _dialect(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        name = self._name(node)
        if name == "attention":
            return self._attention(node, modes)
        if name == "matmul":
            return self._matmul(node, modes, value)
        if name == "rope":
            return self._rope(node, modes)
        if name in ("greedy_token",):
            return self.emit(node, (self.get(node.args[0], (*modes, None)),))
        if name in ROWWISE:
            return self._rowwise(node, modes, value)
        raise NotIncremental(f"{node.name}: {name} is not known to keep tokens apart")

    def _rowwise(self, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
        """Leading dimensions are rows, of the result and of every operand that has rows."""

        def convert(x: fx.Node) -> Any:
            tensor = x.meta["val"]
            if not isinstance(tensor, Tensor):
                raise NotIncremental(f"{x.name} is a number that an op reads")
            carrying = [d for d, n in enumerate(tensor.shape) if self.carries(n)]
            if not carrying:
                return self.get(x)
            if carrying == [tensor.dim() - 1]:
                raise NotIncremental(f"{node.name}: it works along the sequence")
            mode = next((m for m in modes if m is not None), None)
            if mode is None or len(carrying) > 1:
                raise NotIncremental(f"{node.name}: its rows cannot be followed")
            return self.get(x, self.default(x, mode))

        kwargs = fx.node.map_arg(node.kwargs, convert)
        return self.emit(node, fx.node.map_arg(node.args, convert), kwargs)

    def _rope(self, node: fx.Node, modes: Modes) -> fx.Node:
        x, cos, sin, *rest = node.args
        # Tables broadcast to [..., S, rotated]: their last dimension is never the sequence.
        aligned = (*modes[:-1], None)
        return self.emit(
            node,
            (self.get(x, modes), self.operand(cos, aligned), self.operand(sin, aligned), *rest),
        )

    def _attention(self, node: fx.Node, modes: Modes) -> fx.Node:
        if modes != (None, None, NEW, None):
            raise NotIncremental(f"{node.name}: its result is wanted in another form")
        query, key, value, bias, sinks, tensors, ints = node.args
        for x in (query, key, value):
            shape = x.meta["val"].shape  # type: ignore[union-attr]
            if not self.pure(shape[2]) or any(self.carries(shape[d]) for d in (0, 1, 3)):
                raise NotIncremental(f"{node.name}: {x.name} has no row for each token")  # type: ignore[union-attr]
        why = proves_causal(node, self.symbol, self.values, self.tokens)
        if why is not None:
            raise NotIncremental(f"{node.name} is not causal: {why}")
        k = self.get(key, (None, None, ALL, None))
        v = self.get(value, (None, None, ALL, None))
        q = self.get(query, (None, None, NEW, None))
        if bias is not None:
            rank = bias.meta["val"].dim()  # type: ignore[union-attr]
            bias = self.operand(
                bias, (None, None, NEW, ALL)[-rank:] if rank < 4 else (None, None, NEW, ALL)
            )
        tensors = [self._mask_table(t, node) for t in tensors]  # type: ignore[union-attr]
        for number in ints:  # type: ignore[union-attr]
            if self._number(number) is None:
                raise NotIncremental(f"{node.name}: its mask reads the length")
        ints = [self._number(n) for n in ints]  # type: ignore[union-attr]
        kwargs = dict(node.kwargs)
        mask = str(kwargs.get("mask", ""))
        name = f"t{len(tensors)}"
        moved = shifted(mask, name)
        # Rows of the caches that no token has been written to are never allowed.
        causal = f"k <= q + {name}"
        kwargs["mask"] = (
            moved if moved == causal else f"({moved}) & ({causal})" if moved else causal
        )
        return self.emit(node, (q, k, v, bias, sinks, [*tensors, self.position], ints), kwargs)

    def _mask_table(self, x: Any, node: fx.Node) -> Any:
        if any(self.carries(n) for n in x.meta["val"].shape):
            if self.dependent[x]:
                raise NotIncremental(
                    f"{node.name}: its mask reads {x.name}, which depends on tokens"
                )
            return self.get(x, self.default(x, ALL))
        return self.get(x)


def _less(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether a is surely smaller: both are products of a number and maybe S."""
    ratio = sympy.simplify(b / a)
    return bool(ratio.is_number and ratio > 1) or (
        not ratio.is_number and bool(ratio.has(sympy.Symbol)) and sympy.denom(ratio).is_number
    )


_Rule = Callable[[_Maker, fx.Node, Modes, Tensor], fx.Node]
_RULES: list[tuple[Any, _Rule]] = [
    (VIEWS, _Maker._view),
    ({aten.permute.default, aten.transpose.int, aten.t.default}, _Maker._permute),
    ({aten.unsqueeze.default}, _Maker._unsqueeze),
    ({aten.squeeze.dim, aten.squeeze.dims}, _Maker._squeeze),
    ({aten.expand.default}, _Maker._expand),
    ({aten.slice.Tensor}, _Maker._slice),
    ({aten.select.int}, _Maker._select),
    ({aten.cat.default}, _Maker._cat),
    (ALONG, _Maker._along),
    ({aten.mm.default, aten.bmm.default, aten.matmul.default}, _Maker._matmul),
    ({aten.addmm.default}, _Maker._addmm),
    ({aten.embedding.default}, _Maker._embedding),
    ({aten.index.Tensor}, _Maker._index),
    ({aten.index_select.default}, _Maker._index_select),
    ({aten.arange.default, aten.arange.start, aten.arange.start_step}, _Maker._arange),
    (FILLS, _Maker._fill),
    ({aten.tril.default, aten.triu.default}, _Maker._triangle),
    ({aten.eye.default}, _Maker._eye),
]
