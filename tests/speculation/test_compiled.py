"""`generate` with a draft: what compiled and native rounds write is what the model writes alone."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch

import dspark_compile
from dspark_compile.codegen.cpp import isa
from dspark_compile.models.draft_config import DraftError
from dspark_compile.runtime.rounds import POOL
from dspark_compile.runtime.speculation import loop as loops
from dspark_compile.runtime.speculation import rounds as rounds_module
from dspark_compile.runtime.speculation import state as states
from dspark_compile.runtime.speculation.calibration import OnlineCalibration
from dspark_compile.runtime.speculation.lookup_proposals import drafting_part
from dspark_compile.runtime.speculation.park import ParkPolicy
from dspark_compile.runtime.speculation.state import Prices, verify_length, widths_for
from dspark_compile.runtime.speculation.taps import Taps
from dspark_compile.runtime.speculation.torch_engine import TorchEngine
from tests.speculation.test_lossless import p_value
from tests.speculation.test_reference import V, draft_for, target

transformers = pytest.importorskip("transformers")

ONE = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]]
TWO = [[0, 0, 0, 1, 5, 9, 2, 6, 5, 3], [1, 2, 3, 1, 2, 3, 1, 2, 3, 1]]
MASK = [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model():
    return target()


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch):
    monkeypatch.delenv("DSPARK_KERNELS", raising=False)


def asked(prompt):
    given = {"input_ids": torch.tensor(prompt)}
    if len(prompt) > 1:
        given["attention_mask"] = torch.tensor(MASK)
    return given


def plain(model, prompt, new, **more):
    more = {"do_sample": False} | more
    return model.generate(**asked(prompt), max_new_tokens=new, **more)


def speculate(model, prompt, new, draft, **more):
    more = {"do_sample": False, "schedule": "fixed"} | more
    return dspark_compile.generate(
        model, **asked(prompt), max_new_tokens=new, draft=draft, return_stats=True, **more
    )


def every_draft(model):
    return {
        "draft": draft_for(model),
        "gated": draft_for(model, markov_head_type="gated"),
        "rnn": draft_for(model, markov_head_type="rnn"),
        "dflash": draft_for(model, markov_rank=0, confidence_head_with_markov=False),
        "ngram": "ngram",
        "model": target(seed=3, num_hidden_layers=2),
        "ngram+draft": ("ngram", draft_for(model)),
        "ngram+rnn": ("ngram", draft_for(model, markov_head_type="rnn")),
        "ngram+model": ("ngram", target(seed=3, num_hidden_layers=2)),
    }


@pytest.fixture(scope="module")
def drafts(model):
    return every_draft(model)


@pytest.mark.parametrize(
    "kind",
    ["draft", "ngram", "ngram+draft", slow("model"), slow("ngram+model")],
)
def test_greedy_text_is_the_models(model, drafts, kind):
    new = 70
    out, report = speculate(model, ONE, new, drafts[kind], num_drafted=_count(kind))
    assert torch.equal(out, plain(model, ONE, new))
    assert report.path == "native"
    assert report.speculation.proposer == kind
    assert report.speculation.committed == new - 1  # the first token is the prompt's
    assert 1 <= report.speculation.tau <= (8 if kind.startswith("ngram+") else 5)


def _count(kind):
    # Look-ups of more tokens than the draft beside them has, 4.
    more = {"ngram+draft": 7, "ngram+rnn": 7, "ngram+model": 7}
    return {"ngram": 3, "model": 3, **more}.get(kind)


@pytest.mark.slow
def test_ragged_rows_and_holes(model, drafts, monkeypatch):
    """Rows that commit different numbers of tokens share slots; holes are closed, room is made."""
    moved = []
    compact = rounds_module.Verifying.compact

    def watched(self, *args):
        moved.append(compact(self, *args))
        return moved[-1]

    monkeypatch.setattr(rounds_module.Verifying, "compact", watched)
    monkeypatch.setattr(loops, "FIRST_ROOM", 8)
    monkeypatch.setattr(rounds_module, "HOLES", 0.0)
    new = 150
    for kind in ("draft", "ngram", "ngram+draft", "ngram+model"):
        out, report = speculate(model, TWO, new, drafts[kind], num_drafted=_count(kind))
        assert torch.equal(out, plain(model, TWO, new)), kind
        assert report.path == "native"
    assert any(moved)


@pytest.mark.slow
def test_a_draft_that_is_trained_between_two_calls(model):
    """Its weights are written to in place: what native rounds keep a copy of is copied anew."""
    draft, new = draft_for(model, markov_rank=V), 40
    text, before = speculate(model, ONE, new, draft)
    with torch.no_grad():
        draft.markov_head.markov_w1.weight.copy_(torch.eye(V))
        bigrams = torch.zeros(V, V)
        for a, b in itertools.pairwise(text[0, 9:].tolist()):
            bigrams[b, a] = 90.0
        draft.markov_head.markov_w2.weight.copy_(bigrams)
    again, report = speculate(model, ONE, new, draft)
    fresh = speculate(model, ONE, new, copy.deepcopy(draft))[1]
    assert torch.equal(again, text) and report.path == "native"
    assert report.speculation.tau == fresh.speculation.tau > before.speculation.tau + 0.5


def forgetful(take):
    """`loop.take` of speculators that have learned nothing."""

    def taken(*args, **more):
        speculator = take(*args, **more)
        speculator.prices.matched, speculator.prices.conditional = [], []
        return speculator

    return taken


@pytest.mark.parametrize(
    "kind",
    [
        "draft",
        slow("gated"),
        "rnn",
        slow("dflash"),
        "ngram",
        slow("model"),
        "ngram+draft",
        slow("ngram+rnn"),
        "ngram+model",
    ],
)
@pytest.mark.parametrize("how", [{}, {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.3}])
def test_native_rounds_are_the_torch_ones(model, drafts, kind, how, monkeypatch):
    """With the same random numbers, also where nothing is greedy."""
    monkeypatch.setattr(loops, "take", forgetful(loops.take))
    new, prompt, looked = 40, TWO[1:] if kind.startswith("ngram+") else ONE, 0
    for sampled in (True, False):
        more = {"do_sample": sampled, "num_drafted": _count(kind), "top_k": 0} | how
        torch.manual_seed(11)
        native, report = speculate(model, prompt, new, drafts[kind], **more)
        assert report.path == "native"
        with monkeypatch.context() as patch:
            patch.setattr(loops, "engine_for", lambda state, other: (TorchEngine(state), None))
            torch.manual_seed(11)
            other, driven = speculate(model, prompt, new, drafts[kind], **more)
        assert driven.path == "compiled"
        assert torch.equal(native, other)
        a, b = report.speculation, driven.speculation
        for name in ("tau", "rounds", "drafted", "accepted", "verify_lengths", "lookup_rounds"):
            assert getattr(a, name) == getattr(b, name), name
        assert a.survival == pytest.approx(b.survival)
        looked += a.lookup_rounds
        assert a.lookup_rounds < a.rounds or kind == "ngram"
        if not kind.endswith("model"):
            assert a.predicted == pytest.approx(b.predicted, abs=1e-4)
    # A penalty keeps a sampled text from repeating itself.
    assert looked or how or not kind.startswith("ngram+")


@pytest.mark.parametrize("prompt", [ONE, slow(TWO)])
@pytest.mark.parametrize("kind", ["unsure", "model", slow("ngram+unsure")])
def test_engines_look_alike_at_a_draft_without_confidences(
    model, drafts, kind, prompt, monkeypatch
):
    """Where nothing drafted seems worth its verification, both engines verify all of it when the
    policy looks, and nothing else; and both learn the same from it."""
    take, seen, unsure = loops.take, [], draft_for(model, enable_confidence_head=False)
    draft = {"unsure": unsure, "ngram+unsure": ("ngram", unsure)}.get(kind, drafts["model"])

    def hopeless(*args, **more):
        speculator = take(*args, **more)
        speculator.prices.conditional = [0.01] * speculator.rounds.count
        speculator.policy = FixedTimes(guesses=True)
        seen.append(speculator)
        return speculator

    monkeypatch.setattr(loops, "take", hopeless)
    monkeypatch.setattr(
        Prices, "table", lambda self, n: [1e-3 * (1 + 0.5 * k) for k in range(n + 2)]
    )
    monkeypatch.setattr(Prices, "trust", lambda self, n: [[0.0] * n] * states.LONGEST)
    found = []
    # Batches are driven natively or not at all; whether look-ups go before drafts is a matter of
    # time.
    ways = (False, True) if prompt is ONE and kind != "ngram+unsure" else (False,)
    for driven in ways:
        with monkeypatch.context() as patch:
            if driven:
                patch.setattr(loops, "engine_for", lambda s, other: (TorchEngine(s), None))
            given = {"num_drafted": _count(kind), "schedule": "auto"}
            out, report = speculate(model, prompt, 90, draft, **given)
        assert report.path == ("compiled" if driven else "native")
        assert torch.equal(out, plain(model, prompt, 90))
        stats, speculator = report.speculation, seen[-1]
        found.append((stats.rounds, stats.verify_lengths, speculator.prices.conditional))
        most, lengths = drafting_part(speculator.proposer).count, stats.verify_lengths
        assert lengths[0] > 0 and lengths[most] >= 6  # plain steps, rounds of a look
    assert found[0][:2] == found[-1][:2]
    assert found[0][2] == pytest.approx(found[-1][2])
    assert found[0][2][0] != 0.01


@pytest.mark.parametrize("kind", ["draft", "ngram+draft"])
@pytest.mark.parametrize("sampled", [False, True])
def test_confidences_are_calibrated_anew_by_what_was_verified(
    model, drafts, kind, sampled, monkeypatch
):
    """Both engines record the same rounds, and the next call goes by what was fitted to them."""
    take, seen = loops.take, []

    def fresh(*args, **more):
        seen.append(take(*args, **more))
        seen[-1]._refining.clear()
        return seen[-1]

    monkeypatch.setattr(loops, "OnlineCalibration", functools.partial(OnlineCalibration, least=12))
    prompt, given = TWO[1:], {"do_sample": sampled, "num_drafted": _count(kind), "top_k": 0}
    recorded = []
    for driven in (False, True):
        with monkeypatch.context() as patch:
            if driven:
                patch.setattr(loops, "engine_for", lambda s, other: (TorchEngine(s), None))
            patch.setattr(loops, "take", fresh)
            torch.manual_seed(5)
            _, report = speculate(model, prompt, 90, drafts[kind], **given)
        assert report.path == ("compiled" if driven else "native")
        online = seen[-1]._refining[sampled][1]
        logits, accepted, verified, count = (x.clone() for x in online.ring)
        rows = verified > 0
        assert 12 <= int(rows.sum()) <= int(count) and bool((accepted <= verified).all())
        recorded.append((logits[rows], accepted[rows], verified[rows]))
        assert online.refits == 1 and online.calibration.observed[0] == int(rows.sum())
        known = torch.tensor(online.calibration.observed) >= 12
        assert known[0] and bool((online.calibration.temperatures[~known] == 1).all())
    for native, other in zip(*recorded, strict=True):
        assert torch.allclose(native.float(), other.float(), atol=1e-4)
    # Kept for the next call.
    made = []
    monkeypatch.setattr(
        loops, "engine_for", lambda s, other: (made.append(s) or TorchEngine(s), None)
    )
    before = online.calibration.temperatures
    speculate(model, prompt, 8, drafts[kind], **given)
    assert made[-1].calibration.temperatures is before
    own = drafting_part(seen[-1].proposer).draft
    # A draft that is calibrated from outside begins afresh.
    monkeypatch.setattr(own, "calibration", {"temperatures": [2.0] * own.config.num_drafted})
    speculate(model, prompt, 8, drafts[kind], **given)
    assert made[-1].calibration.temperatures.tolist() == [2.0] * own.config.num_drafted


@pytest.mark.parametrize("how", [{}, slow({"top_k": 4})])
def test_scores_that_turn_bad_are_an_error(how, monkeypatch):
    """As in transformers' own loop, in whatever drives the rounds; the next call is as any."""
    model = target()
    draft, more = draft_for(model), {"do_sample": True, "top_k": 0} | how
    torch.manual_seed(3)
    before, report = speculate(model, ONE, 24, draft, **more)
    assert report.path == "native"
    weight = model.lm_head.weight
    for driven in (False, True):
        with monkeypatch.context() as patch:
            if driven:
                patch.setattr(loops, "engine_for", lambda s, other: (TorchEngine(s), None))
            # Behind the prompt: the rounds meet it.
            good = weight.data[5].clone()
            patch.setattr(loops, "drawable", lambda p: (weight.data[5].fill_(torch.nan), p)[1])
            with pytest.raises(RuntimeError, match="probabilities to draw from"):
                speculate(model, ONE, 24, draft, **more)
            weight.data[5] = good
    torch.manual_seed(3)
    after, _ = speculate(model, ONE, 24, draft, **more)
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_biased_logit_is_found(dtype, monkeypatch):
    """Greedy drafts do not write their logits, 64 tokens at a time, unless one is not finite."""
    model = target(vocab_size=192)
    draft = draft_for(model, vocab_size=192, markov_rank=6).to(dtype).bind(model)

    def both():
        found = []
        for driven in (False, True):
            with monkeypatch.context() as patch:
                if driven:
                    patch.setattr(loops, "engine_for", lambda s, other: (TorchEngine(s), None))
                out, report = speculate(model, ONE, 24, draft)
            stats = report.speculation
            found.append((out.tolist(), stats.rounds, stats.accepted, stats.survival))
            assert report.path == ("compiled" if driven else "native")
        return found

    native, torchs = both()
    # In bfloat16 the torch engine rounds the bias: another token may be drafted at a near tie.
    assert native[0] == torchs[0] and (dtype == torch.bfloat16 or native == torchs)
    with torch.no_grad():
        draft.markov_head.markov_w2.weight[77] = torch.nan  # torch's arg-max: the largest of all
    native, torchs = both()
    assert native == torchs


