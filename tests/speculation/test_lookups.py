"""Look-ups of batches and beside drafts, and a causal language model as the draft."""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch

from dspark_compile.runtime.rounds import POOL
from dspark_compile.runtime.speculation import loop as loops
from dspark_compile.runtime.speculation import native_engine as native_module
from dspark_compile.runtime.speculation import rounds as rounds_module
from dspark_compile.runtime.speculation import state as states
from dspark_compile.runtime.speculation.park import ParkPolicy
from dspark_compile.runtime.speculation.state import Prices, best_length, fair, verify_length
from dspark_compile.runtime.speculation.torch_engine import TorchEngine
from tests.speculation.test_compiled import (
    ONE,
    TWO,
    Alternating,
    _count,
    every_draft,
    forgetful,
    plain,
    slow,
    speculate,
)
from tests.speculation.test_reference import target

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model():
    return target()


@pytest.fixture(scope="module")
def drafts(model):
    return every_draft(model)


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch):
    monkeypatch.delenv("DSPARK_KERNELS", raising=False)


def test_a_batch_waits_for_the_slowest():
    """Tokens of requests that are ahead count less; 1 on average, and 1 for a single one."""
    assert fair([40]) == [1.0] and fair([40, 40]) == [1.0, 1.0]
    weights = fair([128, 128, 128 - 128 * states.AHEAD])
    assert sum(weights) == pytest.approx(3) and weights[2] == pytest.approx(weights[0] / math.e)
    table = [1.0, 1.0, 1.3, 1.5, 1.6]
    rows = [[0.9] * 4, [0.0] * 4]
    assert verify_length(rows, table, 0.0, 3, fair([100, 100])) > 0
    assert verify_length(rows, table, 0.0, 3, fair([60, 100])) == 0  # only brings on who is ahead
    assert verify_length(rows, table, 0.0, 3, fair([100, 60])) == 3
    # What looks hardly better is not taken; nor does the margin make plain steps look dear.
    table = [1.0, 1.0, 1.47, 2.4, 3.5]
    assert best_length([[0.5] * 4] * 2, table, 0.0, 3) == (1, pytest.approx(3 / 1.47))
    assert best_length([[0.5] * 4] * 2, table, 0.0, 3, fair([9, 9])) == (0, 2.0)
    assert best_length([[0.6] * 4] * 2, table, 0.0, 3, fair([9, 9])) == (
        1,
        pytest.approx(3.2 / 1.47),
    )


def play(copies, left, table):
    """Steps until requests that look up 3 right tokens in a share ``copies`` of the rounds have
    ``left`` more, each, where those that do not copy find nothing."""
    draw, left, seconds = random.Random(0), [left] * len(copies), 0.0
    while any(left):
        live = [r for r, n in enumerate(left) if n]
        found = {r: draw.random() < copies[r] for r in live}
        rows = [[1.0 if found[r] else 0.0] * 3 for r in live]
        length = verify_length(rows, table, 0.0, 3, fair([left[r] for r in live]))
        seconds += table[length + 1]
        for r in live:
            left[r] = max(0, left[r] - 1 - (length if found[r] else 0))
    return seconds


def test_look_ups_of_a_batch_need_no_parking():
    table = [1.0, 1.0, 1.3, 1.6, 1.9]
    for new in (40, 128, 1000):
        assert play([0.0, 0.0, 0.0, 0.0], new, table) == new
        assert play([1.0, 0.0, 0.0, 0.0], new, table) < 1.03 * new
        assert play([0.5, 0.0], new, table) < 1.03 * new
        if new > 40:  # many that copy seldom wait for one another
            assert play([0.3] * 8, new, table) < 1.03 * new
        assert play([1.0] * 4, new, table) < 0.55 * new
        assert play([0.6] * 4, new, table) < 0.85 * new


def test_what_closing_holes_costs_is_a_part_of_the_price():
    prices = Prices(verify={1: 1.0, 4: 1.6})
    assert prices.table(3)[4] == pytest.approx(1.6)
    for _ in range(20):
        prices.closed(0.5, 1.0)
    assert prices.table(3)[4] == pytest.approx(2.4, rel=0.01) and prices.table(3)[1] == 1.0
    prices.closed(1.0, 0.0)  # nothing was verified: nothing is known
    assert prices.beside == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("kind", ["ngram", slow("ngram+model")])
@pytest.mark.parametrize("prompt", [TWO[1:], TWO], ids=["one", "two"])
def test_native_look_ups_are_decided_as_torch_would(model, drafts, kind, prompt, monkeypatch):
    """Before each native round the torch engine is asked, at the same prices, what it would do."""
    monkeypatch.setattr(native_module, "REFRESH", 1)
    # Measured prices would decide whether anything is verified.
    monkeypatch.setattr(
        Prices,
        "table",
        lambda self, count: [1e-4 * (1 + 0.1 * max(k - 1, 0)) for k in range(count + 2)],
    )
    asked_, visit = [], native_module.NativeEngine.visit

    def checked(self, count, drafting):
        state, other = self.state, TorchEngine(self.state)
        assert drafting
        looks = getattr(state.proposer, "inner", None) is None
        looked = state.proposer.propose(state, None, False)
        rows = looked.lookup.survival[~state.done]
        instead = looks or state.proposer._instead(state, rows, looked.lookup.point[~state.done])
        lengths = None
        if instead:
            lengths = other._lengths(looked, looked.lookup.survival, ~state.done)
            lengths = torch.minimum(lengths, state.limit - (state.lengths - state.prompts) - 1)
            lengths = (lengths.clamp(min=0) * ~state.done).tolist()
        addresses = self._s.verified, state.batch
        made = visit(self, 1, drafting)
        done = (ctypes.c_int64 * addresses[1]).from_address(addresses[0])[:]
        asked_.append((instead, lengths, "draft" not in made.parts, done))
        return made

    monkeypatch.setattr(native_module.NativeEngine, "visit", checked)
    monkeypatch.setattr(ParkPolicy, "drafts", lambda self: True)
    out, report = speculate(
        model, prompt, 60, drafts[kind], schedule="auto", num_drafted=_count(kind)
    )
    assert torch.equal(out, plain(model, prompt, 60)) and report.path == "native"
    assert len(asked_) > 10
    for instead, lengths, looked, verified in asked_:
        assert instead == looked
        assert not instead or lengths == verified
    assert any(sum(lengths) for instead, lengths, *_ in asked_ if instead)


