"""Pointwise programs: what stands between two products, found and run as a function.

A program is recognised by its values: run in float64 on a grid and compared with the dialect's
activations, however it is spelt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import aten, dtype, is_op, is_tensor, same_shape, shape

COPIES = (aten._to_copy.default, aten.clone.default)
MAX_NODES = 40
# Pointwise without the tag.
_UNTAGGED = (aten.hardswish.default, aten.hardsigmoid.default)


@dataclass
class Pointwise:
    """The pointwise nodes before ``root``, itself among them, outermost first, and what they
    read."""

    root: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    leaves: list[fx.Node] = field(default_factory=list)

    @property
    def too_large(self) -> bool:
        """Whether it was not followed to its end."""
        return len(self.nodes) > MAX_NODES

    def evaluate(self, values: list[Tensor]) -> Tensor | None:
        """The program on float64 ``values`` for its leaves; None if it cannot be run so."""
        env: dict[fx.Node, Any] = dict(zip(self.leaves, values, strict=True))

        def value(node: fx.Node) -> Any:
            if node not in env:
                if is_op(node, *COPIES):
                    env[node] = value(node.args[0])  # type: ignore[arg-type]
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return env[node]

        try:
            return value(self.root)
        except (RuntimeError, TypeError, NotImplementedError):
            return None  # an op that takes no float64, or wants what is not a leaf

    def structure(self) -> Any:
        """A key that programs of the same structure share, so that equal ones are run once."""
        seen: dict[fx.Node, int] = {}

        def key(item: Any) -> Any:
            if isinstance(item, fx.Node):
                if item in self.leaves:
                    return ("leaf", self.leaves.index(item))
                if item in seen:
                    return ("again", seen[item])
                seen[item] = len(seen)
                return (str(item.target), key(item.args), key(item.kwargs))
            if isinstance(item, (list, tuple)):
                return tuple(key(v) for v in item)
            if isinstance(item, dict):
                return tuple((k, key(v)) for k, v in item.items())
            return repr(item)

        return (len(self.leaves), key(self.root))


def pointwise_before(
    root: fx.Node, stops: Callable[[fx.Node], bool] = lambda node: False
) -> Pointwise:
    """The pointwise program that ends in ``root``; what ``stops`` takes is a leaf."""
    program = Pointwise(root)

    def collect(node: fx.Node) -> None:
        if node in program.nodes or node in program.leaves or program.too_large:
            return
        if stops(node) or not _is_pointwise(node, root):
            program.leaves.append(node)
            return
        program.nodes.append(node)
        for below in node.all_input_nodes:
            collect(below)

    collect(root)
    return program


def _is_pointwise(node: fx.Node, root: fx.Node) -> bool:
    if node.op != "call_function" or not is_tensor(node):
        return False
    if not dtype(node).is_floating_point and dtype(node) != torch.bool:
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    pointwise = torch.Tag.pointwise in target.tags or is_op(node, *COPIES, *_UNTAGGED)
    return pointwise and same_shape(shape(node), shape(root))


def close(a: Tensor | None, b: Tensor) -> bool:
    """Whether two results are the same function's; what could not be run is not."""
    if a is None or a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= 1e-6 + 1e-6 * b.abs()).all())
