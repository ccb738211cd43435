"""C++ kernels against torch's own and against the machine's read bandwidth, on the CPU.

Skinny products (bf16, float32; M = 1, 8, 16) against ``F.linear``, and decode attention (exact
and int8 caches) against ``scaled_dot_product_attention``. Operands are cold: each call takes the
next of enough copies that no cache holds them. A probe that only reads takes its turn in the same
run; ``of_bandwidth`` is bytes of weights or cache over time over what the probe read. Ratios are of
medians.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks._common import interleaved, write
from dspark_compile.codegen.cost import Cost, cost
from dspark_compile.codegen.machine import _probes, describe
from dspark_compile.kernels import cpp
from dspark_compile.ops.cache import quantize_kv

SHAPES = ((3072, 1024), (9728, 2560), (151936, 1024))
PROBE_BYTES = 256 * 2**20
SHORT = 50e-6  # what is shorter is not counted among the predictions


def turns(count: int, make: Callable[[], Any]) -> Callable[[], Any]:
    """A function that returns the next of ``count`` operands, round and round."""
    return itertools.cycle([make() for _ in range(count)]).__next__


def measure(
    runs: dict[str, Callable[[], Any]],
    warm: Callable[[], Any],
    nbytes: int,
    model: Cost,
    rounds: int,
) -> dict:
    """Times, ratios and shares of bandwidth of one case.

    ``warm`` runs ours on few operands of its own: the probe leaves neither Python nor the
    dispatcher in any cache, which costs half a millisecond that is none of a kernel's.
    """
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)
    threads = torch.get_num_threads()
    runs = {"probe": lambda: probes.read(buffer, threads), "warm": warm, **runs}
    for run in runs.values():
        run()
    times = interleaved(runs, rounds)
    bandwidth = PROBE_BYTES / times["probe"]["median_s"]
    ours = times["cpp"]["median_s"]
    predicted = model.seconds(replace(describe(), read={threads: bandwidth}))
    return {
        "bytes": nbytes,
        "read_bandwidth": bandwidth,
        "times": times,
        "of_bandwidth": nbytes / ours / bandwidth,
        "predicted_s": predicted,
        "prediction_error": predicted / ours - 1,
        "speedup": {
            n: t["median_s"] / ours for n, t in times.items() if n not in ("cpp", "probe", "warm")
        },
    }


def products(dtype: torch.dtype, cold: int, rounds: int) -> list[dict]:
    """Every shape and M of one dtype."""
    results = []
    for n, k in SHAPES:
        nbytes = n * k * dtype.itemsize
        following = turns(max(2, -(-cold // nbytes)), lambda n=n, k=k: torch.randn(n, k).to(dtype))
        for rows in (1, 8, 16):
            x = torch.randn(rows, k).to(dtype)
            reason = cpp.supports("linear", x, following())
            if reason is not None:
                raise SystemExit(f"not supported: {reason}")
            runs = {
                "cpp": lambda x=x, take=following: torch.ops.dspark_cpu.linear(x, take()),
                "aten": lambda x=x, take=following: F.linear(x, take()),
            }
            few = torch.randn(64, k).to(dtype)
            warm = functools.partial(torch.ops.dspark_cpu.linear, x, few)
            model = cost("linear", x, following())
            case = {"op": "linear", "dtype": str(dtype), "n": n, "k": k, "rows": rows}
            results.append({**case, **measure(runs, warm, nbytes, model, rounds)})
            show(results[-1])
    return results


def attentions(cold: int, rounds: int) -> list[dict]:
    """Contexts of 512 and 8192 in caches of 8192 rows, 16 heads over 8, 128 features, bf16."""
    results = []
    size, heads, kv_heads, features = 8192, 16, 8, 128
    scale = features**-0.5

    def make() -> tuple:
        k, v = (torch.randn(1, kv_heads, size, features).bfloat16() for _ in range(2))
        return k, v, *quantize_kv(k, torch.bfloat16), *quantize_kv(v, torch.bfloat16)

    small = tuple(t[:, :, :64].contiguous() for t in make())
    following = turns(max(2, cold // (4 * kv_heads * size * features)), make)
    for context, rows in itertools.product((512, size), (1, 8, 16)):
        q = torch.randn(1, heads, rows, features).bfloat16()
        filled = [context - rows]
        allowed = (torch.arange(size) <= torch.arange(rows)[:, None] + filled[0])[None, None]
        attributes = {"scale": scale, "mask": "k <= q + n0"}

        def exact(q=q, filled=filled, attributes=attributes, take=following):
            k, v = take()[:2]
            return torch.ops.dspark_cpu.attention(q, k, v, None, None, [], filled, **attributes)

        def int8(q=q, filled=filled, attributes=attributes, take=following):
            _, _, k, ks, v, vs = take()
            return torch.ops.dspark_cpu.attention_int8(
                q, k, ks, v, vs, None, None, [], filled, **attributes
            )

        def aten(q=q, allowed=allowed):
            k, v = following()[:2]
            return F.scaled_dot_product_attention(q, k, v, allowed, scale=scale, enable_gqa=True)

        def sliced(q=q, allowed=allowed, context=context):
            k, v = (t[:, :, :context] for t in following()[:2])
            return F.scaled_dot_product_attention(
                q, k, v, allowed[..., :context], scale=scale, enable_gqa=True
            )

        k, v, k8, ks, v8, vs = following()
        row = kv_heads * features
        for name, run, nbytes, c in (
            ("attention", exact, 4 * row * context,
             cost("attention", q, k, v, None, None, [], [], keys=context)),
            ("attention_int8", int8, 2 * (row + 2 * kv_heads) * context,
             cost("attention_int8", q, k8, ks, v8, vs, None, None, [], [], keys=context)),
        ):  # fmt: skip
            warm = functools.partial(run, filled=[64 - rows], take=lambda: small)
            runs = {"cpp": run, "sdpa": aten, "sdpa_sliced": sliced}
            case = {"op": name, "context": context, "rows": rows}
            results.append({**case, **measure(runs, warm, nbytes, c, rounds)})
            show(results[-1])
    return results


def show(r: dict) -> None:
    """One line."""
    what = " ".join(str(r[k]) for k in ("op", "dtype", "n", "k", "context", "rows") if k in r)
    ratios = "  ".join(f"{x:.2f}x {name}" for name, x in r["speedup"].items())
    print(
        f"{what:44} {r['times']['cpp']['median_s'] * 1e6:8.0f} us (predicted "
        f"{r['predicted_s'] * 1e6:.0f})  {r['of_bandwidth']:.0%} of "
        f"{r['read_bandwidth'] / 1e9:.1f} GB/s  {ratios}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    """Measure and write ``cpu_kernels.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold-megabytes", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own number")
    parser.add_argument("--only", choices=["products", "attention"])
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cold = args.cold_megabytes * 2**20
    load = os.getloadavg()[0]
    results: list[dict] = []
    if args.only != "attention":
        for dtype in (torch.bfloat16, torch.float32):
            results += products(dtype, cold, args.rounds)
    if args.only != "products":
        results += attentions(cold, args.rounds)
    errors = [abs(r["prediction_error"]) for r in results if r["times"]["cpp"]["median_s"] > SHORT]
    error = statistics.median(errors)
    print(f"median error of the prediction: {error:.0%} of {len(errors)} kernels", flush=True)
    payload = {
        "median_prediction_error": error,
        "load_before": load,
        "machine": describe().to_dict(),
        "results": results,
    }
    if not args.no_write:
        write("cpu_kernels", payload)


if __name__ == "__main__":
    main()
