"""Habits of callers, and of those who write decoders, that once gave something else than eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.diagnostics.state import last_report
from dspark_compile.passes.incremental_core import NotIncremental
from dspark_compile.runtime.generate import free
from tests.test_generate import prompt, qwen

QUICK = {"inner": "eager"}
HEADS, SIZE = 2, 8


class Decoder(nn.Module):
    """One layer of attention; ``turn`` rotates queries and keys, ``start`` makes the first hidden
    state of tokens and their embedding."""

    def __init__(self, turn=lambda x: x, start=lambda ids, x: x):
        super().__init__()
        torch.manual_seed(3)
        width = HEADS * SIZE
        self.embed = nn.Embedding(31, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, 31, bias=False)
        self.turn, self.start = turn, start
        for p in self.parameters():
            p.data.normal_(0, 0.7)

    def forward(self, ids):
        x = self.start(ids, self.embed(ids))
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


def greedy(model, ids, new):
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), 1)
    return ids


def angles(length, base=10000.0):
    turns = torch.outer(torch.arange(length), base ** (-torch.arange(0, SIZE, 2) / SIZE))
    return turns.cos(), turns.sin()


def rotated_pairs(x):
    """As GPT-J's kin often do it: into an empty tensor."""
    cos, sin = angles(x.shape[-2])
    out, a, b = torch.empty_like(x), x[..., ::2], x[..., 1::2]
    out[..., ::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out


def test_pairs_rotated_into_an_empty_tensor():
    model = Decoder(rotated_pairs).eval()
    options = {**QUICK, "fallback": "error", "verify": True}
    run = torch.compile(model, backend="dspark", dynamic=True, options=options)
    with torch.no_grad():
        for shape in ((2, 7), (3, 5)):
            ids = torch.randint(0, 31, shape)
            torch.testing.assert_close(run(ids), model(ids))
    report = last_report()
    report.assert_fused("rope", n=2)
    ids = torch.randint(0, 31, (2, 4))
    got = dspark_compile.generate(model, ids, max_new_tokens=20, options=QUICK)
    assert torch.equal(got, greedy(model, ids, 20))


@pytest.mark.parametrize("starts", [(0, 2), (1, 1), (0,)])
def test_writes_that_leave_a_part_are_no_concatenation(starts):
    def fill(x, a):
        out = x * 2
        for start in starts:
            out[..., start::2] = a[..., : out[..., start::2].shape[-1]]
        return out

    args = torch.randn(3, 8), torch.randn(3, 4)
    run = torch.compile(fill, backend="dspark", options={**QUICK, "verify": True})
    with torch.no_grad():
        assert torch.equal(run(*args), fill(*args))


def test_angles_that_depend_on_the_length_are_refused():
    """Keys that were rotated by another base are other keys."""

    def turn(x):
        cos, sin = angles(x.shape[-2], 10000.0 * (2 * x.shape[-2] / 8) ** (4 / 3))
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    with pytest.raises(NotIncremental, match="depends on the length of the sequence"):
        dspark_compile.generate(Decoder(turn).eval(), prompt() % 31, max_new_tokens=4)


def test_generate_under_autocast():
    """A program is kept from call to call: none is made, or used, in the precision of autocast."""
    model = qwen()
    given = {"do_sample": False, "max_new_tokens": 8}
    ours = {**given, "custom_generate": dspark_compile.generate, "options": QUICK}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.generate(prompt(), **ours), model.generate(prompt(), **given))
        assert last_generation().path == "transformers"
        assert any("autocast" in note for note in last_generation().notes)
        with pytest.raises(NotIncremental, match="autocast is on: cast the model"):
            dspark_compile.generate(Decoder().eval(), prompt() % 31, max_new_tokens=4)
    assert torch.equal(model.generate(prompt(), **ours), model.generate(prompt(), **given))
    assert last_generation().path == "compiled"
    free(model)
