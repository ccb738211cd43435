"""Mixture-of-experts models on the CPU: ours against Hugging Face's experts, eager and compiled.

A Qwen3-MoE with random weights. Engines take turns, one step each, in one run with a probe that
only reads memory; every step has other random tokens, the same for all engines. Figures are medians
and, for decode, the share of the probe's bandwidth at which the bytes of active weights (attention,
routers, the experts that were hit, the head) and of the cache were read.

    python -m benchmarks.moe                      # decode, batch 1
    python -m benchmarks.moe --batch 8
    python -m benchmarks.moe --prefill 512 --engines eager_grouped,inductor_grouped,dspark
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, StaticCache

from benchmarks._common import interleaved, random_model, write
from dspark_compile.codegen.machine import _probes
from dspark_compile.runtime.expert_load import expert_load

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-moe-1b": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2048,
        "moe_intermediate_size": 512, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 64, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256,
        "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "norm_topk_prob": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
PROBE_BYTES = 512 * 2**20
ENGINES = (
    "eager_grouped", "eager_batched", "inductor_grouped", "inductor_batched", "freezing_grouped",
    "freezing_batched", "dspark",
)  # fmt: skip


def make(shape: str, dtype: torch.dtype, layers: int = 0) -> Qwen3MoeForCausalLM:
    """The model, its weights drawn at random."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPES[shape])
    if layers:
        config.num_hidden_layers = layers
    return random_model(Qwen3MoeForCausalLM, config, dtype)


def twin(model: Qwen3MoeForCausalLM, experts: str) -> Qwen3MoeForCausalLM:
    """The same model over the same weights, with another experts implementation."""
    config = type(model.config)(**model.config.to_dict())
    with torch.device("meta"):
        other = type(model)(config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.model.rotary_emb = model.model.rotary_emb
    other.tie_weights()
    other.set_experts_implementation(experts)
    return other.eval()


class Engine:
    """One way to run a step, with its own cache."""

    def __init__(self, name: str, model: Any, context: int, length: int, batch: int, rows: int):
        kind, _, experts = name.partition("_")
        if experts:
            model = twin(model, f"{experts}_mm")
        self.context, self.freezing = context, kind == "freezing"
        self.cache = StaticCache(model.config, max_cache_len=length)
        self.token = torch.zeros(batch, rows, dtype=torch.long)
        if kind == "eager":
            self.forward = model.forward
        elif kind in ("inductor", "freezing"):
            # Options of its own: Dynamo would share one compilation among equal backends.
            options = {"freezing": True} if self.freezing else None
            self.forward = torch.compile(
                model.forward, dynamic=False, fullgraph=True, options=options
            )
        else:
            self.forward = torch.compile(
                model.forward, backend="dspark", dynamic=False, fullgraph=True
            )
        self.fill(model, context)

    def fill(self, model: Any, context: int) -> None:
        """Pretend that ``context`` tokens are in the cache; their keys and values are random."""
        torch.manual_seed(1)  # the same for every engine
        config, batch = model.config, self.token.shape[0]
        like = torch.zeros(batch, config.num_key_value_heads, 1, config.head_dim, dtype=model.dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)
            layer.keys.normal_()
            layer.values.normal_()
            layer.cumulative_length.fill_(context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = context

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One step; the last position's logits."""
        with torch._inductor.config.patch(freezing=self.freezing):
            out = self.forward(
                input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        for layer in self.cache.layers:  # the next step finds the same context
            layer.cumulative_length.fill_(self.context)
        return out.logits


def active_bytes(model: Any, engine: Engine, tokens: list[torch.Tensor]) -> float:
    """Mean bytes of weights that a step of ``engine`` on ``tokens`` needs."""
    experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters()
                  if ".experts." in n)  # fmt: skip
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    with expert_load() as load:
        for token in tokens:
            engine.token.copy_(token)
            engine.step()
    return whole - experts + sum(layer.bytes_read for layer in load.layers()) / len(tokens)


def main() -> None:
    """Measure and write ``moe.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-moe-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prefill", type=int, default=0, help="tokens of a prefill, not decode")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers; 0: the shape's own")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--name", default="moe")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    names = args.engines.split(",")
    unknown = set(names) - set(ENGINES)
    if unknown:
        raise SystemExit(f"unknown engines {sorted(unknown)}; known: {', '.join(ENGINES)}")
    dtype = getattr(torch, args.dtype)
    model = make(args.shape, dtype, args.layers)
    rows, context = args.prefill or 1, 0 if args.prefill else args.context
    length = context + rows + 63
    load_before = os.getloadavg()[0]
    engines = {n: Engine(n, model, context, length, args.batch, rows) for n in names}
    generator = torch.Generator().manual_seed(2)
    tokens = [
        torch.randint(0, model.config.vocab_size, (args.batch, rows), generator=generator)
        for _ in range(args.rounds + 3)
    ]
    first_step, logits = {}, {}
    for name, engine in engines.items():
        engine.token.copy_(tokens[0])
        start = time.perf_counter()
        logits[name] = engine.step()[:, -1].float()
        first_step[name] = time.perf_counter() - start
        print(f"{name}: first step {first_step[name]:.1f} s", flush=True)
    base = next(iter(logits.values()))
    distance = {n: ((x - base).norm() / base.norm()).item() for n, x in logits.items()}
    print("distance from the first:", {n: round(x, 4) for n, x in distance.items()}, flush=True)
    nbytes = 0.0
    if "dspark" in engines:
        config = model.config
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        nbytes = active_bytes(model, engines["dspark"], tokens)
        nbytes += cache * dtype.itemsize * context * args.batch
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)
    threads = torch.get_num_threads()
    turn = iter(range(10**9))

    def stepper(engine: Engine, first: bool) -> Callable[[], Any]:
        def run() -> None:
            if first:
                engine.number = next(turn)  # type: ignore[attr-defined]
            number = lead.number % len(tokens)  # type: ignore[attr-defined]
            engine.token.copy_(tokens[number])
            engine.step()

        return run

    lead = engines[names[0]]
    runs: dict[str, Callable[[], Any]] = {"probe": lambda: probes.read(buffer, threads)}
    runs |= {name: stepper(engine, engine is lead) for name, engine in engines.items()}
    interleaved(runs, 2)
    times = interleaved(runs, args.rounds)
    bandwidth = PROBE_BYTES / times["probe"]["median_s"]
    results = {}
    for name in names:
        seconds = times[name]["median_s"]
        results[name] = {"tokens_per_s": args.batch * rows / seconds, **times[name]}
        share = ""
        if nbytes and not args.prefill:
            results[name]["of_bandwidth"] = nbytes / seconds / bandwidth
            share = f"{nbytes / seconds / bandwidth:.0%} of {bandwidth / 1e9:.1f} GB/s"
        rate = results[name]["tokens_per_s"]
        print(f"{name:18} {rate:8.2f} tok/s  {seconds * 1e3:.1f} ms  {share}", flush=True)
    payload = {
        "arguments": vars(args),
        "load_before": load_before,
        "active_bytes": nbytes,
        "read_bandwidth": bandwidth,
        "results": results,
        "first_step_s": first_step,
        "distance": distance,
    }
    if not args.no_write:
        write(args.name, payload)


if __name__ == "__main__":
    main()
