"""``export_onnx``: validate, capture, rewrite, lower, translate, write, compare, move."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark_compile.diagnostics.report import GraphReport

from .calibrate import CacheScales, calibrated, packed_case, rotation_of, sample_ids
from .causal_lm import CausalLM, is_causal_lm
from .draft import DraftBlock, is_draft
from .errors import ExportError
from .options import ExportOptions, check_path
from .plain_module import Plain
from .program import Program, captured
from .quantized_cache import quantized_case
from .report import ExportReport, counts, translations
from .subject import Case, Subject


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    args: Sequence[Tensor] | None = None,
    *,
    dynamic_shapes: Sequence[dict[int, str] | None] | None = None,
    check_args: Sequence[Sequence[Tensor]] = (),
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    taps: Sequence[int] = (),
    calibration: Tensor | Sequence[Tensor] | Sequence[str] | str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> ExportReport:
    """Export a model through the passes of ``torch.compile(backend="dspark")`` to ONNX.

    A Hugging Face causal language model needs no ``args``: the graph takes ``input_ids [B, S]``,
    ``attention_mask [B, T]``, ``position_ids [B, S]`` and ``past_key_values.<i>.key/value``, and
    gives ``logits [B, S, V]`` and ``present.<i>.key/value``, for prompts and steps of any batch.
    A `DraftModel` needs none either: see `export.draft`. Any other module is traced on ``args``.

    Args:
        model: the model; neither it nor its parameters are changed.
        path: a ``.onnx`` file, or a folder for ``target="genai"``.
        args: example tensors, for a module that is no Hugging Face language model.
        dynamic_shapes: for each of ``args``, its dynamic dimensions and their names.
        check_args: more inputs to compare the graph and the model on.
        input_names, output_names: names of the graph's inputs and outputs for ``args``.
        taps: decoder layers whose outputs are outputs too, ``hidden_states.<id>``: what a draft
            model reads.
        calibration: text, texts or token ids ``[B, N]`` from which static cache scales are taken.
        tokenizer: of the model: for text in ``calibration``, and for a genai folder. By default it
            is loaded from where the model came from.
        options: fields of `ExportOptions`: ``target``, ``opset``, ``kv_cache``, ``dtype``,
            ``cache``, ``provider``, ``max_length``, ``external_data``, ``shapes``, ``verify``,
            ``overwrite``.

    Returns:
        The report; the files are in place.

    Raises:
        ExportError: the options, the path or the model do not allow it: the message names option,
            value and remedy. Nothing has been written.
        VerificationError: the graph does not compute what the model does. Nothing is left behind.
    """
    chosen = ExportOptions.parse(options)
    target = check_path(path, chosen)
    _check_packages(chosen)
    if not isinstance(model, nn.Module):
        raise ExportError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    dtype = _dtype(model, chosen)
    causal = args is None and is_causal_lm(model)
    draft = args is None and is_draft(model)
    if args is None and not causal and not draft:
        raise ExportError(
            f"args=None with a {type(model).__name__}, which is no Hugging Face causal language "
            "model: give example inputs as args=(...)"
        )
    if chosen.target == "genai" and not causal:
        raise ExportError("target='genai' takes Hugging Face causal language models only")
    static_scales = chosen.contrib and chosen.kv_cache != "model"
    if static_scales and calibration is None:
        raise ExportError(
            f"kv_cache={chosen.kv_cache!r} with target={chosen.target!r} has static scales: give "
            "calibration=, text or token ids like those the model will see"
        )
    if chosen.kv_cache != "model" and not causal:
        raise ExportError(
            f"kv_cache={chosen.kv_cache!r} is for Hugging Face causal language models; leave it at "
            "'model'"
        )
    seconds: dict[str, float] = {}
    with _prepared(model, dtype) as ready:
        with _timed(seconds, "capture"):
            subject: Subject
            report = GraphReport()
            if causal:
                subject, program, chosen = _capture_causal(ready, taps, chosen, options, report)
            elif draft:
                subject = DraftBlock(ready, consecutive=chosen.opset >= 24)
                program = captured(subject, report)
            else:
                assert args is not None
                subject = Plain(ready, args, dynamic_shapes, check_args, input_names, output_names)
                program = captured(subject, report, quantised_experts=chosen.contrib)
        return _finish(
            program, subject, chosen, target, dtype, report, seconds, calibration, tokenizer
        )


def _finish(
    program: Program,
    subject: Subject,
    options: ExportOptions,
    target: Path,
    dtype: torch.dtype,
    found: GraphReport,
    seconds: dict[str, float],
    calibration: Any,
    tokenizer: Any,
) -> ExportReport:
    from .emit import onnx_model
    from .lowering import lower
    from .verify import verify
    from .write import move_files, move_folder, save, scratch

    with _timed(seconds, "lower"):
        rows = options.max_length or context_length(subject)
        scales = _scales(program, subject, options, calibration, tokenizer)
        forms = lower(program, subject, options, rows, scales)
    with _timed(seconds, "translate"):
        made, exported = onnx_model(program, subject, options, forms)
    report = ExportReport(
        str(target),
        {**dataclasses.asdict(options), "dtype": str(dtype).removeprefix("torch.")},
        counts(made),
        translations(made),
        list(program.fallbacks),
        [],
        [v.name for v in made.graph.inputs],
        [v.name for v in made.graph.outputs],
        [(p.name, p.rewritten) for p in found.passes if p.rewritten],
        [(r.module, r.condition, r.hint) for r in found.rejections],
        seconds,
    )
    with scratch(target) as folder:
        name = "model.onnx" if options.target == "genai" else target.name
        inner = folder / "result"
        inner.mkdir()
        with _timed(seconds, "write"):
            external = True if options.target == "genai" else options.external_data
            files = save(made, inner, name, external)
        if options.verify:
            with _timed(seconds, "verify"):
                names = (subject.input_names, subject.output_names)
                cases = _cases(subject, options, scales)
                report.checks = verify(files[0], options, cases, names, dtype, exported)
        if options.target == "genai":
            from .genai import write_folder

            report.fallbacks += write_folder(inner, subject, options, program, rows, tokenizer)
            move_folder(inner, target)
        else:
            move_files(files, target.parent)
    return report


def _capture_causal(
    model: nn.Module,
    taps: Sequence[int],
    options: ExportOptions,
    asked: dict[str, Any],
    report: GraphReport,
) -> tuple[CausalLM, Program, ExportOptions]:
    """The captured model; where ``cache="auto"`` chose a static cache that the model cannot be
    traced with, a growing one."""
    subject = CausalLM(model, static=options.static, taps=taps)
    try:
        program = captured(subject, report, quantised_experts=options.contrib)
        return subject, program, options
    except ExportError as error:
        if not options.static:
            raise
        if asked.get("cache", "auto") != "auto":
            raise ExportError(
                f"cache='static' does not go with {type(model).__name__}; choose "
                f"cache='growing': {error}"
            ) from error
    growing = dataclasses.replace(options, cache="growing")
    subject = CausalLM(model, static=False, taps=taps)
    program = captured(subject, report)
    program.fallbacks.append(("cache", "the model cannot be traced with a static one: it grows"))
    return subject, program, growing


def _scales(
    program: Program, subject: Subject, options: ExportOptions, calibration: Any, tokenizer: Any
) -> CacheScales | None:
    """Static scales of the caches where GroupQueryAttention wants them."""
    if not options.contrib or options.kv_cache == "model":
        return None
    assert isinstance(subject, CausalLM)
    subject.pool = sample_ids(calibration, tokenizer, subject)
    bits = 8 if options.kv_cache == "int8" else 4
    return calibrated(subject, subject.pool, bits, rotation_of(program))


def _cases(subject: Subject, options: ExportOptions, scales: CacheScales | None) -> list[Case]:
    """What the graph is compared on, in the graph's own form."""
    made = subject.cases(options.shapes, seed=0, padded=causal_padding(subject, options))
    if scales is not None:
        assert isinstance(subject, CausalLM)
        first = 2 + subject.takes_positions
        return [packed_case(case, scales, first, len(subject.layers)) for case in made]
    if options.kv_cache == "int8":
        return [quantized_case(c, subject.input_names) for c in made]
    return made


