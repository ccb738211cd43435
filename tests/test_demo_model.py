"""The model in models/demo: it loads offline, is small, and knows some Python."""

from __future__ import annotations

import ast
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
from dspark_compile.models.checkpoint_file import ALIGNMENT, align

transformers = pytest.importorskip("transformers")

EOT = "<|endoftext|>"


@pytest.fixture(autouse=True, scope="module")
def _offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO_PATH)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_PATH).eval()


@pytest.fixture(scope="module")
def heldout() -> str:
    return (DEMO_PATH / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    return json.loads((DEMO_PATH / "prompts.json").read_text(encoding="utf-8"))


def test_sizes(model, tokenizer):
    assert sum(p.numel() for p in model.parameters()) <= 16_000_000
    assert sum(f.stat().st_size for f in DEMO_PATH.rglob("*") if f.is_file()) < 32_000_000
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "qwen3"
    assert model.config.max_position_embeddings == 2048
    assert len(tokenizer) == model.config.vocab_size == 4096


def test_numbers_begin_at_a_cache_lines_start(tmp_path):
    for folder in (DEMO_PATH, DEMO_DRAFT_PATH):
        data = (folder / "model.safetensors").read_bytes()
        assert (8 + int.from_bytes(data[:8], "little")) % ALIGNMENT == 0
    odd = tmp_path / "odd.safetensors"
    tensors = {"weight": torch.randn(3, 5), "a name": torch.arange(7)}
    save_file(tensors, odd, metadata={"of": "x"})
    before = odd.stat().st_size
    align(odd)
    align(odd)
    assert before <= odd.stat().st_size < before + ALIGNMENT
    found = load_file(odd)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
    odd.write_bytes(b"not one")
    with pytest.raises(ValueError, match=r"odd\.safetensors is no safetensors file"):
        align(odd)


def test_special_tokens(model, tokenizer):
    end = tokenizer.convert_tokens_to_ids(EOT)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == end
    assert model.config.eos_token_id == model.generation_config.eos_token_id == end
    assert tokenizer(f"pass\n{EOT}").input_ids[-1] == end


@pytest.mark.parametrize(
    "source",
    [
        "def f(x):\n    if x:\n        return  x   # two spaces\n\n\nclass C:\n\tpass\r\n",
        "s = 'naïve — 日本 🙂'\n   \n\n        deep = 1_000_000\n",
        " leading and trailing  ",
        "\n\n    \n",
    ],
)
def test_tokenizer_round_trip(tokenizer, source):
    assert tokenizer.decode(tokenizer(source).input_ids) == source


def test_tokenizer_round_trips_real_source(tokenizer, heldout):
    assert len(heldout) > 150_000
    for text in heldout.split(EOT):
        ast.parse(text)
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        assert tokenizer.decode(ids) == text
        assert 2.5 < len(text) / len(ids) < 5


def test_indentation_is_one_token(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer("):\n        return x").input_ids] == [
        "):", "\n        ", "return", " x",
    ]  # fmt: skip


def test_prompts(tokenizer, prompts):
    assert len(prompts) == 24
    for item in prompts:
        assert 40 <= len(tokenizer(item["prompt"]).input_ids) == item["tokens"] <= 200
        assert item["reference"].startswith("\n")


@torch.no_grad()
def test_heldout_perplexity(model, tokenizer, heldout):
    measured = json.loads((DEMO_PATH / "training.json").read_text())["first_4096"]["perplexity"]
    ids = torch.tensor(tokenizer(heldout[:40_000], verbose=False).input_ids[: 4 * 1024 + 1])
    windows = torch.stack([ids[i : i + 1025] for i in range(0, 4096, 1024)])
    logits = model(input_ids=windows[:, :-1]).logits.float().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert math.exp(loss) < 1.1 * measured


@torch.no_grad()
def test_cached_decoding_agrees_with_the_whole_sequence(model, tokenizer, prompts):
    ids = torch.tensor([tokenizer(prompts[0]["prompt"]).input_ids])
    new = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert new.shape[1] > ids.shape[1]
    whole = model(input_ids=new[:, :-1]).logits.float()[0, ids.shape[1] - 1 :]
    chosen = whole.gather(1, new[0, ids.shape[1] :, None])[:, 0]
    assert (whole.max(-1).values - chosen).max() < 0.25  # bfloat16 may swap near-equal tokens
