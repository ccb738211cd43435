"""Raise routers: logits, scores, choice and normalisation before experts -> ``moe_router``.

What turns logits into k weights and indices is recognised by what it computes, not by how it is
spelt: the code between the linear layer and the experts is run in float64 on random logits (and a
random correction), and compared with `ops.moe.route` under every setting that its numbers, views
and top-k calls suggest. Softmax before or after the top-k, sigmoid or the root of softplus, with a
correction that only the choice sees, group-limited (the best two of a group, or its best), with
any normalisation and factor, and SparseMixer, are one op so, whatever order code takes.

Conditions: weights and indices come of one linear layer's result and at most one vector of the
experts' number, by deterministic operations. A factor behind (one of each expert's own) stays
outside.

Worth: one kernel for what are ten to thirty small ones in a decode step.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.ops.moe import GROUP_SCORES, NORMALISATIONS, SCORINGS, route
from dspark_compile.passes.base import Match, Pass, PassContext, Problem, dialect
from dspark_compile.passes.graph import (
    VIEWS,
    argument,
    aten,
    dtype,
    emit,
    emit_getitem,
    is_dialect_op,
    is_op,
    is_tensor,
    peel_upcasts,
    same_shape,
    shape,
    val,
    view_sizes,
)

_MAX_NODES = 80
# Means and deviations of the logits that are tried. Some lie close together: SparseMixer counts
# those within 1 % of the best, which logits of a wide spread hardly ever are.
_LOGITS = ((0.0, 0.3), (1.0, 0.02), (0.0, 2.0), (-1.0, 0.02), (0.0, 8.0), (4.0, 0.01))
_MOVES = (aten._to_copy.default, aten.clone.default, aten.unsqueeze.default, *VIEWS)
_MAKERS = frozenset({"device", "pin_memory", "layout", "memory_format"})


@dataclass
class Region:
    """The code from logits to weights and indices.

    Attributes:
        weights, indices: its results.
        nodes: all of it, in order.
        logits: the linear layer.
        corrections: inputs besides the logits.
    """

    weights: fx.Node
    indices: fx.Node
    logits: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    corrections: list[fx.Node] = field(default_factory=list)


class RaiseMoERouter(Pass):
    """See the module's docstring."""

    name = "raise_moe_router"
    kind = "other"
    stage = "raise"

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, Any] | None] = {}

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        for node in list(graph.nodes):
            if is_dialect_op(node, "moe_experts"):
                yield self._match(node)

    def _match(self, experts: fx.Node) -> Match:
        indices, outer = experts.args[1], experts.args[2]
        problem: Problem | None = None
        for weights in _endpoints(outer, shape(indices)):  # type: ignore[arg-type]
            found = region(weights, indices)  # type: ignore[arg-type]
            if isinstance(found, Problem):
                problem = problem or found
                continue
            settings = self._settings(found)
            if settings is not None:
                return Match(experts, found.nodes, {"region": found, "settings": settings})
        problem = problem or Problem("the router computes none of the dialect's choices")
        return Match(experts, captures={"problem": problem})

    def _settings(self, found: Region) -> dict[str, Any] | None:
        key = _key(found)
        if key not in self._known:
            self._known[key] = recognise(found)
        return self._known[key]

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        return match.captures.get("problem")

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        found: Region = match["region"]
        linear = found.logits
        x, weight = peel_upcasts(linear.args[0]), peel_upcasts(linear.args[1])
        bias = argument(linear, 2, "bias")
        s = match["settings"]
        # At the first reader of the logits: behind the correction's own computation.
        place = max([linear, *found.corrections], key=list(graph.nodes).index)
        with graph.inserting_after(place):
            anchor = graph.call_function(operator.add, (0, 0))
        graph.inserting_before(anchor)

        def make(target: Any, *args: Any) -> fx.Node:
            return emit(graph, target, args, like=linear, fake_mode=ctx.fake_mode)

        correction = found.corrections[0] if found.corrections else None
        new = emit(
            graph,
            dialect("moe_router"),
            (
                *(x, weight, bias, correction, s["top_k"], s["scoring"], s["normalise"]),
                *(dtype(linear), dtype(found.weights), s["scale"], s["eps"], s["groups"]),
                *(s["top_groups"], s["group_score"], s["group_fill"]),
            ),
            like=linear,
            fake_mode=ctx.fake_mode,
        )
        for index, old in ((1, found.weights), (2, found.indices), (0, linear)):
            item = emit_getitem(graph, new, index)
            if not same_shape(shape(item), shape(old)):
                sizes = view_sizes(shape(old), linear.args[0], make)  # type: ignore[arg-type]
                item = make(aten.view.default, item, sizes)
            if index == 0 and correction is not None and not _after(graph, new, linear):
                continue
            old.replace_all_uses_with(item, delete_user_cb=lambda u: u is not new)
        graph.erase_node(anchor)


