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
from tests.test_insert_cache import QUICK, STRICT, greedy, prompt, sharpen

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
        dspark_compile.generate(sharpen(BothWays()), prompt(), max_new_tokens=4, options=STRICT)


class FiniteMask(nn.Module):
    """Later keys get -1e9 (or less) on top of ALiBi; what comes back is a mapping."""

    def __init__(self, below: float = -1e9) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.below = below
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1)[:, None, None])

    def forward(self, ids):
        b, t = ids.shape
        at = torch.arange(t)
        bias = self.slopes * (at[None, :] - at[:, None])
        bias = bias.masked_fill(at[None, :] > at[:, None], self.below).repeat(b, 1, 1)
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).flatten(1, 2)
        p = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=SIZE**-0.5).softmax(-1)
        y = torch.bmm(p, v).view(b, HEADS, t, SIZE).transpose(1, 2).reshape(b, t, WIDTH)
        return {"hidden": x, "logits": (x + y) @ self.embed.weight.T}


class SinkLogit(nn.Module):
    """A learned score that takes probability and has no value; a window beside the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.sink = nn.Parameter(torch.randn(HEADS))

    def forward(self, ids):
        b, t = ids.shape
        at = torch.arange(t)
        back = at[:, None] - at
        seen = (back >= 0) & ((back < 5) | (at[None] < 2))
        x = self.embed(ids)
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * SIZE**-0.5).masked_fill(~seen, -torch.inf)
        sink = self.sink.view(1, HEADS, 1, 1).expand(b, HEADS, t, 1)
        p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        return (x + (p @ v).transpose(1, 2).flatten(2)) @ self.embed.weight.T


class TorchLayers(nn.Module):
    """`nn.TransformerEncoder` with a causal mask, or none, and `nn.MultiheadAttention` behind it,
    the sequence first."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.embed, self.at = nn.Embedding(VOCAB, WIDTH), nn.Embedding(80, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, ids):
        t = ids.shape[1]
        x = self.embed(ids) + self.at(torch.arange(t))
        mask = nn.Transformer.generate_square_subsequent_mask(t) if self.causal else None
        x = self.encoder(x, mask=mask, is_causal=self.causal).transpose(0, 1)
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=later, need_weights=False)[0]
        return x.transpose(0, 1) @ self.embed.weight.T


class Last(nn.Module):
    """Logits of the last token alone, picked in one of many ways."""

    def __init__(self, pick, vocab: int = VOCAB) -> None:
        super().__init__()
        self.pick, self.embed = pick, nn.Embedding(vocab, WIDTH)
        self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids, targets=None):
        b, t = ids.shape
        x = self.embed(ids) + torch.sin(torch.arange(t))[:, None]
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm(x + y.transpose(1, 2).flatten(2))
        return self.pick(x, lambda x: x @ self.embed.weight.T), None


PICKS = {
    "list": lambda x, head: head(x[:, [-1], :]),
    "index": lambda x, head: head(x[:, -1]),
    "slice": lambda x, head: head(x[:, -1:, :]),
    "behind": lambda x, head: head(x)[:, -1:],
    "select": lambda x, head: head(x.select(1, -1)).softmax(-1),
}


def text(model, ids, new):
    """`greedy`, whatever form the logits come in."""

    def plain(ids):
        out = model(ids)
        out = out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        return out if out.dim() == 3 else out[:, None]

    return greedy(plain, ids, new)


@pytest.mark.parametrize("kind", [FiniteMask, lambda: FiniteMask(-1e4), SinkLogit, TorchLayers])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_other_spellings(kind, rows):
    model = sharpen(kind())
    ids = prompt(rows)
    got = dspark_compile.generate(model, ids, max_new_tokens=30, options=QUICK)
    assert last_generation().path == "compiled", last_generation().notes
    assert torch.equal(got, text(model, ids, 30))


@pytest.mark.parametrize("how", PICKS)
@torch.no_grad()
def test_logits_of_the_last_token_alone(how):
    model = sharpen(Last(PICKS[how]))
    for ids in (prompt(1), prompt(3, 11)):
        got = dspark_compile.generate(model, ids, max_new_tokens=30, options=QUICK)
        assert torch.equal(got, text(model, ids, 30))


