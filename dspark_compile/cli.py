"""The ``dspark`` command: explain a model, export it, run the demo, show the environment."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dspark_compile.codegen.machine import Machine

app = typer.Typer(
    name="dspark",
    help="A torch.compile back end for language-model decoding.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def explain(
    model_path: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    prompt: Annotated[str, typer.Option(help="Text to run the model on.")] = "def main():",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report as JSON.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Also write the report as one HTML file.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option(help="An option of the back end, as name=value; repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show every site, pass and program.")] = False,
) -> None:
    """Compile a model folder, run its prefill on a prompt, and print what was done and why."""
    from dspark_compile.diagnostics.explain import explain as run_explain

    chosen = parse_options(options or [])
    _check_options(chosen)
    model, tokenizer = _load(model_path)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise typer.BadParameter(
            f"{prompt!r} has no tokens in this folder's tokenizer; give other text, or check that "
            "the folder holds a tokenizer.json",
            param_hint="--prompt",
        )
    report = run_explain(model, input_ids=inputs["input_ids"], use_cache=False, options=chosen)
    report.print(verbose=verbose)
    _write(report.to_json, json_file, "--json")
    _write(report.to_html, html_file, "--html")


@app.command()
def export(
    model_path: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    output: Annotated[Path, typer.Argument(help="A .onnx file; a folder for --target genai.")],
    target: Annotated[str, typer.Option(help="portable, gqa, local or genai.")] = "portable",
    opset: Annotated[int, typer.Option(help="23 or 24; 0 chooses by target.")] = 0,
    kv_cache: Annotated[str, typer.Option(help="model, int8 or int4.")] = "model",
    dtype: Annotated[str, typer.Option(help="float32, float16, bfloat16 or model.")] = "float32",
    cache: Annotated[str, typer.Option(help="auto, static or growing.")] = "auto",
    provider: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_length: Annotated[int, typer.Option(help="Positions; 0 takes the model's own.")] = 0,
    calibration: Annotated[
        Path | None, typer.Option(help="A text file that static cache scales are taken from.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare with the model.")] = True,
    taps: Annotated[str, typer.Option(help="Layers whose outputs are outputs, as 1,9,17.")] = "",
    draft: Annotated[
        Path | None,
        typer.Option(help="The model's DSpark draft: written beside it as NAME.draft.onnx."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the report as JSON.")
    ] = None,
) -> None:
    """Export a model folder to ONNX, or to a folder for onnxruntime-genai, and compare it.

    With --draft the model's graph also gives the states that the draft reads, and the draft becomes
    a graph of its own.
    """
    from dspark_compile.export import ExportError, ExportOptions, export_onnx
    from dspark_compile.export.options import check_path

    try:
        tapped = [int(t) for t in taps.split(",") if t.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{taps!r} is not a list of layers such as 1,9,17", param_hint="--taps"
        ) from None
    if draft is not None and target == "genai":
        raise typer.BadParameter(
            "onnxruntime-genai runs no drafts; choose --target gqa or portable",
            param_hint="--draft",
        )

    chosen: dict[str, Any] = {
        "target": target, "opset": opset, "kv_cache": kv_cache, "dtype": dtype, "cache": cache,
        "provider": provider, "max_length": max_length, "verify": verify,
    }  # fmt: skip
    text = None
    if calibration is not None:
        if not calibration.is_file():
            raise typer.BadParameter(f"{str(calibration)!r} is no file", param_hint="--calibration")
        text = calibration.read_text(encoding="utf-8")
    try:
        check_path(output, ExportOptions.parse(chosen))
        model, tokenizer = _load(model_path)
        drafting = None if draft is None else _load_draft(draft, model, tokenizer)
        if drafting is not None:
            tapped = list(dict.fromkeys([*drafting.config.target_layer_ids, *tapped]))
        report = export_onnx(
            model, output, taps=tapped, calibration=text, tokenizer=tokenizer, **chosen
        )
        report.print()
        if drafting is not None:
            beside = output.with_name(f"{output.stem}.draft.onnx")
            kept = {key: chosen[key] for key in ("dtype", "provider", "verify")}
            export_onnx(drafting, beside, **kept).print()
    except ExportError as error:
        raise typer.BadParameter(str(error), param_hint="export") from error
    _write(report.to_json, json_file, "--json")


@app.command()
def demo() -> None:
    """Compile the shipped model, generate with it, and compare it with eager and Inductor."""
    from dspark_compile.demo import run

    run()


@app.command("train-draft")
def train_draft(
    target: Annotated[str, typer.Option(help="The target: a model folder, or an id on the Hub.")],
    data: Annotated[Path, typer.Option(help="Text, prompts or chats: a file or a folder.")],
    out: Annotated[Path, typer.Option(help="Where the draft goes; the same folder resumes.")],
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 chooses.")] = 0,
    intermediate_size: Annotated[int, typer.Option(help="Of the MLPs; 0: the target's.")] = 0,
    block_size: Annotated[int, typer.Option(help="Tokens drafted at once.")] = 7,
    taps: Annotated[str, typer.Option(help="Layers to tap, as 1,9,17; empty chooses.")] = "",
    markov_rank: Annotated[int, typer.Option(help="0: no Markov head; -1 chooses.")] = -1,
    markov_head: Annotated[str, typer.Option(help="vanilla, gated or rnn.")] = "vanilla",
    draft_vocab_size: Annotated[
        int, typer.Option(help="Tokens it can propose, the most frequent ones; 0: all.")
    ] = 0,
    init: Annotated[
        str, typer.Option(help="target, random, or the folder or Hub id of a draft to go on from.")
    ] = "target",
    prompts: Annotated[int, typer.Option(help="Texts the target writes; 0 chooses.")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Length of each; 0 chooses.")] = 0,
    temperatures: Annotated[str, typer.Option(help="At which it writes them.")] = "1.0,0.0",
    given_share: Annotated[float, typer.Option(help="Share of the data's own text.")] = 0.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0 chooses.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Train so long instead.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Blocks a sequence; 0 chooses.")] = 0,
    optimizer: Annotated[str, typer.Option(help="adamw or muon.")] = "adamw",
    lr: Annotated[float, typer.Option(help="Peak learning rate; 0 chooses.")] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train a DSpark draft for a target, on text that the target writes itself."""
    from dspark_compile.training import TrainError, TrainOptions
    from dspark_compile.training import train_draft as run_training

    try:
        options = TrainOptions(
            layers=layers,
            intermediate_size=intermediate_size,
            block_size=block_size,
            taps=_numbers(taps, int, "--taps") or None,
            markov_rank=None if markov_rank < 0 else markov_rank,
            markov_head=markov_head,
            draft_vocab_size=draft_vocab_size,
            init=init,
            prompts=prompts,
            new_tokens=new_tokens,
            temperatures=_numbers(temperatures, float, "--temperatures"),
            given_share=given_share,
            steps=steps,
            minutes=minutes,
            batch=batch,
            anchors=anchors,
            optimizer=optimizer,
            lr=lr,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        result = run_training(target, data, out, options=options)
    except TrainError as error:
        raise typer.BadParameter(str(error)) from error
    except ValueError as error:
        # Data that cannot be read, taps that the target lacks.
        raise typer.BadParameter(str(error)) from error
    found = result.evaluation
    typer.echo(
        f"{result.folder}: tau {found.told(found.tau_greedy)} at T=0, "
        f"{found.told(found.tau_sampled)} at T=1; "
        "by position, given the prefix: " + " ".join(f"{c:.2f}" for c in found.conditional)
    )
    if found.tau_greedy is None:
        typer.echo(
            "no held-out text was both written at temperature 0 and long enough; give more "
            "--prompts or --new-tokens, or 0 among --temperatures"
        )
    if found.ece_after:
        before, after = (100 * sum(e) / len(e) for e in (found.ece_before, found.ece_after))
        typer.echo(f"calibration error {before:.1f} % before, {after:.1f} % after scaling")


@app.command()
def env(
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the machine again, for about 5 seconds.")
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Fit the cost model to kernels timed here, in up to two minutes, and keep it.",
        ),
    ] = False,
) -> None:
    """Print versions, devices, the C++ compiler, and what the machine can do."""
    from dspark_compile.codegen.machine import describe
    from dspark_compile.diagnostics.environment import environment

    try:
        machine = describe(fresh=measure)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="DSPARK_MACHINE") from error
    if calibrate:
        machine = replace(machine, factors=_calibrated(machine))
    values = machine.to_dict()
    typer.echo(json.dumps({**environment(), "machine": values}, indent=2, default=str))