@pytest.mark.slow
def test_what_both_engines_decide_by_stands_in_python_alone(model, drafts, monkeypatch):
    """The native rounds are built with other numbers where Python has others."""
    monkeypatch.setattr(states, "SHARE", 1.0)  # what was seen last is all that is known
    monkeypatch.setattr(loops, "take", forgetful(loops.take))
    speculate(model, ONE, 40, drafts["model"], num_drafted=3)
    (rounds,) = (
        r for several in POOL._idle[model].values() for r in several if _drafts(r, "model")
    )
    conditional = rounds.speculator.prices.conditional
    assert conditional[0] in (0.0, 1.0)
    assert set(conditional) <= {0.0, 1.0, states.FIRST_GUESS}  # a position may not be reached
    POOL.drop(model)


def _drafts(rounds, name):
    speculator = getattr(rounds, "speculator", None)
    return speculator is not None and speculator.proposer.name == name


@pytest.mark.parametrize("native", [True, slow(False)], ids=["native", "torch"])
@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("ngram+model", TWO), slow("model", TWO), slow("ngram+model", ONE), slow("model", ONE)],
    ids=["look-ups, two", "two", "look-ups, one", "one"],
)
def test_a_causal_draft_reads_what_it_did_not_draft(
    model, drafts, kind, prompt, native, monkeypatch
):
    """Behind plain steps and look-ups its cache is that of a model that read the whole text, also
    where holes were closed and room was made."""
    monkeypatch.setattr(loops, "ParkPolicy", Alternating)
    monkeypatch.setattr(loops, "FIRST_ROOM", 8)
    monkeypatch.setattr(rounds_module, "HOLES", 0.1)
    if not native:
        monkeypatch.setattr(loops, "engine_for", lambda state, other: (TorchEngine(state), None))
        monkeypatch.setattr(TorchEngine, "native", True)  # a batch is driven all the same
    POOL.drop(model)
    seen = {}
    finish = loops.SpeculativeLoop._finish

    def kept(self, state, engine):
        proposer = getattr(self.proposer, "inner", self.proposer)
        seen["behind"] = proposer.behind
        proposer._catch_up(state)
        seen["own"], seen["state"] = proposer.own, state
        return finish(self, state, engine)

    monkeypatch.setattr(loops.SpeculativeLoop, "_finish", kept)
    new = 280  # the cache grows
    out, report = speculate(
        model, prompt, new, drafts[kind], schedule="auto", num_drafted=_count(kind)
    )
    POOL.drop(model)
    assert torch.equal(out, plain(model, prompt, new))
    assert report.speculation.drafted
    own, state = seen["own"], seen["state"]
    rounds, last = state.rounds, seen["state"].rounds.length - 1
    for row in range(len(prompt)):
        if not rounds.live[row] and len(prompt) > 1 and row != int(state.lengths.argmax()):
            continue
        held = int(state.lengths[row]) - 1
        cache = transformers.DynamicCache()
        with torch.no_grad():
            own.model(state.text[row : row + 1, :held], past_key_values=cache)
        slots = torch.arange(rounds.length)
        if rounds.masked:
            slots = slots[rounds.mask[row, : rounds.length] > 0]
        assert len(slots) == held
        for mine, want in zip(own.cache.layers, cache.layers, strict=True):
            known = slots != last  # comes with the next anchor
            for got, right in ((mine.keys, want.keys), (mine.values, want.values)):
                torch.testing.assert_close(
                    got[row][:, slots[known]], right[0][:, known], rtol=1e-4, atol=1e-4
                )


def test_a_causal_draft_catches_up_where_the_room_ends(model, drafts, monkeypatch):
    """Behind a wide round the cache may end before a block does: what is read stays inside."""
    seen = {}
    finish = loops.SpeculativeLoop._finish

    def kept(self, state, engine):
        proposer = self.proposer
        proposer._catch_up(state)
        own, end = proposer.own, state.rounds.length
        tensors = [x for _, _, x in own.cache.tensors()]
        before = [x[:, :, : end - 1].clone() for x in tensors]
        starts, set_length = [], own.set_length
        with monkeypatch.context() as patch:
            patch.setattr(own, "set_length", lambda n: (starts.append(n), set_length(n)))
            patch.setattr(type(own.cache), "room", property(lambda cache: end))
            for behind in range(2, 2 * proposer.width + 2):
                for x in tensors:
                    x[:, :, end - behind : end - 1] = 7.0
                proposer.behind = behind
                proposer._catch_up(state)
                assert proposer.behind <= 1
                for x, want in zip(tensors, before, strict=True):
                    torch.testing.assert_close(x[:, :, : end - 1], want, rtol=1e-4, atol=1e-4)
        seen["ends"] = end, max(starts) + proposer.width
        return finish(self, state, engine)

    monkeypatch.setattr(loops.SpeculativeLoop, "_finish", kept)
    POOL.drop(model)
    speculate(model, ONE, 40, drafts["model"], num_drafted=3)
    end, read = seen["ends"]
    assert read <= end
    POOL.drop(model)
