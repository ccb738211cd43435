"""A module without a cache is decoded token by token, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.models.alibi import Alibi
from dspark_compile.models.dense import Dense
from dspark_compile.models.selective import Selective
from dspark_compile.passes.causal import implies_causal, shifted
from dspark_compile.passes.incremental import NotIncremental
from dspark_compile.runtime import room
from dspark_compile.runtime.rounds import Rounds

QUICK = {"inner": "eager"}
STRICT = {**QUICK, "fallback": "error"}  # raise where no cache can be inserted


def prompt(rows: int = 1, length: int = 6) -> torch.Tensor:
    return torch.randint(1, 90, (rows, length), generator=torch.Generator().manual_seed(3))


def sharpen(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.25)
    return model.eval()


@torch.no_grad()
def greedy(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """By running the whole sequence for every token."""
    for _ in range(new):
        out = model(ids)
        out = out if isinstance(out, torch.Tensor) else out[0]
        ids = torch.cat((ids, out[:, -1].argmax(-1, keepdim=True)), dim=1)
    return ids


class NanoGPT(nn.Module):
    """Learned positions, a mask in a buffer, one projection for q, k and v, GELU; as many a
    tutorial has it."""

    def __init__(self, width=32, heads=4, layers=2, block=64, vocab=90, window=None):
        super().__init__()
        self.heads, self.width = heads, width
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(block, width)
        mask = torch.tril(torch.ones(block, block))
        if window is not None:
            mask = mask.triu(-window + 1)
        self.register_buffer("mask", mask.view(1, 1, block, block))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        b, t = ids.shape
        pos = torch.arange(0, t, dtype=torch.long, device=ids.device).unsqueeze(0)
        x = self.wte(ids) + self.wpe(pos)
        for i in range(len(self.qkv)):
            h = self.norms[2 * i](x)
            q, k, v = self.qkv[i](h).split(self.width, dim=2)
            q, k, v = (
                y.view(b, t, self.heads, self.width // self.heads).transpose(1, 2)
                for y in (q, k, v)
            )
            att = (q @ k.transpose(-2, -1)) * (k.size(-1) ** -0.5)
            att = att.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
            y = att.softmax(dim=-1) @ v
            x = x + self.out[i](y.transpose(1, 2).contiguous().view(b, t, self.width))
            h = self.norms[2 * i + 1](x)
            x = x + self.down[i](nn.functional.gelu(self.up[i](h)))
        return self.head(self.norms[-1](x))


MODELS = {
    "dense": Dense.tiny,
    "alibi": Alibi.tiny,
    "selective": Selective.tiny,
    "nanogpt": NanoGPT,
    "nanogpt_window": lambda: NanoGPT(window=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_the_whole_sequence(name):
    model = sharpen(MODELS[name]())
    got = dspark_compile.generate(model, prompt(2), max_new_tokens=24, options=QUICK)
    assert torch.equal(got, greedy(model, prompt(2), 24))
    report = last_generation()
    assert report.path == "compiled" and not report.notes


def test_one_compilation_and_growth(monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 8)
    monkeypatch.setattr(Rounds, "expect", lambda self, tokens: None)
    model = sharpen(Dense.tiny())
    for length, new in ((3, 40), (1, 5), (50, 30)):
        ids = prompt(1, length)
        got = dspark_compile.generate(model, ids, max_new_tokens=new, options=QUICK)
        assert torch.equal(got, greedy(model, ids, new))
    assert "compile" not in last_generation().seconds


@pytest.mark.parametrize("kind", [Dense.tiny, NanoGPT, lambda: NanoGPT(window=5)])
def test_native(kind):
    """A mask that lies in a buffer is a predicate: its values are known, and watched."""
    model = sharpen(kind())
    got = dspark_compile.generate(model, prompt(), max_new_tokens=30, options={"kernels": "cpp"})
    assert last_generation().path == "native", last_generation().notes
    assert torch.equal(got, greedy(model, prompt(), 30))


@torch.no_grad()
def test_quantised_weights():
    """torchao's weights are tensors with rules of their own, which know nothing of our ops."""
    from tests.test_reuse_inputs import quantized

    model = quantized(sharpen(NanoGPT()), 8)
    got = dspark_compile.generate(model, prompt(), max_new_tokens=20, options={"kernels": "cpp"})
    assert last_generation().path == "native", last_generation().notes
    assert torch.equal(got, greedy(model, prompt(), 20))


