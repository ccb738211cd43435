"""Audit: no silent miss. Report what looks like a site and was neither raised nor rejected.

Looks at what is left at the end of the pipeline: by structure (a softmax that feeds a
product, attention ops that capture did not take, a root of a mean of squares, halves
joined with one negated, an activation between linears, a router's top-k), and by the names of
modules and functions (a class with Norm, Attention or MLP in its name, a function
``apply_rotary…``) that no site or rejection came from. Each becomes one rejection, with the
condition that failed and a hint. Nothing is rewritten.

Worth: the report can be trusted: what it does not list as raised, it lists as left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.passes.base import Match, Pass, PassContext, Problem
from dspark_compile.passes.graph import (
    aten,
    clean_path,
    is_dialect_op,
    is_op,
    is_tensor,
    module_classes,
    module_path,
    op_name,
)
from dspark_compile.passes.norm_statistic import statistic_of
from dspark_compile.passes.raise_mlp import MLP_CLASS
from dspark_compile.passes.raise_rope import is_seed

_NORM_CLASS = re.compile(r"Norm(?!alizer)")
_NOT_NORM_CLASS = re.compile(r"GroupNorm|BatchNorm|SpatialNorm|WeightNorm|ScaleNorm")
_ATTENTION_CLASS = re.compile(r"Attention\d*$|Attn\d*$")
_EXPERTS_CLASS = re.compile(
    r"Experts?$|MoE|Moe(?!\w*(Model|CausalLM|Layer|Attention|MLP|Norm|Rot))"
)
_ROPE_FUNCTION = re.compile(r"in (_?apply_\w*(?:rotary|rope)\w*)", re.IGNORECASE)
_ROUTED = (aten.topk.default, aten._grouped_mm.default)
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.mish.default)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)


def _attention_ops() -> frozenset[Any]:
    names = (
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


_ATTENTION_OPS = _attention_ops()


@dataclass(frozen=True)
class Finding:
    """Something left over that looks like a site."""

    kind: str
    node: fx.Node
    problem: Problem


class Audit(Pass):
    """See the module's docstring."""

    name = "audit"
    kind = "other"
    stage = "finish"

    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        live = _live(graph)
        known = Known(graph, ctx)
        for detector in (_attention, _norm, _rope, _experts, _mlp):
            for finding in detector(live):
                if not known.covers(finding.kind, finding.node):
                    known.add(finding.kind, finding.node)
                    yield Match(finding.node, captures={"finding": finding})
        for kind, path, node, problem in _by_name(live):
            if not known.covers_path(kind, path):
                known.add(kind, node)
                yield Match(node, captures={"finding": Finding(kind, node, problem)})

    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        raise AssertionError("the audit rewrites nothing")

    def run(self, graph: fx.Graph, ctx: PassContext) -> Any:
        found = 0
        for match in self.pattern(graph, ctx):
            finding: Finding = match["finding"]
            ctx.reject(
                self.name,
                finding.kind,
                finding.node,
                finding.problem.condition,
                finding.problem.hint,
                site=True,
            )
            found += 1
        return ctx.report.add_pass(self.name, self.stage, found, 0)


class Known:
    """What the passes reported, by kind: module paths, and nodes that are still there."""

    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self.paths: dict[str, set[str]] = {}
        self.nodes: dict[str, set[str]] = {}
        reported: list[Any] = [*ctx.report.sites, *ctx.report.rejections]
        for item in reported:
            self.paths.setdefault(item.kind, set()).add(item.module)
            self.nodes.setdefault(item.kind, set()).add(item.node)

    def add(self, kind: str, node: fx.Node) -> None:
        self.paths.setdefault(kind, set()).add(module_path(node))
        self.nodes.setdefault(kind, set()).add(node.name)

    def covers_path(self, kind: str, path: str) -> bool:
        """Whether something of ``kind`` was reported in the module ``path`` or below it."""
        if not path:
            return False
        kinds = (kind, "experts") if kind == "mlp" else (kind,)
        return any(
            p == path or p.startswith(path + ".") for k in kinds for p in self.paths.get(k, ())
        )

    def covers(self, kind: str, node: fx.Node) -> bool:
        """Whether a report of ``kind`` concerns ``node``: its module, or a node nearby."""
        path = module_path(node)
        if path and self.covers_path(kind, path):
            return True
        return _near(node, self.nodes.get(kind, set()))


