"""Rules of `dspark_compile.passes.incremental` for dialect ops."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, fx

from dspark_compile.passes.causal import proves_causal, shifted
from dspark_compile.passes.graph import aten
from dspark_compile.passes.incremental_core import (
    ALL,
    NEW,
    InFront,
    Maker,
    Modes,
    NotIncremental,
    Rows,
    rule,
)

# Dialect ops that treat leading dimensions alike; the last one is theirs.
ROWWISE = (
    "linear", "merged_linear", "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "mlp",
    "gated_mlp", "gated_mlp_merged", "linear_int8", "linear_int4", "gated_mlp_int8",
    "gated_mlp_int4", "moe_router", "moe_experts", "moe_experts_int8", "moe_experts_int4",
)  # fmt: skip


@rule("greedy_token")
def greedy_token(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    return maker.emit(node, (maker.get(node.args[0], (*modes, None)),))


@rule(*ROWWISE)
def rowwise(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    """Leading dimensions are rows, of the result and of every operand that has rows."""

    def convert(x: fx.Node) -> Any:
        tensor = x.meta["val"]
        if not isinstance(tensor, Tensor):
            raise NotIncremental(f"{x.name} is a number that an op reads")
        carrying = [d for d, n in enumerate(tensor.shape) if maker.carries(n)]
        if not carrying:
            if maker.dependent[x] and any(modes):
                raise NotIncremental(f"{node.name}: its rows cannot be followed")
            return maker.get(x)
        if carrying == [tensor.dim() - 1]:
            raise NotIncremental(f"{node.name}: it works along the sequence")
        mode = next((m for m in modes if m is not None), None)
        if mode is None or len(carrying) > 1:
            raise NotIncremental(f"{node.name}: its rows cannot be followed")
        return maker.get(x, maker.default(x, mode))

    kwargs = fx.node.map_arg(node.kwargs, convert)
    return maker.emit(node, fx.node.map_arg(node.args, convert), kwargs)


@rule("rope")
def rope(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    x, cos, sin, *rest = node.args
    # Tables broadcast to [..., S, rotated]: their last dimension is never the sequence.
    aligned = (*modes[:-1], None)
    return maker.emit(
        node,
        (maker.get(x, modes), maker.operand(cos, aligned), maker.operand(sin, aligned), *rest),
    )


@rule("attention")
def attention(maker: Maker, node: fx.Node, modes: Modes, value: Tensor) -> fx.Node:
    query, key, values, bias, sinks, tensors, ints = node.args
    front = maker.more(value.shape[2]) or 0
    if front and maker.fronted and modes[2] != Rows(front):
        return maker._cached(node, modes, value)
    if front and maker.fronted is False:
        raise InFront(f"{node.name}: rows in front of the first token attend, too")
    if modes != (None, None, Rows(front), None) or (front and not maker.fronted):
        raise NotIncremental(f"{node.name}: its result is wanted in another form")
    if all(_fixed(maker, x) for x in (key, values)):
        return _over_memory(maker, node)
    # Keys of a learned prefix stand in front of the tokens'.
    behind = maker.more(key.meta["val"].shape[2])  # type: ignore[union-attr]
    for x, more in ((query, front), (key, behind), (values, behind)):
        shape = x.meta["val"].shape  # type: ignore[union-attr]
        if more is None or more < front or maker.more(shape[2]) != more:
            raise NotIncremental(f"{node.name}: {x.name} has no row for each token")  # type: ignore[union-attr]
        if any(maker.carries(shape[d]) for d in (0, 1, 3)):
            raise NotIncremental(f"{node.name}: {x.name} carries the sequence twice")  # type: ignore[union-attr]
    assert behind is not None
    ahead = behind - front
    why = proves_causal(node, maker.symbol, maker.values, maker.tokens, ahead)
    if why is not None:
        raise NotIncremental(f"{node.name} is not causal: {why}")
    k = maker.get(key, (None, None, ALL, None))
    v = maker.get(values, (None, None, ALL, None))
    if bias is None and all(_fixed(maker, t) for t in tensors):  # type: ignore[union-attr]
        k, v = maker.uncut(k), maker.uncut(v)
    q = maker.get(query, modes)
    if bias is not None:
        rank = bias.meta["val"].dim()  # type: ignore[union-attr]
        bias = maker.operand(bias, (None, None, modes[2], ALL)[-rank:])
    sinks = None if sinks is None else maker.get(sinks)
    tensors = [_mask_table(maker, t, node) for t in tensors]  # type: ignore[union-attr]
    for number in ints:  # type: ignore[union-attr]
        if maker.number(number) is None:
            raise NotIncremental(f"{node.name}: its mask reads the length")
    ints = [maker.number(n) for n in ints]  # type: ignore[union-attr]
    kwargs = dict(node.kwargs)
    mask = str(kwargs.get("mask", ""))
    name = f"t{len(tensors)}"
    moved = shifted(mask, name)
    # Rows of the caches that no token has been written to are never allowed.
    causal = f"k <= q + {name} + {ahead}" if ahead else f"k <= q + {name}"
    kwargs["mask"] = moved if moved == causal else f"({moved}) & ({causal})" if moved else causal
    first = maker.position
    if front:
        first = maker.graph.call_function(aten.add.Tensor, (first, front))
    return maker.emit(node, (q, k, v, bias, sinks, [*tensors, first], ints), kwargs)


def _fixed(maker: Maker, x: Any) -> bool:
    """Whether ``x`` is the same whatever the tokens are, and however many."""
    return not maker.dependent[x] and not any(maker.carries(n) for n in x.meta["val"].shape)


def _over_memory(maker: Maker, node: fx.Node) -> fx.Node:
    """Attention over what is not of the sequence (an encoder's result, a memory): a row for each
    query, whatever the others are."""
    query, key, values, bias, sinks, tensors, ints = node.args
    shape = query.meta["val"].shape  # type: ignore[union-attr]
    if not maker.pure(shape[2]) or any(maker.carries(shape[d]) for d in (0, 1, 3)):
        raise NotIncremental(f"{node.name}: {query.name} has no row for each token")  # type: ignore[union-attr]
    mask = str(node.kwargs.get("mask", ""))
    numbers = [maker.number(n) for n in ints]  # type: ignore[union-attr]
    fixed = None not in numbers and all(_fixed(maker, t) for t in tensors)  # type: ignore[union-attr]
    if re.search(r"\bq\b", mask) or not fixed:
        raise NotIncremental(f"{node.name}: which keys it may see depends on the token: {mask!r}")
    modes: Modes = (None, None, NEW, None)
    if bias is not None:
        bias = maker.operand(bias, modes[-bias.meta["val"].dim() :])  # type: ignore[union-attr]
    return maker.emit(
        node,
        (
            maker.get(query, modes), maker.get(key), maker.get(values), bias,
            None if sinks is None else maker.get(sinks),
            [maker.get(t) for t in tensors], numbers,  # type: ignore[union-attr]
        ),
    )  # fmt: skip


def _mask_table(maker: Maker, x: Any, node: fx.Node) -> Any:
    if any(maker.carries(n) for n in x.meta["val"].shape):
        if maker.dependent[x]:
            raise NotIncremental(f"{node.name}: its mask reads {x.name}, which depends on tokens")
        return maker.get(x, maker.default(x, ALL))
    return maker.get(x)