def _after(graph: fx.Graph, new: fx.Node, linear: fx.Node) -> bool:
    """Whether every reader of the logits stands behind the router."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    return all(place[u] > place[new] for u in linear.users)


def _endpoints(weights: fx.Node, sizes: Any) -> Iterator[fx.Node]:
    """Where the router's weights may end: what the experts read, or what that is made of."""
    node = weights
    for _ in range(8):
        if same_shape(shape(node), sizes) or val(node).dim() == 3:
            yield node
        below = [n for n in node.all_input_nodes if is_tensor(n)]
        below = [n for n in below if val(n).numel() == val(node).numel()]
        if not below or is_op(node, aten.gather.default) or node.target is operator.getitem:
            return
        node = below[0]


def region(weights: fx.Node, indices: fx.Node) -> Region | Problem:
    """The code that computes ``weights`` and ``indices`` from one linear layer's result."""
    logits: set[fx.Node] = set()
    corrections: list[fx.Node] = []
    inside: set[fx.Node] = set()
    todo = [weights, indices]
    while todo:
        node = todo.pop()
        if node in inside or node in logits or node in corrections:
            continue
        if is_dialect_op(node, "linear"):
            logits.add(node)
            continue
        if node.op != "call_function":
            if not is_tensor(node):
                continue
            if val(node).dim() == 0:
                return Problem("the router reads a number of the caller's", "", node)
            corrections.append(node)
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue  # a size
        target = node.target
        pure = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and target.namespace == "aten"
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
        )
        if is_tensor(node) and val(node).dim() == 1 and _of_input(node):
            corrections.append(node)
            continue
        if not pure or len(inside) > _MAX_NODES:
            return Problem(f"{node.name} stands between the logits and the choice", "", node)
        inside.add(node)
        todo += node.all_input_nodes
    if len(logits) != 1:
        return Problem(f"{len(logits)} linear layers make the router's logits", "", weights)
    (linear,) = logits
    experts = shape(linear)[-1]
    fits = all(val(c).numel() == experts and val(c).is_floating_point() for c in corrections)
    if len(corrections) > 1 or not fits:
        return Problem("the router reads more than logits and one correction", "", weights)
    order = [n for n in weights.graph.nodes if n in inside]
    return Region(weights, indices, linear, order, corrections)


def _of_input(node: fx.Node, depth: int = 4) -> bool:
    """Whether a vector is an input, moved or cast."""
    while depth and is_op(node, *_MOVES):
        node, depth = node.args[0], depth - 1  # type: ignore[assignment]
    return node.op in ("placeholder", "get_attr")


# -- by value -------------------------------------------------------------------------------------


def recognise(found: Region) -> dict[str, Any] | None:
    """`ops.moe.route`'s settings that give the region's weights and indices; None if none does."""
    trials = list(_trials(found))
    if not trials:
        return None
    for settings in _candidates(found):
        agreed = _agrees(trials, settings)
        if agreed is not None:
            return agreed
    return None


