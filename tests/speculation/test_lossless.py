"""Speculation at temperature 1 does not change what is sampled.

Chi-square tests on toy vocabularies, and the counterexample that a careless scheduler fails.
"""

from __future__ import annotations

import pytest
import torch

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftConfig
from dspark_compile.ops.token import draw
from dspark_compile.runtime.speculation import ngram
from dspark_compile.runtime.speculation.accept import commit, distribution, rejection
from dspark_compile.runtime.speculation.schedule import (
    DelayedBudgets,
    best_budget,
    budgeted,
    early_stop,
)
from dspark_compile.runtime.token_choice import TokenChoice

V, K, TOKENS, REQUESTS = 4, 3, 3, 24_000
PLAIN = TokenChoice(sample=True)


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square test; cells that cannot occur must not."""
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    expected = expected / expected.sum() * counts.sum()
    assert expected.min() > 5, "too few samples for this test"
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2.0), statistic / 2))


def toy_draft(head: str) -> DraftModel:
    draft = DraftModel(
        DraftConfig(
            vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, mask_token_id=0,
            target_layer_ids=(0,), num_target_layers=3, block_size=K,
            markov_rank=0 if head == "none" else 3,
            markov_head_type="vanilla" if head == "none" else head,
            enable_confidence_head=True, confidence_head_with_markov=head != "none",
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        )
    )  # fmt: skip
    torch.manual_seed(5)
    draft.embed_tokens, draft.lm_head = torch.nn.Embedding(V, 8), torch.nn.Linear(8, V, False)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.normal_(std=0.7)
    return draft


def target_logits() -> torch.Tensor:
    """``[V, V, V]``: of the next token behind any two."""
    return torch.randn(V, V, V, generator=torch.Generator().manual_seed(1)) * 0.8


def exact(first: int, second: int, probs: torch.Tensor) -> torch.Tensor:
    """The joint distribution of TOKENS tokens behind two given ones, flat."""
    joint = torch.ones(1)
    states = [(first, second)]
    for _ in range(TOKENS):
        joint = torch.cat([j * probs[s] for j, s in zip(joint, states)])
        states = [(b, x) for _, b in states for x in range(V)]
    return joint


SECONDS = torch.tensor([1.0, 1.0, 1.35, 1.6, 1.75, 1.85, 1.9, 1.95, 2.0])


def schedule(kind: str, survival: torch.Tensor) -> torch.Tensor:
    """Verify lengths of all requests, scheduled two by two where a scheduler is asked for."""
    if kind == "off":
        return torch.full((len(survival),), K)
    pairs = survival.view(-1, 2, K)
    live = torch.ones(2, dtype=torch.bool)
    edges = torch.tensor([2, 4, 8]) if kind == "edges" else None
    one = lambda a: early_stop(a, SECONDS, live, draft_seconds=0.2, edges=edges)  # noqa: E731
    return torch.vmap(one)(pairs).flatten()


@torch.no_grad()
@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("vanilla", "off"),
        ("gated", "edges"),
        ("rnn", "early stop"),
        *(
            pytest.param(head, kind, marks=pytest.mark.slow)
            for head in ("vanilla", "gated", "rnn", "none")
            for kind in ("off", "early stop", "edges")
        ),
    ],
)
def test_draft_heads(head, kind):
    """The first tokens of many requests are distributed as the target's, exactly."""
    draft, logits = toy_draft(head), target_logits()
    generator = torch.Generator().manual_seed(11)
    probs = distribution(logits, PLAIN)
    ids = torch.zeros(REQUESTS, 2 + TOKENS + K + 1, dtype=torch.long)
    ids[:, 0], ids[:, 1] = 2, 1
    lengths = torch.full((REQUESTS,), 2)
    cache = draft.new_cache(REQUESTS, 24)
    draft.append(cache, torch.ones(REQUESTS, 1, 8), 1)
    rows = torch.arange(REQUESTS)
    verified = []
    while int(lengths.min()) < 2 + TOKENS:
        anchor, before = ids[rows, lengths - 1], ids[rows, lengths - 2]
        table = []

        def choose(step_logits, k, chosen, table=table):
            table.append(distribution(step_logits, PLAIN))
            return draw(table[-1], torch.rand(REQUESTS, generator=generator))

        tokens, _, confidence = draft.propose(anchor, cache, choose)
        survival = torch.sigmoid(confidence).cumprod(-1)
        verify = schedule(kind, survival)
        verified.append(verify)
        along = torch.cat((before[:, None], anchor[:, None], tokens), dim=1)
        theirs = probs[along[:, :-1], along[:, 1:]]
        uniform = torch.rand(REQUESTS, K + 1, generator=generator)
        accepted, following = rejection(tokens, torch.stack(table, 1), theirs, verify, uniform)
        done = commit(tokens, accepted, following)
        room = done.counts.clamp(max=ids.shape[1] - 1 - int(lengths.max()))
        active = lengths < 2 + TOKENS
        for k in range(K + 1):
            put = active & (k < room)
            ids[rows[put], lengths[put] + k] = done.tokens[put, k]
        counts = torch.where(active, room, 0)
        # The draft's context: any function of what was committed will do.
        taps = torch.nn.functional.one_hot(done.tokens, 8).float()
        draft.append(cache, taps, counts)
        lengths = lengths + counts
    flat = ids[:, 2 : 2 + TOKENS] @ torch.tensor([V**2, V, 1])
    counts = torch.bincount(flat, minlength=V**TOKENS).float()
    assert p_value(counts, exact(2, 1, probs)) > 0.01
    if kind != "off":
        assert len(torch.cat(verified).unique()) > 2  # the scheduler had something to decide


