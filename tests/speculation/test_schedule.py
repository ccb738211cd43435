"""The scheduler, its prices, calibration, parking and n-grams."""

from __future__ import annotations

import itertools
import math
import random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dspark_compile.runtime.speculation import ngram
from dspark_compile.runtime.speculation.calibration import (
    Calibration,
    OnlineCalibration,
    expected_calibration_error,
    fit,
)
from dspark_compile.runtime.speculation.park import ParkPolicy
from dspark_compile.runtime.speculation.schedule import (
    DelayedBudgets,
    best_budget,
    bucket_edges,
    budgeted,
    early_stop,
    fixed,
)
from dspark_compile.runtime.speculation.sps import SPSCurve, measure
from dspark_compile.runtime.speculation.state import FIRST_GUESS, SHARE, verify_length
from dspark_compile.runtime.speculation.telemetry import Counters, SpeculationStats


@st.composite
def schedules(draw):
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    level = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 0.9, 1.0])
    survival = torch.tensor([[draw(level) for _ in range(count)] for _ in range(rows)])
    live = torch.tensor([draw(st.booleans()) for _ in range(rows)])
    steps = [draw(st.sampled_from([0.0, 0.0, 0.02, 0.1, 0.4])) for _ in range(rows * (count + 1))]
    seconds = torch.cat((torch.ones(1), 1 + torch.tensor(steps).cumsum(0)))
    return survival.cumprod(-1), live, seconds, draw(st.sampled_from([0.0, 0.3]))


def algorithm_1(survival, live, seconds, draft):
    """The paper's loop, one item at a time."""
    items = sorted(
        (-float(survival[r, j]), r, j)
         for r in range(len(survival)) if live[r] for j in range(survival.shape[1])
    )  # fmt: skip
    size = tau = int(live.sum())
    lengths = [0] * len(survival)
    best = tau / (float(seconds[size]) + draft)
    for a, r, j in items:
        size, tau = size + 1, tau - a
        value = tau / (float(seconds[size]) + draft)
        if value <= best * (1 + 1e-7) or a == 0:
            break
        best, lengths[r] = value, j + 1
    return lengths


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_early_stop_is_algorithm_1(case):
    survival, live, seconds, draft = case
    got = early_stop(survival, seconds, live, draft_seconds=draft)
    want = algorithm_1(survival, live, seconds, draft)
    if got.tolist() != want:
        # float32 may see a tie where float64 sees none, and the other way round.
        size = int(live.sum())
        mine = float(sum(survival[r, : got[r]].sum() for r in range(len(want))) + size)
        theirs = float(sum(survival[r, : want[r]].sum() for r in range(len(want))) + size)
        values = [
            tau / (float(seconds[size + n]) + draft)
            for tau, n in ((mine, int(got.sum())), (theirs, sum(want)))
        ]
        assert math.isclose(*values, rel_tol=1e-4)
    assert not got[~live].any()


@settings(max_examples=100, deadline=None)
@given(schedules(), st.integers(0, 25))
def test_budgets_and_edges(case, budget):
    survival, live, seconds, draft = case
    lengths = budgeted(survival, budget, live)
    items = (survival > 0) & live[:, None]
    assert int(lengths.sum()) == min(budget, int(items.sum()))
    taken = torch.arange(survival.shape[1]) < lengths[:, None]
    if items.any() and taken.any() and (items & ~taken).any():
        assert survival[taken].min() >= survival[items & ~taken].max()  # the largest are in
    least = early_stop(survival, seconds, live, draft_seconds=draft)
    edges = torch.tensor(bucket_edges(len(survival), survival.shape[1]))
    filled = early_stop(survival, seconds, live, draft_seconds=draft, edges=edges)
    assert (filled >= least).all() and not filled[~live].any()
    size = int(live.sum() + filled.sum())
    # Nothing is filled in beyond the bucket that was stopped in.
    bucket = int(edges[torch.searchsorted(edges, live.sum() + least.sum())])
    assert size <= bucket
    assert int(best_budget(survival, seconds, live)) <= int(items.sum())


