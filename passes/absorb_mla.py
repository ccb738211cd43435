"""Absorb MLA: latent attention reads the cached latents, not keys and values made of them.

Multi-head latent attention caches one latent ``c [B, N, R]`` and one rotated key part
``[B, N, Dr]`` for all heads. Code as written expands the whole cache at every step:

    key   = cat([W_uk c, expand(rope part)], -1)          [B, H, N, dn + Dr]
    value = W_uv c                                        [B, H, N, dv]
    out   = attention(cat([q_nope, q_rope], -1), key, value)

The products with W_uk and W_uv are linear, so they move to the other side:

    latent = mla_attention(q_nope W_uk, q_rope, c, rope part)
    out    = latent W_uv^T

W_uk and W_uv are views of the projection's weight: per-head slices ``[H, d, R]``. Seen
through: one ``kv_b`` projection or two, any order of its view, permutation, split and
select, key parts in either order, a norm before the projection (its result is the latent).

Conditions: the keys' up-projected part and the values come from one latent; the other part
is shared by the heads; no bias; the expanded tensors serve nothing else; and it pays. With
``S = dn + dv``, in multiply-adds for each batch row and head:

    expanded:  N R S + M N (S + Dr)          absorbed:  M R S + M N (2 R + Dr)
    absorb when  N (R S - M (2 R - S)) > M R S

which holds for decoding (DeepSeek-V3: up to 170 new tokens against a long cache) and never
for a prefill of its own keys. It must be known from the sizes alone, hence for every size a
dynamic graph may meet; a graph with a dynamic number of new tokens stays expanded.

Worth: the expansion of N rows a step, and K/V traffic of ``R + Dr`` a row in place of
``2 H (S + Dr)``: 576 values against 80 000 for DeepSeek-V3. The result is reassociated:
float32 agrees to rounding, lower precisions round in other places but no more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    known_equal,
    shape,
)
from dspark_compile.passes.repeat_kv import _source as copied_heads


@dataclass(frozen=True)
class Dim:
    """One dimension of a view of a linear's result: a leading dimension of its input
    (``lead`` is 0 for the batch, 1 for the rows), one of size 1 (``lead`` is -1), or
    ``size`` of its columns, ``stride`` apart (``lead`` is None)."""

    lead: int | None
    size: int = 1
    stride: int = 0


@dataclass(frozen=True)
class Columns:
    """A view of ``linear(latent, weight)``: which columns stand where."""

    linear: fx.Node
    dims: tuple[Dim, ...]
    offset: int
    nodes: tuple[fx.Node, ...]

    def heads(self) -> tuple[Dim, Dim] | None:
        """The head and feature dimensions, if this is ``[B, H, N, d]``."""
        leads = [d.lead for d in self.dims]
        if leads == [0, None, 1, None]:
            return self.dims[1], self.dims[3]
        if leads == [0, -1, 1, None]:
            return Dim(None, 1, self.dims[3].size), self.dims[3]
        return None


class AbsorbMLA(Pass):
    """See the module's docstring."""

    name = "absorb_mla"
    kind = "attention"
    stage = "optimise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_dialect_op(node, "attention"):
                continue
            key, cut = _unsliced(node.args[1])
            value, same = _unsliced(node.args[2])
            values, parts = columns(value), _joined(key)
            if cut != same:
                continue
            if values is None or parts is None:
                continue
            found = [columns(part) for part in parts]
            if sum(c is not None for c in found) == 1:
                up = 0 if found[0] is not None else 1
                yield Match(
                    node,
                    captures={
                        "values": values,
                        "keys": found[up],
                        "up": up,
                        "parts": parts,
                        "key": key,
                        "cut": cut,
                    },
                )

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node, keys, values = match.anchor, match["keys"], match["values"]
        latent = keys.linear.args[0]
        if latent is not values.linear.args[0]:
            return Problem("keys and values are expanded from different latents", "", values.linear)
        for linear in (keys.linear, values.linear):
            if argument(linear, 2, "bias") is not None:
                return Problem("the up-projection has a bias", "leave the bias out", linear)
        for name, found in (("uk", keys), ("uv", values)):
            rows = _rows(found)
            if isinstance(rows, Problem):
                return rows
            match.captures[name] = rows
        shared = _shared(match["parts"][1 - match["up"]])
        if shared is None:
            return Problem(
                "the other part of the keys is not shared by the heads",
                "expand one rotary part over the heads",
                match["parts"][1 - match["up"]],
            )
        match.captures["rope"] = shared
        query = node.args[0]
        assert isinstance(query, fx.Node)
        heads = keys.heads()[0].size
        if not known_equal(shape(query)[1], heads) or heads != values.heads()[0].size:
            return Problem("query, key and value heads differ in number", "", query)
        if len({dtype(n) for n in (query, latent, shared)}) != 1:
            return Problem("query, latent and rotary part differ in dtype", "", query)
        other = _other_use(node, match["key"], keys, values)
        if other is not None:
            return Problem(
                "the expanded keys or values are used elsewhere too",
                "the expansion would still run",
                other,
            )
        return self._unprofitable(match)

    def _unprofitable(self, match: Match) -> Problem | None:
        query, key = match.anchor.args[:2]
        rows, keys = shape(query)[2], shape(key)[2]  # type: ignore[arg-type]
        latent = shape(match["keys"].linear.args[0])[-1]
        width = match["keys"].heads()[1].size + match["values"].heads()[1].size
        if not isinstance(rows, int) or not isinstance(latent, int):
            return Problem(
                "the number of new tokens is dynamic, so absorbing may cost more than it saves",
                "decode with a fixed number of tokens a step",
            )
        gain = latent * width - rows * (2 * latent - width)
        if not statically_known_true(keys * gain > rows * latent * width):
            return Problem(
                f"expanding {keys} keys is not known to cost more than attending over latents "
                f"with {rows} new tokens",
                "this is so for a prefill; decoding steps of the same cache are absorbed",
            )
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, up = match.anchor, match["up"]
        query, _, _, *mask = node.args
        assert isinstance(query, fx.Node)
        widths = [shape(part)[3] for part in match["parts"]]
        rows = shape(query)[2]

        def call(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        def per_head(x: fx.Node, weight: fx.Node) -> fx.Node:
            """``x [B, H, M, i]`` times ``weight [H, i, o]``, as ``[B, H, M, o]``."""
            size_in, size_out = shape(weight)[1:]
            heads = shape(weight)[0]
            moved = call(aten.permute.default, x, [1, 0, 2, 3])
            flat = call(aten.view.default, moved, [heads, -1, size_in])
            out = call(aten.bmm.default, flat, weight)
            split = call(aten.view.default, out, [heads, -1, rows, size_out])
            return call(aten.permute.default, split, [1, 0, 2, 3])

        with graph.inserting_before(node):
            halves = _joined(query)
            if halves is None or [shape(h)[3] for h in halves] != widths:
                halves = (
                    call(aten.slice.Tensor, query, 3, 0, widths[0]),
                    call(aten.slice.Tensor, query, 3, widths[0], sum(widths)),
                )
            w_uk = self._weight(match["keys"], match["uk"], call)
            w_uv = self._weight(match["values"], match["uv"], call)
            absorbed = per_head(halves[up], w_uk)
            latent = match["keys"].linear.args[0]
            if len(shape(latent)) == 4:
                latent = call(aten.squeeze.dim, latent, 1)
            rope = call(aten.squeeze.dim, match["rope"], 1)
            if match["cut"]:
                latent = call(aten.slice.Tensor, latent, 1, *match["cut"])
                rope = call(aten.slice.Tensor, rope, 1, *match["cut"])
            inner = emit(
                graph,
                dialect("mla_attention"),
                (absorbed, halves[1 - up], latent, rope, *mask),
                dict(node.kwargs),
                like=node,
                fake_mode=ctx.fake_mode,
            )
            w_out = call(aten.permute.default, w_uv, [0, 2, 1])
            out = per_head(inner, w_out)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        ctx.report.rename_site(node.name, inner.name, "mla_attention")

    @staticmethod
    def _weight(found: Columns, rows: tuple[str, int, int], call: Any) -> fx.Node:
        """The view ``[H, d, R]`` of a projection's weight."""
        weight = found.linear.args[1]
        layout, start, group = rows
        head, feature = found.heads()  # type: ignore[misc]
        rank = shape(weight)[1]  # type: ignore[arg-type]
        if layout == "blocks":
            part = call(aten.slice.Tensor, weight, 0, start, start + head.size * feature.size)
            return call(aten.view.default, part, [head.size, feature.size, rank])
        part = call(aten.view.default, weight, [-1, group, rank])
        part = call(aten.slice.Tensor, part, 1, start, start + feature.size)
        if shape(part)[0] != head.size:
            part = call(aten.slice.Tensor, part, 0, 0, head.size)
        return part


def columns(node: Any) -> Columns | None:
    """``node`` as a view of a linear's result, or None."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and is_op(node, *_FORWARD):
        chain.append(node)
        node = node.args[0]
    if not is_dialect_op(node, "linear"):
        return None
    lead = shape(node)[:-1]
    if len(lead) == 3 and known_equal(lead[1], 1):
        dims: tuple[Dim, ...] = (Dim(0), Dim(-1), Dim(1))
    elif len(lead) == 2:
        dims = (Dim(0), Dim(1))
    else:
        return None
    size = shape(node)[-1]
    if not isinstance(size, int):
        return None
    found: Columns | None = Columns(node, (*dims, Dim(None, size, 1)), 0, (node,))
    for step in reversed(chain):
        assert found is not None
        found = _step(found, step)
        if found is None:
            return None
    return found


_FORWARD = (
    *VIEWS,
    aten.permute.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


def _step(found: Columns, node: fx.Node) -> Columns | None:
    """`Columns` after one more view."""
    dims, offset = list(found.dims), found.offset
    rank = len(dims)
    if is_op(node, aten.permute.default):
        dims = [dims[int(i)] for i in node.args[1]]  # type: ignore[union-attr,arg-type]
    elif is_op(node, aten.slice.Tensor):
        dim = int(argument(node, 1, "dim", 0)) % rank
        start, size = argument(node, 2, "start") or 0, shape(node)[dim]
        if dims[dim].lead is not None or argument(node, 4, "step", 1) != 1:
            return None
        if not isinstance(start, int) or start < 0 or not isinstance(size, int):
            return None
        offset += start * dims[dim].stride
        dims[dim] = replace(dims[dim], size=size)
    elif is_op(node, aten.select.int):
        dim, index = int(node.args[1]) % rank, node.args[2]  # type: ignore[arg-type]
        if dims[dim].lead not in (None, -1) or not isinstance(index, int):
            return None
        if dims[dim].lead is None:
            offset += (index % dims[dim].size) * dims[dim].stride
        del dims[dim]
    elif is_op(node, aten.unsqueeze.default):
        dims.insert(int(node.args[1]) % (rank + 1), Dim(-1))  # type: ignore[arg-type]
    elif is_op(node, aten.squeeze.dim):
        dim = int(node.args[1]) % rank  # type: ignore[arg-type]
        if dims[dim].lead == -1 or (dims[dim].lead is None and dims[dim].size == 1):
            del dims[dim]
        elif len(shape(node)) != rank:
            return None
    else:
        split = _split(dims, shape(node.args[0]), shape(node))  # type: ignore[arg-type]
        if split is None:
            return None
        dims = split
    return Columns(found.linear, tuple(dims), offset, (*found.nodes, node))


def _split(dims: list[Dim], before: Any, after: Any) -> list[Dim] | None:
    """The dimensions after a view that splits columns and moves dimensions of size 1."""
    sizes = list(after)
    out: list[Dim] = []
    for dim, size in zip(dims, before, strict=True):
        if dim.lead == -1:
            continue
        if dim.lead is not None:
            # Units in front of a leading dimension are new; the batch itself may be 1.
            while sizes and not known_equal(sizes[0], size):
                if not known_equal(sizes.pop(0), 1):
                    return None
                out.append(Dim(-1))
            if not sizes:
                return None
            sizes.pop(0)
            out.append(dim)
            continue
        left, stride = dim.size, dim.size * dim.stride
        if left == 1:
            out.append(dim)
            if sizes and known_equal(sizes[0], 1):
                sizes.pop(0)
            continue
        while left > 1:
            if not sizes or not isinstance(sizes[0], int) or sizes[0] < 1 or left % sizes[0]:
                return None
            part = sizes.pop(0)
            left //= part
            stride //= part
            out.append(Dim(-1) if part == 1 else Dim(None, part, stride))
    if not all(known_equal(size, 1) for size in sizes):
        return None
    return [*out, *(Dim(-1) for _ in sizes)]


def _rows(found: Columns) -> Problem | tuple[str, int, int]:
    """How the weight's rows are cut: ``("blocks", start, 0)`` for one block of all heads, or
    ``("groups", start, size)`` for a slice of every head's group."""
    layout = found.heads()
    if layout is None:
        return Problem(
            "the up-projection is not laid out as [batch, heads, rows, features]",
            "view its result as [B, N, H, d] and transpose",
            found.nodes[-1],
        )
    head, feature = layout
    if feature.stride != 1 and feature.size > 1:
        return Problem("features of a head are not neighbours in the projection", "", found.linear)
    if head.size == 1 or head.stride == feature.size:
        return "blocks", found.offset, 0
    total = shape(found.linear)[-1]
    start = found.offset
    if total == head.size * head.stride and start + feature.size <= head.stride:
        return "groups", start, head.stride
    return Problem("heads are spread unevenly over the projection's rows", "", found.linear)


def _joined(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors that ``node`` joins along its last dimension."""
    if not is_op(node, aten.cat.default):
        return None
    parts = node.args[0]
    rank = len(shape(node))
    if len(parts) != 2 or int(argument(node, 1, "dim", 0)) % rank != rank - 1:
        return None
    return parts[0], parts[1]


def _shared(part: fx.Node) -> fx.Node | None:
    """``[B, 1, N, Dr]`` that ``part`` repeats for every head."""
    if known_equal(shape(part)[1], 1):
        return part
    found = copied_heads(part, 1)
    if found is None or found[1] != 1 or len(shape(found[0])) != 4:
        return None
    return found[0]


def _unsliced(node: Any) -> tuple[Any, tuple[Any, ...] | None]:
    """``node`` before a slice of its rows, and the slice's bounds."""
    if is_op(node, aten.slice.Tensor) and int(argument(node, 1, "dim", 0)) % 4 == 2:
        bounds = (argument(node, 2, "start"), argument(node, 3, "end"))
        if argument(node, 4, "step", 1) == 1:
            return node.args[0], bounds
    return node, None


def _other_use(node: fx.Node, key: fx.Node, keys: Columns, values: Columns) -> fx.Node | None:
    """A reader of the expanded tensors beside attention, or None."""
    made = {key, *keys.nodes, *values.nodes}
    inside = {node, *node.args[1:3], *made}  # type: ignore[misc]
    for item in made:
        for user in item.users:
            if user not in inside:
                return user
    return None
