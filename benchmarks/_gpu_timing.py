"""Timing on a GPU (or, for a smoke test, on the CPU): operands out of cache, launches out of sight.

What is timed is a captured graph of calls that take the next of so many copies of their operands
that no cache holds them; the time of one call is the graph's over their number. Contenders take
turns, and what is kept is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[..., Any]


class Skip(Exception):
    """A case is left out; the message says why."""


@dataclass
class Bench:
    """Where and for how long a section runs.

    Attributes:
        device: ``cuda``, or ``cpu`` in a smoke test.
        smoke: tiny sizes, nothing worth reading.
        deadline: `time.monotonic` at which the section has to end.
        bandwidth, rate: bytes copied and bf16 operations per second, once measured.
    """

    device: torch.device
    smoke: bool
    deadline: float
    bandwidth: float = 0.0
    rate: float = 0.0
    rounds: int = 15
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, by default in `dtype`."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def dtype(self) -> torch.dtype:
        # The interpreter, which runs Triton's kernels in a smoke test, computes bf16 wrongly.
        return torch.float32 if self.smoke else torch.bfloat16

    def copies(self, nbytes: int) -> int:
        """How many operands of ``nbytes`` no cache holds together.

        Raises:
            Skip: one of them leaves no room in memory.
        """
        if self.smoke:
            return 1
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        free -= torch.cuda.memory_allocated()
        if nbytes > 0.8 * free:
            raise Skip(f"{nbytes / 2**30:.0f} GiB of operands, {free / 2**30:.0f} GiB free")
        count = max(1, math.ceil(512 * 2**20 / nbytes))
        return max(1, min(count, 128, int(0.8 * free / nbytes)))

    def measure(
        self,
        contenders: dict[str, Call],
        operands: Sequence[Any],
        reference: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Times of every contender over ``operands``, and why some have none.

        A contender is a function of one operand. ``difference`` is the largest one of its first
        result from ``reference`` (default: the first contender's that is not ours), over the
        largest magnitude there.
        """
        graphs: dict[str, Call] = {}
        failed: dict[str, str] = {}
        for name, call in contenders.items():
            try:
                graphs[name] = self.graph(call, operands)
            except Exception as error:
                failed[name] = describe(error)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
        difference: dict[str, float] = {}
        for name in sorted(graphs, key=lambda name: name.startswith("dspark")):
            result = contenders[name](operands[0])
            reference = result if reference is None else reference
            difference[name] = relative(result, reference)
        times = self.turns(graphs)
        for t in times.values():
            for key in ("median_s", "min_s", "max_s"):
                t[key] /= len(operands)
        row = {"times": times, "difference": difference}
        return {**row, **({"failed": failed} if failed else {})}

    def graph(self, call: Call, operands: Sequence[Any]) -> Call:
        """One function that makes all the calls: a captured graph where there is a GPU."""
        if self.device.type != "cuda":
            call(operands[0])
            return lambda: [call(x) for x in operands]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call(operands[0])
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in operands:
                call(x)
        return graph.replay

    def turns(self, runs: dict[str, Call], rounds: int | None = None) -> dict[str, dict[str, Any]]:
        """Seconds of each run, taking turns; ends early, after 3 rounds, if time runs out."""
        for run in runs.values():
            run()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for done in range(1 if self.smoke else rounds or self.rounds):
            if done >= 3 and self.left < 0:
                break
            for name, run in runs.items():
                times[name].append(self.once(run))
        return {
            name: {
                "median_s": statistics.median(t), "min_s": min(t), "max_s": max(t), "runs": len(t),
            }
            for name, t in times.items()
        }  # fmt: skip

    def once(self, run: Call) -> float:
        """Seconds of one run on the device."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference over the largest magnitude of the reference."""
    scale = reference.float().abs().max().clamp(min=1e-30)
    return ((result.float() - reference.float()).abs().max() / scale).item()


def describe(error: BaseException) -> str:
    """One line about an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """What was allocated inside goes back to the device behind it."""
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def verdict(row: dict[str, Any], bench: Bench, *, flops: float = 0.0) -> dict[str, Any]:
    """Adds to a row with ``bytes`` and ``times``: share of the roofline, speed against the best."""
    times = {name: t["median_s"] for name, t in row["times"].items()}
    if bench.bandwidth:
        roof = max(row["bytes"] / bench.bandwidth, flops / bench.rate if bench.rate else 0.0)
        row["roofline_s"] = roof
        row["of_roofline"] = {name: roof / t for name, t in times.items()}
    ours = {n: t for n, t in times.items() if n.startswith("dspark")}
    others = {n: t for n, t in times.items() if not n.startswith("dspark")}
    if ours and others:
        best = min(others, key=lambda name: others[name])
        row["best_other"] = best
        row["speedup"] = {name: others[best] / t for name, t in ours.items()}
    return row
