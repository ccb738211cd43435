"""Mixtures of experts.

The router is plain arithmetic over E numbers a token and is decomposed. What it chose is made
dense, ``share [T, E]``, zero where an expert was not chosen, and then

    contrib     com.microsoft::MoE over ``log(share)``: its softmax over the k largest gives back
                ``share / sum(share)``, whatever the router was; the sum is multiplied in after
                it. Its form is SwiGLU with rows of gate and up interleaved.
    contrib, 8 or 4 bits
                com.microsoft::QMoE, which takes ``share`` itself beside what to choose by.
    otherwise   every expert on every token, as products over a stack of experts, weighed by
                ``share``: E / k times the arithmetic, in standard ops and bounded memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from dspark_compile.ops.moe import PLAIN_LIMITS
from dspark_compile.passes.graph import aten, is_dialect_op

from .ops import op
from .program import Program
from .qmoe import interleaved, packed, stacked
from .weights import _args

_NOT_CHOSEN = -1e30


class Experts:
    """Lowers the experts of a program."""

    def __init__(self, program: Program, contrib: bool) -> None:
        self.program, self.contrib = program, contrib

    def run(self) -> None:
        """Lower every site."""
        for node in list(self.program.graph.nodes):
            if is_dialect_op(node, "moe_experts"):
                self._lower(node)

    def _lower(self, node: fx.Node) -> None:
        program = self.program
        names = [a.name for a in node.target._schema.arguments][:14]  # type: ignore[union-attr]
        call = dict(zip(names, _args(node, len(names)), strict=True))
        y = self._quantised(node, call) if self.contrib else None
        if y is not None:
            program.replace(node, y)
            return
        stacks = {
            name: self._stack(call[name])
            for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        }
        if any(isinstance(s, str) for s in stacks.values()):
            program.fallbacks.append(
                (f"dspark::moe_experts at {node.name}", "its weights are computed: not exported")
            )
            return
        share = self._share(node, call, stacks["down"].shape[0])  # type: ignore[union-attr]
        reason = self._refusal(call)
        if reason is None:
            y = self._fused(node, call, stacks, share)
        else:
            program.fallbacks.append((f"dspark::moe_experts at {node.name}", reason))
            y = self._dense(node, call, stacks, share)
        program.replace(node, y)

    def _stack(self, nodes: list[fx.Node]) -> Any:
        """One tensor for a list of weights, None for an empty list, text if it is not known."""
        if not nodes:
            return None
        found = [self.program.evaluate(n) for n in nodes]
        if any(t is None for t in found):
            return "computed"
        first = found[0]
        assert first is not None
        stacked = (
            len(found) == 1
            and first.dim() == nodes[0].meta["val"].dim()
            and (first.dim() == 3 or (first.dim() == 2 and len(found) == 1))
        )
        return first if stacked else torch.stack(found)  # type: ignore[arg-type]

    def _share(self, node: fx.Node, call: dict[str, Any], count: int) -> fx.Node:
        """``[..., E]`` float32: the weight of each expert for each token."""
        emit = self.program.emit
        numbers = self.program.constant(f"experts_{count}", torch.arange(count))
        index = emit(node, aten.unsqueeze.default, (call["indices"], -1))
        chosen = emit(node, aten.eq.Tensor, (index, numbers))
        weights = self._cast(node, call["weights"], torch.float32)
        weights = emit(node, aten.unsqueeze.default, (weights, -1))
        zero = self.program.scalar(0.0, torch.float32)
        return emit(
            node, aten.sum.dim_IntList, (emit(node, aten.where.self, (chosen, weights, zero)), [-2])
        )

    def _refusal(self, call: dict[str, Any]) -> str | None:
        """Why MoE does not do what these experts do, None if it does."""
        if not self.contrib:
            return "standard ONNX has no experts: every expert on every token"
        if not call["gate"] or call["activation"] != "silu":
            return f"MoE is SwiGLU, these are {call['activation']}: every expert on every token"
        if call["weigh_input"] or call["norm"] is not None:
            return "MoE weighs plain outputs of experts: every expert on every token"
        slope, gate_low, gate_high, up_low, up_high, _ = call["limits"] or PLAIN_LIMITS
        bounded = (gate_low, gate_high, up_low, up_high)
        free = bounded == (-math.inf, math.inf, -math.inf, math.inf)
        if not free and not (gate_low == -math.inf and gate_high == up_high == -up_low):
            return f"MoE has one limit for gate and up, these are {bounded}: every expert"
        if slope <= 0:
            return f"the activation's slope is {slope}: every expert on every token"
        return None

    def _fused(
        self, node: fx.Node, call: dict[str, Any], stacks: dict[str, Any], share: fx.Node
    ) -> fx.Node:
        program = self.program
        emit, x = program.emit, call["x"]
        dtype = x.meta["val"].dtype
        k = int(call["indices"].meta["val"].shape[-1])
        slope, _, gate_high, _, _, offset = call["limits"] or PLAIN_LIMITS
        count, inner, width = stacks["up"].shape
        fc1 = torch.stack((stacks["gate"], stacks["up"]), 2).reshape(count, 2 * inner, width)
        name = f"{node.name}.fc1"
        inputs = [program.constant(f"{name}.weight", fc1.to(dtype).contiguous())]
        bias1 = None
        if stacks["gate_bias"] is not None:
            both = torch.stack((stacks["gate_bias"], stacks["up_bias"]), 2).reshape(count, -1)
            bias1 = program.constant(f"{name}.bias", both.to(dtype).contiguous())
        fc2 = program.constant(f"{node.name}.fc2.weight", stacks["down"].to(dtype).contiguous())
        bias2 = None
        if stacks["down_bias"] is not None:
            bias2 = program.constant(
                f"{node.name}.fc2.bias", stacks["down_bias"].to(dtype).contiguous()
            )
        positive = emit(node, aten.gt.Scalar, (share, 0.0))
        log = emit(node, aten.log.default, (share,))
        unchosen = program.scalar(_NOT_CHOSEN, torch.float32)
        logits = emit(node, aten.where.self, (positive, log, unchosen))
        logits = (
            self._cast(node, logits, dtype)
            if dtype == torch.float32
            else self._half(node, logits, dtype)
        )
        flat = emit(node, op("reshape"), (logits, [-1, count]))
        y = emit(
            node,
            op("moe"),
            (
                x, flat, inputs[0], bias1, fc2, bias2, k, float(slope), float(offset),
                0.0 if math.isinf(gate_high) else float(gate_high),
            ),
        )  # fmt: skip
        total = emit(node, aten.sum.dim_IntList, (share, [-1], True))
        return emit(node, aten.mul.Tensor, (y, self._cast(node, total, dtype)))

    def _quantised(self, node: fx.Node, call: dict[str, Any]) -> fx.Node | None:
        """QMoE, if the experts' weights are integers that it computes exactly with."""
        program = self.program
        stacks = [stacked(program, call[name]) for name in ("gate", "up", "down")]
        if any(s is None for s in stacks) or self._refusal(call) is not None:
            return None
        gate, up, down = stacks
        assert gate is not None and up is not None and down is not None
        both = interleaved(gate, up)
        made: Any = "gate and up have groups of different sizes: experts are dequantised"
        made = packed(both, down) if both is not None else made
        if isinstance(made, str):
            program.fallbacks.append((f"dspark::moe_experts at {node.name}", made))
            return None
        x = call["x"]
        dtype = x.meta["val"].dtype
        count, width = int(down.numbers.shape[0]), int(x.meta["val"].shape[-1])
        if down.numbers.shape[1] != width:
            return None
        emit = program.emit
        share = self._share(node, call, count)
        share = self._cast(node, emit(node, op("reshape"), (share, [-1, count])), dtype)
        chosen = self._cast(node, emit(node, aten.ne.Scalar, (share, 0.0)), dtype)
        slope, _, gate_high, _, _, offset = call["limits"] or PLAIN_LIMITS
        biases: list[fx.Node | None] = [None, None]
        pairs = [self._stack(call[n]) for n in ("gate_bias", "up_bias", "down_bias")]
        if pairs[0] is not None:
            joined = torch.stack(pairs[:2], 2).reshape(count, -1).to(dtype)
            biases[0] = program.constant(f"{node.name}.fc1.bias", joined.contiguous())
        if pairs[2] is not None:
            biases[1] = program.constant(f"{node.name}.fc2.bias", pairs[2].to(dtype).contiguous())
        held: list[list[fx.Node | None]] = []
        for part, name in zip(made, ("fc1", "fc2"), strict=True):
            tensors = {"quantized": part.data, "scales": part.scales, "zero_points": part.zeros}
            held.append([
                None if t is None else program.constant(f"{node.name}.{name}.{key}", t)
                for key, t in tensors.items()
            ])  # fmt: skip
        (fc1, scale1, zero1), (fc2, scale2, zero2) = held
        return emit(
            node,
            op("qmoe"),
            (
                x, chosen, share, fc1, scale1, biases[0], fc2, scale2, biases[1], zero1, zero2,
                int(call["indices"].meta["val"].shape[-1]), float(slope), float(offset),
                0.0 if math.isinf(gate_high) else float(gate_high), made[0].bits, made[0].block,
            ),
        )  # fmt: skip

    def _half(self, node: fx.Node, logits: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Logits for a dtype whose smallest number is nearer: far below, and no infinity."""
        low = self.program.scalar(-6e4, torch.float32)
        bounded = self.program.emit(node, aten.maximum.default, (logits, low))
        return self._cast(node, bounded, dtype)

    def _dense(
        self, node: fx.Node, call: dict[str, Any], stacks: dict[str, Any], share: fx.Node
    ) -> fx.Node:
        """All experts on all tokens: ``[E, T, I]`` between the products."""
        program = self.program
        emit, x = program.emit, call["x"]
        value = x.meta["val"]
        dtype, width, count = value.dtype, int(value.shape[-1]), stacks["down"].shape[0]
        rows = emit(node, op("reshape"), (x, [1, -1, width]))
        flat = emit(node, op("reshape"), (share, [-1, count]))
        flat = emit(node, aten.permute.default, (flat, [1, 0]))
        column = self._cast(node, emit(node, aten.unsqueeze.default, (flat, -1)), dtype)
        if call["weigh_input"]:
            rows = emit(node, aten.mul.Tensor, (rows, column))

        def product(y: fx.Node, name: str) -> fx.Node:
            weight = stacks[name].to(dtype).transpose(1, 2).contiguous()
            y = emit(
                node, aten.matmul.default, (y, program.constant(f"{node.name}.{name}", weight))
            )
            if stacks[f"{name}_bias"] is not None:
                bias = stacks[f"{name}_bias"].to(dtype).unsqueeze(1).contiguous()
                held = program.constant(f"{node.name}.{name}_bias", bias)
                y = emit(node, aten.add.Tensor, (y, held))
            return y

        up = product(rows, "up")
        gate = None if stacks["gate"] is None else product(rows, "gate")
        hidden = emit(
            node, op("gate_and_up"), (gate, up, call["activation"], list(call["limits"] or []))
        )
        y = product(hidden, "down")
        if call["norm"] is not None:
            y = emit(node, op("rms_norm"), (y, call["norm"], call["eps"]))
        if call["weigh_input"]:
            chosen = emit(node, aten.ne.Scalar, (column, 0.0))
            y = emit(node, aten.mul.Tensor, (y, self._cast(node, chosen, dtype)))
        else:
            y = emit(node, aten.mul.Tensor, (y, column))
        y = emit(node, aten.sum.dim_IntList, (y, [0]))
        if value.dim() == 2:
            return y
        sizes = [emit(node, aten.sym_size.int, (x, i)) for i in range(value.dim() - 1)]
        return emit(node, aten.view.default, (y, [*sizes, int(stacks["down"].shape[1])]))

    def _cast(self, like: fx.Node, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        if x.meta["val"].dtype == dtype:
            return x
        return self.program.emit(like, aten._to_copy.default, (x,), dtype=dtype)
