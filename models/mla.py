"""A decoder with multi-head latent attention, as DeepSeek-V2 describes it and as most code
writes it: the cache holds the normalised latent and the rotated key part, and every step
expands the latents of the *whole* cache through ``kv_b`` to keys and values.

    latent = norm(kv_a(x))[:R]                    cached, [B, 1, N, R]
    rotary = rope(kv_a(x)[R:])                    cached, [B, 1, N, Dr]
    key, value = kv_b(latent)                     for every cached row, at every step
    score = q_nope . key + q_rope . rotary

Absorbing ``kv_b`` into the query and the output removes the third line; see
``passes/absorb_mla.py``. Source: arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class MLAConfig:
    """Sizes of an `MLA` model; the defaults of the latent part are DeepSeek-V2-Lite's."""

    vocab: int = 32000
    layers: int = 12
    width: int = 2048
    heads: int = 16
    q_rank: int = 1536
    rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    hidden: int = 5632
    theta: float = 10000.0
    eps: float = 1e-6


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split RoPE; cos and sin ``[M, Dr]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """MLA over a static latent cache in buffers."""

    latent_cache: Tensor
    rope_cache: Tensor

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        heads, head_dim = config.heads, config.nope + config.rope
        self.q_a = nn.Linear(config.width, config.q_rank, bias=False)
        self.q_norm = nn.RMSNorm(config.q_rank, eps=config.eps)
        self.q_b = nn.Linear(config.q_rank, heads * head_dim, bias=False)
        self.kv_a = nn.Linear(config.width, config.rank + config.rope, bias=False)
        self.kv_norm = nn.RMSNorm(config.rank, eps=config.eps)
        self.kv_b = nn.Linear(config.rank, heads * (config.nope + config.value), bias=False)
        self.out = nn.Linear(heads * config.value, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor
    ) -> Tensor:
        config = self.config
        batch, rows, _ = x.shape
        q = self.q_b(self.q_norm(self.q_a(x))).view(batch, rows, config.heads, -1).transpose(1, 2)
        q_nope, q_rope = q.split([config.nope, config.rope], dim=-1)
        latent, k_rope = self.kv_a(x).split([config.rank, config.rope], dim=-1)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        self.latent_cache[:, :, input_pos] = self.kv_norm(latent)[:, None]
        self.rope_cache[:, :, input_pos] = k_rope[:, None]

        expanded = self.kv_b(self.latent_cache.squeeze(1))
        expanded = expanded.view(batch, -1, config.heads, config.nope + config.value)
        k_nope, v = expanded.transpose(1, 2).split([config.nope, config.value], dim=-1)
        k_rope = self.rope_cache.expand(-1, config.heads, -1, -1)
        out = F.scaled_dot_product_attention(
            torch.cat((q_nope, q_rope), dim=-1),
            torch.cat((k_nope, k_rope), dim=-1),
            v,
            attn_mask=mask,
        )
        return self.out(out.transpose(1, 2).reshape(batch, rows, -1))


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each with a residual."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.eps)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, input_pos: Tensor
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, input_pos)
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class MLA(nn.Module):
    """Token ids ``[B, M]`` at positions ``input_pos [M]`` in, logits ``[B, M, vocab]`` out."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        self.length = 0

    @classmethod
    def tiny(cls, batch: int = 1, length: int = 64) -> MLA:
        """Two layers of width 48 with their caches, for tests."""
        config = MLAConfig(
            vocab=97, layers=2, width=48, heads=4, q_rank=32, rank=24, nope=12, rope=8, value=10,
            hidden=80,
        )  # fmt: skip
        model = cls(config).eval()
        model.setup_caches(batch, length)
        return model

    def setup_caches(self, batch: int, length: int) -> None:
        """Allocate latent caches for ``batch`` rows of up to ``length`` tokens."""
        config, like = self.config, self.embed.weight
        self.length = length
        for layer in self.layers:
            for name, width in (("latent_cache", config.rank), ("rope_cache", config.rope)):
                empty = torch.zeros(batch, 1, length, width, dtype=like.dtype, device=like.device)
                layer.attention.register_buffer(name, empty, persistent=False)  # type: ignore[union-attr]

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.angles(input_pos, x)
        keys = torch.arange(self.length, device=ids.device)
        mask = (keys[None, :] <= input_pos[:, None])[None, None]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, input_pos)
        return self.norm(x) @ self.embed.weight.t()

    def angles(self, input_pos: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin ``[M, Dr]`` in the dtype of ``like``."""
        width = self.config.rope
        steps = torch.arange(0, width, 2, device=like.device).float() / width
        angle = torch.outer(input_pos.float(), self.config.theta**-steps)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
