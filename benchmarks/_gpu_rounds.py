"""Whole decode loops on a GPU: the time of a token against the time of its kernels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks._gpu_models import CONTEXT, build
from benchmarks._gpu_timing import Bench, describe, memory

NEW = 128  # tokens of a call


def generate(bench: Bench, name: str, batch: int, layers: int) -> Iterator[dict[str, Any]]:
    """A row for `dspark_compile.generate`'s captured rounds, and one for transformers' loop.

    ``overhead`` is what a token takes beyond its kernels, as a part of them: the bar is 3 %.
    ``synchronisations`` are the host's waits in the profiled call, ``launches`` its graph launches.
    """
    import dspark_compile
    from dspark_compile.runtime.generate import free

    model, what = build(name, layers, bench)
    context, new = (8, 12) if bench.smoke else (CONTEXT, NEW)
    what |= {"batch": batch, "context": context, "new_tokens": new}
    ids = torch.randint(1, 97, (batch, context), device=bench.device)
    given = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options = {"inner": "eager", "kernels": "aten"} if bench.smoke else {}

    def ours() -> Any:
        return dspark_compile.generate(model, ids, options=options, return_stats=True, **given)

    with torch.no_grad(), memory():
        try:
            start = time.perf_counter()
            text, report = ours()  # compiles and captures
            first = time.perf_counter() - start
            seconds = []
            for _ in range(1 if bench.smoke else 5):
                _, report = ours()
                seconds.append(report.seconds["decode"] / max(1, report.steps_timed))
            token = sorted(seconds)[len(seconds) // 2]
            row = {
                "first_call_s": first,
                "path": report.path,
                "notes": report.notes,
                "token_s": token,
                "looks": report.looks,
                **_profiled(ours, bench),
            }
            if row.get("kernels_s"):
                row["overhead"] = token / row["kernels_s"] - 1
            yield {**what, "contender": "dspark", **row}
        except Exception as error:
            yield {**what, "contender": "dspark", "failed": describe(error)}
            return
        finally:
            free(model)
        if bench.left < 10:
            yield {**what, "contender": "transformers", "skipped": "no time left"}
            return
        start = time.perf_counter()
        theirs = model.generate(ids, **given)
        seconds_each = (time.perf_counter() - start) / new
        equal = float((theirs == text).float().mean())
        yield {**what, "contender": "transformers", "token_s": seconds_each, "equal": equal}


def _profiled(call: Any, bench: Bench) -> dict[str, Any]:
    """Kernel time of a token, from the first graph launch on, and the host waits and graph launches
    of one whole call, its prompt's among them."""
    if bench.device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    graphs = [e for e in profiler.events() if e.name == "cudaGraphLaunch"]
    if not graphs:
        return {"profiler": "no graph was launched"}
    begin = min(e.time_range.start for e in graphs)
    kernels = [
        e for e in profiler.events()
        if str(e.device_type).endswith("CUDA") and e.time_range.start >= begin
    ]  # fmt: skip
    counts = {e.key: e.count for e in events}
    waits = sum(
        n for k, n in counts.items()
        if k in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    )  # fmt: skip
    return {
        "kernels_s": sum(e.time_range.elapsed_us() for e in kernels) * 1e-6 / len(graphs),
        "launches": counts.get("cudaGraphLaunch", 0),
        "synchronisations": waits,
    }
