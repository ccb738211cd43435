"""Decoders that read the rows of earlier tokens in other ways than attention: token shifts, causal
convolutions, learned prefixes. A cache is inserted, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.passes.causal import implies_causal
from dspark_compile.passes.incremental import NotIncremental
from dspark_compile.runtime import room
from dspark_compile.runtime.rounds import Rounds
from tests.test_insert_cache import greedy, prompt

QUICK = {"inner": "eager"}
STRICT = {**QUICK, "fallback": "error"}
NATIVE = {"kernels": "cpp", "fallback": "error"}
VOCABULARY, WIDTH, HEADS, SIZE = 90, 16, 2, 8


class Shifting(nn.Module):
    """Attention between what ``start`` makes of tokens and their embedding and what ``end`` makes
    of its result; ``turn`` changes queries, keys and values ``[B, H, S, D]``."""

    def __init__(self, start=None, turn=None, end=None, **modules):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.start, self.turn, self.end = start, turn, end
        for name, module in modules.items():
            setattr(self, name, module)
        torch.manual_seed(3)
        for p in self.parameters():
            p.data.normal_(0, 0.6)
        self.eval()

    def forward(self, ids):
        x = self.embed(ids)
        x = x if self.start is None else self.start(self, ids, x)
        qkv = [y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]
        q, k, v = qkv if self.turn is None else (self.turn(self, y) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.head(x if self.end is None else self.end(self, x))


def check(model, new=20, options=STRICT, path="compiled", lengths=(1, 6, 3), rows=2):
    """One compilation, and prompts of several lengths: nothing of an earlier one is read."""
    for length in lengths:
        ids = prompt(rows, length)
        got = dspark_compile.generate(model, ids, max_new_tokens=new, options=options)
        assert last_generation().path == path, last_generation().notes
        assert torch.equal(got, greedy(model, ids, new))


# -- token shifts -----------------------------------------------------------------------------


def joined(m, ids, x):
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    return torch.cat([x[:, :1], x[:, 1:] + 0.5 * shifted[:, :-1]], 1) + 0.3 * shifted


def padded(m, ids, x):
    return x + 0.5 * nn.ZeroPad2d((0, 0, 1, -1))(x) + 0.3 * F.pad(x, (0, 0, 2, 0))[:, :-2]


def written(m, ids, x):
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    z = x.clone()
    z[:, 2:] += y[:, 1:-1]
    return y + z


def rolled(m, ids, x):
    y = torch.roll(x, 1, 1)
    y[:, 0] = 0
    z = torch.roll(x, 2, dims=1)
    z[:, :2] = m.first.weight[0]
    return x + y + z + F.pad(x.roll(1, 1)[:, 1:], (0, 0, 1, 0))


def rolled_and_masked(m, ids, x):
    at = torch.arange(x.shape[1])[:, None]
    y = x.roll(1, 1) * (at > 0) + torch.where(at < 2, 0.0, x.sin().roll(2, 1))
    z = torch.where(at >= 2, x.roll(2, 1), 0.5 * x)
    return x + z + x.roll(1, 1).masked_fill(at == 0, 0.3) + F.pad(y[:, 1:], (0, 0, 1, 0))


def by_the_first(m, ids, x):
    """The first token's row for all, rows of the first three for themselves, learned ones."""
    y = torch.cat([m.first.weight.expand(len(ids), 2, WIDTH), x], 1)[:, :-2]
    z = torch.cat([x[:, :3] * 0.5, x[:, 3:] - x[:, :-3]], 1)
    return y + z + x[:, :1] * 0.2 + x[:, 0].unsqueeze(1).tanh()


def smeared(m, ids, x):
    """As modded-nanogpt has it: a gate for how much of the last token is added."""
    gate = torch.sigmoid(m.gate(x[:, 1:, :4]))
    return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], 1)


def of_pairs(m, ids, x):
    """An embedding of pairs of tokens, by their hash."""
    pair = (F.pad(ids, (1, -1)) * 31 + ids) % 50
    return x + m.pairs(pair)


