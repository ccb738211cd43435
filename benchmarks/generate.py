"""`dspark_compile.generate` against Hugging Face's ``generate``, end to end on the CPU.

The shipped model continues a prompt greedily. The engines take turns in one run, whole calls, after
one that compiles; figures are medians of new tokens a second, prefill included. Tokens of all
engines in float32 are compared. ``overhead`` is what a token takes longer than the stages of the
native step, which are timed in the same calls: choosing, bookkeeping, Python.

``--shape`` takes a model of that shape with random weights, and a prompt of ``--prompt`` random
tokens. A prompt is run eagerly by every engine, so the time of a call that makes one token is
measured too, and what is left of a call is the time of decoding. ``--quantized`` adds our
``generate`` with that model's linear layers weight-only quantised by torchao, as in
`benchmarks.decode`; ``decode_ratio_of_ours`` is from the time of a token that the reports of these
calls tell, prompts left out.

    python -m benchmarks.generate
    python -m benchmarks.generate --shape qwen3-0.6b --new 32 --rounds 3
    python -m benchmarks.generate --shape qwen3-0.6b --quantized 8,4 --name generate_quantized
    python -m benchmarks.generate --dtype float32 --name generate_float32
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dspark_compile
from benchmarks._common import interleaved, write
from benchmarks.decode import SHAPES, make, quantized
from dspark_compile.runtime.rounds import POOL

MODEL = Path(__file__).parent.parent / "models" / "demo"
PROMPT = "import os\n\n\ndef read_lines(path):\n"


def static_inductor(model: Any, ids: torch.Tensor, new: int, room: int) -> torch.Tensor:
    """Hugging Face's static cache of ``room`` tokens, its step compiled by Inductor."""
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=None, cache_implementation="static",
        max_cache_len=room, compile_config=config,
    )  # fmt: skip


