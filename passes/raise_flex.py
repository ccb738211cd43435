"""Raise flex_attention: its two little programs become a mask, a bias and a soft-cap.

``flex_attention`` reaches Dynamo's graph as one call with two subgraphs: ``score_mod`` and
``mask_mod``, each written for a single score. They are evaluated over index grids
``b [B,1,1,1]``, ``h [1,H,1,1]``, ``q [1,1,M,1]``, ``k [1,1,1,N]``, so that the rest of the
pipeline sees ordinary tensor code and can prove the mask:

    mask_mod                                     -> a boolean ``bias``
    score_mod: c * score, c * tanh(score / c),
        score + f(b, h, q, k),
        where(f(b, h, q, k), score, -inf)        -> scale, softcap, bias

What is left alone, each with its reason: a ``score_mod`` that uses the score otherwise, a
used log-sum-exp, operations that do not work element by element, and a block mask that has
no ``mask_mod``, whose list of blocks is its only meaning (with a ``mask_mod`` the list of
blocks only says where that is false anyway). Called by `capture`, since tracing would tear
the call apart.
"""

from __future__ import annotations

import math
import operator
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.passes.graph import module_path, source
from dspark_compile.passes.scores import FORBIDS, Miss

NAME = "raise_flex"

aten = torch.ops.aten
_DENSE_BLOCK = 1 << 30
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Functions whose result at an element depends on their operands at that element only.
_OPERATORS = re.compile(
    "add|sub|mul|truediv|floordiv|mod|pow|and_|or_|xor|invert|neg|pos|abs|lt|le|gt|ge|eq|ne"
)
_POINTWISE = re.compile(
    "add|sub|mul|div|true_divide|floor_divide|remainder|fmod|pow|neg|abs|sign|"
    "minimum|maximum|clamp|where|logical_and|logical_or|logical_not|logical_xor|"
    "bitwise_and|bitwise_or|bitwise_not|bitwise_xor|lt|le|gt|ge|eq|ne|less|"
    "less_equal|greater|greater_equal|tanh|exp|exp2|log|log2|log1p|sqrt|rsqrt|"
    "reciprocal|sigmoid|sin|cos|floor|ceil|round|trunc|masked_fill|zeros_like|"
    "ones_like|full_like|float|double|half|bfloat16|int|long|bool|to|type|"
    "type_as|new_ones|new_zeros|new_full|square|relu"
)
_FACTORIES = (torch.tensor, torch.full, torch.ones, torch.zeros, torch.scalar_tensor)


@dataclass
class _Partial:
    """A captured tensor with fewer indices so far than it has dimensions."""

    tensor: Tensor
    index: tuple[Any, ...] = ()


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    return [*map(_flat, value.values())] if isinstance(value, dict) else [value]


def _pointwise(node: fx.Node) -> bool:
    target = node.target
    if node.op == "call_method":
        return bool(_POINTWISE.fullmatch(str(target)))
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.pointwise in target.tags or target in (
            aten._to_copy.default,
            aten.full.default,
            aten.scalar_tensor.default,
            aten.full_like.default,
            aten.lift_fresh_copy.default,
        )
    if target in _FACTORIES:
        return True
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return bool(_OPERATORS.fullmatch(name))
    return getattr(torch, name, None) is target and bool(_POINTWISE.fullmatch(name))


