"""Drafts for modules that are none of Hugging Face's, over caches that the compiler inserted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.models.dense import Dense, DenseConfig
from dspark_compile.passes.incremental import NotIncremental
from dspark_compile.runtime.generate import free
from tests.test_generate import qwen
from tests.test_insert_cache import NanoGPT, greedy, prompt, sharpen

QUICK = {"inner": "eager"}
NATIVE = {"kernels": "cpp"}
COPIED = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14] * 5])


def speculation(drafts: bool = True):
    report = last_generation()
    assert (report.speculation is not None) == drafts, report.notes
    return report.speculation


def small(vocab: int = 97, layers: int = 2) -> nn.Module:
    config = DenseConfig(vocab=vocab, layers=layers, width=48, heads=6, kv_heads=2, hidden=80)
    return sharpen(Dense(config))


@pytest.mark.parametrize(
    "options", [pytest.param(QUICK, marks=pytest.mark.slow), NATIVE], ids=["traced", "native"]
)
@torch.no_grad()
def test_look_ups(options):
    model = small()
    for ids in (COPIED % 90, prompt()):
        for _ in range(2):
            got = dspark_compile.generate(
                model, ids, max_new_tokens=60, draft="ngram", schedule="fixed", options=options
            )
            assert torch.equal(got, greedy(model, ids, 60))
            assert last_generation().path == ("compiled" if options is QUICK else "native")
            assert speculation().rounds > 0
    plain = dspark_compile.generate(model, COPIED, max_new_tokens=60, options=options)
    assert torch.equal(plain, greedy(model, COPIED, 60))
    speculation(drafts=False)
    free(model)


class Follows(nn.Module):
    """The next token is the last one and one more: whoever looks it up is right."""

    def __init__(self, vocabulary: int = 17) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(vocabulary).roll(1, 1))

    def forward(self, ids):
        return self.table[ids]


@torch.no_grad()
def test_look_ups_stand_where_the_text_repeats_itself():
    model = Follows().eval()
    ids = (torch.arange(40) % 17)[None]
    got = dspark_compile.generate(
        model, ids, max_new_tokens=64, draft="ngram", schedule="fixed", options=QUICK
    )
    assert torch.equal(got[0], torch.arange(104) % 17)
    assert speculation().tau > 8


@pytest.mark.slow
@torch.no_grad()
def test_room_grows():
    model, ids = small(), COPIED % 90
    got = dspark_compile.generate(model, ids, max_new_tokens=1400, draft="ngram", options=NATIVE)
    plain = dspark_compile.generate(model, ids, max_new_tokens=1400, options=NATIVE)
    assert torch.equal(got, plain)


@pytest.mark.slow
@torch.no_grad()
def test_a_module_drafts_for_a_module():
    """The same weights: everything stands."""
    model, draft = small(), small()
    ids = prompt(length=9)
    for pair in (draft, ("ngram", draft)):
        got = dspark_compile.generate(
            model, ids, max_new_tokens=40, draft=pair, schedule="fixed", options=QUICK
        )
        assert torch.equal(got, greedy(model, ids, 40))
        assert speculation().tau > 3
    other = small(layers=1)
    got = dspark_compile.generate(model, ids, max_new_tokens=40, draft=other, options=NATIVE)
    assert torch.equal(got, greedy(model, ids, 40))
    assert last_generation().path == "native", last_generation().notes


@torch.no_grad()
def test_a_model_of_hugging_face_drafts_for_a_module():
    draft = qwen()
    model = small(vocab=draft.config.vocab_size)
    ids = prompt(length=9)
    got = dspark_compile.generate(
        model, ids, max_new_tokens=30, draft=draft, schedule="fixed", options=QUICK
    )
    assert torch.equal(got, greedy(model, ids, 30))
    assert speculation().rounds > 0


@torch.no_grad()
def test_sampled_text_depends_on_the_seed_alone():
    model, ids = small(), COPIED % 90
    texts = []
    for _ in range(2):
        torch.manual_seed(4)
        texts.append(
            dspark_compile.generate(
                model, ids, max_new_tokens=40, do_sample=True, temperature=0.9, top_k=20,
                draft="ngram", schedule="fixed", options=QUICK,
            )
        )  # fmt: skip
    assert torch.equal(*texts)
    assert speculation().rounds > 0


@torch.no_grad()
def test_weights_change_between_calls():
    model, ids = small(), COPIED % 90
    for _ in range(2):
        got = dspark_compile.generate(
            model, ids, max_new_tokens=20, draft="ngram", schedule="fixed", options=QUICK
        )
        assert torch.equal(got, greedy(model, ids, 20))
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))


class Last(nn.Module):
    """Logits of the last token alone, in one of the ways that this is written."""

    def __init__(self, pick) -> None:
        super().__init__()
        self.model, self.pick = small(), pick

    def forward(self, ids):
        return self.pick(self.model, ids)


PICKS = {
    "index": lambda m, ids: m(ids)[:, [-1]],
    "slice": lambda m, ids: m(ids)[:, -1:],
    "select": lambda m, ids: m(ids)[:, -1],
    "behind": lambda m, ids: torch.tanh(m(ids)[:, -1] / 30) * 30,
}


@pytest.mark.parametrize("pick", PICKS)
@torch.no_grad()
def test_logits_of_the_last_token_alone(pick):
    model, ids = Last(PICKS[pick]).eval(), COPIED % 90
    got = dspark_compile.generate(
        model, ids, max_new_tokens=24, draft="ngram", schedule="fixed", options=QUICK
    )
    assert torch.equal(got, greedy(model.model, ids, 24))
    assert speculation().rounds > 0


@torch.no_grad()
def test_what_is_written_for_one_row_goes_without():
    model = Last(lambda m, ids: m(ids)[:, -1].reshape(97)[None]).eval()
    ids = COPIED % 90
    got = dspark_compile.generate(model, ids, max_new_tokens=8, draft="ngram", options=QUICK)
    assert torch.equal(got, greedy(model.model, ids, 8))
    speculation(drafts=False)
    assert any("the last token alone" in n for n in last_generation().notes)


@torch.no_grad()
def test_a_table_of_positions_leaves_no_room_for_drafted_tokens():
    """A text may fill the table to its end; what is drafted would stand behind it."""
    model, ids = sharpen(NanoGPT(block=64)), COPIED[:, :20] % 90
    for new, drafts in ((20, True), (44, False)):
        got = dspark_compile.generate(
            model, ids, max_new_tokens=new, draft="ngram", schedule="fixed", options=QUICK
        )
        assert torch.equal(got, greedy(model, ids, new))
        speculation(drafts)
    assert any("tables for 64 positions" in n for n in last_generation().notes)


@torch.no_grad()
def test_a_batch_goes_without():
    model, ids = small(), (COPIED % 90).repeat(2, 1)
    got = dspark_compile.generate(model, ids, max_new_tokens=10, draft="ngram", options=QUICK)
    assert torch.equal(got, greedy(model, ids, 10))
    speculation(drafts=False)
    assert any("no speculation: rows of a batch" in n for n in last_generation().notes)


def test_a_draft_of_another_vocabulary():
    with pytest.raises(ValueError, match="the draft's vocabulary has 50 tokens and the model's 97"):
        dspark_compile.generate(
            small(), prompt(), max_new_tokens=4, draft=small(vocab=50), options=QUICK
        )


@torch.no_grad()
def test_streamer_and_criteria():
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, x):
            self.tokens += x.flatten().tolist()

        def end(self):
            self.ended = True

    model, ids = small(), COPIED % 90
    want, streamer = greedy(model, ids, 30), Streamer()
    got = dspark_compile.generate(
        model, ids, max_new_tokens=30, draft="ngram", schedule="fixed", streamer=streamer,
        options=QUICK,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert streamer.tokens == want[0].tolist() and streamer.ended
    stop = lambda text, scores: torch.full((1,), text.shape[1] >= 47)  # noqa: E731
    got = dspark_compile.generate(
        model, ids, max_new_tokens=30, draft="ngram", schedule="fixed", stopping_criteria=[stop],
        options=QUICK,
    )  # fmt: skip
    assert torch.equal(got, want[:, :47])


class Mean(nn.Module):
    """Every token sees the mean of all: nothing that a cache is for."""

    def __init__(self, vocabulary: int = 90) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary)

    def forward(self, ids):
        x = self.embed(ids)
        return {"logits": self.head(x + x.mean(1, keepdim=True)), "other": 1}


@torch.no_grad()
def test_without_a_cache_the_whole_text_is_run_for_every_token(caplog):
    model, ids = sharpen(Mean()), prompt(2)
    want = ids
    for _ in range(12):
        want = torch.cat((want, model(want)["logits"][:, -1:].argmax(-1)), 1)
    for draft in (None, "ngram", None):
        got = dspark_compile.generate(model, ids, max_new_tokens=12, draft=draft, options=QUICK)
        assert torch.equal(got, want)
        report = last_generation()
        assert report.path == "recomputed"
        assert any("mean" in n and "no cache can be inserted" in n for n in report.notes)
    assert sum("whole text is run" in r.message for r in caplog.records) == 1  # found out once
    eos = int(want[0, 9])
    got = dspark_compile.generate(
        model, ids[:1], max_new_tokens=12, eos_token_id=eos, pad_token_id=0, options=QUICK
    )
    at = int((want[0, 6:] == eos).nonzero()[0]) + 7
    assert torch.equal(got[0], want[0, :at])
    with pytest.raises(NotIncremental, match=r"mean.* along the sequence"):
        dspark_compile.generate(
            model, ids, max_new_tokens=4, options={**QUICK, "fallback": "error"}
        )
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@torch.no_grad()
def test_what_a_pass_raises_is_why_there_is_no_cache(monkeypatch):
    """Code that nobody has tried before may meet an assertion: it is decoded all the same."""
    from dspark_compile.passes.incremental_core import Maker

    def fails(self, *args):
        raise IndexError("list index out of range")

    monkeypatch.setattr(Maker, "_cached", fails)
    model, ids = small(), prompt()
    for draft in (None, "ngram"):
        got = dspark_compile.generate(model, ids, max_new_tokens=6, draft=draft, options=QUICK)
        assert torch.equal(got, greedy(model, ids, 6))
        assert last_generation().path == "recomputed"
        assert any("IndexError: list index" in note for note in last_generation().notes)
    with pytest.raises(NotIncremental, match="IndexError: list index out of range"):
        dspark_compile.generate(
            small(), ids, max_new_tokens=6, options={**QUICK, "fallback": "error"}
        )