class Alternating(ParkPolicy):
    """Drafts in every other visit of a few rounds."""

    def __init__(self, **options):
        super().__init__(**options)
        self.turn = 0

    def drafts(self):
        self.turn += 1
        return bool(self.turn % 2)

    def most(self, first):
        return 3


class FixedTimes(ParkPolicy):
    """As if a drafted round took two plain steps' time; calls do not rest."""

    def drafted(self, seconds, tau, rounds=1):
        super().drafted(2.0, tau, rounds)

    def plain(self, seconds, steps=1):
        super().plain(1.0, steps)

    def rests(self):
        return False


@pytest.mark.parametrize("prompt", [ONE, slow(TWO)])
def test_context_goes_on_while_parked(model, drafts, prompt, monkeypatch):
    """Plain rounds in between leave the draft's context whole."""
    draft, new = drafts["draft"], 40
    monkeypatch.setattr(loops, "ParkPolicy", Alternating)
    POOL.drop(model)
    seen = {}
    finish = loops.SpeculativeLoop._finish

    def kept(self, state, engine):
        self.proposer.flush()
        seen["loop"], seen["state"] = self, state
        return finish(self, state, engine)

    monkeypatch.setattr(loops.SpeculativeLoop, "_finish", kept)
    out, report = speculate(model, prompt, new, draft, schedule="auto")
    assert torch.equal(out, plain(model, prompt, new))
    assert report.path == "native"
    POOL.drop(model)
    programs, state = seen["loop"].proposer.programs, seen["state"]
    rounds = state.rounds
    for row in range(len(prompt)):
        held = int(rounds.filled[row])
        text = state.text[row : row + 1, :held]
        with torch.no_grad(), Taps(model, draft.config.target_layer_ids) as taps:
            model(text)
            states = taps.take()
        cache = draft.new_cache(1, 256)
        draft.append(cache, states, held)
        slots = torch.arange(rounds.length)
        if rounds.masked:
            slots = slots[rounds.mask[row, : rounds.length] > 0]
        for mine, want in zip((*programs.keys, *programs.values), (*cache.keys, *cache.values)):
            torch.testing.assert_close(mine[row][:, slots], want[0][:, :held], rtol=1e-4, atol=1e-4)


