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


def generated(folder, ids, count):
    """Greedy continuation of token ids by onnxruntime-genai."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    length = len(ids) + count
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_families_that_the_builder_refuses(tmp_path, family):
    from tests.zoo import families

    model = families.build(family)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    report = export_onnx(model, tmp_path / "folder", target="genai")
    assert report.error <= 1e-5 and report.nodes["com.microsoft::MoE"]
    ids = families.tokens(family, 6, batch=1)
    want = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)[0].tolist()
    assert generated(tmp_path / "folder", ids[0].tolist(), 40) == want


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
    want = model.generate(
        torch.tensor([ids]), max_new_tokens=256, min_new_tokens=256, do_sample=False
    )[0].tolist()
    assert generated(folder, ids, 256) == want
