"""Speculation's programs kept for the next process: the target's verification and the draft's."""

from __future__ import annotations

import pytest
import torch

import dspark_compile
from dspark_compile.runtime import captured, kept_rounds
from dspark_compile.runtime.generate import free
from tests.speculation.test_reference import draft_for, target

ON = {"kernels": "cpp", "reuse": "on"}
IDS = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 3, 1]])


pytestmark = pytest.mark.usefixtures("steps")


@pytest.fixture
def traced(monkeypatch):
    """How often something was traced."""
    seen, trace = [], captured.trace_whole
    monkeypatch.setattr(captured, "trace_whole", lambda *a, **k: seen.append(1) or trace(*a, **k))
    return seen


def generate(model, draft, new=30, ids=IDS, **given):
    """As a new process would; the text is the model's."""
    free(model)
    torch._dynamo.reset()
    greedy = {"max_new_tokens": new, "do_sample": False}
    got, stats = dspark_compile.generate(
        model, ids, draft=draft, return_stats=True, options=ON, schedule="fixed", **greedy, **given
    )
    assert torch.equal(got, model.generate(ids, **greedy))
    assert stats.path == "native"
    return stats


def make(kind, model, seed=1):
    if kind == "model":
        return target(seed=seed, num_hidden_layers=1)
    draft = draft_for(model, seed=seed, markov_head_type="gated")
    if kind == "bfloat16":
        draft = draft.bfloat16().bind(model)
    return ("ngram", draft) if kind == "ngram+draft" else draft


@pytest.mark.parametrize(
    "kind",
    ["draft", "bfloat16"]
    + [pytest.param(k, marks=pytest.mark.slow) for k in ("ngram+draft", "model")],
)
def test_programs_of_an_earlier_process_are_found(kind, traced):
    """Nothing is traced again, also for other weights of the same shapes, and a cache that grew."""
    model = target()
    first = generate(model, make(kind, model))
    assert traced
    traced.clear()
    again = generate(model, make(kind, model))
    assert not traced
    for name in ("rounds", "accepted", "verify_lengths"):
        assert getattr(again.speculation, name) == getattr(first.speculation, name)
    other = target(seed=7)
    generate(other, make(kind, other, seed=5), new=260)
    assert not traced


@pytest.mark.slow
def test_two_rows_are_other_programs(traced):
    model = target()
    draft = draft_for(model)
    generate(model, draft)
    traced.clear()
    generate(model, draft, ids=IDS.expand(2, -1))
    assert traced


def test_programs_of_other_models_are_seen_by_what_they_compute(monkeypatch, traced):
    """Were the key to miss a difference, the comparison with an eager run finds it: of the target's
    verification, its taps, and both programs of the draft."""
    monkeypatch.setattr(kept_rounds, "model_key", lambda model: type(model).__name__)
    model = target()
    draft = draft_for(model)
    generate(model, draft)
    traced.clear()
    generate(model, draft)
    assert not traced
    draft.layers[0].self_attn.k_norm.eps = 3.0  # both programs of the draft
    generate(model, draft)
    assert len(traced) == 2
    traced.clear()
    for layer in model.model.layers[:1]:
        layer.self_attn.scaling *= 3
    generate(model, draft)
    assert len(traced) == 2  # verifying 1 and all tokens


@pytest.mark.slow
def test_blocks_of_other_sizes_do_not_take_each_others_place(traced):
    """The same draft with look-ups beside it has blocks of more tokens."""
    model = target()
    draft = draft_for(model)
    for both in (draft, ("ngram", draft)):
        generate(model, both)
    traced.clear()
    for both in (draft, ("ngram", draft), draft):
        generate(model, both)
    assert not traced


def test_taps_belong_to_the_key(traced):
    model = target()
    generate(model, draft_for(model))
    traced.clear()
    generate(model, draft_for(model, target_layer_ids=(0, 1, 2)))
    assert len(traced) >= 2
