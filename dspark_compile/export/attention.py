"""Attention and caches in standard ONNX ops.

attention       Attention with an explicit mask: what runtimes make of ``is_causal`` beside a
                past differs, a bool tensor does not
soft-caps, sinks    the products and the softmax, which Attention has no place for (its softcap
                comes after the mask)
cache_append    TensorScatter where the rows are consecutive, else a scatter
attention_int8  DequantizeLinear in blocks of a head, then Attention
mla_attention   Attention with one key head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dspark_compile.passes.graph import aten, is_dialect_op, is_op, known_equal

from .masks import Masks
from .ops import op
from .program import Program
from .weights import _args


class StandardAttention:
    """Lowers what attention and caches are left in a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.masks = Masks(program)

    def run(self) -> None:
        """Lower every site."""
        for node in list(self.program.graph.nodes):
            if is_dialect_op(node, "mla_attention"):
                self._latent(node)
        for node in list(self.program.graph.nodes):
            if is_dialect_op(node, "attention"):
                self._attention(node)
            elif is_dialect_op(node, "attention_int8"):
                self._int8(node)
            elif is_dialect_op(node, "cache_extend"):
                past, new = node.args
                joined = self.program.emit(node, aten.cat.default, ([past, new], 2))
                self.program.replace(node, joined)
            elif is_dialect_op(node, "cache_append"):
                self._append(node)

    def _attention(self, node: fx.Node) -> None:
        program = self.program
        query, key, value, _, sinks, *_ = _args(node, 7)
        kwargs = dict(node.kwargs)
        mask = self.masks.materialize(node)
        softcap = kwargs.get("softcap", 0.0)
        if sinks is not None or softcap > 0:
            what = "sinks" if sinks is not None else "soft-cap before the mask"
            program.fallbacks.append(
                (f"dspark::attention at {node.name}", f"ONNX's Attention has no {what}: decomposed")
            )
            call: tuple[Any, ...] = (query, key, value, mask, sinks, [], [])
            new = program.emit(node, node.target, call, scale=kwargs["scale"], softcap=softcap)
        else:
            mask = None if mask is None else self._whole(node, mask, query, key)
            new = program.emit(node, op("attention"), (query, key, value, mask, kwargs["scale"]))
        program.replace(node, new)

    def _whole(self, node: fx.Node, mask: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """``mask`` with four dimensions, the last two those of the scores: Attention broadcasts
        over batch and heads only."""
        program = self.program
        while mask.meta["val"].dim() < 4:
            mask = program.emit(node, aten.unsqueeze.default, (mask, 0))
        sizes: list[Any] = [-1, -1, -1, -1]
        for dim, source in ((2, query), (3, key)):
            size = source.meta["val"].shape[2]
            if not known_equal(mask.meta["val"].shape[dim], size):
                constant = isinstance(size, int)
                sizes[dim] = (
                    size if constant else program.emit(node, aten.sym_size.int, (source, 2))
                )
        if sizes == [-1, -1, -1, -1]:
            return mask
        return program.emit(node, aten.expand.default, (mask, sizes))

    def _int8(self, node: fx.Node) -> None:
        """Dequantised keys and values, then attention as any other."""
        program = self.program
        query, key, key_scale, value, value_scale, *rest = _args(node, 9)
        dtype = query.meta["val"].dtype
        pair = []
        for x, scale in ((key, key_scale), (value, value_scale)):
            if scale.meta["val"].dtype != dtype:
                scale = program.emit(node, aten._to_copy.default, (scale,), dtype=dtype)
            column = program.emit(node, aten.unsqueeze.default, (scale, -1))
            block = int(x.meta["val"].shape[-1])
            pair.append(program.emit(node, op("dequantize"), (x, column, block)))
        new = program.emit(
            node, torch.ops.dspark.attention.default, (query, *pair, *rest), **node.kwargs
        )
        program.replace(node, new)
        self._attention(new)

    def _latent(self, node: fx.Node) -> None:
        program = self.program
        query, query_rope, latent, key_rope, *rest = _args(node, 8)
        q = program.emit(node, aten.cat.default, ([query, query_rope], -1))
        k = program.emit(node, aten.cat.default, ([latent, key_rope], -1))
        k = program.emit(node, aten.unsqueeze.default, (k, 1))
        v = program.emit(node, aten.unsqueeze.default, (latent, 1))
        new = program.emit(
            node, torch.ops.dspark.attention.default, (q, k, v, *rest), **node.kwargs
        )
        program.replace(node, new)

    def _append(self, node: fx.Node) -> None:
        cache, new, positions = node.args
        program = self.program
        start = first_of_range(positions)
        rows = new.meta["val"].shape[2]
        if start is None or not known_equal(positions.meta["val"].shape[0], rows):
            program.fallbacks.append(
                (
                    f"dspark::cache_append at {node.name}",
                    "the rows written are not known to be consecutive: a scatter",
                )
            )
            return
        batch = program.emit(node, aten.sym_size.int, (new, 0))
        starts = program.emit(
            node, aten.full.default, ([batch], start), dtype=torch.int64, device=torch.device("cpu")
        )
        dtype = cache.meta["val"].dtype
        if new.meta["val"].dtype != dtype:
            new = program.emit(node, aten._to_copy.default, (new,), dtype=dtype)
        program.replace(node, program.emit(node, op("tensor_scatter"), (cache, new, starts)))


def first_of_range(node: Any) -> Any:
    """The first of consecutive positions ``arange(start, end)``, None if they may be others."""
    if is_op(node, aten.arange.start_step):
        step = node.args[2] if len(node.args) > 2 else 1
        return node.args[0] if step == 1 else None
    if is_op(node, aten.arange.start):
        return node.args[0]
    if is_op(node, aten.arange.default):
        return 0
    if is_op(node, aten.add.Tensor, aten.add.Scalar):
        a, b = node.args[:2]
        plain = not isinstance(b, fx.Node) or not isinstance(b.meta["val"], torch.Tensor)
        return b if plain and first_of_range(a) == 0 else None
    return None
