"""A decoder in the manner of gpt-fast: a static cache in module buffers, written at
``input_pos``; interleaved RoPE and the causal mask read from precomputed buffers at the same
positions; one merged QKV projection; ``scaled_dot_product_attention``.

Call `setup_caches` once, then ``model(ids, input_pos)`` for the prompt and for every token.
The caches are buffers, hence inputs of the compiled graph, as a Hugging Face StaticCache is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT` model."""

    vocab: int = 32000
    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 11008
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.width // self.heads


class RMSNorm(nn.Module):
    """``_norm(x.float()).type_as(x) * weight``."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


class KVCache(nn.Module):
    """Keys and values ``[B, H, N, D]`` in buffers."""

    def __init__(self, batch: int, heads: int, length: int, head_dim: int, like: Tensor) -> None:
        super().__init__()
        empty = torch.zeros(batch, heads, length, head_dim, dtype=like.dtype, device=like.device)
        self.register_buffer("k", empty, persistent=False)
        self.register_buffer("v", empty.clone(), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows ``input_pos``; the whole cache comes back."""
        self.k[:, :, input_pos] = k
        self.v[:, :, input_pos] = v
        return self.k, self.v


def frequencies(length: int, head_dim: int, theta: float) -> Tensor:
    """``[length, head_dim / 2, 2]``: the cosine and sine of each pair's angle."""
    steps = torch.arange(0, head_dim, 2).float() / head_dim
    angle = torch.outer(torch.arange(length).float(), theta**-steps)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate_pairs(x: Tensor, freqs: Tensor) -> Tensor:
    """Interleaved RoPE of ``x [B, M, H, D]`` in float32; freqs ``[M, D / 2, 2]``."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, x.shape[1], 1, pairs.shape[3], 2)
    turned = torch.stack(
        (
            pairs[..., 0] * freqs[..., 0] - pairs[..., 1] * freqs[..., 1],
            pairs[..., 1] * freqs[..., 0] + pairs[..., 0] * freqs[..., 1],
        ),
        dim=-1,
    )
    return turned.flatten(3).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention over the cache."""

    kv_cache: KVCache

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        total = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.wqkv = nn.Linear(config.width, total, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        config = self.config
        batch, rows, _ = x.shape
        kv_width = config.kv_heads * config.head_dim
        q, k, v = self.wqkv(x).split([config.width, kv_width, kv_width], dim=-1)
        q = rotate_pairs(q.view(batch, rows, config.heads, config.head_dim), freqs)
        k = rotate_pairs(k.view(batch, rows, config.kv_heads, config.head_dim), freqs)
        v = v.view(batch, rows, config.kv_heads, config.head_dim)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = self.kv_cache.update(input_pos, k, v)
        k = k.repeat_interleave(config.heads // config.kv_heads, dim=1)
        v = v.repeat_interleave(config.heads // config.kv_heads, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, rows, config.width))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden, bias=False)
        self.w3 = nn.Linear(config.width, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class GPT(nn.Module):
    """Token ids ``[B, M]`` at positions ``input_pos [M]`` in, logits ``[B, M, vocab]`` out."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.output = nn.Linear(config.width, config.vocab, bias=False)

    @classmethod
    def tiny(cls, batch: int = 1, length: int = 24) -> GPT:
        """Two layers of width 48 with their caches, for tests."""
        config = GPTConfig(vocab=97, layers=2, width=48, heads=6, kv_heads=2, hidden=80)
        model = cls(config).eval()
        model.setup_caches(batch, length)
        return model

    def setup_caches(self, batch: int, length: int) -> None:
        """Allocate caches for ``batch`` rows of up to ``length`` tokens, and the tables."""
        config, like = self.config, self.output.weight
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(  # type: ignore[union-attr]
                batch, config.kv_heads, length, config.head_dim, like
            )
        freqs = frequencies(length, config.head_dim, config.theta).to(like.device)
        causal = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
        self.register_buffer("freqs", freqs.to(like.dtype), persistent=False)
        self.register_buffer("causal_mask", causal, persistent=False)

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        freqs = self.freqs[input_pos]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, freqs, mask, input_pos)
        return self.output(self.norm(x))