@pytest.mark.parametrize(
    "pick, says",
    [
        (lambda x, head: head(x - x[:, -1:]), "a slice of the sequence"),
        (lambda x, head: head(x - x[:, [-1]]), "picks rows of the sequence"),
        (lambda x, head: head(x[:, -2]), "one row of the sequence"),
        (lambda x, head: head(x[:, 0]), "the logits are not of every token"),
        (lambda x, head: head(x * math.log(1 + x.shape[1])), "reads a length that varies"),
        (lambda x, head: {"scores": head(x)}, r"mapping of \['scores'\]: name one 'logits'"),
        (lambda x, head: x[0, 0, 0], r"it gives \[\], and logits are"),
    ],
)
def test_what_else_is_picked_is_refused(pick, says, capfd):
    class Picks(Last):
        def forward(self, ids):
            return super().forward(ids)[0]

    with pytest.raises(NotIncremental, match=says):
        dspark_compile.generate(sharpen(Picks(pick)), prompt(), max_new_tokens=4, options=STRICT)
    assert "Error while creating guard" not in capfd.readouterr().err


def test_torch_layers_that_look_ahead_are_refused():
    with pytest.raises(NotIncremental, match="attention is not causal: it has no mask"):
        dspark_compile.generate(
            sharpen(TorchLayers(False)), prompt(), max_new_tokens=4, options=STRICT
        )


def test_a_bias_that_leaves_later_keys_visible_is_refused():
    with pytest.raises(NotIncremental, match="allows a later key"):
        dspark_compile.generate(sharpen(FiniteMask(-30.0)), prompt(), max_new_tokens=4,
                                options=STRICT)  # fmt: skip


@torch.no_grad()
def test_a_vocabulary_of_few():
    model = sharpen(Last(PICKS["index"], vocab=3))
    ids = torch.tensor([[0, 2, 1]])
    got = dspark_compile.generate(model, ids, max_new_tokens=20, options=QUICK)
    assert torch.equal(got, text(model, ids, 20))


@pytest.mark.parametrize(
    "ids, given, says",
    [
        (torch.ones(1, 3), {}, "torch.float32: give token ids"),
        (torch.ones(1, 3, dtype=torch.bool), {}, "torch.bool: give token ids"),
        (torch.ones(1, 3).long(), {"top_k": -1}, "top_k=-1"),
    ],
)
def test_bad_arguments(ids, given, says):
    model = sharpen(Last(PICKS["index"]))
    with pytest.raises(ValueError, match=says):
        dspark_compile.generate(model, ids, max_new_tokens=4, options=QUICK, **given)


def test_ids_of_another_integer_type():
    model = sharpen(Last(PICKS["index"]))
    got = dspark_compile.generate(model, prompt().int(), max_new_tokens=4, options=QUICK)
    assert got.dtype == torch.int64 and torch.equal(got, text(model, prompt(), 4))


@pytest.mark.parametrize("most, says", [(None, "tables for 22"), (15, "tables for 15")])
@torch.no_grad()
def test_how_long_a_text_may_be_is_known_before(most, says):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = Last(lambda x, head: head(x))
            self.at = nn.Embedding(24, VOCAB)

        def forward(self, ids):
            t = ids.shape[1]
            assert most is None or t <= most, "too long"
            return self.last(ids)[0] + self.at(torch.arange(t) + 2)

    model = sharpen(Table())
    with pytest.raises(ValueError, match=says):
        dspark_compile.generate(model, prompt(), max_new_tokens=40, options=QUICK)
    room = (22 if most is None else most) - 6
    got = dspark_compile.generate(model, prompt(), max_new_tokens=room, options=QUICK)
    assert torch.equal(got, text(model, prompt(), room))


def test_a_token_that_the_model_does_not_know():
    model = sharpen(Last(PICKS["index"]))
    for wrong, says in (
        (prompt() + 90, "no token: the model knows 0 to 89"),
        (-prompt(), "hold -"),
    ):
        with pytest.raises(IndexError, match=says):
            dspark_compile.generate(model, wrong, max_new_tokens=4, options=QUICK)
    got = dspark_compile.generate(model, prompt(), max_new_tokens=4, options=QUICK)
    assert torch.equal(got, text(model, prompt(), 4))


def test_training_mode_is_named():
    model = TorchLayers()
    with pytest.raises(NotIncremental, match=r"in training mode: call its eval\(\)"):
        dspark_compile.generate(model.train(), prompt(), max_new_tokens=4, options=QUICK)


def test_a_seed_gives_the_same_text_whether_the_step_is_there_or_not():
    model = sharpen(Last(PICKS["index"]))
    texts = []
    for _ in range(3):
        torch.manual_seed(11)
        texts.append(
            dspark_compile.generate(
                model, prompt(2), max_new_tokens=20, do_sample=True, top_k=40, options=QUICK
            )
        )
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[1], texts[2])
