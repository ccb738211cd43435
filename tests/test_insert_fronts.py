"""Rows in front of the tokens' (soft prompts, registers, prefixes of keys): made once, before the
first token, and kept in the caches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.passes.incremental import NotIncremental
from dspark_compile.runtime import room
from dspark_compile.runtime.rounds import Rounds
from tests.test_insert_cache import greedy, prompt
from tests.test_insert_shifts import (
    HEADS,
    MASKS,
    NATIVE,
    PREFIX,
    SIZE,
    STRICT,
    WIDTH,
    Prefixed,
    Shifting,
    check,
)


class Soft(Shifting):
    """Learned vectors in front of the text, which run through every layer; ``shifts`` between."""

    def __init__(self, shifts=True, mask=None):
        super().__init__(soft=nn.Embedding(PREFIX, WIDTH), positions=nn.Embedding(400, WIDTH))
        self.shifts, self.mask = shifts, mask

    def forward(self, ids):
        x = torch.cat([self.soft.weight.expand(len(ids), -1, -1), self.embed(ids)], 1)
        x = x + self.positions.weight[: x.shape[1]]
        for _ in range(2):
            if self.shifts:
                x = x + 0.5 * F.pad(x.sin(), (0, 0, 1, -1))
            q, k, v = (
                y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)
            )
            mask = None if self.mask is None else self.mask(x.shape[1])
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x)[:, PREFIX:]


class Both(Prefixed):
    """A layer with a prefix of keys, and one without."""

    def forward(self, ids):
        x = self.embed(ids) + F.pad(super().forward(ids)[..., :WIDTH], (0, 0, 1, -1))
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class NullKey(Shifting):
    """A key and a value of zeros in front."""

    def forward(self, ids):
        x, s = self.embed(ids), ids.shape[1]
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = F.pad(torch.ones(s, s, dtype=torch.bool).tril(), (1, 0), value=True)
        y = F.scaled_dot_product_attention(q, *(F.pad(y, (0, 0, 1, 0)) for y in (k, v)), mask)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


KINDS = {
    "soft": lambda: Soft(False),
    "shifts": Soft,
    "prefix": lambda: Prefixed(MASKS["joined"]),
    "both": lambda: Both(MASKS["positions"]),
    "null": NullKey,
}


@pytest.mark.parametrize("name", KINDS)
def test_native(name):
    check(KINDS[name](), options=NATIVE, path="native")


@pytest.mark.parametrize("name", ["shifts", "both"])
def test_caches_grow(name, monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 8)
    monkeypatch.setattr(Rounds, "expect", lambda self, tokens: None)
    check(KINDS[name](), new=40)


@pytest.mark.parametrize("name", [pytest.param("shifts", marks=pytest.mark.slow), "prefix"])
def test_speculation(name):
    model, ids = KINDS[name](), prompt(1, 8).repeat(1, 2)
    given = {"max_new_tokens": 48, "options": NATIVE, "draft": "ngram"}
    got = dspark_compile.generate(model, ids, **given)
    assert last_generation().path == "native", last_generation().notes
    assert torch.equal(got, greedy(model, ids, 48))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Soft(mask=lambda s: torch.ones(s, s, dtype=torch.bool).tril(1)), r"k <= q \+ 1"),
        (lambda: Prefixed(MASKS["later"]), r"k <= q \+ 4"),
    ],
)
def test_refused(make, says):
    with pytest.raises(NotIncremental, match=says):
        dspark_compile.generate(make(), prompt(), max_new_tokens=4, options=STRICT)


def test_a_length_that_the_module_does_not_take():
    """What it does with one token is an error: longer texts are decoded all the same."""
    model = Shifting(lambda m, ids, x: x + F.pad(x, (0, 0, 2, -2)))
    with pytest.raises(RuntimeError):
        model(prompt(1, 1))
    check(model, lengths=(6, 2))


@pytest.mark.slow
def test_long_texts():
    for name in ("shifts", "both"):
        check(KINDS[name](), new=320, options=NATIVE, path="native", lengths=(2,))
