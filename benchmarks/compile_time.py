"""Compile time: dspark against Inductor, cold and from a warm cache, each in a new process.

Every measurement is a fresh process with its own Inductor cache folder: the cold one empty,
the warm one what the cold run left. The processes take turns. What is timed is everything
``torch.compile`` does for one prefill and two decode steps of the shipped model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks._common import write

_CHILD = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, StaticCache
from dspark_compile.models import DEMO_PATH
backend, layers = sys.argv[1], int(sys.argv[2])
import dspark_compile.backend, torch._inductor.compile_fx  # imports are not compile time
model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
if layers:
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    model.config.layer_types = model.config.layer_types[:layers]
run = torch.compile(model, backend=backend, dynamic=False)
ids = torch.arange(64).reshape(1, 64) + 5
with torch.no_grad():
    cache = StaticCache(config=model.config, max_cache_len=128)
    model(ids[:, :1], past_key_values=cache)
    cache.reset()
    start = time.perf_counter()
    run(ids, past_key_values=cache)
    run(ids[:, :1], past_key_values=cache)
    run(ids[:, :1], past_key_values=cache)
    total = time.perf_counter() - start
out = {"seconds": total}
if backend == "dspark":
    import dspark_compile
    report = dspark_compile.last_report()
    out["stages"] = {}
    for graph in report.graphs:
        for stage, seconds in graph.seconds.items():
            out["stages"][stage] = out["stages"].get(stage, 0) + seconds
    out["sites"] = report.summary()
    out["fallbacks"] = len(report.fallbacks)
print("RESULT", json.dumps(out))
"""


def child(backend: str, cache: str, layers: int) -> dict:
    """One fresh process; its result."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "DSPARK_CACHE_DIR": cache + "/dspark"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, backend, str(layers)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line[7:])
    raise RuntimeError(f"{backend} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    """Measure and write ``compile_time.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="keep only the first N layers")
    args = parser.parse_args()
    runs: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for backend in ("inductor", "dspark"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    result = child(backend, cache, args.layers)
                    runs.setdefault(f"{backend} {state}", []).append(result)
                    print(backend, state, f"{result['seconds']:.1f} s", flush=True)
    median = {k: statistics.median(r["seconds"] for r in v) for k, v in runs.items()}
    write(
        "compile_time",
        {
            "what": "one prefill of 64 tokens and two decode steps of the shipped model, float32",
            "layers": args.layers or "all",
            "median_s": median,
            "cold_ratio_to_inductor": median["dspark cold"] / median["inductor cold"],
            "warm_over_cold": median["dspark warm"] / median["dspark cold"],
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