@torch.no_grad()
@pytest.mark.parametrize(
    "choice",
    [
        TokenChoice(sample=True, temperature=0.6),
        TokenChoice(sample=True, temperature=1.5, top_k=3),
        TokenChoice(sample=True, top_p=0.8),
        TokenChoice(sample=True, min_p=0.2, penalty=1.5),
    ],
    ids=["temperature", "top-k", "top-p", "min-p and penalty"],
)
@pytest.mark.parametrize("point", [False, True], ids=["sampled", "point mass"])
def test_processed_logits(choice, point):
    """Processing is applied to both sides; point masses are lossless too."""
    generator = torch.Generator().manual_seed(3)
    vocabulary, count = 6, 40_000
    logits_t, logits_d = torch.randn(2, vocabulary, generator=generator) * 1.5
    seen = torch.arange(vocabulary) < 2
    target = distribution(logits_t, choice, seen)
    own = distribution(logits_d, choice, seen)
    if point:
        drafted, own_probs = torch.full((count, 1), int(own.argmax())), None
    else:
        drafted = torch.multinomial(own.expand(count, -1), 1, generator=generator)
        own_probs = own.expand(count, 1, -1)
    accepted, following = rejection(
        drafted, own_probs, target.expand(count, 2, -1), torch.ones(count, dtype=torch.long),
        torch.rand(count, 2, generator=generator),
    )  # fmt: skip
    first = torch.where(accepted > 0, drafted[:, 0], following)
    counts = torch.bincount(first, minlength=vocabulary).float()
    assert p_value(counts, target) > 0.01


@torch.no_grad()
def test_ngram_proposals():
    """Proposals that depend on the history alone, verified as point masses."""
    generator = torch.Generator().manual_seed(9)
    probs = distribution(target_logits(), PLAIN)
    history = torch.tensor([2, 1, 3, 0, 2, 1, 3, 0, 2, 1]).expand(REQUESTS, -1)
    tokens, found, _ = ngram.propose(history, torch.full((REQUESTS,), 10), K)
    assert tokens[0].tolist() == [3, 0, 2] and (found == K).all()
    along = torch.cat((history[:, -2:], tokens), dim=1)
    accepted, following = rejection(
        tokens, None, probs[along[:, :-1], along[:, 1:]], found,
        torch.rand(REQUESTS, K + 1, generator=generator),
    )  # fmt: skip
    first = commit(tokens, accepted, following).tokens[:, 0]
    assert p_value(torch.bincount(first, minlength=V).float(), probs[2, 1]) > 0.01


# Appendix A: p_t = (0.7, 0.3), p_d = (0.5, 0.5) for the first token. Verifying one token is not
# worth its price, verifying two is, but only if the second is as good as certain, and how sure the
# draft is of the second depends on the first. A scheduler that looks for the best number verifies A
# and never B.
PRICES = torch.tensor([1.0, 1.0, 1.9, 1.95])


def appendix_a(lengths_of) -> float:
    """The share of A among the first tokens of many requests."""
    generator = torch.Generator().manual_seed(2)
    count = 40_000
    drafted = torch.randint(0, 2, (count, 2), generator=generator)
    survival = torch.tensor([[0.8, 0.8], [0.8, 0.0]])[drafted[:, 0]]  # after A, after B
    verify = lengths_of(survival)
    target = torch.tensor([0.7, 0.3]).expand(count, 3, 2)
    own = torch.full((count, 2, 2), 0.5)
    uniform = torch.rand(count, 3, generator=generator)
    accepted, following = rejection(drafted, own, target, verify, uniform)
    first = torch.where(accepted > 0, drafted[:, 0], following)
    return float((first == 0).float().mean())


def each(schedule_one):
    """Schedule requests one by one."""
    return lambda survival: torch.vmap(schedule_one)(survival[:, None]).flatten()


def test_appendix_a_the_naive_search_leaks():
    naive = each(lambda a: budgeted(a, best_budget(a, PRICES)))
    assert abs(appendix_a(naive) - 0.85) < 0.01


@pytest.mark.parametrize("name", ["early stop", "smoothed", "edges", "delayed"])
def test_appendix_a_ours_do_not(name):
    if name == "delayed":

        def ours(survival):
            # Two rounds in a row of the same requests: the budget is older than the tokens.
            budgets = DelayedBudgets(2, delay=2)
            live = torch.ones(1, dtype=torch.bool)
            out = []
            for a in survival[:4000, None]:
                out.append(budgeted(a, budgets.next(a, PRICES, live)))
            return torch.cat([*out, torch.full((len(survival) - 4000,), 2)])

        assert abs(appendix_a(ours) - 0.7) < 0.01
        return
    seconds, edges = PRICES, None
    if name == "smoothed":
        from dspark_compile.runtime.speculation.sps import SPSCurve

        seconds = SPSCurve(PRICES.tolist()).table()
        assert seconds[2] < PRICES[2]
    if name == "edges":
        edges = torch.tensor([1, 3])
        seconds = torch.tensor([1.0, 1.0, 1.4, 1.8])
    ours = each(lambda a: early_stop(a, seconds, edges=edges))
    assert abs(appendix_a(ours) - 0.7) < 0.01
