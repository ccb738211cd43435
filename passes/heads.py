"""Heads: bring the operands of an attention, however they are laid out, to four dimensions.

Scores may be ``[M, N]``, ``[L, M, N]`` (a batch, heads, or both folded), ``[B, H, M, N]``,
``[B, Hkv, G, M, N]`` (grouped: keys have 1 in the place of G) or deeper (windows). `Layout`
decides what is batch and what is heads; `Heads` emits the views, as few as possible, and
looks through those that the code made only to undo them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.graph import (
    VIEWS,
    aten,
    dtype,
    emit,
    is_op,
    is_tensor,
    known_equal,
    same_shape,
    shape,
    val,
)
from dspark_compile.passes.scores import Miss, constant

_PURE_VIEWS = (*VIEWS, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim,
               aten.expand.default, aten.slice.Tensor, aten.clone.default)  # fmt: skip


def _one(size: Any) -> bool:
    return known_equal(size, 1)


@dataclass(frozen=True)
class Layout:
    """What the scores' leading dimensions mean.

    Attributes:
        batch, heads: the sizes that attention gets.
        grouped: whether a lead of three dimensions is (batch, key heads, group).
    """

    batch: Any
    heads: Any
    grouped: bool

    @staticmethod
    def choose(
        query: fx.Node, key_t: fx.Node, product: fx.Node, leads: Sequence[tuple[Any, ...]]
    ) -> Layout:
        """Batch and heads from all the shapes that scores, weights and result go through.

        Raises:
            Miss: the shapes contradict each other.
        """
        threes = [lead for lead in leads if len(lead) == 3]
        twos = [lead for lead in leads if len(lead) == 2]
        others = [lead for lead in leads if len(lead) > 3]
        grouped = False
        if threes:
            a, b, c = threes[0]
            key_lead = shape(key_t)[:-2]
            grouped = len(key_lead) == 3 and _one(key_lead[2]) and not _one(c)
            if not grouped and twos:
                grouped = known_equal(twos[0][0], a) and not _one(b)
        if twos:
            batch, heads = twos[0]
        elif threes:
            batch, heads = (a, b * c) if grouped else (a * b, c)
        elif others:
            batch, heads = math.prod(others[0][:-1]), others[0][-1]
        elif any(leads):
            batch, heads = _folded(query, product) or (max(leads, key=len)[0], 1)
        else:
            batch, heads = 1, 1
        for lead in leads:
            fits = {
                0: _one(batch) and _one(heads),
                1: known_equal(lead[0] if lead else 1, batch * heads),
                2: same_shape(lead, (batch, heads)),
            }.get(len(lead), known_equal(math.prod(lead), batch * heads))
            if not fits:
                raise Miss(f"scores lie as {lead} and as {(batch, heads)}", node=product)
        return Layout(batch, heads, grouped)


def _folded(query: fx.Node, product: fx.Node) -> tuple[Any, Any] | None:
    """(batch, heads) of ``[B * H, M, D]`` if a view beside it has four dimensions."""
    inner = query
    while is_op(inner, aten.mul.Tensor, aten.div.Tensor, aten._to_copy.default):
        inner = inner.args[0]  # type: ignore[assignment]
        if not is_tensor(inner):
            return None
    candidates = [(inner, inner.args[0])] if is_op(inner, *VIEWS) else []
    candidates += [(product, user) for user in product.users if is_op(user, *VIEWS)]
    for folded, node in candidates:
        if not is_tensor(node):
            continue
        sizes = shape(node)  # type: ignore[arg-type]
        if len(sizes) == 4 and same_shape(sizes[-2:], shape(folded)[-2:]):
            return sizes[0], sizes[1]
    return None


class Heads:
    """Emits nodes for one attention, before the node ``like``."""

    def __init__(
        self,
        graph: fx.Graph,
        like: fx.Node,
        fake_mode: Any,
        layout: Layout,
        near: Sequence[fx.Node],
    ) -> None:
        self.graph, self.like, self.fake_mode, self.layout = graph, like, fake_mode, layout
        near = [*near, *(n for node in near for n in node.all_input_nodes if is_tensor(n))]
        # What is emitted stands before ``like``, which therefore lends it no size.
        self._near = [n for n in near if n is not like]

    # --- single operations -------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call with its value and provenance."""
        return emit(self.graph, target, args, kwargs, like=self.like, fake_mode=self.fake_mode)

    def number(self, value: float, kind: torch.dtype) -> fx.Node:
        """A tensor of no dimensions."""
        device = val(self.like).device
        return self.call(aten.full.default, [], value, dtype=kind, device=device)

    def cast(self, node: fx.Node, kind: torch.dtype) -> fx.Node:
        """``node`` in ``kind``."""
        if dtype(node) == kind:
            return node
        return self.call(aten._to_copy.default, node, dtype=kind)

    def negated(self, mask: fx.Node) -> fx.Node:
        """``~mask``, or what the mask is itself the negation of."""
        if is_op(mask, aten.logical_not.default, aten.bitwise_not.default):
            inner = mask.args[0]
            assert isinstance(inner, fx.Node)
            if dtype(inner) == torch.bool:
                return inner
        if is_op(mask, aten.eq.Scalar):
            return self.call(aten.ne.Scalar, *mask.args)
        return self.call(aten.logical_not.default, mask)

    def sizes(self, dims: Sequence[Any], node: fx.Node) -> list[Any]:
        """Sizes as arguments: symbolic ones are read off ``node`` or ``self.like``."""
        unknown = [i for i, d in enumerate(dims) if not isinstance(d, int)]
        if len(unknown) == 1:
            return [-1 if i == unknown[0] else d for i, d in enumerate(dims)]
        return [d if isinstance(d, int) else self._size(d, node) for d in dims]

    def _size(self, size: Any, near: fx.Node) -> fx.Node:
        for node in (near, *self._near):
            for i, d in enumerate(shape(node)):
                if not isinstance(d, int) and known_equal(d, size):
                    return self.call(aten.sym_size.int, node, i)
        raise Miss(f"no tensor at hand has the size {size}", "compile with static shapes", near)

    def view(self, node: fx.Node, dims: Sequence[Any]) -> fx.Node:
        """``node`` as ``dims``, undoing a view that came from there."""
        if same_shape(shape(node), dims):
            return node
        if is_op(node, *VIEWS, aten.unsqueeze.default, aten.squeeze.dim):
            inner = node.args[0]
            assert isinstance(inner, fx.Node)
            if same_shape(shape(inner), dims):
                return inner
        return self.call(aten.view.default, node, self.sizes(dims, node))

    def expand(self, node: fx.Node, dims: Sequence[Any]) -> fx.Node:
        """``node`` broadcast to ``dims`` (same rank)."""
        if same_shape(shape(node), dims):
            return node
        want = [-1 if known_equal(a, b) else b for a, b in zip(shape(node), dims, strict=True)]
        want = [self._size(d, node) if not isinstance(d, int) else d for d in want]
        return self.call(aten.expand.default, node, want)

    def swapped(self, node: fx.Node) -> fx.Node:
        """The last two dimensions exchanged; permutations are merged."""
        rank = val(node).dim()
        order = [*range(rank - 2), rank - 1, rank - 2]
        if is_op(node, aten.permute.default):
            inner = node.args[0]
            assert isinstance(inner, fx.Node)
            order = [list(node.args[1])[i] for i in order]  # type: ignore[arg-type]
            if order == list(range(rank)):
                return inner
            return self.call(aten.permute.default, inner, order)
        return self.call(aten.permute.default, node, order)

    # --- layouts -----------------------------------------------------------------------------

    def four(self, node: fx.Node, lead: tuple[Any, ...], broadcast: bool) -> fx.Node:
        """``[*lead, x, y]`` as ``[B, H, x, y]``.

        Leading dimensions of ``node`` may be missing or 1. With ``broadcast`` batch and
        heads of the result may be 1 as well; without, the batch is full, and the heads are
        those that the node has (so that keys stay grouped).
        """
        batch, heads, rank = self.layout.batch, self.layout.heads, len(lead)
        while val(node).dim() < (4 if rank in (0, 2) else rank + 2):
            node = self.call(aten.unsqueeze.default, node, 0)
        tail = shape(node)[-2:]
        have = shape(node)[:-2]
        if rank == 1:
            node = self._one_lead(node, have[0], tail)
        elif rank == 3 and self.layout.grouped:
            node = self._grouped(node, lead, have, tail)
        elif rank >= 3:
            if all(_one(d) for d in have):
                node = self.view(node, (1, 1, *tail))
            elif all(_one(d) for d in have[:-1]) and broadcast:
                node = self.view(node, (1, have[-1], *tail))
            else:
                node = self.view(self.expand(node, (*lead, *tail)), (batch, heads, *tail))
        sizes = shape(node)
        if not broadcast and _one(sizes[0]) and not _one(batch):
            node = self.expand(node, (batch, *sizes[1:]))
        return node

    def _one_lead(self, node: fx.Node, have: Any, tail: tuple[Any, ...]) -> fx.Node:
        batch, heads = self.layout.batch, self.layout.heads
        if _one(heads) or _one(have):
            return self.call(aten.unsqueeze.default, node, 1)
        if _one(batch):
            return self.call(aten.unsqueeze.default, node, 0)
        return self.view(node, (batch, heads, *tail))

    def _grouped(
        self, node: fx.Node, lead: tuple[Any, ...], have: tuple[Any, ...], tail: tuple[Any, ...]
    ) -> fx.Node:
        if _one(have[2]):
            if _one(have[1]) or known_equal(have[1], lead[1]):
                # Keys, values: one for each group. A mask: the same for all heads.
                return self.call(aten.squeeze.dim, node, 2)
        node = self.expand(node, (have[0], lead[1], lead[2], *tail))
        return self.view(node, (have[0], self.layout.heads, *tail))

    def spread(self, node: fx.Node, lead: tuple[Any, ...]) -> fx.Node:
        """Something that broadcasts to the scores ``[*lead, M, N]`` there, so that it
        broadcasts to ``[B, H, M, N]``."""
        while val(node).dim() < 2:
            node = self.call(aten.unsqueeze.default, node, 0)
        sizes = shape(node)[:-2]
        missing = (1,) * (len(lead) - len(sizes))
        if len(lead) == 3 and self.layout.grouped and _one((*missing, *sizes)[2]):
            full = (*missing, *sizes)
            if not _one(full[1]):
                # One value a key head: every head of its group needs it.
                for _ in missing:
                    node = self.call(aten.unsqueeze.default, node, 0)
                node = self.expand(node, (full[0], lead[1], lead[2], *shape(node)[-2:]))
        return self.four(node, lead, broadcast=True)

    # --- operands ----------------------------------------------------------------------------

    def operands(
        self, query: fx.Node, key_t: fx.Node, value: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Query ``[B, H, M, D]``, key and value ``[B, Hkv, N, D]``."""
        lead = self._lead(query, key_t)
        q = self.four(query, lead, broadcast=False)
        q = self.expand(q, (*shape(q)[:1], self.layout.heads, *shape(q)[2:]))
        k = self.swapped(self.four(key_t, lead, broadcast=False))
        v = self.four(value, shape(self.like)[:-2], broadcast=False)
        if not known_equal(shape(k)[1], shape(v)[1]):
            k, v = self._all_heads(k), self._all_heads(v)
        return q, k, v

    @staticmethod
    def _lead(a: fx.Node, b: fx.Node) -> tuple[Any, ...]:
        x, y = shape(a)[:-2], shape(b)[:-2]
        rank = max(len(x), len(y))
        x, y = (1,) * (rank - len(x)) + x, (1,) * (rank - len(y)) + y
        return tuple(j if _one(i) else i for i, j in zip(x, y, strict=True))

    def _all_heads(self, node: fx.Node) -> fx.Node:
        batch, have, *tail = shape(node)
        heads = self.layout.heads
        if known_equal(have, heads):
            return node
        lifted = self.call(aten.unsqueeze.default, node, 2)
        group = heads // have
        return self.view(self.expand(lifted, (batch, have, group, *tail)), (batch, heads, *tail))

    def one_dtype(
        self, query: fx.Node, key: fx.Node, value: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node]:
        """The operands in one dtype: the narrow one that the model has if they were only
        widened for the product, else the widest."""
        narrow = [_unwidened(n) for n in (query, key, value)]
        kinds = {dtype(n) for n in narrow}
        if len(kinds) == 1 and kinds == {dtype(self.like)}:
            return narrow[0], narrow[1], narrow[2]
        kind = dtype(query)
        for node in (key, value):
            kind = torch.promote_types(kind, dtype(node))
        return self.cast(query, kind), self.cast(key, kind), self.cast(value, kind)

    def back(self, result: fx.Node, original: fx.Node) -> fx.Node:
        """``[B, H, M, Dv]`` in the layout that ``original`` had."""
        want = shape(original)
        if same_shape(shape(result), want):
            return result
        if len(want) == 3 and _one(self.layout.heads):
            return self.call(aten.squeeze.dim, result, 1)
        if len(want) == 3 and _one(self.layout.batch):
            return self.call(aten.squeeze.dim, result, 0)
        return self.view(result, want)


def unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """An operand without the constant factors that it was multiplied with, and their
    product. Views in between are kept, and looked through only if nothing else reads them."""
    factor, inner = 1.0, node
    above: fx.Node | None = None
    while True:
        if is_op(inner, aten.mul.Tensor, aten.div.Tensor):
            source, number = inner.args[0], constant(inner.args[1])
            if not (isinstance(source, fx.Node) and number and math.isfinite(number)):
                return node, factor
            if dtype(source) != dtype(inner) or not same_shape(shape(source), shape(inner)):
                return node, factor
            factor *= 1 / number if is_op(inner, aten.div.Tensor) else number
            if above is None:
                node = source
            else:
                above.replace_input_with(inner, source)
            inner = source
        elif is_op(inner, *_PURE_VIEWS) and len(inner.users) <= 1:
            above, inner = inner, inner.args[0]  # type: ignore[assignment]
        else:
            return node, factor


def _unwidened(node: fx.Node) -> fx.Node:
    """What ``node`` was before a cast to a wider floating dtype."""
    if is_op(node, aten._to_copy.default):
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        narrow = dtype(inner)
        if narrow.is_floating_point and torch.promote_types(narrow, dtype(node)) == dtype(node):
            return inner
    return node