def test_with_a_convex_price_the_early_stop_is_the_best():
    torch.manual_seed(1)
    for _ in range(50):
        survival = torch.rand(3, 5).cumprod(-1)
        curve = SPSCurve([1 + 0.05 * max(0, b - 4) ** 1.5 for b in range(19)])
        seconds = curve.table()
        lengths = early_stop(survival, seconds)
        assert int(lengths.sum()) == int(best_budget(survival, seconds))


def test_load_shortens_verification():
    survival = torch.tensor([[0.9, 0.7, 0.5, 0.3]])
    seconds = SPSCurve([1 + 0.02 * max(0, b - 16) for b in range(400)]).table()
    budgets = [
        float(early_stop(survival.expand(rows, -1), seconds).float().mean())
        for rows in (1, 4, 16, 64)
    ]
    assert budgets[0] == 4 and budgets[-1] < 2 and budgets == sorted(budgets, reverse=True)


def test_draft_time_in_the_price_lengthens_verification():
    survival, seconds = torch.tensor([[0.6, 0.3, 0.2]]), torch.tensor([1.0, 1.0, 1.3, 1.6, 1.9])
    assert early_stop(survival, seconds).tolist() == [1]
    assert early_stop(survival, seconds, draft_seconds=1.0).tolist()[0] > 1


def test_delayed_budgets_come_from_earlier_rounds():
    seconds = torch.tensor([1.0, 1.0, 1.1, 1.2, 1.3])
    budgets = DelayedBudgets(2, delay=2)
    sure, unsure = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0.01, 0.001, 0.0]])
    found = [int(budgets.next(a, seconds)) for a in (sure, unsure, unsure, sure)]
    assert found == [2, 2, 3, 0]
    with pytest.raises(ValueError, match="delay=0"):
        DelayedBudgets(2, delay=0)
    assert fixed(5, sure, torch.tensor([True])).tolist() == [3]


def test_the_scheduler_stays_on_the_device():
    survival, seconds = torch.rand(3, 4).cumprod(-1), torch.linspace(1, 2, 16)
    live, edges = torch.tensor([True, False, True]), torch.tensor([2, 4, 8, 15])

    def run(a):
        lengths = early_stop(a, seconds, live, edges=edges)
        return lengths, budgeted(a, best_budget(a, seconds, live), live)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for a, b in zip(run(survival), compiled(survival)):
        assert a.tolist() == b.tolist()


# -- prices


def test_curves_join_model_and_measurements():
    curve = SPSCurve([0.0] + [1.0 + 0.1 * b for b in range(1, 9)], {2: 2.4, 8: 1.8})
    assert curve.seconds(2) == pytest.approx(2.4) and curve.seconds(8) == pytest.approx(1.8)
    assert curve.seconds(1) == pytest.approx(2.2)  # the ratio of the nearest measurement
    assert 1.4 < curve.seconds(5) / 1.5 * 1.5 < 2.4
    assert curve(2) == pytest.approx(1 / 2.4)
    curve.update(2, 1.2, share=0.5)
    assert curve.seconds(2) == pytest.approx(1.8)
    edged = SPSCurve([0.0] + [float(b) for b in range(1, 9)], edges=[2, 4, 8])
    assert [edged.seconds(b) for b in (1, 2, 3, 5, 8)] == [2, 2, 4, 8, 8]
    table = edged.table()
    steps = table[2:] - table[1:-1]
    assert (steps >= 0).all() and (steps[1:] >= steps[:-1] - 1e-6).all()  # convex
    assert (table[1:] <= torch.tensor([edged.seconds(b) for b in range(1, 9)]) + 1e-6).all()
    points = SPSCurve.from_points({1: 1.0, 3: 2.0}, 5)
    assert points.seconds(2) == pytest.approx(1.5) and points.seconds(5) == pytest.approx(3.0)
    assert SPSCurve.flat(4).table().tolist() == [1.0] * 5
    for bad in ([1.0], [0.0, -1.0], [0.0, math.inf]):
        with pytest.raises(ValueError, match="positive"):
            SPSCurve(bad)
    with pytest.raises(ValueError, match="edges"):
        SPSCurve([1.0] * 4, edges=[2, 1])
    with pytest.raises(ValueError, match="positive"):
        curve.update(2, 0.0)


