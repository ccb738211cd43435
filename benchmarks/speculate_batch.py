"""Speculation of batches: what scheduled verification does as the load rises.

Held-out prompts are cut to different lengths, padded on the left and continued together, the same
ones by each way in turn:

    plain       dspark_compile.generate
    draft       the shipped draft, verified as far as it pays (Algorithm 1), else parked
    mtp1        the same draft, one token drafted and always verified
    fixed       the same draft, every drafted token verified

A user's speed is new tokens over seconds of decoding; ratios to plain are medians over the turns.
The verification budget is how many drafted tokens of a request a round verifies; the plot beside
the JSON has both over the batch.

    python -m benchmarks.speculate_batch --dtype bfloat16
    python -m benchmarks.speculate_batch --dtype bfloat16 --lookups

With ``--lookups`` it is n-grams (``ngram``) against plain decoding, over texts that look-ups live
on and others:

    copies      prompts that hold their continuation
    one copies  the first request of a batch does, the others continue what they never saw
    repeats     held-out prompts, greedy: a small model repeats itself
    new         the same, sampled at temperature 1: little is copied
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspark_compile
from benchmarks._common import RESULTS, write
from benchmarks.speculate import GREEDY, held_out, one_token
from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
from dspark_compile.models.draft import DraftModel

COLOURS = {"plain": "#7f7f7f", "mtp1": "#ff7f0e", "fixed": "#2ca02c", "draft": "#1f77b4"}

SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 360" font-family="sans-serif"
 font-size="12">
<rect width="760" height="360" fill="white"/>
{% for plot in plots %}<g transform="translate({{ plot.x }},40)">
<text x="0" y="-15" font-size="14">{{ plot.title }}</text>
<path d="M0,0V260H300" fill="none" stroke="#333"/>
{% for x, text in xs %}<text x="{{ x }}" y="278" text-anchor="middle">{{ text }}</text>
{% endfor %}<text x="150" y="298" text-anchor="middle">requests</text>
{% for y, text in plot.ys %}<path d="M0,{{ y }}H300" stroke="#ddd"/>
<text x="-6" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}{% for line in plot.lines %}<polyline points="{{ line.points }}" fill="none"
 stroke="{{ line.colour }}" stroke-width="2"/>
<text x="{{ line.at }}" y="312" fill="{{ line.colour }}">{{ line.name }}</text>
{% endfor %}</g>
{% endfor %}</svg>
"""


