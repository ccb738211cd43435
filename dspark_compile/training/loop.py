"""Fitting a draft to a target, from files to a folder that `DraftModel.from_pretrained` reads.

1. Prompts are cut from the data, and the target writes a text for each (`regenerate`).
2. Each step runs the frozen target on a batch, taps its layers, and teaches blocks at random
   anchors (`step`, `loss`).
3. The draft is evaluated on held-out prompts, and its confidences are calibrated (`evaluate`).

All state lies under ``OUT/.training``; the same command goes on where it was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_vocabulary import cut_vocabulary, frequent_tokens
from dspark_compile.runtime.speculation.taps import decoder_layers
from dspark_compile.training.batches import Batches
from dspark_compile.training.data import prompts, read
from dspark_compile.training.draft_config import new_config
from dspark_compile.training.evaluate import Evaluation, evaluate
from dspark_compile.training.initialize import go_on_from, initialize
from dspark_compile.training.options import TrainError, TrainOptions
from dspark_compile.training.regenerate import Text, regenerate
from dspark_compile.training.step import Programs, learn, observe

WARM_UP = 0.04


@dataclass
class TrainResult:
    """What `train_draft` made.

    Attributes:
        draft: on the CPU, bound to the target, calibrated.
        evaluation: on the held-out texts.
        folder: where it was saved.
        steps, minutes: how much training there was, in all runs together.
    """

    draft: DraftModel
    evaluation: Evaluation
    folder: Path
    steps: int
    minutes: float


def train_draft(
    target: Any,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    options: TrainOptions | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a draft for ``target`` and save it to ``out``.

    Args:
        target: a causal language model of transformers, or the path or Hub id of one. A model is
            put in eval mode and on the device; its weights stay as they are.
        data: a file or folder, see `dspark_compile.training.data`.
        tokenizer: the target's; loaded from the same path if the target is one.

    Raises:
        TrainError: an option is not legal, or ``out`` holds a run with other options.
        ValueError: the data cannot be read.
    """
    options = options or TrainOptions()
    if Path(out).exists() and not Path(out).is_dir():
        raise TrainError(f"--out {str(out)!r} is a file; give a folder, or a name that is free")
    device = _device(options.device)
    dtype = _dtype(options.dtype, device)
    target, tokenizer = load_target(target, tokenizer, dtype)
    target = target.to(device).eval().requires_grad_(False)
    parameters = sum(p.numel() for p in target.parameters())
    width = target.get_input_embeddings().weight.shape[1]
    options = options.resolve(parameters, width, _layers(target))
    torch.manual_seed(options.seed)
    draft = DraftModel(new_config(target, tokenizer, options))
    if options.draft_vocab_size > draft.config.vocab_size:
        raise TrainError(
            f"draft_vocab_size={options.draft_vocab_size}: the target has "
            f"{draft.config.vocab_size} tokens; give fewer, or 0 for all"
        )
    if options.init in ("target", "random"):
        initialize(draft, target if options.init == "target" else None)
    else:
        go_on_from(draft, options.init)
    draft = draft.to(device)
    draft.bind(target)
    work = Path(out) / ".training"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"--out {str(out)!r} cannot be written: {error}") from error
    _same_run(work, draft, options)
    texts, held = _texts(target, tokenizer, Path(data), work, options, quiet)
    batches = Batches(texts, options.batch, options.max_length, options.seed)
    trainer = Trainer(target, draft, batches, options, dtype, work)
    trainer.run(quiet)
    draft.eval()
    if 0 < options.draft_vocab_size < draft.config.vocab_size:
        written = (text.ids[text.prompt :] for text in texts)
        kept = frequent_tokens(written, draft.config.vocab_size, options.draft_vocab_size)
        draft = cut_vocabulary(draft, kept).bind(target)
    evaluation = evaluate(target, draft, held, options, dtype)
    draft.calibration = evaluation.calibration()
    _finish(draft, evaluation, Path(out), trainer, options)
    return TrainResult(draft, evaluation, Path(out), trainer.step, trainer.elapsed / 60)