def twice(m, ids, x):
    x = x + F.pad(x, (0, 0, 1, -1)).sin()
    return x + F.pad(x, (0, 0, 1, -1)).sin()


def by_numbers(m, ids, x):
    """Rows that numbers name."""
    back = (torch.arange(x.shape[1]) - 2).clamp(min=0)
    return torch.lerp(x, x[:, back], 0.3) + x.index_select(1, back.clamp(max=4)).sin()


def turned(m, y):
    """Keys like the one before."""
    before = torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], 2)
    return torch.cat([y[..., :4], before[..., 4:]], -1)


def shifts():
    first = nn.Embedding(2, WIDTH)
    return {
        "joined": Shifting(joined),
        "padded": Shifting(padded),
        "written": Shifting(written),
        "rolled": Shifting(rolled, first=first),
        "masked": Shifting(rolled_and_masked),
        "first": Shifting(by_the_first, first=first),
        "smeared": Shifting(smeared, gate=nn.Linear(4, 1)),
        "pairs": Shifting(of_pairs, pairs=nn.Embedding(50, WIDTH)),
        "twice": Shifting(twice),
        "numbers": Shifting(by_numbers),
        "turned": Shifting(turn=turned),
        "end": Shifting(end=lambda m, x: x + F.pad(x, (0, 0, 1, -1))),
    }


@pytest.mark.parametrize("name", shifts())
def test_token_shifts(name):
    check(shifts()[name])


# -- convolutions -----------------------------------------------------------------------------


def cut(conv, x):
    """Padded on both sides, and cut."""
    return conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def ahead(conv, x):
    """Padded in front."""
    reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
    return conv(F.pad(x.transpose(1, 2), (reach, 0))).transpose(1, 2)


def conv1d(count, groups=WIDTH, dilation=1, pad=True, **given):
    reach = (count - 1) * dilation if pad else 0
    return nn.Conv1d(
        WIDTH, WIDTH, count, groups=groups, dilation=dilation, padding=reach, **given
    )  # fmt: skip


def gated(m, ids, x):
    """A short convolution between two gates, as LFM2 has it."""
    b, c, y = m.into(x).transpose(-1, -2).chunk(3, dim=-2)
    y = m.conv(b * y)[..., : x.shape[1]]
    return x + (c * y).transpose(-1, -2)


def by_heads(m, y):
    """Queries, keys and values behind a convolution of each head, as Primer has it."""
    b, h, n, d = y.shape
    y = y.permute(0, 1, 3, 2).reshape(b * h, d, n)
    return m.conv(F.pad(y, (2, 0))).view(b, h, d, n).transpose(2, 3)


def normed(m, ids, x):
    """A norm by statistics that are known, and a gate, between convolutions."""
    y = F.glu(m.wide(F.pad(x.mT, (2, 0))), 1)
    return x + m.conv(F.pad(m.norm(y), (1, 0))).mT


def unfolded(m, ids, x):
    windows = F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1)
    return x + (windows * m.first.weight[:, :4].unsqueeze(0)).sum(-1)


class Temporal(nn.Module):
    """Dilated convolutions alone, with weights apart from their norms, as a WaveNet has them."""

    def __init__(self, groups=1):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        norm = nn.utils.parametrizations.weight_norm
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(WIDTH, 2 * WIDTH, 2, dilation=2**i, padding=2**i, groups=groups))
            for i in range(3)
        )
        torch.manual_seed(4)
        for p in self.parameters():
            p.data.normal_(0, 0.6)
        self.eval()

    def forward(self, ids):
        x = self.embed(ids).transpose(1, 2)
        for conv in self.convs:
            a, b = conv(x)[:, :, : -conv.padding[0]].chunk(2, 1)
            x = x + a.tanh() * b.sigmoid()
        return self.head(x.transpose(1, 2))


