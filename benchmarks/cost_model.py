"""The cost model against kernels of shapes that its constants were not fitted to, on the CPU.

``benchmarks.cpu_kernels`` prints predictions for the shapes at which `dspark_compile.codegen.cost`
was tuned. Here no shape is one of those: products of other widths, row counts, dtypes and weights,
gated MLPs, experts, norms, attention of other head geometries and contexts. Operands are cold, a
probe that only reads memory takes its turn with every kernel, and its bandwidth of that moment goes
into the prediction. Two questions are answered:

- how far off are the predictions as they are (``shipped``)?
- how far off would they be if the model's three free constants (the share of the read bandwidth
  that is reached, the share of the matrix rate, the price of a softmax's score) were fitted to all
  shapes but the one that is predicted (``left_out``), or to one half of the shapes (``halves``)?
  An error much below ``shipped`` would say that the constants are badly chosen; one much above the
  error of a fit to everything (``fitted``) would say that a fit does not carry over.

    python -m benchmarks.cost_model
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks._common import interleaved, write
from dspark_compile.codegen.cost import Cost, cost
from dspark_compile.codegen.machine import Machine, _probes, describe
from dspark_compile.kernels import cpp
from dspark_compile.ops.quantized import pack_int4

PROBE_BYTES = 128 * 2**20
SHORT = 50e-6  # what is shorter is not counted
BF16, F32 = torch.bfloat16, torch.float32
FREE = ("memory", "compute", "score")  # what is fitted: factors on the three parts of a time


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        op: the dialect op.
        shape: what is left out together, however many rows it is run with.
        rows: of the input.
        operands: makes one set of them; ``warm`` makes small ones, for the same code.
        keys: how many keys attention reads, None for other ops.
    """

    op: str
    shape: str
    rows: int
    operands: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    warm: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    keys: int | None = None


