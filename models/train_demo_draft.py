"""Train the DSpark draft of the demonstration model (``models/demo_draft``), and its twin without
a Markov head as a baseline.

The steps, each of which goes on where it was stopped:

1. *Data.*  The training files of the demonstration model: the standard library's source without
   what ``train_demo.py`` held out (``held_out_files`` in ``models/demo/training.json``).
2. *Text.*  The model continues prompts cut from them (greedily, and at two temperatures), and the
   draft is trained on that: ``dspark_compile.training``.
3. *Baseline.*  ``--twin`` trains the same draft with ``markov_rank`` 0 for as many steps.
4. *Export.*  ``models/demo_draft/``: weights in bfloat16 without the shared vocabulary matrices,
   calibration, evaluation; and ``benchmarks/results/draft.json``, from generating after the
   held-out prompts of ``models/demo/prompts.json`` with the eager reference loop.

Usage::

    python models/train_demo_draft.py --steps 4000
    python models/train_demo_draft.py --steps 4000 --twin
    python models/train_demo_draft.py --export-only     # the last checkpoints, any time

A second stage goes on from the first one's weights, with other prompts and longer blocks::

    python models/train_demo_draft.py --work OTHER --init STAGE1 --block-size 7 --seed 2 \\
        --lr 1.2e-3 --minutes 100 --vocabulary 1536

When ``train_demo.py`` had made the model larger, the shipped draft went on from that of the model
before (``--follow`` a copy of its folder): what it reads moved to the layers that the tapped ones
became, and all tokens can be proposed again while it learns::

    python models/train_demo_draft.py --work OTHER --follow OLD --block-size 7 --seed 3 \\
        --lr 1.2e-3 --minutes 40 --vocabulary 1536
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
from dspark_compile.models.demo_text import stdlib_sources
from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_vocabulary import cut_vocabulary, frequent_tokens
from dspark_compile.runtime.speculation.reference import speculate
from dspark_compile.runtime.token_choice import TokenChoice
from dspark_compile.training import TrainOptions, train_draft
from dspark_compile.training.evaluate import evaluate
from dspark_compile.training.loop import Trainer
from dspark_compile.training.plot import write_svg
from dspark_compile.training.regenerate import Text, _load

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = DEMO_DRAFT_PATH
RESULTS = ROOT / "benchmarks" / "results" / "draft.json"

# Blocks of 5 in the first stage: they are learned faster.  Two layers with narrow MLPs: rows behind
# the anchor learn of it in the first and look up in the second.
OPTIONS: dict[str, Any] = {
    "layers": 2, "intermediate_size": 352, "block_size": 5, "taps": (2, 5, 6), "prompts": 3200,
    "prompt_tokens": 448, "new_tokens": 256, "temperatures": (0.0, 0.8, 0.0, 1.0),
    "max_length": 704, "batch": 2, "anchors": 96, "lr": 2e-3, "optimizer": "muon", "seed": 1,
    "dtype": "bfloat16", "compile": False, "eval_sequences": 40,
}  # fmt: skip


def data_file(work: pathlib.Path) -> pathlib.Path:
    """The training files as one JSON-lines file."""
    path = work / "code.jsonl"
    if not path.exists():
        held = set(json.loads((DEMO_PATH / "training.json").read_text())["held_out_files"])
        sources = stdlib_sources().items()
        lines = [json.dumps({"text": text}) for name, text in sources if name not in held]
        path.write_text("\n".join(lines) + "\n")
    return path


def followed(folder: pathlib.Path, work: pathlib.Path) -> str:
    """The draft in ``folder`` for the model as it is now: it reads the layers of ``OPTIONS`` and
    proposes all tokens.  Those that it lacked get no say from the Markov head yet."""
    out = work / "followed"
    config = json.loads((folder / "config.json").read_text())
    target = json.loads((DEMO_PATH / "config.json").read_text())
    config["target_layer_ids"] = list(OPTIONS["taps"])
    config["num_target_layers"] = target["num_hidden_layers"]
    config.pop("draft_vocab_size", None)
    state = load_file(folder / "model.safetensors")
    kept = state.pop("d2t", None)
    if kept is not None:
        # Offsets from a token of the draft to the target's, as checkpoints have it.
        narrow = state["markov_head.markov_w2.weight"]
        wide = narrow.new_zeros(config["vocab_size"], narrow.shape[1])
        wide[torch.arange(len(kept)) + kept] = narrow
        state["markov_head.markov_w2.weight"] = wide
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return str(out)


def options_for(twin: bool, args) -> TrainOptions:
    if args.follow:
        args.init = followed(pathlib.Path(args.follow), pathlib.Path(args.work))
    own = {name: getattr(args, name) for name in ("block_size", "init", "seed", "lr")}
    own["prompts"] = args.texts
    own = {name: value for name, value in own.items() if value is not None}
    rank = 0 if twin else 32
    return TrainOptions(**OPTIONS | own, markov_rank=rank, steps=args.steps, minutes=args.minutes)


def train(args) -> None:
    work = pathlib.Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    out = work / ("twin" if args.twin else "draft")
    texts = out / ".training" / "text"
    other = work / ("draft" if args.twin else "twin") / ".training" / "text"
    if other.is_dir() and not texts.exists():  # both learn from the same text
        texts.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(other, texts)
    train_draft(str(DEMO_PATH), data_file(work), out, options=options_for(args.twin, args))


@torch.no_grad()
def generate(model, draft, prompts: list[torch.Tensor], new: int, temperature: float) -> dict:
    """Accepted lengths of generating behind held-out prompts, one request at a time."""
    rounds = committed = 0
    survived = torch.zeros(draft.config.num_drafted)
    generator = torch.Generator().manual_seed(7)
    choice = TokenChoice(sample=temperature > 0, temperature=max(temperature, 1e-3))
    for ids in prompts:
        out = speculate(
            model, draft, ids[None], max_new_tokens=new, choice=choice, eos_token_id=0,
            generator=generator,
        )  # fmt: skip
        rounds += out.stats.rounds
        committed += out.stats.committed
        survived += torch.tensor(out.stats.survival) * out.stats.rounds
    return {
        "tau": round(committed / max(rounds, 1), 4),
        "rounds": rounds,
        "tokens": committed,
        "survival": [round(s / max(rounds, 1), 4) for s in survived.tolist()],
    }


def heldout_texts(model, tokenizer, prompts: list[torch.Tensor], new: int) -> list[Text]:
    """Greedy continuations of the held-out prompts."""
    texts = []
    for ids in prompts:
        out = speculate(model, None, ids[None], max_new_tokens=new, eos_token_id=0)
        texts.append(Text(torch.cat((ids, out.generated[0])), len(ids), 0.0))
    return texts


def load_checkpoint(folder: pathlib.Path, options: TrainOptions, model, tokenizer) -> Trainer:
    """A run's draft as of its last checkpoint."""
    from dspark_compile.training.draft_config import new_config

    parameters = sum(p.numel() for p in model.parameters())
    options = options.resolve(parameters, model.config.hidden_size, model.config.num_hidden_layers)
    draft = DraftModel(new_config(model, tokenizer, options)).bind(model)
    trainer = Trainer(model, draft, None, options, torch.bfloat16, folder / ".training")  # type: ignore[arg-type]
    draft.eval()
    return trainer


