"""Random attention blocks through the whole compiler, against eager.

Hypothesis draws shapes, dtypes, masks, head groupings, cache lengths and spellings. The
default run takes a few examples; ``-m exhaustive`` takes 500, the number the project promises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True}


@dataclass(frozen=True)
class Program:
    """One drawn block."""

    batch: int
    kv_heads: int
    group: int
    rows: int
    cache: str  # none | static | grow
    capacity: int
    filled: int
    dim: int
    mask: str
    window: int
    spelling: str
    repeat: str
    rope: str
    norm: str
    mlp: str
    softcap: float
    dtype: torch.dtype
    dynamic: bool

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


@st.composite
def programs(draw):
    rows = draw(st.integers(1, 7))
    cache = draw(st.sampled_from(["none", "static", "grow"]))
    filled = 0 if cache == "none" else draw(st.integers(0 if cache == "static" else 1, 9))
    spelling = draw(st.sampled_from(["sdpa", "eager"]))
    return Program(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.sampled_from([1, 2, 3])),
        group=draw(st.sampled_from([1, 2, 4])),
        rows=rows,
        cache=cache,
        capacity=filled + rows + draw(st.integers(0, 5)),
        filled=filled,
        dim=draw(st.sampled_from([4, 8, 16])),
        mask=draw(st.sampled_from(["none", "causal", "sliding", "padded", "additive", "alibi"])),
        window=draw(st.integers(1, 6)),
        spelling=spelling,
        repeat=draw(st.sampled_from(["expand", "interleave", "gqa"])),
        rope=draw(st.sampled_from(["none", "half", "interleaved", "partial"])),
        norm=draw(st.sampled_from(["llama", "gemma", "layer", "torch"])),
        mlp=draw(st.sampled_from(["gated", "merged", "plain"])),
        softcap=draw(st.sampled_from([0.0, 0.0, 5.0])) if spelling == "eager" else 0.0,
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        dynamic=draw(st.sampled_from([False, False, True])),
    )


class Block(nn.Module):
    """The block that a `Program` describes, in plain torch."""

    def __init__(self, p: Program):
        super().__init__()
        self.p = p
        width = p.heads * p.dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, p.kv_heads * p.dim)
        self.v = nn.Linear(width, p.kv_heads * p.dim, bias=False)
        self.o = nn.Linear(width, width)
        self.weight = nn.Parameter(torch.randn(width))
        self.bias = nn.Parameter(torch.randn(width))
        self.up, self.gate = nn.Linear(width, 24), nn.Linear(width, 24, bias=False)
        self.both, self.down = nn.Linear(width, 48), nn.Linear(24, width)

    def _norm(self, x):
        kind = self.p.norm
        if kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)
        if kind == "torch":
            return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)
        z = x.float()
        z = z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-5)
        if kind == "gemma":
            return (z * (1.0 + self.weight.float())).type_as(x)
        return self.weight * z.to(x.dtype)

    def _rope(self, x, positions):
        p = self.p
        if p.rope == "none":
            return x
        rotary = p.dim // 2 if p.rope == "partial" else p.dim
        freq = 1.0 / 100 ** (torch.arange(0, rotary, 2) / rotary)
        angle = positions[:, None].float() * freq[None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        part, rest = x[..., :rotary], x[..., rotary:]
        if p.rope == "interleaved":
            a, b = part[..., ::2], part[..., 1::2]
            part = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            half = rotary // 2
            turned = torch.cat((-part[..., half:], part[..., :half]), -1)
            part = part * cos + turned * sin
        return torch.cat((part, rest), -1) if p.rope == "partial" else part

    def _repeat(self, x):
        b, h, n, d = x.shape
        if self.p.repeat == "interleave":
            return x.repeat_interleave(self.p.group, dim=1)
        return x[:, :, None].expand(b, h, self.p.group, n, d).reshape(b, h * self.p.group, n, d)

    def _mask(self, positions, keys, pad, dtype):
        p = self.p
        k = torch.arange(keys)
        causal = k[None] <= positions[:, None]
        if p.mask == "none":
            # A static cache always has rows that hold nothing yet.
            return causal[None, None] if p.cache == "static" else None
        if p.mask == "sliding":
            causal = causal & (k[None] > positions[:, None] - p.window)
        if p.mask == "padded":
            return causal[None, None] & pad[:, None, None, :]
        if p.mask == "additive":
            return torch.where(causal, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]
        if p.mask == "alibi":
            slopes = 2.0 ** -torch.arange(1, p.heads + 1)
            bias = slopes[:, None, None] * (k[None] - positions[:, None])
            return bias.masked_fill(~causal, -math.inf)[None].to(dtype)
        return causal[None, None]

    def forward(self, x, positions, pad, key_cache, value_cache):
        p = self.p
        y = self._norm(x)

        def split(t, heads):
            return t.view(t.shape[0], t.shape[1], heads, p.dim).transpose(1, 2)

        q = self._rope(split(self.q(y), p.heads), positions)
        k = self._rope(split(self.k(y), p.kv_heads), positions)
        v = split(self.v(y), p.kv_heads)
        if p.cache == "static":
            key_cache.index_copy_(2, positions, k)
            value_cache[:, :, positions] = v
            k, v = key_cache, value_cache
        elif p.cache == "grow":
            k, v = torch.cat((key_cache, k), 2), torch.cat((value_cache, v), 2)
        mask = self._mask(positions, k.shape[2], pad, x.dtype)
        if p.spelling == "sdpa" and p.repeat == "gqa":
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=p.group > 1)
        else:
            k, v = self._repeat(k), self._repeat(v)
            if p.spelling == "sdpa":
                out = F.scaled_dot_product_attention(q, k, v, mask)
            else:
                s = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(p.dim)
                if p.softcap:
                    s = torch.tanh(s / p.softcap) * p.softcap
                if mask is not None:
                    s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
                out = torch.matmul(F.softmax(s, -1, dtype=torch.float32).to(v.dtype), v)
        x = x + self.o(out.transpose(1, 2).reshape(x.shape))
        y = self._norm(x)
        if p.mlp == "gated":
            y = F.silu(self.gate(y)) * self.up(y)
        elif p.mlp == "merged":
            gate, up = self.both(y).chunk(2, -1)
            y = F.gelu(gate, approximate="tanh") * up
        else:
            y = F.gelu(self.up(y))
        return x + self.down(y)


def check(p: Program) -> None:
    torch._dynamo.reset()
    torch.manual_seed(hash(p) % 2**31)
    block = Block(p).eval().to(p.dtype)
    exact = Block(p).eval()
    exact.load_state_dict({k: v.float() for k, v in block.state_dict().items()})
    x = torch.randn(p.batch, p.rows, p.heads * p.dim).to(p.dtype)
    positions = torch.arange(p.filled, p.filled + p.rows)
    length = {"static": p.capacity, "grow": p.filled + p.rows}.get(p.cache, p.rows)
    stored = p.capacity if p.cache == "static" else max(p.filled, 1)
    pad = torch.ones(p.batch, length, dtype=torch.bool)
    if length > 1 and p.filled + p.rows > 1 and (p.cache != "none" or p.rows > 1):
        pad[0, 0] = p.filled == 0  # a left-padded row that still sees a key
    caches = [torch.randn(p.batch, p.kv_heads, stored, p.dim).to(p.dtype) for _ in range(2)]

    def inputs(dtype):
        return (x.to(dtype), positions, pad, *(c.clone().to(dtype) for c in caches))

    run = torch.compile(block, backend="dspark", options=OPTIONS, dynamic=p.dynamic)
    with torch.no_grad():
        mine, theirs, reference = inputs(p.dtype), inputs(p.dtype), inputs(torch.float32)
        got, want, truth = run(*mine), block(*theirs), exact(*reference)
    assert got.dtype == want.dtype and got.shape == want.shape
    if p.dtype == torch.float32:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    else:
        error = (got.float() - truth).abs().max()
        assert error <= 1.5 * (want.float() - truth).abs().max() + 0.02 * truth.abs().max()
    if p.cache == "static":
        for a, b in zip(mine[3:], theirs[3:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)


SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=25, **SETTINGS)
@given(programs())
def test_random_programs(p):
    check(p)


@pytest.mark.exhaustive
@settings(max_examples=500, **SETTINGS)
@given(programs())
def test_500_random_programs(p):
    check(p)
