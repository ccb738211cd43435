"""The draft's decoder layers: ordinary ones of the target's family, with the context's keys and
values injected.

Only the rows of a block give queries. Keys and values are ``[context ; block]``: a layer applies
its own k_proj and v_proj (and k_norm, and RoPE) to ``H_ctx``, which all layers share and which does
not pass through input_layernorm; the block's come from the layer's input as usual. DSpark,
arXiv 2607.05147, after DFlash, arXiv 2602.06036.

Shapes: B batch, M rows that ask, N context tokens, H heads, G key heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_compile.models.draft_config import DraftConfig, DraftError

KeyValue = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, the statistic in float32.

    Qwen3 and most others round to the input's dtype before the weight, Gemma4 after it (``late``).
    """

    def __init__(self, width: int, eps: float, *, late: bool = False, scale: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if scale else None
        self.eps, self.late = eps, late

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return scaled.to(x.dtype)
        if self.late:
            return (scaled * self.weight.float()).to(x.dtype)
        return self.weight * scaled.to(x.dtype)


class Rotary(nn.Module):
    """Angles of RoPE: cos and sin ``[B, M, R]`` float32 at positions ``[B, M]``; R features turn.

    Types: default, linear, llama3, yarn, proportional (Gemma4: the unrotated features have angle
    zero). Formulas as in transformers' configurations of the same names.

    Raises:
        DraftError: ``rope_type`` is another one.
    """

    inverse: Tensor

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        inverse, self.scale = inverse_frequencies(
            config.rope_parameters, config.head_dim, config.max_position_embeddings
        )
        self.register_buffer("inverse", inverse, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Rotary:
        # Moved with the model, never rounded with it.
        exact = self.inverse
        super()._apply(fn, recurse)
        self.inverse = exact.to(self.inverse.device)
        return self

    def forward(self, positions: Tensor) -> KeyValue:
        angle = positions[..., None].float() * self.inverse
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.scale, angle.sin() * self.scale


def inverse_frequencies(rope: dict[str, Any], width: int, longest: int) -> tuple[Tensor, float]:
    """Inverse frequencies ``[R / 2]`` float32, and the factor on cos and sin."""
    kind = rope.get("rope_type", "default")
    theta, part = float(rope["rope_theta"]), float(rope.get("partial_rotary_factor") or 1.0)
    factor = float(rope.get("factor") or 1.0)
    if kind == "proportional":
        turned = int(part * width // 2)
        inverse = theta ** (-torch.arange(0, 2 * turned, 2).float() / width)
        return F.pad(inverse, (0, width // 2 - turned)) / factor, 1.0
    turned = int(width * part)
    inverse = theta ** (-torch.arange(0, turned, 2).float() / turned)
    if kind == "default":
        return inverse, 1.0
    if kind == "linear":
        return inverse / factor, 1.0
    original = float(rope.get("original_max_position_embeddings") or longest)
    if kind == "llama3":
        lacking = [n for n in ("low_freq_factor", "high_freq_factor") if rope.get(n) is None]
        if lacking:
            raise DraftError(f"rope_type='llama3' needs {' and '.join(lacking)}")
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = original * inverse / (2 * math.pi)  # of each feature within the original length
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * (blend + (1 - blend) / factor), 1.0
    if kind == "yarn":
        return _yarn(rope, inverse, turned, theta, original)
    raise DraftError(
        f"rope_type={kind!r}: drafts know default, linear, llama3, yarn and proportional"
    )


def _yarn(
    rope: dict[str, Any], inverse: Tensor, turned: int, theta: float, original: float
) -> tuple[Tensor, float]:
    factor = float(rope.get("factor") or 1.0)

    def feature(turns: float) -> float:
        return turned * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = feature(rope.get("beta_fast") or 32), feature(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turned - 1)
    ramp = (torch.arange(turned // 2).float() - first) / max(last - first, 0.001)
    keep = 1 - ramp.clamp(0, 1)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scale = rope.get("attention_factor")
    if scale is None:
        one, all_ = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = magnitude(one) / magnitude(all_) if one and all_ else magnitude(1.0)
    return inverse * keep + inverse / factor * (1 - keep), float(scale)


def rotate(x: Tensor, angles: KeyValue) -> Tensor:
    """Half-split RoPE of ``x [B, H, M, D]`` by cos and sin ``[B, M, R]``; features past R stay."""
    cos, sin = (a[:, None].to(x.dtype) for a in angles)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Grouped-query attention of block rows over ``[context ; block]``."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        heads, keys, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias, late = config.attention_bias, config.family == "gemma4"
        self.heads, self.kv_heads, self.head_dim = heads, keys, width
        self.scale = width**-0.5 if config.attention_scale is None else config.attention_scale
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys * width, bias=bias)
        self.v_proj = (
            None
            if config.attention_k_eq_v
            else nn.Linear(config.hidden_size, keys * width, bias=bias)
        )
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=bias)
        norm = config.qk_norm or late
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(width, eps, late=late) if norm else None
        self.k_norm = RMSNorm(width, eps, late=late) if norm else None
        self.v_norm = RMSNorm(width, eps, late=True, scale=False) if late else None

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, self.head_dim))

    def key_value(self, x: Tensor, angles: KeyValue) -> KeyValue:
        """Keys, rotated, and values ``[B, G, N, D]`` of ``x [B, N, hidden]``."""
        key = self._heads(self.k_proj(x), self.kv_heads)
        value = key if self.v_proj is None else self._heads(self.v_proj(x), self.kv_heads)
        if self.k_norm is not None:
            key = self.k_norm(key)
        if self.v_norm is not None:
            value = self.v_norm(value)
        return rotate(key.transpose(1, 2), angles), value.transpose(1, 2)

    def query(self, x: Tensor, angles: KeyValue) -> Tensor:
        """Queries, rotated ``[B, H, M, D]``."""
        query = self._heads(self.q_proj(x), self.heads)
        if self.q_norm is not None:
            query = self.q_norm(query)
        return rotate(query.transpose(1, 2), angles)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """Attention with a boolean mask ``[B, 1, M, N]``, and o_proj: ``[B, M, hidden]``."""
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=allowed,
            scale=self.scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def attend_blocks(
        self, query: Tensor, context: KeyValue, own: KeyValue, before: Tensor, same: Tensor
    ) -> Tensor:
        """`attend` of many blocks over one context without a mask of all blocks by all blocks.

        Scores of the context and of each block's own rows share a softmax. That saves most of the
        arithmetic where blocks outnumber the context; it keeps the scores, which suits a CPU.

        Args:
            query: ``[B, H, A * M, D]``. context: ``[B, G, N, D]``. own: ``[B, G, A * M, D]``.
            before: which context each row sees ``[B, A * M, N]``. same: which rows of its block
                ``[B, A, M, M]``.
        """
        blocks, rows = same.shape[1:3]
        share = self.heads // self.kv_heads
        query = query.unflatten(1, (self.kv_heads, share)) * self.scale
        scores = query.flatten(2, 3) @ context[0].transpose(-1, -2)
        scores = scores.unflatten(2, (share, -1))
        scores = scores.masked_fill(~before[:, None, None], -torch.inf)
        key, value = (t.unflatten(2, (blocks, rows)) for t in own)
        # [B, G, share, A, M, D] by [B, G, 1, A, D, M]
        inside = query.unflatten(3, (blocks, rows)) @ key[:, :, None].transpose(-1, -2)
        inside = inside.masked_fill(~same[:, None, None], -torch.inf).flatten(3, 4)
        weights = torch.softmax(torch.cat((scores, inside), dim=-1).float(), dim=-1)
        outer, inner = weights.to(value.dtype).split((scores.shape[-1], rows), dim=-1)
        mixed = (outer.flatten(2, 3) @ context[1]).unflatten(2, (share, -1))
        inner = inner.unflatten(3, (blocks, rows)) @ value[:, :, None]
        mixed = (mixed + inner.flatten(3, 4)).flatten(1, 2)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Gated: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.activation = config.hidden_act
        if config.hidden_act not in _ACTIVATIONS:
            raise DraftError(
                f"hidden_act={config.hidden_act!r}: drafts know {', '.join(_ACTIVATIONS)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class DraftLayer(nn.Module):
    """A pre-norm layer; Gemma4's has norms behind attention and MLP as well, and a scalar."""

    layer_scalar: Tensor

    def __init__(self, config: DraftConfig, index: int) -> None:
        super().__init__()
        self.sandwich = config.family == "gemma4"
        self.sliding = config.layer_types[index] == "sliding_attention"
        self.self_attn = Attention(config)
        self.mlp = MLP(config)

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, late=self.sandwich)

        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if self.sandwich:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
            self.register_buffer("layer_scalar", torch.ones(1))

    def start(self, x: Tensor, angles: KeyValue) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the block rows ``x``."""
        normed = self.input_layernorm(x)
        key, value = self.self_attn.key_value(normed, angles)
        return self.self_attn.query(normed, angles), key, value

    def finish(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor
    ) -> Tensor:
        """The layer's output from its input and what the rows attend to."""
        return self.after(x, self.self_attn.attend(query, key, value, allowed))

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention: residuals, norms, MLP."""
        if not self.sandwich:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(mixed)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar
