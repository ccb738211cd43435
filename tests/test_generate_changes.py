"""What a caller changes about a model between two calls of generate counts from the next one on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.runtime.model_state import model_state
from tests.test_insert_cache import NanoGPT, greedy, prompt, sharpen

transformers = pytest.importorskip("transformers")

NATIVE = {"kernels": "cpp"}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def same(model, **given):
    """That generate gives what transformers gives; the text."""
    how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    got = dspark_compile.generate(model, prompt(1, 7), **how, **given)
    assert torch.equal(got, model.generate(prompt(1, 7), **how))
    return got


def scale(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def activation(model):
    model.model.layers[0].mlp.act_fn = nn.Tanh()


def steering(model):
    by = torch.linspace(-3, 3, 32)
    model.model.layers[0].register_forward_hook(lambda module, args, out: out + by)


def patched(model):
    forward = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **given: forward(*args, **given).flip(-1)


def table(model):
    model.model.layers[0].mlp.down_proj.by = torch.linspace(0, 4, 32)


class Scaled(nn.Module):
    """A linear layer times a tensor that is neither parameter nor buffer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.by = inner, torch.ones(32)

    def forward(self, x):
        return self.inner(x) * self.by


DRAFTS = [None, pytest.param("ngram", marks=pytest.mark.slow)]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("change", [scale, activation, steering, patched, table])
def test_a_change_counts(llama, change, draft):
    model = copy.deepcopy(llama)
    mlp = model.model.layers[0].mlp
    mlp.down_proj = Scaled(mlp.down_proj)
    given = {"draft": draft, "options": NATIVE}
    before = same(model, **given)
    assert last_generation().path == "native", last_generation().notes
    change(model)
    assert not torch.equal(same(model, **given), before)
    assert last_generation().path == "native", last_generation().notes


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_hook_that_records_sees_every_step(llama, draft):
    same(llama, draft=draft)
    seen = []
    handle = llama.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(len(out)))
    try:
        same(llama, draft=draft)
        assert last_generation().path == "eager"
        assert any("its hooks change" in note for note in last_generation().notes)
        assert len(seen) >= 2 * 16
    finally:
        handle.remove()
    same(llama, draft=draft)
    assert last_generation().path in ("native", "compiled")


def test_the_same_model_is_compiled_once(llama):
    """What a model's own code writes to its modules is no change, nor how tokens are chosen."""
    same(llama)
    llama.generation_config = copy.deepcopy(llama.generation_config)
    same(llama)
    assert "compile" not in last_generation().seconds


@torch.no_grad()
def test_a_mask_in_a_buffer():
    model = sharpen(NanoGPT())
    for window in (None, 4):
        if window is not None:
            model.mask.data.copy_(model.mask.triu(1 - window))
        got = dspark_compile.generate(model, prompt(), max_new_tokens=20, options=NATIVE)
        assert last_generation().path == "native", last_generation().notes
        assert torch.equal(got, greedy(model, prompt(), 20))


def test_model_state():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    model.note, model.seen = float("nan"), torch.zeros(2)
    first = model_state(model)
    assert model_state(model) == first
    model.seen = torch.ones(2)  # no program reads it
    assert model_state(model) == first
    assert model_state(model, {id(model.seen)}) != first
    model.sizes = {"heads": 2}
    first = model_state(model)
    model.sizes["heads"] = 4
    assert model_state(model) != first
    first = model_state(model)
    model[1].p = 0.2
    assert model_state(model) != first


@torch.no_grad()
@pytest.mark.parametrize("draft", [None, pytest.param("ngram", marks=pytest.mark.slow)])
def test_another_default_device(llama, draft):
    """What a caller makes the default for its own tensors is not where a step's memory lies."""
    ids, model = prompt(1, 7), sharpen(NanoGPT())
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want, whole = llama.generate(ids, **how), greedy(model, ids, 8)
    with torch.device("meta"):
        assert torch.equal(dspark_compile.generate(llama, ids, draft=draft, **how), want)
        assert torch.equal(dspark_compile.generate(model, ids, max_new_tokens=8), whole)
        mlp = torch.compile(llama.model.layers[0].mlp, backend="dspark")
        assert mlp(torch.ones(1, 4, 32, device="cpu")).device.type == "cpu"
