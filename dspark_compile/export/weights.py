"""Products: weights are transposed, stacked or packed once, at export.

linear(x, W [N, K])     MatMul(x, W^T) (+ bias); Gemm's transposition where W is shared
gated_mlp               two products, the activation, a product
*_int8, *_int4          MatMulNBits (contrib), or a product with DequantizeLinear's result
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import aten, is_dialect_op

from .ops import op
from .program import Program


class Products:
    """Lowers linears and feed-forward blocks of a program."""

    def __init__(self, program: Program, contrib: bool) -> None:
        self.program, self.contrib = program, contrib
        self.transposed: dict[fx.Node, fx.Node] = {}
        self.packed: dict[tuple[fx.Node, fx.Node], list[Any]] = {}

    def run(self) -> None:
        """Lower every site."""
        if self.contrib:
            self.merge()
        for node in list(self.program.graph.nodes):
            if is_dialect_op(node, "linear"):
                self.program.replace(node, self.linear(node, *_args(node, 3)))
            elif is_dialect_op(node, "matmul"):
                node.target = aten.matmul.default
            elif is_dialect_op(node, "gated_mlp"):
                self._gated(node)
            elif is_dialect_op(node, "gated_mlp_merged"):
                self._gated_merged(node)
            elif is_dialect_op(node, "mlp"):
                self._mlp(node)

    def linear(self, like: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        """``x @ weight^T + bias`` before ``like``."""
        program = self.program
        y = self._quantized(like, x, weight) if is_dialect_op(weight, "dequantize_weight") else None
        if y is None:
            y = program.emit(like, aten.matmul.default, (x, self._transpose(like, weight)))
        return y if bias is None else program.emit(like, aten.add.Tensor, (y, bias))

    def _quantized(self, like: fx.Node, x: fx.Node, weight: fx.Node) -> fx.Node | None:
        """A product with an integer weight; None if it is no constant or no op takes its groups."""
        program = self.program
        numbers, scale, zero, dtype = _args(weight, 4)
        q, scales = program.evaluate(numbers), program.evaluate(scale)
        zeros = None if zero is None else program.evaluate(zero)
        if q is None or scales is None or (zero is not None and zeros is None):
            return None
        rows, columns = q.shape
        found = groups_of(q, scales, zeros)
        if found is None:
            program.fallbacks.append(
                (
                    f"dspark::dequantize_weight at {weight.name}",
                    f"{scales.numel() // rows} groups in {columns} columns are no blocks of 16 or "
                    "more, a power of two: dequantised in the graph",
                )
            )
            return None
        block, scales, zeros = found
        name = program.names.get(numbers, weight.name).removesuffix(".weight")
        key = (numbers, scale)
        if key not in self.packed:
            made: tuple[Any, ...]
            if self.contrib:
                made = pack_nbits(q, scales.to(dtype), zeros, block)
            else:
                made = (q, scales.to(dtype), None if zeros is None else zeros.to(torch.int8))
            parts = ("quantized", "scales", "zero_points")
            self.packed[key] = [
                None if t is None else program.constant(f"{name}.{part}", t.contiguous())
                for part, t in zip(parts, made[:3], strict=True)
            ] + [made[-1] if self.contrib else 8]
        data, scale_node, zero_node, bits = self.packed[key]
        if self.contrib:
            call = (x, data, scale_node, zero_node, columns, rows, bits, block)
            return program.emit(like, op("matmul_nbits"), call)
        wide = program.emit(like, op("dequantize"), (data, scale_node, block, zero_node))
        turned = program.emit(like, aten.permute.default, (wide, [1, 0]))
        return program.emit(like, aten.matmul.default, (x, turned))

    def _transpose(self, like: fx.Node, weight: fx.Node) -> fx.Node:
        """``weight^T``: a new constant, or, where others read the weight as it is (a tied
        embedding), a transposition that the runtime folds, so that the file holds it once."""
        program = self.program
        value = program.value(weight)
        shared = any(not _is_product(user) for user in weight.users)
        if value is None or shared:
            return program.emit(like, aten.permute.default, (weight, [1, 0]))
        if weight not in self.transposed:
            name = program.names[weight] + "_transposed"
            self.transposed[weight] = program.constant(name, value.t().contiguous())
        return self.transposed[weight]

    def activation(self, like: fx.Node, name: str, x: fx.Node) -> fx.Node:
        """One of the dialect's activations."""
        emit = self.program.emit
        if name == "identity":
            return x
        if name == "silu":
            if self.contrib:
                return emit(like, op("silu"), (x,))
            return emit(like, aten.mul.Tensor, (x, emit(like, aten.sigmoid.default, (x,))))
        if name == "quick_gelu":
            inner = emit(like, aten.mul.Tensor, (x, 1.702))
            return emit(like, aten.mul.Tensor, (x, emit(like, aten.sigmoid.default, (inner,))))
        if name == "gelu":
            return emit(like, aten.gelu.default, (x,))
        if name == "gelu_tanh":
            return emit(like, aten.gelu.default, (x,), approximate="tanh")
        if name == "relu2":
            y = emit(like, aten.relu.default, (x,))
            return emit(like, aten.mul.Tensor, (y, y))
        simple: dict[str, Callable[..., Any]] = {
            "relu": aten.relu.default,
            "sigmoid": aten.sigmoid.default,
            "tanh": aten.tanh.default,
        }
        return emit(like, simple[name], (x,))

    def _wide(self, like: fx.Node, x: fx.Node, wide: bool) -> fx.Node:
        if not wide or x.meta["val"].dtype == torch.float32:
            return x
        return self.program.emit(like, aten._to_copy.default, (x,), dtype=torch.float32)

    def _narrow(self, like: fx.Node, y: fx.Node, dtype: torch.dtype) -> fx.Node:
        if y.meta["val"].dtype == dtype:
            return y
        return self.program.emit(like, aten._to_copy.default, (y,), dtype=dtype)

    def _gated(self, node: fx.Node) -> None:
        x, gate, up, down, gate_bias, up_bias, down_bias, name, wide = _args(node, 9)
        both = self._stacked([gate, up], [gate_bias, up_bias]) if self.contrib else None
        if both is not None:
            y = self._wide(node, self.linear(node, x, *both), bool(wide))
            self._halves(node, y, down, down_bias, name, x.meta["val"].dtype)
            return
        g = self._wide(node, self.linear(node, x, gate, gate_bias), bool(wide))
        u = self._wide(node, self.linear(node, x, up, up_bias), bool(wide))
        self._finish(node, g, u, down, down_bias, name, x.meta["val"].dtype)

    def _gated_merged(self, node: fx.Node) -> None:
        x, both, down, both_bias, down_bias, name, wide = _args(node, 7)
        y = self._wide(node, self.linear(node, x, both, both_bias), bool(wide))
        self._halves(node, y, down, down_bias, name, x.meta["val"].dtype)

    def _halves(
        self,
        node: fx.Node,
        y: fx.Node,
        down: fx.Node,
        bias: fx.Node | None,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        """What follows gate and up side by side."""
        inner = y.meta["val"].shape[-1] // 2
        parts = self.program.emit(node, aten.split_with_sizes.default, (y, [inner, inner], -1))
        g, u = (_item(self.program, node, parts, i) for i in range(2))
        self._finish(node, g, u, down, bias, name, dtype)

    def _stacked(
        self, weights: list[fx.Node], biases: list[fx.Node | None]
    ) -> tuple[fx.Node, fx.Node | None] | None:
        """Weights on top of each other, as one constant, and their biases; None where one is no
        plain constant of its own."""
        program = self.program
        values = [program.value(w) for w in weights]
        offsets = [program.value(b) for b in biases]
        if any(v is None for v in values) or any(len(w.users) > 1 for w in weights):
            return None
        if any(b is not None for b in biases) and any(v is None for v in offsets):
            return None
        name = program.names[weights[0]].removesuffix(".weight") + "_stacked"
        weight = program.constant(f"{name}.weight", torch.cat(values))  # type: ignore[arg-type]
        if biases[0] is None:
            return weight, None
        return weight, program.constant(f"{name}.bias", torch.cat(offsets))  # type: ignore[arg-type]

    def merge(self) -> None:
        """Linears of one input become one product, and a split."""
        program = self.program
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if is_dialect_op(node, "linear"):
                groups.setdefault(node.args[0], []).append(node)
        for x, nodes in groups.items():
            if len(nodes) < 2:
                continue
            calls = [_args(n, 3) for n in nodes]
            if len({c[1] for c in calls}) != len(calls):
                continue
            made = self._stacked([c[1] for c in calls], [c[2] for c in calls])
            if made is None:
                continue
            first = nodes[0]
            y = program.emit(first, torch.ops.dspark.linear.default, (x, *made))
            sizes = [int(n.meta["val"].shape[-1]) for n in nodes]
            parts = program.emit(first, aten.split_with_sizes.default, (y, sizes, -1))
            # All items stand before the first linear, which the first replacement erases.
            items = [_item(program, first, parts, i) for i in range(len(nodes))]
            for node, item in zip(nodes, items, strict=True):
                program.replace(node, item)

    def _finish(
        self,
        node: fx.Node,
        gate: fx.Node,
        up: fx.Node,
        down: fx.Node,
        bias: fx.Node | None,
        name: str,
        dtype: torch.dtype,
    ) -> None:
        hidden = self.program.emit(node, aten.mul.Tensor, (self.activation(node, name, gate), up))
        y = self.linear(node, self._narrow(node, hidden, dtype), down, bias)
        self.program.replace(node, y)

    def _mlp(self, node: fx.Node) -> None:
        x, up, down, up_bias, down_bias, name, wide = _args(node, 7)
        hidden = self._wide(node, self.linear(node, x, up, up_bias), bool(wide))
        hidden = self.activation(node, name, hidden)
        hidden = self._narrow(node, hidden, x.meta["val"].dtype)
        self.program.replace(node, self.linear(node, hidden, down, down_bias))


def _is_product(node: fx.Node) -> bool:
    return is_dialect_op(node, "linear", "gated_mlp", "gated_mlp_merged", "mlp") or (
        node.target is aten.matmul.default
    )


def _item(program: Program, like: fx.Node, node: fx.Node, index: int) -> fx.Node:
    import operator

    with program.graph.inserting_before(like):
        item = program.graph.call_function(operator.getitem, (node, index))
    item.meta = {k: v for k, v in node.meta.items() if k != "val"}
    item.meta["val"] = node.meta["val"][index]
    return item


def _args(node: fx.Node, count: int) -> list[Any]:
    """The arguments of a dialect call, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    made = []
    for i, argument in enumerate(schema[:count]):
        if i < len(node.args):
            made.append(node.args[i])
        else:
            default = argument.default_value if argument.has_default_value() else None
            made.append(node.kwargs.get(argument.name, default))
    return made


def groups_of(
    q: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[int, Tensor, Tensor | None] | None:
    """``(block, scales [N, K / block], zeros or None)`` of a weight ``q [N, K]`` with one scale for
    each row or group: blocks of 16 to 256 columns, a power of two; None if there are none such."""
    rows, columns = q.shape
    scales = scale.reshape(rows, -1)
    zeros = None if zero is None else zero.reshape(rows, -1)
    groups = scales.shape[1]
    if columns % groups:
        return None
    size = columns // groups
    block = next((b for b in (256, 128, 64, 32, 16) if size % b == 0), 0)
    if not block:
        return None
    scales = scales.repeat_interleave(size // block, 1)
    zeros = None if zeros is None else zeros.repeat_interleave(size // block, 1)
    return block, scales, zeros


def pack_nbits(
    q: Tensor, scales: Tensor, zeros: Tensor | None, block: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """``(data, scales, zero points, bits)`` as MatMulNBits takes them, with 4 bits where the
    numbers and zero points fit: unsigned, two to a byte, the first in the low half."""
    rows, columns = q.shape
    every = [q, *([] if zeros is None else [zeros])]
    small = all(int(t.min()) >= -8 and int(t.max()) <= 7 for t in every)
    bits, shift = (4, 8) if small else (8, 128)

    def pack(values: Tensor) -> Tensor:
        unsigned = (values.to(torch.int16) + shift).to(torch.uint8)
        if bits == 8:
            return unsigned
        if unsigned.shape[-1] % 2:
            unsigned = torch.nn.functional.pad(unsigned, (0, 1))
        return unsigned[..., 0::2] | unsigned[..., 1::2] << 4

    data = pack(q.reshape(rows, columns // block, block))
    return data, scales, None if zeros is None else pack(zeros), bits
