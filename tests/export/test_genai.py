"""The shipped model in a folder for onnxruntime-genai: the same greedy tokens as in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxscript")
og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

from dspark_compile.export import export_onnx  # noqa: E402

FOLDER = Path(__file__).parents[2] / "models" / "demo"


@pytest.mark.slow
def test_the_demo_generates_the_same_256_tokens(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    folder = tmp_path / "demo"
    report = export_onnx(model, folder, target="genai")
    assert report.error <= 1e-5
    names = {p.name for p in folder.iterdir()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= names
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True

    ids = tokenizer("def main():\n")["input_ids"]
    params = og.GeneratorParams(og.Model(str(folder)))
    length = len(ids) + 256
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(og.Model(str(folder)), params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    want = model.generate(
        torch.tensor([ids]), max_new_tokens=256, min_new_tokens=256, do_sample=False
    )[0].tolist()
    assert list(generator.get_sequence(0)) == want
