"""Rules of `dspark_compile.passes.incremental` for ATen ops that compute."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.causal import SIZES, Bounds
from dspark_compile.passes.graph import aten
from dspark_compile.passes.incremental_core import (
    ALL,
    NEW,
    Maker,
    Modes,
    NotIncremental,
    Rows,
    rule,
    rule_of,
)
from dspark_compile.passes.incremental_dialect import rowwise
from dspark_compile.passes.incremental_weights import along_keys, over_keys

# op -> which argument names a dimension that the op works along
ALONG = {
    aten._softmax.default: 1, aten.softmax.int: 1, aten._log_softmax.default: 1,
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.argmax.default: 1, aten.topk.default: 2, aten.sort.default: 1, aten.argsort.default: 1,
    aten.cumsum.default: 1, aten.cumprod.default: 1, aten.gather.default: 1,
    aten.scatter.src: 1, aten.scatter.value: 1, aten.any.dim: 1, aten.var_mean.correction: 1,
    aten.var.correction: 1, aten.std.correction: 1, aten.linalg_vector_norm.default: 2,
    aten.logsumexp.default: 1, aten.max.dim: 1,
    aten.flip.default: 1,
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
        return along_keys(maker, node, modes, dims)
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


@rule(aten.glu.default)
def glu(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    dim = (node.args[1] if len(node.args) > 1 else -1) % value.dim()  # type: ignore[operator]
    if modes[dim] is not None:
        raise NotIncremental(f"{node.name}: {node.target} works along the sequence")
    x, half, call = maker.get(node.args[0], modes), int(value.shape[dim]), maker.graph.call_function
    a, b = (call(aten.slice.Tensor, (x, dim, at, at + half)) for at in (0, half))
    return call(aten.mul.Tensor, (a, call(aten.sigmoid.default, (b,))))


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
    elif target is aten.native_batch_norm.default and index == 0:
        return _batch_norm(maker, source, modes, value)
    elif rule_of(source) in (along, rowwise):
        if key not in maker.made:
            maker.made[key] = rule_of(source)(maker, source, modes, value)  # type: ignore[index,misc]
    else:
        raise NotIncremental(f"{source.name}: {target} has several results")
    return maker.graph.call_function(operator.getitem, (maker.made[key], index))  # type: ignore[index]


def _batch_norm(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """A norm by statistics that the module holds: each channel times a number, plus another."""
    x, weight, bias, mean, variance, training, _, eps = node.args
    if training or mean is None or variance is None or modes[1] is not None:
        raise NotIncremental(f"{node.name}: a norm by statistics of the sequence")
    call = maker.graph.call_function
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32

    def channels(given: Any) -> fx.Node:
        made = call(aten._to_copy.default, (maker.get(given),), {"dtype": wide})
        return call(aten.reshape.default, (made, [-1, *[1] * (value.dim() - 2)]))

    made = call(aten._to_copy.default, (maker.get(x, modes),), {"dtype": wide})
    made = call(aten.sub.Tensor, (made, channels(mean)))
    scale = call(aten.rsqrt.default, (call(aten.add.Tensor, (channels(variance), eps)),))
    if weight is not None:
        scale = call(aten.mul.Tensor, (scale, channels(weight)))
    made = call(aten.mul.Tensor, (made, scale))
    if bias is not None:
        made = call(aten.add.Tensor, (made, channels(bias)))
    return call(aten._to_copy.default, (made,), {"dtype": value.dtype})


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, "matmul")
def matmul(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    a, b = left.meta["val"], right.meta["val"]
    if maker.carries(a.shape[-1]):
        return over_keys(maker, node, modes)
    if a.dim() < 2 or b.dim() < 2:
        raise NotIncremental(f"{node.name}: a product with a vector")
    batch = modes[:-2]
    both = [
        maker.operand(x, (*batch, modes[-2], None) if x is left else (*batch, None, modes[-1]))
        for x in (left, right)
    ]
    return maker.emit(node, (*both, *node.args[2:]))


@rule(aten.mv.default)
def matrix_vector(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    left, right = node.args
    if maker.carries(left.meta["val"].shape[1]):  # type: ignore[union-attr]
        raise NotIncremental(f"{node.name}: it sums over the sequence")
    return maker.emit(node, (maker.get(left, (*modes, None)), maker.get(right)))


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
    return x if maker.every else maker.graph.call_function(aten.slice.Tensor, (x, dim, -1))


def _earlier_rows(
    maker: Maker, node: fx.Node, source: Any, dim: int, at: Any, modes: Modes
) -> fx.Node | None:
    """Rows of the sequence that numbers name which do not depend on tokens, each of them that of
    its own token or of one before it, as is seen at two lengths; None: it is not that."""
    shape = source.meta["val"].shape
    others = [m for d, m in enumerate(modes) if d != dim]
    if not (isinstance(at, fx.Node) and maker.dependent[source] and maker.pure(shape[dim])):
        return None
    if maker.dependent[at] or at.meta["val"].dim() != 1 or not maker.pure(at.meta["val"].shape[0]):
        return None
    mode = modes[dim]
    if any(m is not None for m in others) or not isinstance(mode, Rows):
        return None
    for size in SIZES:
        rows = Bounds(maker.symbol, size, maker.values, maker.tokens).concrete(at)
        if rows is None or rows.dtype == torch.bool:
            return None
        if bool((rows < 0).any() or (rows > torch.arange(size, device=rows.device)).any()):
            raise NotIncremental(f"{node.name}: it picks rows of later tokens, or from the end")
    return maker.kept_rows(source, dim, maker.get(at, (mode,)), maker.count(mode))


@rule(aten.index.Tensor)
def index(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    source, indices = node.args
    if any(maker.carries(n) for n in source.meta["val"].shape):  # type: ignore[union-attr]
        made = _last_row(maker, node, modes)
        given = [(d, i) for d, i in enumerate(indices) if i is not None]  # type: ignore[arg-type, union-attr]
        if made is None and len(given) == 1:
            made = _earlier_rows(maker, node, source, *given[0], modes)
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
        made = _earlier_rows(maker, node, source, dim, index, modes)
        if made is None:
            raise NotIncremental(f"{node.name}: it picks rows of the sequence")
        return made
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
    if start is None or step != 1 or maker.more(value.shape[0]) is None:
        raise NotIncremental(f"{node.name}: a range that is not the positions")
    keep = {k: v for k, v in node.kwargs.items() if k in ("device", "dtype")}
    if isinstance(modes[0], Rows):
        made = maker.at(modes[0])
        if value.dtype != torch.int64:
            made = maker.graph.call_function(aten._to_copy.default, (made,), {"dtype": value.dtype})
    else:
        size = maker.size(value.shape[0], ALL)
        made = maker.graph.call_function(aten.arange.default, (size,), keep)
    return maker.graph.call_function(aten.add.Tensor, (made, start)) if start else made


@rule(*FILLS)
def fill(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    sizes = [maker.size(n, modes[d]) for d, n in enumerate(value.shape)]
    return maker.emit(node, (sizes, *node.args[1:]))


@rule(aten.tril.default, aten.triu.default)
def triangle(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """``tril``, ``triu``: by comparing positions."""
    diagonal = node.args[1] if len(node.args) > 1 else 0
    if not (maker.more(value.shape[-1]) is not None and maker.pure(value.shape[-2])):
        raise NotIncremental(f"{node.name}: a triangle that is not of the sequence")
    below = node.target is aten.tril.default
    rows, columns = _index_pair(maker, modes, value)
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
    rows, columns = _index_pair(maker, modes, value)
    same = maker.graph.call_function(aten.eq.Tensor, (rows, columns))
    return maker.graph.call_function(aten._to_copy.default, (same,), {"dtype": value.dtype})


def _index_pair(maker: Maker, modes: Modes, value: Tensor) -> tuple[fx.Node, fx.Node]:
    both = []
    for at in (-2, -1):
        mode = modes[at]
        if isinstance(mode, Rows):
            made = maker.at(mode)
        else:
            made = maker.graph.call_function(
                aten.arange.default, (maker.size(value.shape[at], ALL),),
                {"device": maker.device(maker.tokens)},
            )  # fmt: skip
        both.append(maker.graph.call_function(aten.unsqueeze.default, (made, 1 if at == -2 else 0)))
    return both[0], both[1]
