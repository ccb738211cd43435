"""Verification as tensor functions: against a request-by-request reading, for ragged shapes."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from dspark_compile.ops.token import draw
from dspark_compile.runtime.speculation.accept import (
    commit,
    distribution,
    greedy,
    rejection,
    residual,
    seen_along,
)
from dspark_compile.runtime.token_choice import TokenChoice


@st.composite
def rounds(draw_):
    """Drafted tokens, target choices, verify lengths, ends."""
    rows = draw_(st.integers(1, 5))
    count = draw_(st.integers(0, 6))
    small = st.integers(0, 3)
    drafted = [[draw_(small) for _ in range(count)] for _ in range(rows)]
    choice = [[draw_(small) for _ in range(count + 1)] for _ in range(rows)]
    lengths = [draw_(st.integers(0, count)) for _ in range(rows)]
    ends = draw_(st.lists(st.integers(0, 5), max_size=2, unique=True))
    return (
        torch.tensor(drafted).view(rows, count).long(),
        torch.tensor(choice).view(rows, count + 1),
        torch.tensor(lengths),
        ends,
    )


@settings(max_examples=150, deadline=None)
@given(rounds())
def test_greedy_and_commit(case):
    drafted, choice, lengths, ends = case
    accepted, following = greedy(drafted, choice, lengths)
    done = commit(drafted, accepted, following, ends)
    for row in range(len(drafted)):
        out = []
        for k in range(int(lengths[row])):
            if drafted[row, k] != choice[row, k]:
                break
            out.append(int(drafted[row, k]))
        assert int(accepted[row]) == len(out)
        out.append(int(choice[row, len(out)]))
        stop = next((i for i, token in enumerate(out) if token in ends), None)
        out = out if stop is None else out[: stop + 1]
        assert done.tokens[row, : done.counts[row]].tolist() == out
        assert int(done.anchor[row]) == out[-1]
        assert bool(done.ended[row]) == (stop is not None)
        assert int(done.accepted[row]) <= int(done.counts[row])


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.integers(0, 5), st.integers(2, 7), st.booleans(), st.integers(0, 2**31)
)
def test_rejection(rows, count, vocabulary, point, seed):
    g = torch.Generator().manual_seed(seed)
    drafted = torch.randint(0, vocabulary, (rows, count), generator=g)
    target = torch.softmax(2 * torch.randn(rows, count + 1, vocabulary, generator=g), -1)
    own = torch.softmax(2 * torch.randn(rows, count, vocabulary, generator=g), -1)
    own = None if point else own
    lengths = torch.randint(0, count + 1, (rows,), generator=g)
    uniform = torch.rand(rows, count + 1, generator=g)
    accepted, following = rejection(drafted, own, target, lengths, uniform)
    for row in range(rows):
        n = 0
        while n < lengths[row]:
            x = int(drafted[row, n])
            p_d = 1.0 if own is None else float(own[row, n, x])
            if float(uniform[row, n]) >= min(1.0, float(target[row, n, x]) / p_d):
                break
            n += 1
        assert int(accepted[row]) == n
        want = target[row, n].clone()
        if n < lengths[row]:
            if own is None:
                want[drafted[row, n]] = 0
            else:
                want = (want - own[row, n]).clamp(min=0)
            if want.sum() <= 1e-8:
                want = target[row, n]
        got = residual(drafted, own, target, lengths, accepted)[row]
        torch.testing.assert_close(got, want)
        assert want[int(following[row])] > 0


def test_equal_distributions_accept_everything():
    p = torch.softmax(torch.randn(2, 4, 5), -1)
    drafted = torch.randint(0, 5, (2, 3))
    uniform = torch.full((2, 4), 1 - 2**-24)
    accepted, _ = rejection(drafted, p[:, :3], p, torch.tensor([3, 2]), uniform)
    assert accepted.tolist() == [3, 2]
    # Even if rounding rejects, the vanished residual falls back to the target's distribution.
    rest = residual(drafted, p[:, :3], p, torch.tensor([3, 3]), torch.tensor([1, 0]))
    torch.testing.assert_close(rest, torch.stack((p[0, 1], p[1, 0])))


def test_a_token_the_target_forbids_is_never_accepted():
    target = torch.tensor([0.0, 1.0]).expand(1000, 2, 2)
    drafted = torch.zeros(1000, 1, dtype=torch.long)
    for own in (None, torch.tensor([0.5, 0.5]).expand(1000, 1, 2)):
        accepted, following = rejection(
            drafted, own, target, torch.ones(1000, dtype=torch.long), torch.rand(1000, 2)
        )
        assert not accepted.any() and (following == 1).all()


def test_draw_never_lands_on_zero_weight():
    weights = torch.tensor([[0.0, 0.3, 0.0, 1e-9, 0.0]]).expand(3, -1)
    tokens = draw(weights, torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert set(tokens.tolist()) <= {1, 3}


def test_seen_along_is_what_came_before():
    seen = torch.zeros(2, 6, dtype=torch.bool)
    seen[0, 1] = True
    marks = seen_along(seen, torch.tensor([[2, 2, 5], [0, 3, 4]]))
    found = [[set(m.nonzero().flatten().tolist()) for m in row] for row in marks]
    assert found == [[{1}, {1, 2}, {1, 2}, {1, 2, 5}], [set(), {0}, {0, 3}, {0, 3, 4}]]


def test_distribution_is_transformers():
    import pytest

    transformers = pytest.importorskip("transformers")
    choice = TokenChoice(True, temperature=0.7, top_k=9, top_p=0.8, min_p=0.05, penalty=1.3)
    logits, ids = torch.randn(3, 20) * 2, torch.randint(0, 20, (3, 5))
    processors = transformers.LogitsProcessorList(
        [
            transformers.RepetitionPenaltyLogitsProcessor(1.3),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(9),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.05),
        ]
    )
    want = processors(ids, logits.clone()).softmax(-1)
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, ids, True)
    torch.testing.assert_close(distribution(logits, choice, seen), want)


def test_nothing_reaches_the_host():
    def one_round(drafted, own, target, lengths, uniform):
        accepted, following = rejection(drafted, own, target, lengths, uniform)
        done = commit(drafted, accepted, following, torch.tensor([3]))
        return done.tokens, done.counts, done.anchor, done.ended

    p = torch.softmax(torch.randn(2, 4, 5), -1)
    inputs = (torch.randint(0, 5, (2, 3)), p[:, 1:], p, torch.tensor([3, 1]), torch.rand(2, 4))
    compiled = torch.compile(one_round, backend="eager", fullgraph=True)
    for a, b in zip(one_round(*inputs), compiled(*inputs)):
        torch.testing.assert_close(a, b)
