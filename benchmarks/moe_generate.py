"""Decoding of a mixture-of-experts model by ``dspark_compile.generate``, against read bandwidth.

The model of `benchmarks.moe`, random weights. Whole calls take turns with a probe that only reads
memory, before and after each. A token's time is that of the calls' native rounds, without the
prompt; its bytes are those of active weights (attention, routers, the experts that were hit, the
head) and of the cache.

    python -m benchmarks.moe_generate
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

import dspark_compile
from benchmarks._common import write
from benchmarks.moe import PROBE_BYTES, SHAPES, make
from dspark_compile.codegen.machine import _probes
from dspark_compile.runtime.expert_load import expert_load


def main() -> None:
    """Measure and write ``moe_generate.json``, or what ``--name`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-moe-1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=96, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--name", default="moe_generate")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    load_before = os.getloadavg()[0]
    model = make(args.shape, dtype)
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (1, args.prompt))

    def call(new: int) -> Any:
        dspark_compile.generate(model, ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
        return dspark_compile.last_generation()

    start = time.perf_counter()
    call(args.new)
    first_call = time.perf_counter() - start
    read = []
    for new in (2, args.new):  # the prompt's bytes, and one token's, are in both
        with expert_load() as load:
            call(new)
        read.append(sum(layer.bytes_read for layer in load.layers()))
    experts = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n
    )
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    routed = (read[1] - read[0]) / (args.new - 2)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cached = cache * dtype.itemsize * (args.prompt + args.new // 2)
    nbytes = whole - experts + routed + cached
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)
    threads = torch.get_num_threads()

    def probe() -> float:
        start = time.perf_counter()
        probes.read(buffer, threads)
        return time.perf_counter() - start

    rows = []
    for _ in range(args.rounds):
        before = [probe() for _ in range(2)]
        report = call(args.new)
        token = report.seconds["decode"] / report.steps_timed
        bandwidth = PROBE_BYTES / statistics.mean([*before, *(probe() for _ in range(2))])
        rows.append({"token_s": token, "read_bandwidth": bandwidth,
                     "of_bandwidth": nbytes / token / bandwidth})  # fmt: skip
    token = statistics.median(r["token_s"] for r in rows)
    bandwidth = statistics.median(r["read_bandwidth"] for r in rows)
    share = statistics.median(r["of_bandwidth"] for r in rows)
    print(f"{1 / token:.1f} tok/s, {share:.0%} of {bandwidth / 1e9:.1f} GB/s; path {report.path}")
    payload = {
        "arguments": vars(args), "load_before": load_before, "active_bytes": nbytes,
        "routed_bytes": routed, "tokens_per_s": 1 / token, "read_bandwidth": bandwidth,
        "of_bandwidth": share, "rounds": rows, "first_call_s": first_call, "path": report.path,
    }  # fmt: skip
    if not args.no_write:
        write(args.name, payload)


if __name__ == "__main__":
    main()
