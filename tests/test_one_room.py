"""Steps that make something of a cache's room are compiled for the room there is, and once more
when it grows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.runtime import room
from tests.test_insert_cache import greedy, sharpen

NATIVE = {"kernels": "cpp"}
HEADS, SIZE = 2, 8
WIDTH, VOCAB = HEADS * SIZE, 61
DISTANCES = torch.linspace(-2, 2, 32)


class Decoder(nn.Module):
    """Two layers of attention, which ``attend(q, k, v)`` is."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(VOCAB, WIDTH), attend
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for qkv in self.qkv:
            q, k, v = qkv(F.rms_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, SIZE)).permute(
                2, 0, 3, 1, 4
            )  # fmt: skip
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x)


class Table(nn.Module):
    """ALiBi with the mask in it, in a buffer of ``block`` positions."""

    def __init__(self, block: int) -> None:
        super().__init__()
        at = torch.arange(block)
        bias = (at[None] - at[:, None]) * torch.tensor([0.5, 0.25])[:, None, None]
        self.register_buffer("bias", bias.masked_fill(at[None] > at[:, None], -torch.inf))

    def forward(self, q, k, v):
        rows = q.shape[2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, :rows, :rows])


def slopes(q, k, v):
    rows = torch.arange(q.shape[2])
    bias = (rows[None] - rows[:, None]) * torch.tensor([0.5, 0.25])[:, None, None]
    hidden = torch.full((len(rows), len(rows)), -torch.inf).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + hidden)


def relative(q, k, v):
    """A learned bias by distance would be read like this."""
    rows = torch.arange(q.shape[2])
    scores = q @ k.transpose(-1, -2) + DISTANCES[(rows[:, None] - rows[None]).clamp(0, 31)]
    return scores.masked_fill(rows[None] > rows[:, None], -torch.inf).softmax(-1) @ v


def turned(q, k, v):
    """Complex rotation, its table made of polar coordinates."""
    steps = torch.outer(torch.arange(q.shape[2]), 10.0 ** -torch.arange(0, SIZE, 2))
    table = torch.polar(torch.ones_like(steps), steps)

    def turn(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)


MADE = {"table": lambda: Table(512), "slopes": lambda: slopes, "relative": lambda: relative,
        "turned": lambda: turned}  # fmt: skip


@pytest.mark.parametrize(
    "made", [pytest.param(m, marks=[pytest.mark.slow] * (m == "relative")) for m in MADE]
)
@torch.no_grad()
def test_one_native_call(made, monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 16)
    model = sharpen(Decoder(MADE[made]()))
    for rows, new in ((1, 8), (1, 40), (2, 12)):
        ids = torch.randint(0, VOCAB, (rows, 5), generator=torch.Generator().manual_seed(rows))
        got = dspark_compile.generate(model, ids, max_new_tokens=new, options=NATIVE)
        assert torch.equal(got, greedy(model, ids, new))
        assert last_generation().path == "native", last_generation().notes


@pytest.mark.slow
@pytest.mark.parametrize("made", ["table", "slopes"])
@torch.no_grad()
def test_a_draft_beside_it(made):
    model = sharpen(Decoder(MADE[made]()))
    ids = torch.tensor([[5, 6, 7, 8] * 6])
    got = dspark_compile.generate(
        model, ids, max_new_tokens=40, draft="ngram", schedule="fixed", options=NATIVE
    )
    assert torch.equal(got, greedy(model, ids, 40))
    report = last_generation()
    assert report.path == "native" and report.speculation.rounds, report.notes


@torch.no_grad()
def test_room_grows_on_the_way(monkeypatch):
    """More than was expected at the beginning: the step is compiled once more, and goes on."""
    from dspark_compile.runtime import decode_loop
    from dspark_compile.runtime.inserted import InsertedRounds

    monkeypatch.setattr(room, "SMALLEST", 16)
    monkeypatch.setattr(decode_loop, "FIRST_ROOM", 4)
    made = []
    step = InsertedRounds._captured_step
    monkeypatch.setattr(
        InsertedRounds, "_captured_step", lambda *args: made.append(1) or step(*args)
    )
    model, ids = sharpen(Decoder(slopes)), torch.tensor([[5, 6, 7]])
    got = dspark_compile.generate(model, ids, max_new_tokens=60, options=NATIVE)
    assert torch.equal(got, greedy(model, ids, 60))
    assert last_generation().path == "native" and len(made) > 1