def _near(node: fx.Node, names: set[str], steps: int = 10, limit: int = 120) -> bool:
    """Whether one of ``names`` is within a few edges of ``node``, not across linears."""
    frontier, seen = [node], {node}
    for _ in range(steps):
        following: list[fx.Node] = []
        for item in frontier:
            if item.name in names:
                return True
            if len(seen) > limit or (item is not node and is_dialect_op(item)):
                continue
            for other in (*item.all_input_nodes, *item.users):
                if other not in seen and other.op == "call_function":
                    seen.add(other)
                    following.append(other)
        frontier = following
    return any(item.name in names for item in frontier)


def _live(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.users]


# -- by structure -----------------------------------------------------------------------------


def _attention(live: list[fx.Node]) -> Iterator[Finding]:
    for node in live:
        target = node.target
        packet = getattr(target, "overloadpacket", None)
        if packet in _ATTENTION_OPS:
            reason = f"capture left {op_name(node)} as it is"
            yield Finding(
                "attention",
                node,
                Problem(reason, "use tensors of one floating dtype and rank 4, no dropout"),
            )
        elif isinstance(target, torch._ops.HigherOrderOperator) and "flex_attention" in str(target):
            reason = "flex_attention was left as it is"
            yield Finding("attention", node, Problem(reason, "use score_mod=None, or sdpa"))
        elif is_op(node, aten._softmax.default, aten._safe_softmax.default):
            if _reaches(node, lambda n: is_op(n, *_PRODUCTS) or is_dialect_op(n, "matmul"), 8):
                reason = "a softmax feeds a matrix product, but no attention was recognised in it"
                yield Finding("attention", node, Problem(reason, "write it as sdpa"))


def _norm(live: list[fx.Node]) -> Iterator[Finding]:
    for node in live:
        if not is_op(node, aten.rsqrt.default, aten.native_layer_norm.default):
            continue
        statistic = None if is_op(node, aten.native_layer_norm.default) else statistic_of(node)
        if is_op(node, aten.native_layer_norm.default) or statistic is not None:
            reason = "a root of a mean of squares is left, and no norm was recognised around it"
            yield Finding("norm", node, Problem(reason, "use torch.nn.functional.rms_norm"))


def _rope(live: list[fx.Node]) -> Iterator[Finding]:
    for node in live:
        if is_seed(node):
            reason = "halves are joined with one negated, but no rotation was recognised"
            yield Finding("rope", node, Problem(reason, "rotate as x * cos + rotate_half(x) * sin"))


def _experts(live: list[fx.Node]) -> Iterator[Finding]:
    hint = "compute the experts as two products of rows, as Hugging Face's grouped_mm does"
    problem = Problem("tokens are sent to experts, and no experts were recognised", hint)
    for node in live:
        classes = module_classes(node)
        if is_op(node, aten._grouped_mm.default):
            yield Finding("experts", node, problem)
        elif is_op(node, aten.topk.default) and not any("Index" in c for c in classes):
            routed = any(_EXPERTS_CLASS.search(c) for c in classes[-4:])
            grouped = _reaches(node, lambda n: is_dialect_op(n, "grouped_linear"), 12)
            if grouped:
                continue  # single products, one matrix an expert: an op of their own
            if routed or (not any("Attention" in c for c in classes) and _dispatches(node)):
                yield Finding("experts", node, problem)
            elif _scatters(node):
                reason = "scores of few experts multiply what all of them computed"
                todo = "compute the chosen experts alone, as Hugging Face's grouped_mm does"
                yield Finding("experts", node, Problem(reason, todo))


def _scatters(topk: fx.Node) -> bool:
    """Whether a top-k becomes a table of scores, or one score after the other, that products meet;
    or picks from what all experts computed."""

    def table(node: fx.Node) -> bool:
        if is_op(node, aten.gather.default):
            return _comes_of_product(node.args[0])  # type: ignore[arg-type]
        if not is_op(node, aten.scatter.src, aten.scatter.value, aten.eq.Tensor, aten.eq.Scalar):
            return False
        return _reaches(
            node,
            lambda n: (
                is_op(n, aten.mul.Tensor) and any(_comes_of_product(a) for a in n.all_input_nodes)
            ),
            8,
        )

    return _reaches(topk, table, 6)


