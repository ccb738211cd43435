"""Measured tile sizes: the budget, the table on disk, what happens when either fails."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from dspark_compile.codegen.triton import tune

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class Config:
    n: int
    warps: int = 4


CANDIDATES = [Config(n) for n in (1, 2, 4, 8)]
SECONDS = {1: 4e-6, 2: 3e-6, 4: 1e-6, 8: 2e-6}


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    """A device that is not there, an empty table and an unspent budget."""
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tune, "_device_name", lambda index: "Some GPU (80 GB)")
    monkeypatch.setattr(tune, "_settled", {})
    monkeypatch.setattr(tune, "_spent", 0.0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tune, "device_seconds", lambda run, device: run())


def pick(default=CANDIDATES[0], candidates=CANDIDATES, device=GPU):
    return tune.pick(
        "linear", "m1", default, lambda: candidates, lambda c: lambda: SECONDS[c.n], device
    )


def test_off_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("DSPARK_TUNE_SECONDS", raising=False)
    assert pick() == Config(1)
    assert not (tmp_path / "tune").exists()


def test_the_fastest_is_kept_and_found_again(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "10")
    assert pick() == Config(4)
    path = tune.table_path("Some GPU (80 GB)")
    assert path.name.startswith("some-gpu-80-gb_triton-")
    (entry,) = json.loads(path.read_text())["choices"].values()
    assert entry["measured"] == 4
    assert entry["complete"]
    assert entry["default_seconds"] == SECONDS[1]
    # Another process, without a budget.
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "0")
    tune._settled.clear()
    assert pick() == Config(4)


def test_a_choice_does_not_change_within_a_process(monkeypatch):
    assert pick() == Config(1)
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "10")
    assert pick() == Config(1)


def test_other_choices_of_the_table_stay(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "10")
    path = tune.table_path("Some GPU (80 GB)")
    tune.keep(path, "Some GPU (80 GB)", "other", {"config": {"n": 1}})
    pick()
    assert set(tune.read_table(path)) == {"other", "linear m1"}
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 0, "choices": {}}', '{"version": 1}'])
def test_a_broken_table_is_ignored(text):
    path = tune.table_path("Some GPU (80 GB)")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert pick() == Config(1)


@pytest.mark.parametrize("config", [{"n": 16}, {"width": 1}, None, 3])
def test_an_entry_that_is_no_candidate_is_ignored(config):
    path = tune.table_path("Some GPU (80 GB)")
    tune.keep(path, "Some GPU (80 GB)", "linear m1", {"config": config})
    assert pick() == Config(1)


def test_what_fails_is_passed_over(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "10")
    assert pick(candidates=[Config(16), Config(2)]) == Config(2)  # no time for 16: KeyError
    tune._settled.clear()
    tune.table_path("Some GPU (80 GB)").unlink()
    assert pick(default=Config(32), candidates=[Config(16)]) == Config(32)


def test_a_spent_budget_ends_it(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "1")
    clock = iter([0.0, 0.4, 1.4, 1.4])
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    assert pick() == Config(2)  # two of four
    entry = tune.read_table(tune.table_path("Some GPU (80 GB)"))["linear m1"]
    assert entry["measured"] == 2
    assert not entry["complete"]
    assert tune.budget() < 0


def test_not_during_capture_and_not_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "10")
    assert pick(device=torch.device("cpu")) == Config(1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick() == Config(1)


def test_a_budget_that_is_no_number(monkeypatch):
    monkeypatch.setenv("DSPARK_TUNE_SECONDS", "soon")
    with pytest.raises(ValueError, match="soon"):
        pick()
