"""Prove what an attention mask means: from the subgraph that builds it to a predicate.

`MaskProver.prove(node, (B, H, M, N))` reads the functional ATen graph behind a mask operand
and returns a `MaskProof`, text in the language of `dspark_compile.ops.predicate` with the
nodes behind its names, or `Unproved` with the node and reason that stood in the way.

    mask_formulas    what can be said of one element: and, or, not, integer comparisons
    mask_numbers     numbers of elements: ranges, comparisons, casts, arithmetic
    mask_values      the interpreter, which asks a node for its element at ``(b, h, q, k)``
    mask_ops         what ops mean that compute, element by element
    mask_index_ops   what ops mean that move elements
    mask_text        formulas as predicates, and as a summary for people

Nothing is assumed:

- A node whose op is not understood becomes a leaf tensor, as long as one element does not
  depend on both q and k: such a tensor is as large as the mask and nothing is gained. A
  buffer named ``bias`` that happens to be lower triangular is such a leaf; it is
  recognised only if the caller hands over its values (``constants``) and guards them.
- Sizes are compared by what the shape environment already knows. No guard is added.
- Float arithmetic is followed only where it is exact or only its sign is asked.
- Integers are taken as unbounded in int32 and int64; arithmetic in narrower types wraps
  in earnest and is not followed.

Additive masks give ``mask_value`` V. Where several of them forbid the same key the graph
holds 2V, or -inf after overflow, and the proof says V with ``exact=False``. A row with at
least one allowed key is the same either way: exp(V - top) is 0 already (|V| >= 1e4). A row
with none averages over all keys instead of those forbidden once; such rows are padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sympy import Expr, Integer
from torch import fx

# Imported to register what ops mean.
from dspark_compile.passes import mask_index_ops, mask_ops  # noqa: F401
from dspark_compile.passes.graph import argument, aten, is_tensor, known_equal, order
from dspark_compile.passes.mask_formulas import (
    FALSE,
    INDICES,
    TRUE,
    Cmp,
    Formula,
    K,
    Load,
    Q,
    Unknown,
    atoms,
    conj,
    disj,
    negate,
)
from dspark_compile.passes.mask_numbers import INF, Real, rounded
from dspark_compile.passes.mask_text import Printer, summary
from dspark_compile.passes.mask_values import (
    Interpreter,
    band_of,
    recorded,
    shape_env_of,
    size_expr,
)


@dataclass(frozen=True)
class MaskProof:
    """What a mask means. See `dspark_compile.ops.attention` for how ops read the fields.

    Attributes:
        predicate: text in the language of ``ops/predicate.py``; "" allows everything.
        tensors: the nodes behind ``t0, t1, ...``.
        ints: the SymInt nodes or numbers behind ``n0, n1, ...``.
        mask_value: what is added to a forbidden key's score; None forbids it for good.
        bias: an additive float tensor that remains beside the predicate, or None.
        kind: a summary for people: "causal+sliding(512)", "causal+padding", "predicate".
        exact: False if fully masked rows may differ (see the module's docstring).
        constants: the nodes whose given values were used; the caller guards them.
    """

    predicate: str
    tensors: tuple[fx.Node, ...]
    ints: tuple[fx.Node | int, ...]
    mask_value: float | None
    bias: fx.Node | None
    kind: str
    exact: bool = True
    constants: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Unproved:
    """Why a mask stays a tensor, and the node that stood in the way."""

    reason: str
    node: fx.Node


@dataclass(frozen=True)
class _Split:
    """An additive mask taken apart: forbidden where ``allowed`` is false, plus ``bias``."""

    allowed: Formula | None  # None: nothing was understood, all is bias
    value: float = -INF
    bias: fx.Node | None = None
    exact: bool = True


class MaskProver:
    """Proofs for the masks of one graph, each made once (all layers share them).

    ``constants`` gives the values of placeholders or attributes that the caller will guard.
    Proofs name nodes: they hold as long as those nodes do. At most, ``prove`` adds
    ``sym_size`` nodes, where a size it needs has none.
    """

    def __init__(
        self,
        graph: fx.Graph | fx.GraphModule,
        constants: Mapping[fx.Node, torch.Tensor] | None = None,
    ) -> None:
        self.graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
        self.constants = dict(constants or {})
        self._leaves: dict[fx.Node, int] = {}
        self._proofs: dict[Any, MaskProof | Unproved] = {}
        self._runs: dict[Any, Interpreter] = {}

    def prove(self, node: fx.Node, score_shape: Sequence[Any]) -> MaskProof | Unproved:
        """What the mask ``node``, broadcast to ``score_shape = (B, H, M, N)``, means."""
        try:
            shape = tuple(size_expr(s) for s in score_shape)
        except Unknown as error:
            return Unproved(error.reason, node)
        key = (node, shape)
        if self._stale():
            self._proofs.clear()
            self._runs.clear()
            self._leaves.clear()
        if key not in self._proofs:
            run = self._runs.get(shape)
            if run is None:
                run = self._runs[shape] = Interpreter(score_shape, self.constants, self._leaves)
            try:
                self._proofs[key] = self._prove(node, run)
            except Unknown as error:
                self._proofs[key] = Unproved(error.reason, error.node or node)
            except RecursionError:
                self._proofs[key] = Unproved("the mask's subgraph is too deep", node)
        return self._proofs[key]

    def _stale(self) -> bool:
        """Whether a rewrite has erased a node that a proof names or may name."""
        named: list[Any] = list(self._leaves)
        for proof in self._proofs.values():
            if isinstance(proof, MaskProof):
                named += [*proof.ints, proof.bias]
        return any(isinstance(n, fx.Node) and n._erased for n in named)

    def _prove(self, node: fx.Node, run: Interpreter) -> MaskProof:
        tensor = recorded(node)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > 4:
            raise Unknown("is not a tensor of up to four dimensions", node)
        self._check_mutation(node)
        if run.shape_env is None:
            run.shape_env = shape_env_of(tensor.shape)
        # M = 1 makes q the constant 0, and so on.
        point = tuple(
            Integer(0) if known_equal(s, 1) else i for i, s in zip(INDICES, run.shape, strict=True)
        )
        index = run.broadcast(tensor.shape, point, run.shape)
        run.used_constants.clear()
        if tensor.dtype == torch.bool:
            allowed = run.value(node, index)
            assert not isinstance(allowed, tuple)
            return self._proof(node, run, _Split(allowed))
        if not tensor.dtype.is_floating_point:
            raise Unknown(f"is an attention mask of {tensor.dtype}", node)
        try:
            split = self._additive(run, node, index)
        except Unknown as error:
            split = self._take_apart(run, node, point)
            if split.allowed is None or split.bias is None:
                raise error
        return self._proof(node, run, split)

    def _additive(self, run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> _Split:
        """A float mask whose values are 0 and V (and sums of Vs)."""
        value = run.value(node, index)
        assert isinstance(value, tuple)
        allowed: Formula = FALSE
        forbidden: list[float] = []
        for condition, number in value:
            assert isinstance(number, Real)
            if number.part != 0 or math.isnan(number.const) or number.const > 0:
                raise Unknown("adds values that are neither 0 nor a negative constant", node)
            if number.const == 0:
                allowed = disj(allowed, condition)
            else:
                forbidden.append(number.const)
        if not forbidden:
            return _Split(allowed)
        top = max(forbidden)
        dtype = recorded(node).dtype
        sums = {rounded(n * top, dtype) for n in (1, 2, 3, 4)}
        if not set(forbidden) <= sums or (len(forbidden) > 1 and top > -1e4):
            values = ", ".join(f"{v:g}" for v in sorted(forbidden))
            raise Unknown(f"adds several values to forbidden keys: {values}", node)
        return _Split(allowed, top, None, len(set(forbidden)) == 1)

    def _take_apart(self, run: Interpreter, node: fx.Node, point: tuple[Expr, ...]) -> _Split:
        """``mask + bias``, ``where(mask, bias, V)``: a predicate, and an existing node."""
        whole = _Split(None, bias=node)
        try:
            index = run.broadcast(recorded(node).shape, point, run.shape)
            return self._additive(run, node, index)
        except Unknown:
            pass
        packet = getattr(node.target, "overloadpacket", None)
        if packet in (aten.expand, aten.clone, aten.alias, aten.detach, aten.slice):
            source: Any = node.args[0]
            same = len(recorded(source).shape) == len(recorded(node).shape)
            if packet is aten.slice:
                same = same and all(map(known_equal, recorded(source).shape, recorded(node).shape))
            return self._take_apart(run, source, point) if same else whole
        if packet is aten.add and argument(node, 2, "alpha", 1) == 1:
            a, b = argument(node, 0, "self"), argument(node, 1, "other")
            if not (is_tensor(a) and is_tensor(b)):
                return whole
            if any(recorded(x).dtype != recorded(node).dtype for x in (a, b)):
                return whole
            first, second = (self._take_apart(run, x, point) for x in (a, b))
            if first.allowed is None:
                first, second = second, first
            if first.allowed is None or (first.bias is not None and second.bias is not None):
                return whole
            if second.allowed is None:
                return _Split(first.allowed, first.value, second.bias, first.exact)
            if first.value == second.value:
                overlap = disj(first.allowed, second.allowed) != TRUE
                exact = first.exact and second.exact and (first.value == -INF or not overlap)
                return _Split(
                    conj(first.allowed, second.allowed),
                    first.value,
                    first.bias or second.bias,
                    exact,
                )
            return whole
        if packet in (aten.where, aten.masked_fill) and len(node.args) == 3:
            fill_first = packet is aten.masked_fill
            condition = node.args[1] if fill_first else node.args[0]
            kept, value = (node.args[0] if fill_first else node.args[1]), node.args[2]
            if not isinstance(kept, fx.Node) or not is_tensor(kept):
                return whole
            dtype = recorded(node).dtype
            if recorded(kept).dtype != dtype:
                return whole
            try:
                index = run.broadcast(recorded(node).shape, point, run.shape)
                allowed = run.formula(condition, node, index)
                fill = run.operand(value, node, index, dtype)
            except Unknown:
                return whole
            assert isinstance(fill, tuple)
            if len(fill) != 1 or not isinstance(fill[0][1], Real) or fill[0][1].part != 0:
                return whole
            v = fill[0][1].const
            if not v <= -1e4:
                return whole
            rest = self._take_apart(run, kept, point)
            if rest.allowed is not None and rest.value != v:
                return whole
            return _Split(
                conj(negate(allowed) if fill_first else allowed, rest.allowed or TRUE),
                v,
                rest.bias,
                v == -INF and rest.exact,
            )
        return whole

    def _proof(self, node: fx.Node, run: Interpreter, split: _Split) -> MaskProof:
        place = order(self.graph)
        formula = split.allowed
        assert formula is not None
        if split.bias is not None:
            run.broadcast(recorded(split.bias).shape, INDICES, run.shape)
        loads: set[Expr] = set()
        symbols: set[Expr] = set()
        for atom in atoms(formula):
            loads |= atom.atoms(Load)
            symbols |= atom.free_symbols - set(INDICES)
        nodes = {number: leaf for leaf, number in self._leaves.items()}
        numbers = sorted({int(a.args[0]) for a in loads}, key=lambda i: place[nodes[i]])
        sizes = sorted(symbols, key=lambda s: (len(str(s)), str(s)))
        printer = Printer(
            {number: f"t{i}" for i, number in enumerate(numbers)},
            {symbol: f"n{i}" for i, symbol in enumerate(sizes)},
        )
        value = None if split.value == -INF else split.value
        kind = summary(formula) + ("" if split.bias is None else "+bias")
        return MaskProof(
            "" if formula == TRUE else printer.formula(formula),
            tuple(nodes[i] for i in numbers),
            tuple(self._size_node(s, node, place) for s in sizes),
            None if formula == TRUE else value,
            split.bias,
            kind,
            split.exact,
            tuple(run.used_constants),
        )

    def _size_node(self, symbol: Expr, mask: fx.Node, place: Mapping[fx.Node, int]) -> fx.Node:
        """A node before ``mask`` that holds the size ``symbol``."""
        source = None
        for node in self.graph.nodes:
            if place[node] > place[mask]:
                break
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return node
            if source is None and isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                        source = (node, dim, size)
                        break
        if source is None:
            raise Unknown(f"no tensor has the size {symbol} that the mask depends on", mask)
        node, dim, size = source
        after = node
        while after.next.op == "placeholder":
            after = after.next
        with self.graph.inserting_after(after):
            made = self.graph.call_function(aten.sym_size.int, (node, dim))
        made.meta["val"] = size
        return made

    def _check_mutation(self, mask: fx.Node) -> None:
        """Refuse masks whose inputs are written before the mask's last use: leaves are read
        there. In a functional graph only the final ``copy_`` into an input is left."""
        place = order(self.graph)
        written: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
            if schema is None or not schema.is_mutable:
                continue
            for parameter, value in zip(schema.arguments, node.args):
                if parameter.alias_info is None or not parameter.alias_info.is_write:
                    continue
                while isinstance(value, fx.Node):
                    written.setdefault(value, node)
                    inner = getattr(value.target, "_schema", None)
                    is_view = (
                        inner is not None and inner.arguments and inner.arguments[0].alias_info
                    )
                    value = value.args[0] if is_view and value.args else None
        if not written:
            return
        last = max((place[u] for u in mask.users), default=place[mask])
        seen: set[fx.Node] = set()
        stack = [mask]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in written and place[written[node]] <= last:
                raise Unknown(f"is written in place by {written[node].name}", node)
            stack.extend(node.all_input_nodes)


def prove(
    node: fx.Node,
    score_shape: Sequence[Any],
    constants: Mapping[fx.Node, torch.Tensor] | None = None,
) -> MaskProof | Unproved:
    """`MaskProver.prove` for a single mask."""
    return MaskProver(node.graph, constants).prove(node, score_shape)


def recognise_constant(tensor: torch.Tensor) -> str | None:
    """The predicate over ``q, k`` that a 0-1 tensor ``[..., q, k]`` equals, element by
    element, or None: ``tril(ones(n, n))`` is ``"k <= q"``, ``ones`` is ``""``."""
    band = band_of(tensor)
    if band is None:
        return None
    low, high = band
    parts = []
    if high is not None:
        parts.append(Cmp("<=", frozenset({(K, 1), (Q, -1)}), -high))
    if low is not None:
        parts.append(Cmp("<=", frozenset({(K, -1), (Q, 1)}), low))
    formula = conj(*parts)
    return "" if formula == TRUE else Printer({}, {}).formula(formula)
