"""Speculative decoding of the shipped pair on the CPU, against our own compiled plain decoding.

Ways to continue the same held-out prompts take turns, prompt by prompt, in one run; figures are
tokens a second of decoding (prefill is the same for all), as the median over prompts of the ratio
to plain decoding of the same prompt. Greedy text must be plain decoding's; where it is not, the
first different token and its margin are written.

    plain       dspark_compile.generate
    draft       the shipped draft, scheduled and parked as it pays
    fixed       every drafted token verified
    mtp1        one drafted token, always verified: what multi-token prediction does
    twin        the draft trained without a Markov head (``--twin PATH``), every token verified
    hostile     a draft of random weights
    ngram       prompt lookup; also on prompts whose continuation is in them (``copy``)
    both        prompt lookup, and the shipped draft where that does not serve

    python -m benchmarks.speculate --dtype float32
    python -m benchmarks.speculate --dtype bfloat16 --name speculate_bfloat16
    python -m benchmarks.speculate --identity 200 --new 256     # greedy identity only
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspark_compile
from benchmarks._common import write
from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
from dspark_compile.models.draft import DraftModel
from dspark_compile.runtime.speculation import loop as loops

GREEDY = {"do_sample": False, "eos_token_id": None}


@contextlib.contextmanager
def one_token() -> Iterator[None]:
    """Rounds of one drafted token."""
    kept = loops.widths_for
    loops.widths_for = lambda rows, count, limit=None: [1, 2]
    try:
        yield
    finally:
        loops.widths_for = kept


def hostile(draft: DraftModel, model: Any) -> DraftModel:
    """The same shape with random weights."""
    torch.manual_seed(0)
    other = DraftModel(draft.config).to(draft.fc.weight.dtype).eval()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_(std=0.05)
    other.set_vocabulary(draft.d2t)
    return other.bind(model)


def held_out(tokenizer: Any, count: int, length: int = 150) -> list[torch.Tensor]:
    """Prompts cut from the files that training never saw."""
    from dspark_compile.models.demo_text import stdlib_sources

    names = json.loads((DEMO_PATH / "training.json").read_text())["held_out_files"]
    sources = stdlib_sources()
    cut: list[torch.Tensor] = []
    texts = [tokenizer(sources[n], return_tensors="pt").input_ids[0] for n in names if n in sources]
    at = 0
    while len(cut) < count:
        before = len(cut)
        for ids in texts:
            if len(ids) >= at + length and len(cut) < count:
                cut.append(ids[at : at + length])
        at += 2 * length
        if len(cut) == before:
            break
    return cut


class Way:
    """One way to decode."""

    def __init__(self, run: Callable[[torch.Tensor], Any]) -> None:
        self.run = run
        self.rates: list[float] = []
        self.ratios: list[float] = []
        self.reports: list[Any] = []
        self.different: list[dict[str, Any]] = []

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "tokens_per_s": statistics.median(self.rates),
            "ratio_to_plain": statistics.median(self.ratios),
            "path": sorted({r.path for r in self.reports}),
            "notes": sorted({n for r in self.reports for n in r.notes}),
            "different_texts": self.different,
        }
        seconds = sum(r.seconds["decode"] for r in self.reports)
        tokens = sum(r.steps_timed for r in self.reports)
        found["overall_tokens_per_s"] = tokens / seconds
        stats = [r.speculation for r in self.reports if r.speculation is not None]
        if stats:
            rounds = sum(s.rounds for s in stats)
            found["tau"] = sum(s.committed for s in stats) / rounds
            found["verify_lengths"] = [sum(x) for x in zip(*(s.verify_lengths for s in stats))]
            verified = max(1, rounds - found["verify_lengths"][0])
            found["verified_rounds"] = verified
            found["tau_of_drafted_rounds"] = 1 + sum(s.accepted for s in stats) / verified
            split = {k: sum(s.seconds.get(k, 0) for s in stats) for k in stats[0].seconds}
            found["seconds"] = split
            whole = sum(split[k] for k in ("draft", "verify", "other"))
            found["round_us"] = {k: round(1e6 * v / rounds, 1) for k, v in split.items()}
            found["lookup_rounds"] = sum(s.lookup_rounds for s in stats)
            found["sequential_share"] = split.get("sequence", 0) / whole
            longest = max(stats, key=lambda s: s.rounds)
            found["example"] = {
                "conditional": longest.conditional, "survival": longest.survival,
                "predicted": longest.predicted,
            }  # fmt: skip
        return found


def differs(model: Any, prompt: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Where two texts part, and how far apart the model's best two logits are there."""
    at = int((a != b).int().argmax())
    with torch.no_grad():
        logits = model(a[None, :at]).logits[0, -1].float()
    best = logits.topk(2).values
    return {"at": at - len(prompt), "margin": float(best[0] - best[1]), "largest": float(best[0])}


