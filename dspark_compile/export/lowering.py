"""From the dialect to ONNX's ops, by target; what has no ONNX form is decomposed, with its reason.

This is the last step for an export what ``passes/lower.py`` is for ``torch.compile``.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dspark_compile.codegen.aten import FORMS
from dspark_compile.ops import OPS
from dspark_compile.ops.predicate import evaluate
from dspark_compile.passes.graph import aten, dialect_name, is_dialect_op, is_op

from .attention import StandardAttention
from .calibrate import CacheScales
from .gqa import GroupQuery
from .moe import Experts
from .norms import Norms
from .ops import gate_and_up, op
from .options import ExportOptions
from .program import Program
from .quantized_cache import quantize_caches
from .rotary import Angles, lower_ropes
from .shapes import simplify_views
from .subject import Subject
from .weights import Products


def lower(
    program: Program,
    subject: Subject,
    options: ExportOptions,
    rows: int,
    scales: CacheScales | None = None,
) -> dict[Any, Any]:
    """Lower ``program`` in place; the result maps ops that stay to their ATen forms.

    Args:
        rows: of RoPE tables, where a table is made.
        scales: of GroupQueryAttention's caches, where they are quantised.
    """
    named = dict(zip(subject.input_names, program.inputs, strict=True))
    ids, mask = named.get("input_ids"), named.get("attention_mask")
    positions = named.get("position_ids")
    with program.step("fold"):
        program.fold()
    if options.kv_cache == "int8" and not options.contrib:
        with program.step("quantize_caches"):
            quantize_caches(program, subject)
    with program.step("simplify_views"):
        simplify_views(program)
    angles = Angles(program, positions, ids, rows)
    if options.contrib:
        with program.step("group_query_attention"):
            GroupQuery(program, angles, ids, mask, positions, scales).run()
            program.clean()
            _past_length(program, subject, ids, mask)
    with program.step("rotary_embedding"):
        lower_ropes(program, angles)
    with program.step("attention"):
        StandardAttention(program).run()
    with program.step("experts"):
        Experts(program, options.contrib).run()
    with program.step("norms"):
        Norms(program, options.contrib).run()
    with program.step("products"):
        Products(program, options.contrib).run()
    with program.step("simplify_views"):
        simplify_views(program)
    program.clean()
    return _decompositions(program)


def _decompositions(program: Program) -> dict[Any, Any]:
    """ATen forms of the dialect ops that are left."""
    said = {where.split(" at ")[-1] for where, _ in program.fallbacks}
    forms: dict[Any, Any] = {op("mask"): _mask_form, op("gate_and_up"): gate_and_up}
    for node in program.graph.nodes:
        if not is_dialect_op(node):
            continue
        name = dialect_name(node)
        forms[node.target] = FORMS.get(name) or OPS[name].reference
        if node.name not in said and (node.meta.get("dspark_op") or "") not in said:
            if not any(where.startswith(f"dspark::{name} ") for where, _ in program.fallbacks):
                program.fallbacks.append(
                    (f"dspark::{name} at {node.name}", "ONNX has no such op: decomposed")
                )
    return forms


def _mask_form(tensors: Any, ints: Any, b: Any, h: Any, q: Any, k: Any, text: str) -> Any:
    import torch

    device = tensors[0].device if tensors else torch.device("cpu")
    return evaluate(text, tensors, ints, (b, h, q, k), device)


def _past_length(
    program: Program, subject: Subject, ids: fx.Node | None, mask: fx.Node | None
) -> None:
    """Sizes of a past as total minus new tokens: a past bound to a larger buffer has more rows."""
    if ids is None or mask is None:
        return
    caches = {n for n, name in zip(program.inputs, subject.input_names) if name in subject.caches}
    for node in list(program.graph.nodes):
        if is_op(node, aten.sym_size.int) and node.args[0] in caches and node.args[1] == 2:
            import operator

            total = program.emit(node, aten.sym_size.int, (mask, 1))
            rows = program.emit(node, aten.sym_size.int, (ids, 1))
            node.replace_all_uses_with(program.emit(node, operator.sub, (total, rows)))
            program.graph.erase_node(node)
