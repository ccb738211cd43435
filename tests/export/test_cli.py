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
        (["m.onnx", "--taps", "1,b"], ["'1,b'", "1,9,17"]),
        (["m", "--target", "genai", "--draft", "d"], ["onnxruntime-genai", "gqa or portable"]),
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


def test_a_draft_that_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dspark_compile.cli._load", lambda path: (object(), None))
    arguments = ["export", str(FOLDER), "m.onnx", "--draft", "nowhere"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "'nowhere' has no config.json" in result.output


@pytest.mark.slow
def test_the_demo_pair(tmp_path):
    """Target with the taps of its draft, and the draft, from one command."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "m.onnx"
    draft = FOLDER.parent / "demo_draft"
    result = CliRunner().invoke(
        app, ["export", str(FOLDER), str(path), "--target", "gqa", "--draft", str(draft)]
    )
    assert result.exit_code == 0, result.output
    target = onnxruntime.InferenceSession(str(path))
    drafting = onnxruntime.InferenceSession(str(tmp_path / "m.draft.onnx"))
    taps = [o for o in target.get_outputs() if o.name.startswith("hidden_states")]
    width = next(i.shape[2] for i in drafting.get_inputs() if i.name == "taps")
    assert sum(t.shape[2] for t in taps) == width