def _calibrated(machine: Machine) -> dict[str, float]:
    """Fitted factors, which are kept; how far the fit is goes to standard error."""
    from rich.console import Console
    from rich.progress import Progress

    from dspark_compile.codegen.calibrate import calibrate
    from dspark_compile.codegen.machine import busy, keep_factors

    if busy():
        typer.echo(
            "other work is running, so kernels will look slow: calibrate again when it has ended",
            err=True,
        )
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("kernels", total=None)
        try:
            factors = calibrate(
                machine, progress=lambda done, of: bar.update(task, completed=done, total=of)
            )
        except RuntimeError as error:
            raise typer.BadParameter(str(error), param_hint="--calibrate") from error
    keep_factors(factors)
    return factors


def parse_options(items: list[str]) -> dict[str, Any]:
    """``["kv_cache=int8", "verify=true"]`` as ``{"kv_cache": "int8", "verify": True}``.

    Values are read as Python literals where they are one (``true`` and ``false`` too), otherwise
    as text.

    Raises:
        typer.BadParameter: an item is not of the form name=value, or a name comes twice.
    """
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise typer.BadParameter(
                f"{item!r} is not name=value; write for instance --options kv_cache=int8",
                param_hint="--options",
            )
        if name in parsed:
            raise typer.BadParameter(f"{name!r} is given twice; keep one", param_hint="--options")
        parsed[name] = _literal(text.strip())
    return parsed


