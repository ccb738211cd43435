"""Whole layers of torch that Dynamo leaves as one call, taken apart into calls that are raised.

``nn.MultiheadAttention`` is a call of ``multi_head_attention_forward``, and under ``no_grad``, in
eval mode, often one of ``_native_multi_head_attention``; ``nn.TransformerEncoderLayer`` is then one
of ``_transformer_encoder_layer_fwd``. What they compute is attention, linear and norms like any
other: each is written out here with those, so that capture keeps these as they are everywhere.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Kept = Mapping[Any, Callable[..., Any]]


class _Keeping(TorchFunctionMode):
    """Calls of torch functions in ``kept`` go to what is kept for them."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.kept.get(function, function)(*args, **(kwargs or {}))


def layers(kept: _Kept) -> dict[Any, Callable[..., Any]]:
    """Functions in place of torch's, by torch's; ``kept`` is what calls inside of them become."""

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _Keeping(kept):
                return function(*args, **kwargs)

        call.__name__ = function.__name__
        return call

    return {
        F.multi_head_attention_forward: _among(F.multi_head_attention_forward, kept),
        torch._native_multi_head_attention: inside(native_multi_head_attention),
        torch._transformer_encoder_layer_fwd: inside(transformer_encoder_layer),
    }


def _among(function: Any, kept: _Kept) -> Callable[..., Any]:
    """A copy of a function of ``torch.nn.functional``, and of those of its helpers, that calls what
    is kept. (A function mode would be asked about the function itself, and be off inside.)"""
    names: dict[str, Any] = {}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, Hashable) and value in kept:
            names[name] = kept[value]
        elif isinstance(value, types.FunctionType) and name.startswith("_in_projection"):
            names[name] = _among(value, kept)
    names["has_torch_function"] = lambda _: False  # while it is traced, a mode would have it
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def native_multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> Any:
    """As torch's: self-attention of ``[B, S, embed_dim]``. What only others of its arguments ask
    for (weights, cross-attention, nested tensors) is left to it."""
    if need_weights or query is not key or key is not value or query.is_nested:
        return torch._native_multi_head_attention(
            query, key, value, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias,
            mask, need_weights, average_attn_weights, mask_type,
        )  # fmt: skip
    projected = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    return _attend(query, num_head, *projected, mask, mask_type), None


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Any:
    """As torch's, of ``[B, S, embed_dim]``; nested tensors are left to it."""
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    norms = (norm_weight_1, norm_bias_1, norm_weight_2, norm_bias_2)
    ffn = (ffn_weight_1, ffn_bias_1, ffn_weight_2, ffn_bias_2)
    if src.is_nested:
        return torch._transformer_encoder_layer_fwd(
            src, embed_dim, num_heads, *weights, use_gelu, norm_first, eps, *norms, *ffn,
            mask, mask_type,
        )  # fmt: skip

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return _attend(x, num_heads, *weights, mask, mask_type)

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed(x), norm_weight_2, norm_bias_2)


def _attend(
    x: Tensor,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    """Self-attention; what is not 0 in ``mask`` hides a key, whatever number it is.

    ``mask_type``: 0 for a mask ``[S, S]``, 1 for one of keys ``[B, S]``, 2 for ``[B, H, S, S]``.
    """
    batch, rows, width = x.shape
    qkv = F.linear(x, qkv_weight, qkv_bias).view(batch, rows, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    allowed = None
    if mask is not None:
        allowed = ~mask.to(torch.bool)
        if mask_type == 1:
            allowed = allowed.view(batch, 1, 1, rows)
    y = F.scaled_dot_product_attention(query, key, value, allowed)
    return F.linear(y.transpose(1, 2).reshape(batch, rows, width), proj_weight, proj_bias)