def causal_padding(subject: Subject, options: ExportOptions) -> bool:
    """Whether left-padded batches are compared: GroupQueryAttention has padding on the right."""
    return not options.contrib and isinstance(subject, CausalLM) and subject.takes_positions


def context_length(subject: Subject) -> int:
    """How many positions the model was made for; 4096 if it does not say."""
    config = getattr(subject, "config", None)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 4096


def _check_packages(options: ExportOptions) -> None:
    wanted = ["onnx", "onnxscript", *(["onnxruntime"] if options.verify else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"the export needs {', '.join(missing)}: pip install 'dspark-compile[onnx]'"
        )


def _dtype(model: nn.Module, options: ExportOptions) -> torch.dtype:
    """The graph's dtype.

    Raises:
        ExportError: the execution provider lacks it, or the model is not on one device.
    """
    floats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    devices = {p.device.type for p in model.parameters()}
    if "meta" in devices:
        raise ExportError("the model is on the meta device; load its weights first")
    own = next(iter(floats)) if len(floats) == 1 else torch.float32
    return options.check_model_dtype(own)


def _lent(model: nn.Module) -> list[nn.Module]:
    """Modules of a target that a draft holds without owning them."""
    if not is_draft(model):
        return []
    borrowed: Any = model.borrowed
    return [m for m in (borrowed.embedding, borrowed.head) if isinstance(m, nn.Module)]


@contextlib.contextmanager
def _prepared(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    """The model in eval mode, on the CPU and in ``dtype``: itself, or a copy if that changes it.

    What a draft borrows of its target goes along, though it is no part of the draft's state.
    """
    modules = [model, *_lent(model)]
    parameters = [p for module in modules for p in module.parameters()]
    tensors = [*parameters, *(b for module in modules for b in module.buffers())]
    other = any(t.is_floating_point() and t.dtype != dtype for t in parameters)
    if other or any(t.device.type != "cpu" for t in tensors):
        copied = copy.deepcopy(model).to(device="cpu", dtype=dtype).eval()
        for module in _lent(copied):
            module.to(device="cpu", dtype=dtype)
        yield copied
        return
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