def _numbers(text: str, kind: type, option: str) -> tuple[Any, ...]:
    """``"1,9,17"`` as numbers.

    Raises:
        typer.BadParameter: a part is not a number.
    """
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers; write for instance {option} 1,9,17",
            param_hint=option,
        ) from None


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_options(chosen: dict[str, Any]) -> None:
    from dspark_compile.options import Options, OptionsError

    try:
        Options.parse(chosen)
    except OptionsError as error:
        raise typer.BadParameter(str(error), param_hint="--options") from error


def _load_draft(path: Path, model: Any, tokenizer: Any) -> Any:
    """The draft model of a folder, bound to its target.

    Raises:
        typer.BadParameter: there is none, or it does not fit the target.
    """
    from dspark_compile.models.draft import DraftModel
    from dspark_compile.models.draft_config import DraftError

    if not (path / "config.json").is_file():
        raise typer.BadParameter(
            f"{str(path)!r} has no config.json; give the folder of a DSpark draft",
            param_hint="--draft",
        )
    try:
        return DraftModel.from_pretrained(path, target=model, tokenizer=tokenizer)
    except DraftError as error:
        raise typer.BadParameter(str(error), param_hint="--draft") from error


def _load(path: Path) -> tuple[Any, Any]:
    """The causal language model and the tokenizer of a folder.

    Raises:
        typer.BadParameter: there is no such folder, it holds no model, or transformers is missing.
    """
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "is not a folder"
        raise typer.BadParameter(
            f"{str(path)!r} {what}; give a folder in Hugging Face format "
            "(config.json, model.safetensors, tokenizer.json)",
            param_hint="MODEL_PATH",
        )
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise typer.BadParameter(
            "loading a model folder needs transformers; pip install 'dspark-compile[hf]'",
            param_hint="MODEL_PATH",
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(
            f"{str(path)!r} cannot be loaded as a causal language model: {error}",
            param_hint="MODEL_PATH",
        ) from error
    return model.eval(), tokenizer


def _write(write: Callable[[Path], Any], path: Path | None, option: str) -> None:
    if path is None:
        return
    try:
        write(path)
    except OSError as error:
        raise typer.BadParameter(
            f"cannot write {str(path)!r}: {error.strerror}; give a path in a folder that exists "
            "and is writable",
            param_hint=option,
        ) from error


def main() -> None:
    """The console script's entry point."""
    app()


if __name__ == "__main__":
    main()