def _is_index(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (operator.getitem, aten.index.Tensor)


def unsupported(module: fx.GraphModule) -> fx.Node | None:
    """The first operation of a mod that is not known to work element by element."""
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr") or _is_index(node):
            continue
        if node.op not in ("call_function", "call_method") or not _pointwise(node):
            return node
        if any(size != () for size in _sizes(node)):
            return node
    return None


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes that a factory is asked for; a mod's values have none."""
    made_by_method = node.op == "call_method" and node.target in (
        "new_ones",
        "new_zeros",
        "new_full",
    )
    made = node.target in (torch.full, torch.ones, torch.zeros, aten.full.default)
    if node.target is torch.tensor and not isinstance(node.args[0], (int, float)):
        return ["a list"]
    if not (made_by_method or made):
        return []
    sizes = node.args[1:] if made_by_method else node.args
    first = sizes[0] if sizes else node.kwargs.get("size", ())
    return [tuple(first) if isinstance(first, (tuple, list, torch.Size)) else first]


class _Grid(fx.Interpreter):
    """Runs a mod over index grids; captured tensors collect their indices first."""

    def __init__(self, module: fx.GraphModule, captured: Sequence[Any]) -> None:
        super().__init__(module)
        places = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.captured = dict(zip(places[len(places) - len(captured) :], captured, strict=True))

    def evaluate(self, wanted: fx.Node | None, indices: Sequence[Tensor]) -> Any:
        """The value of ``wanted`` (the result, if None) where the indices are the grids."""
        env: dict[fx.Node, Any] = {}
        places = [n for n in self.graph.nodes if n.op == "placeholder"]
        grids = places[len(places) - len(self.captured) - 4 : len(places) - len(self.captured)]
        for node, grid in zip(grids, indices, strict=True):
            env[node] = grid
        for node, value in self.captured.items():
            whole = isinstance(value, Tensor) and value.dim() > 0
            env[node] = _Partial(value) if whole else value
        if wanted is None:
            output = next(n for n in self.graph.nodes if n.op == "output")
            wanted = output.args[0]
            if isinstance(wanted, (tuple, list)):
                wanted = wanted[0]
        return self._value(wanted, env)

    def _value(self, item: Any, env: dict[fx.Node, Any]) -> Any:
        if not isinstance(item, fx.Node):
            return item
        if item not in env:
            env[item] = self._compute(item, env)
        return env[item]

    def _compute(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            value = self.fetch_attr(str(node.target))
            return _Partial(value) if isinstance(value, Tensor) and value.dim() else value
        if node.op == "placeholder":
            raise Miss("the score is used where no score may be")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, env))
        if _is_index(node) and isinstance(args[0], _Partial):
            index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            partial = _Partial(args[0].tensor, (*args[0].index, *index))
            legal = all(isinstance(i, (Tensor, int, torch.SymInt)) for i in index)
            if not legal or len(partial.index) > partial.tensor.dim():
                raise Miss("a captured tensor is indexed otherwise than by single elements")
            if len(partial.index) < partial.tensor.dim():
                return partial
            return partial.tensor[partial.index]
        if _is_index(node) or any(isinstance(a, _Partial) for a in _flat((args, kwargs))):
            raise Miss("a captured tensor is used without an index for every dimension")
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


# --- reading score_mod -----------------------------------------------------------------------


@dataclass
class ScoreMod:
    """What a ``score_mod`` does: ``cap(scale * score) + terms``, forbidden where a mask is
    False; ``masks`` are ``(node, allowed, value)``, ``terms`` ``(node or number, sign)``."""

    scale: float = 1.0
    softcap: float = 0.0
    terms: list[tuple[Any, float]] = field(default_factory=list)
    masks: list[tuple[fx.Node, bool, float]] = field(default_factory=list)


