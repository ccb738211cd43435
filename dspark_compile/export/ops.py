"""Ops between the dialect and ONNX: each is one ONNX op, with its meaning in plain torch.

Lowering puts them into the graph, ``translate.py`` writes them out. That they can run is what
verification uses to find the first node whose value differs. They live in the namespace
``dspark_onnx`` and never reach a compiler.

    reshape                  Reshape with constant sizes: 0 keeps a dimension, -1 is inferred
    rms_norm, skip_rms_norm  RMSNormalization, SkipSimplifiedLayerNormalization
    layer_norm, skip_layer_norm
    rotary                   RotaryEmbedding
    attention                Attention
    tensor_scatter           TensorScatter
    gqa                      GroupQueryAttention
    seqlens, total_length    what GroupQueryAttention wants to know of the attention mask
    mask                     a predicate as a bool tensor; decomposed before translation
    matmul_nbits             MatMulNBits
    dequantize               DequantizeLinear
    silu                     QuickGelu with alpha 1
    moe, qmoe                MoE, QMoE; gate_and_up is decomposed before translation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.ops import OPS
from dspark_compile.ops.moe import gate_and_up as experts_between
from dspark_compile.ops.predicate import evaluate

_LIBRARY = torch.library.Library("dspark_onnx", "FRAGMENT")
NAMES: list[str] = []


def _define(schema: str, fake: Callable[..., Any] | None = None) -> Callable[..., Any]:
    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dspark_onnx::{name}", fake or reference, lib=_LIBRARY)
        NAMES.append(name)
        return reference

    return register


def op(name: str) -> Any:
    """The overload of the op ``name``."""
    return getattr(torch.ops.dspark_onnx, name).default


@_define("reshape(Tensor x, int[] shape) -> Tensor")
def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """ONNX's Reshape: a 0 in ``shape`` takes the size that ``x`` has at that place."""
    sizes: list[Any] = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    if -1 in sizes:
        known = 1
        for n in sizes:
            known = known * (1 if isinstance(n, int) and n == -1 else n)
        sizes[sizes.index(-1)] = x.numel() // known
    return x.reshape(sizes).clone()


@_define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension, the statistic in float32."""
    z = x.float()
    return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@_define("skip_rms_norm(Tensor x, Tensor skip, Tensor weight, float eps) -> (Tensor, Tensor)")
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + skip), x + skip)``."""
    total = x + skip
    return rms_norm(total, weight, eps), total


@_define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension."""
    y = F.layer_norm(x.float(), x.shape[-1:], weight.float(), None, eps)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@_define(
    "skip_layer_norm(Tensor x, Tensor skip, Tensor weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)"
)
def skip_layer_norm(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(x + skip), x + skip)``."""
    total = x + skip
    return layer_norm(total, weight, bias, eps), total


@_define("silu(Tensor x) -> Tensor")
def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return F.silu(x)


@_define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int rotary_dim, "
    "bool interleaved, int heads) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    interleaved: bool,
    heads: int,
) -> Tensor:
    """RotaryEmbedding of ``x [B, H, S, D]``, or ``[B, S, heads * D]`` with ``heads > 0``.

    cos and sin: ``[B, S, R / 2]``, or tables ``[positions, R / 2]`` with ``positions [B, S]``.
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    y = x.unflatten(-1, (heads, -1)).transpose(1, 2) if heads else x
    y = OPS["rope"].reference(y, cos.unsqueeze(1), sin.unsqueeze(1), rotary_dim, interleaved)
    return (y.transpose(1, 2).flatten(2) if heads else y).contiguous()


@_define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor")
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention over ``[B, H, S, D]``; ``mask`` is bool (True attends) or added."""
    out = OPS["attention"].reference(query, key, value, mask, None, [], [], scale=scale)
    return out.contiguous()


