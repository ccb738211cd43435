"""The shipped draft: it loads, is small, fits its target, and does not change what is generated."""

from __future__ import annotations

import json

import pytest
import torch

from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
from dspark_compile.models.draft import DraftModel
from dspark_compile.runtime.speculation.calibration import Calibration
from dspark_compile.runtime.speculation.reference import speculate

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def pair():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_PATH)
        target = transformers.AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32)
    target.eval()
    draft = DraftModel.from_pretrained(
        DEMO_DRAFT_PATH, target=target, tokenizer=tokenizer, dtype="float32"
    )
    return target, draft, tokenizer


def test_it_is_small_and_complete(pair):
    _, draft, _ = pair
    files = [f for f in DEMO_DRAFT_PATH.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12_000_000
    assert {"README.md", "config.json", "model.safetensors", "calibration.json"} <= {
        f.name for f in files
    }
    config = draft.config
    assert config.markov_rank and config.enable_confidence_head
    assert draft.embed_tokens is None and draft.lm_head is None  # the target's
    calibration = Calibration.from_dict(draft.calibration, config.num_drafted)
    assert (calibration.temperatures > 0).all()


def test_it_drafts_what_the_target_writes(pair):
    target, draft, tokenizer = pair
    prompts = json.loads((DEMO_PATH / "prompts.json").read_text(encoding="utf-8"))
    ids = torch.tensor([tokenizer(prompts[1]["prompt"]).input_ids])
    plain = speculate(target, None, ids, max_new_tokens=40)
    drafted = speculate(target, draft, ids, max_new_tokens=40)
    assert drafted.sequences.tolist() == plain.sequences.tolist()
    assert drafted.stats.tau > 1.1
