"""Caches of 8 bits in standard ops: int8 values and one scale for each token and head.

    past [B, H, N, D]  ->  past int8 [B, H, N, D], past_scale [B, H, N, 1]
    append(past, new)  ->  append(past, q), append(past_scale, s)     (q, s) = quantize_kv(new)
    what reads it      ->  DequantizeLinear(q, s), one block a row

The scheme is that of ``kv_cache="int8"`` at run time (`dspark_compile.ops.cache`), with the scale
in the graph's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dspark_compile.ops.cache import quantize_kv
from dspark_compile.passes.graph import aten, is_dialect_op

from .errors import ExportError
from .ops import op
from .program import Program
from .subject import Case, Subject
from .weights import _item


def quantize_caches(program: Program, subject: Subject) -> None:
    """Store every cache of the program in int8.

    Raises:
        ExportError: a cache is read or written in a way that this does not follow.
    """
    named = dict(zip(subject.input_names, program.inputs, strict=True))
    for past, present in list(subject.caches.items()):
        node = named[past]
        writers = [u for u in node.users if is_dialect_op(u, "cache_append", "cache_extend")]
        others = [u for u in node.users if u not in writers and u.target is not aten.sym_size.int]
        outputs = program.outputs
        where = outputs[program.output_names.index(present)]
        if len(writers) != 1 or writers[0] is not where or others:
            raise ExportError(
                f"kv_cache='int8': {past} is read in other ways than by appending to it; choose "
                "kv_cache='model'"
            )
        _quantize(program, subject, node, writers[0], past, present)


def _quantize(
    program: Program, subject: Subject, node: fx.Node, writer: fx.Node, past: str, present: str
) -> None:
    value = node.meta["val"]
    dtype, width = value.dtype, int(value.shape[-1])
    with program.fake_mode:
        scales = torch.empty((*value.shape[:-1], 1), dtype=dtype)
        node.meta["val"] = torch.empty(value.shape, dtype=torch.int8)
    scale = program.new_input(f"{past}_scale", scales, node)
    new = writer.args[1]
    assert isinstance(new, fx.Node)
    program.graph.inserting_before(writer)
    pair = program.emit(writer, torch.ops.dspark.quantize_kv.default, (new, dtype))
    numbers, sizes = (_item(program, writer, pair, i) for i in range(2))
    column = program.emit(writer, aten.unsqueeze.default, (sizes, -1))
    rest = writer.args[2:]
    target = writer.target
    appended = program.emit(writer, target, (node, numbers, *rest))  # type: ignore[arg-type]
    appended_scale = program.emit(writer, target, (scale, column, *rest))  # type: ignore[arg-type]
    whole = program.emit(writer, op("dequantize"), (appended, appended_scale, width))
    index = program.output_names.index(present)
    out = next(n for n in program.graph.nodes if n.op == "output")
    results = list(out.args[0])
    writer.replace_all_uses_with(whole, delete_user_cb=lambda u: u is not out)
    results[index : index + 1] = [appended, appended_scale]
    out.args = (tuple(results),)
    program.output_names.insert(index + 1, f"{present}_scale")
    program.graph.erase_node(writer)
    at = subject.input_names.index(past)
    subject.input_names.insert(at + 1, f"{past}_scale")
    subject.dynamic.insert(at + 1, dict(subject.dynamic[at]))
    subject.output_names[:] = program.output_names
    subject.caches[f"{past}_scale"] = f"{present}_scale"


def quantized_case(case: Case, input_names: list[str]) -> Case:
    """A case of the exact graph as one of the int8 graph, whose inputs are named. Presents are not
    compared, the logits they lead to are."""
    inputs: list[Tensor] = []
    given = iter(case.inputs)
    for name in input_names:
        if name.endswith("_scale"):
            continue
        value = next(given)
        if name.startswith("past_key_values"):
            q, scale = quantize_kv(value, value.dtype)
            inputs += [q, scale.unsqueeze(-1)]
        else:
            inputs.append(value)
    caches = len(inputs) - len(case.inputs)
    expected: list[Tensor | None] = [case.expected[0], *([None] * (2 * caches))]
    expected += case.expected[1 + caches :]
    return Case(case.name, inputs, expected, case.rows, case.valid)