def test_ends_and_limits(model, drafts):
    """An end token inside of an accepted prefix ends the request; the limit is kept."""
    draft = drafts["draft"]
    free = plain(model, ONE, 40)[0, 10:].tolist()
    end = free[17]
    for new in (1, 2, 3, 40):
        want = plain(model, ONE, new, eos_token_id=end)
        assert torch.equal(speculate(model, ONE, new, draft, eos_token_id=end)[0], want)
    ends = [end, free[5]]
    want = plain(model, TWO, 40, eos_token_id=ends, pad_token_id=0)
    got, _ = speculate(model, TWO, 40, draft, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(got, want)


def test_streamer_and_criteria(model, drafts):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    class Stop(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 31, dtype=torch.bool)

    streamer = Streamer()
    out, _ = speculate(model, ONE, 30, drafts["draft"], streamer=streamer)
    assert streamer.tokens == out[0].tolist() and streamer.ended
    for new in (1, 30):
        streamer = Streamer()
        out, _ = speculate(
            model, ONE, new, drafts["draft"], stopping_criteria=[Stop()], streamer=streamer
        )
        assert torch.equal(out, plain(model, ONE, min(new, 21)))
        assert streamer.tokens == out[0].tolist() and streamer.ended


def test_what_is_decoded_plainly_says_so(model, drafts):
    class Odd(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, -1)

    out, report = speculate(model, ONE, 8, drafts["draft"], logits_processor=[Odd()])
    assert report.speculation is None
    assert any("no speculation" in note for note in report.notes)
    assert torch.equal(out, plain(model, ONE, 8, logits_processor=[Odd()]))


def test_a_batch_too_wide_for_the_kernels(model, drafts):
    four = {"input_ids": torch.tensor(TWO + TWO), "attention_mask": torch.tensor(MASK + MASK)}
    out, report = dspark_compile.generate(
        model, **four, max_new_tokens=4, do_sample=False, draft=drafts["draft"], return_stats=True
    )
    assert report.speculation is None
    assert any("a batch of 4 needs 20 rows" in note for note in report.notes)
    assert torch.equal(out, model.generate(**four, max_new_tokens=4, do_sample=False))


def test_a_draft_that_does_not_pay_rests(model, drafts, monkeypatch):
    draft, want = drafts["draft"], plain(model, ONE, 12)
    speculate(model, ONE, 12, draft, schedule="auto")
    monkeypatch.setattr(ParkPolicy, "rests", lambda self: True)
    out, report = speculate(model, ONE, 12, draft, schedule="auto")
    assert report.speculation is None
    assert any("parked: drafting takes" in note for note in report.notes)
    assert torch.equal(out, want)
    out, report = speculate(model, ONE, 12, draft)
    assert report.speculation is not None  # asked for: schedule="fixed"


@pytest.mark.slow
def test_look_ups_go_on_without_the_draft(model, drafts, monkeypatch):
    given = {"schedule": "auto", "num_drafted": 7}
    want = plain(model, TWO[1:], 30)
    both = drafts["ngram+draft"]
    out, report = speculate(model, TWO[1:], 30, both, **given)
    assert torch.equal(out, want) and report.speculation.lookup_rounds
    with monkeypatch.context() as patch:
        patch.setattr(ParkPolicy, "drafts", lambda self: False)  # parked
        out, report = speculate(model, TWO[1:], 30, both, **given)
        assert torch.equal(out, want) and report.speculation.lookup_rounds
    rests = iter([True])
    monkeypatch.setattr(ParkPolicy, "rests", lambda self: next(rests, False))
    out, report = speculate(model, TWO[1:], 30, both, **given)
    assert torch.equal(out, want) and report.speculation.proposer == "ngram"
    assert any(note.startswith("look-ups without the draft: parked") for note in report.notes)
    out, report = speculate(model, TWO[1:], 30, both, **given)
    assert report.speculation.proposer == "ngram+draft" and not report.notes


@pytest.mark.skipif("amx" not in isa.available(), reason="the CPU has no AMX")
def test_a_batch_on_tiles(model):
    """A draft in bfloat16 takes the blocks of four requests, 20 rows, at once."""
    draft = draft_for(model).bfloat16().bind(model)
    four = {"input_ids": torch.tensor(TWO + TWO), "attention_mask": torch.tensor(MASK + MASK)}
    given = {"max_new_tokens": 30, "do_sample": False}
    out, report = dspark_compile.generate(
        model, **four, **given, draft=draft, schedule="fixed", return_stats=True
    )
    assert report.path == "native"
    assert report.speculation.drafted > 0
    assert torch.equal(out, model.generate(**four, **given))


def test_a_custom_generate_call_takes_it(model, drafts):
    out = model.generate(
        torch.tensor(ONE), max_new_tokens=20, do_sample=False, draft=drafts["draft"],
        custom_generate=dspark_compile.generate,
    )  # fmt: skip
    assert torch.equal(out, plain(model, ONE, 20))
    assert dspark_compile.last_generation().speculation is not None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"draft": "ngrams"}, "ngram"),
        ({"draft": ("ngram", "ngram")}, "DraftModel"),
        ({"draft": ["ngram"]}, "a pair is"),
        ({"draft": ("ngram", torch.nn.Linear(2, 2))}, "Linear is neither"),
        ({"draft": "ngram", "schedule": "greedy"}, "schedule"),
        ({"draft": "ngram", "num_drafted": 0}, "num_drafted"),
        ({"draft": "ngram", "num_drafted": 2.5}, "num_drafted=2.5: give a whole number"),
        ({"draft": "ngram", "num_drafted": True}, "num_drafted=True"),
        ({"num_drafted": 3}, "draft"),
        ({"draft": 5}, "DraftModel"),
    ],
)
def test_bad_arguments(model, given, words):
    with pytest.raises(ValueError, match=words):
        dspark_compile.generate(model, torch.tensor(ONE), max_new_tokens=2, **given)


