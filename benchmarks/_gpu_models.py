"""Sections of `benchmarks.gpu` about whole decode steps of Hugging Face models.

Random weights in the shape of real models, a static cache filled to a context. One step is the
model's forward of one token a sequence; contenders share weights and cache. ``wall`` is the time
of a step in a row of steps with one synchronisation at their end, what a decode loop sees;
``kernels_s`` is the sum of the step's kernel times from the profiler, what the GPU is busy with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks._gpu_timing import Bench, Call, Skip, describe, memory, relative

CONTEXT, CAPACITY, STEPS = 1024, 1280, 20

# Layers that a run measures by default: enough to see a step's mixture of kernels, few enough to
# compile three times within the section. `--layers 0` measures all of them.
MODELS: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "tie_word_embeddings": True, "measured": 8,
    },
    "qwen3-8b": {
        "type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "measured": 6,
    },
    "qwen3-30b-a3b": {
        "type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "measured": 4,
    },
}  # fmt: skip
SMOKE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "measured": 1,
    "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def build(name: str, layers: int, bench: Bench) -> tuple[Any, dict[str, Any]]:
    """A model with random weights on the device, and what it is.

    Raises:
        Skip: it does not fit the device's memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {**MODELS[name], **(SMOKE if bench.smoke else {})}
    measured, whole = shape.pop("measured"), shape["num_hidden_layers"]
    shape["num_hidden_layers"] = {-1: measured, 0: whole}.get(layers, min(layers, whole))
    config = AutoConfig.for_model(shape.pop("type"), **shape, max_position_embeddings=4096)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=bench.dtype)
    nbytes = sum(p.nbytes for p in model.parameters())
    if bench.device.type == "cuda" and nbytes > 0.85 * torch.cuda.mem_get_info()[0]:
        raise Skip(f"{nbytes / 2**30:.0f} GiB of weights do not fit")
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, attn_implementation="sdpa"
        )
    what = {
        "model": name,
        "layers": config.num_hidden_layers,
        "layers_of_the_model": whole,
        "weights_bytes": nbytes,
    }
    return model.eval().requires_grad_(False), what


def filled_cache(model: Any, batch: int, bench: Bench) -> Any:
    """A static cache of random keys and values up to the context.

    Raises:
        Skip: it does not fit the device's memory.
    """
    from transformers import StaticCache

    config = model.config
    context, capacity = (8, 64) if bench.smoke else (CONTEXT, CAPACITY)
    row = 2 * config.num_key_value_heads * config.head_dim * bench.dtype.itemsize
    nbytes = batch * capacity * row * config.num_hidden_layers
    if bench.device.type == "cuda" and nbytes > 0.8 * torch.cuda.mem_get_info()[0]:
        raise Skip(f"{nbytes / 2**30:.0f} GiB of cache do not fit")
    cache = StaticCache(config=config, max_cache_len=capacity)
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, bench.dtype, bench.device
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    rewind(cache, context)
    return cache