def _trials(found: Region) -> Iterator[tuple[Tensor, Tensor | None, Tensor, Tensor]]:
    """(logits, correction, weights, indices), float64, sorted by index."""
    generator = torch.Generator().manual_seed(0)
    sizes = [_hint(n) for n in shape(found.logits)]
    rows = max(1, math.prod(sizes[:-1]))
    for number in range(max(len(_LOGITS), 64 // rows)):
        middle, spread = _LOGITS[number % len(_LOGITS)]
        noise = torch.randn(sizes, dtype=torch.float64, generator=generator)
        logits = middle + noise * spread
        values: dict[fx.Node, Any] = {found.logits: logits}
        correction = None
        for node in found.corrections:
            shaped = [_hint(n) for n in shape(node)]
            values[node] = torch.randn(shaped, dtype=torch.float64, generator=generator) * 0.3
            correction = values[node].reshape(-1)
        try:
            weights, indices = _run(found, values)
        except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError):
            return
        k = indices.shape[-1]
        weights, indices = weights.reshape(-1, k).double(), indices.reshape(-1, k)
        yield logits.reshape(-1, sizes[-1]), correction, weights, indices


def _run(found: Region, values: dict[fx.Node, Any]) -> tuple[Tensor, Tensor]:
    def value(x: Any) -> Any:
        if x in values:
            return values[x]
        if isinstance(x.meta.get("val"), torch.SymInt):
            return _hint(x.meta["val"])
        raise NotImplementedError(x.name)

    for node in found.nodes:
        if node in values:
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        kwargs = {k: v for k, v in kwargs.items() if k not in _MAKERS}
        if is_op(node, aten._to_copy.default):
            kind = kwargs.get("dtype", torch.float64)
            values[node] = args[0].double() if kind.is_floating_point else args[0].to(kind)
        else:
            if isinstance(kwargs.get("dtype"), torch.dtype) and kwargs["dtype"].is_floating_point:
                kwargs = {**kwargs, "dtype": torch.float64}
            args = [_plain(a) for a in args]
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[found.weights], values[found.indices]


def _plain(x: Any) -> Any:
    if isinstance(x, torch.SymInt):
        return _hint(x)
    return [_plain(y) for y in x] if isinstance(x, (list, tuple)) else x


def _hint(n: Any) -> int:
    return n if isinstance(n, int) else int(n.node.hint)


def _agrees(trials: list[Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """``settings`` with the factor that makes them right; None if nothing does."""
    scale: float | None = None
    for logits, correction, weights, indices in trials:
        try:
            mine, chosen = route(logits, correction, **settings)
        except (RuntimeError, ValueError):
            return None
        order, other = indices.argsort(-1), chosen.argsort(-1)
        if not torch.equal(indices.gather(-1, order), chosen.gather(-1, other)):
            return None
        got, want = mine.gather(-1, other), weights.gather(-1, order)
        if scale is None:
            place = int(got.abs().argmax())
            scale = float(want.flatten()[place] / got.flatten()[place])
            if not math.isfinite(scale) or scale == 0.0:
                return None
        # Half types' constants and powers are not exact in float64 spellings either.
        if not bool(((got * scale - want).abs() <= 1e-7 * want.abs() + 1e-12).all()):
            return None
    assert scale is not None
    nearest = float(f"{scale:.7g}")
    return {**settings, "scale": 1.0 if abs(nearest - 1.0) < 1e-7 else nearest}


def _candidates(found: Region) -> Iterator[dict[str, Any]]:
    targets = {n.target for n in found.nodes}
    k = _hint(shape(found.indices)[-1])
    constants, tops, groups = _numbers(found)
    experts = _hint(shape(found.logits)[-1])
    if not targets & {aten.topk.default, aten.sort.default, aten.sort.stable}:
        for eps in (0.0, *(c / 2 for c in constants if 0 < c < 1)):
            yield _settings(k, "sparsemixer", "none", eps)
    likely = {
        "softmax": aten._softmax.default in targets,
        "sigmoid": aten.sigmoid.default in targets,
        "sqrt_softplus": aten.softplus.default in targets,
    }
    scorings = sorted(SCORINGS[:4], key=lambda s: not likely.get(s, False))
    small = [0.0, *(c for c in constants if 0 < c < 1e-2)]
    forms: list[tuple[int, int, str, float]] = [(1, 1, "max", 0.0)]
    for size, top in itertools.product(groups, tops):
        if 1 < size <= experts and experts % size == 0 and top <= size:
            for how, fill in itertools.product(GROUP_SCORES, (0.0, -math.inf)):
                if how == "max" or experts // size >= 2:
                    forms.append((size, top, how, fill))
    for form, scoring, normalise in itertools.product(forms, scorings, NORMALISATIONS):
        for eps in small if normalise == "sum" else small[:1]:
            yield _settings(k, scoring, normalise, eps, *form)


def _settings(
    top_k: int,
    scoring: str,
    normalise: str,
    eps: float,
    groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    group_fill: float = 0.0,
) -> dict[str, Any]:
    return {
        "top_k": top_k, "scoring": scoring, "normalise": normalise, "eps": eps, "groups": groups,
        "top_groups": top_groups, "group_score": group_score, "group_fill": group_fill,
    }  # fmt: skip


def _numbers(found: Region) -> tuple[list[float], list[int], list[int]]:
    """Constants, the top-k calls' k, and how many groups views make, of the region."""
    constants: set[float] = set()
    tops: set[int] = set()
    groups: set[int] = set()
    for node in found.nodes:
        if is_op(node, aten.topk.default):
            tops.add(_hint(_symbol(node.args[1])))
        if is_tensor(node) and val(node).dim() >= 3:
            groups.add(_hint(shape(node)[-2]))
        for item in (*node.args, *node.kwargs.values()):
            if isinstance(item, float) and math.isfinite(item):
                constants.add(item)
    return sorted(constants), sorted(tops), sorted(groups)


def _symbol(x: Any) -> Any:
    return x.meta["val"] if isinstance(x, fx.Node) else x


def _key(found: Region) -> Any:
    """The region's structure, so that equal ones are run once."""
    seen: dict[fx.Node, int] = {}

    def key(item: Any) -> Any:
        if isinstance(item, fx.Node):
            if item in seen:
                return ("again", seen[item])
            seen[item] = len(seen)
            if item not in inside:
                what = tuple(map(str, shape(item))) if is_tensor(item) else str(item.meta["val"])
                return ("input", what)
            return (str(item.target), key(item.args), key(item.kwargs))
        if isinstance(item, (list, tuple)):
            return tuple(key(v) for v in item)
        if isinstance(item, dict):
            return tuple((k, key(v)) for k, v in item.items())
        return repr(item)

    inside = set(found.nodes)
    return key(found.weights), key(found.indices)