def test_curve_of_the_cost_model():
    transformers = pytest.importorskip("transformers")
    from dspark_compile.codegen.machine import Machine

    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    machine = Machine("made up", 1, {1: 1e9}, {1: 1e9}, 1e9, 1 << 20, {"float32": 2e10})
    curve = SPSCurve.from_model(model, 256, machine=machine)
    assert curve.seconds(2) < 1.2 * curve.seconds(1)  # weights are read once
    assert curve.seconds(256) > 3 * curve.seconds(1)  # arithmetic takes over


def test_measure_takes_the_best():
    times = iter([0, 5, 5, 7, 7, 10, 10, 11, 20, 22])
    assert measure(lambda b: None, [1, 2], clock=lambda: next(times), repeats=2) == {1: 2, 2: 1}


# -- calibration


def draws(count=20_000, k=4, sharp=3.0):
    """Over-confident logits, and accepted prefixes that follow the true ones."""
    g = torch.Generator().manual_seed(0)
    true = torch.randn(count, k, generator=g)
    passed = torch.rand(count, k, generator=g) < torch.sigmoid(true)
    return true * sharp, passed.long().cumprod(-1).sum(-1)


def test_sts_restores_calibration():
    logits, accepted = draws()
    calibration = fit(logits, accepted)
    assert calibration.temperatures[0].item() == pytest.approx(3, abs=0.9)
    # Later positions have few survivors left, so what they do to their prefix is what counts.
    assert max(calibration.after) < 0.015
    assert all(a < b / 2 for a, b in zip(calibration.after, calibration.before))
    again = Calibration.from_dict(calibration.to_dict(), 4)
    torch.testing.assert_close(again.survival(logits), calibration.survival(logits))
    assert again.observed == [20_000] * 4
    both = calibration.to_dict() | {"sampled": {"temperatures": [2.0] * 4}}
    assert Calibration.from_dict(both, 4, sampled=True).temperatures.tolist() == [2.0] * 4
    assert Calibration.from_dict(both, 4).temperatures.equal(again.temperatures)


def test_unverified_positions_are_censored():
    logits, accepted = draws()
    verified = torch.randint(0, 3, accepted.shape, generator=torch.Generator().manual_seed(1))
    seen = torch.minimum(accepted, verified)
    careful = fit(logits, seen, verified)
    assert careful.temperatures[0].item() == pytest.approx(3, abs=0.9)
    happened = accepted[:, None] > torch.arange(2)
    everything = torch.ones(len(accepted), dtype=torch.bool)

    def error(calibration):
        survival = calibration.survival(logits)
        return [
            float(expected_calibration_error(survival[:, k], happened[:, k], everything))
            for k in range(2)
        ]

    assert max(error(careful)) < 0.03
    # Taking what was not verified for rejected makes of the last position, never seen, a sure one.
    assert fit(logits, seen).temperatures[3] != 1.0
    assert 10_000 < careful.observed[0] < 20_000
    assert careful.observed[3] == 0 and careful.temperatures[3] == 1.0


def test_online_refinement():
    logits, accepted = draws(4096)
    online = OnlineCalibration(Calibration.identity(4), size=4096, least=512)
    live = torch.ones(64, dtype=torch.bool)
    assert online.refit().temperatures.tolist() == [1.0] * 4  # nothing seen
    for i in range(0, 4096, 64):
        rows = slice(i, i + 64)
        online.record(logits[rows], accepted[rows], torch.full((64,), 4), live)
    assert (online.refit().temperatures[:2] > 2).all()
    online.record(logits[:64], accepted[:64], torch.full((64,), 4), ~live)  # wraps; all dead
    assert (online.refit().temperatures[:2] > 2).all()