def test_drafts_that_do_not_fit(model, drafts):
    with pytest.raises(ValueError, match="vocabulary"):
        speculate(model, ONE, 4, target(vocab_size=V + 3))
    with pytest.raises(ValueError, match="vocabulary"):
        speculate(model, ONE, 4, ("ngram", target(vocab_size=V + 3)))
    with pytest.raises(ValueError, match="the model itself"):
        speculate(model, ONE, 4, ("ngram", model))
    with pytest.raises(ValueError, match="trained to draft"):
        speculate(model, ONE, 4, drafts["draft"], num_drafted=2)


# ------------------------------------------------------------------------------- the schedule


def test_a_part_of_the_vocabulary_needs_its_names(model):
    """Or kernels would read beyond the Markov head."""
    with pytest.raises(DraftError, match="20 of 37 tokens, and no d2t says which"):
        draft_for(model, draft_vocab_size=20)


def test_verify_length_stops_at_once():
    table = [1.0, 1.0, 1.1, 3.0, 3.0, 3.0]  # the third token is dear
    assert verify_length([[0.9, 0.9, 0.9, 0.9]], table, 0.2, 4) == 1
    assert verify_length([[0.05, 0.04, 0.03, 0.02]], table, 0.2, 4) == 0
    flat = [1.0] * 6
    assert verify_length([[0.9, 0.8, 0.7, 0.6]], flat, 0.2, 4) == 4
    assert verify_length([[0.9, 0.8, 0.7, 0.6]], flat, 0.2, 2) == 2


