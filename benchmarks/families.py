"""Decoding of models of several kinds by ``dspark_compile.generate``: kernels against Inductor.

What is special of each: GPT-2's weights lie ``[in, out]``, BLOOM has ALiBi, Mamba and LFM2 have
recurrent states, DeepSeek-V2 latent attention, Llama a plain block to compare with. Random
weights, one sequence; calls with our kernels (one native call a step) and with
``kernels="aten"`` (Inductor) take turns, with a probe between them that only reads memory.
Figures are tokens a second of decoding, medians over the turns, and bytes of all weights a second
(of the experts that are chosen, where there are any) beside the probe's.

    python -m benchmarks.families
    python -m benchmarks.families --families gpt2,mamba --dtype float32 --no-write
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

import dspark_compile
from benchmarks._common import random_model, write
from dspark_compile.codegen.machine import _probes
from dspark_compile.runtime.generate import free

PROBE_BYTES = 1 << 29
WAYS: dict[str, dict[str, Any]] = {"kernels": {"kernels": "cpp"}, "inductor": {"kernels": "aten"}}


def llama() -> tuple[Any, Any]:
    """Llama's block, 0.15 B parameters."""
    config = tf.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, vocab_size=50257,
    )  # fmt: skip
    return tf.LlamaForCausalLM, config


def gpt2() -> tuple[Any, Any]:
    """GPT-2, 124 M parameters."""
    return tf.GPT2LMHeadModel, tf.GPT2Config()


def bloom() -> tuple[Any, Any]:
    """BLOOM's block, 0.17 B parameters."""
    config = tf.BloomConfig(hidden_size=768, n_layer=12, n_head=12, vocab_size=50257)
    return tf.BloomForCausalLM, config


def mamba() -> tuple[Any, Any]:
    """Mamba, 130 M parameters."""
    config = tf.MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)
    return tf.MambaForCausalLM, config


def lfm2() -> tuple[Any, Any]:
    """LFM2's blocks, 10 of 16 short convolutions, 0.35 B parameters."""
    return tf.Lfm2ForCausalLM, tf.Lfm2Config(
        hidden_size=1024, intermediate_size=6656, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, full_attn_idxs=[2, 5, 8, 10, 12, 14],
    )  # fmt: skip


def deepseek_v2() -> tuple[Any, Any]:
    """DeepSeek-V2-Lite's layers, six of them, with 16 experts in place of 64: 0.9 B parameters."""
    return tf.DeepseekV2ForCausalLM, tf.DeepseekV2Config(
        hidden_size=2048, intermediate_size=5504, moe_intermediate_size=1408, num_hidden_layers=6,
        num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=16,
        n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, n_group=1,
        topk_group=1, topk_method="greedy", vocab_size=32000,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    f.__name__: f for f in (llama, gpt2, bloom, mamba, lfm2, deepseek_v2)
}


def run(family: str, dtype: torch.dtype, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn."""
    kind, config = FAMILIES[family]()
    model = random_model(kind, config, dtype)
    ids = torch.randint(0, config.vocab_size, (1, prompt))

    def call(way: str) -> Any:
        _, report = dspark_compile.generate(
            model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            return_stats=True, options=WAYS[way],
        )  # fmt: skip
        return report

    paths = {way: call(way).path for way in WAYS}  # compiles
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    bandwidth, probes, buffer = [], _probes(), torch.ones(PROBE_BYTES // 4)
    for _ in range(rounds):
        for _ in range(2):
            start = time.perf_counter()
            probes.read(buffer, torch.get_num_threads())
            bandwidth.append(buffer.nbytes / (time.perf_counter() - start))
        for way in WAYS:
            rates[way].append(call(way).tokens_per_s)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    unread = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n
    )
    experts = getattr(config, "n_routed_experts", None)
    if experts:
        unread -= unread * config.num_experts_per_tok // experts
    if not config.tie_word_embeddings:
        unread += model.get_input_embeddings().weight.nbytes
    rate = {way: statistics.median(x) for way, x in rates.items()}
    result = {
        "tokens_per_s": rate, "paths": paths, "rounds": rates,
        "ratio": statistics.median(
            a / b for a, b in zip(rates["kernels"], rates["inductor"], strict=True)
        ),
        "weight_bytes": size - unread,
        "bytes_per_s": {way: (size - unread) * x for way, x in rate.items()},
        "read_bandwidth": statistics.median(bandwidth),
    }  # fmt: skip
    free()
    gc.collect()
    return result


def main() -> None:
    """Measure and write ``families.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=48, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="families")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    names = list(FAMILIES) if args.families == "all" else args.families.split(",")
    results = {}
    for name in names:
        found = run(name, getattr(torch, args.dtype), args.prompt, args.new, args.rounds)
        results[name] = found
        rate, gigabytes = found["tokens_per_s"], found["bytes_per_s"]["kernels"] / 1e9
        print(
            f"{name:12} {rate['kernels']:7.1f} tok/s {found['paths']['kernels']},"
            f" {rate['inductor']:7.1f} {found['paths']['inductor']}, {found['ratio']:.2f} x,"
            f" {gigabytes:.1f} of {found['read_bandwidth'] / 1e9:.1f} GB/s",
            flush=True,
        )
    if not args.no_write:
        write(args.name, {"arguments": vars(args), "results": results})


if __name__ == "__main__":
    main()
