"""A decoder with ALiBi: no position embedding, a bias that grows with distance is added to
the attention scores instead. LayerNorm, GELU, biases everywhere, a growing cache.

Source: Press et al., Train Short, Test Long (arXiv 2108.12409).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AlibiConfig:
    """Sizes of an `Alibi` model."""

    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12


def slopes(heads: int) -> Tensor:
    """The geometric sequence of the paper: ``2^(-8 i / heads)`` for i = 1 … heads."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)


class Attention(nn.Module):
    """Causal attention with the scores biased by ``-slope * distance``."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, bias: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        batch, rows, width = x.shape
        parts = self.qkv(x).view(batch, rows, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weights = F.softmax(scores + bias, dim=-1)
        out = torch.matmul(weights, v).transpose(1, 2).reshape(batch, rows, width)
        return self.out(out), (k, v)


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP, each with a residual."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, bias: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        attended, past = self.attention(self.norm1(x), bias, past)
        x = x + attended
        return x + self.down(F.gelu(self.up(self.norm2(x)))), past


class Alibi(nn.Module):
    """Token ids ``[B, M]`` and the past in; logits ``[B, M, vocab]`` and the new past out."""

    def __init__(self, config: AlibiConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.register_buffer("slopes", slopes(config.heads), persistent=False)

    @classmethod
    def tiny(cls) -> Alibi:
        """Two layers of width 48, for tests."""
        return cls(AlibiConfig(vocab=97, layers=2, width=48, heads=4)).eval()

    def forward(self, ids: Tensor, past: list[Past] | None = None) -> tuple[Tensor, list[Past]]:
        start = past[0][0].shape[2] if past is not None else 0
        x = self.embed(ids)
        bias = self.bias(start, ids.shape[1], x)
        new = []
        for i, layer in enumerate(self.layers):
            x, kv = layer(x, bias, past[i] if past is not None else None)
            new.append(kv)
        return self.norm(x) @ self.embed.weight.t(), new

    def bias(self, start: int, rows: int, like: Tensor) -> Tensor:
        """``[1, H, rows, start + rows]``: the distances times the slopes; -inf in the future."""
        query = torch.arange(start, start + rows, device=like.device)[:, None]
        key = torch.arange(start + rows, device=like.device)[None, :]
        bias = self.slopes[:, None, None] * (key - query)
        bias = bias.masked_fill(key > query, float("-inf"))
        return bias[None].to(like.dtype)
