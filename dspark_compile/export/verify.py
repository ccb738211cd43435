"""Verification: the graph is checked, loaded, and compared with the model before success is said.

Every case runs the model eagerly, as a user calls it, and the graph in ONNX Runtime. An error is
``max |a - b| / max |b|`` over one output, or, where a quantised cache leaves more than rounding,
``‖a - b‖ / ‖b‖``. Where it is above the tolerance, both the program the
graph was translated from and the graph itself are run with every value kept, and the first node
whose values differ is named, with the pass and the source line it came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .errors import ExportError, VerificationError
from .options import ExportOptions
from .subject import Case

# By the graph's dtype: what its arithmetic may differ by, and what an int8 cache costs.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
# These errors are in the 2-norm.
CACHE_TOLERANCE = {"int8": 1e-2, "static int8": 2e-2, "static int4": 3e-1}


@dataclass(frozen=True)
class Check:
    """One compared case: its name, and the largest error over its outputs."""

    case: str
    error: float
    tolerance: float


def providers(options: ExportOptions) -> list[str]:
    """Execution providers to run the graph on.

    Raises:
        ExportError: CUDA is asked for and this ONNX Runtime does not have it.
    """
    import onnxruntime

    if options.provider == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ExportError(
            "provider='cuda': this ONNX Runtime has no CUDA provider; install onnxruntime-gpu, or "
            "export with verify=False and compare where it is"
        )
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def session(path: Path, options: ExportOptions, optimize: bool = True) -> Any:
    """An ONNX Runtime session.

    Raises:
        VerificationError: it does not load.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if not optimize:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=providers(options))
    except ExportError:
        raise
    except Exception as error:
        raise VerificationError(f"ONNX Runtime cannot load the graph: {error}") from error


def check_model(path: Path, options: ExportOptions) -> None:
    """``onnx.checker``; with contrib ops, whose schemas onnx does not know, only the structure.

    Raises:
        VerificationError: the model is malformed.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=not options.contrib)
    except Exception as error:
        raise VerificationError(f"the ONNX checker refuses the graph: {error}") from error


def run(loaded: Any, names: list[str], case: Case) -> list[Tensor]:
    """The outputs of a session, in the graph's order.

    Raises:
        VerificationError: the graph does not run.
    """
    known = {i.name for i in loaded.get_inputs()}
    feed = {n: to_numpy(x) for n, x in zip(names, case.inputs, strict=True) if n in known}
    try:
        return [torch.from_numpy(x.copy()) for x in loaded.run(None, feed)]
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise VerificationError(f"the graph does not run for {case.name}: {text}") from error


def to_numpy(x: Tensor) -> Any:
    """A tensor as an array; bfloat16 through ml_dtypes."""
    x = x.detach().cpu().contiguous()
    if x.dtype == torch.bfloat16:
        import ml_dtypes

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def errors(
    case: Case, got: list[Tensor], names: list[str], norm: bool = False
) -> list[tuple[str, float]]:
    """``(output, error)`` of every output that is compared; infinity for other shapes or NaN."""
    made = []
    for name, a, b in zip(names, got, case.expected, strict=True):
        if b is None:
            continue
        if case.rows is not None and name.startswith("present") and a.dim() >= 3:
            a, b = a[:, :, : case.rows], b[:, :, : case.rows]
        if case.valid is not None and not name.startswith("present"):
            a, b = a[case.valid], b[case.valid]
        made.append((name, difference(a, b, norm)))
    return made


def difference(a: Tensor, b: Tensor, norm: bool = False) -> float:
    """``max |a - b| / max |b|``, or with ``norm`` ``‖a - b‖ / ‖b‖``; infinity where shapes or kinds
    differ or a value is no number. Where ``b`` is infinite ``a`` has to be so too: logits of tokens
    that cannot be chosen."""
    if a.shape != b.shape:
        return float("inf")
    if not b.numel():
        return 0.0
    if not b.is_floating_point():
        wide_a, wide_b = a.double(), b.double()
        return float((wide_a - wide_b).abs().max() / wide_b.abs().max().clamp(min=1))
    a, b = a.double(), b.double()
    endless = b.isinf()
    if endless.any() and a[endless].equal(b[endless]):
        a, b = a.masked_fill(endless, 0), b.masked_fill(endless, 0)
    if a.isnan().any() or a.isinf().any():
        return float("inf")
    if norm:
        return float((a - b).norm() / b.norm().clamp(min=1e-6))
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


def verify(
    path: Path,
    options: ExportOptions,
    cases: list[Case],
    names: tuple[list[str], list[str]],
    dtype: torch.dtype,
    program: Any,
) -> list[Check]:
    """Check, load and compare the model at ``path``.

    Args:
        names: of the graph's inputs and outputs.
        program: the exported program it was translated from, for `first_difference`.

    Raises:
        VerificationError: see the module's docstring.
    """
    check_model(path, options)
    loaded = session(path, options)
    norm, tolerance = False, TOLERANCE.get(dtype, 1e-5)
    if options.kv_cache != "model":
        kind = f"static {options.kv_cache}" if options.contrib else options.kv_cache
        norm, tolerance = True, max(tolerance, CACHE_TOLERANCE[kind])
    done = []
    for case in cases:
        found = errors(case, run(loaded, names[0], case), names[1], norm)
        worst = max(found, key=lambda item: item[1])
        if not worst[1] <= tolerance:
            where = first_difference(path, options, case, names[0], program, tolerance)
            raise VerificationError(
                f"{case.name}: output {worst[0]!r} differs from the model by {worst[1]:.2e} "
                f"(tolerance {tolerance:.0e}); {where}"
            )
        done.append(Check(case.name, worst[1], tolerance))
    return done


def first_difference(
    path: Path, options: ExportOptions, case: Case, names: list[str], program: Any, tolerance: float
) -> str:
    """In words: the first node of the graph whose values differ from the program's own."""
    try:
        return _first_difference(path, options, case, names, program, tolerance)
    except Exception as error:  # the comparison itself must not hide the finding
        return f"the first node could not be found ({type(error).__name__}: {error})"


