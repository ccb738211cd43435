"""What `benchmarks.cost_model` computes from measurements; nothing is timed here."""

from __future__ import annotations

import itertools

import pytest

from benchmarks import cost_model
from dspark_compile.codegen import calibrate

TRUE = (1.3, 0.7, 2.0)


def measured(factors=TRUE, odd=None):
    """Kernels that take what the model says with these factors; those of ``odd`` take 4 times as
    long."""
    results = []
    for shape, rows in itertools.product(range(12), (1, 8)):
        r = {
            "op": "attention" if shape % 3 == 0 else "linear", "shape": f"s{shape}", "rows": rows,
            "memory_s": 1e-4 * (1 + shape), "compute_s": 5e-5 * rows * (1 + shape % 4),
            "score_s": 4e-5 * rows if shape % 3 == 0 else 0.0, "launch_s": 2e-6,
        }  # fmt: skip
        r["measured_s"] = calibrate.predicted(r, factors) * (4 if shape == odd else 1)
        results.append(r)
    return results


def test_a_prediction_of_parts_is_the_cost_models():
    import sympy
    import torch

    from dspark_compile.codegen.cost import T, cost
    from dspark_compile.codegen.machine import Machine

    machine = Machine(
        name="m", threads=2, read={2: 20e9}, copy={2: 10e9}, cached=60e9, cache=1 << 22,
        rates={"float32": 1e11, "bfloat16": 1e12}, launch=2e-6, region=1e-6,
    )  # fmt: skip
    cache = T((1, 8, 4096, 128))
    query = T((1, 16, 4, 128), torch.bfloat16)
    model = cost("attention", query, cache, cache, None, None, [], [], keys=sympy.S(1000))
    parts = calibrate.parts(model, machine)
    assert parts["score_s"] > 0
    assert calibrate.predicted(parts, (1, 1, 1)) == pytest.approx(model.seconds(machine))


def test_a_fit_finds_the_factors():
    assert calibrate.fit(measured()) == pytest.approx(TRUE, rel=0.03)


def test_a_shape_that_is_left_out_has_no_part_in_its_prediction():
    exact = cost_model.evaluate(measured())
    assert exact["left_out"] < 0.03 and exact["halves"] < 0.03 and exact["fitted"] < 0.03
    assert exact["shipped"] > 0.1
    # One odd shape is predicted as badly without it as it is odd: nothing was fitted to it.
    odd = measured(odd=5)
    known = [r for r in odd if r["shape"] != "s5"]
    wrong = cost_model.errors([r for r in odd if r["shape"] == "s5"], calibrate.fit(known))
    assert wrong == pytest.approx([0.75, 0.75], abs=0.03)


@pytest.mark.parametrize("make", ["products", "blocks", "attentions"])
def test_shapes_are_not_those_that_constants_were_fitted_to(make):
    from benchmarks.cpu_kernels import SHAPES

    names = {case.shape for case in getattr(cost_model, make)()}
    assert names and not any(f"{n}x{k}" in name for n, k in SHAPES for name in names)
    assert not any("16 over 8 heads of 128" in name for name in names)
