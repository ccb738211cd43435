"""Raise MLPs: two or three linears around an activation become one dialect op.

    down(act(gate(x)) * up(x))      -> gated_mlp, or gated_mlp_merged for one gate_up linear
    down(act(up(x)))                -> mlp

The activation is recognised by what it computes, not by how it is spelt: the pointwise
program between the linears is run in float64 on a grid and compared with the dialect's
activations, so that ``x * sigmoid(x)``, the many tanh-GELUs and ``square(relu(x))`` all count,
the factors stand in either order, and a clamp or a multiplier is never overlooked.

Conditions: everything between the linears is pointwise and used by nothing else; gate and up
share their input; the function of (gate, up) is ``act(gate) * up``. A merged linear whose
halves are swapped or interleaved becomes `gated_mlp` over slices (views) of its weight.

Worth: the activation joins the products as prologue or epilogue, and at decode the whole
block can be one or two kernels. If the code computes the activation in float32 between
low-precision linears, so does the op (``compute_fp32``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dspark_compile.ops.mlp import ACTIVATIONS
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.features import Features
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    is_dialect_op,
    is_op,
    is_tensor,
    module_classes,
    same_shape,
    shape,
)
from dspark_compile.passes.pointwise import COPIES, Pointwise, close, pointwise_before

MLP_CLASS = re.compile(r"(MLP|Mlp|FeedForward|FFN|DenseReluDense)\d*$")
_MOVES = (aten.slice.Tensor, aten.select.int, aten.squeeze.dim, *VIEWS)


@dataclass(frozen=True)
class Branch:
    """A leaf of the pointwise program: columns of one linear's result."""

    linear: fx.Node
    start: int
    stop: int
    step: int

    @property
    def whole(self) -> bool:
        return (self.start, self.step) == (0, 1) and self.stop == shape(self.linear)[-1]


