"""Norms: RMSNormalization and LayerNormalization, or ONNX Runtime's skip forms.

The ONNX ops have a weight of one dimension and no offset; both are made so at export. Statistics
are in float32 always, which is at least as exact as the model's own.
"""

from __future__ import annotations

import torch
from torch import fx

from dspark_compile.passes.graph import aten, is_dialect_op, same_shape, shape

from .ops import op
from .program import Program
from .weights import _args, _item


class Norms:
    """Lowers the norms of a program; ``contrib`` allows the skip forms."""

    def __init__(self, program: Program, contrib: bool) -> None:
        self.program, self.contrib = program, contrib
        self.folded: dict[tuple[fx.Node, float, torch.dtype], fx.Node] = {}

    def run(self) -> None:
        """Lower every site."""
        for node in list(self.program.graph.nodes):
            if is_dialect_op(node, "rms_norm"):
                x, weight, eps, offset, _, _, out = _args(node, 7)
                y = self._norm(node, x, weight, None, eps, offset, "rms_norm")
                self.program.replace(node, self._cast(node, y, out))
            elif is_dialect_op(node, "layer_norm"):
                x, weight, bias, eps, offset, _, _, out = _args(node, 8)
                y = self._norm(node, x, weight, bias, eps, offset, "layer_norm")
                self.program.replace(node, self._cast(node, y, out))
            elif is_dialect_op(node, "add_rms_norm"):
                x, residual, weight, eps, offset, _, _, out = _args(node, 8)
                self._pair(node, x, residual, weight, None, eps, offset, out, "rms_norm")
            elif is_dialect_op(node, "add_layer_norm"):
                x, residual, weight, bias, eps, offset, _, _, out = _args(node, 9)
                self._pair(node, x, residual, weight, bias, eps, offset, out, "layer_norm")

    def _pair(
        self,
        node: fx.Node,
        x: fx.Node,
        residual: fx.Node,
        weight: fx.Node | None,
        bias: fx.Node | None,
        eps: float,
        offset: float,
        out: torch.dtype | None,
        name: str,
    ) -> None:
        program = self.program
        a, b = x.meta["val"], residual.meta["val"]
        fits = self.contrib and a.dtype == b.dtype and a.dim() == 3 and same_shape(a.shape, b.shape)
        vector = weight is None or shape(weight)[:-1] == ()
        fits = fits and vector and (bias is None or shape(bias)[:-1] == ())
        if fits:
            w = self._weight(node, weight, offset, a)
            extra = (bias,) if name == "layer_norm" else ()
            both = program.emit(node, op(f"skip_{name}"), (x, residual, w, *extra, eps))
            normed, total = _item(program, node, both, 0), _item(program, node, both, 1)
        else:
            total = program.emit(node, aten.add.Tensor, (residual, x))
            normed = self._norm(node, total, weight, bias, eps, offset, name)
        program.replace(node, [self._cast(node, normed, out), total])

    def _norm(
        self,
        like: fx.Node,
        x: fx.Node,
        weight: fx.Node | None,
        bias: fx.Node | None,
        eps: float,
        offset: float,
        name: str,
    ) -> fx.Node:
        program, value = self.program, x.meta["val"]
        vector = weight is None or weight.meta["val"].dim() == 1
        w = self._weight(like, weight if vector else None, offset if vector else 0.0, value)
        plain_bias = bias if vector and (bias is None or bias.meta["val"].dim() == 1) else None
        extra = (plain_bias,) if name == "layer_norm" else ()
        y = program.emit(like, op(name), (x, w, *extra, eps))
        if not vector:
            assert weight is not None
            scale = weight if not offset else program.emit(like, aten.add.Tensor, (weight, offset))
            y = program.emit(like, aten.mul.Tensor, (y, scale))
        if bias is not None and plain_bias is None:
            y = program.emit(like, aten.add.Tensor, (y, bias))
        return y

    def _weight(
        self, like: fx.Node, weight: fx.Node | None, offset: float, x: torch.Tensor
    ) -> fx.Node:
        """The weight with its offset, in x's dtype: a constant where it can be."""
        program = self.program
        if weight is None:
            width = int(x.shape[-1])
            ones = torch.ones(width, dtype=x.dtype, device=x.device)
            return program.constant(f"ones_{width}", ones)
        value = program.value(weight)
        if value is None:
            w = weight if not offset else program.emit(like, aten.add.Tensor, (weight, offset))
            return self._cast(like, w, x.dtype)
        if not offset and value.dtype == x.dtype:
            return weight
        key = (weight, offset, x.dtype)
        if key not in self.folded:
            made = (value.float() + offset).to(x.dtype)
            self.folded[key] = program.constant(program.names[weight] + "_folded", made)
        return self.folded[key]

    def _cast(self, like: fx.Node, y: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        if dtype is None or y.meta["val"].dtype == dtype:
            return y
        return self.program.emit(like, aten._to_copy.default, (y,), dtype=dtype)