def outside_seconds(model: Any, length: int, count: int) -> float:
    """The median of what a step called from Python takes outside of native code, with about
    ``length`` tokens in the cache."""
    rounds = POOL.take(model, 1, False, "model", {})
    beside = []
    for i in range(count):
        if i % 64 == 0:
            rounds.set_length(length - min(count, 64) // 2)
        start = time.perf_counter()
        rounds.program()  # type: ignore[union-attr, misc]
        whole = time.perf_counter() - start
        beside.append(whole - rounds.program.bound.took)  # type: ignore[union-attr]
    POOL.give(rounds)
    return statistics.median(beside)


def stage_clock(model: Any) -> Any:
    """An array that gains the nanoseconds of every stage of every round from now on."""
    rounds = POOL.take(model, 1, False, "model", {})
    bound = rounds.program.bound  # type: ignore[union-attr]
    bound.spent = (ctypes.c_int64 * len(bound.stage_seconds()))()
    POOL.give(rounds)
    return bound.spent


def overhead(
    run: Callable[[], Any], model: Any, length: int, turns: int, count: int
) -> dict[str, Any]:
    """The time of a token in a whole call, beside that of the stages of its steps in the same call;
    ``overhead`` is the median of their ratios, less one. ``count`` steps are called from Python,
    with ``length`` tokens in the cache, for what is outside of one."""
    tokens, steps, outside = [], [], []
    spent = stage_clock(model)
    for _ in range(turns):
        ctypes.memset(spent, 0, ctypes.sizeof(spent))
        run()
        report = dspark_compile.last_generation()
        assert report is not None
        tokens.append(report.seconds["decode"] / report.steps_timed)
        steps.append(sum(spent) * 1e-9 / report.steps_timed)
        if not steps[-1]:
            raise RuntimeError("the cache was replaced: its program is another")
        outside.append(outside_seconds(model, length, count))
    ratios = [t / s - 1 for t, s in zip(tokens, steps, strict=True)]
    return {
        "step_s": statistics.median(steps), "token_s": statistics.median(tokens),
        "overhead": statistics.median(ratios), "overheads": ratios,
        "outside_of_a_call_s": statistics.median(outside),
    }  # fmt: skip


def load(shape: str | None, dtype: torch.dtype, prompt: int) -> tuple[Any, torch.Tensor]:
    """The model, and token ids of a prompt."""
    if shape is None:
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(MODEL)(PROMPT, return_tensors="pt").input_ids
    model = make(shape, dtype)
    return model, torch.randint(0, model.config.vocab_size, (1, prompt))


class Ours:
    """Our ``generate``; it keeps the seconds of a token of every call that timed its decoding."""

    def __init__(self, model: Any, ids: torch.Tensor, options: dict[str, Any]) -> None:
        self.model, self.ids, self.options = model, ids, options
        self.token_s: list[float] = []

    def __call__(self, new: int) -> torch.Tensor:
        text = dspark_compile.generate(self.model, self.ids, max_new_tokens=new, **self.options)
        report = dspark_compile.last_generation()
        if report is not None and report.steps_timed:
            self.token_s.append(report.seconds["decode"] / report.steps_timed)
        return text


def main() -> None:
    """Measure and write ``generate.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turns", type=int, default=0, help="of measuring the overhead")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--prompt", type=int, default=512, help="tokens, with --shape")
    parser.add_argument("--quantized", default="", help="bits, with commas; with --shape")
    parser.add_argument("--skip", default="", help="engines to leave out, with commas")
    parser.add_argument("--name")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    if args.quantized and args.shape is None:
        parser.error("--quantized needs --shape: the shipped model is not quantised here")
    dtype = getattr(torch, args.dtype)
    name = args.name or ("generate" if args.shape is None else f"generate_{args.shape}")
    model, ids = load(args.shape, dtype, args.prompt)
    room = ids.shape[1] + args.new
    greedy = {"do_sample": False, "eos_token_id": None}
    calls: dict[str, Callable[[int], torch.Tensor]] = {
        "hf_dynamic": lambda new: model.generate(ids, max_new_tokens=new, **greedy),
        "hf_static_inductor": lambda new: static_inductor(model, ids, new, room),
        "dspark": Ours(model, ids, greedy),
    }
    for bits in filter(None, args.quantized.split(",")):
        smaller = quantized(args.shape, dtype, 0, int(bits))
        calls[f"dspark_w{bits}"] = Ours(smaller, ids, greedy)
    engines: dict[str, Callable[[], torch.Tensor]] = {
        n: partial(call, args.new) for n, call in calls.items() if n not in args.skip.split(",")
    }
    first, texts = {}, {}
    for engine, run in engines.items():
        start = time.perf_counter()
        texts[engine] = run()
        first[engine] = time.perf_counter() - start
        print(f"{engine}: first call {first[engine]:.1f} s", flush=True)
    for run in engines.values():
        run()
    prompts = {f"{n} prompt": partial(calls[n], 1) for n in engines} if args.shape else {}
    ours = {n: call for n, call in calls.items() if isinstance(call, Ours)}
    for call in ours.values():
        call.token_s.clear()
    times = interleaved({**prompts, **engines}, args.rounds)
    report = dspark_compile.last_generation()
    assert report is not None
    results: dict[str, Any] = {}
    wanted = next(iter(texts.values()))
    for engine in engines:
        seconds = times[engine]["median_s"]
        results[engine] = {
            "tokens_per_s": args.new / seconds,
            "first_call_s": first[engine],
            **times[engine],
        }
        if prompts:
            alone = times.pop(f"{engine} prompt")["median_s"]
            results[engine]["prompt_s"] = alone
            results[engine]["decode_tokens_per_s"] = (args.new - 1) / (seconds - alone)
        same = texts[engine].shape == wanted.shape
        agree = (texts[engine] == wanted).float().mean().item() if same else 0.0
        results[engine]["agrees"] = agree
        print(f"{engine:20} {args.new / seconds:8.1f} tok/s  agrees {agree:.3f}")
    for engine, call in ours.items():
        results[engine]["decode_token_s"] = statistics.median(call.token_s)
    faster = {n: results["dspark"]["decode_token_s"] / results[n]["decode_token_s"] for n in ours}
    if len(ours) > 1:
        print(
            "our tokens, prompt left out, to bfloat16's",
            {n: round(x, 2) for n, x in faster.items()},
        )
    took = times["dspark"]["median_s"]
    middle, turns = ids.shape[1] + args.new // 2, max(args.rounds, args.turns)
    over = overhead(engines["dspark"], model, middle, turns, min(args.new, 200))
    speedup = {n: t["median_s"] / took for n, t in times.items() if n != "dspark"}
    print("speed-up", {n: round(x, 2) for n, x in speedup.items()})
    decoding = {}
    if args.shape:
        rate = {n: r["decode_tokens_per_s"] for n, r in results.items()}
        decoding = {n: rate["dspark"] / x for n, x in rate.items() if n != "dspark"}
        print("speed-up of decoding", {n: round(x, 2) for n, x in decoding.items()})
    print(
        f"step {over['step_s'] * 1e6:.0f} us, token {over['token_s'] * 1e6:.0f} us:"
        f" {over['overhead']:.1%} overhead; a single call takes"
        f" {over['outside_of_a_call_s'] * 1e6:.0f} us outside of native code"
    )
    payload = {
        "arguments": vars(args), "results": results, "speedup": speedup,
        "speedup_of_decoding": decoding, "decode_ratio_of_ours": faster, **over,
        "path": report.path,
    }  # fmt: skip
    if not args.no_write:
        write(name, payload)


if __name__ == "__main__":
    main()
