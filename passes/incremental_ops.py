"""Rules of `dspark_compile.passes.incremental` for ATen ops that compute."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.causal import Bounds
from dspark_compile.passes.graph import aten
from dspark_compile.passes.incremental_core import (
    ALL,
    NEW,
    Maker,
    Modes,
    NotIncremental,
    rule,
    rule_of,
)
from dspark_compile.passes.incremental_dialect import rowwise

# op -> which argument names a dimension that the op works along
ALONG = {
    aten._softmax.default: 1, aten.softmax.int: 1, aten._log_softmax.default: 1,
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.argmax.default: 1, aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1,
    aten.cumsum.default: 1, aten.cumprod.default: 1, aten.gather.default: 1,
    aten.scatter.src: 1, aten.scatter.value: 1, aten.any.dim: 1, aten.var_mean.correction: 1,
    aten.var.correction: 1, aten.std.correction: 1, aten.linalg_vector_norm.default: 2,
    aten.logsumexp.default: 1, aten.max.dim: 1,
    aten.glu.default: 1, aten.flip.default: 1,
}  # fmt: skip
FILLS = frozenset(
    {aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format}
)


@rule(*ALONG)
def along(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
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
    if any(maker.carries(shape[d]) for d in dims):
        raise NotIncremental(f"{node.name}: {node.target} works along the sequence")
    if value.dim() == len(shape):
        own = modes
    else:
        left = iter(modes)
        own = tuple(None if d in dims else next(left) for d in range(len(shape)))
    args = [
        maker.get(x, own) if isinstance(x, fx.Node) and isinstance(x.meta["val"], Tensor) else x
        for x in node.args
    ]
    return maker.emit(node, args)


@rule(operator.getitem)
def getitem(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
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
        if maker.carries(shape[dim]):
            raise NotIncremental(f"{source.name}: it splits the sequence")
        own = modes if target is not aten.unbind.int else (*modes[:dim], None, *modes[dim:])
        if key not in maker.made:
            maker.made[key] = maker.emit(source, (maker.get(inner, own), *source.args[1:]))  # type: ignore[index]
    elif rule_of(source) in (along, rowwise):
        if key not in maker.made:
            maker.made[key] = rule_of(source)(maker, source, modes, value)  # type: ignore[index,misc]
    else:
        raise NotIncremental(f"{source.name}: {target} has several results")
    return maker.graph.call_function(operator.getitem, (maker.made[key], index))  # type: ignore[index]


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, "matmul")
def matmul(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    a, b = left.meta["val"], right.meta["val"]
    if maker.carries(a.shape[-1]):
        raise NotIncremental(f"{node.name}: it sums over the sequence")
    if a.dim() < 2 or b.dim() < 2:
        raise NotIncremental(f"{node.name}: a product with a vector")
    batch = modes[:-2]
    both = [
        maker.operand(x, (*batch, modes[-2], None) if x is left else (*batch, None, modes[-1]))
        for x in (left, right)
    ]
    return maker.emit(node, (*both, *node.args[2:]))


@rule(aten.addmm.default)
def addmm(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    bias, left, right = node.args[:3]
    if maker.carries(left.meta["val"].shape[-1]):  # type: ignore[union-attr]
        raise NotIncremental(f"{node.name}: it sums over the sequence")
    args = (
        maker.operand(bias, modes), maker.operand(left, (modes[0], None)),
        maker.operand(right, (None, modes[1])),
    )  # fmt: skip
    return maker.emit(node, args)


@rule(aten.embedding.default)
def embedding(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    table, index = node.args[:2]
    _limit_by_table(maker, table, index)
    return maker.emit(node, (maker.get(table), maker.get(index, modes[:-1]), *node.args[2:]))


_TRIED = 1 << 12  # rows of a table of two indices that are tried: pairs of positions are many


def _limit_by_table(maker: Maker, table: Any, index: Any) -> None:
    """Positions index a table: how many it has is how long a sequence can be."""
    if not isinstance(index, fx.Node) or maker.dependent[index]:
        return
    if not any(maker.carries(n) for n in index.meta["val"].shape):
        return
    rows = int(table.meta["val"].shape[0])

    def fits(size: int) -> bool:
        known = Bounds(maker.symbol, size, maker.values, maker.tokens).concrete(index)
        return known is None or not known.numel() or int(known.max()) < rows

    low, high = 0, 2 * rows + 2
    if (index.meta["val"].dim() > 1 and high > _TRIED) or fits(high):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    maker.limit = low if maker.limit is None else min(maker.limit, low)


def _last_row(maker: Maker, node: fx.Node, modes: Modes) -> fx.Node | None:
    """``x[:, [-1]]``: the last token's row, where nothing else is wanted; None: it is not that."""
    source, indices = node.args
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    shape = source.meta["val"].shape
    given = [d for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or not maker.pure(shape[given[0]]):
        return None
    (dim,) = given
    rows = maker.constant(indices[dim])
    if rows is None or rows.tolist() != [-1] or not maker.takes_last(node):
        return None
    x = maker.get(source, (*modes[:dim], NEW, *modes[dim + 1 :]))
    return maker.graph.call_function(aten.slice.Tensor, (x, dim, -1))


@rule(aten.index.Tensor)
def index(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source, indices = node.args
    if any(maker.carries(n) for n in source.meta["val"].shape):  # type: ignore[union-attr]
        made = _last_row(maker, node, modes)
        if made is not None:
            return made
        raise NotIncremental(f"{node.name}: it picks rows of the sequence")
    if len(indices) != 1:  # type: ignore[arg-type]
        raise NotIncremental(f"{node.name}: several indices")
    at = indices[0]  # type: ignore[index]
    rank = at.meta["val"].dim()
    return maker.emit(node, (maker.get(source), [maker.get(at, modes[:rank])]))


@rule(aten.index_select.default)
def index_select(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source, dim, index = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    dim = dim % len(shape)  # type: ignore[operator]
    if maker.carries(shape[dim]):
        raise NotIncremental(f"{node.name}: it picks rows of the sequence")
    own = tuple(None if d == dim else m for d, m in enumerate(modes))
    return maker.emit(node, (maker.get(source, own), dim, maker.get(index, (modes[dim],))))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    args = list(node.args)
    if node.target is aten.arange.default:
        args = [0, *args]
    start, step = maker.number(args[0]), maker.number(args[2]) if len(args) > 2 else 1
    if not maker.carries(value.shape[0]):
        if any(isinstance(a, fx.Node) for a in args):
            raise NotIncremental(f"{node.name}: a range that depends on the length")
        return maker.emit(node, node.args)
    if start is None or step != 1 or not maker.pure(value.shape[0]):
        raise NotIncremental(f"{node.name}: a range that is not the positions")
    keep = {k: v for k, v in node.kwargs.items() if k in ("device", "dtype")}
    if modes[0] == NEW:
        made = maker.positions
        if value.dtype != torch.int64:
            made = maker.graph.call_function(aten._to_copy.default, (made,), {"dtype": value.dtype})
    else:
        made = maker.graph.call_function(aten.arange.default, (maker.N(),), keep)
    return maker.graph.call_function(aten.add.Tensor, (made, start)) if start else made


@rule(*FILLS)
def fill(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
    return maker.emit(node, (sizes, *node.args[1:]))


@rule(aten.tril.default, aten.triu.default)
def triangle(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """``tril``, ``triu``: by comparing positions."""
    diagonal = node.args[1] if len(node.args) > 1 else 0
    if not (maker.pure(value.shape[-1]) and maker.pure(value.shape[-2])):
        raise NotIncremental(f"{node.name}: a triangle that is not of the sequence")
    below = node.target is aten.tril.default
    rows, columns = _index_pair(maker, modes)
    offset = maker.graph.call_function(aten.sub.Tensor, (columns, rows))
    compare = aten.le.Scalar if below else aten.ge.Scalar
    keep = maker.graph.call_function(compare, (offset, diagonal))
    x = maker.get(node.args[0], modes)
    other = maker.graph.call_function(aten.zeros_like.default, (x,))
    return maker.graph.call_function(aten.where.self, (keep, x, other))


@rule(aten.eye.default)
def eye(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    if len(node.args) > 1 or not maker.pure(value.shape[0]):
        raise NotIncremental(f"{node.name}: not the sequence's diagonal")
    rows, columns = _index_pair(maker, modes)
    same = maker.graph.call_function(aten.eq.Tensor, (rows, columns))
    return maker.graph.call_function(aten._to_copy.default, (same,), {"dtype": value.dtype})


def _index_pair(maker: Maker, modes: Modes) -> tuple[fx.Node, fx.Node]:
    both = []
    for at in (-2, -1):
        made = maker.positions
        if modes[at] == ALL:
            made = maker.graph.call_function(
                aten.arange.default, (maker.N(),), {"device": maker.device(maker.tokens)}
            )
        both.append(maker.graph.call_function(aten.unsqueeze.default, (made, 1 if at == -2 else 0)))
    return both[0], both[1]