class RaiseMLP(Pass):
    """See the module's docstring."""

    name = "raise_mlp"
    kind = "mlp"
    stage = "raise"

    def __init__(self) -> None:
        self.features = Features()
        self._known: dict[Any, tuple[str, int] | None] = {}

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if not is_dialect_op(node, "linear") or not node.users:
                continue
            program = program_before(node)
            if program is None:
                continue
            branches = [self.branch(leaf) for leaf in program.leaves]
            found = [b for b in branches if b is not None]
            if not found:
                continue
            captures = {"program": program, "branches": branches}
            match = Match(node, [*program.nodes], captures)
            if len(found) == len(branches) <= 2:
                activation = self.activation(program)
                match.captures["activation"] = activation
                if activation is None and len(branches) == 1 and self._linear_map(program):
                    continue
                yield match
            elif any(MLP_CLASS.search(c) for c in module_classes(node)[-3:]):
                match.captures["problem"] = _foreign_leaf(program, branches)
                yield match

    def branch(self, leaf: fx.Node) -> Branch | None:
        """The linear that ``leaf`` is columns of."""
        term = self.features.plain(leaf)
        if term is None or term.sign.ndim != 1 or (term.sign != 1).any():
            return None
        if (term.source != term.source[0]).any():
            return None
        linear = self.features.sources[int(term.source[0])][0]
        if not is_dialect_op(linear, "linear"):
            return None
        index = term.index
        step = int(index[1] - index[0]) if len(index) > 1 else 1
        start = int(index[0])
        if step < 1 or not (index == start + step * np.arange(len(index))).all():
            return None
        stop = start + step * (len(index) - 1) + 1
        return Branch(linear, start, stop if step == 1 else min(stop, shape(linear)[-1]), step)

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        problem = match.captures.get("problem")
        if problem is not None:
            return problem
        program: Pointwise = match["program"]
        branches: list[Branch] = match["branches"]
        if len(branches) == 2 and branches[0].linear.args[0] is not branches[1].linear.args[0]:
            return Problem(
                "gate and up have different inputs", "feed both the same tensor", program.root
            )
        if match["activation"] is None:
            what = "the activation" if len(branches) == 1 else "act(gate) * up, with act"
            known = ", ".join(sorted(set(ACTIVATIONS) - {"identity"}))
            return Problem(
                f"between the linears is not {what} one of {known}",
                "multipliers and clamps belong outside the block",
                program.root,
            )
        for leaf, branch in zip(program.leaves, branches, strict=True):
            outside = _used_outside(leaf, branch, program)
            if outside is not None:
                inner, user = outside
                return Problem(
                    f"the intermediate {inner.name} is also used by {user.name}", "", inner
                )
        for inner in program.nodes:
            users = [u for u in inner.users if u not in program.nodes and u is not match.anchor]
            if users:
                return Problem(
                    f"the intermediate {inner.name} is also used by {users[0].name}", "", inner
                )
        sizes = {shape(leaf)[-1] for leaf in program.leaves} | {shape(match.anchor.args[0])[-1]}  # type: ignore[arg-type]
        if len(sizes) != 1:
            return Problem("gate and up differ in size", "", program.root)
        if not same_shape(shape(branches[0].linear.args[0])[:-1], shape(match.anchor)[:-1]):  # type: ignore[arg-type]
            return Problem("the leading dimensions change between the linears", "", program.root)
        return None

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        node = match.anchor
        graph.inserting_before(node)
        branches: list[Branch] = match["branches"]
        name, gate_index = match["activation"]
        low = dtype(node).itemsize < 4
        wide = low and any(dtype(n).itemsize >= 4 for n in match["program"].nodes)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=node, fake_mode=ctx.fake_mode)

        def rows(tensor: Any, branch: Branch) -> Any:
            if tensor is None or branch.whole:
                return tensor
            step = () if branch.step == 1 else (branch.step,)
            return make(aten.slice.Tensor, tensor, 0, branch.start, branch.stop, *step)

        def parts(branch: Branch) -> tuple[Any, Any]:
            linear = branch.linear
            return rows(linear.args[1], branch), rows(argument(linear, 2, "bias"), branch)

        x, down = branches[0].linear.args[0], node.args[1]
        down_bias = argument(node, 2, "bias")
        tail = (name, True) if wide else (name,)
        if len(branches) == 1:
            up, up_bias = parts(branches[0])
            new = make(dialect("mlp"), x, up, down, up_bias, down_bias, *tail)
        else:
            gate, up = branches[gate_index], branches[1 - gate_index]
            merged = gate.linear is up.linear
            size = shape(gate.linear)[-1]
            halves = (gate.start, gate.stop, up.start, up.stop) == (0, size // 2, size // 2, size)
            if merged and halves and gate.step == up.step == 1:
                weight, bias = gate.linear.args[1], argument(gate.linear, 2, "bias")
                new = make(dialect("gated_mlp_merged"), x, weight, down, bias, down_bias, *tail)
            else:
                (w, b), (v, c) = parts(gate), parts(up)
                new = make(dialect("gated_mlp"), x, w, v, down, b, c, down_bias, *tail)
        node.replace_all_uses_with(new)
        ctx.raised("mlp", new)

    # -- the activation -----------------------------------------------------------------------

    def activation(self, program: Pointwise) -> tuple[str, int] | None:
        """``(name, which leaf is the gate)`` of what the program computes."""
        key = program.structure()
        if key not in self._known:
            self._known[key] = _recognise(program)
        return self._known[key]

    def _linear_map(self, program: Pointwise) -> bool:
        """Whether one leaf is only scaled (no activation: not an MLP)."""
        x = torch.tensor([-3.0, -1.0, 0.5, 2.0, 7.0], dtype=torch.float64)
        y = program.evaluate([x])
        return y is not None and bool(torch.allclose(y / x, (y / x)[0].expand_as(x)))


def program_before(down: fx.Node) -> Pointwise | None:
    """The pointwise program that ends in ``down``'s input; None if there is none."""
    root = down.args[0]
    if not is_tensor(root):
        return None
    assert isinstance(root, fx.Node)
    program = pointwise_before(root)
    trivial = all(is_op(n, *COPIES) for n in program.nodes)
    return None if trivial or program.too_large else program


def _grid() -> Tensor:
    near = torch.linspace(-12, 12, 193, dtype=torch.float64)
    far = torch.tensor([16.0, 20.5, 40.0, 88.0, 300.0, 3e3, 3e4], dtype=torch.float64)
    return torch.cat((near, far, -far))


def _recognise(program: Pointwise) -> tuple[str, int] | None:
    grid = _grid()
    if len(program.leaves) == 1:
        name = _name_of(program.evaluate([grid]), grid)
        return None if name in (None, "identity") else (name, 0)  # type: ignore[return-value]
    gate = grid[:, None]
    up = torch.tensor([1.0, -3.7, -1.0, -0.25, 0.5, 2.0, 50.0, 3e3], dtype=torch.float64)
    for index in (0, 1):
        pair = [gate.expand(-1, len(up)), up.expand(len(gate), -1)]
        out = program.evaluate(pair if index == 0 else pair[::-1])
        if out is None:
            return None
        name = _name_of(out[:, 0], grid)
        if name is not None and close(out, out[:, :1] * up):
            return name, index
    return None


def _name_of(out: Tensor | None, x: Tensor) -> str | None:
    if out is None:
        return None
    return next((name for name, f in ACTIVATIONS.items() if close(out, f(x))), None)


# -- the surroundings -----------------------------------------------------------------------------


def _used_outside(
    leaf: fx.Node, branch: Branch, program: Pointwise
) -> tuple[fx.Node, fx.Node] | None:
    """``(node, user)`` where something beside the program uses what the block hides."""
    inside = {*program.nodes}
    node = leaf
    path = {leaf}
    while node is not branch.linear:
        node = node.args[0]  # type: ignore[assignment]
        path.add(node)
    for item in path:
        for user in item.users:
            leads = user in inside or user in path or _leads_to(user, program.leaves)
            if not leads:
                return item, user
    return None


def _leads_to(node: fx.Node, leaves: list[fx.Node], depth: int = 4) -> bool:
    """Whether all that comes of ``node`` are leaves."""
    if node in leaves:
        return True
    if depth == 0 or not is_op(node, *_MOVES, *COPIES) or not node.users:
        return False
    return all(_leads_to(user, leaves, depth - 1) for user in node.users)


def is_of_inputs(node: fx.Node, depth: int = 6) -> bool:
    """Whether a few operations on inputs of the graph alone compute ``node``."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr")
    return depth > 0 and all(is_of_inputs(n, depth - 1) for n in node.all_input_nodes)


def _foreign_leaf(program: Pointwise, branches: list[Branch | None]) -> Problem:
    for leaf, branch in zip(program.leaves, branches, strict=True):
        if branch is None and shape(leaf) != shape(program.root) and is_of_inputs(leaf):
            return Problem(
                "the activation has parameters of its own",
                "only fixed activations are in the dialect",
                leaf,
            )
        if branch is None:
            what = str(leaf.target) if leaf.op == "call_function" else f"the input {leaf.name}"
            return Problem(
                f"between the linears stands {what}, which is no pointwise function of them",
                "only an activation and a product may stand there",
                leaf,
            )
    return Problem(f"{len(branches)} linears meet before the last one", "", program.root)
