"""The cost model against kernels of shapes that its constants were not fitted to, on the CPU.

``benchmarks.cpu_kernels`` prints predictions for the shapes at which `dspark_compile.codegen.cost`
was tuned. Here no shape is one of those: products of other widths, row counts, dtypes and weights,
gated MLPs, experts, norms, attention of other head geometries and contexts. Operands are cold, a
probe that only reads memory takes its turn with every kernel, and its bandwidth of that moment goes
into the prediction. Three questions are answered:

- how far off are the predictions as they are (``shipped``)?
- how far off are they with the factors that ``dspark env --calibrate`` finds on this machine, from
  kernels of yet other shapes (``calibrated``)?
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
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks._common import write
from dspark_compile.codegen.calibrate import (
    BF16,
    F32,
    Case,
    attention,
    calibrate,
    experts,
    fit,
    gated_mlp,
    linear,
    linear_int4,
    linear_int8,
    measure,
    predicted,
    rms_norm,
)
from dspark_compile.codegen.machine import FACTORS, describe

SHORT = 50e-6  # what is shorter is not counted


def products() -> list[Case]:
    """Products of bfloat16, float32, int8 and int4 weights."""
    cases = []
    for (n, k), dtype in itertools.product(
        ((2048, 2048), (5632, 2048), (4096, 4096), (32000, 1536), (1536, 8960)), (BF16, F32)
    ):
        cases += [linear(n, k, rows, dtype) for rows in ((1, 4, 12) if dtype == BF16 else (1, 6))]
    for (n, k), rows in itertools.product(((5632, 2048), (4096, 4096)), (1, 12)):
        cases += [linear_int8(n, k, rows), linear_int4(n, k, rows)]
    return cases


def blocks() -> list[Case]:
    """Gated MLPs, experts, norms."""
    wide = ((2816, 1024), (5632, 2048), (8960, 1536))
    stacks = ((32, 4, 768, 1024), (60, 4, 1408, 1024))
    return [
        *(gated_mlp(*sizes, rows) for sizes, rows in itertools.product(wide, (1, 6))),
        *(experts(*sizes, rows) for sizes, rows in itertools.product(stacks, (1, 4))),
        *(rms_norm(rows, k) for rows, k in ((2048, 2048), (512, 4096))),
    ]


def attentions() -> list[Case]:
    """Decode attention over exact and int8 caches with room for 6144 tokens."""
    return [
        attention(*heads, rows, context, 6144, int8)
        for heads, context, rows, int8 in itertools.product(
            ((32, 8, 64), (12, 2, 128), (8, 8, 64)), (1500, 6000), (1, 4, 12), (False, True)
        )
    ]


def errors(results: Sequence[dict[str, Any]], factors: Sequence[float]) -> list[float]:
    """Relative errors, without their signs."""
    return [abs(predicted(r, factors) / r["measured_s"] - 1) for r in results]


def evaluate(
    results: list[dict[str, Any]], calibration: Sequence[float] | None = None
) -> dict[str, Any]:
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
    factors, one = fit(results), (1.0,) * len(FACTORS)
    calibrated = {} if calibration is None else with_factors(results, calibration)
    return {
        **calibrated,
        "shipped": statistics.median(errors(results, one)),
        "shipped_by_op": {
            op: statistics.median(errors([r for r in results if r["op"] == op], one))
            for op in dict.fromkeys(r["op"] for r in results)
        },
        "within_25_percent": statistics.fmean(e <= 0.25 for e in errors(results, one)),
        "left_out": statistics.median(left_out),
        "halves": statistics.median(halves),
        "fitted": statistics.median(errors(results, factors)),
        "factors_fitted": dict(zip(FACTORS, factors, strict=True)),
    }


def with_factors(results: Sequence[dict[str, Any]], factors: Sequence[float]) -> dict[str, Any]:
    """Median errors of predictions with these factors."""
    found = errors(results, factors)
    return {
        "calibrated": statistics.median(found),
        "calibrated_by_op": {
            op: statistics.median(errors([r for r in results if r["op"] == op], factors))
            for op in dict.fromkeys(r["op"] for r in results)
        },
        "calibrated_within_25_percent": statistics.fmean(e <= 0.25 for e in found),
        "calibration": dict(zip(FACTORS, factors, strict=True)),
    }


@torch.no_grad()
def main() -> None:
    """Measure and write ``cost_model.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold-megabytes", type=int, default=192)
    parser.add_argument("--name", default="cost_model", help="of the result's file")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    machine = describe()
    start = time.perf_counter()
    calibration = list(calibrate(machine).values())
    taken = time.perf_counter() - start
    print(f"calibrated in {taken:.0f} s: {dict(zip(FACTORS, calibration, strict=True))}")
    results: list[dict[str, Any]] = []
    for case in [*products(), *blocks(), *attentions()]:
        result = measure(case, machine, args.rounds, args.cold_megabytes * 2**20)
        if result is None:
            print(f"{case.op} {case.shape} x {case.rows}: no kernel takes it", flush=True)
            continue
        result["error"] = predicted(result, (1.0, 1.0, 1.0)) / result["measured_s"] - 1
        result["calibrated_error"] = predicted(result, calibration) / result["measured_s"] - 1
        results.append(result)
        print(
            f"{case.op:15} {case.shape:34} x {case.rows:<5} {result['measured_s'] * 1e6:8.0f} us,"
            f" predicted {result['error']:+.0%}, calibrated {result['calibrated_error']:+.0%}",
            flush=True,
        )
    counted = [r for r in results if r["measured_s"] > SHORT]
    summary = evaluate(counted, calibration)
    for name, value in summary.items():
        print(name, f"{value:.0%}" if isinstance(value, float) else value, flush=True)
    payload = {
        "counted": len(counted), "shapes": len({(r["op"], r["shape"]) for r in counted}),
        **summary, "load_before": load, "calibration_s": taken,
        "machine": machine.to_dict(), "results": results,
    }  # fmt: skip
    if not args.no_write:
        write(args.name, payload)


if __name__ == "__main__":
    main()
