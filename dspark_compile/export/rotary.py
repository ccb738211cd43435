"""RoPE: half the angles, and tables of them.

RotaryEmbedding takes ``R / 2`` cosines and sines for ``R`` rotated features, either one row for
each token, ``[B, S, R / 2]``, or a table of all positions with position ids. The model has
``cos [B, 1, S, R]`` computed from its position ids. What is needed here is shown first:

* that both halves of the ``R`` features are equal: by the ``cat`` that made them, or else by
  computing them for several positions;
* for a table, that a row depends on its position alone: the subgraph is computed for all positions
  at once, and for others in other orders and batches, and must give the same rows. Angles that
  depend on how long the sequence is (dynamic NTK, LongRoPE) fail here and stay in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import aten, is_dialect_op, is_op, known_equal

from .ops import op
from .program import Program
from .weights import _args

_POINTWISE = frozenset(
    {
        aten.cos.default, aten.sin.default, aten._to_copy.default, aten.alias.default,
        aten.clone.default, aten.unsqueeze.default, aten.neg.default, aten.detach.default,
    }
)  # fmt: skip


class CannotEvaluate(Exception):
    """A subgraph depends on more than positions."""


class Angles:
    """cos and sin of a program's ropes in ONNX's form.

    Args:
        program: its inputs are named by ``names``.
        positions: the placeholder of ``position_ids [B, S]``, or None.
        ids: the placeholder of ``input_ids``, whose shape may be asked for.
        rows: how many positions a table has; 0 makes none.
    """

    def __init__(
        self, program: Program, positions: fx.Node | None, ids: fx.Node | None, rows: int
    ) -> None:
        self.program, self.positions, self.ids, self.rows = program, positions, ids, rows
        self.tables: dict[tuple[Any, ...], fx.Node | str] = {}
        self.halves: dict[tuple[Any, ...], fx.Node | str] = {}
        self.memo: dict[tuple[fx.Node, int], Any] = {}

    # Tables -------------------------------------------------------------------------------------

    def table(self, angle: fx.Node, rotary_dim: int, interleaved: bool) -> fx.Node | str:
        """A constant ``[rows, R / 2]`` for cos or sin ``angle``, or why there is none."""
        key = (angle, rotary_dim, interleaved)
        if key not in self.tables:
            self.tables[key] = self._table(*key)
        return self.tables[key]

    def _table(self, angle: fx.Node, rotary_dim: int, interleaved: bool) -> fx.Node | str:
        if self.positions is None or not self.rows:
            return "the model has no position_ids"
        value = angle.meta["val"]
        if value.dim() not in (3, 4) or (value.dim() == 4 and 1 not in value.shape[1:3]):
            return f"the angles have shape {tuple(value.shape)}"
        try:
            table = self._rows(angle, torch.arange(self.rows)[None])[0]
            generator = torch.Generator().manual_seed(0)
            for batch, count in ((2, 5), (3, 11), (1, 1)):
                ids = torch.randint(0, self.rows, (batch, count), generator=generator)
                if batch == 3:
                    ids %= min(self.rows, 64)
                if not torch.allclose(self._rows(angle, ids), table[ids], rtol=0, atol=1e-5):
                    return "the angles of a token depend on more than its own position"
        except CannotEvaluate as error:
            return str(error)
        half = _half(table, rotary_dim, interleaved)
        if half is None:
            return "the two halves of the angles differ"
        name = f"{'cos' if _is_cos(angle) else 'sin'}_cache"
        return self.program.constant(name, half.to(value.dtype).contiguous())

    def _rows(self, angle: fx.Node, ids: Tensor) -> Tensor:
        """The angles ``[B, S, R]`` for position ids ``[B, S]``."""
        found = self._evaluate(angle, ids, {})
        while found.dim() > 3:
            found = found.squeeze(1 if found.shape[1] == 1 else 2)
        return found.expand(ids.shape[0], ids.shape[1], found.shape[-1]).float()

    def _evaluate(self, node: Any, ids: Tensor, memo: dict[fx.Node, Any]) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node in memo:
            return memo[node]
        if node is self.positions:
            return ids
        value = self.program.value(node)
        if value is not None:
            return value.cpu()
        if node.op != "call_function":
            raise CannotEvaluate(f"the angles depend on {node.name}")
        if is_op(node, aten.sym_size.int) and node.args[0] in (self.positions, self.ids):
            memo[node] = ids.shape[node.args[1]]  # type: ignore[index]
            return memo[node]
        args = fx.node.map_aggregate(node.args, lambda a: self._evaluate(a, ids, memo))
        kwargs = fx.node.map_aggregate(node.kwargs, lambda a: self._evaluate(a, ids, memo))
        kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}  # type: ignore[union-attr]
        target: Any = node.target
        if target is aten.view.default:
            target = aten.reshape.default
        try:
            with torch.no_grad():
                memo[node] = target(*args, **kwargs)  # type: ignore[misc]
        except CannotEvaluate:
            raise
        except Exception as error:
            raise CannotEvaluate(f"{node.name} cannot be computed alone: {error}") from error
        return memo[node]

    # Rows for each token ------------------------------------------------------------------------

    def half(
        self, like: fx.Node, angle: fx.Node, rotary_dim: int, interleaved: bool, x: fx.Node
    ) -> fx.Node | str:
        """cos or sin as ``[B, S, R / 2]`` for ``x [B, H, S, D]`` or ``[B, S, H, D]``, or why that
        cannot be."""
        key = (angle, rotary_dim, interleaved)
        if key in self.halves:
            return self.halves[key]
        self.halves[key] = found = self._make_half(like, angle, rotary_dim, interleaved, x)
        return found

    def _make_half(
        self, like: fx.Node, angle: fx.Node, rotary_dim: int, interleaved: bool, x: fx.Node
    ) -> fx.Node | str:
        program, value = self.program, angle.meta["val"]
        batch = x.meta["val"].shape[0]
        shape = [1] * (4 - value.dim()) + list(value.shape)
        heads_last = by_rows(value, x.meta["val"])
        if heads_last is None:
            return f"the angles have shape {tuple(value.shape)} for {tuple(x.meta['val'].shape)}"
        width = int(value.shape[-1])
        if width == rotary_dim and not self._halves_equal(angle, rotary_dim, interleaved):
            return "the two halves of the angles are not known to be equal"
        # After the angle itself: whoever comes later may share it.
        after = angle.next
        while after.op == "placeholder":
            after = after.next
        node = self._single(after, angle, rotary_dim, interleaved)
        if known_equal(node.meta["val"].dim(), 4):
            dim = 2 if heads_last else 1
            node = program.emit(after, aten.squeeze.dim, (node, dim), origin=angle)
        elif node.meta["val"].dim() == 2:
            node = program.emit(after, aten.unsqueeze.default, (node, 0), origin=angle)
        if not known_equal(shape[0], batch):
            source = program.input_with(batch)
            size: Any = batch
            if source is None and not isinstance(batch, int):
                return "the angles have no batch dimension, and nothing says how large the batch is"
            if source is not None and not isinstance(batch, int):
                size = program.emit(after, aten.sym_size.int, source, origin=angle)
            node = program.emit(after, aten.expand.default, (node, [size, -1, -1]), origin=angle)
        return node

    def _single(
        self, after: fx.Node, angle: fx.Node, rotary_dim: int, interleaved: bool
    ) -> fx.Node:
        """``angle`` for one feature of each pair: computed so where a ``cat`` doubled it, else cut
        out; an unsqueezed dimension 1 goes."""
        chain, bottom = _pointwise_chain(angle)
        program = self.program
        if _doubled(bottom) and not interleaved:
            node = bottom.args[0][0]
            rank = bottom.meta["val"].dim()
            for link in reversed(chain):
                if is_op(link, aten.unsqueeze.default) and link.args[1] == 1 and rank == 3:
                    continue
                node = program.emit(
                    after, link.target, (node, *link.args[1:]), origin=link, **link.kwargs
                )
            return node
        node = angle
        if chain and is_op(chain[0], aten.unsqueeze.default) and chain[0].args[1] == 1:
            if angle.meta["val"].dim() == 4:
                node = chain[0].args[0]
        if angle.meta["val"].shape[-1] == rotary_dim:
            end, step = (rotary_dim, 2) if interleaved else (rotary_dim // 2, 1)
            node = program.emit(after, aten.slice.Tensor, (node, -1, 0, end, step), origin=angle)
        return node

    def _halves_equal(self, angle: fx.Node, rotary_dim: int, interleaved: bool) -> bool:
        _, bottom = _pointwise_chain(angle)
        if _doubled(bottom):
            return not interleaved
        if self.positions is not None:
            try:
                rows = self._rows(angle, torch.randint(0, 4096, (2, 9)))
            except CannotEvaluate:
                return False
            return _half(rows, rotary_dim, interleaved) is not None
        return False


def _pointwise_chain(angle: fx.Node) -> tuple[list[fx.Node], Any]:
    """The ops on each element above a node, topmost first, and that node."""
    chain: list[fx.Node] = []
    node: Any = angle
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_op(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor):
            other = node.args[1]
            if isinstance(other, fx.Node) and other.meta["val"].dim() > 0:
                break
        elif node.target not in _POINTWISE:
            break
        chain.append(node)
        node = node.args[0]
    return chain, node


def _doubled(node: Any) -> bool:
    """Whether a node is ``cat((x, x), -1)``."""
    if not is_op(node, aten.cat.default):
        return False
    parts = node.args[0]
    last = len(node.args) > 1 and node.args[1] in (-1, node.meta["val"].dim() - 1)
    return last and len(parts) == 2 and parts[0] is parts[1]


def lower_ropes(program: Program, angles: Angles) -> None:
    """Every rope that fits becomes ``rotary``; the others keep the dialect op, with a reason."""
    for node in list(program.graph.nodes):
        if not is_dialect_op(node, "rope"):
            continue
        reason = rope_reason(node) or _lower(program, node, angles)
        if reason:
            program.fallbacks.append((f"dspark::rope at {node.name}", reason))


def rope_reason(node: fx.Node) -> str | None:
    """Why RotaryEmbedding does not do what a rope does, or None."""
    x, _, _, rotary_dim, _, _, out = _args(node, 7)
    value = x.meta["val"]
    if value.dim() != 4 or node.meta["val"].dim() != 4:
        return f"the input has {value.dim()} dimensions, RotaryEmbedding takes 4"
    if not all(known_equal(a, b) for a, b in zip(value.shape, node.meta["val"].shape)):
        return "the angles broadcast the input"
    if out not in (None, value.dtype):
        return f"the result is {out}, the input {value.dtype}"
    if rotary_dim % 2:
        return f"an odd number of features ({rotary_dim}) is rotated"
    return None


def _lower(program: Program, node: fx.Node, angles: Angles) -> str | None:
    x, cos, sin, rotary_dim, interleaved, _, _ = _args(node, 7)
    dtype = x.meta["val"].dtype
    halves = []
    for angle in (cos, sin):
        half = angles.half(node, angle, rotary_dim, bool(interleaved), x)
        if isinstance(half, str):
            return half
        if half.meta["val"].dtype != dtype:
            half = program.emit(node, aten._to_copy.default, (half,), dtype=dtype)
        halves.append(half)
    call = (*halves, None, rotary_dim, bool(interleaved))
    if not by_rows(cos.meta["val"], x.meta["val"]):
        program.replace(node, program.emit(node, op("rotary"), (x, *call, 0)))
        return None
    heads, size = (int(n) for n in x.meta["val"].shape[2:])
    flat = program.emit(node, op("reshape"), (x, [0, 0, heads * size]))
    turned = program.emit(node, op("rotary"), (flat, *call, heads))
    program.replace(node, program.emit(node, op("reshape"), (turned, [0, 0, heads, size])))
    return None


def by_rows(angle: Tensor, x: Tensor) -> bool | None:
    """Whether ``x`` is ``[B, S, H, D]`` (True) or ``[B, H, S, D]`` (False) by what the angles
    broadcast over; None if they fit neither."""
    shape = [1] * (4 - angle.dim()) + list(angle.shape)
    if len(shape) != 4 or x.dim() != 4:
        return None
    if known_equal(shape[1], 1) and known_equal(shape[2], x.shape[2]):
        return False
    if known_equal(shape[2], 1) and known_equal(shape[1], x.shape[1]):
        return True if isinstance(x.shape[2], int) else None
    return None


def _half(rows: Tensor, rotary_dim: int, interleaved: bool) -> Tensor | None:
    """``[..., R / 2]`` of angles ``[..., R or R / 2]``; None if the two of a pair differ."""
    if rows.shape[-1] * 2 == rotary_dim:
        return rows
    if rows.shape[-1] != rotary_dim:
        return None
    if interleaved:
        first, second = rows[..., 0::2], rows[..., 1::2]
    else:
        first, second = rows.chunk(2, -1)
    return first if torch.equal(first, second) else None


def _is_cos(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function":
        if is_op(node, aten.cos.default):
            return True
        if is_op(node, aten.sin.default) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False