def test_later_confidences_do_not_reach_back():
    """Whether a position is verified depends on confidences up to it: the paper's condition."""
    table = Prices(verify={1: 1.0, 6: 1.8}).table(5)
    for last in (0.0, 0.3, 0.59):
        rows = [[0.9, 0.7, 0.6, last, last]]
        assert verify_length(rows, table, 0.1, 5) >= verify_length(
            [[0.9, 0.7, 0.6, 0.0, 0.0]], table, 0.1, 5
        )
        assert verify_length(rows, table, 0.1, 3) == 3


def test_a_slow_moment_does_not_shut_a_width_out():
    """What is not verified is not measured: its price returns to what it was beside the others."""
    prices = Prices(verify={1: 1.0, 8: 1.5, 16: 9.0}, first={1: 1.0, 8: 1.5, 16: 2.0})
    rows = [[0.95**k for k in range(1, 16)]]
    assert verify_length(rows, prices.table(15), 0.0, 15) == 7
    prices.verify[8] = 3.0  # everything takes twice as long now
    for _ in range(200):
        prices.forget(8)
    assert prices.verify[8] == 3.0 and prices.verify[16] == pytest.approx(4.0, rel=0.05)
    assert verify_length(rows, prices.table(15), 0.0, 15) == 15


def test_widths():
    assert widths_for(1, 5, 16) == [1, 6]
    assert widths_for(1, 7, 16) == [1, 4, 8]
    assert widths_for(1, 15, 16) == [1, 2, 4, 8, 16]
    assert widths_for(4, 5, 16) == [1, 2, 4]
    assert widths_for(16, 5, 16) == [1]
    assert widths_for(16, 5, 128) == widths_for(16, 5) == [1, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "schedule", "rows"),
    [
        *(
            (kind, schedule, 1)
            for kind in ("draft", "gated", "rnn", "ngram", "ngram+draft", "model", "ngram+model")
            for schedule in ("fixed", "auto")
        ),
        ("draft", "auto", 2),
        ("ngram+draft", "auto", 2),
        ("ngram+model", "auto", 2),
    ],
)
def test_sampled_text_is_distributed_as_the_models(kind, schedule, rows, monkeypatch):
    """Chi-square over the first three tokens behind a prompt, 20,000 requests, one by one or two
    together; with the scheduler and without."""
    # Never parked, and at prices that leave the scheduler something to decide.
    monkeypatch.setattr(ParkPolicy, "drafts", lambda self: True)
    monkeypatch.setattr(ParkPolicy, "rests", lambda self: False)
    # (What a causal draft is thought to be worth is learned from what is verified alone.)
    more = 0.02 if kind == "model" else 0.15
    monkeypatch.setattr(
        Prices, "table", lambda self, n: [1e-3 * (1 + more * max(k - 1, 0)) for k in range(n + 2)]
    )
    wide = 4
    model = target(vocab_size=wide, hidden_size=16, num_hidden_layers=3, initializer_range=0.6)
    draft = kind
    if kind.endswith("model"):
        draft = target(
            seed=3, vocab_size=wide, hidden_size=16, num_hidden_layers=2, initializer_range=0.6
        )
        draft = ("ngram", draft) if kind == "ngram+model" else draft
    elif kind != "ngram":
        head = kind if kind in ("gated", "rnn") else "vanilla"
        draft = draft_for(
            model, vocab_size=wide, hidden_size=16, mask_token_id=0, num_target_layers=3,
            target_layer_ids=(-1, 0, 1), markov_head_type=head,
        )  # fmt: skip
        draft = ("ngram", draft) if kind == "ngram+draft" else draft
    # No 0 in it: that is the padding, which transformers would mask.
    prompt = torch.tensor([[1, 2, 3, 1, 1, 2, 3, 1, 1, 2]])
    joint = torch.ones(1)
    texts = [prompt[0].tolist()]
    for _ in range(3):
        with torch.no_grad():
            p = model(torch.tensor(texts)).logits[:, -1].softmax(-1)
        joint = (joint[:, None] * p).flatten()
        texts = [t + [x] for t in texts for x in range(wide)]
    counts, verified, place = torch.zeros(wide**3), 0, torch.tensor([wide**2, wide, 1])
    prompts = prompt.expand(rows, -1)
    torch.manual_seed(0)
    for _ in range(20_000 // rows):
        out, report = dspark_compile.generate(
            model, prompts, max_new_tokens=3, do_sample=True, top_k=0, draft=draft,
            schedule=schedule, return_stats=True,
        )  # fmt: skip
        counts += torch.bincount(out[:, -3:] @ place, minlength=wide**3)
        verified += report.speculation.drafted
    assert verified > 2_000 and counts.sum() == 20_000
    expected = joint * counts.sum()
    rare = expected < 6
    kept = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    if wanted[-1] < 6:
        kept, wanted = kept[:-1], wanted[:-1]
    assert p_value(kept, wanted) > 0.01


@pytest.mark.parametrize("kind", [None, "draft", slow("ngram")])
@pytest.mark.parametrize("rows", [1, slow(2)])
def test_a_seed_gives_one_text(model, drafts, kind, rows):
    """Also where the step is compiled on the way, and where tokens are handed over one by one."""
    POOL.drop(model)
    given = asked(ONE if rows == 1 else TWO) | {"max_new_tokens": 30, "do_sample": True}
    if kind is not None:
        given |= {"draft": drafts[kind], "schedule": "fixed"}
    texts = []
    for call in range(4):
        if call == 3 and rows == 1:
            given["streamer"] = Heard()
        torch.manual_seed(3)
        texts.append(dspark_compile.generate(model, **given))
    assert all(torch.equal(text, texts[0]) for text in texts)


class Heard:
    def put(self, value):
        pass

    def end(self):
        pass