def test_refinement_is_rare():
    """Twice as many rounds each time, then every four rings."""
    online = OnlineCalibration(Calibration.identity(4), size=64, least=16)
    logits, accepted = draws(16)
    live, fits = torch.ones(16, dtype=torch.bool), []
    for turn in range(1, 65):
        online.record(logits, accepted, torch.full((16,), 4), live)
        if online.refine():
            fits.append(16 * turn)
    assert fits == [16, 32, 64, 128, 256, 512, 768, 1024] and online.refits == len(fits)


def test_calibration_file_errors():
    for bad in ([1.0], [1.0, -1.0], [1.0, "x"], None):
        with pytest.raises(ValueError, match="temperatures"):
            Calibration.from_dict({"temperatures": bad}, 2)
    assert Calibration.from_dict(None, 2).temperatures.tolist() == [1.0, 1.0]


def test_ece():
    predicted = torch.tensor([0.1, 0.1, 0.9, 0.9])
    happened = torch.tensor([False, False, True, False])
    everything = torch.ones(4, dtype=torch.bool)
    assert expected_calibration_error(predicted, happened, everything).item() == pytest.approx(0.25)
    first = torch.tensor([True, False, False, False])
    assert expected_calibration_error(predicted, happened, first).item() == pytest.approx(0.1)


# -- parking


def play(policy, steps, round_seconds, tau, plain_seconds):
    """Time of generating so many tokens under a policy."""
    total, tokens = 0.0, 0.0
    while tokens < steps:
        if policy.drafts():
            policy.drafted(round_seconds, tau)
            total, tokens = total + round_seconds, tokens + tau
        else:
            policy.plain(plain_seconds)
            total, tokens = total + plain_seconds, tokens + 1
    return total


def test_a_hostile_draft_costs_little():
    policy = ParkPolicy()
    play(policy, 50, 1.8, 1.0, 1.0)
    assert policy.parked
    assert play(policy, 2000, 1.8, 1.0, 1.0) / 2000 < 1.03
    assert policy.probes > 2  # it does try again


