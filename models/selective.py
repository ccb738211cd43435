"""A decoder whose attention mask depends on its data: a token is visible to a later one only
if their selector features agree.

No rule over positions can replace such a mask. A compiler must leave it a tensor and stay
exact; this model is the test of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class SelectiveConfig:
    """Sizes of a `Selective` model; ``select`` is the width of the selector."""

    vocab: int = 32000
    layers: int = 12
    width: int = 768
    heads: int = 12
    select: int = 16


class Attention(nn.Module):
    """Attention over the earlier tokens that the selector picks, and oneself."""

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.ask = nn.Linear(config.width, config.select, bias=False)
        self.offer = nn.Linear(config.width, config.select, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        q, k, v = (
            part.view(batch, rows, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        agree = torch.einsum("bqd,bkd->bqk", self.ask(x), self.offer(x)) > 0
        past = torch.ones(rows, rows, dtype=torch.bool, device=x.device).tril()
        itself = torch.eye(rows, dtype=torch.bool, device=x.device)
        mask = (agree & past) | itself
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return self.out(out.transpose(1, 2).reshape(batch, rows, width))


class Block(nn.Module):
    """Pre-norm attention and a squared-ReLU MLP, each with a residual."""

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.relu(self.up(self.norm2(x))).square())


class Selective(nn.Module):
    """Token ids ``[B, M]`` in, logits ``[B, M, vocab]`` out."""

    def __init__(self, config: SelectiveConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)

    @classmethod
    def tiny(cls) -> Selective:
        """Two layers of width 48, for tests."""
        return cls(SelectiveConfig(vocab=97, layers=2, width=48, heads=4, select=8)).eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.t()