def rewind(cache: Any, context: int) -> None:
    """Back to the context, in place."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(context)


def contenders(model: Any, bench: Bench) -> dict[str, Call]:
    """How a step may be run, from the quickest to compile on."""
    if bench.smoke:
        options = {"inner": "eager", "kernels": "triton"}
        return {
            "eager": model,
            "dspark": torch.compile(model, backend="dspark", dynamic=False, options=options),
            "inductor": torch.compile(model, backend="eager", dynamic=False),
        }
    return {
        "eager": model,
        "dspark reduce-overhead": torch.compile(
            model, backend="dspark", mode="reduce-overhead", dynamic=False
        ),
        "inductor reduce-overhead": torch.compile(model, mode="reduce-overhead", dynamic=False),
        "inductor max-autotune": torch.compile(model, mode="max-autotune", dynamic=False),
    }


def decode(bench: Bench, name: str, batch: int, layers: int) -> Iterator[dict[str, Any]]:
    """A row for each contender alone, once compiled, then one of all so far, in turns."""
    torch._dynamo.config.recompile_limit = 64  # one entry for every contender
    model, what = build(name, layers, bench)
    context = 8 if bench.smoke else CONTEXT
    what |= {"batch": batch, "context": context, "capacity": 64 if bench.smoke else CAPACITY}
    with torch.no_grad(), memory():
        cache = filled_cache(model, batch, bench)
        ids = torch.randint(0, 97, (batch, 1), device=bench.device)
        runs: dict[str, Call] = {}
        exact: torch.Tensor | None = None
        for contender, run in contenders(model, bench).items():
            if bench.left < 15 and runs:
                yield {**what, "contender": contender, "skipped": "no time left to compile"}
                continue

            def steps(run: Call = run, count: int = 1 if bench.smoke else STEPS) -> None:
                rewind(cache, context)
                for _ in range(count):
                    torch.compiler.cudagraph_mark_step_begin()
                    run(ids, past_key_values=cache)

            start = time.perf_counter()
            try:
                # No reset: the contenders in front stay compiled, to be run in turns.
                torch._dynamo.utils.counters.clear()
                steps(count=1 if bench.smoke else 3)
                _synchronise(bench)
                compiled = time.perf_counter() - start
                row = {"first_steps_s": compiled, **kernels(steps, bench)}
                row |= {"wall": bench.turns({contender: steps}, rounds=3)[contender]}
                row |= facts(contender)
                rewind(cache, context)
                torch.compiler.cudagraph_mark_step_begin()
                logits = run(ids, past_key_values=cache).logits.clone()
                exact = logits if exact is None else exact
                row["difference_to_eager"] = relative(logits, exact)
            except Exception as error:
                yield {**what, "contender": contender, "failed": describe(error)}
                continue
            runs[contender] = steps
            yield {**what, "contender": contender, "alone": True, **row}
            if len(runs) > (2 if bench.smoke else 1):
                # Again with every newcomer: the next one's compilation may not end in time.
                count = 1 if bench.smoke else STEPS
                times = _per_step(bench.turns(runs, rounds=7), count)
                yield {**what, "in_turns": True, "steps": count, "step_s": times}


def _per_step(times: dict[str, dict[str, Any]], count: int) -> dict[str, dict[str, Any]]:
    return {
        name: {k: v if k == "runs" else v / count for k, v in t.items()}
        for name, t in times.items()
    }


def _synchronise(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def kernels(steps: Call, bench: Bench) -> dict[str, Any]:
    """The summed kernel time and number of kernels of one step, and the longest of them.

    Kernels that overlap (programmatic dependent launch) count twice where they do.
    """
    if bench.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            steps(count=4)
            torch.cuda.synchronize()
    except Exception as error:
        return {"profiler": describe(error)}
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    longest = sorted(events, key=lambda e: -e.self_device_time_total)[:12]
    return {
        "kernels_s": sum(e.self_device_time_total for e in events) * 1e-6 / 4,
        "kernels": sum(e.count for e in events) / 4,
        "longest_kernels_us": {e.key[:80]: round(e.self_device_time_total / 4, 1) for e in longest},
    }


def facts(contender: str) -> dict[str, Any]:
    """What the compilers say about themselves: skipped CUDA graphs, sites, fallbacks."""
    counters = torch._dynamo.utils.counters["inductor"]
    found = {k: v for k, v in counters.items() if "cudagraph" in k}
    if not contender.startswith("dspark"):
        return {"inductor": found}
    import dspark_compile

    report = dspark_compile.last_report()
    sites: dict[str, int] = {}
    for graph in report.graphs:
        for site in graph.sites:
            if site.status == "raised":
                key = f"{site.kind}: {site.impl}"
                sites[key] = sites.get(key, 0) + 1
    reasons = sorted({f"{f.reason}" for f in report.fallbacks})
    return {"inductor": found, "sites": sites, "fallbacks": reasons[:20]}
