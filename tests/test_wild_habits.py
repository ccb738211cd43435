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
STRICT = {**QUICK, "fallback": "error"}  # raise where no cache can be inserted
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
        dspark_compile.generate(
            Decoder(turn).eval(), prompt() % 31, max_new_tokens=4, options=STRICT
        )


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


@pytest.mark.parametrize("statistic", ["var", "std"])
def test_a_weight_that_meets_x_before_the_root_divides(statistic):
    """``self.a_2 * (x - mean) / (std + self.eps) + self.b_2``, as the Annotated Transformer has it:
    a norm where eps is inside of the root, and a reason where it is not."""

    def norm(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        if statistic == "std":
            return weight * centred / (x.std(-1, keepdim=True) + 1e-6) + bias
        return weight * centred / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6) + bias

    args = torch.randn(3, 5, 16), torch.randn(16), torch.randn(16)
    run = torch.compile(norm, backend="dspark", options={**QUICK, "verify": True})
    with torch.no_grad():
        torch.testing.assert_close(run(*args), norm(*args))
        half = [x.bfloat16() for x in args]
        exact = norm(*(x.double() for x in half))
        ours, theirs = ((y.double() - exact).abs().max() for y in (run(*half), norm(*half)))
        assert ours <= 1.05 * theirs
    report = last_report()
    if statistic == "var":
        report.assert_fused("norm")
    else:
        assert "unbiased" in report.rejections[0].condition


@pytest.mark.parametrize(
    "special", [lambda n: n < 4, lambda n: n == 14, lambda n: n % 2 == 0], ids=["<4", "14", "even"]
)
def test_a_length_that_is_treated_in_another_way(special):
    """What is traced for one length need not be what the model does for another."""
    model = Decoder(start=lambda ids, x: x.flip(-1) if special(ids.shape[1]) else x).eval()
    ids = prompt() % 31
    with pytest.raises(NotIncremental, match=r"differ by .* on \d+ random tokens"):
        dspark_compile.generate(model, ids, max_new_tokens=4, options=STRICT)
    got = dspark_compile.generate(model, ids, max_new_tokens=12, options=QUICK)
    assert torch.equal(got, greedy(model, ids, 12))
    assert last_generation().path == "recomputed"


def test_a_branch_on_the_length_that_changes_nothing():
    """No mask for one token, none needed."""

    def start(ids, x):
        return x if ids.shape[1] == 1 else x + 0 * x.sin()

    model, ids = Decoder(start=start).eval(), prompt() % 31
    got = dspark_compile.generate(model, ids, max_new_tokens=8, options=QUICK)
    assert torch.equal(got, greedy(model, ids, 8))


class Scaled(Decoder):
    by = 1.0


def test_methods_and_numbers_of_a_class_change(monkeypatch):
    model, ids = Scaled().eval(), prompt() % 31

    def check():
        got = dspark_compile.generate(model, ids, max_new_tokens=6, options=QUICK)
        assert torch.equal(got, greedy(model, ids, 6))

    monkeypatch.setattr(Scaled, "forward", Decoder.forward)
    check()
    monkeypatch.setattr(Scaled, "forward", lambda self, ids: -Decoder.forward(self, ids) * self.by)
    check()
    monkeypatch.setattr(Scaled, "by", -1.0)
    check()

    def forward(self, ids):
        return self.head(self.embed(ids).sin())

    monkeypatch.setattr(Scaled.forward, "__code__", forward.__code__)
    check()


class OverMemory(Decoder):
    """Attention over the text, then over a memory that is the same for every token of it."""

    def __init__(self, memory, see=None):
        super().__init__()
        self.memory, self.see = memory, see

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        q = self.qkv(x)[..., : HEADS * SIZE].unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        _, k, v = self.qkv(self.memory).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        mask = None if self.see is None else self.see(ids.shape[1], k.shape[2])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_attention_over_a_memory():
    """A captioner's decoder: its memory has no row for a token, and needs no cache."""
    ids = prompt(2) % 31
    allowed = torch.rand(2, 1, 1, 5) > 0.4
    allowed[..., 0] = True
    for see in (None, lambda rows, keys: allowed):
        model = OverMemory(torch.randn(2, 5, HEADS * SIZE), see).eval()
        for _ in range(2):
            got = dspark_compile.generate(model, ids, max_new_tokens=8, options=QUICK)
            assert torch.equal(got, greedy(model, ids, 8))
            model.memory.mul_(-2)
        model.memory = torch.randn(2, 5, HEADS * SIZE)
        got = dspark_compile.generate(model, ids, max_new_tokens=8, options=QUICK)
        assert torch.equal(got, greedy(model, ids, 8))

    def diagonal(rows, keys):
        return torch.arange(rows)[:, None] >= torch.arange(keys)

    model = OverMemory(torch.randn(2, 5, HEADS * SIZE), diagonal).eval()
    with pytest.raises(NotIncremental, match="which keys it may see depends on the token"):
        dspark_compile.generate(model, ids, max_new_tokens=4, options=STRICT)


@pytest.mark.parametrize(
    "start",
    [
        lambda ids, x: x[..., None, :].repeat(1, 1, 3, 1).sum(-2),
        lambda ids, x: x + x.flip(-1),
        lambda ids, x: x.repeat(1, 1, 2)[..., 1 : 1 + HEADS * SIZE],
    ],
    ids=["streams", "flip", "features"],
)
def test_features_are_repeated_or_turned_round(start):
    model, ids = Decoder(start=start).eval(), prompt(2) % 31
    got = dspark_compile.generate(model, ids, max_new_tokens=8, options=QUICK)
    assert torch.equal(got, greedy(model, ids, 8))


@pytest.mark.parametrize(
    "start",
    [lambda ids, x: x + x.flip(1), lambda ids, x: x.repeat(1, 2, 1)[:, 1 : 1 + x.shape[1]]],
    ids=["flip", "repeat"],
)
def test_the_sequence_is_repeated_or_turned_round(start):
    with pytest.raises(NotIncremental, match="the sequence"):
        dspark_compile.generate(
            Decoder(start=start).eval(), prompt() % 31, max_new_tokens=4, options=STRICT
        )
