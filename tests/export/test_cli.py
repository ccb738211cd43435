"""``dspark export``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspark_compile.cli import app

FOLDER = Path(__file__).parents[2] / "models" / "demo"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m.onnx", "--target", "gpa"], ["target='gpa'", "'gqa'"]),
        (["m.onnx", "--opset", "17"], ["opset=17", "23 or 24"]),
        (["m", "--target", "portable"], ["does not name a .onnx file"]),
        (["m.onnx", "--kv-cache", "int4"], ["kv_cache='int4'", "target='gqa'"]),
        (["m.onnx", "--calibration", "nowhere.txt"], ["nowhere.txt", "no file"]),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dspark_compile.cli._load", lambda path: pytest.fail("loaded"))
    result = CliRunner().invoke(app, ["export", str(FOLDER), *arguments], env={"COLUMNS": "400"})
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


@pytest.mark.slow
def test_the_demo(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path, report = tmp_path / "m.onnx", tmp_path / "report.json"
    result = CliRunner().invoke(
        app, ["export", str(FOLDER), str(path), "--target", "gqa", "--json", str(report)]
    )
    assert result.exit_code == 0, result.output
    assert path.is_file() and '"GroupQueryAttention"' in report.read_text().replace(
        "com.microsoft::", ""
    )
