"""Prove masks: a mask tensor that is provably a predicate becomes one.

``passes/masks.py`` interprets the subgraph that builds a mask. What it proves moves from
attention's ``bias`` operand into its ``mask`` text (with the small tensors and numbers it
reads), so that a kernel computes it and no mask is loaded; what it cannot prove stays a
tensor operand, exactly as it was. Worth ``B * M * N`` bytes a layer, and what lets a
kernel skip blocks of keys.

``ctx.shared["mask_constants"]``, values of the graph's inputs, makes predicates of tables as well
(a lower triangle in a buffer). Those that were used are in ``ctx.shared["used_constants"]``: who
gave them sees to it that they stay.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem
from dspark_compile.passes.graph import is_dialect_op, shape
from dspark_compile.passes.masks import MaskProver, Unproved


class ProveMasks(Pass):
    """See the module's docstring."""

    name = "prove_masks"
    kind = "mask"
    stage = "raise"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        prover = MaskProver(graph, ctx.shared.get("mask_constants"))
        for node in list(graph.nodes):
            if is_dialect_op(node, "attention") and isinstance(node.args[3], fx.Node):
                yield Match(node, captures={"prover": prover})

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        node = match.anchor
        query, key = node.args[0], node.args[1]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        batch, heads, rows, _ = shape(query)
        proof = match["prover"].prove(node.args[3], (batch, heads, rows, shape(key)[2]))
        if isinstance(proof, Unproved):
            return Problem(
                proof.reason,
                "the mask stays a tensor operand; masks made of index comparisons are proved",
                proof.node if proof.node is not None else node,
            )
        if not proof.exact:
            return Problem(
                "several masks may forbid the same key, and a row that allows none would then "
                "average other keys than the sum of the masks does",
                "join the masks with & before they become numbers",
            )
        if node.kwargs.get("mask"):
            return Problem("attention has a predicate already")
        match.captures["proof"] = proof
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node, proof = match.anchor, match["proof"]
        args = list(node.args)
        args[3], args[5], args[6] = proof.bias, list(proof.tensors), list(proof.ints)
        node.args = tuple(args)
        kwargs = {**node.kwargs, "mask": proof.predicate}
        if proof.mask_value is not None:
            kwargs["mask_value"] = proof.mask_value
        node.kwargs = kwargs
        ctx.shared.setdefault("used_constants", set()).update(proof.constants)
        counts = ctx.shared.setdefault("mask_kinds", {})
        counts[proof.kind] = counts.get(proof.kind, 0) + 1

    def run(self, graph: fx.Graph, ctx: PassContext):  # type: ignore[no-untyped-def]
        record = super().run(graph, ctx)
        for kind, count in ctx.shared.get("mask_kinds", {}).items():
            ctx.report.note(f"masks proved: {count} × {kind}")
        return record
