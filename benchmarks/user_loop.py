"""Loops in user code: what compiling ``for _ in range(n)`` costs, by n, and what a step costs.

A small Llama in bfloat16 with a static cache decodes greedily inside of one compiled function. The
time of a first call minus that of a second one is the compile time; emitted kernels are in the
cache, which makes the ratio harder to keep: what does not depend on n is less. Steps that earlier
compilations kept are not taken, but with ``--reuse on``. ``--cold`` also compiles kernels, once for
each n. Inductor unrolls: it is given 1 and 16 steps. Ours take turns over
``--rounds`` rounds; figures are medians.

    python -m benchmarks.user_loop
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import dspark_compile
from benchmarks._common import random_model, write

PROMPT = 32
STEPS = (1, 16, 64, 256)
INDUCTOR = (1, 16)


def decode(model: Any, cache: Any, tok: torch.Tensor, n: int) -> torch.Tensor:
    """What a user writes."""
    out = []
    for _ in range(n):
        logits = model(tok, past_key_values=cache).logits
        tok = logits[:, -1].argmax(-1, keepdim=True)
        out.append(tok)
    return torch.cat(out, dim=1)


class Setting:
    """A model, and a cache that holds a prompt again before every call."""

    def __init__(self, layers: int, width: int, reuse: str) -> None:
        self.reuse = reuse
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192, hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 128, max_position_embeddings=4096,
        )  # fmt: skip
        self.model = random_model(LlamaForCausalLM, config, torch.bfloat16)
        self.cache = StaticCache(config=config, max_cache_len=512)
        ids = torch.randint(0, 8192, (1, PROMPT))
        self.token = self.model(ids, past_key_values=self.cache).logits[:, -1:].argmax(-1)

    def call(self, function: Any, n: int) -> tuple[float, torch.Tensor]:
        """Seconds of one call, and the text."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)
        start = time.perf_counter()
        text = function(self.model, self.cache, self.token, n)
        return time.perf_counter() - start, text

    def compile_seconds(self, backend: str, n: int) -> tuple[float, float, torch.Tensor]:
        """(compile time, time of a step, text)."""
        torch._dynamo.reset()
        options = {"reuse": self.reuse} if backend == "dspark" else None
        compiled = torch.compile(
            decode, backend=backend, fullgraph=True, dynamic=False, options=options
        )
        first, text = self.call(compiled, n)
        run = min(self.call(compiled, n)[0] for _ in range(3))
        return first - run, run / n, text


@torch.no_grad()
def main() -> None:
    """Measure and write ``user_loop.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reuse", choices=["on", "off"], default="off")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--name", default="user_loop", help="of the results file")
    args = parser.parse_args()
    setting = Setting(args.layers, args.width, args.reuse)
    compile_s: dict[int, list[float]] = {n: [] for n in STEPS}
    step_s: dict[int, list[float]] = {n: [] for n in STEPS}
    want = setting.call(decode, max(STEPS))[1]
    setting.compile_seconds("dspark", 1)  # what a process does once
    setting.compile_seconds("dspark", 16)
    same, how = {}, ""
    for _ in range(args.rounds):
        for n in STEPS:
            spent, step, text = setting.compile_seconds("dspark", n)
            compile_s[n].append(spent)
            step_s[n].append(step)
            same[n] = int((text == want[:, :n]).all(0).int().cumprod(0).sum())
            if n > 1:
                how = dspark_compile.last_report().graphs[0].notes[-1]
    result: dict[str, Any] = {
        "model": {"layers": args.layers, "width": args.width, "dtype": "bfloat16"},
        "loop": how,
        "compile_s": {str(n): statistics.median(x) for n, x in compile_s.items()},
        "compile_s_all": {str(n): x for n, x in compile_s.items()},
        "step_ms": {str(n): 1e3 * statistics.median(x) for n, x in step_s.items()},
        "tokens_as_eager": {str(n): k for n, k in same.items()},
    }
    one = result["compile_s"]["1"]
    result["compile_ratio"] = {n: x / one for n, x in result["compile_s"].items()}
    eager = min(setting.call(decode, 64)[0] for _ in range(2)) / 64
    result["eager_step_ms"] = 1e3 * eager
    if args.cold:
        result["cold_compile_s"] = {}
        for n in (1, max(STEPS)):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["DSPARK_CACHE_DIR"] = folder
                from dspark_compile.codegen.cpp import build

                build._LOADED.clear()
                result["cold_compile_s"][str(n)] = setting.compile_seconds("dspark", n)[0]
                del os.environ["DSPARK_CACHE_DIR"]
    print(result, flush=True)
    if not args.no_write:
        write(args.name, result)
    if args.no_inductor:
        return
    torch._inductor.config.force_disable_caches = True
    result["inductor"] = {}
    for n in INDUCTOR:  # takes its time: what there is is written each time
        spent, step, _ = setting.compile_seconds("inductor", n)
        result["inductor"][str(n)] = {"compile_s": spent, "step_ms": 1e3 * step}
        print("inductor", n, result["inductor"][str(n)], flush=True)
        if not args.no_write:
            write(args.name, result)


if __name__ == "__main__":
    main()