def written(folder: pathlib.Path) -> Iterator[torch.Tensor]:
    """What the model wrote in a run's texts."""
    for path in sorted((folder / ".training" / "text").glob("*.safetensors")):
        for text in _load(path, 0.0):
            yield text.ids[text.prompt :]


def export(args) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    work = pathlib.Path(args.work)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH)
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
    listed = json.loads((DEMO_PATH / "prompts.json").read_text())
    prompts = [torch.tensor(tokenizer(p["prompt"]).input_ids) for p in listed[: args.prompts]]
    texts = heldout_texts(model, tokenizer, prompts, args.new_tokens)
    results = {}
    for name, twin in (("markov", False), ("no_markov", True)):
        folder = work / ("twin" if twin else "draft")
        if not (folder / ".training" / "checkpoint.pt").exists():
            continue
        trainer = load_checkpoint(folder, options_for(twin, args), model, tokenizer)
        draft = trainer.draft
        if args.vocabulary:
            kept = frequent_tokens(written(folder), draft.config.vocab_size, args.vocabulary)
            draft = cut_vocabulary(draft, kept).bind(model).eval()
        found = evaluate(model, draft, texts, trainer.options, torch.float32)
        draft.calibration = found.calibration()
        start = time.perf_counter()
        numbers = {
            "steps": trainer.step,
            "minutes": round(trainer.elapsed / 60, 1),
            "parameters": sum(p.numel() for p in draft.parameters()),
            "held_out": found.to_dict(),
            "greedy": generate(model, draft, prompts, args.new_tokens, 0.0),
            "sampled": generate(model, draft, prompts[::2], args.new_tokens // 2, 1.0),
        }
        print(name, json.dumps(numbers), f"{time.perf_counter() - start:.0f} s", flush=True)
        results[name] = numbers
        if not twin:
            out = pathlib.Path(args.out)
            out.mkdir(parents=True, exist_ok=True)
            draft.to(torch.bfloat16).save_pretrained(out)
            write_svg(found, out / "evaluation.svg")
            (out / "training.json").write_text(json.dumps(numbers, indent=1) + "\n")
    if pathlib.Path(args.out) != OUT:
        return
    RESULTS.write_text(
        json.dumps(
            {
                "what": "models/demo_draft and its twin without a Markov head, if trained; "
                f"{len(prompts)} prompts of models/demo/prompts.json, {args.new_tokens} new "
                "tokens, the eager reference loop in float32, whole blocks verified",
                **results,
            },
            indent=1,
        )
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, help="train so long instead")
    parser.add_argument("--work", default="/tmp/dspark-train-draft", help="not shipped")
    parser.add_argument("--block-size", type=int, help=f"in place of {OPTIONS['block_size']}")
    parser.add_argument("--init", help="the folder of a draft to go on from")
    parser.add_argument("--follow", help="the folder of the draft of a smaller model before")
    parser.add_argument("--seed", type=int, help="of other prompts, texts and anchors")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--texts", type=int, help=f"in place of {OPTIONS['prompts']} prompts")
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens it can propose; 0: all")
    parser.add_argument("--out", default=str(OUT), help="where the draft is written")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=256, help="of an evaluated prompt")
    parser.add_argument("--prompts", type=int, default=24, help="that are evaluated")
    parser.add_argument("--twin", action="store_true", help="train the one without a Markov head")
    parser.add_argument("--export-only", action="store_true", help="only write the results")
    args = parser.parse_args()
    if not args.export_only:
        train(args)
    export(args)


if __name__ == "__main__":
    main()