@_define("tensor_scatter(Tensor cache, Tensor new, Tensor start) -> Tensor")
def tensor_scatter(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """The cache ``[B, H, N, D]`` or ``[B, H, N]`` with ``new`` from row ``start[b]`` on."""
    rows = start.view(-1, 1) + torch.arange(new.shape[2], device=new.device)
    index = rows.view(rows.shape[0], 1, rows.shape[1], *(1,) * (new.dim() - 3)).expand_as(new)
    return cache.scatter(2, index, new)


@_define("seqlens(Tensor attention_mask) -> Tensor")
def seqlens(attention_mask: Tensor) -> Tensor:
    """int32 ``[B]``: valid tokens of each row, less one."""
    return (attention_mask.sum(1) - 1).to(torch.int32)


@_define("total_length(Tensor attention_mask) -> Tensor")
def total_length(attention_mask: Tensor) -> Tensor:
    """int32 ``[1]``: how long the attention mask is."""
    return torch.full((1,), attention_mask.shape[1], dtype=torch.int32)


@_define(
    "mask(Tensor[] tensors, SymInt[] ints, SymInt b, SymInt h, SymInt q, SymInt k, str text) "
    "-> Tensor"
)
def mask(
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    b: int,
    h: int,
    q: int,
    k: int,
    text: str,
) -> Tensor:
    """A predicate of `dspark_compile.ops.predicate` as a bool tensor."""
    device = tensors[0].device if tensors else torch.device("cpu")
    return evaluate(text, tensors, ints, (b, h, q, k), device)


_GQA = (
    "gqa(Tensor query, Tensor? key, Tensor? value, Tensor past_key, Tensor past_value, "
    "Tensor seqlens, Tensor total, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? bias, "
    "Tensor? sinks, Tensor? key_scale, Tensor? value_scale, int heads, int kv_heads, float scale, "
    "float softcap, int window, bool interleaved, int bits, bool per_channel) "
    "-> (Tensor, Tensor, Tensor)"
)


def _gqa_fake(
    query: Tensor, key: Any, value: Any, past_key: Tensor, past_value: Tensor, *rest: Any
) -> Any:
    heads, kv_heads = rest[9], rest[10]
    if key is None:
        size = query.shape[2] // (heads + 2 * kv_heads)
        out = query.new_empty((query.shape[0], query.shape[1], heads * size))
    else:
        out = torch.empty_like(query)
    rows = past_key.shape[2] + query.shape[1]
    shape = (past_key.shape[0], past_key.shape[1], rows, past_key.shape[3])
    return out, past_key.new_empty(shape), past_value.new_empty(shape)


@_define(_GQA, fake=_gqa_fake)
def gqa(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    seqlens: Tensor,
    total: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    softcap: float,
    window: int,
    interleaved: bool,
    bits: int,
    per_channel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupQueryAttention, for rows without padding (``total - 1`` everywhere in ``seqlens``).

    query ``[B, S, H * D]``, key and value ``[B, S, Hkv * D]``, or all three side by side in
    query; past ``[B, Hkv, P, D]`` (with 4 bits ``D / 2`` bytes); ``window`` -1 is none. The result
    ``[B, S, H * D]``, and the caches with the new rows behind.
    """
    if key is None or value is None:
        size = query.shape[2] // (heads + 2 * kv_heads)
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = (
        x.unflatten(-1, (n, -1)).transpose(1, 2)
        for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if cos is not None and sin is not None:
        assert positions is not None
        dim = 2 * cos.shape[-1]
        q = rotary(q, cos, sin, positions, dim, interleaved, 0)
        k = rotary(k, cos, sin, positions, dim, interleaved, 0)
    if bits:
        k, v = quantize_static(k, key_scale, bits), quantize_static(v, value_scale, bits)
    key_cache, value_cache = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    keys, values = key_cache, value_cache
    if bits:
        keys = dequantize_static(keys, key_scale, bits).to(query.dtype)
        values = dequantize_static(values, value_scale, bits).to(query.dtype)
    past = past_key.shape[2]
    text = "k <= q + n0" + (" & (k > q + n0 - n1)" if window > 0 else "")
    text = text if window <= 0 else f"(k <= q + n0){text[11:]}"
    out = OPS["attention"].reference(
        q, keys, values, bias, sinks, [], [past, window], scale=scale, mask=text, softcap=softcap
    )
    return out.transpose(1, 2).flatten(2).contiguous(), key_cache, value_cache


def quantize_static(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """``x [B, H, S, D]`` by a static scale (one, or ``[H, 1, D]``): int8, or two int4 in a byte,
    the even feature in the low half, each plus 8."""
    assert scale is not None
    top = 127 if bits == 8 else 7
    q = torch.round(x.float() / scale.float()).clamp(-top - 1, top)
    if bits == 8:
        return q.to(torch.int8)
    nibble = (q + 8).to(torch.uint8)
    return nibble[..., 0::2] | nibble[..., 1::2] << 4


def dequantize_static(x: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """What `quantize_static` packed, in float32."""
    assert scale is not None
    if bits == 4:
        x = torch.stack((x & 15, x >> 4), -1).flatten(-2).to(torch.int8) - 8
    return x.float() * scale.float()


@_define(
    "matmul_nbits(Tensor x, Tensor weight, Tensor scales, Tensor? zero_points, int columns, "
    "int rows, int bits, int block) -> Tensor",
    fake=lambda x, weight, scales, zero_points, columns, rows, bits, block: x.new_empty(
        (*x.shape[:-1], rows)
    ),
)
def matmul_nbits(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    columns: int,
    rows: int,
    bits: int,
    block: int,
) -> Tensor:
    """MatMulNBits: ``x [..., K] @ W^T`` with ``weight`` uint8 ``[N, K / block, block * bits / 8]``
    (low half first), unsigned with zero point ``2^(bits-1)`` or ``zero_points``."""
    q = weight
    if bits == 4:
        q = torch.stack((weight & 15, weight >> 4), -1).flatten(-2)
    zero: Any = 2 ** (bits - 1)
    if zero_points is not None:
        zero = zero_points
        if bits == 4:
            zero = torch.stack((zero & 15, zero >> 4), -1).flatten(-2)
        zero = zero.reshape(rows, -1)[:, : q.shape[1]].unsqueeze(-1).float()
    w = ((q.float() - zero) * scales.reshape(rows, -1, 1).float()).reshape(rows, -1)[:, :columns]
    return F.linear(x, w.to(x.dtype))


@_define(
    "moe(Tensor x, Tensor logits, Tensor fc1, Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, "
    "int k, float alpha, float beta, float limit) -> Tensor"
)
def moe(
    x: Tensor,
    logits: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    k: int,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """MoE: the k experts of the largest ``logits [T, E]``, weighed by the softmax over those.

    ``fc1 [E, 2 I, K]`` has rows of gate and up in turns, ``fc2 [E, N, I]``; between them
    ``gate * sigmoid(alpha * gate) * (up + beta)``, gate at most ``limit`` and up within ``±limit``
    if that is not 0. Computes every expert: it is here for its meaning.
    """
    rows = x.reshape(-1, x.shape[-1])
    top = logits.float().topk(k, -1)
    share = torch.zeros_like(logits.float()).scatter(-1, top.indices, top.values.softmax(-1))
    y = _experts(rows, fc1, fc1_bias, fc2, fc2_bias, alpha, beta, limit)
    y = (y * share.t().unsqueeze(-1)).sum(0).to(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@_define(
    "qmoe(Tensor x, Tensor chosen, Tensor share, Tensor fc1, Tensor fc1_scale, Tensor? fc1_bias, "
    "Tensor fc2, Tensor fc2_scale, Tensor? fc2_bias, Tensor? fc1_zero, Tensor? fc2_zero, int k, "
    "float alpha, float beta, float limit, int bits, int block) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def qmoe(
    x: Tensor,
    chosen: Tensor,
    share: Tensor,
    fc1: Tensor,
    fc1_scale: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_scale: Tensor,
    fc2_bias: Tensor | None,
    fc1_zero: Tensor | None,
    fc2_zero: Tensor | None,
    k: int,
    alpha: float,
    beta: float,
    limit: float,
    bits: int,
    block: int,
) -> Tensor:
    """QMoE: the k experts with the largest ``chosen [T, E]``, weighed by ``share [T, E]``; weights
    as `dspark_compile.export.qmoe` packs them, otherwise as `moe`."""
    from .qmoe import Packed, dequantised

    first = dequantised(Packed(fc1, fc1_scale.float(), fc1_zero, bits, block)).to(x.dtype)
    second = dequantised(Packed(fc2, fc2_scale.float(), fc2_zero, bits, block)).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    top = chosen.float().topk(k, -1).indices
    weights = torch.zeros_like(share.float()).scatter(-1, top, share.float().gather(-1, top))
    y = _experts(rows, first, fc1_bias, second, fc2_bias, alpha, beta, limit)
    y = (y * weights.t().unsqueeze(-1)).sum(0).to(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _experts(
    rows: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor | None,
    fc2: Tensor,
    fc2_bias: Tensor | None,
    alpha: float,
    beta: float,
    limit: float,
) -> Tensor:
    """Every expert of every row ``[E, T, N]``."""
    y = torch.einsum("tk,eik->eti", rows, fc1)
    y = y if fc1_bias is None else y + fc1_bias.unsqueeze(1)
    gate, up = y[..., 0::2], y[..., 1::2]
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = torch.einsum("eti,eni->etn", gate * torch.sigmoid(alpha * gate) * (up + beta), fc2)
    return y if fc2_bias is None else y + fc2_bias.unsqueeze(1)


@_define(
    "gate_and_up(Tensor? gate, Tensor up, str activation, float[] limits) -> Tensor",
    fake=lambda gate, up, activation, limits: torch.empty_like(up),
)
def gate_and_up(
    gate: Tensor | None, up: Tensor, activation: str, limits: Sequence[float]
) -> Tensor:
    """What lies between an expert's products; decomposed before translation."""
    return experts_between(gate, up, activation, list(limits)).to(up.dtype)


@_define(
    "dequantize(Tensor x, Tensor scale, int block, Tensor? zero=None) -> Tensor",
    fake=lambda x, scale, block, zero=None: torch.empty(
        x.shape, dtype=scale.dtype, device=x.device
    ),
)
def dequantize(x: Tensor, scale: Tensor, block: int, zero: Tensor | None = None) -> Tensor:
    """DequantizeLinear of ``x [..., D]`` int8 over blocks of the last dimension: ``scale`` and
    ``zero [..., D / block]``; the result has the scale's dtype."""
    y = x.unflatten(-1, (-1, block)).to(scale.dtype)
    y = y if zero is None else y - zero.unsqueeze(-1).to(scale.dtype)
    return (y * scale.unsqueeze(-1)).flatten(-2)
