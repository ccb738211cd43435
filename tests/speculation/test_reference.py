"""The eager reference loop: greedy output is plain greedy's, whatever drafts."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftConfig
from dspark_compile.runtime.speculation.proposers import proposer_for
from dspark_compile.runtime.speculation.reference import speculate
from dspark_compile.runtime.speculation.schedule import fixed
from dspark_compile.runtime.speculation.sps import SPSCurve
from dspark_compile.runtime.speculation.taps import Taps, decoder_layers
from dspark_compile.runtime.token_choice import TokenChoice

transformers = pytest.importorskip("transformers")

V = 37


def target(seed=0, **changes):
    torch.manual_seed(seed)
    values = {
        "vocab_size": V, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "initializer_range": 0.3, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None,
    } | changes  # fmt: skip
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**values)).eval()


def draft_for(model, seed=1, **changes):
    torch.manual_seed(seed)
    values = {
        "vocab_size": V, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mask_token_id": 36,
        "target_layer_ids": (-1, 1, 2), "num_target_layers": 4, "block_size": 4, "markov_rank": 5,
        "enable_confidence_head": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    } | changes  # fmt: skip
    draft = DraftModel(DraftConfig(**values)).eval()
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.3)
    return draft.bind(model)


def plain(model, ids, new):
    """Plain greedy decoding, from scratch at every token."""
    ids = ids[None]
    for _ in range(new):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0]


KINDS = ["draft", "scheduled", "dflash", "ngram", "model", "itself", "none"]
NEW = 12
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [7, 7], [1, 2, 3, 1, 2, 3, 1, 2]]


def batch(prompts=PROMPTS):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_plain_greedy(kind):
    model = target()
    options = {}
    draft = {
        "draft": lambda: draft_for(model),
        "scheduled": lambda: draft_for(model),
        "dflash": lambda: draft_for(
            model, markov_rank=0, sample_from_anchor=False, confidence_head_with_markov=False
        ),
        "ngram": lambda: "ngram",
        "model": lambda: target(seed=5, num_hidden_layers=1),
        "itself": lambda: model,
        "none": lambda: None,
    }[kind]()
    if kind == "scheduled":
        options["schedule"] = SPSCurve([1 + 0.1 * b for b in range(20)])
    ids, mask = batch()
    out = speculate(model, draft, ids, mask, max_new_tokens=NEW, **options)
    for row, prompt in enumerate(PROMPTS):
        want = plain(model, torch.tensor(prompt), NEW)
        assert out.generated[row].tolist() == want[len(prompt) :].tolist()
        assert out.sequences[row, ids.shape[1] :].tolist() == want[len(prompt) :].tolist()
    stats = out.stats
    assert stats.committed == 3 * (NEW - 1)  # the first token comes from the prefill
    assert stats.tau >= 1 and stats.rounds <= stats.committed
    if kind == "itself":
        assert stats.tau > 3 and min(stats.conditional) == 1.0
    if kind == "none":
        assert stats.tau == 1.0 and stats.drafted == 0
    if kind == "scheduled":
        assert sum(stats.verify_lengths[:3]) > 0  # it did shorten some


def test_end_tokens_inside_an_accepted_prefix():
    model = target()
    ids, mask = batch()
    free = speculate(model, None, ids, mask, max_new_tokens=16)
    end = int(free.generated[0][5])
    for draft in (model, draft_for(model), "ngram", None):
        out = speculate(model, draft, ids, mask, max_new_tokens=16, eos_token_id=[end, 99])
        for row, tokens in enumerate(free.generated):
            want = tokens.tolist()
            want = want[: want.index(end) + 1] if end in want else want
            assert out.generated[row].tolist() == want
    padded = out.sequences[0, ids.shape[1] + len(out.generated[0]) :]
    assert (padded == 0).all()


@pytest.mark.parametrize("new", [1, 2, 5])
def test_never_more_tokens_than_asked(new):
    model = target()
    ids, mask = batch()
    out = speculate(model, model, ids, mask, max_new_tokens=new, num_drafted=8)
    assert [len(g) for g in out.generated] == [new] * 3


def test_sampling_reproduces_and_differs_by_seed():
    model = target()
    draft, choice = draft_for(model), TokenChoice(sample=True, temperature=0.9, top_p=0.95)
    ids, mask = batch()

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return speculate(
            model, draft, ids, mask, max_new_tokens=8, choice=choice, generator=generator,
            schedule=lambda survival, live: fixed(2, survival, live),
        ).sequences.tolist()  # fmt: skip

    assert run(1) == run(1) != run(2)


def test_penalties_and_processors_hold_for_greedy():
    model = target()
    ids, mask = batch()
    choice = TokenChoice(penalty=1.7)

    def no_three(row, logits):
        return logits.index_fill(-1, torch.tensor([3]), -torch.inf)

    want = speculate(model, None, ids, mask, max_new_tokens=8, choice=choice, processor=no_three)
    free = speculate(model, None, ids, mask, max_new_tokens=8)
    assert want.sequences.tolist() != free.sequences.tolist()
    for draft in (model, draft_for(model)):
        got = speculate(
            model, draft, ids, mask, max_new_tokens=8, choice=choice, processor=no_three
        )
        assert got.sequences.tolist() == want.sequences.tolist()


def test_sliding_window_targets_can_be_cropped():
    model = target(
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6,
        use_sliding_window=True,
    )  # fmt: skip
    ids, mask = batch()
    out = speculate(model, draft_for(model), ids, mask, max_new_tokens=10)
    for row, prompt in enumerate(PROMPTS):
        want = plain(model, torch.tensor(prompt), 10)[len(prompt) :]
        assert out.generated[row].tolist() == want.tolist()


def test_taps_are_hidden_states():
    model = target()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        before = [len(layer._forward_hooks) for layer in decoder_layers(model)]
        with Taps(model, (-1, 0, 2)) as taps:
            model(ids)
            got = taps.take()
    torch.testing.assert_close(got, torch.cat((states[0], states[1], states[3]), dim=-1))
    with pytest.raises(RuntimeError, match=r"\[-1, 0, 2\]"):
        _ = taps.states
    after = [len(layer._forward_hooks) for layer in decoder_layers(model)]
    assert after == before  # transformers has hooks of its own there
    with pytest.raises(ValueError, match="layers 0 to 3"):
        Taps(model, (4,))
    with pytest.raises(ValueError, match="no list"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_bad_arguments():
    model = target()
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="draft='eagle'"):
        speculate(model, "eagle", ids)
    with pytest.raises(ValueError, match="Linear"):
        proposer_for(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        speculate(model, None, ids, max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        speculate(model, None, ids, torch.zeros_like(ids))
    with pytest.raises(ValueError, match="input_ids"):
        speculate(model, None, ids[0])
