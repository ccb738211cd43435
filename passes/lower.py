"""Lower: every dialect op at every site picks an implementation, visibly.

An ``aten`` site stays a dialect call in the graph and is decomposed by the inner compiler
(so that its cache keys see one stable op), or, for ``inner="eager"``, calls the ATen form
directly. A ``triton`` or ``cpp`` site calls the kernel's own op. ``aten.view`` becomes
``aten.reshape``: a dialect op may lay out its result otherwise than the code it replaced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dspark_compile.codegen.fastest import arrange
from dspark_compile.codegen.registry import implementations
from dspark_compile.ops import OPS
from dspark_compile.passes.base import PassContext
from dspark_compile.passes.graph import aten, dialect_name, emit, emit_getitem, is_dialect_op, is_op
from dspark_compile.passes.raise_cache import SWAP
from dspark_compile.passes.write_in_place import written_input


def _device(node: fx.Node) -> torch.device:
    for item in node.all_input_nodes:
        value = item.meta.get("val")
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")


# Appends that ATen's in-place ops spell; the fused one stays a kernel, or a call of its own.
_SPELLED = ("cache_append_", "cache_append_int8_")


def _inline(node: fx.Node, name: str, ctx: PassContext) -> None:
    """Spell an in-place append as ATen calls: a decomposition is not applied to an op that
    mutates, and ATen's own in-place ops functionalise without a copy."""
    graph, write = node.graph, aten.index_copy_.default
    with graph.inserting_before(node):
        if name == "cache_append_":
            cache, new, positions = node.args
            pairs = [(cache, new)]
        elif name == "cache_append_int8_":
            cache, scale, new, positions = node.args
            call = (OPS["quantize_kv"].overload, (new, scale.meta["val"].dtype))  # type: ignore[union-attr]
            parts = emit(graph, *call, like=node, fake_mode=ctx.fake_mode)
            pairs = [(cache, emit_getitem(graph, parts, 0)), (scale, emit_getitem(graph, parts, 1))]
        else:
            raise AssertionError(name)
        for tensor, values in pairs:
            whole, dim = written_input(tensor), 2
            if whole not in (None, tensor):  # a write to a view would copy all of it there and back
                call = (aten.permute.default, (values, SWAP))
                values = emit(graph, *call, like=node, fake_mode=ctx.fake_mode)
                tensor, dim = whole, 1
            emit(graph, write, (tensor, dim, positions, values), like=node, fake_mode=ctx.fake_mode)
    graph.erase_node(node)


def lower(
    module: fx.GraphModule, ctx: PassContext, *, native: bool = False, direct: bool = False
) -> set[Any]:
    """Lower ``module`` in place; returns the ops that its inner compiler decomposes.

    With ``native`` every op is a stage of one native call already, and only said to be. With
    ``direct`` there is no inner compiler.
    """
    options, report = ctx.options, ctx.report
    eager = options.inner == "eager" or direct
    decompositions: set[Any] = {OPS["quantize_kv"].overload}
    chosen: dict[str, tuple[str, str]] = {}
    told: Counter[str] = Counter()
    for node in list(module.graph.nodes):
        if is_op(node, aten.view.default):
            node.target = aten.reshape.default
        if not is_dialect_op(node):
            continue
        name = dialect_name(node)
        report.ops[name] = report.ops.get(name, 0) + 1
        if native:
            chosen[node.name] = ("native", "")
            continue
        refused = measured = ""
        candidates = implementations(name, options.kernels, _device(node), direct)
        if options.kernels == "auto":
            candidates, measured = arrange(node, candidates, options.tune, eager=eager)
        for candidate in candidates:
            if candidate.name == "aten" and OPS[name].mutates and name not in _SPELLED:
                continue
            reason = candidate.supports(node)
            if reason is not None:
                refused = f"{candidate.name}: {reason}"
                if options.kernels != "auto":
                    # Asked for and not given; under "auto" it is a choice, told with the site.
                    report.add_fallback(f"{name} at {node.name}", refused)
                continue
            chosen[node.name] = (candidate.name, measured or refused)
            if measured:
                told[f"{name} is {candidate.name}, {measured}"] += 1
            if candidate.name in ("triton", "cpp") or eager:
                node.target = candidate.target or node.target
            elif candidate.name == "aten" and OPS[name].mutates:
                _inline(node, name, ctx)
            elif candidate.name == "aten":
                decompositions.add(OPS[name].overload)
            break
    report.notes += [f"{count} × {text}" for text, count in told.items()]
    report.sites[:] = [
        replace(site, impl=chosen[site.node][0], reason=chosen[site.node][1])
        if site.status == "raised" and site.node in chosen
        else site
        for site in report.sites
    ]
    module.graph.lint()
    module.recompile()
    return decompositions