def some(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Numbers of a tensor of that shape, every row the same: quick to make."""
    if not dtype.is_floating_point:
        return torch.randint(0, 127, (shape[-1],)).to(dtype).expand(shape).contiguous()
    return (torch.randn(shape[-1]) * 0.05).to(dtype).expand(shape).contiguous()


def products() -> list[Case]:
    """Products of bfloat16, float32, int8 and int4 weights."""

    def dense(n: int, k: int, rows: int, dtype: torch.dtype) -> Any:
        return lambda: ((some(rows, k, dtype=dtype), some(n, k, dtype=dtype)), {})

    def int8(n: int, k: int, rows: int) -> Any:
        return lambda: ((some(rows, k), some(n, k, dtype=torch.int8), some(n, 1)), {})

    def int4(n: int, k: int, rows: int) -> Any:
        def make() -> Any:
            weight = pack_int4(some(n, k, dtype=torch.int8) % 8)
            return (some(rows, k), weight, some(n, k // 32)), {}

        return make

    cases = []
    for (n, k), dtype in itertools.product(
        ((2048, 2048), (5632, 2048), (4096, 4096), (32000, 1536), (1536, 8960)), (BF16, F32)
    ):
        name = f"{str(dtype)[6:]} {n}x{k}"
        for rows in (1, 4, 12) if dtype == BF16 else (1, 6):
            case = Case("linear", name, rows, dense(n, k, rows, dtype), dense(64, k, rows, dtype))
            cases.append(case)
    for (n, k), rows in itertools.product(((5632, 2048), (4096, 4096)), (1, 12)):
        cases += [
            Case("linear_int8", f"int8 {n}x{k}", rows, int8(n, k, rows), int8(64, k, rows)),
            Case("linear_int4", f"int4 {n}x{k}", rows, int4(n, k, rows), int4(64, k, rows)),
        ]
    return cases


def blocks() -> list[Case]:
    """Gated MLPs, experts, norms."""

    def mlp(inner: int, k: int, rows: int) -> Any:
        def make() -> Any:
            up = (some(inner, k), some(inner, k), some(k, inner))
            return (some(rows, k), *up, None, None, None, "silu"), {}

        return make

    def experts(count: int, choices: int, inner: int, k: int, rows: int) -> Any:
        def make() -> Any:
            indices = torch.stack([torch.randperm(count)[:choices] for _ in range(rows)])
            stacks = [[some(count, inner, k)], [some(count, inner, k)], [some(count, k, inner)]]
            weights = some(rows, choices)
            return (some(rows, k), indices, weights, *stacks, [], [], [], "silu"), {}

        return make

    def norm(rows: int, k: int) -> Any:
        return lambda: ((some(rows, k), some(k), 1e-6), {})

    cases = []
    for (inner, k), rows in itertools.product(((2816, 1024), (5632, 2048), (8960, 1536)), (1, 6)):
        cases.append(Case("gated_mlp", f"{inner}x{k}", rows, mlp(inner, k, rows), mlp(64, k, rows)))
    for (count, choices, inner, k), rows in itertools.product(
        ((32, 4, 768, 1024), (60, 4, 1408, 1024)), (1, 4)
    ):
        name = f"{choices} of {count}, {inner}x{k}"
        make, few = (experts(n, choices, inner, k, rows) for n in (count, choices))
        cases.append(Case("moe_experts", name, rows, make, few))
    for rows, k in ((2048, 2048), (512, 4096)):
        cases.append(Case("rms_norm", f"{rows}x{k}", rows, norm(rows, k), norm(4, k)))
    return cases


def attentions() -> list[Case]:
    """Decode attention over exact and int8 caches with room for 6144 tokens."""
    size = 6144

    def make(
        heads: int, kv_heads: int, features: int, rows: int, context: int, room: int, int8: bool
    ) -> Any:
        def operands() -> Any:
            query = some(1, heads, rows, features)
            given = {"scale": features**-0.5, "mask": "k <= q + n0"}
            if int8:
                numbers = (1, kv_heads, room, features)
                k, v = (some(*numbers, dtype=torch.int8) for _ in range(2))
                ks, vs = (some(1, kv_heads, room).abs() for _ in range(2))
                return (query, k, ks, v, vs, None, None, [], [context - rows]), given
            k, v = (some(1, kv_heads, room, features) for _ in range(2))
            return (query, k, v, None, None, [], [context - rows]), given

        return operands

    cases = []
    for (heads, kv_heads, features), context, rows in itertools.product(
        ((32, 8, 64), (12, 2, 128), (8, 8, 64)), (1500, 6000), (1, 4, 12)
    ):
        for int8 in (False, True):
            given = (heads, kv_heads, features, rows)
            shape = f"{heads} over {kv_heads} heads of {features}, {context} keys"
            cases.append(
                Case(
                    "attention_int8" if int8 else "attention", shape, rows,
                    make(*given, context, size, int8), make(*given, 64, 64, int8), context,
                )
            )  # fmt: skip
    return cases


def measure(case: Case, cold: int, rounds: int) -> dict[str, Any] | None:
    """What a case took, and the parts of its prediction; None where no kernel takes it."""
    args, kwargs = case.operands()
    reason = cpp.supports(case.op, *args, **kwargs)
    if reason is not None:
        print(f"{case.op} {case.shape} x {case.rows}: {reason}", flush=True)
        return None
    function = getattr(torch.ops.dspark_cpu, case.op)
    keys = {} if case.keys is None else {"keys": case.keys}
    model = cost(case.op, *args, **kwargs, **keys)
    copies = max(2, min(64, math.ceil(cold / float(model.bytes))))
    following = itertools.cycle([(args, kwargs), *(case.operands() for _ in range(copies - 1))])
    few, threads = case.warm(), torch.get_num_threads()
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)

    def ours() -> Any:
        args, kwargs = next(following)
        return function(*args, **kwargs)

    runs = {
        "probe": lambda: probes.read(buffer, threads),
        # Python and the dispatcher are in no cache behind a probe: that is not the kernel's time.
        "warm": lambda: function(*few[0], **few[1]),
        "ours": ours,
    }
    for run in runs.values():
        run()
    times = interleaved(runs, rounds)
    bandwidth, taken = PROBE_BYTES / times["probe"]["median_s"], times["ours"]["median_s"]
    machine = replace(describe(), read={threads: bandwidth})
    result = {
        "op": case.op, "shape": case.shape, "rows": case.rows, "read_bandwidth": bandwidth,
        "measured_s": taken, "min_s": times["ours"]["min_s"], **parts(model, machine),
    }  # fmt: skip
    result["error"] = predicted(result, (1.0, 1.0, 1.0)) / taken - 1
    print(
        f"{case.op:15} {case.shape:34} x {case.rows:<5} {taken * 1e6:8.0f} us,"
        f" predicted {result['error']:+.0%}",
        flush=True,
    )
    return result


def parts(model: Cost, machine: Machine) -> dict[str, float]:
    """What a prediction is made of: seconds of bytes, products, scores and a launch."""
    return {
        "memory_s": float(model.bytes) / machine.bandwidth,
        "compute_s": float(model.flops) / machine.rate(model.dtype),
        "score_s": float(model.vector) / machine.rate(F32),
        "launch_s": machine.launch + machine.region,
    }


def predicted(r: dict[str, Any], factors: Sequence[float]) -> float:
    """`Cost.seconds` with factors on its parts."""
    memory, compute, score = factors
    work = compute * r["compute_s"] + score * r["score_s"]
    return math.hypot(memory * r["memory_s"], work) + r["launch_s"]


def misfit(results: Sequence[dict[str, Any]], factors: Sequence[float]) -> float:
    """Mean of the logarithmic errors: no single kernel decides."""
    return statistics.fmean(abs(math.log(predicted(r, factors) / r["measured_s"])) for r in results)


def fit(results: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """The factors that fit best, by a search along one after another in ever smaller steps."""
    factors, step = [1.0] * len(FREE), 1.6
    best = misfit(results, factors)
    while step > 1.01:
        moved = False
        for i, up in itertools.product(range(len(FREE)), (step, 1 / step)):
            tried = [f * up if j == i else f for j, f in enumerate(factors)]
            value = misfit(results, tried)
            if value < best - 1e-9:
                factors, best, moved = tried, value, True
        if not moved:
            step = math.sqrt(step)
    return tuple(factors)


def errors(results: Sequence[dict[str, Any]], factors: Sequence[float]) -> list[float]:
    """Relative errors, without their signs."""
    return [abs(predicted(r, factors) / r["measured_s"] - 1) for r in results]


def evaluate(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median errors of the model as it is and of fits that did not see what they predict."""
    shapes = list(dict.fromkeys((r["op"], r["shape"]) for r in results))

    def of(wanted: Sequence[Any], inside: bool) -> list[dict[str, Any]]:
        return [r for r in results if ((r["op"], r["shape"]) in wanted) == inside]

    left_out: list[float] = []
    for shape in shapes:
        left_out += errors(of([shape], True), fit(of([shape], False)))
    halves: list[float] = []
    for first in (0, 1):
        known = shapes[first::2]
        halves += errors(of(known, False), fit(of(known, True)))
    factors, one = fit(results), (1.0,) * len(FREE)
    return {
        "shipped": statistics.median(errors(results, one)),
        "shipped_by_op": {
            op: statistics.median(errors([r for r in results if r["op"] == op], one))
            for op in dict.fromkeys(r["op"] for r in results)
        },
        "within_25_percent": statistics.fmean(e <= 0.25 for e in errors(results, one)),
        "left_out": statistics.median(left_out),
        "halves": statistics.median(halves),
        "fitted": statistics.median(errors(results, factors)),
        "factors_fitted": dict(zip(FREE, factors, strict=True)),
    }


@torch.no_grad()
def main() -> None:
    """Measure and write ``cost_model.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold-megabytes", type=int, default=192)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    for case in [*products(), *blocks(), *attentions()]:
        result = measure(case, args.cold_megabytes * 2**20, args.rounds)
        if result is not None:
            results.append(result)
    counted = [r for r in results if r["measured_s"] > SHORT]
    summary = evaluate(counted)
    for name, value in summary.items():
        print(name, f"{value:.0%}" if isinstance(value, float) else value, flush=True)
    payload = {
        "counted": len(counted), "shapes": len({(r["op"], r["shape"]) for r in counted}),
        **summary, "load_before": load, "machine": describe().to_dict(), "results": results,
    }  # fmt: skip
    if not args.no_write:
        write("cost_model", payload)


if __name__ == "__main__":
    main()
