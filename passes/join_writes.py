"""Join writes: filling a fresh tensor slice by slice is a concatenation.

    y = empty(...); y[..., :a] = u; y[..., a:] = v      -> y = cat([u, v], -1)
    y = empty(...); y[..., ::2] = u; y[..., 1::2] = v   -> y = stack([u, v], -1), flattened

which functional tracing leaves as a chain of ``slice_scatter`` (over ``copy``, where the
written value is broadcast or cast). Condition: the writes tile one dimension completely,
with known bounds, so that nothing of the first tensor is left to see.

Worth one write of the tensor for each link of the chain, and what lets later passes see
through it: Hugging Face builds the keys of multi-head latent attention this way, and rotary
embeddings of pairs are often written into an empty tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext
from dspark_compile.passes.graph import (
    argument,
    aten,
    dtype,
    emit,
    is_op,
    is_tensor,
    known_equal,
    same_shape,
    shape,
    view_sizes,
)


@dataclass(frozen=True)
class Write:
    """``source`` written to ``[start:end:step]`` of one dimension; ``like`` has its shape."""

    start: int
    end: int
    step: int
    source: fx.Node
    like: fx.Node


class JoinWrites(Pass):
    """See the module's docstring."""

    name = "join_writes"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        # The last write of a chain first: it sees all of them.
        for node in reversed(list(graph.nodes)):
            if not is_op(node, aten.slice_scatter.default) or not node.users:
                continue
            dim = int(argument(node, 2, "dim", 0)) % len(shape(node))
            writes = tiles(node, dim)
            if writes is not None and all(_fits(w) for w in writes):
                yield Match(node, captures={"writes": writes, "dim": dim})

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        parts = []
        with graph.inserting_before(node):
            for write in match["writes"]:
                source = write.source
                have, want = shape(source), shape(write.like)
                if not same_shape(have, want):
                    lead = len(want) - len(have)
                    sizes = [
                        -1 if i >= lead and known_equal(have[i - lead], size) else size
                        for i, size in enumerate(want)
                    ]
                    source = _emit(graph, aten.expand.default, (source, sizes), {}, node, ctx)
                if dtype(source) != dtype(node):
                    kind = {"dtype": dtype(node)}
                    source = _emit(graph, aten._to_copy.default, (source,), kind, node, ctx)
                parts.append(source)
            dim = match["dim"]
            if match["writes"][0].step == 1:
                joined = _emit(graph, aten.cat.default, (parts, dim), {}, node, ctx)
            else:

                def make(target: Any, *args: Any) -> fx.Node:
                    return _emit(graph, target, args, {}, node, ctx)

                pairs = make(aten.stack.default, parts, dim + 1)
                sizes = view_sizes(shape(node), parts[0], make)
                joined = make(aten.view.default, pairs, sizes)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _emit(
    graph: fx.Graph, target: Any, args: Any, kwargs: Any, like: fx.Node, ctx: PassContext
) -> fx.Node:
    return emit(graph, target, args, kwargs, like=like, fake_mode=ctx.fake_mode)


def tiles(node: fx.Node, dim: int) -> list[Write] | None:
    """The writes of a ``slice_scatter`` chain along ``dim``, in order, if they tile it."""
    size = shape(node)[dim]
    if not isinstance(size, int):
        return None
    found: dict[tuple[int, int, int], Write] = {}
    covered = 0
    link: Any = node
    while covered < size and is_op(link, aten.slice_scatter.default):
        rank = len(shape(link))
        bounds = [argument(link, i, k) for i, k in ((3, "start"), (4, "end"), (5, "step"))]
        if int(argument(link, 2, "dim", 0)) % rank != dim:
            return None
        if not all(isinstance(x, (int, type(None))) for x in bounds):
            return None
        start, end, step = slice(*bounds).indices(size)
        if (start, end, step) not in found and end > start:  # else a later link wrote over it
            source = link.args[1]
            like = source
            if is_op(source, aten.copy.default):
                like, source = source.args[:2]
            if not is_tensor(source):
                return None
            found[start, end, step] = Write(start, end, step, source, like)
            covered += len(range(start, end, step))
        link = link.args[0]
    writes = sorted(found.values(), key=lambda w: w.start)
    if any(w.step != 1 for w in writes):
        # The teeth of one comb: as many as the step is wide, each to the end, all of one length.
        teeth = len(writes)
        combed = [(i, size, teeth) for i in range(teeth)]
        whole = [(w.start, w.end, w.step) for w in writes] == combed and size % teeth == 0
        return writes if whole else None
    ends = [0, *(w.end for w in writes)]
    if ends[-1] != size or any(w.start != end for w, end in zip(writes, ends)):
        return None
    return writes


def _fits(write: Write) -> bool:
    """Whether the source can be spelt in the shape of what it is written to."""
    have, want = shape(write.source), shape(write.like)
    lead = len(want) - len(have)
    return lead >= 0 and all(
        isinstance(size, int) or (i >= lead and known_equal(have[i - lead], size))
        for i, size in enumerate(want)
    )
