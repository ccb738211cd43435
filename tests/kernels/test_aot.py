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
        timeout=600,
    )  # fmt: skip
    assert len(rows) == 5
    for row in rows:
        assert row["spills"] == 0
        assert row["registers"] > 0
        assert row["binary_bytes"] > 0


@pytest.mark.exhaustive
def test_everything_on_every_target(tmp_path: Path) -> None:
    rows = _compile(tmp_path, timeout=7200)
    assert len({row["target"] for row in rows}) == 6
    assert len(rows) > 6 * 50
