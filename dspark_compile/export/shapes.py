"""Views with constant sizes: most reshapes of a decoder keep leading dimensions.

``view(x [B, S, 64], [B, S, 4, 16])`` is ``Reshape(x, [0, 0, 4, 16])``: nothing has to compute B
and S. A view whose sizes are no such list stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dspark_compile.passes.graph import aten, is_op, known_equal

from .ops import op
from .program import Program


def constant_sizes(value: torch.Tensor, sizes: Any) -> list[int] | None:
    """``sizes`` of a view of ``value`` as Reshape takes them, None if they are not constant."""
    made: list[int] = []
    for i, size in enumerate(sizes):
        if isinstance(size, int) or (isinstance(size, torch.SymInt) and size.node.is_constant()):
            made.append(int(size))
        elif i < value.dim() and known_equal(size, value.shape[i]):
            made.append(0)
        else:
            made.append(-1)
    if made.count(-1) > 1:
        return None
    if any(size == 0 for size in value.shape):
        return None
    return made


def simplify_views(program: Program) -> None:
    """Give views constant sizes where that is possible; views of views become one."""
    for node in list(program.graph.nodes):
        if not is_op(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            continue
        x = node.args[0]
        sizes = constant_sizes(x.meta["val"], node.meta["val"].shape)
        if sizes is None:
            continue
        while is_reshape(x) and len(x.users) == 1:
            below = constant_sizes(x.args[0].meta["val"], node.meta["val"].shape)
            if below is None:
                break
            x, sizes = x.args[0], below
        program.replace(node, program.emit(node, op("reshape"), (x, sizes)))
    program.clean()


def is_reshape(node: Any) -> bool:
    """Whether a node is a reshape with constant sizes."""
    return isinstance(node, fx.Node) and node.target is op("reshape")
