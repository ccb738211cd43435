"""Weights over the sequence that are no attention: a cache where later tokens count for nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.passes.incremental import NotIncremental
from tests.test_insert_cache import QUICK, STRICT, greedy, sharpen

HEADS, SIZE = 2, 8
WIDTH, VOCAB = HEADS * SIZE, 61


class Decoder(nn.Module):
    """Two layers; ``weigh(scores [B, H, S, S], at [S])`` gives the weights of the values."""

    def __init__(self, weigh) -> None:
        super().__init__()
        self.embed, self.weigh = nn.Embedding(VOCAB, WIDTH), weigh
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        x, at = self.embed(ids), torch.arange(ids.shape[1])
        for qkv in self.qkv:
            h = nn.functional.rms_norm(x, (WIDTH,))
            q, k, v = qkv(h).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
            y = self.weigh(q @ k.transpose(-1, -2) * SIZE**-0.5, at) @ v
            x = x + y.transpose(1, 2).flatten(2)
        return self.head(x)


def later(at):
    return at[None] > at[:, None]


def softmax(scores, at):
    return scores.masked_fill(later(at), -torch.inf).softmax(-1)


def retention(scores, at):
    """RetNet's parallel form: a decay for each head, 0 above the diagonal."""
    decay = torch.tensor([0.9, 0.7])[:, None, None] ** (at[:, None] - at[None]).clamp(min=0)
    return scores * torch.where(later(at), 0.0, decay)


def divided(scores, at):
    weights = torch.relu(scores).pow(2) * ~later(at)
    return weights / (weights.sum(-1, keepdim=True) + 1e-3)


def by_hand(scores, at):
    scores = scores.masked_fill(later(at), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) * 0.5 + weights.tril() * 0.1


def where_later(scores, at):
    return torch.where(later(at), torch.zeros_like(scores), scores.sigmoid())


GOOD = {
    "difference": lambda s, at: softmax(s, at) - 0.4 * softmax(2 * s, at),
    "sigmoid": lambda s, at: (s - 1).sigmoid().masked_fill(later(at), 0.0),
    "sigmoid of -inf": lambda s, at: s.masked_fill(later(at), -torch.inf).sigmoid(),
    "retention": retention,
    "divided": divided,
    "by hand": by_hand,
    "where": where_later,
}


@pytest.mark.parametrize("name", GOOD)
@torch.no_grad()
def test_weights_of_later_tokens_are_zero(name):
    model = sharpen(Decoder(GOOD[name]))
    for rows, length in ((1, 1), (2, 7)):
        ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
        got = dspark_compile.generate(model, ids, max_new_tokens=20, options=STRICT)
        assert torch.equal(got, greedy(model, ids, 20))
        assert last_generation().path == "compiled", last_generation().notes


BAD = {
    "no mask": (lambda s, at: s.softmax(-1) - 0.1 * s, "sum"),
    "one ahead": (lambda s, at: s.sigmoid() * (at[None] <= at[:, None] + 1), "weights of later"),
    "a part of it": (lambda s, at: softmax(s, at) - 0.1 * s.sigmoid(), "weights of later"),
    "a finite mask": (lambda s, at: (s - 30 * later(at)).sigmoid(), "weights of later"),
    "sum of all": (lambda s, at: softmax(s, at) * s.sum(-1, keepdim=True), "along the sequence"),
}


@pytest.mark.parametrize("name", BAD)
@torch.no_grad()
def test_later_tokens_count(name):
    weigh, says = BAD[name]
    model, ids = sharpen(Decoder(weigh)), torch.randint(0, VOCAB, (1, 5))
    with pytest.raises(NotIncremental, match=says):
        dspark_compile.generate(model, ids, max_new_tokens=4, options=STRICT)
    got = dspark_compile.generate(model, ids, max_new_tokens=8, options=QUICK)
    assert torch.equal(got, greedy(model, ids, 8)) and last_generation().path == "recomputed"
