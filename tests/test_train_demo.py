"""The scripts that train the shipped pair: what makes a model larger, or a draft follow it."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors.torch")

MODELS = pathlib.Path(__file__).resolve().parent.parent / "models"


def script(name):
    spec = importlib.util.spec_from_file_location(name, MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_a_wider_model_computes_the_same_and_can_learn():
    train = script("train_demo")
    torch.manual_seed(0)
    small = train.build_model(2, 64)
    wide = train.widen(small, 3, 160, seed=1)
    ids = torch.randint(0, train.VOCAB, (2, 9))
    assert torch.allclose(small(ids).logits, wide(ids).logits, atol=1e-6)
    assert wide.config.num_hidden_layers == 3 and wide.config.intermediate_size == 160
    # Everything new gets a gradient at the first step or behind it: nothing is dead.
    with torch.enable_grad():
        wide(ids).logits.square().mean().backward()
    for layer in wide.model.layers:
        assert layer.mlp.down_proj.weight.grad[:, 64:].abs().max() > 0
        assert layer.self_attn.o_proj.weight.grad.abs().max() > 0
    mlp = wide.model.layers[0].mlp
    pairs = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight], 1)
    assert len(torch.unique(pairs, dim=0)) > 150  # not copies of the old neurons
    with pytest.raises(ValueError, match="cannot widen 2 layers of 64 neurons to 2 of 32"):
        train.widen(small, 2, 32, seed=1)


def test_a_draft_follows_a_larger_model(tmp_path):
    from dspark_compile.models import DEMO_DRAFT_PATH, DEMO_PATH
    from dspark_compile.models.draft import DraftModel

    train = script("train_demo_draft")
    path = train.followed(DEMO_DRAFT_PATH, tmp_path)
    old, new = DraftModel.from_pretrained(str(DEMO_DRAFT_PATH)), DraftModel.from_pretrained(path)
    target = json.loads((DEMO_PATH / "config.json").read_text())
    assert new.config.num_target_layers == target["num_hidden_layers"]
    assert tuple(new.config.target_layer_ids) == train.OPTIONS["taps"] and new.d2t is None
    w2, narrow = (d.markov_head.markov_w2.weight for d in (new, old))
    kept = old.d2t
    assert torch.equal(w2[kept], narrow.to(w2.dtype)) and len(w2) == new.config.vocab_size
    rest = torch.ones(len(w2), dtype=torch.bool)
    rest[kept] = False
    assert not w2[rest].any()