def _first_difference(
    path: Path, options: ExportOptions, case: Case, names: list[str], program: Any, tolerance: float
) -> str:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    produced = {o: n for n in model.graph.node for o in n.output if o}
    outputs = {o.name for o in model.graph.output}
    for name in produced:
        if name not in outputs:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    probe = path.with_name(path.stem + ".probe.onnx")
    onnx.save(model, str(probe))
    try:
        loaded = session(probe, options, optimize=False)
        known = {i.name for i in loaded.get_inputs()}
        feed = {n: to_numpy(x) for n, x in zip(names, case.inputs, strict=True) if n in known}
        wanted = [o.name for o in loaded.get_outputs()]
        values = dict(zip(wanted, loaded.run(wanted, feed), strict=True))
    finally:
        probe.unlink(missing_ok=True)
    kept = _Keeping(program)
    kept.run_program(case.inputs)
    for name, node in produced.items():
        mine, theirs = values.get(name), kept.values.get(_value_name(node, name))
        if mine is None or not isinstance(theirs, Tensor) or mine.shape != tuple(theirs.shape):
            continue
        error = difference(torch.from_numpy(mine.copy()), theirs)
        if not error <= tolerance:
            said = {p.key: p.value for p in node.metadata_props}
            origin = ", ".join(
                f"{key.split('.')[1]} {said[key]}"
                for key in ("dspark.op", "dspark.pass", "dspark.module", "dspark.source")
                if said.get(key)
            )
            return (
                f"the first node that differs is {node.op_type} {node.name!r} ({error:.2e}): "
                f"{origin}"
            )
    return "every node computes what the program says: the model's own result is another"


def _value_name(node: Any, output: str) -> str:
    """The program's name of a node's value: the last of an op's nodes carries its result."""
    said = {p.key: p.value for p in node.metadata_props}
    base = said.get("dspark.value", "")
    return base if output == base or output.startswith(("present", "logits")) else output


class _Keeping(fx.Interpreter):
    """Runs a program and keeps every tensor by the name of its node."""

    def __init__(self, exported: Any) -> None:
        super().__init__(exported.graph_module)
        self.exported = exported
        self.values: dict[str, Any] = {}

    def run_program(self, inputs: list[Tensor]) -> None:
        exported = self.exported
        state = {**dict(exported.named_parameters()), **dict(exported.named_buffers())}
        state |= exported.constants
        given = iter(inputs)
        arguments = [
            next(given) if spec.target is None else state[spec.target]
            for spec in exported.graph_signature.input_specs
        ]
        with torch.no_grad():
            self.run(*arguments)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value