def test_a_good_draft_is_never_parked_and_a_recovered_one_comes_back():
    policy = ParkPolicy()
    assert play(policy, 1000, 1.5, 3.0, 1.0) / 1000 < 0.51
    assert policy.parked_rounds == 0
    play(policy, 300, 1.5, 1.0, 1.0)
    assert policy.parked
    play(policy, 3000, 1.5, 3.0, 1.0)
    assert not policy.parked
    assert policy.to_dict()["parked_rounds"] > 0
    for bad in ({"margin": 1.0}, {"probe_every": 0}, {"budget": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ParkPolicy(**bad)
    with pytest.raises(ValueError, match="positive"):
        policy.plain(0.0)


def test_a_draft_parked_in_a_slow_moment_comes_back():
    """What was measured before many rests is forgotten: two such moments, and then it pays."""
    policy, drafted, last = ParkPolicy(), 0, []
    for call in range(80):
        if policy.rests():
            continue
        rounds = 0
        while rounds < 60:
            steps = policy.most(4)
            if policy.drafts():
                drafted += steps
                policy.drafted(2.0 if drafted > 60 else 8.0, 3.0, steps)
            else:
                policy.plain(1.0, steps)
            rounds += steps
        policy.ended()
        last.append((call, policy.parked))
    assert last[2][1] and last[-1][0] - last[-2][0] == 1  # it rested, and no longer does
    assert not last[-1][1]


# -- n-grams


def lookup(history, count, minimum=3, longest=6):
    """The most recent of the longest matches, read off the definition."""
    n = len(history)
    for size in range(min(longest, n - 1), minimum - 1, -1):
        for end in range(n - 2, size - 2, -1):
            if history[end - size + 1 : end + 1] == history[n - size :]:
                out = list(history)
                for i in range(count):
                    out.append(out[end + 1 + i])
                return out[n:], count, size
    return None, 0, 0


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_ngram_lookup(histories, count, minimum):
    longest = max(map(len, histories)) + 2
    table = torch.full((len(histories), longest), 1)
    for row, history in enumerate(histories):
        table[row, : len(history)] = torch.tensor(history)
    lengths = torch.tensor([len(h) for h in histories])
    tokens, found, match = ngram.propose(table, lengths, count, minimum=minimum)
    for row, history in enumerate(histories):
        want, many, size = lookup(history, count, minimum)
        assert (int(found[row]), int(match[row])) == (many, size)
        if many:
            assert tokens[row].tolist() == want


def test_ngram_bounds():
    with pytest.raises(ValueError, match="minimum=4"):
        ngram.propose(torch.zeros(1, 4).long(), torch.tensor([4]), 2, minimum=4, longest=3)


# -- telemetry


def test_counters():
    counters = Counters(3)
    counters.record(
        torch.tensor([2, 0, 3]), torch.tensor([3, 1, 4]), torch.tensor([2, 3, 3]),
        torch.tensor([True, True, False]), torch.full((3, 3), 0.5),
    )  # fmt: skip
    stats = SpeculationStats.read(counters, proposer="draft")
    assert (stats.rounds, stats.committed, stats.drafted, stats.accepted) == (2, 4, 5, 2)
    assert stats.tau == 2.0 and stats.verify_lengths == [0, 0, 1, 1]
    assert stats.conditional == [0.5, 1.0, 0.0]
    assert stats.survival == [0.5, 0.5, 0.0]  # position 3 of row 0 was never verified
    assert stats.to_dict()["acceptance_rate"] == pytest.approx(0.4)
    for _ in range(40):
        counters.record(
            torch.zeros(3).long(), torch.ones(3).long(), torch.full((3,), 3),
            torch.ones(3, dtype=torch.bool),
        )  # fmt: skip
    assert "tokenizer" in SpeculationStats.read(counters).notes[0]


def test_calls_rest_where_the_last_ended_parked():
    policy = ParkPolicy(least=1)
    taken = []
    for _ in range(30):
        if policy.rests():
            taken.append(0)
            continue
        taken.append(1)
        policy.drafted(3.0, 1.0, 40)
        policy.plain(1.0)
        policy.ended()
    starts = [i for i, x in enumerate(taken) if x]
    assert starts == [0, 2, 5, 10, 19]  # 1, 2, 4, 8 calls rest in between
    while policy.rests():
        pass
    for _ in range(40):
        policy.drafted(1.0, 3.0)
    policy.ended()
    assert not policy.parked
    assert not policy.rests()


def test_a_few_bad_rounds_do_not_let_calls_rest():
    policy = ParkPolicy()
    for _ in range(12):
        policy.drafted(3.0, 1.0)
    policy.plain(1.0)
    policy.ended()
    assert policy.parked and not policy.rests()
    policy.drafted(3.0, 1.0, 40)
    policy.ended()
    assert policy.rests()


def test_a_hiccup_does_not_park():
    policy = ParkPolicy()
    for _ in range(8):
        policy.drafted(1.8, 2.0)
        policy.plain(1.0)
    policy.drafted(100.0, 2.0, 8)
    assert policy.price < 2.5


def test_the_first_rounds_of_cold_programs_do_not_park():
    policy = ParkPolicy()
    for seconds in (3.0, 1.0, 1.0):  # visits of four rounds
        assert policy.drafts()
        policy.drafted(seconds, 1.2, 4)
    policy.plain(1.0, 4)
    assert not policy.parked and policy.drafts()


def test_what_rounds_do_not_show_counts():
    """Rows of a batch wait for the slowest: rounds that look 1.3 times as fast do not pay."""
    policies = ParkPolicy(), ParkPolicy(burden=1.5)
    for policy in policies:
        policy.drafted(1.0, 1.3, 12)
        policy.drafted(1.0, 1.3, 12)
        policy.drafted(1.0, 1.3, 12)
        policy.plain(1.0, 4)
    assert [p.parked for p in policies] == [False, True]
    # A call of 40 such rounds in which every row got 50 tokens: none waited, and nothing else took
    # time. Calls like it bring drafting back; few rounds say nothing.
    policy = policies[1]
    policy.took(3, 1.3, 1, 9.0)
    assert policy.burden == 1.5
    for _ in range(8):
        policy.took(40, 1.3, 50, 1.0)
    policy.drafted(1.0, 1.3, 4)
    assert not policy.parked
    policy.took(40, 1.3, 26, 1.1)  # the slowest row got half of the average
    assert policy.burden > 1.3


class Guessed:
    """Rounds of a draft without confidences, whose every token stands with probability ``alpha``:
    steps of n tokens take ``table[n]``, drafting takes ``draft``, both in plain steps."""

    def __init__(self, policy, draft, table, known=None):
        self.policy, self.draft, self.table = policy, draft, table
        self.most = len(table) - 2
        self.known = known or [FIRST_GUESS] * self.most
        self.random = random.Random(0)

    def _round(self, alpha, looks):
        survival = list(itertools.accumulate(self.known, float.__mul__))
        length = self.most
        if not looks:
            length = verify_length([survival], self.table, self.draft, self.most)
        stood = 0
        while stood < length and self.random.random() < alpha:
            stood += 1
        for k in range(min(stood + 1, length)):
            self.known[k] += SHARE * ((stood > k) - self.known[k])
        return self.draft + self.table[length + 1], stood + 1

    def play(self, tokens, alpha, single=False):
        """Plain steps' time that a token takes."""
        policy, spent, made = self.policy, 0.0, 0
        while made < tokens:
            count = 1 if single else policy.most(4)
            if policy.drafts():
                rounds = [self._round(alpha, policy.looks) for _ in range(count)]
                seconds, got = sum(s for s, _ in rounds), sum(n for _, n in rounds)
                policy.drafted(seconds / count, got / count, count)
            else:
                policy.plain(1.0, count)
                seconds, got = count, count
            spent, made = spent + seconds, made + got
        return spent / made


@pytest.mark.parametrize("single", [False, True], ids=["visits", "rounds"])
@pytest.mark.parametrize("draft", [0.2, 1.0])
@pytest.mark.parametrize("step", [0.05, 0.2])
def test_a_draft_without_confidences_is_looked_at_again(single, draft, step):
    """What is learned from verified rounds alone is not what nothing is verified for: it costs
    little where it does not pay, and is drafted again where it does."""
    table = [1.0, 1.0, *(1 + step * k for k in range(1, 6))]
    world = Guessed(ParkPolicy(guesses=True), draft, table)
    world.play(300, 0.02, single)
    assert world.policy.parked
    assert world.play(6000, 0.02, single) < 1.03
    assert world.policy.parked and world.known[0] < 0.3
    world.play(1500, 0.9, single)
    assert not world.policy.parked
    assert world.play(2000, 0.9, single) < 0.7
    assert min(world.known) > 0.6
    # A policy that takes what it guesses for sure never verifies again, nor comes back.
    blind = Guessed(ParkPolicy(), draft, table, [0.01] * 5)
    assert blind.play(4000, 0.9, single) > 1.0 and max(blind.known) < 0.02
    # A good draft whose deeper tokens were bad once: they are tried again without parking.
    world = Guessed(ParkPolicy(guesses=True), 0.2, table, [0.9, 0.9, 0.02, 0.02, 0.02])
    world.play(4000, 0.9, single)
    assert min(world.known) > 0.6 and not world.policy.parked


def test_what_calls_without_the_draft_forget_is_looked_at():
    policy = ParkPolicy(guesses=True, least=1)
    assert policy.looks and policy.most(4) == 6
    for _ in range(5):
        while policy.rests():
            pass
        assert policy.looks
        while policy.looks:
            policy.drafted(3.0, 1.0, policy.most(4))
        policy.drafted(2.0, 1.0, 40)
        policy.plain(1.0)
        policy.ended()
        assert policy.parked
    assert not ParkPolicy().looks
