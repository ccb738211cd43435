"""What is refused before an export starts: the message names option, value and remedy."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.export import ExportError, ExportOptions, export_onnx
from dspark_compile.export.options import check_path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "portabel"}, ["target", "'portabel'", "did you mean 'portable'"]),
        ({"target": 3}, ["target=3", "'gqa'"]),
        ({"opset": 20}, ["opset=20", "choose 23 or 24"]),
        ({"opset": True}, ["opset=True", "choose 23 or 24"]),
        ({"kv_cache": "fp8"}, ["kv_cache='fp8'", "'int8'"]),
        ({"kv_cache": "int4"}, ["kv_cache='int4'", "target='gqa'"]),
        ({"dtype": "bfloat16"}, ["dtype='bfloat16'", "provider='cpu'", "float32"]),
        (
            {"dtype": "float32", "provider": "cuda", "target": "gqa"},
            ["dtype='float32'", "provider='cuda'", "float16"],
        ),
        ({"cache": "static", "opset": 23}, ["cache='static'", "opset=23", "cache='growing'"]),
        ({"cache": "static", "target": "gqa"}, ["cache='static'", "'auto'"]),
        (
            {"target": "gqa", "shapes": [(2, 3, 4)]},
            ["shapes", "(2, 3, 4)", "batch 1", "target='portable'"],
        ),
        ({"shapes": [(1, 2)]}, ["shapes", "(1, 2)", "cached tokens"]),
        ({"shapes": [(0, 1, 1)]}, ["(0, 1, 1)", "at least 1"]),
        ({"max_length": -1}, ["max_length=-1", "0 takes"]),
        ({"verify": "yes"}, ["verify='yes'", "True or False"]),
        ({"external_data": "big"}, ["external_data='big'", "None"]),
        ({"kvcache": "int8"}, ["'kvcache'", "did you mean 'kv_cache'"]),
    ],
)
def test_refused(options, words):
    with pytest.raises(ExportError) as caught:
        ExportOptions.parse(options)
    for word in words:
        assert word in str(caught.value)


def test_defaults_follow_the_target():
    assert (ExportOptions().opset, ExportOptions().cache) == (24, "static")
    assert (ExportOptions(opset=23).cache, ExportOptions(cache="growing").opset) == ("growing", 23)
    assert (ExportOptions(target="gqa").opset, ExportOptions(target="genai").contrib) == (23, True)
    # Chunks of a batch behind a past: what GroupQueryAttention cannot do, and portable can.
    assert any(b > 1 and s > 1 and p for b, s, p in ExportOptions().shapes)
    assert not any(b > 1 and s > 1 and p for b, s, p in ExportOptions(target="gqa").shapes)


def test_paths(tmp_path):
    portable, genai = ExportOptions(), ExportOptions(target="genai")
    with pytest.raises(ExportError, match=r"does not name a \.onnx file; give for instance"):
        check_path(tmp_path / "model", portable)
    with pytest.raises(ExportError, match=r"does not exist; make it"):
        check_path(tmp_path / "nowhere" / "model.onnx", portable)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="writes a folder"):
        check_path(tmp_path / "file", genai)
    (tmp_path / "old.onnx").write_text("")
    with pytest.raises(ExportError, match="overwrite=True"):
        check_path(tmp_path / "old.onnx", ExportOptions(overwrite=False))
    with pytest.raises(ExportError, match="is not a path"):
        check_path(3, portable)
    assert check_path(tmp_path / "model.onnx", portable).name == "model.onnx"


def test_models_that_cannot_be_exported(tmp_path):
    linear = torch.nn.Linear(3, 3)
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportError, match=r"args=None with a Linear.*give example inputs"):
        export_onnx(linear, path)
    with pytest.raises(ExportError, match=r"args\[0\] is a int"):
        export_onnx(linear, path, (3,))
    with pytest.raises(ExportError, match=r"dtype='bfloat16'.*float32"):
        export_onnx(linear.bfloat16(), path, (torch.ones(1, 3),))
    with pytest.raises(ExportError, match=r"genai.*language models only"):
        export_onnx(torch.nn.Linear(3, 3), tmp_path / "d", (torch.ones(1, 3),), target="genai")
    with pytest.raises(ExportError, match="dynamic_shapes describes 2 inputs"):
        export_onnx(torch.nn.Linear(3, 3), path, (torch.ones(1, 3),), dynamic_shapes=[{}, {}])
    assert list(tmp_path.iterdir()) == []
