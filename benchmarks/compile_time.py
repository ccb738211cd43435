"""Compile time: dspark against Inductor, cold and from a warm cache, each in a new process.

Every measurement is a fresh process with its own Inductor cache folder: the cold one empty,
the warm one what the cold run left. The processes take turns. What is timed is everything
``torch.compile`` does (ours with ``--inner``) for one prefill and two decode steps of the shipped
model in float32, or with ``--shape qwen3-0.6b`` of a random one in bfloat16. Then the same process
makes four tokens by `dspark_compile.generate`: the time of its compilation.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --shape qwen3-0.6b --rounds 1 --name compile_time_qwen3
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
from benchmarks.decode import SHAPES

_CHILD = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, StaticCache
from dspark_compile.models import DEMO_PATH
backend, layers, shape, inner = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
import dspark_compile.backend, torch._inductor.compile_fx  # imports are not compile time
if shape == "shipped":
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
else:
    from benchmarks.decode import make
    model = make(shape, torch.bfloat16, layers)
if layers and shape == "shipped":
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    model.config.layer_types = model.config.layer_types[:layers]
options = {"inner": inner} if backend == "dspark" else None
run = torch.compile(model, backend=backend, dynamic=False, options=options)
ids = torch.arange(64).reshape(1, 64) + 5
with torch.no_grad():
    cache = StaticCache(config=model.config, max_cache_len=128)
    model(ids[:, :1], past_key_values=cache)
    cache.reset()
    start = time.perf_counter()
    run(ids, past_key_values=cache)
    prefill = time.perf_counter() - start
    run(ids[:, :1], past_key_values=cache)
    run(ids[:, :1], past_key_values=cache)
    total = time.perf_counter() - start
out = {"seconds": total, "decode_seconds": total - prefill}
if backend == "dspark":
    import dspark_compile
    report = dspark_compile.last_report()
    out["stages"] = {}
    for graph in report.graphs:
        for stage, seconds in graph.seconds.items():
            out["stages"][stage] = out["stages"].get(stage, 0) + seconds
    out["sites"] = report.summary()
    out["fallbacks"] = len(report.fallbacks)
    out["from_cache"] = [graph.from_cache for graph in report.graphs]
    _, stats = dspark_compile.generate(
        model, ids, max_new_tokens=4, do_sample=False, eos_token_id=None, return_stats=True
    )
    out["generate_compile_seconds"] = stats.seconds["compile"]
print("RESULT", json.dumps(out))
"""


def child(backend: str, cache: str, layers: int, shape: str, inner: str) -> dict:
    """One fresh process; its result."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "DSPARK_CACHE_DIR": cache + "/dspark"}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, backend, str(layers), shape, inner],
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
    parser.add_argument("--shape", choices=["shipped", *SHAPES], default="shipped")
    parser.add_argument("--inner", choices=["inductor", "auto"], default="inductor")
    parser.add_argument("--name", default="compile_time")
    args = parser.parse_args()
    runs: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        for backend in ("inductor", "dspark"):
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    result = child(backend, cache, args.layers, args.shape, args.inner)
                    runs.setdefault(f"{backend} {state}", []).append(result)
                    print(
                        f"{backend} {state} {result['seconds']:.1f} s, of which decode"
                        f" {result['decode_seconds']:.1f} s",
                        flush=True,
                    )
    median, decode = (
        {k: statistics.median(r[part] for r in v) for k, v in runs.items()}
        for part in ("seconds", "decode_seconds")
    )
    write(
        args.name,
        {
            "what": "one prefill of 64 tokens and two decode steps",
            "model": args.shape,
            "layers": args.layers or "all",
            "inner": args.inner,
            "median_s": median,
            "decode_median_s": decode,
            "cold_ratio_to_inductor": median["dspark cold"] / median["inductor cold"],
            "warm_over_cold": median["dspark warm"] / median["dspark cold"],
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
