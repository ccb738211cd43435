"""Products seen as einsum sees them: which axes of which tensors a result runs over.

A tensor's dimension is a run of axes, most often one; views, permutations and broadcasts move axes
around, products and sums match them and sum over them. `Axes.term` reads a node so:

    bmm(x.expand(E, T, K), w.mT)   ->   factors x [t, k] and w [e, f, k], result [e, t, f]

What is read are axes, not values: nothing is evaluated, and sizes may be symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from dspark_compile.passes.graph import (
    TRANSPARENT,
    VIEWS,
    argument,
    aten,
    dtype,
    is_dialect_op,
    is_op,
    is_tensor,
    known_equal,
    shape,
    val,
)


@dataclass(eq=False)
class Axis:
    """An axis; two that a product has matched are one (`Axes.same`), and one that it has matched
    with several (flat tokens with those of a batch) is these, its ``parts``."""

    size: Any
    twin: Axis | None = None
    parts: tuple[Axis, ...] = ()


# One run of axes for each dimension; a dimension of size 1 has none.
Dims = tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class Factor:
    """A tensor that a product is made of."""

    node: fx.Node
    dims: Dims


@dataclass(frozen=True)
class Term:
    """The product of ``factors``, summed over the axes that ``dims`` lack."""

    factors: tuple[Factor, ...]
    dims: Dims


class Axes:
    """Reads terms; one object for nodes that are compared with each other.

    Args:
        multiplies: which multiplications are factors; others are tensors of their own.
        whole: a tensor of its own, whatever computes it.
    """

    def __init__(
        self,
        multiplies: Callable[[fx.Node], bool] = lambda node: False,
        whole: fx.Node | None = None,
    ):
        self._multiplies, self._whole = multiplies, whole
        self._factors: dict[fx.Node, Factor] = {}
        self._terms: dict[fx.Node, Term] = {}

    # -- axes

    def same(self, axis: Axis) -> Axis:
        """What ``axis`` was matched with, the same for all that are one."""
        while axis.twin is not None:
            axis = axis.twin
        return axis

    def flat(self, dims: Dims) -> list[Axis]:
        """All axes, in order."""
        found: list[Axis] = []
        for axis in (self.same(a) for run in dims for a in run):
            found += self.flat((axis.parts,)) if axis.parts else [axis]
        return found

    def _match(self, a: tuple[Axis, ...], b: tuple[Axis, ...]) -> bool:
        left, right = self.flat((a,)), self.flat((b,))
        if len(left) != len(right):
            one, several = (left, right) if len(left) == 1 else (right, left)
            whole = math.prod(axis.size for axis in several)
            if len(one) != 1 or not several or not known_equal(whole, one[0].size):
                return False
            one[0].parts = tuple(several)
            return True
        for x, y in zip(left, right, strict=True):
            if x is not y:
                if not known_equal(x.size, y.size):
                    return False
                x.twin = y
        return True

    # -- terms

    def factor(self, node: fx.Node) -> Factor:
        """``node`` as a tensor of its own, one axis for each dimension that is not 1."""
        if node not in self._factors:
            dims = tuple(() if known_equal(n, 1) else (Axis(n),) for n in shape(node))
            self._factors[node] = Factor(node, dims)
        return self._factors[node]

    def term(self, node: fx.Node) -> Term:
        """``node`` as a product; one of a single factor where it is none that is known."""
        if node not in self._terms:
            found = None if node is self._whole else self._read(node)
            if found is None:
                factor = self.factor(node)
                found = Term((factor,), factor.dims)
            self._terms[node] = found
        return self._terms[node]

    def _read(self, node: fx.Node) -> Term | None:
        if node.op != "call_function" or not is_tensor(node):
            return None
        if is_op(node, *TRANSPARENT) or self._is_cast(node):
            return self.term(node.args[0])  # type: ignore[arg-type]
        if is_op(node, aten.permute.default):
            below = self.term(node.args[0])  # type: ignore[arg-type]
            return Term(below.factors, tuple(below.dims[d] for d in node.args[1]))  # type: ignore[union-attr,index]
        if is_op(node, aten.unsqueeze.default, aten.squeeze.dim, *VIEWS):
            below = self.term(node.args[0])  # type: ignore[arg-type]
            return self._viewed(below, shape(node))
        if is_op(node, aten.expand.default):
            below = self.term(node.args[0])  # type: ignore[arg-type]
            lead = ((),) * (val(node).dim() - len(below.dims))
            dims = tuple(
                run if run or known_equal(size, 1) else (Axis(size),)
                for run, size in zip((*lead, *below.dims), shape(node), strict=True)
            )
            return Term(below.factors, dims)
        if is_op(node, aten.bmm.default) or is_dialect_op(node, "matmul"):
            return self._product(node)
        if is_op(node, aten.mul.Tensor) and self._multiplies(node):
            return self._times(node)
        if is_op(node, aten.sum.dim_IntList) and not node.kwargs:
            below = self.term(node.args[0])  # type: ignore[arg-type]
            rank = len(below.dims)
            gone = {int(d) % rank for d in node.args[1]}  # type: ignore[union-attr,arg-type]
            kept = bool(argument(node, 2, "keepdim", False))
            dims = tuple(
                () if i in gone else run
                for i, run in enumerate(below.dims)
                if kept or i not in gone
            )
            summed = [a for i in gone for a in below.dims[i]]
            return Term(below.factors, dims) if gone and self._held(below.factors, summed) else None
        return None

    def _is_cast(self, node: fx.Node) -> bool:
        if not is_op(node, aten._to_copy.default):
            return False
        return dtype(node).is_floating_point and dtype(node.args[0]).is_floating_point  # type: ignore[arg-type]

    def _viewed(self, below: Term, sizes: tuple[Any, ...]) -> Term | None:
        axes, dims = self.flat(below.dims), []
        for size in sizes:
            run: list[Axis] = []
            covered: Any = 1
            while not known_equal(covered, size):
                if not axes:
                    return None
                run.append(axes.pop(0))
                covered = covered * run[-1].size
            dims.append(tuple(run))
        return None if axes else Term(below.factors, tuple(dims))

    def _product(self, node: fx.Node) -> Term | None:
        a, b = (self.term(x) for x in node.args[:2])  # type: ignore[arg-type]
        if len(a.dims) != len(b.dims) or len(a.dims) < 2:
            return None
        if not self._match(a.dims[-1], b.dims[-2]):
            return None
        lead = self._broadcast(a.dims[:-2], b.dims[:-2])
        factors = (*a.factors, *b.factors)
        if lead is None or not self._held(factors, a.dims[-1]):
            return None
        return Term(factors, (*lead, a.dims[-2], b.dims[-1]))

    def _held(self, factors: tuple[Factor, ...], axes: Iterable[Axis]) -> bool:
        """Whether some factor runs over each of ``axes``: a sum over what was only expanded to is
        a multiplication."""
        held = {a for factor in factors for a in self.flat(factor.dims)}
        return all(a in held for a in self.flat((tuple(axes),)))

    def _times(self, node: fx.Node) -> Term | None:
        if not all(is_tensor(x) for x in node.args[:2]):
            return None
        a, b = (self.term(x) for x in node.args[:2])  # type: ignore[arg-type]
        rank = max(len(a.dims), len(b.dims))
        left, right = (((),) * (rank - len(t.dims)) + t.dims for t in (a, b))
        dims = self._broadcast(left, right)
        return None if dims is None else Term((*a.factors, *b.factors), dims)

    def _broadcast(self, left: Dims, right: Dims) -> Dims | None:
        dims = []
        for a, b in zip(left, right, strict=True):
            if a and b and not self._match(a, b):
                return None
            dims.append(a or b)
        return tuple(dims)