def batch_of(prompts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    longest = max(len(p) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def measure(
    ways: dict[str, Callable[[dict[str, Any]], Any]], batches: list[dict[str, Any]], new: int
) -> dict[str, Any]:
    """All ways through all batches in turn; what each did."""
    for way in ways.values():
        for _ in range(3):  # compile, and let the policy settle
            way(batches[0])
    rates: dict[str, list[float]] = {name: [] for name in ways}
    reports: dict[str, list[Any]] = {name: [] for name in ways}
    equal: dict[str, list[float]] = {name: [] for name in ways}
    for number, batch in enumerate(batches):
        names = list(ways)
        texts = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            texts[name], report = ways[name](batch)
            rates[name].append((new - 1) / report.seconds["decode"])
            reports[name].append(report)
        for name, text in texts.items():
            same = (text == texts["plain"]).all(dim=1)
            equal[name].append(float(same.float().mean()))
    found = {}
    for name in ways:
        stats = [r.speculation for r in reports[name] if r.speculation is not None]
        lengths = [sum(x) for x in zip(*(s.verify_lengths for s in stats))]
        parts = stats[0].seconds if stats else ()
        found[name] = {
            "tokens_per_s_per_user": statistics.median(rates[name]),
            "ratio_to_plain": statistics.median(
                a / b for a, b in zip(rates[name], rates["plain"], strict=True)
            ),
            "paths": sorted({r.path for r in reports[name]}),
            "notes": sorted({n for r in reports[name] for n in r.notes}),
            "rows_equal_to_plain": statistics.mean(equal[name]),
            "verify_lengths": lengths,
            "budget": sum(k * n for k, n in enumerate(lengths)) / max(1, sum(lengths)),
            "round_us": {
                k: round(1e6 * sum(s.seconds[k] for s in stats) / sum(s.rounds for s in stats), 1)
                for k in parts
            },
            "tau": sum(s.committed for s in stats) / max(1, sum(s.rounds for s in stats)),
        }
    return found


def plot(results: dict[str, dict[str, Any]]) -> str:
    """Speed and budget over the batch."""
    from jinja2 import Template

    counts = list(results)
    places = [300 * i / max(1, len(counts) - 1) for i in range(len(counts))]
    plots = []
    for number, (title, key, names) in enumerate(
        (
            ("a user's speed against plain decoding", "ratio_to_plain", COLOURS),
            ("drafted tokens verified a round", "budget", ("mtp1", "draft")),
        )
    ):
        names = [n for n in names if n in results[counts[0]]]
        top = max(results[c][n][key] for c in counts for n in names) * 1.1
        lines = [
            {
                "name": name,
                "colour": COLOURS[name],
                "at": 70 * i,
                "points": " ".join(
                    f"{x:.1f},{260 - 260 * results[c][name][key] / top:.1f}"
                    for x, c in zip(places, counts, strict=True)
                ),
            }
            for i, name in enumerate(names)
        ]
        ys = [(260 - 52.0 * i, f"{top * i / 5:.2f}") for i in range(6)]
        plots.append({"x": 60 + 370 * number, "title": title, "lines": lines, "ys": ys})
    xs = [(f"{x:.1f}", c) for x, c in zip(places, counts, strict=True)]
    return Template(SVG).render(plots=plots, xs=xs)


def lookups(model: Any, prompts: list[torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """N-grams against plain decoding by kind of text and number of requests."""

    def call(**given: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda batch: dspark_compile.generate(
            model, **batch, max_new_tokens=args.new, return_stats=True, **given
        )

    sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None}
    copies = [torch.cat((call(**GREEDY)({"input_ids": p[None]})[0][0], p)) for p in prompts[:24]]
    results: dict[str, Any] = {}
    for kind in ("copies", "one copies", "repeats", "new"):
        how = sampled if kind == "new" else GREEDY
        ways = {"plain": call(**how), "ngram": call(draft="ngram", **how)}
        for count in map(int, args.batches.split(",")):
            if kind == "one copies" and count == 1:
                continue
            batches = []
            for t in range(args.turns):
                rows = [prompts[(t * count + i) % len(prompts)] for i in range(count)]
                if kind == "copies":
                    rows = [copies[(t * count + i) % len(copies)] for i in range(count)]
                if kind == "one copies":
                    rows[0] = copies[t % len(copies)]
                batches.append(batch_of(rows))
            found = measure(ways, batches, args.new)
            results.setdefault(kind, {})[str(count)] = found
            row = found["ngram"]
            print(
                f"{kind:10} {count:3} {row['tokens_per_s_per_user']:7.0f} tok/s a user"
                f"  {row['ratio_to_plain']:.3f} x  tau {row['tau']:.2f}"
                f"  budget {row['budget']:.2f}  equal {row['rows_equal_to_plain']:.2f}"
                f"  {row['paths']} {row['notes']}",
                flush=True,
            )
    return results


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,2,4,8,16")
    parser.add_argument("--ways", default="draft,mtp1,fixed")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--draft", default="", help="a folder; the shipped draft if left out")
    parser.add_argument("--lookups", action="store_true")
    parser.add_argument("--name", default="")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH)
    draft = DraftModel.from_pretrained(args.draft or DEMO_DRAFT_PATH, target=model)
    cut = held_out(tokenizer, 200, 150)
    # Ragged: 90 ... 150 tokens.
    prompts = [p[: 90 + 37 * i % 61] for i, p in enumerate(cut)]
    if args.lookups:
        results = lookups(model, prompts, args)
        if not args.no_write:
            name = args.name or f"speculate_lookups_{args.dtype}"
            write(name, {"arguments": vars(args), "results": results})
        return

    def call(**given: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda batch: dspark_compile.generate(
            model, **batch, max_new_tokens=args.new, return_stats=True, **GREEDY, **given
        )

    def with_one(batch: dict[str, Any]) -> Any:
        with one_token():
            return call(draft=draft, schedule="fixed")(batch)

    every = {
        "draft": call(draft=draft),
        "mtp1": with_one,
        "fixed": call(draft=draft, schedule="fixed"),
    }
    ways = {"plain": call(), **{n: every[n] for n in args.ways.split(",")}}
    results: dict[str, dict[str, Any]] = {}
    for count in map(int, args.batches.split(",")):
        batches = [
            batch_of([prompts[(t * count + i) % len(prompts)] for i in range(count)])
            for t in range(args.turns)
        ]
        found = results[str(count)] = measure(ways, batches, args.new)
        for name, row in found.items():
            print(
                f"{count:3} {name:6} {row['tokens_per_s_per_user']:7.0f} tok/s a user"
                f"  {row['ratio_to_plain']:.3f} x  tau {row['tau']:.2f}  budget {row['budget']:.2f}"
                f"  equal {row['rows_equal_to_plain']:.2f}  {row['paths']} {row['round_us']}"
            )
    if not args.no_write:
        name = args.name or f"speculate_batch_{args.dtype}"
        write(name, {"arguments": vars(args), "results": results})
        (RESULTS / f"{name}.svg").write_text(plot(results), encoding="utf-8")


if __name__ == "__main__":
    with torch.no_grad():
        main()
