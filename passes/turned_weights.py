"""Weights that lie ``[in, out]``, for a native step.

GPT-2's Conv1D, or ``x @ W``: the weight of a ``linear`` is a transposed view, and its kernel reads
rows of ``[out, in]``. Nothing is repacked: such a linear is a stage of another kernel, which reads
matrices that lie either way (``kernels/cpp/batched.h``), and a block of them is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.base import dialect
from dspark_compile.passes.graph import argument, aten, emit, is_dialect_op

_BLOCKS = ("mlp", "gated_mlp")
Make = Callable[..., fx.Node]


def turned(weight: Any) -> bool:
    """Whether a weight's columns lie side by side, and its rows do not."""
    value = weight.meta["val"] if isinstance(weight, fx.Node) else None
    return (
        isinstance(value, Tensor) and value.dim() == 2
        and value.stride(0) == 1 and value.stride(1) != 1
    )  # fmt: skip


def of_turned(node: fx.Node) -> bool:
    """Whether a ``linear`` has a weight that lies ``[in, out]``."""
    return is_dialect_op(node, "linear") and turned(node.args[1])


def split_blocks(module: fx.GraphModule, fake_mode: Any) -> fx.GraphModule:
    """``module``, or a copy in which MLPs with such weights are linears, and what stands between
    them."""
    if not any(_is_block(n) for n in module.graph.nodes):
        return module
    graph = fx.Graph()
    val_map: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, val_map)
    (result,) = (n for n in module.graph.nodes if n.op == "output")
    graph.output(fx.node.map_arg(result.args[0], lambda n: val_map[n])).meta = dict(result.meta)
    for node in [n for n in graph.nodes if _is_block(n)]:
        with graph.inserting_before(node):

            def make(target: Any, *args: Any, like: fx.Node = node, **kwargs: Any) -> fx.Node:
                return emit(graph, target, args, kwargs, like=like, fake_mode=fake_mode)

            made = _block(make, node)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _is_block(node: fx.Node) -> bool:
    return is_dialect_op(node, *_BLOCKS) and any(turned(x) for x in node.args[1:])


def _linear(make: Make, x: Any, weight: Any, bias: Any) -> fx.Node:
    return make(dialect("linear"), *((x, weight) if bias is None else (x, weight, bias)))


def _block(make: Make, node: fx.Node) -> fx.Node:
    """The products of an MLP, and what stands between them."""
    x = node.args[0]
    if is_dialect_op(node, "mlp"):
        up, down, up_bias, down_bias, activation = node.args[1:6]
        wide = argument(node, 6, "compute_fp32", False)
        hidden = _cast(make, _linear(make, x, up, up_bias), wide)
        hidden = _activated(make, hidden, str(activation))
    else:
        gate, up, down, gate_bias, up_bias, down_bias, activation = node.args[1:8]
        wide = argument(node, 8, "compute_fp32", False)
        gated = _cast(make, _linear(make, x, gate, gate_bias), wide)
        other = _cast(make, _linear(make, x, up, up_bias), wide)
        hidden = make(aten.mul.Tensor, _activated(make, gated, str(activation)), other)
    if wide:
        hidden = make(aten._to_copy.default, hidden, dtype=x.meta["val"].dtype)  # type: ignore[union-attr]
    return _linear(make, hidden, down, down_bias)


def _cast(make: Make, x: fx.Node, wide: bool) -> fx.Node:
    return make(aten._to_copy.default, x, dtype=torch.float32) if wide else x


def _activated(make: Make, x: fx.Node, name: str) -> fx.Node:
    """`ops.mlp.ACTIVATIONS` as ATen ops."""
    if name == "identity":
        return x
    if name == "gelu_tanh":
        return make(aten.gelu.default, x, approximate="tanh")
    if name == "quick_gelu":
        scaled = make(aten.sigmoid.default, make(aten.mul.Tensor, x, 1.702))
        return make(aten.mul.Tensor, x, scaled)
    if name == "relu2":
        return make(aten.pow.Tensor_Scalar, make(aten.relu.default, x), 2)
    return make(getattr(aten, name).default, x)
