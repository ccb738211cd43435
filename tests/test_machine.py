"""The machine's description: measured in seconds, kept, overridden."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest
import torch

from dspark_compile.codegen import machine
from dspark_compile.codegen.machine import Machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    machine._known.cache_clear()
    yield tmp_path
    machine._known.cache_clear()


def small():
    return Machine("test", 2, {1: 1e9, 2: 2e9}, {1: 1e9}, 3e9, 1 << 20, {"float32": 1e9})


def test_measurement():
    m = machine.measure(seconds=0.5)
    assert set(m.read) == set(m.copy) and {1, torch.get_num_threads()} <= set(m.read)
    assert all(x > 0 for x in (*m.read.values(), *m.copy.values(), m.cached, m.region, m.launch))
    assert m.rate(torch.bfloat16) > 0
    assert m.rate(torch.float16) == m.rate(torch.float32)


def test_without_a_compiler_torch_measures(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine.measure(seconds=0.1).bandwidth > 0


def test_round_trip():
    m = small()
    assert Machine.from_dict(json.loads(json.dumps(m.to_dict()))) == m


def test_it_is_measured_once_and_kept(own_cache, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(own_cache))
    calls = []
    monkeypatch.setattr(machine, "measure", lambda: calls.append(1) or small())
    assert machine.describe() == small() == machine.describe()
    machine._known.cache_clear()
    assert machine.describe() == small()
    assert len(calls) == 1
    (kept,) = (own_cache / "machine").iterdir()
    kept.write_text("{broken")
    machine._known.cache_clear()
    assert machine.describe() == small() and len(calls) == 2
    machine.describe(fresh=True)
    assert len(calls) == 3


def test_what_was_measured_under_load_is_measured_again(own_cache, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(own_cache))
    calls = []
    busy = dataclasses.replace(small(), busy=True)
    monkeypatch.setattr(machine, "measure", lambda: calls.append(1) or busy)
    for _ in range(2):
        machine.describe()
        machine._known.cache_clear()
    assert len(calls) == 1
    (kept,) = (own_cache / "machine").iterdir()
    old = time.time() - 2 * machine.BUSY_SECONDS
    os.utime(kept, (old, old))
    machine.describe()
    assert len(calls) == 2


def test_a_calibration_is_kept_and_outlives_measurements(own_cache, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(own_cache))
    monkeypatch.setattr(machine, "measure", small)
    assert machine.describe().factors == {} and machine.describe().factor("score") == 1
    machine.keep_factors({"memory": 1.5, "compute": 2.0, "score": 0.5})
    assert machine.describe().factor("memory") == 1.5
    machine._known.cache_clear()
    assert machine.describe(fresh=True).factor("score") == 0.5
    (kept,) = (own_cache / "machine").iterdir()
    busy = dataclasses.replace(Machine.from_dict(json.loads(kept.read_text())), busy=True)
    kept.write_text(json.dumps(busy.to_dict()))
    old = time.time() - 2 * machine.BUSY_SECONDS
    os.utime(kept, (old, old))
    machine._known.cache_clear()
    assert machine.describe().factor("compute") == 2 and not machine.describe().busy
    monkeypatch.setenv("DSPARK_MACHINE", '{"factors": {"memory": 3}}')
    assert machine.describe().factors == {"memory": 3}


@pytest.mark.parametrize("factors", [{"memory": 0.0}, {"speed": 2.0}, {"score": -1.0}])
def test_factors_that_are_none(factors):
    with pytest.raises(ValueError, match=r"factors=.*give positive numbers for any of"):
        Machine.from_dict({**small().to_dict(), "factors": factors})


def test_a_calibration_is_fitted_to_kernels_of_every_kind(monkeypatch):
    from dspark_compile.codegen import calibrate
    from dspark_compile.codegen.cost import cost

    asked = []

    def made_up(case, given, rounds):
        args, kwargs = case.warm()
        keys = {} if case.keys is None else {"keys": 64}
        parts = calibrate.parts(cost(case.op, *args, **kwargs, **keys), given)
        asked.append(case.op)
        taken = calibrate.predicted(parts, (1.4, 2.0, 3.0))
        return {**parts, "measured_s": taken, "op": case.op, "shape": case.shape}

    monkeypatch.setattr(calibrate, "measure", made_up)
    rates = {"float32": 1e9, "bfloat16": 2e10}
    machine = dataclasses.replace(small(), read={2: 3e8}, rates=rates, launch=0.0, region=0.0)
    steps = []
    factors = calibrate.calibrate(machine, progress=lambda done, of: steps.append((done, of)))
    assert factors == pytest.approx({"memory": 1.4, "compute": 2.0, "score": 3.0}, rel=0.1)
    assert {"linear", "linear_int8", "linear_int4", "gated_mlp", "attention"} <= set(asked)
    assert steps == [(i, len(asked)) for i in range(len(asked))]
    # A measurement of something else does not become a factor.
    monkeypatch.setattr(
        calibrate, "measure", lambda *a: {**made_up(*a), "measured_s": 1e3, "launch_s": 0.0}
    )
    assert max(calibrate.calibrate(machine).values()) == calibrate.LIMIT
    monkeypatch.setattr(calibrate, "measure", lambda *a: None)
    with pytest.raises(RuntimeError, match="nothing to calibrate with"):
        calibrate.calibrate(machine)


def test_a_case_is_measured_on_this_machine():
    from dspark_compile.codegen import calibrate

    result = calibrate.measure(
        calibrate.linear(256, 512, 2, torch.float32), machine.describe(), 2, cold=2**20
    )
    assert result["measured_s"] >= result["min_s"] > 0 and result["read_bandwidth"] > 0
    assert result["memory_s"] > 0 and result["compute_s"] > 0 and result["score_s"] == 0


def test_overrides(own_cache, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(own_cache))
    monkeypatch.setattr(machine, "measure", small)
    monkeypatch.setenv("DSPARK_MACHINE", '{"cached": 7e9, "rates": {"float32": 5.0}}')
    m = machine.describe()
    assert (m.cached, m.rate("float32"), m.bandwidth) == (7e9, 5.0, 2e9)
    path = own_cache / "machine.json"
    path.write_text(json.dumps({**small().to_dict(), "name": "mine"}))
    monkeypatch.setattr(machine, "measure", lambda: pytest.fail("measured"))
    monkeypatch.setenv("DSPARK_MACHINE", str(path))
    assert machine.describe().name == "mine"


@pytest.mark.parametrize(
    "text, message",
    [
        ("no-such-file", "neither a JSON file nor JSON"),
        ("{broken", "neither a JSON file nor JSON"),
        ('{"speed": 1}', "unknown fields"),
        ('{"cached": 0}', "must be positive"),
        ('{"rates": {}}', "must have float32"),
    ],
)
def test_bad_overrides(monkeypatch, own_cache, text, message):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(own_cache))
    monkeypatch.setattr(machine, "measure", small)
    monkeypatch.setenv("DSPARK_MACHINE", text)
    with pytest.raises(ValueError, match=message):
        machine.describe()
