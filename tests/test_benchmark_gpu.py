"""The GPU benchmark still runs: tiny sizes, on the CPU, Triton interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DSPARK_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_smoke(tmp_path: Path) -> None:
    """Every section gives rows; the machine's comes from a process of its own."""
    file = tmp_path / "gpu.json"
    result = run(tmp_path, "--smoke", "--minutes", "60", "--write-to", str(file))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    document = json.loads(file.read_text())
    assert document["conditions"]["torch"]
    assert document["copy_bandwidth"] > 0
    sections = {s["section"]: s for s in document["sections"]}
    assert len(sections) == 9
    for section in sections.values():
        assert section["rows"], section
        assert "skipped" not in section, section
        for row in section["rows"]:
            assert "failed" not in row, row
            for name, difference in row.get("difference", {}).items():
                assert difference < (3e-2 if "int8" in name else 1e-4), row
            assert row.get("difference_to_eager", 0.0) < 1e-4, row
    product = sections["products"]["rows"][0]
    assert set(product["times"]) == {"dspark", "dspark no pdl", "cublas"}
    assert product["speedup"]["dspark"] > 0
    assert product["of_roofline"]["dspark"] > 0
    loop, theirs = sections["generate llama-1b 2"]["rows"]
    assert loop["token_s"] > 0 and theirs["equal"] == 1.0
    last = sections["decode llama-1b 2"]["rows"][-1]
    assert last["in_turns"]
    assert set(last["step_s"]) == {"eager", "dspark", "inductor"}
    own = [r for r in sections["decode llama-1b 2"]["rows"] if r.get("contender") == "dspark"]
    assert own[0]["sites"]["mlp: triton"] == 1


def test_without_time_every_section_says_so(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    started = time.monotonic()
    result = run(tmp_path, "--smoke", "--minutes", "0", "--write-to", str(file))
    assert result.returncode == 1
    assert time.monotonic() - started < 60
    for section in json.loads(file.read_text())["sections"]:
        assert section["skipped"] == "no time left for this section"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run(tmp_path)
    assert result.returncode == 2
    assert "no GPU" in result.stdout