def convolutions():
    return {
        "depthwise": Shifting(lambda m, ids, x: x + cut(m.conv, x), conv=conv1d(4)),
        "silu": Shifting(
            lambda m, ids, x: x + F.silu(ahead(m.conv, x)), conv=conv1d(3, pad=False, bias=False)
        ),
        "dilated": Shifting(
            lambda m, ids, x: x + cut(m.conv, x) + ahead(m.other, x),
            conv=conv1d(3, dilation=2), other=conv1d(2, 1, 3, False),
        ),
        "groups": Shifting(lambda m, ids, x: x + ahead(m.conv, x), conv=conv1d(3, 4, pad=False)),
        "normed": Shifting(
            normed, wide=nn.Conv1d(WIDTH, 2 * WIDTH, 3, groups=WIDTH), norm=nn.BatchNorm1d(WIDTH),
            conv=conv1d(2, 1, pad=False),
        ),
        "gated": Shifting(gated, into=nn.Linear(WIDTH, 3 * WIDTH), conv=conv1d(3)),
        "heads": Shifting(turn=by_heads, conv=nn.Conv1d(SIZE, SIZE, 3, groups=SIZE)),
        "unfolded": Shifting(unfolded, first=nn.Embedding(WIDTH, WIDTH)),
        "long": Shifting(lambda m, ids, x: x + cut(m.conv, x), conv=conv1d(20)),
        "temporal": Temporal(),
        "temporal_groups": Temporal(4),
    }  # fmt: skip


@pytest.mark.parametrize("name", convolutions())
def test_causal_convolutions(name):
    check(convolutions()[name], new=24)


# -- prefixes of keys and values ----------------------------------------------------------------

PREFIX = 3
MASKS = {
    "joined": lambda s: torch.cat(
        [torch.ones(s, PREFIX, dtype=torch.bool), torch.ones(s, s, dtype=torch.bool).tril()], 1
    ),
    "triangle": lambda s: torch.ones(s, s + PREFIX, dtype=torch.bool).tril(PREFIX),
    "positions": lambda s: torch.arange(s + PREFIX) <= torch.arange(s)[:, None] + PREFIX,
    "later": lambda s: torch.arange(s + PREFIX) <= torch.arange(s)[:, None] + PREFIX + 1,
}


class Prefixed(Shifting):
    """Learned keys and values in front of the tokens' (prefix tuning, registers, null keys)."""

    def __init__(self, mask):
        super().__init__(prefix=nn.Linear(2 * HEADS * SIZE, PREFIX, bias=False))
        self.mask = mask

    def forward(self, ids):
        x = self.embed(ids)
        qkv = [y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)]
        front = self.prefix.weight.view(PREFIX, 2, HEADS, SIZE).permute(1, 2, 0, 3)
        q, k, v = qkv[0], *(
            torch.cat([p.expand(len(ids), -1, -1, -1), y], 2) for p, y in zip(front, qkv[1:])
        )  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(ids.shape[1]))
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", ["joined", "triangle", "positions"])
def test_a_prefix_of_keys_and_values(name):
    check(Prefixed(MASKS[name]))


@pytest.mark.parametrize(
    "mask, ahead, causal",
    [
        ("k <= q + 3", 3, True), ("k <= q + 4", 3, False), ("(k <= 2) | (k <= q + 3)", 3, True),
        ("k < 4", 3, True), ("k < 5", 3, False), ("q + 3 >= k", 3, True), ("3 >= k", 3, True),
        ("k == q + 3", 3, True), ("k <= q", 3, True), ("k < 1", 0, True), ("k <= 1", 0, False),
    ],
)  # fmt: skip
def test_implies_causal_behind_a_prefix(mask, ahead, causal):
    assert implies_causal(mask, ahead) is causal


# -- what is refused ------------------------------------------------------------------------------


def looking_ahead(m, ids, x):
    y = torch.zeros_like(x)
    y[:, :-1] = x[:, 1:]
    return x + y


