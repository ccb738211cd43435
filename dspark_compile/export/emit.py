"""From a lowered program to an ONNX model with names and provenance a person can read."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from dspark_compile._version import __version__

from .errors import ExportError
from .exported import exported_program
from .functions import outline
from .options import ExportOptions
from .program import Program
from .subject import Subject
from .translate import table

IR_VERSION = 11  # what ONNX Runtime 1.24 and later read; opset 24 does not ask for more

# Ops whose outputs behind the first are optional.
OPTIONAL_OUTPUTS = frozenset(
    {
        "Attention", "LayerNormalization", "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)  # fmt: skip

# What a node says of itself, in the model and in the report.
METADATA = {
    "dspark.op": "dspark_op",
    "dspark.pass": "dspark_pass",
    "dspark.source": "dspark_source",
    "dspark.module": "dspark_module",
}


def onnx_model(
    program: Program, subject: Subject, options: ExportOptions, forms: dict[Any, Any]
) -> tuple[Any, ExportedProgram]:
    """``(onnx_ir.Model, the exported program it was translated from)``.

    Raises:
        ExportError: an ATen op has no translation.
    """
    program.provenance()
    exported = exported_program(program).run_decompositions(forms)
    # Weights that are views of larger storage would be written whole.
    try:
        with _quiet():
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=options.opset,
                custom_translation_table=table(options.opset),
                input_names=subject.input_names,
                output_names=subject.output_names,
                verbose=False,
                optimize=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise ExportError(
            f"the graph cannot be translated to ONNX opset {options.opset}: "
            f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0][:500]}"
        ) from error
    assert made is not None
    model = made.model
    _annotate(model)
    _optimize(model)
    if options.target == "local":
        outline(model, OPTIONAL_OUTPUTS)
    _finish(model, subject, options)
    return model, made.exported_program


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notices of packages that are not installed."""
    names = ("torch.onnx._internal.exporter._registration", "torch.onnx._internal.exporter._core")
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _annotate(model: Any) -> None:
    """Each node says which pass made it, from which op, line and module; torch's own notes, which
    hold paths of this machine, go."""
    for node in model.graph.all_nodes():
        fx_node = node.meta.get("node")
        custom = fx_node.meta.get("custom", {}) if fx_node is not None else {}
        node.metadata_props.clear()
        for key, name in METADATA.items():
            if custom.get(name):
                node.metadata_props[key] = custom[name]
        if custom.get("dspark_site"):
            node.metadata_props["dspark.site"] = custom["dspark_site"]
        if fx_node is not None:
            node.metadata_props["dspark.value"] = fx_node.name
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _optimize(model: Any) -> None:
    """Constant folding, common subexpressions and dead code; weights are not folded."""
    import onnxscript.optimizer

    onnxscript.optimizer.optimize(
        model, input_size_limit=1024, output_size_limit=4096, onnx_shape_inference=False
    )
    import onnx_ir.passes.common as common

    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _finish(model: Any, subject: Subject, options: ExportOptions) -> None:
    import onnx_ir as ir

    _name_dimensions(model, subject, options)
    for node in model.graph.all_nodes():
        # An optional output that nothing reads is not asked for.
        if node.op_type in OPTIONAL_OUTPUTS:
            while len(node.outputs) > 1 and not _read(node.outputs[-1]):
                node.resize_outputs(len(node.outputs) - 1)
            for output in node.outputs[1:]:
                if not _read(output):
                    output.name = ""
        for key in [k for k in node.metadata_props if not k.startswith("dspark.")]:
            del node.metadata_props[key]
        if node.domain == "com.microsoft":
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        module = node.metadata_props.get("dspark.module", "")
        if node.outputs and node.outputs[0].name:
            stem = node.outputs[0].name
            node.name = f"{module}/{stem}".lstrip("/")
    model.ir_version = IR_VERSION
    model.producer_name = "dspark"
    model.producer_version = __version__
    model.metadata_props["dspark.target"] = options.target
    model.metadata_props["dspark.kv_cache"] = options.kv_cache
    model.graph.name = "dspark"
    assert isinstance(model, ir.Model)


def _read(value: Any) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _name_dimensions(model: Any, subject: Subject, options: ExportOptions) -> None:
    """Dynamic dimensions of inputs and outputs under the names that users know."""
    import onnx_ir as ir

    rename: dict[str, str] = {}
    for value, dims in zip(model.graph.inputs, subject.dynamic, strict=False):
        shape = list(value.shape or [])
        for dim, name in dims.items():
            if not isinstance(shape[dim], int):
                rename.setdefault(str(shape[dim].value), name)
            shape[dim] = name
        value.shape = ir.Shape(shape)
    by_name = {v.name: v for v in model.graph.inputs}
    for value in model.graph.outputs:
        if value.shape is None:
            continue
        sizes = [d if isinstance(d, int) else str(d.value) for d in value.shape]
        value.shape = ir.Shape([rename.get(d, d) if isinstance(d, str) else d for d in sizes])
    for past, present in subject.caches.items():
        source = by_name.get(past)
        found = next((v for v in model.graph.outputs if v.name == present), None)
        if source is not None and found is not None and source.shape is not None:
            shape = list(source.shape)
            shape = [
                "total_sequence_length"
                if not isinstance(d, int) and str(d.value) == "past_sequence_length"
                else d
                for d in shape
            ]
            found.shape = ir.Shape(shape)
