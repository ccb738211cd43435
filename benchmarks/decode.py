"""Decode steps of a Hugging Face model on the CPU: ours against eager, Inductor and its freezing.

A model with random weights (by default of Qwen3-0.6B's shape), a static cache that holds
``context`` tokens, one new token a step. The engines take turns, one step each, in one run with a
probe that only reads memory; figures are medians, tokens/s, and the share of the probe's bandwidth
at which the bytes of weights and cache were read.

    python -m benchmarks.decode
    python -m benchmarks.decode --context 8192 --name decode_8k
    python -m benchmarks.decode --rows 512 --context 0 --layers 8 --name prefill_512
    python -m benchmarks.decode --engines dspark,dspark_int8 --context 8192
    python -m benchmarks.decode --engines dspark,dspark@8,dspark@16 --name decode_rows
    python -m benchmarks.decode --engines dspark,dspark_w8,dspark_w4 --name decode_quantized

``dspark_w8`` and ``dspark_w4`` are weight-only quantised by torchao: int8 by rows, int4 in groups
of 32, lm_head included, the embedding not.
``engine@rows`` is a step of several tokens, all of whose logits are wanted: what verifies a draft.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StaticCache

from benchmarks._common import interleaved, random_model, write
from dspark_compile.codegen.machine import _probes

SHAPES = {
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
PROBE_BYTES = 512 * 2**20
ENGINES = ("eager", "inductor", "freezing", "dspark", "dspark_int8", "dspark_w8", "dspark_w4")
# Bytes a weight, scales included, of what torchao quantised.
QUANTIZED_BYTES = {"dspark_w8": 1.0, "dspark_w4": 0.5 + 2 / 32}


def make(shape: str, dtype: torch.dtype, layers: int = 0) -> Qwen3ForCausalLM:
    """The model, its weights drawn at random."""
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape])
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers]
    return random_model(Qwen3ForCausalLM, config, dtype)


def quantized(shape: str, dtype: torch.dtype, layers: int, bits: int) -> Qwen3ForCausalLM:
    """`make`, its linear layers weight-only quantised by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = make(shape, dtype, layers)
    # lm_head and embedding are one tensor; quantising replaces the first.
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, Int8WeightOnlyConfig() if bits == 8 else four)
    return model


class Engine:
    """One way to run a decode step, with its own cache."""

    def __init__(
        self, name: str, model: Any, context: int, length: int, kernels: str, rows: int = 1
    ):
        name, _, own = name.partition("@")
        rows = int(own or rows)
        self.keep = rows if rows <= 16 else 1
        self.context = context
        self.cache = StaticCache(model.config, max_cache_len=length)
        self.token = torch.zeros(1, rows, dtype=torch.long)
        self.freezing = name == "freezing"
        if name == "eager":
            self.forward = model.forward
        elif name in ("inductor", "freezing"):
            # Options of its own: Dynamo would share one compilation among equal backends.
            options = {"freezing": True} if self.freezing else None
            self.forward = torch.compile(model.forward, dynamic=False, options=options)
        else:
            options: dict[str, Any] = {"kernels": kernels}
            if name == "dspark_int8":
                options["kv_cache"] = "int8"
            self.forward = torch.compile(
                model.forward, backend="dspark", dynamic=False, options=options
            )
        self.fill(model, context)

    def fill(self, model: Any, context: int) -> None:
        """Pretend that ``context`` tokens are in the cache; their keys and values are random."""
        torch.manual_seed(1)  # the same for every engine
        config = model.config
        like = torch.zeros(1, config.num_key_value_heads, 1, config.head_dim, dtype=model.dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = context

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One decode step; the logits."""
        with torch._inductor.config.patch(freezing=self.freezing):
            out = self.forward(
                input_ids=self.token,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=self.keep,
            )
        for layer in self.cache.layers:  # the next step finds the same context
            layer.cumulative_length.fill_(self.context)
        return out.logits


def compile_and_check(engines: dict[str, Engine]) -> dict[str, Any]:
    """Seconds of each engine's first call, and how far its logits lie from the first one's."""
    seconds, logits = {}, {}
    for name, engine in engines.items():
        start = time.perf_counter()
        logits[name] = engine.step()[:, -1]
        seconds[name] = time.perf_counter() - start
        print(f"{name}: first step {seconds[name]:.1f} s", flush=True)
        engine.step()
    base = next(iter(logits.values())).float()
    distance = {n: ((x.float() - base).norm() / base.norm()).item() for n, x in logits.items()}
    print("distance from the first:", {n: round(x, 4) for n, x in distance.items()}, flush=True)
    return {"first_step_s": seconds, "distance": distance}


def main() -> None:
    """Measure and write ``decode.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1, help="tokens a step; many are a prefill")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers; 0: the shape's own")
    parser.add_argument("--engines", default="eager,inductor,freezing,dspark")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="decode")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    names = args.engines.split(",")
    unknown = {n.partition("@")[0] for n in names} - set(ENGINES)
    if unknown:
        raise SystemExit(f"unknown engines {sorted(unknown)}; known: {', '.join(ENGINES)}")
    model = make(args.shape, dtype, args.layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config = model.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads
    cache = {
        name: row * args.context * (config.head_dim + 2 if "int8" in name
                                    else config.head_dim * dtype.itemsize)
        for name in names
    }  # fmt: skip
    load = os.getloadavg()[0]
    length = args.context + max(64, args.rows)
    # Every bf16 weight is read but a few of the norms'; the embedding is lm_head.
    read = {
        n: int(weights / dtype.itemsize * QUANTIZED_BYTES.get(n, dtype.itemsize)) for n in names
    }

    def model_of(name: str) -> Qwen3ForCausalLM:
        if name not in QUANTIZED_BYTES:
            return model
        return quantized(args.shape, dtype, args.layers, 8 if name == "dspark_w8" else 4)

    engines = {
        n: Engine(n, model_of(n), args.context, length, args.kernels, args.rows) for n in names
    }
    checked = compile_and_check(engines)
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)
    threads = torch.get_num_threads()
    runs: dict[str, Callable[[], Any]] = {"probe": lambda: probes.read(buffer, threads)}
    runs |= {name: engine.step for name, engine in engines.items()}
    interleaved(runs, 2)
    times = interleaved(runs, args.rounds)
    bandwidth = PROBE_BYTES / times["probe"]["median_s"]
    results = {}
    for name in names:
        seconds = times[name]["median_s"]
        nbytes = read[name] + cache[name]
        results[name] = {
            "tokens_per_s": engines[name].token.shape[1] / seconds,
            "of_bandwidth": nbytes / seconds / bandwidth,
            "bytes": nbytes,
            **times[name],
        }
        print(
            f"{name:12} {results[name]['tokens_per_s']:7.2f} tok/s  {seconds * 1e3:.1f} ms "
            f" {nbytes / seconds / bandwidth:.0%} of"
            f" {bandwidth / 1e9:.1f} GB/s",
            flush=True,
        )
    payload = {
        "arguments": vars(args),
        "load_before": load,
        "weight_bytes": weights,
        "read_bandwidth": bandwidth,
        "results": results,
        **checked,
    }
    if not args.no_write:
        write(args.name, payload)


if __name__ == "__main__":
    main()
