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
        # What an append op that was in place itself wrote back has an alias in between.
        for node in list(graph.nodes):
            if is_op(node, aten.copy_.default) and is_op(node.args[1], aten.alias.default):
                alias = node.args[1]
                node.args = (node.args[0], alias.args[0], *node.args[2:])
                if not alias.users:
                    graph.erase_node(alias)
        written = {n.args[1]: n for n in graph.nodes if is_op(n, aten.copy_.default)}
        for node in list(graph.nodes):
            if is_dialect_op(node, "cache_append"):
                results = [node]
            elif is_dialect_op(node, "cache_append_int8"):
                items = {u.args[1]: u for u in node.users}
                results = [items[i] for i in sorted(items)]
            else:
                continue
            copies = [written[r] for r in results if r in written]
            if copies:
                yield Match(node, [*results, *copies], {"results": results, "copies": copies})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node, results, copies = match.anchor, match["results"], match["copies"]
        wanted = list(node.args[: 1 if is_dialect_op(node, "cache_append") else 2])
        if len(results) != len(wanted) or len(copies) != len(wanted):
            return Problem("only a part of the cache's update is written back")
        position = order(node.graph)
        for cache, copy in zip(wanted, copies, strict=True):
            if not isinstance(cache, fx.Node) or cache.op != "placeholder":
                return Problem("the cache that is written is not an input of the graph")
            if copy.args[0] is not cache:
                return Problem("the result of appending to one tensor is written to another")
            if copy.users:
                return Problem("the written cache is used again")
            for user in readers(cache):  # through views too
                if user not in (copy, node) and position[user] > position[node]:
                    return Problem(f"the old cache is still read by {user}", node=user)
        match.captures["caches"] = wanted
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, caches = match.anchor, match["caches"]
        name = "cache_append_" if len(caches) == 1 else "cache_append_int8_"
        for copy in match["copies"]:
            graph.erase_node(copy)
        with graph.inserting_before(node):
            write = emit(graph, dialect(name), node.args, like=node, fake_mode=ctx.fake_mode)
        for result, cache in zip(match["results"], caches, strict=True):
            result.replace_all_uses_with(cache)
            if result is not node:
                graph.erase_node(result)
        graph.erase_node(node)
        ctx.report.rename_site(node.name, write.name, name)