def _device(name: str | None) -> torch.device:
    """The device of that name, or the best there is.

    Raises:
        TrainError: torch cannot use it here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type == "meta":
            raise NotImplementedError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainError(
            f"device={name!r} cannot be used here: {why}; give cpu, or a device that torch sees"
        ) from error
    return device


def load_target(target: Any, tokenizer: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and tokenizer of a path, or what was given.

    Raises:
        TrainError: neither a model nor a path that holds one; no tokenizer.
    """
    if isinstance(target, nn.Module):
        if tokenizer is None:
            raise TrainError("give the target's tokenizer along with the model")
        return target, tokenizer
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise TrainError("training needs transformers; pip install 'dspark-compile[hf]'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise TrainError(f"--target {str(target)!r} cannot be loaded: {error}") from error
    return model, tokenizer


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, then a cosine to zero; ``progress`` from 0 to 1."""
    if progress < WARM_UP:
        return peak * max(progress, 1e-3) / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


class Trainer:
    """The optimizer, its schedule, and checkpoints."""

    def __init__(
        self,
        target: Any,
        draft: DraftModel,
        batches: Batches,
        options: TrainOptions,
        dtype: torch.dtype,
        work: Path,
    ) -> None:
        self.target, self.draft, self.batches = target, draft, batches
        self.options, self.dtype = options, dtype
        self.step, self.elapsed = 0, 0.0
        self.path = work / "checkpoint.pt"
        self.log = work / "log.jsonl"
        self.parameters = [p for p in draft.parameters() if p.requires_grad]
        self.optimizers = _optimizers(draft, options)
        if self.path.is_file():
            self._restore()

    @property
    def progress(self) -> float:
        """How much of the training is done, 0 to 1."""
        if self.options.minutes is not None:
            return min(1.0, self.elapsed / (60 * self.options.minutes))
        return min(1.0, self.step / self.options.steps)

    def run(self, quiet: bool = False) -> None:
        """Train to the end, with checkpoints on the way."""
        device = self.draft.fc.weight.device
        saved = self.elapsed
        self.draft.train()
        programs = Programs.of(self.draft, self._compiles())
        with _compiled_layers(self.target, self._compiles()), _bar(quiet, "training") as show:
            while self.progress < 1:
                start = time.perf_counter()
                generator = torch.Generator().manual_seed(self.options.seed + 31 * self.step)
                ids, mine = (t.to(device) for t in self.batches.batch(self.step))
                blocks = observe(
                    self.target, self.draft, ids, mine, self.options.anchors, generator
                )
                weight, terms = learn(
                    self.draft, blocks, self.dtype, self.options.loss_elements, programs
                )
                norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(self.progress, self.options.lr)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                self.step += 1
                self.elapsed += time.perf_counter() - start
                if self.step % 10 == 0 or self.progress >= 1:
                    line = self._record(weight, terms, float(norm))
                    show(self.progress, line)
                if self.elapsed - saved > self.options.checkpoint_seconds:
                    self.save()
                    saved = self.elapsed
        self.save()

    def _compiles(self) -> bool:
        if self.options.compile is not None:
            return self.options.compile
        return self.draft.fc.weight.device.type == "cuda"

    def _record(self, weight: float, terms: Any, norm: float) -> str:
        """Log a step; the line for the bar."""
        accept = (terms.accept / terms.count.clamp(min=1)).tolist()
        survive, tau = 1.0, 1.0
        for rate in accept:
            survive *= rate
            tau += survive
        entry = {
            "step": self.step,
            "minutes": round(self.elapsed / 60, 2),
            "loss": round(float(terms.total.detach()) / weight, 4),
            "ce": round(float(terms.ce) / weight, 4),
            "l1": round(float(terms.l1) / weight, 4),
            "confidence": round(float(terms.bce) / weight, 4),
            "accept": [round(a, 3) for a in accept],
            "tau": round(tau, 3),
            "norm": round(norm, 3),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return f"step {self.step}  loss {entry['loss']:.3f}  tau at T=1 {tau:.2f}"

    def save(self) -> None:
        """Write a checkpoint; a kill while writing leaves the one before."""
        state = {
            "draft": self.draft.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.path)

    def _restore(self) -> None:
        state = torch.load(self.path, map_location=self.draft.fc.weight.device, weights_only=True)
        self.draft.load_state_dict(state["draft"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        self.step, self.elapsed = state["step"], state["elapsed"]


def _optimizers(draft: DraftModel, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW without weight decay as published, or Muon for what is a matrix between features."""
    named = [(n, p) for n, p in draft.named_parameters() if p.requires_grad]
    matrices = [
        p
        for n, p in named
        if options.optimizer == "muon" and p.ndim == 2 and n.startswith(("layers.", "fc."))
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if matrices:
        # Updates of the same size as AdamW's, so that one learning rate serves both.
        muon = torch.optim.Muon(
            matrices, lr=options.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        made.append(muon)
    return made


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is not None:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    from dspark_compile.codegen.cpp import isa

    return torch.bfloat16 if isa.detect() in ("amx", "avx512_bf16") else torch.float32


def _layers(target: Any) -> int:
    return len(decoder_layers(target))


def _same_run(work: Path, draft: DraftModel, options: TrainOptions) -> None:
    """A folder holds one run: its options may only grow longer.

    Raises:
        TrainError: what differs.
    """
    free = {
        *("steps", "minutes", "checkpoint_seconds", "eval_sequences", "loss_elements", "device"),
        *("compile", "draft_vocab_size"),  # what is left out is left out in the end
    }
    mine = {k: v for k, v in dataclasses.asdict(options).items() if k not in free}
    mine["draft"] = draft.config.to_dict()
    mine = json.loads(json.dumps(mine))
    path = work / "options.json"
    if not path.is_file():
        path.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(k for k in mine | theirs if mine.get(k) != theirs.get(k))
    if different:
        raise TrainError(
            f"{str(work.parent)!r} holds a run with other values of {', '.join(different)}; give "
            "the same ones to go on with it, or another --out"
        )


def _texts(
    target: Any, tokenizer: Any, data: Path, work: Path, options: TrainOptions, quiet: bool
) -> tuple[list[Text], list[Text]]:
    """Texts to train on, and held-out ones (written by the target, always)."""
    chosen = prompts(
        data, tokenizer, longest=options.prompt_tokens, count=options.prompts, seed=options.seed
    )
    text = target.config.get_text_config(decoder=True)
    stops = getattr(target.generation_config, "eos_token_id", None) or text.eos_token_id
    stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
    pad = next((i for i in (tokenizer.pad_token_id, text.pad_token_id, *stops) if i is not None), 0)
    with _bar(quiet, "the target writes") as show:
        written = regenerate(
            target,
            chosen,
            work / "text",
            new_tokens=options.new_tokens,
            temperatures=options.temperatures,
            batch=options.text_batch,
            pad=int(pad),
            eos=stops,
            seed=options.seed,
            native=len(chosen) >= 256,
            progress=lambda done: show(done / len(chosen), f"{done} of {len(chosen)} prompts"),
        )
    written = [t for t in written if len(t.ids) - t.prompt >= 2]
    count = min(max(1, round(options.held_out * len(written))), len(written) - 1)
    if count < 1:
        raise TrainError(
            f"the target wrote {len(written)} texts of two tokens or more; give more prompts"
        )
    # Spread over the batches, so that all temperatures and lengths are held out.
    places = {round(i * (len(written) - 1) / count) for i in range(count)}
    held = [t for i, t in enumerate(written) if i in places]
    rest = [t for i, t in enumerate(written) if i not in places]
    return rest + _given(data, tokenizer, options, len(rest)), held


def _given(data: Path, tokenizer: Any, options: TrainOptions, written: int) -> list[Text]:
    """Windows of the files' own text, as many as ``given_share`` asks for."""
    if options.given_share <= 0:
        return []
    wanted = round(written * options.given_share / max(1 - options.given_share, 1e-3))
    length = min(options.max_length, options.prompt_tokens + options.new_tokens)
    pieces: list[Text] = []
    for kind, item in read(data):
        if kind == "text":
            ids = tokenizer(item, add_special_tokens=False, verbose=False)["input_ids"]
            windows = torch.tensor(ids, dtype=torch.long).split(length)
            pieces += [Text(w, 1, 1.0) for w in windows if len(w) > options.block_size + 1]
    if not pieces:
        raise TrainError("given_share needs plain text among the data; there are prompts only")
    generator = torch.Generator().manual_seed(options.seed + 1)
    order: Sequence[int] = torch.randperm(len(pieces), generator=generator).tolist()
    return [pieces[i] for i in order[:wanted]]


def _finish(
    draft: DraftModel, evaluation: Evaluation, out: Path, trainer: Trainer, options: TrainOptions
) -> None:
    """Save the draft and what is known about it."""
    from dspark_compile.training.plot import write_svg

    masters: dict[str, Tensor] = {n: t.clone() for n, t in draft.state_dict().items()}
    stored = torch.bfloat16 if trainer.dtype == torch.bfloat16 else torch.float32
    draft.to(stored)
    draft.save_pretrained(out)
    draft.to(torch.float32).load_state_dict(masters)
    numbers = {
        "steps": trainer.step,
        "minutes": round(trainer.elapsed / 60, 1),
        "parameters": sum(p.numel() for p in draft.parameters()),
        "options": dataclasses.asdict(options),
        "held_out": evaluation.to_dict(),
    }
    (out / "training.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    write_svg(evaluation, out / "evaluation.svg")


@contextlib.contextmanager
def _compiled_layers(target: Any, wanted: bool) -> Iterator[None]:
    """The target's layers compiled one by one, hooks left outside; undone in the end."""
    layers = list(decoder_layers(target)) if wanted else []
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


class _bar:
    """A rich progress bar: ``with _bar(...) as show: show(fraction, text)``."""

    def __init__(self, quiet: bool, what: str) -> None:
        self.quiet, self.what = quiet, what
        self.progress: Any = None

    def __enter__(self) -> Any:
        if self.quiet:
            return lambda fraction, text: None
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self.progress = Progress(*columns)
        self.progress.start()
        task = self.progress.add_task(self.what, total=1.0, line="")
        return lambda fraction, text: self.progress.update(task, completed=fraction, line=text)

    def __exit__(self, *error: object) -> None:
        if self.progress is not None:
            self.progress.stop()
