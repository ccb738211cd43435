"""`dspark_compile.generate` against Hugging Face's ``generate``, end to end on the CPU.

The shipped model continues a prompt greedily. The engines take turns in one run, whole calls, after
one that compiles; figures are medians of new tokens a second, prefill included. Tokens of all
engines in float32 are compared. ``overhead`` is the part of a token's time that is not the native
step: choosing, bookkeeping, Python.

    python -m benchmarks.generate
    python -m benchmarks.generate --dtype float32 --name generate_float32
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspark_compile
from benchmarks._common import interleaved, write
from dspark_compile.runtime.rounds import POOL

MODEL = Path(__file__).parent.parent / "models" / "demo"
PROMPT = "import os\n\n\ndef read_lines(path):\n"


def static_inductor(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Hugging Face's static cache, its step compiled by Inductor."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=None, cache_implementation="static",
        compile_config=config,
    )  # fmt: skip


def step_seconds(model: Any, length: int) -> float:
    """Median over 200 steps of the time inside of the stages of the native step, with ``length``
    tokens in the cache."""
    rounds = POOL.take(model, 1, False, "model", {})
    rounds.set_length(length)
    times = []
    for _ in range(200):
        times.append(sum(rounds.program.stage_seconds()))  # type: ignore[union-attr]
    POOL.give(rounds)
    return statistics.median(times)


def main() -> None:
    """Measure and write ``generate.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="generate")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
    ids = AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt").input_ids
    greedy = {"max_new_tokens": args.new, "do_sample": False, "eos_token_id": None}
    engines = {
        "hf_dynamic": lambda: model.generate(ids, **greedy),
        "hf_static_inductor": lambda: static_inductor(model, ids, args.new),
        "dspark": lambda: dspark_compile.generate(model, ids, **greedy),
    }
    first, texts = {}, {}
    for name, run in engines.items():
        start = time.perf_counter()
        texts[name] = run()
        first[name] = time.perf_counter() - start
        print(f"{name}: first call {first[name]:.1f} s", flush=True)
    for run in engines.values():
        run()
    times = interleaved(engines, args.rounds)
    report = dspark_compile.last_generation()
    assert report is not None
    results: dict[str, Any] = {}
    for name in engines:
        seconds = times[name]["median_s"]
        results[name] = {
            "tokens_per_s": args.new / seconds,
            "first_call_s": first[name],
            **times[name],
        }
        same = texts[name].shape == texts["hf_dynamic"].shape
        agree = (texts[name] == texts["hf_dynamic"]).float().mean().item() if same else 0.0
        results[name]["agrees"] = agree
        print(f"{name:20} {args.new / seconds:8.1f} tok/s  agrees {agree:.3f}")
    ours = times["dspark"]["median_s"]
    step = step_seconds(model, ids.shape[1] + args.new // 2)
    token = report.seconds["decode"] / report.steps_timed
    speedup = {n: t["median_s"] / ours for n, t in times.items() if n != "dspark"}
    print("speed-up", {n: round(x, 2) for n, x in speedup.items()})
    print(f"step {step * 1e6:.0f} us, token {token * 1e6:.0f} us: {token / step - 1:.1%} overhead")
    payload = {
        "arguments": vars(args), "results": results, "speedup": speedup, "step_s": step,
        "token_s": token, "overhead": token / step - 1, "path": report.path,
    }  # fmt: skip
    if not args.no_write:
        write(args.name, payload)


if __name__ == "__main__":
    main()