REFUSED = {
    "symmetric": (
        lambda: Shifting(
            lambda m, ids, x: x + cut(m.conv, x), conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        ),
        "convolution.* reads rows of later tokens",
    ),
    "padded behind": (
        lambda: Shifting(
            lambda m, ids, x: x + m.conv(F.pad(x.mT, (1, 1))).mT, conv=conv1d(3, pad=False)
        ),
        "pad.* rows behind the last token are read",
    ),
    "left": (lambda: Shifting(lambda m, ids, x: x + F.pad(x, (0, 0, -1, 1))), "behind the last"),
    "written": (lambda: Shifting(looking_ahead), "slice_scatter.* ends before the last token"),
    "rolled": (lambda: Shifting(lambda m, ids, x: x + x.roll(1, 1)), "roll.* comes first"),
    "rolled, not masked": (
        lambda: Shifting(
            lambda m, ids, x: x + x.roll(2, 1) * (torch.arange(x.shape[1]) > 0)[:, None]
        ),
        "roll.* comes first",
    ),
    "rolled on": (
        lambda: Shifting(lambda m, ids, x: x + F.pad(x.roll(2, 1)[:, 1:], (0, 0, 1, 0))),
        "roll.* comes first",
    ),
    "three": (
        lambda: Shifting(lambda m, ids, x: x + x[:, :3].mean(1, keepdim=True)),
        "wherever the token stands",
    ),
    "third": (lambda: Shifting(lambda m, ids, x: x + x[:, 2:3]), "wherever the token stands"),
    "stride": (
        lambda: Shifting(
            lambda m, ids, x: x + ahead(m.conv, x).repeat_interleave(2, 1)[:, : x.shape[1]],
            conv=nn.Conv1d(16, 16, 2, stride=2),
        ),
        "a slice of the sequence",
    ),
    "numbers": (
        lambda: Shifting(lambda m, ids, x: x + x[:, (torch.arange(x.shape[1]) + 1) // 2 * 2 - 1]),
        "picks rows of later tokens, or from the end",
    ),
    "running sum": (lambda: Shifting(lambda m, ids, x: x + x.cumsum(1)), "along the sequence"),
    "prefix": (lambda: Prefixed(MASKS["later"]), r"not causal.*k <= q \+ 4"),
    "joined on": (
        lambda: Shifting(
            turn=lambda m, y: torch.cat([y[:, :, 1:], torch.zeros_like(y[:, :, :1])], 2)
        ),
        "rows behind the last token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_node_and_the_reason(name):
    make, says = REFUSED[name]
    with pytest.raises(NotIncremental, match=says):
        dspark_compile.generate(make(), prompt(), max_new_tokens=4, options=STRICT)


# -- native steps, types, growth ------------------------------------------------------------------


def everything(m, ids, x):
    """Shifts and convolutions of several kinds."""
    x = smeared(m, ids, of_pairs(m, ids, x))
    return x + F.silu(cut(m.conv, x)) + ahead(m.dense, x)


def all_kinds():
    return Shifting(
        everything, by_heads_of, gate=nn.Linear(4, 1), pairs=nn.Embedding(50, WIDTH),
        conv=conv1d(4), dense=conv1d(2, 1, pad=False),
        short=nn.Conv1d(SIZE, SIZE, 3, groups=SIZE, bias=False),
    )  # fmt: skip


def by_heads_of(m, y):
    b, h, n, d = y.shape
    y = y.permute(0, 1, 3, 2).reshape(b * h, d, n)
    return m.short(F.pad(y, (2, 0))).view(b, h, d, n).transpose(2, 3)


@pytest.mark.parametrize("rows", [1, 2])
def test_native(rows):
    check(all_kinds(), options=NATIVE, path="native", rows=rows)


@pytest.mark.slow
def test_native_in_bfloat16():
    """The text may part where two tokens are as good as each other: logits are compared."""
    model = all_kinds().bfloat16()
    ids = prompt(2)
    got = dspark_compile.generate(model, ids, max_new_tokens=16, options=NATIVE)
    assert last_generation().path == "native", last_generation().notes
    with torch.no_grad():
        logits = model(got)[:, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(-1, got[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen <= 0.03 * logits.abs().amax(-1)).all()


def test_caches_grow(monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 8)
    monkeypatch.setattr(Rounds, "expect", lambda self, tokens: None)
    check(all_kinds(), new=40)


@pytest.mark.slow
def test_long_texts():
    check(all_kinds(), new=320, options=NATIVE, path="native", lengths=(2,))
    check(Prefixed(MASKS["joined"]), new=320, lengths=(2,))