def turns(
    model: Any, ways: dict[str, Way], prompts: list[torch.Tensor], new: int, base: str = "plain"
) -> None:
    """All ways through all prompts, in turn."""
    for way in ways.values():  # compile, and let the policy settle
        for prompt in prompts[:2]:
            way.run(prompt)
    for number, prompt in enumerate(prompts):
        rates, texts = {}, {}
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            text, report = ways[name].run(prompt)
            seconds = report.seconds["decode"]
            rates[name] = (len(text[0]) - prompt.shape[-1] - 1) / seconds
            texts[name] = text[0]
            ways[name].reports.append(report)
        for name, way in ways.items():
            way.rates.append(rates[name])
            way.ratios.append(rates[name] / rates[base])
            if not torch.equal(texts[name], texts[base]):
                way.different.append(differs(model, prompt, texts[base], texts[name]))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--twin", default="")
    parser.add_argument("--draft", default="", help="a folder; the shipped draft if left out")
    parser.add_argument("--ways", default="draft,fixed,mtp1,hostile,ngram,both,copy")
    parser.add_argument("--identity", type=int, default=0)
    parser.add_argument("--name", default="")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH)
    draft = DraftModel.from_pretrained(args.draft or DEMO_DRAFT_PATH, target=model)
    wanted = args.ways.split(",")

    def call(new: int = args.new, **given: Any) -> Callable[[torch.Tensor], Any]:
        return lambda ids: dspark_compile.generate(
            model, ids[None], max_new_tokens=new, return_stats=True, **GREEDY, **given
        )

    def with_one(ids: torch.Tensor) -> Any:
        with one_token():
            return call(draft=draft, schedule="fixed")(ids)

    if args.identity:
        ways = {"plain": Way(call()), "fixed": Way(call(draft=draft, schedule="fixed"))}
        prompts = held_out(tokenizer, args.identity)
        turns(model, ways, prompts, args.new)
        results = {"prompts": len(prompts), **{n: w.summary() for n, w in ways.items()}}
        print(len(prompts), "prompts,", len(ways["fixed"].different), "differ")
        if not args.no_write:
            name = args.name or f"speculate_identity_{args.dtype}"
            write(name, {"arguments": vars(args), "results": results})
        return
    ways = {"plain": Way(call())}
    if "draft" in wanted:
        ways["draft"] = Way(call(draft=draft))
    if "fixed" in wanted:
        ways["fixed"] = Way(call(draft=draft, schedule="fixed"))
    if "mtp1" in wanted:
        ways["mtp1"] = Way(with_one)
    if "hostile" in wanted:
        ways["hostile"] = Way(call(draft=hostile(draft, model)))
    if args.twin:
        twin = DraftModel.from_pretrained(args.twin, target=model)
        ways["twin"] = Way(call(draft=twin, schedule="fixed"))
    if "ngram" in wanted:
        ways["ngram"] = Way(call(draft="ngram"))
    if "both" in wanted:
        ways["both"] = Way(call(draft=("ngram", draft)))
    texts = [p["prompt"] for p in json.loads((DEMO_PATH / "prompts.json").read_text())]
    prompts = [tokenizer(t, return_tensors="pt").input_ids[0] for t in texts[: args.prompts]]
    turns(model, ways, prompts, args.new)
    results = {name: way.summary() for name, way in ways.items()}
    if "copy" in wanted:
        pool = {"plain": Way(call()), "ngram": Way(call(draft="ngram"))}
        if "both" in wanted:
            pool["both"] = Way(call(draft=("ngram", draft)))
        copies = []
        for ids in prompts[:12]:
            text = call(96)(ids)[0][0]
            copies.append(torch.cat((text, ids)))
        turns(model, pool, copies, args.new)
        results["copy"] = {name: way.summary() for name, way in pool.items()}
    lines = {n: f for n, f in results.items() if n != "copy"}
    lines |= {f"{n} copy": f for n, f in results.get("copy", {}).items() if n != "plain"}
    for name, found in lines.items():
        print(
            f"{name:10} {found['tokens_per_s']:8.0f} tok/s  {found['ratio_to_plain']:.3f} x  "
            f"tau {found.get('tau', 1):.2f} ({found.get('tau_of_drafted_rounds', 1):.2f})  "
            f"differ {len(found['different_texts'])}  {found['path']}  {found.get('round_us', '')}"
        )
    if not args.no_write:
        name = args.name or f"speculate_{args.dtype}"
        write(name, {"arguments": vars(args), "results": results})


if __name__ == "__main__":
    with torch.no_grad():
        main()
