"""What a product's kernel takes in of its neighbours: the norm in front, the addition behind."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from dspark_compile.passes.graph import aten, dialect_name, is_op
from dspark_compile.passes.turned_weights import of_turned

LINEARS = ("linear", "merged_linear")
MLPS = ("mlp", "gated_mlp", "gated_mlp_merged")
NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")


class Fusions:
    """Those of ``nodes``, which stand in the order in which they run.

    Attributes:
        residuals: for a product, what is added to its result.
        totals: for the node that adds, the product that computes it.
        prologues: for the node that products read, the norm in front.
    """

    def __init__(self, nodes: Sequence[fx.Node]):
        self.nodes = nodes
        self.order = {node: i for i, node in enumerate(nodes)}
        self.residuals: dict[fx.Node, fx.Node] = {}
        self.totals: dict[fx.Node, fx.Node] = {}
        self.prologues: dict[fx.Node, fx.Node] = {}
        self._find_residuals()
        self._find_prologues()

    def source(self, node: Any) -> Any:
        """``node`` with views that keep the last dimension taken off."""
        while (
            isinstance(node, fx.Node)
            and is_op(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default,
                      aten.unsqueeze.default, aten.squeeze.dim)
            and node in self.order
            and node.args[0].meta["val"].dim()
            and node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1]
        ):  # fmt: skip
            node = node.args[0]
        return node

    def _leaves(self, node: fx.Node) -> list[fx.Node] | None:
        """Users of ``node`` behind views that keep the last dimension; None if one is outside."""
        found: list[fx.Node] = []
        for user in node.users:
            if user not in self.order:
                return None
            if self.source(user) is not user:
                below = self._leaves(user)
                if below is None:
                    return None
                found += below
            else:
                found.append(user)
        return found

    def _find_residuals(self) -> None:
        """Additions whose one operand is a product that nothing else reads."""
        for node in self.nodes:
            plain = is_op(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1
            if not plain and dialect_name(node) not in ("add_rms_norm", "add_layer_norm"):
                continue
            operands = (node.args[0], node.args[1])
            for product, other in (operands, operands[::-1]):
                source = self.source(product)
                if not isinstance(other, fx.Node) or not isinstance(source, fx.Node):
                    continue
                if dialect_name(source) not in ("linear", *MLPS) or source in self.residuals:
                    continue
                if of_turned(source):  # its kernel takes nothing in
                    continue
                leaves = self._leaves(source)
                if leaves is None or len(leaves) != 1 or leaves[0] is not node:
                    continue
                a, b = product.meta["val"], other.meta["val"]
                if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
                    continue
                base = self.source(other)
                if base in self.order and self.order[base] > self.order[source]:
                    continue
                if any(
                    s is not source
                    and s in self.order
                    and dialect_name(s) == "linear"
                    and s.args[0] is source.args[0]
                    for s in source.args[0].users
                ):  # type: ignore[union-attr]
                    continue  # one of several products on one input
                self.residuals[source] = other
                self.totals[node] = source
                break

    def _find_prologues(self) -> None:
        """Norms that only products read."""
        for node in self.nodes:
            name = dialect_name(node)
            if name not in NORMS:
                continue
            added = name.startswith("add_")
            if added and node not in self.totals:
                continue
            result = node
            if added:
                parts = {u.args[1]: u for u in node.users if u.target is operator.getitem}
                if 0 not in parts or len(parts) != len(node.users):
                    continue
                result = parts[0]
            value = result.meta["val"]
            source = node.args[0].meta["val"]  # type: ignore[union-attr]
            if value.dtype != source.dtype or not isinstance(value.shape[-1], int):
                continue
            leaves = self._leaves(result)
            if not leaves or any(dialect_name(leaf) not in (*LINEARS, *MLPS) for leaf in leaves):
                continue
            if any(self.source(leaf.args[0]) is not result or of_turned(leaf) for leaf in leaves):
                continue
            products = {self.source(x.args[0]) if dialect_name(x) in LINEARS else x for x in leaves}
            if value.numel() > value.shape[-1] and len(products) > 1:
                continue  # several rows, several readers: once is cheaper
            self.prologues[result] = node
