"""Every kernel compiles ahead of time for every target, without spills.

Compilation and interpretation cannot share a process, so this one runs the module by its own
command. By default a few kernels are compiled for one NVIDIA and one AMD target.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def _compile(tmp_path: Path, *arguments: str, timeout: float) -> list[dict]:
    environment = {**os.environ, "DSPARK_CACHE_DIR": str(tmp_path / "sources")}
    environment.pop("TRITON_INTERPRET", None)
    table = tmp_path / "aot.json"
    command = [sys.executable, "-m", "dspark_compile.kernels.triton.aot", "--json", str(table)]
    result = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return json.loads(table.read_text())["rows"]


@pytest.mark.parametrize("target", ["80", "gfx942"])
def test_a_few_kernels_of_each_kind(tmp_path: Path, target: str) -> None:
    rows = _compile(
        tmp_path, "--targets", target, "--only",
        "add_rms_norm 16x4096",
        "rope 1x128/128 half-split",
        "qk_norm_rope_append 1x128 int8",
        "attention M=1 G=4 D=128/128 int8 under bfloat16 causal",
        "combine M=1 G=4 D=128/128 int8 under bfloat16 causal",
        "linear M=1 bfloat16 3 outputs",
        "linear M=5 bfloat16 gated split",
        "linear sums M=5 bfloat16 gated split",
        "grouped linear jetmoe S=16 bfloat16",
        timeout=600,
    )  # fmt: skip
    assert len(rows) == 9
    for row in rows:
        assert row["spills"] == 0
        assert row["registers"] > 0
        assert row["binary_bytes"] > 0


@pytest.mark.parametrize("target", ["90", "100"])
def test_a_dependent_launch(tmp_path: Path, target: str) -> None:
    """Products for targets that may start them early, which compile nothing of it elsewhere."""
    (row,) = _compile(
        tmp_path, "--targets", target, "--only", "linear M=16 bfloat16 2048x2048", timeout=600
    )
    assert row["spills"] == 0


def test_finished_rows_are_kept(tmp_path: Path) -> None:
    """A second run compiles only what is new; a row whose kernel changed is compiled again."""
    first = _compile(tmp_path, "--targets", "80", "--only", "add_rms_norm 16x4096", timeout=600)
    table = tmp_path / "aot.json"
    document = json.loads(table.read_text())
    document["rows"][0]["seconds"] = 1234.0
    table.write_text(json.dumps(document))
    both = _compile(tmp_path, "--targets", "80", "--match", "rms_norm 16x4096", timeout=600)
    assert sorted(row["case"] for row in both) == ["add_rms_norm 16x4096", "rms_norm 16x4096"]
    assert max(row["seconds"] for row in both) == 1234.0
    document["rows"][0]["key"] = "another"
    table.write_text(json.dumps(document))
    again = _compile(tmp_path, "--targets", "80", "--only", "add_rms_norm 16x4096", timeout=600)
    assert again[0]["key"] == first[0]["key"]
    assert again[0]["seconds"] < 1234.0


@pytest.mark.exhaustive
def test_everything_on_every_target(tmp_path: Path) -> None:
    rows = _compile(tmp_path, timeout=7200)
    assert len({row["target"] for row in rows}) == 6
    assert len(rows) > 6 * 50
