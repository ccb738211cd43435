"""Which feature of which tensor each feature of a node is.

Slices, concatenations, stacks, views, sign changes and the like only move the features of
the last dimensions around. `Features.plain` computes, for one node, an array that names the
source tensor, the feature and the sign at every position; `Features.products` also keeps
sums of products of two such tensors. So ``rotate_half`` and its dozen spellings, ``chunk``,
``unbind``, ``stack`` + ``flatten`` and complex multiplication all come out as the same
arrays, and a matcher compares arrays, not spellings.

The last ``k`` dimensions of a node are its *tail*; the others, its *lead*, must pass
unchanged (or broadcast), or the node counts as a source of its own (a leaf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    is_op,
    is_tensor,
    is_upcast,
    peel,
    same_shape,
    shape,
    val,
)

Array = np.ndarray[Any, Any]
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default)
# Features beyond this many are not tracked (vocabularies, images).
_LIMIT = 1 << 16
NONE = -1


@dataclass(frozen=True)
class Term:
    """One summand: ``sign * source[index] (* source2[index2])``; sign 0 where it is absent."""

    sign: Array
    source: Array
    index: Array
    source2: Array
    index2: Array

    def map(self, f: Callable[[Array], Array]) -> Term:
        """The same function of positions applied to every array."""
        return Term(f(self.sign), f(self.source), f(self.index), f(self.source2), f(self.index2))

    @property
    def is_product(self) -> bool:
        return bool((self.source2 != NONE).any())


Value = tuple[Term, ...]


class Features:
    """Feature maps over one graph, computed on demand and kept."""

    def __init__(self) -> None:
        self.sources: list[tuple[fx.Node, str]] = []
        self._ids: dict[tuple[fx.Node, str], int] = {}
        self._plain: dict[fx.Node, Term | None] = {}
        self._products: dict[fx.Node, Value | None] = {}

    # -- leaves -------------------------------------------------------------------------------

    def id(self, node: fx.Node, part: str = "") -> int:
        """The number of a source; ``part`` is ``re`` or ``im`` of a complex one."""
        key = (node, part)
        if key not in self._ids:
            self._ids[key] = len(self.sources)
            self.sources.append(key)
        return self._ids[key]

    def leaf(self, node: fx.Node, part: str = "") -> Term | None:
        """Every feature of ``node`` is itself."""
        if not is_tensor(node) or val(node).dim() == 0:
            return None
        size = shape(node)[-1]
        if not isinstance(size, int) or not 0 < size <= _LIMIT:
            return None
        ones = np.ones(size, dtype=np.int8)
        none = np.full(size, NONE, dtype=np.int64)
        source = np.full(size, self.id(node, part), dtype=np.int64)
        return Term(ones, source, np.arange(size, dtype=np.int64), none, none)

    # -- one source each ----------------------------------------------------------------------

    def plain(self, node: Any) -> Term | None:
        """The features of ``node``, one source each; None without a known last size."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._plain:
            moved = self._move(node, self._plain_value)
            self._plain[node] = moved[0] if moved and len(moved) == 1 else self.leaf(node)
        return self._plain[node]

    def _plain_value(self, node: Any) -> Value | None:
        term = self.plain(node)
        return None if term is None else (term,)

    # -- sums of products ---------------------------------------------------------------------

    def products(self, node: Any) -> Value | None:
        """The features of ``node`` as sums of at most two-factor products."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._products:
            self._products[node] = self._sum(node) or self._plain_value(node)
        return self._products[node]

    def _sum(self, node: fx.Node) -> Value | None:
        if is_op(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            left, right = node.args[0], node.args[1]
            if not (_may_hold_products(left) and _may_hold_products(right)):
                return None
            a, b = self.products(left), self.products(right)
            if a is None or b is None or a[0].sign.shape != b[0].sign.shape:
                return None
            if is_op(node, aten.sub.Tensor):
                b = tuple(_negated(t) for t in b)
            return (*a, *b) if len(a) + len(b) <= 4 else None
        if is_op(node, aten.mul.Tensor):
            return _product(self.plain(node.args[0]), self.plain(node.args[1]))
        if is_op(node, aten.view_as_real.default):
            return self._complex_product(node.args[0])
        if is_op(node, aten._to_copy.default):
            return self.products(node.args[0]) if _may_hold_products(node.args[0]) else None
        if is_op(node, aten.cat.default, aten.stack.default):
            parts = node.args[0]
            if not any(_may_hold_products(p) for p in parts):  # type: ignore[union-attr]
                return None
        elif not (is_op(node, *_RESHAPES) and _may_hold_products(node.args[0])):
            return None
        return self._move(node, self.products)

    def _complex_product(self, node: Any) -> Value | None:
        if not is_op(node, aten.mul.Tensor):
            return None
        a, b = self._complex(node.args[0]), self._complex(node.args[1])
        if a is None or b is None:
            return None
        rr, ii = _product(a[0], b[0]), _product(a[1], b[1])
        ri, ir = _product(a[0], b[1]), _product(a[1], b[0])
        if not (rr and ii and ri and ir):
            return None
        pairs = ((rr[0], ri[0]), (_negated(ii[0]), ir[0]))
        return tuple(_zip(pair, lambda arrays: np.stack(arrays, -1)) for pair in pairs)

    def _complex(self, node: Any) -> tuple[Term, Term] | None:
        if is_op(node, aten.view_as_complex.default):
            term = self.plain(node.args[0])
            if term is None or term.sign.ndim < 2:
                return None
            return term.map(lambda a: a[..., 0]), term.map(lambda a: a[..., 1])
        real, imaginary = self.leaf(node, "re"), self.leaf(node, "im")
        return None if real is None or imaginary is None else (real, imaginary)

    # -- ops that move features ---------------------------------------------------------------

    def _move(self, node: fx.Node, of: Callable[[Any], Value | None]) -> Value | None:
        """The value of a node that moves the features of its inputs, or None."""
        if node.op != "call_function" or not node.args or not is_tensor(node):
            return None
        if is_op(node, aten.cat.default, aten.stack.default):
            return _join(node, of)
        source = node.args[0]
        if not is_tensor(source):
            return None
        assert isinstance(source, fx.Node)
        if is_op(node, *_COPIES) or is_upcast(node):
            return of(source)
        negated = is_op(node, aten.neg.default) or (
            is_op(node, aten.mul.Tensor) and node.args[1] in (-1, -1.0)
        )
        if negated:
            value = of(source)
            return None if value is None else tuple(_negated(t) for t in value)
        if not is_op(node, *_MOVES):
            return None
        if is_op(node, *VIEWS) and not _tail_view_wanted(node):
            return None
        value = of(source)
        if value is None:
            return None
        tail = value[0].sign.ndim
        f = _mover(node, source, tail)
        return None if f is None else tuple(t.map(f) for t in value)


# What a rotation's result may still pass through (a slice of a product is not one of them).
_RESHAPES = (
    *VIEWS,
    *_COPIES,
    aten.neg.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
)
_MOVES = (
    *VIEWS,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.permute.default,
    aten.expand.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
)


def _mover(node: fx.Node, source: fx.Node, tail: int) -> Callable[[Array], Array] | None:
    """What ``node`` does to an array over the tail of its source, or None (lead touched)."""
    rank, lead = val(source).dim(), val(source).dim() - tail
    sizes = shape(node)
    if is_op(node, aten.slice.Tensor):
        axis = int(argument(node, 1, "dim", 0)) % rank - lead
        start, end = argument(node, 2, "start"), argument(node, 3, "end")
        step = argument(node, 4, "step", 1)
        known = all(isinstance(v, (int, type(None))) for v in (start, end, step))
        if axis < 0 or not known:
            return None
        where = (slice(None),) * axis + (slice(start, end, step),)
        return lambda a: a[where]
    if is_op(node, aten.select.int):
        axis = int(node.args[1]) % rank - lead  # type: ignore[arg-type]
        if axis < 0 or tail < 2 or not isinstance(node.args[2], int):
            return None
        index = node.args[2]
        return lambda a: np.take(a, index, axis)
    if is_op(node, aten.unsqueeze.default):
        axis = int(node.args[1]) % (rank + 1) - lead  # type: ignore[arg-type]
        return (lambda a: np.expand_dims(a, axis)) if axis > 0 else None
    if is_op(node, aten.squeeze.dim):
        axis = int(node.args[1]) % rank - lead  # type: ignore[arg-type]
        return (lambda a: np.squeeze(a, axis)) if axis >= 0 and tail > 1 else None
    if is_op(node, aten.permute.default):
        dims = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        if dims[:lead] != list(range(lead)):
            return None
        axes = [d - lead for d in dims[lead:]]
        return lambda a: np.transpose(a, axes)
    if is_op(node, *VIEWS, aten.expand.default):
        if len(sizes) <= lead or not same_shape(sizes[:lead], shape(source)[:lead]):
            return None
        new = sizes[lead:]
        if not all(isinstance(s, int) for s in new):
            return None
        if is_op(node, aten.expand.default):
            return (lambda a: np.broadcast_to(a, new)) if len(sizes) == rank else None
        return lambda a: a.reshape(new)
    if is_op(node, aten.repeat.default):
        times = list(node.args[1])  # type: ignore[arg-type]
        if len(times) != rank or any(t != 1 for t in times[:lead]):
            return None
        return lambda a: np.tile(a, times[lead:])
    return _turn(node, rank, lead)


def _turn(node: fx.Node, rank: int, lead: int) -> Callable[[Array], Array] | None:
    """``flip`` and ``roll``."""
    flip = is_op(node, aten.flip.default)
    dims = [int(d) % rank - lead for d in argument(node, 1 if flip else 2, "dims", [])]
    if not dims or min(dims) < 0:
        return None
    if flip:
        return lambda a: np.flip(a, tuple(dims))
    shifts: Sequence[int] = list(node.args[1])  # type: ignore[arg-type]
    return lambda a: np.roll(a, shifts, dims)


def _tail_view_wanted(node: fx.Node) -> bool:
    """Whether a view splits features only to pick among the parts (or joins them again).

    A view to heads also splits the last dimension; it starts a tensor of its own.
    """
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank, below = val(node).dim(), val(source).dim()
    if rank <= below:
        return True
    if rank != below + 1 or rank < 2:
        return False
    if shape(node)[-2] == 1 and all(_slices_last(user, rank) for user in node.users):
        # One row of two features got a dimension for its head; nothing was split.
        return False
    return all(_picks(user, rank) for user in node.users)


def _slices_last(user: fx.Node, rank: int) -> bool:
    return is_op(user, aten.slice.Tensor) and int(argument(user, 1, "dim", 0)) % rank == rank - 1


def _picks(user: fx.Node, rank: int) -> bool:
    if is_op(user, aten._to_copy.default, *_COPIES):
        return all(_picks(u, rank) for u in user.users)
    if is_op(user, aten.view_as_complex.default, aten.flip.default):
        return True
    if is_op(user, aten.select.int, aten.slice.Tensor):
        dim = int(argument(user, 1, "dim", 0)) % rank
        sizes = val(user.args[0]).shape  # type: ignore[arg-type]
        return dim >= rank - 2 and sizes[dim] == 2
    if is_op(user, aten.permute.default):
        dims = [int(d) % rank for d in user.args[1]]  # type: ignore[union-attr,arg-type]
        return dims == [*range(rank - 2), rank - 1, rank - 2]
    return False


def _join(node: fx.Node, of: Callable[[Any], Value | None]) -> Value | None:
    """``cat`` and ``stack`` along the tail; parts with fewer terms are padded with sign 0."""
    parts = list(node.args[0])  # type: ignore[arg-type]
    values = [of(p) for p in parts]
    if not values or any(v is None for v in values):
        return None
    known: list[Value] = values  # type: ignore[assignment]
    tails = {v[0].sign.ndim for v in known}
    if len(tails) != 1:
        return None
    tail = tails.pop()
    rank = val(node).dim()
    stacked = is_op(node, aten.stack.default)
    dim = int(argument(node, 1, "dim", 0)) % rank
    lead = val(parts[0]).dim() - tail
    axis = dim - lead
    if axis < 0 or (stacked and axis == 0):
        return None
    join = np.stack if stacked else np.concatenate
    count = max(map(len, known))
    padded = [[v[i] if i < len(v) else _absent(v[0]) for v in known] for i in range(count)]
    try:
        return tuple(_zip(terms, lambda arrays: join(arrays, axis)) for terms in padded)
    except ValueError:
        return None


def _zip(terms: Sequence[Term], f: Callable[[list[Array]], Array]) -> Term:
    fields = ("sign", "source", "index", "source2", "index2")
    return Term(*(f([getattr(t, name) for t in terms]) for name in fields))


def _absent(like: Term) -> Term:
    none = np.full_like(like.source, NONE)
    return Term(np.zeros_like(like.sign), none, np.zeros_like(none), none, np.zeros_like(none))


def _negated(term: Term) -> Term:
    return Term(-term.sign, term.source, term.index, term.source2, term.index2)


def _product(a: Term | None, b: Term | None) -> Value | None:
    if a is None or b is None or a.is_product or b.is_product:
        return None
    if a.sign.ndim != b.sign.ndim:
        return None
    try:
        sign, source, source2, index, index2 = np.broadcast_arrays(
            a.sign * b.sign, a.source, b.source, a.index, b.index
        )
    except ValueError:
        return None
    return (Term(sign, source, index, source2, index2),)


def _may_hold_products(node: Any) -> bool:
    """Whether a summand may be one of a rotation's: a cheap look, to bound the recursion."""
    node = peel(node, (*_COPIES, aten._to_copy.default, aten.neg.default))
    while is_op(node, *VIEWS, aten.squeeze.dim):
        node = node.args[0]
    return is_op(
        node,
        aten.mul.Tensor,
        aten.cat.default,
        aten.stack.default,
        aten.view_as_real.default,
    ) or (
        is_op(node, aten.add.Tensor, aten.sub.Tensor)
        and all(is_op(peel(a), aten.mul.Tensor) for a in node.args)
    )
