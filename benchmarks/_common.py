"""What the benchmarks share: conditions, interleaving, writing results."""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

MEETING = """// The threads meet again and again: what one meeting takes, in nanoseconds.
#include "program.h"

extern "C" __attribute__((visibility("default"))) double dspark_meeting(int threads, int count) {
  double each = 0;
  dspark::parallel(threads, [&](dspark::Team team) {
    team.barrier();
    const int64_t start = dspark::now();
    for (int i = 0; i < count; ++i) team.barrier();
    if (team.thread == 0) each = double(dspark::now() - start) / count;
  });
  return each;
}
"""


def meeting_ns() -> float | None:
    """Nanoseconds in which torch's threads meet, the median of 9: how near their cores lie. Virtual
    machines move between one cluster of cores and two, whose caches and memory links are others.
    None without a C++ compiler."""
    from dspark_compile.codegen.cpp import build, isa

    try:
        library = build.load("meeting", MEETING, isa.detect())
    except build.BuildError:
        return None
    library.dspark_meeting.restype = ctypes.c_double
    threads = torch.get_num_threads()
    return statistics.median(library.dspark_meeting(threads, 2000) for _ in range(9))


_BEFORE = meeting_ns()


def conditions() -> dict[str, Any]:
    """Versions, machine, threads, commit and time of a run."""
    from dspark_compile.diagnostics.environment import environment

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        **environment(),
        "threads": torch.get_num_threads(),
        "meeting_ns": {"before": _BEFORE, "after": meeting_ns()},
        "commit": commit + ("+" if dirty else ""),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def random_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A Hugging Face model of a config, its weights drawn at random and its norms 1; the seed is
    the caller's."""
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = kind(config)
    finally:
        torch.set_default_dtype(default)
    for p in model.parameters():
        if p.dim() == 1:
            p.data.fill_(1)
        else:
            p.data.normal_(0, 0.02)
    model.tie_weights()
    return model.eval()


def read_bandwidth(megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes per second of summing a tensor that no cache holds; the median of ``rounds``."""
    x = torch.ones(megabytes * 2**20 // 4, dtype=torch.int32)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(times)


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, repeat: int = 1
) -> dict[str, dict[str, float]]:
    """Time every function ``rounds × repeat`` times, taking turns; seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for _ in range(repeat):
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_s": statistics.median(t),
            "min_s": min(t),
            "max_s": max(t),
            "runs": len(t),
        }
        for name, t in times.items()
    }


def write(name: str, payload: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json`` with the conditions.

    ``name`` may begin with a folder, for another machine than that of the files beside it.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"conditions": conditions(), **payload}, indent=1) + "\n")
    print(f"wrote {path}")
    return path
