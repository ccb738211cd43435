"""Fuse dequantised weights into what reads them.

    linear(x, dequantize_weight(q, s, z), b)                  -> linear_int8, or linear_int4
    gated_mlp(x, …) over three such weights, or a merged one  -> gated_mlp_int8, or gated_mlp_int4
    mlp(x, …) over two                                        -> two linears around the activation

The int4 form is taken where a weight's subclass says that its numbers fit 4 bits and a kernel
takes the site: the graph gets a new input, the weight packed two numbers a byte
(`runtime/packed_int4.py`). Elsewhere int4 numbers stored in int8 are read as they lie.

Worth: a product of a few rows costs the reading of its weights, and 8 or 4 bits of each are read
in place of writing and reading 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile.codegen.registry import implementations
from dspark_compile.kernels import cpp
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    argument,
    aten,
    dialect_name,
    dtype,
    emit,
    is_dialect_op,
    is_tensor,
    shape,
    val,
)
from dspark_compile.passes.packed_weights import fits_4_bits, packed_fake, packed_input

# Which arguments are weights.
_WEIGHTS = {"linear": (1,), "gated_mlp": (1, 2, 3), "gated_mlp_merged": (1, 2), "mlp": (1, 2)}


class FuseDequantizeWeight(Pass):
    """See the module's docstring."""

    name = "fuse_dequantize_weight"
    kind = "linear"
    stage = "optimise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_dialect_op(node, *_WEIGHTS):
                continue
            name = dialect_name(node)
            weights = [node.args[i] for i in _WEIGHTS[name]]
            if any(is_dialect_op(w, "dequantize_weight") for w in weights):
                yield Match(node, [node], {"name": name, "weights": weights})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        if not all(is_dialect_op(w, "dequantize_weight") for w in match["weights"]):
            return Problem("only some of the block's weights are quantised", "quantise all of them")
        if any(dtype(w) != dtype(match.anchor.args[0]) for w in match["weights"]):
            return Problem("the weights are dequantised to another dtype than the input's")
        activation = match.anchor.args[5] if match["name"] == "mlp" else ""
        if match["name"] == "mlp" and activation not in _ACTIVATIONS:
            return Problem(f"the activation {activation} has no ATen op")
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, name = match.anchor, match["name"]
        weights = [list(w.args[:3]) for w in match["weights"]]
        graph.inserting_before(node)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        if name == "linear":
            new = self._linear(node, weights[0], node.args[0], argument(node, 2, "bias"), ctx)
            ctx.raised("linear", new)
        elif name == "mlp":
            x, _, _, up_bias, down_bias, activation, *wide = node.args
            hidden = self._linear(node, weights[0], x, up_bias, ctx)
            kind = dtype(hidden)
            if wide and wide[0] and kind != torch.float32:
                hidden = emit(graph, aten._to_copy.default, (hidden,), {"dtype": torch.float32},
                              like=node, fake_mode=ctx.fake_mode)  # fmt: skip
            for target, rest, named in _ACTIVATIONS[activation]:
                hidden = emit(graph, target, (hidden, *rest), named, like=node,
                              fake_mode=ctx.fake_mode)  # fmt: skip
            if dtype(hidden) != kind:
                hidden = emit(graph, aten._to_copy.default, (hidden,), {"dtype": kind},
                              like=node, fake_mode=ctx.fake_mode)  # fmt: skip
            new = self._linear(node, weights[1], hidden, down_bias, ctx)
        else:
            if name == "gated_mlp":
                x, _, _, _, gate_bias, up_bias, down_bias, *rest = node.args
            else:
                x, _, _, both, down_bias, *rest = node.args
                weights = [*_halves(weights[0], make), weights[1]]
                gate_bias, up_bias = (None, None) if both is None else _split(both, make)
            biases = (gate_bias, up_bias, down_bias)
            new = self._block(node, weights, x, (*biases, *rest), ctx)
        node.replace_all_uses_with(new)
        ctx.moved(node, new)

    def _linear(
        self, node: fx.Node, weight: list[Any], x: Any, bias: Any, ctx: PassContext
    ) -> fx.Node:
        def arguments(w: list[Any]) -> tuple[Any, ...]:
            return (x, *w, bias)

        return self._made(node, "linear", [weight], lambda ws: arguments(ws[0]), x, ctx)

    def _block(
        self, node: fx.Node, weights: list[list[Any]], x: Any, rest: Any, ctx: PassContext
    ) -> fx.Node:
        def arguments(ws: list[list[Any]]) -> tuple[Any, ...]:
            return (x, *([t for t in w if t is not None] for w in ws), *rest)

        return self._made(node, "gated_mlp", weights, arguments, x, ctx)

    def _made(
        self, node: fx.Node, name: str, weights: list[list[Any]], arguments: Any, x: Any, ctx: Any
    ) -> fx.Node:
        """The int4 op where a kernel takes it, else the int8 op."""
        bits = 8
        if all(fits_4_bits(w[0]) for w in weights):
            found = implementations(f"{name}_int4", ctx.options.kernels, val(x).device)
            if any(item.name == "cpp" for item in found):
                fakes = [[packed_fake(w[0], ctx), *w[1:]] for w in weights]
                values = fx.node.map_arg(arguments(fakes), val)
                if cpp.supports(f"{name}_int4", *values) is None:
                    bits = 4
                    weights = [[packed_input(w[0], ctx), *w[1:]] for w in weights]
        op = dialect(f"{name}_int{bits}")
        with node.graph.inserting_before(node):
            return emit(node.graph, op, arguments(weights), like=node, fake_mode=ctx.fake_mode)


def _split(tensor: fx.Node, make: Any) -> list[fx.Node]:
    """The upper and the lower half of a tensor's rows: views."""
    size = shape(tensor)[0]
    half = size // 2
    return [make(aten.slice.Tensor, tensor, 0, a, b) for a, b in ((0, half), (half, size))]


def _halves(weight: list[Any], make: Any) -> list[list[Any]]:
    parts = [_split(t, make) if is_tensor(t) else [None, None] for t in weight]
    return [[p[i] for p in parts] for i in (0, 1)]


# Each activation as ATen calls: the op, what follows its input, keywords.
_ACTIVATIONS: dict[str, tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]] = {
    "silu": ((aten.silu.default, (), {}),),
    "gelu": ((aten.gelu.default, (), {}),),
    "gelu_tanh": ((aten.gelu.default, (), {"approximate": "tanh"}),),
    "relu": ((aten.relu.default, (), {}),),
    "relu2": ((aten.relu.default, (), {}), (aten.pow.Tensor_Scalar, (2,), {})),
    "sigmoid": ((aten.sigmoid.default, (), {}),),
    "tanh": ((aten.tanh.default, (), {}),),
}