_MUL = {operator.mul, torch.mul, aten.mul.Tensor, aten.mul.Scalar, "mul"}
_DIV = {operator.truediv, torch.div, torch.true_divide, aten.div.Tensor, aten.div.Scalar, "div"}
_ADD = {operator.add, torch.add, aten.add.Tensor, aten.add.Scalar, "add"}
_SUB = {operator.sub, torch.sub, aten.sub.Tensor, aten.sub.Scalar, "sub"}
_TANH = {torch.tanh, aten.tanh.default, "tanh"}
_WHERE = {torch.where, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
_FILL = {"masked_fill", torch.masked_fill, aten.masked_fill.Scalar, aten.masked_fill.Tensor}
_CASTS = {"float", "to", "type_as", "type", aten._to_copy.default}


def read_score_mod(module: fx.GraphModule) -> ScoreMod:
    """The meaning of a ``score_mod``.

    Raises:
        Miss: it is not of the form that attention has.
    """
    mod = ScoreMod()
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    current = places[0]
    output = next(n for n in module.graph.nodes if n.op == "output")
    result = output.args[0][0] if isinstance(output.args[0], (tuple, list)) else output.args[0]
    while current is not result:
        users = [u for u in current.users if u.op != "output"]
        if len(users) != 1 or output in current.users:
            raise Miss("score_mod uses the score more than once", "add a bias to it")
        _mod_step(mod, current, users[0])
        current = users[0]
    if mod.softcap < 0:
        raise Miss("score_mod's soft-cap is negative")
    return mod


def _mod_step(mod: ScoreMod, score: fx.Node, node: fx.Node) -> None:
    target, args = node.target, node.args
    others = [a for a in args if a is not score]
    if len(args) - len(others) != 1:
        raise Miss(f"score_mod computes {node.format_node()}")
    if target in _CASTS:
        return
    if target in _MUL or target in _DIV:
        number = _number(others[0])
        if number is None or number == 0 or not math.isfinite(number):
            raise Miss("score_mod multiplies the score by a tensor", "scale the query instead")
        if (
            mod.terms
            or ((mod.softcap or mod.masks) and number < 0)
            or (target in _DIV and args[0] is not score)
        ):
            raise Miss("score_mod scales the score after the bias, or divides by it")
        factor = 1 / number if target in _DIV else number
        mod.scale *= factor
        mod.softcap *= factor
    elif target in _TANH:
        if mod.terms or mod.softcap or mod.masks:
            raise Miss("score_mod's tanh comes after the bias or the mask")
        mod.softcap = 1.0
    elif target in _ADD or target in _SUB:
        if (target in _SUB and args[0] is not score) or node.kwargs:
            raise Miss("score_mod negates the score")
        mod.terms.append((others[0], -1.0 if target in _SUB else 1.0))
    elif (target in _WHERE or target in _FILL) and len(args) == 3:
        fills = target in _FILL
        condition = args[1] if fills else args[0]
        allowed = not fills and args[1] is score
        fill = _number(args[2] if allowed or fills else args[1])
        if condition is score or not isinstance(condition, fx.Node):
            raise Miss("score_mod's mask depends on the score")
        if fill is None or not fill <= FORBIDS:
            raise Miss("score_mod replaces scores by something else than -inf")
        mod.masks.append((condition, allowed, fill))
    else:
        name = getattr(target, "__name__", target)
        raise Miss(f"score_mod applies {name} to the score")


def _number(value: Any) -> float | None:
    """A number, or the number that a tensor made inside of the mod holds."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if value.target in (torch.tensor, torch.scalar_tensor, aten.scalar_tensor.default):
        return _number(value.args[0])
    if value.target in (torch.full, torch.full_like, aten.full.default, aten.full_like.default):
        return _number(value.args[1])
    if value.target == "new_full":
        return _number(value.args[2])
    if value.target in (operator.neg, torch.neg, aten.neg.default, "neg"):
        inner = _number(value.args[0])
        return None if inner is None else -inner
    return None


# --- the replacement -------------------------------------------------------------------------


def always(module: fx.GraphModule) -> bool:
    """Whether a ``mask_mod`` is the one that allows everything."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    result = output.args[0][0] if isinstance(output.args[0], (tuple, list)) else output.args[0]
    if result is True:
        return True
    return isinstance(result, fx.Node) and (
        result.target in ("new_ones", torch.ones, aten.new_ones.default, aten.ones.default)
        or (result.target in (aten.full.default, torch.full) and result.args[1] is True)
    )


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: fx.GraphModule,
    mask_mod: fx.GraphModule | None,
    scale: float,
    score_captures: Sequence[Any],
    mask_captures: Sequence[Any],
) -> tuple[Tensor, None, None]:
    """The replacement of the higher-order call: ``(output, no lse, no maximum)``."""
    mod = read_score_mod(score_mod)
    batch, heads, rows, _ = query.shape
    sizes = (batch, heads, rows, key.shape[2])
    grids = []
    for axis, size in enumerate(sizes):
        view = [1, 1, 1, 1]
        view[axis] = size
        grids.append(torch.arange(size, device=query.device).view(view))
    allowed: Tensor | None = None
    bias: Tensor | None = None

    def restrict(mask: Any) -> None:
        nonlocal allowed
        mask = _four(torch.as_tensor(mask, device=query.device))
        allowed = mask if allowed is None else allowed & mask

    if mask_mod is not None:
        restrict(_Grid(mask_mod, mask_captures).evaluate(None, grids))
    reader = _Grid(score_mod, score_captures)
    for node, sign in mod.terms:
        term = torch.as_tensor(reader.evaluate(node, grids), device=query.device)
        term = _four(term if term.is_floating_point() else term.to(torch.float32))
        term = -term if sign < 0 else term
        bias = term if bias is None else bias + term
    for node, positive, fill in mod.masks:
        mask = reader.evaluate(node, grids)
        mask = mask if positive else ~mask
        if fill == -math.inf:
            restrict(mask)
        else:
            bias = query.new_zeros(()) if bias is None else bias
            bias = torch.where(_four(mask), bias, torch.finfo(query.dtype).min)
    if bias is None:
        bias = allowed
    elif allowed is not None:
        bias = torch.where(allowed, bias, -math.inf)
    if key.shape[0] != batch:
        key = key.expand(batch, -1, -1, -1)
        value = value.expand(batch, -1, -1, -1)
    out = torch.ops.dspark.attention(
        query, key, value, bias, None, [], [],
        scale=float(scale) * mod.scale, mask="", softcap=float(mod.softcap),
    )  # fmt: skip
    return out, None, None


def _four(tensor: Tensor) -> Tensor:
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor


def is_flex(node: fx.Node) -> bool:
    """Whether a node is the higher-order call that ``flex_attention`` becomes."""
    target = node.target
    return isinstance(target, torch._ops.HigherOrderOperator) and target.name() == "flex_attention"


def run(graph: fx.Graph, module: fx.GraphModule, report: GraphReport | None) -> None:
    """Turn the calls of flex_attention in ``graph`` into calls of `flex`, in place.

    ``module`` holds the subgraphs. What is left alone is recorded in ``report``.
    """
    start = time.perf_counter()
    calls = [node for node in graph.nodes if is_flex(node)]
    rewritten = 0
    for node in calls:
        miss = replace(node, module)
        rewritten += miss is None
        if miss is not None and report is not None:
            where = (node.name, module_path(node), source(node))
            report.reject(NAME, "attention", *where, miss.condition, miss.hint)
    if calls and report is not None:
        elapsed = (time.perf_counter() - start) * 1e3
        report.add_pass(NAME, "capture", len(calls), rewritten, elapsed)


