"""Cache appends: writing new keys and values into a cache becomes one dialect op.

Static caches (fixed shape, rows replaced at given positions):

    index_copy(cache, 2, positions, new)
    index_put(cache, [None, None, positions], new)
    slice_scatter(cache, new, 2, start, end)           -> cache_append

Growing caches:

    cat([past, new], 2)      where attention reads the result -> cache_extend

A cache is a 4-d floating tensor ``[B, H, N, D]``, or ``[B, N, H, D]`` where rows of an input are
replaced: then the op appends to its view ``[B, H, N, D]``. Other layouts and other updates of a
graph input that attention reads are rejections, so that no cache is missed silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    same_shape,
    shape,
    val,
)

_UPDATES = (
    aten.index_copy.default,
    aten.index_put.default,
    aten.slice_scatter.default,
    aten.scatter.src,
    aten.select_scatter.default,
    aten.where.self,
)
# [B, N, H, D] as [B, H, N, D], and back.
SWAP = [0, 2, 1, 3]
_READS = (
    aten.permute.default,
    aten.view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten._to_copy.default,
)


def read_by_attention(node: fx.Node, depth: int = 8, latent: bool = False) -> bool:
    """Whether attention reads ``node``, directly or through views and casts, as key or value.

    With ``latent`` also through a linear and a join of features, as multi-head latent
    attention reads its cache.
    """
    for user in node.users:
        if latent and depth:
            joins = is_op(user, aten.cat.default) and _last_dim(user)
            if joins or (is_dialect_op(user, "linear") and user.args[0] is node):
                if read_by_attention(user, depth - 1, latent):
                    return True
        if is_dialect_op(user, "attention", "attention_int8"):
            if node in user.args[1:3]:
                return True
        elif (is_dialect_op(user, "matmul") and user.args[1] is node) or (
            depth and is_op(user, *_READS) and read_by_attention(user, depth - 1, latent)
        ):
            return True
    return False


def _read_swapped(node: fx.Node, depth: int = 4) -> bool:
    """Whether heads and tokens change places on the way from ``node`` to a reader."""
    return any(
        (is_op(user, aten.permute.default) and list(user.args[1]) == SWAP)  # type: ignore[call-overload]
        or (depth > 0 and is_op(user, *_READS) and _read_swapped(user, depth - 1))
        for user in node.users
    )


def _last_dim(cat: fx.Node) -> bool:
    rank = val(cat).dim()
    return int(argument(cat, 1, "dim", 0)) % rank == rank - 1


class RaiseCache(Pass):
    """See the module's docstring."""

    name = "raise_cache"
    kind = "cache"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_op(node, *_UPDATES) and is_tensor(node):
                cache = node.args[0]
                if not isinstance(cache, fx.Node) or not is_tensor(cache):
                    continue
                if is_op(node, aten.where.self):
                    # ``where(row == position, new, cache)``: only of interest on an input.
                    cache = node.args[2]
                    if not isinstance(cache, fx.Node) or cache.op != "placeholder":
                        continue
                latent = val(node).dim() == 4 or _is_input(cache)
                if val(node).dim() >= 3 and read_by_attention(node, latent=latent):
                    yield Match(node, captures={"cache": cache})
            elif is_op(node, aten.cat.default) and is_tensor(node) and val(node).dim() == 4:
                parts = node.args[0]
                if isinstance(parts, (list, tuple)) and len(parts) == 2 and _is_input(parts[0]):
                    if read_by_attention(node, latent=True):
                        yield Match(node, captures={"cache": parts[0], "grow": True})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node, cache = match.anchor, match["cache"]
        if val(node).dim() != 4:
            return Problem(
                f"the cache has {val(node).dim()} dimensions, not [B, H, N, D]",
                "keep batch, heads, sequence and features apart",
            )
        if not dtype(node).is_floating_point:
            return Problem(f"the cache is {dtype(node)}, not floating point")
        if match.captures.get("grow"):
            dim = int(argument(node, 1, "dim", 0)) % 4
            if dim != 2:
                return Problem(f"the cache grows along dimension {dim}, not 2")
            if dtype(node.args[0][1]) != dtype(cache):  # type: ignore[index,arg-type]
                return Problem("past and new entries differ in dtype")
            return None
        found = _append(node)
        if isinstance(found, Problem):
            return found
        match.captures["new"], match.captures["positions"], dim = found
        match.captures["tokens_first"] = dim == 1
        if dim == 1 and not _read_swapped(node):
            return Problem("the cache is written along dimension 1, not 2", "use [B, H, N, D]")
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        tokens_first = match.captures.get("tokens_first", False)
        with graph.inserting_before(node):
            if match.captures.get("grow"):
                target, args = dialect("cache_extend"), tuple(node.args[0])  # type: ignore[arg-type]
            else:
                positions = match["positions"]
                if isinstance(positions, tuple):
                    device = val(match["cache"]).device
                    positions = emit(
                        graph,
                        aten.arange.start,
                        positions,
                        {"device": device, "pin_memory": False},
                        like=node,
                        fake_mode=ctx.fake_mode,
                    )
                entries = match["new"]
                while val(entries).dim() < 4:
                    lifted = (aten.unsqueeze.default, (entries, 0))
                    entries = emit(graph, *lifted, like=node, fake_mode=ctx.fake_mode)
                cache = match["cache"]
                if tokens_first:
                    cache, entries = (_swapped(x, node, ctx) for x in (cache, entries))
                target, args = dialect("cache_append"), (cache, entries, positions)
            new = emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)
            if tokens_first:
                for user in list(node.users):
                    if is_op(user, aten.permute.default) and list(user.args[1]) == SWAP:
                        user.replace_all_uses_with(new)
                        graph.erase_node(user)
            whole = _swapped(new, node, ctx) if tokens_first and node.users else new
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
        ctx.raised("cache", new)


