"""Models without a cache in other spellings: each is decoded token by token, or refused rightly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.passes.incremental import NotIncremental
from tests.test_insert_cache import QUICK, greedy, prompt, sharpen

VOCAB, WIDTH, HEADS, SIZE = 90, 32, 4, 8


class ParallelAlibi(nn.Module):
    """Attention and MLP side by side on one norm, one matrix for all of their inputs, and ALiBi as
    a bias that is made from relative positions of the sequence at hand."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(layers + 1))
        self.into = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH + 96) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH + 48, WIDTH) for _ in range(layers))
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
        self.register_buffer("slopes", slopes[None, :, None, None])

    def forward(self, ids):
        t = ids.shape[1]
        at = torch.arange(t, device=ids.device)
        distance = (at[None, :] - at[:, None]).clamp(max=0)
        future = torch.full((t, t), float("-inf"), device=ids.device).triu(1)
        bias = self.slopes * distance + future
        x = self.embed(ids)
        for norm, into, out in zip(self.norms, self.into, self.out, strict=False):
            q, k, v, gate, up = into(norm(x)).split([WIDTH, WIDTH, WIDTH, 48, 48], dim=-1)
            q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = x + out(torch.cat((y.transpose(1, 2).flatten(2), F.silu(gate) * up), -1))
        return self.norms[-1](x) @ self.embed.weight.T


class LearnedMultiQuery(nn.Module):
    """Learned positions, one key and value head for all queries, einsum attention, a soft cap."""

    def __init__(self, layers: int = 2, positions: int = 80) -> None:
        super().__init__()
        self.tokens, self.at = nn.Embedding(VOCAB, WIDTH), nn.Embedding(positions, WIDTH)
        self.q = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.kv = nn.ModuleList(nn.Linear(WIDTH, 2 * SIZE) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
            for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        t = ids.shape[1]
        x = self.tokens(ids) + self.at.weight[:t]
        allowed = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        for q, kv, out, mlp in zip(self.q, self.kv, self.out, self.mlp, strict=True):
            queries = q(x).unflatten(-1, (HEADS, SIZE))
            k, v = kv(x).chunk(2, -1)
            scores = torch.einsum("bqhd,bkd->bhqk", queries, k) / math.sqrt(SIZE)
            scores = 20 * torch.tanh(scores / 20)
            p = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            x = x + out(torch.einsum("bhqk,bkd->bqhd", p, v).flatten(2))
            x = x + mlp(x)
        return self.head(self.norm(x))


class BothWays(LearnedMultiQuery):
    """Its second layer sees the whole sequence."""

    def forward(self, ids):
        t = ids.shape[1]
        x = self.tokens(ids) + self.at.weight[:t]
        allowed = torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()
        for i in range(2):
            queries = self.q[i](x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            k, v = (y[:, None] for y in self.kv[i](x).chunk(2, -1))
            y = F.scaled_dot_product_attention(
                queries, k.expand_as(queries), v.expand_as(queries),
                attn_mask=allowed if i == 0 else None,
            )  # fmt: skip
            x = x + self.out[i](y.transpose(1, 2).flatten(2))
        return self.head(self.norm(x))


@pytest.mark.parametrize("kind", [ParallelAlibi, LearnedMultiQuery])
@torch.no_grad()
def test_decoded_token_by_token(kind):
    model = sharpen(kind())
    ids = prompt(2)
    got = dspark_compile.generate(model, ids, max_new_tokens=40, options=QUICK)
    assert last_generation().path == "compiled", last_generation().notes
    assert torch.equal(got, greedy(model, ids, 40))


def test_a_table_of_positions_is_a_limit():
    model = sharpen(LearnedMultiQuery())
    with pytest.raises(ValueError, match="tables for 80 positions"):
        dspark_compile.generate(model, prompt(), max_new_tokens=75, options=QUICK)


def test_a_layer_that_looks_ahead_is_refused():
    with pytest.raises(NotIncremental, match=r"attention.*(later|causal|mask)"):
        dspark_compile.generate(sharpen(BothWays()), prompt(), max_new_tokens=4, options=QUICK)
