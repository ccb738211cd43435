"""The weights of experts that are MLPs of their own, as ``moe_experts`` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from dspark_compile.passes.graph import aten, is_dialect_op, is_op, shape

Stack = list[Any]


def weights_of(mlp: fx.Node) -> list[Any]:
    """The matrices of a dialect MLP; gate and up may be one."""
    return list(mlp.args[1:4] if is_dialect_op(mlp, "gated_mlp") else mlp.args[1:3])


def biases_of(mlp: fx.Node) -> list[Any]:
    """Their biases, or None for each that has none."""
    return list(mlp.args[4:7] if is_dialect_op(mlp, "gated_mlp") else mlp.args[3:5])


def activation_of(mlp: fx.Node) -> str:
    """One of `ops.mlp.ACTIVATIONS`."""
    return mlp.args[7 if is_dialect_op(mlp, "gated_mlp") else 5]  # type: ignore[return-value]


def differ(a: fx.Node, b: fx.Node) -> str | None:
    """What keeps two MLPs from being experts of one op; None: nothing."""
    if a.target is not b.target or activation_of(a) != activation_of(b):
        return "the experts compute different activations"
    if [x is None for x in biases_of(a)] != [x is None for x in biases_of(b)]:
        return "some experts have a bias and some have none"
    if [shape(w) for w in weights_of(a)] != [shape(w) for w in weights_of(b)]:
        return "the experts differ in size"
    return None


def stacks_of(mlps: Sequence[Any], make: Callable[..., fx.Node]) -> tuple[Stack, ...]:
    """``(gate, up, down, gate_bias, up_bias, down_bias)``: of each a list of the experts' own, or
    of one stack that they are slices of. Nodes that are needed are made by ``make``."""

    def half(x: Any, which: int) -> Any:
        if x is None:
            return None
        size = shape(x)[0] // 2
        return make(aten.slice.Tensor, x, 0, which * size, (which + 1) * size)

    first = mlps[0]
    stacks: tuple[Stack, ...] = ([], [], [], [], [], [])
    merged = is_dialect_op(first, "gated_mlp_merged")
    both = stacked([weights_of(mlp)[0] for mlp in mlps], make) if merged else None
    if both is not None:
        size = shape(both)[1] // 2
        stacks[0].append(make(aten.slice.Tensor, both, 1, 0, size))
        stacks[1].append(make(aten.slice.Tensor, both, 1, size, 2 * size))
    for mlp in mlps:
        weights, bias = weights_of(mlp), biases_of(mlp)
        if merged:
            table = weights[0] if both is None else None  # else both are there
            weights = [half(table, 0), half(table, 1), weights[1]]
            bias = [half(bias[0], 0), half(bias[0], 1), bias[1]]
        elif is_dialect_op(mlp, "mlp"):
            weights, bias = [None, *weights], [None, *bias]
        for stack, item in zip(stacks, (*weights, *bias), strict=True):
            stack += [] if item is None else [item]
    for stack in stacks[:3]:
        whole = stacked(stack, make)
        stack[:] = stack if whole is None else [whole]
    return stacks


def stacked(items: list[Any], make: Callable[..., fx.Node]) -> fx.Node | None:
    """The stack ``[E, …]`` whose slices ``items`` are, in order, or views of the slices that are
    alike; None: they are no such thing."""
    if len(items) < 2:
        return None
    first: Any = items[0]
    if not is_op(first, aten.select.int, aten.slice.Tensor, aten.permute.default):
        return None
    if any(not is_op(x, first.target) or x.kwargs for x in items):
        return None
    if is_op(first, aten.select.int) and all(
        x.args[0] is first.args[0] and x.args[1:] == (0, n) for n, x in enumerate(items)
    ):
        stack = first.args[0]
        whole = shape(stack)[0] == len(items)
        return stack if whole else make(aten.slice.Tensor, stack, 0, 0, len(items))
    if any(x.args[1:] != first.args[1:] for x in items):
        return None
    inner = stacked([x.args[0] for x in items], make)
    if inner is None:
        return None
    if is_op(first, aten.permute.default):
        return make(first.target, inner, [0, *(d + 1 for d in first.args[1])])
    return make(first.target, inner, first.args[1] + 1, *first.args[2:])
