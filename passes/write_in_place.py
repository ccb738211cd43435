"""Write in place: an append whose result goes back to the same input mutates it.

Functional tracing leaves ``new = cache_append(cache, …)`` and, at the end,
``copy_(cache, new)``. When nothing reads the old cache after the append, both become one
``cache_append_(cache, …)`` and readers of ``new`` read ``cache``. This is the last
rewrite before lowering's: matching is done on functional ops only. Worth a copy of the
whole cache a step where the inner compiler would not have found it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import aten, emit, is_dialect_op, is_op, order, readers


class WriteInPlace(Pass):
    """See the module's docstring."""

    name = "write_in_place"
    kind = "cache"
    stage = "finish"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_op(node, aten.copy_.default):
                cache, new = node.args[0], node.args[1]
                if is_dialect_op(new, "cache_append") and cache.op == "placeholder":
                    yield Match(new, [node, new], {"cache": cache, "copy": node})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        new, cache, copy = match.anchor, match["cache"], match["copy"]
        if new.args[0] is not cache:
            return Problem("the result of appending to one tensor is written to another")
        if copy.users:
            return Problem("the written cache is used again")
        position = order(new.graph)
        late = [u for u in readers(cache) if u not in (copy, new) and position[u] > position[new]]
        if late:
            return Problem(f"the old cache is still read by {late[0]}", node=late[0])
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        new, cache, copy = match.anchor, match["cache"], match["copy"]
        graph.erase_node(copy)
        with graph.inserting_before(new):
            write = emit(
                graph,
                dialect("cache_append_"),
                (cache, new.args[1], new.args[2]),
                like=new,
                fake_mode=ctx.fake_mode,
            )
        new.replace_all_uses_with(cache)
        graph.erase_node(new)
        ctx.report.rename_site(new.name, write.name, "cache_append_")