def test_choice_eos_and_callbacks():
    model = sharpen(Dense.tiny())
    text = greedy(model, prompt(), 12)
    eos = int(text[0, 12])
    got = dspark_compile.generate(
        model, prompt(), max_new_tokens=12, eos_token_id=eos, options=QUICK
    )
    first = text[0, 6:].tolist().index(eos)
    assert torch.equal(got, text[:, : 7 + first])

    def only_even(ids, scores):
        scores[:, 1::2] = -torch.inf
        return scores

    got = dspark_compile.generate(
        model, prompt(), max_new_tokens=12, logits_processor=[only_even], options=QUICK
    )
    assert not (got[:, 6:] % 2).any()
    torch.manual_seed(2)
    one = dspark_compile.generate(
        model, prompt(), max_new_tokens=12, do_sample=True, temperature=2.0, options=QUICK
    )
    torch.manual_seed(2)
    two = dspark_compile.generate(
        model, prompt(), max_new_tokens=12, do_sample=True, temperature=2.0, options=QUICK
    )
    assert torch.equal(one, two) and not torch.equal(one, text)


class Bad(nn.Module):
    """Something that no cache helps."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Embedding(90, 16), nn.Linear(16, 90)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "bidirectional":
            q = x.view(*ids.shape, 2, 8).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        elif self.kind == "convolution":
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        elif self.kind == "mean":
            x = x - x.mean(1, keepdim=True)
        elif self.kind == "length":
            x = x * (ids.shape[1] * 0.1)
        elif self.kind == "reversed":
            x = x.flip(1)
        elif self.kind == "looks ahead":
            t = ids.shape[1]
            mask = torch.ones(t, t, dtype=torch.bool).tril(1)
            q = x.view(*ids.shape, 2, 8).transpose(1, 2)
            x = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)
            x = x.transpose(1, 2).flatten(2)
        return self.head(x)


@pytest.mark.parametrize(
    "kind, says",
    [
        ("bidirectional", "is not causal: it has no mask"),
        ("looks ahead", "is not causal"),
        ("convolution", "convolution"),
        ("mean", "mean.* along the sequence"),
        ("length", "mul"),
        ("reversed", "flip"),
    ],
)
def test_refused_with_the_node_and_the_reason(kind, says):
    with pytest.raises(NotIncremental, match=says):
        dspark_compile.generate(sharpen(Bad(kind)), prompt(), max_new_tokens=4, options=STRICT)


def test_a_wrong_cache_is_found_out(monkeypatch):
    from dspark_compile.passes.incremental_core import Maker

    # Keys where values belong: everything fits, and is wrong.
    original = Maker._cached
    monkeypatch.setattr(
        Maker, "_cached",
        lambda self, node, modes, value: self.graph.call_function(
            torch.ops.aten.neg.default, (original(self, node, modes, value),)
        ),
    )  # fmt: skip
    with pytest.raises(NotIncremental, match="logits differ by"):
        dspark_compile.generate(sharpen(Dense.tiny()), prompt(), max_new_tokens=4, options=STRICT)


@pytest.mark.parametrize(
    "given, says",
    [
        ({}, "one of max_new_tokens and max_length"),
        ({"max_new_tokens": 0}, "max_new_tokens leaves no room"),
        ({"max_new_tokens": 3, "temperature": 0.0, "do_sample": True}, "temperature=0.0"),
        ({"max_new_tokens": 3, "top_p": 1.5}, "top_p=1.5"),
        ({"max_new_tokens": 3, "num_beams": 2}, "num_beams: not known"),
        ({"max_new_tokens": 3, "kv_cache": "int8"}, "kv_cache='int8' is for Hugging Face"),
        ({"max_new_tokens": 200}, "tables for 64 positions"),
    ],
)
def test_bad_arguments(given, says):
    with pytest.raises(ValueError, match=says):
        dspark_compile.generate(sharpen(NanoGPT()), prompt(), options=QUICK, **given)


FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "phi", "olmo2", "cohere", "starcoder2",
            "gpt_neox", "mistral", "granite", "opt")  # fmt: skip


@pytest.mark.parametrize(
    "family", [f if f in ("gemma2", "gpt2") else pytest.param(f, marks=pytest.mark.slow)
               for f in FAMILIES],
)  # fmt: skip
def test_hugging_face_without_its_cache(family):
    from tests.zoo import families

    model = families.build(family).eval()
    ids = families.tokens(family, 7, 1)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": False}
    want = model.generate(ids, **given)
    got = dspark_compile.generate(model, ids, options=QUICK, **given)
    assert last_generation().path == "compiled", last_generation().notes
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "mask, causal",
    [
        ("k <= q", True), ("k < q", True), ("q >= k", True), ("k <= q - 3", True),
        ("(k <= q) & (k > q - 16)", True), ("(k <= q) | (k < q - 1)", True), ("k == q", True),
        ("", False), ("k <= q + 1", False), ("k >= q", False), ("(k <= q) | (k < 4)", False),
        ("t0[b, k]", False), ("(k <= q) & t0[b, k]", True), ("abs(k - q) < 4", False),
        ("k < q + 1", True), ("k <= q + n0", False),
    ],
)  # fmt: skip
def test_implies_causal(mask, causal):
    assert implies_causal(mask) is causal


def test_shifted():
    assert shifted("(k <= q) & (k > q - 16)", "t1") == "(k <= q + t1) & (k > q + t1 - 16)"
    assert shifted("", "t0") == ""