def replace(node: fx.Node, module: fx.GraphModule) -> Miss | None:
    """Turn the higher-order call ``node`` into a call of `flex`; the reason if it cannot be."""
    try:
        _replace(node, module)
    except Miss as miss:
        return miss
    return None


def _replace(node: fx.Node, module: fx.GraphModule) -> None:
    query, key, value, score_mod, block_mask, scale = node.args[:6]
    score_captures, mask_captures = node.args[7:9]
    unused: list[fx.Node] = []
    for user in node.users:
        if user.target is not operator.getitem or (user.args[1] != 0 and not _dead(user, unused)):
            raise Miss(
                "the log-sum-exp of flex_attention is used",
                "call it without return_lse or return_aux",
            )
    symbolic = isinstance(_example(scale), (torch.SymFloat, torch.SymInt))
    if not isinstance(scale, (int, float)) and not symbolic:
        raise Miss("flex_attention's scale is not a number")
    values = [_example(n) for n in (query, key, value)]
    if any(v is None for v in values):
        raise Miss("flex_attention's operands have no known shape")
    if len({v.dtype for v in values}) > 1 or values[0].dtype not in _FLOATS:
        raise Miss(f"flex_attention's operands are {[str(v.dtype) for v in values]}")
    mods: list[fx.GraphModule | None] = []
    for argument in (score_mod, block_mask[-1]):  # type: ignore[index]
        mod = getattr(module, str(argument.target), None)  # type: ignore[union-attr]
        if not isinstance(mod, fx.GraphModule):
            raise Miss("flex_attention's mods are not graphs")
        mods.append(mod)
    score_graph, mask_graph = mods
    assert score_graph is not None and mask_graph is not None
    for name, mod in (("score_mod", score_graph), ("mask_mod", mask_graph)):
        strange = unsupported(mod)
        if strange is not None:
            called = getattr(strange.target, "__name__", strange.target)
            raise Miss(f"{name} calls {called}, which is not known to work element by element")
    read_score_mod(score_graph)
    mask: Any = block_mask[-1]  # type: ignore[index]
    if always(mask_graph):
        blocks = list(block_mask[-3:-1])  # type: ignore[index]
        if any(b != _DENSE_BLOCK for b in blocks):
            raise Miss(
                "the block mask has no mask_mod, only a list of blocks",
                "give create_block_mask's mask_mod to the block mask",
            )
        mask, mask_captures = None, ()
    _dry_run(score_graph, mask_graph if mask is not None else None, node)
    node.target = flex
    node.args = (query, key, value, score_mod, mask, scale, score_captures, mask_captures)
    node.kwargs = {}
    for item in sorted(set(unused), reverse=True):
        item.graph.erase_node(item)


def _dead(node: fx.Node, found: list[fx.Node]) -> bool:
    """Whether nothing outside of ``node`` and what is computed from it reads it; these go to
    ``found``."""
    if node.op not in ("call_function", "call_method") or node.target is operator.setitem:
        return False
    if str(getattr(node.target, "__name__", node.target)).rstrip("0123456789").endswith("_"):
        return False  # in place
    found.append(node)
    return all(_dead(user, found) for user in node.users)


def _dry_run(score: fx.GraphModule, mask: fx.GraphModule | None, node: fx.Node) -> None:
    """Raise `Miss` for what only evaluation shows: how captured tensors are indexed."""
    mod = read_score_mod(score)
    wanted = [(score, node.args[7], n) for n, _ in mod.terms]
    wanted += [(score, node.args[7], n) for n, _, _ in mod.masks]
    if mask is not None:
        wanted.append((mask, node.args[8], None))
    with FakeTensorMode():
        index = [torch.zeros((1, 1, 1, 1), dtype=torch.int64) for _ in range(4)]
        for graph, captures, item in wanted:
            captured = []
            for capture in captures:  # type: ignore[union-attr]
                value = _example(capture) if isinstance(capture, fx.Node) else capture
                if isinstance(value, Tensor):
                    value = torch.zeros([2] * value.dim(), dtype=value.dtype)
                captured.append(value)
            try:
                _Grid(graph, captured).evaluate(item, index)
            except Miss:
                raise
            except Exception as error:
                raise Miss(f"a mod cannot be evaluated: {type(error).__name__}: {error}") from None


def _example(node: Any) -> Any:
    if not isinstance(node, fx.Node):
        return None
    return node.meta.get("example_value", node.meta.get("val"))
