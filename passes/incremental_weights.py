"""Rules of `dspark_compile.passes.incremental` for weights over the sequence that are no attention.

Retention, sigmoid attention, differences of softmaxes, weights that are divided by their own sum:
a product with values sums over the sequence, and it may, where the weight of every later token is
exactly zero. That is proved as masks are (`causal`): at two lengths, with all that depends on
tokens left open. Keys and values are kept, weights are made for the new rows against all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.causal import SIZES, Bounds
from dspark_compile.passes.graph import aten
from dspark_compile.passes.incremental_core import ALL, NEW, Maker, Modes, NotIncremental

# Results that are 0 where their first operand is.
_ZERO_STAYS = frozenset(
    {
        aten.relu.default, aten.abs.default, aten.neg.default, aten.div.Tensor, aten.sqrt.default,
        aten._to_copy.default, aten.dropout.default, aten.tanh.default, aten.sin.default,
        aten.silu.default, aten.gelu.default,
    }
)  # fmt: skip
# Results that are 0 where their operand is -inf.
_OF_SCORES = frozenset(
    {
        aten._softmax.default, aten.softmax.int, aten.exp.default, aten.sigmoid.default,
        aten._safe_softmax.default,
    }
)  # fmt: skip
_SOFTMAX = (aten._softmax.default, aten.softmax.int, aten._safe_softmax.default)
_LARGEST = (aten.amax.default,)
_SUM = (aten.sum.dim_IntList,)


class _Weights(Bounds):
    """Which weights may be other than 0."""

    def _bound(self, node: fx.Node, high: bool) -> Tensor:
        if node.target is aten.sub.Tensor and self.concrete(node) is None:
            return self._branch(node.args[0], high)  # -inf stays: less the largest, say
        return super()._bound(node, high)

    def may(self, node: Any) -> Tensor:
        """Bool, of a shape that broadcasts to the node's."""
        if not isinstance(node, fx.Node):
            return torch.tensor(bool(node != 0))
        concrete = self.concrete(node)
        if concrete is not None:
            return torch.as_tensor(concrete) != 0
        target, args = node.target, node.args
        if target is aten.zeros_like.default:
            return torch.tensor(False)
        if target in _OF_SCORES:
            return self.upper(args[0])  # type: ignore[arg-type]
        if target in _ZERO_STAYS:
            return self.may(args[0])
        if target is aten.mul.Tensor:
            return self.may(args[0]) & self.may(args[1])
        if target in (aten.add.Tensor, aten.sub.Tensor):
            return self.may(args[0]) | self.may(args[1])
        if target is aten.pow.Tensor_Scalar and isinstance(args[1], (int, float)) and args[1] > 0:
            return self.may(args[0])
        if target is aten.tril.default and (len(args) < 2 or isinstance(args[1], int)):
            full = self.may(args[0]).expand(self._size(list(node.meta["val"].shape)))
            return full.tril(*args[1:])  # type: ignore[arg-type]
        if target is aten.masked_fill.Scalar and args[2] == 0:
            return self.may(args[0]) & ~self._bound(args[1], False)  # type: ignore[arg-type]
        if target is aten.where.self:
            where = self.concrete(args[0])
            if where is not None:
                return torch.where(where, self.may(args[1]), self.may(args[2]))
            may, must = (self._bound(args[0], high) for high in (True, False))  # type: ignore[arg-type]
            return (may & self.may(args[1])) | (~must & self.may(args[2]))
        if target in _VIEWS:
            whole = self.may(args[0]).expand(self._size(list(args[0].meta["val"].shape)))  # type: ignore[union-attr]
            return target(whole, *(self._size(a) for a in args[1:]))  # type: ignore[operator]
        return torch.tensor(True)


_VIEWS = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
        aten.expand.default, aten.permute.default, aten.transpose.int, aten.clone.default,
        aten.squeeze.dim, aten.select.int, aten.alias.default,
    }
)  # fmt: skip


def _queries(maker: Maker, node: fx.Node, modes: Modes, keys: int) -> int:
    """The dimension of queries beside that of ``keys``."""
    shape = node.meta["val"].shape
    others = [d for d, n in enumerate(shape) if maker.carries(n) and d != keys]
    if len(others) != 1 or modes[others[0]] != NEW:
        raise NotIncremental(f"{node.name}: it sums over the sequence")
    if not (maker.pure(shape[keys]) and maker.pure(shape[others[0]])):
        raise NotIncremental(f"{node.name}: it sums over more or less than the sequence")
    return others[0]


def _check(maker: Maker, node: fx.Node, modes: Modes, keys: int, scores: bool) -> None:
    """Refuse ``node`` (``scores``: of a softmax, else weights) if later tokens may count."""
    queries = _queries(maker, node, modes, keys)
    for size in SIZES:
        bounds = _Weights(maker.symbol, size, maker.values, maker.tokens)
        found = bounds.upper(node) if scores else bounds.may(node)
        shape = bounds._size(list(node.meta["val"].shape))
        seen = found.expand(shape).movedim((queries, keys), (-2, -1))
        if bool(seen.triu(1).any()):
            kind = "scores" if scores else "weights"
            raise NotIncremental(
                f"{node.name}: it sums over the sequence, and {kind} of later tokens may count"
            )


def along_keys(maker: Maker, node: fx.Node, modes: Modes, dims: list[int]) -> fx.Node:
    """A softmax, a sum or the largest along keys.

    Raises:
        NotIncremental: it is something else along the sequence, or later tokens may count.
    """
    source, target = node.args[0], node.target
    if target not in (*_SOFTMAX, *_LARGEST, *_SUM) or len(dims) != 1:
        raise NotIncremental(f"{node.name}: {target} works along the sequence")
    assert isinstance(source, fx.Node)
    (keys,) = dims
    if target in _SOFTMAX:
        own = modes
        if modes[keys] != ALL:
            raise NotIncremental(f"{node.name}: {target} works along the sequence")
    else:
        kept = len(modes) == source.meta["val"].dim()
        own = (*modes[:keys], ALL, *modes[keys + int(kept) :])
    try:
        _check(maker, source, own, keys, target not in _SUM)
    except NotIncremental:
        # (Not one of these: a mean over the sequence, say.)
        raise NotIncremental(f"{node.name}: {target} works along the sequence") from None
    return maker.emit(node, (maker.get(source, own), *node.args[1:]))


def over_keys(maker: Maker, node: fx.Node, modes: Modes) -> fx.Node:
    """A product of weights ``[..., queries, keys]`` with values.

    Raises:
        NotIncremental: later tokens may have a weight.
    """
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    a, b = left.meta["val"], right.meta["val"]
    if a.dim() < 2 or b.dim() < 2 or modes[-2] != NEW or len(modes) != a.dim():
        raise NotIncremental(f"{node.name}: it sums over the sequence")
    batch = modes[:-2]
    weights: Modes = (*batch, NEW, ALL)
    _check(maker, left, weights, a.dim() - 1, scores=False)
    both = maker.operand(left, weights), maker.operand(right, (*batch, ALL, modes[-1]))
    return maker.emit(node, (*both, *node.args[2:]))