def _swapped(x: fx.Node, like: fx.Node, ctx: PassContext) -> fx.Node:
    """``x`` with heads and tokens in each other's place."""
    call = (aten.permute.default, (x, SWAP))
    return emit(x.graph, *call, like=like, fake_mode=ctx.fake_mode)


def _is_input(node: Any, depth: int = 4) -> bool:
    """Whether a value is a graph input, through views."""
    while depth and isinstance(node, fx.Node) and is_op(node, *_READS):
        node, depth = node.args[0], depth - 1
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _append(node: fx.Node) -> Problem | tuple[fx.Node, Any, int]:
    """``(new entries, positions, dimension)`` of an update; positions may be a ``(start, end)``."""
    cache = node.args[0]
    assert isinstance(cache, fx.Node)
    dims = (1, 2) if cache.op == "placeholder" else (2,)
    if is_op(node, aten.index_copy.default):
        dim, positions, new = int(node.args[1]) % 4, node.args[2], node.args[3]  # type: ignore[arg-type]
        if dim not in dims:
            return Problem(f"the cache is written along dimension {dim}, not 2", "use [B, H, N, D]")
    elif is_op(node, aten.index_put.default):
        index = list(node.args[1])  # type: ignore[arg-type]
        if argument(node, 3, "accumulate", False):
            return Problem("the cache is accumulated into, not written")
        given = [i for i, x in enumerate(index) if x is not None]
        if len(given) != 1 or given[0] not in dims:
            return Problem(
                "the cache is written at indices of other dimensions than the sequence",
                "write cache[:, :, positions] = new",
            )
        dim = given[0]
        positions, new = index[dim], node.args[2]
        if not is_tensor(positions) or dtype(positions) == torch.bool:
            return Problem("the cache is written at a boolean mask")
    elif is_op(node, aten.slice_scatter.default):
        new = node.args[1]
        dim = int(argument(node, 2, "dim", 0)) % 4
        start, end = argument(node, 3, "start", 0) or 0, argument(node, 4, "end")
        if dim not in dims or argument(node, 5, "step", 1) != 1:
            return Problem(f"the cache is sliced along dimension {dim}, not 2", "use [B, H, N, D]")
        size = shape(cache)[dim]
        if not isinstance(start, int) or start < 0:
            return Problem("the cache is written at a slice whose start is not a known number")
        if end is None or (isinstance(end, int) and isinstance(size, int) and end > size):
            end = size
        if not isinstance(end, int) or end < 0:
            return Problem("the cache is written at a slice whose end is not a known number")
        positions = (start, end)
    else:
        return Problem(
            f"the cache is updated by {node.target}",
            "write rows with index_copy_ or cache[:, :, positions] = new",
        )
    assert isinstance(new, fx.Node)
    if not isinstance(positions, tuple):
        assert isinstance(positions, fx.Node)
        if val(positions).dim() != 1:
            return Problem(f"positions have {val(positions).dim()} dimensions, not 1")
        rows = shape(positions)[0]
    else:
        rows = positions[1] - positions[0]
    want = list(shape(cache))
    want[dim] = rows
    # Indexed assignment drops leading dimensions of 1: ``cache[:, :, p] = new`` at batch 1.
    if val(new).dim() < 4 and is_op(new, *VIEWS) and same_shape(shape(new.args[0]), want):
        new = new.args[0]
        assert isinstance(new, fx.Node)
    have = [*[1] * (4 - val(new).dim()), *shape(new)]
    if len(have) != 4 or not all(known_equal(a, b) for a, b in zip(want, have, strict=True)):
        return Problem(f"new entries are {tuple(shape(new))}, not {tuple(want)}")
    if dtype(new) != dtype(cache):
        return Problem(f"new entries are {dtype(new)} and the cache {dtype(cache)}")
    return new, positions, dim