def _comes_of_product(node: fx.Node, steps: int = 4) -> bool:
    """Whether ``node`` is a product with weights, or such a one moved around."""
    for _ in range(steps):
        if is_dialect_op(node, "matmul", "gated_mlp", "gated_mlp_merged", "mlp"):
            return True
        if is_op(node, aten.bmm.default):
            return True
        if node.op != "call_function" or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _dispatches(topk: fx.Node) -> bool:
    """Whether a top-k's indices choose what a product works on."""
    product = (*_PRODUCTS, aten._grouped_mm.default)
    return _reaches(
        topk,
        lambda n: is_op(n, *product) or is_dialect_op(n, "linear", "matmul", "gated_mlp", "mlp"),
        16,
    )


def _mlp(live: list[fx.Node]) -> Iterator[Finding]:
    for node in live:
        if not is_dialect_op(node, "linear"):
            continue
        named = any(MLP_CLASS.search(c) for c in module_classes(node)[-3:])
        region = _region(node, norms=named)
        if region is None:
            continue
        region_nodes, linears = region
        acts = [n for n in region_nodes if is_op(n, *_ACTIVATIONS)]
        if acts and linears and len({n.args[0] for n in linears}) == 1:
            others = sorted({op_name(n) for n in region_nodes if is_dialect_op(n)})
            what = f" ({', '.join(others)} stands between)" if others else ""
            reason = f"an activation stands between linears, but no MLP was recognised{what}"
            hint = "keep only an activation and a product between the linears"
            yield Finding("mlp", node, Problem(reason, hint))


def _region(
    down: fx.Node, norms: bool, limit: int = 60
) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """``(what lies between down and the linears before it, those)``; None if anything else
    feeds it, a norm too unless ``norms``."""
    inside: list[fx.Node] = []
    linears: list[fx.Node] = []
    stack = [down.args[0]]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in inside or node in linears:
            continue
        if node.op != "call_function":
            if node.op == "placeholder" and is_tensor(node) and node.meta["val"].dim() > 2:
                return None
            continue
        if is_dialect_op(node, "linear"):
            linears.append(node)
            continue
        norm = norms and is_dialect_op(node, "rms_norm", "layer_norm")
        if (is_dialect_op(node) and not norm) or len(inside) > limit:
            return None
        if is_op(node, *_PRODUCTS, aten.convolution.default):
            return None
        inside.append(node)
        stack += node.all_input_nodes
    return inside, linears


def _reaches(node: fx.Node, wanted: Callable[[fx.Node], bool], steps: int) -> bool:
    frontier, seen = [node], {node}
    for _ in range(steps):
        following: list[fx.Node] = []
        for item in frontier:
            for user in item.users:
                if wanted(user):
                    return True
                if user not in seen and len(seen) < 200 and not is_dialect_op(user):
                    seen.add(user)
                    following.append(user)
        frontier = following
    return False


# -- by name --------------------------------------------------------------------------------------


def _kind_of_class(name: str) -> str | None:
    if _NORM_CLASS.search(name) and not _NOT_NORM_CLASS.search(name):
        return "norm"
    if _ATTENTION_CLASS.search(name):
        return "attention"
    return "mlp" if MLP_CLASS.search(name) else None


_NAMED = {
    "norm": ("no mean of squares or variance scales its input", "see the norms the dialect has"),
    "attention": (
        "no softmax(q k^T) v was found in it",
        "linear and recurrent attention is not raised",
    ),
    "mlp": (
        "no activation between two linears was found in it",
        "keep only an activation and a product between the linears",
    ),
}


def _by_name(live: list[fx.Node]) -> Iterator[tuple[str, str, fx.Node, Problem]]:
    """Modules and functions whose name promises a site: each once."""
    seen: set[tuple[str, str]] = set()
    for node in live:
        for path, cls in _stack(node):
            kind = _kind_of_class(cls)
            if kind is None or (kind, path) in seen:
                continue
            seen.add((kind, path))
            condition, hint = _NAMED[kind]
            problem = Problem(f"nothing was raised in this {cls}: {condition}", hint)
            yield kind, path, node, problem
        path = module_path(node)
        called = _ROPE_FUNCTION.search(node.meta.get("stack_trace") or "")
        if called and path and ("rope", path) not in seen:
            seen.add(("rope", path))
            problem = Problem(
                f"nothing was raised in {called[1]}: no rotation of features was found in it",
                "rotate as x * cos + rotate_half(x) * sin",
            )
            yield "rope", path, node, problem


def _stack(node: fx.Node) -> list[tuple[str, str]]:
    """``(path, class name)`` of the modules a node came from, innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [clean_path(path) for path, _ in stack.values()]
    return list(zip(paths, module_classes(node), strict=True))[::-1]
