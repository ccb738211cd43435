"""Write in place: an append whose result goes back to the same input mutates it.

Functional tracing leaves ``new = cache_append(cache, …)`` and, at the end,
``copy_(cache, new)``. When nothing reads the old cache after the append, both become one
``cache_append_(cache, …)`` and readers of ``new`` read ``cache``. The op may append to the view
``[B, H, N, D]`` of an input ``[B, N, H, D]``, whose own form is copied back then. This is the last
rewrite before lowering's: matching is done on functional ops only. Worth a copy of the
whole cache a step where the inner compiler would not have found it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import aten, emit, is_dialect_op, is_op, order, readers
from dspark_compile.passes.raise_cache import SWAP


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
            copies = [written[x] for r in results for x in (r, *swapped(r)) if x in written]
            if copies:
                yield Match(node, [*results, *copies], {"results": results, "copies": copies})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node, results, copies = match.anchor, match["results"], match["copies"]
        wanted = list(node.args[: 1 if is_dialect_op(node, "cache_append") else 2])
        if len(results) != len(wanted) or len(copies) != len(wanted):
            return Problem("only a part of the cache's update is written back")
        position = order(node.graph)
        for view, result, copy in zip(wanted, results, copies, strict=True):
            cache = written_input(view)
            if cache is None:
                return Problem("the cache that is written is not an input of the graph")
            if copy.args[1] not in ([result] if view is cache else swapped(result)):
                return Problem("what is written back lies otherwise than the cache")
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
            whole = written_input(cache)
            for form in swapped(result) if whole is not cache else []:
                form.replace_all_uses_with(whole)  # type: ignore[arg-type]
                graph.erase_node(form)
            result.replace_all_uses_with(cache)
            if result is not node:
                graph.erase_node(result)
        graph.erase_node(node)
        ctx.report.rename_site(node.name, write.name, name)


def written_input(view: Any) -> fx.Node | None:
    """The input that an append to ``view`` writes: itself, or with heads and tokens swapped."""
    if is_op(view, aten.permute.default) and list(view.args[1]) == SWAP:
        view = view.args[0]
    return view if isinstance(view, fx.Node) and view.op == "placeholder" else None


def swapped(node: fx.Node) -> list[fx.Node]:
    """Nodes that are ``node`` with heads and tokens swapped."""
    return [u for u in node.users if is_op(u, aten.permute.default) and list(u.args[1]) == SWAP]  # type: ignore[call-overload]
