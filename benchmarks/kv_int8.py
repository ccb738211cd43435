"""int8 KV cache: held-out perplexity against the exact cache, and bytes.

Both caches read the same held-out text window by window, through the compiled model with a
static cache: a prefill of ``--prefill`` tokens, then decode steps of ``--step`` tokens to the
window's full length, so that nearly every prediction attends to cache rows.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from benchmarks._common import write


def main() -> None:
    """Measure and write ``kv_int8.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=0, help="0: the model's full context")
    parser.add_argument("--prefill", type=int, default=64)
    parser.add_argument("--step", type=int, default=64)
    parser.add_argument("--inner", default="eager", choices=["eager", "inductor"])
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

    import dspark_compile
    from dspark_compile.models import DEMO_PATH

    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH)
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
    length = args.length or model.config.max_position_embeddings
    text = (DEMO_PATH / "heldout.txt").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    windows = [ids[i : i + length] for i in range(0, len(ids) - length, length)][: args.windows]

    schemes: dict[str, dict] = {}
    runs = {
        scheme: torch.compile(
            model, backend="dspark", dynamic=False,
            options={"kv_cache": scheme, "inner": args.inner, "fallback": "error"},
        )
        for scheme in ("model", "int8")
    }  # fmt: skip
    with torch.no_grad():
        for scheme, run in runs.items():
            loss = [0.0, 0.0]  # all positions, last quarter of the window
            count = [0, 0]
            start = time.perf_counter()
            for window in windows:
                cache = StaticCache(config=model.config, max_cache_len=length)
                position = 0
                while position < length - 1:
                    rows = args.prefill if position == 0 else args.step
                    chunk = window[position : position + rows]
                    logits = run(chunk[None], past_key_values=cache).logits[0]
                    targets = window[position + 1 : position + 1 + rows]
                    losses = torch.nn.functional.cross_entropy(
                        logits[: len(targets)].float(), targets, reduction="none"
                    )
                    loss[0] += losses.sum().item()
                    count[0] += len(targets)
                    if position >= 3 * length // 4:
                        loss[1] += losses.sum().item()
                        count[1] += len(targets)
                    position += rows
            report = dspark_compile.last_report()
            plan = report.graphs[-1].kv_plan
            schemes[scheme] = {
                "perplexity": math.exp(loss[0] / count[0]),
                "perplexity_last_quarter": math.exp(loss[1] / max(count[1], 1)),
                "tokens": count[0],
                "seconds": time.perf_counter() - start,
                "graphs": len(report.graphs),
                "fallbacks": [f.reason for f in report.fallbacks],
                "cache_bytes": sum(e.bytes_after for e in plan),
                "cache_bytes_float32": sum(e.bytes_before for e in plan),
            }
            print(scheme, schemes[scheme], flush=True)
    exact, small = schemes["model"], schemes["int8"]
    bf16 = small["cache_bytes_float32"] / 2
    write(
        "kv_int8",
        {
            "context": length,
            "windows": len(windows),
            "schemes": schemes,
            "perplexity_ratio": small["perplexity"] / exact["perplexity"],
            "perplexity_ratio_last_quarter": small["perplexity_last_quarter"]
            / exact["perplexity_last_quarter"],
            "bytes_ratio_to_bf16": small["cache_bytes"] / bf16,
        },
    )


if __name__ == "__main__":
    main()
