"""Translation tables: from the ops of a lowered program to ONNX nodes.

A table is what ``torch.onnx.export(custom_translation_table=...)`` takes. Everything that is in no
table is ATen, which torch translates itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .ops import op

Table = dict[Any, Callable[..., Any]]


def table(opset_version: int) -> Table:
    """Translations for one opset."""
    import onnxscript

    std = onnxscript.values.Opset("", opset_version)
    made: Table = {}

    def translates(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            made[op(name)] = function
            return function

        return register

    @translates("reshape")
    def reshape(x: Any, shape: Any) -> Any:
        return std.Reshape(x, _ints(std, shape))

    # A tracer may read a size off a stride: inputs are contiguous.
    def sym_stride(x: Any, dim: int) -> Any:
        sizes = std.Shape(x, start=dim + 1)
        return std.ReduceProd(sizes, keepdims=0)

    made[torch.ops.aten.sym_stride.int] = sym_stride

    @translates("rms_norm")
    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return std.RMSNormalization(x, weight, axis=-1, epsilon=eps)

    @translates("skip_rms_norm")
    def skip_rms_norm(x: Any, skip: Any, weight: Any, eps: float) -> Any:
        out = ort("SkipSimplifiedLayerNormalization")(skip, x, weight, epsilon=eps)
        return out[0], out[3]

    @translates("layer_norm")
    def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
        return std.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)[0]

    @translates("skip_layer_norm")
    def skip_layer_norm(x: Any, skip: Any, weight: Any, bias: Any, eps: float) -> Any:
        out = ort("SkipLayerNormalization")(skip, x, weight, bias, epsilon=eps)
        return out[0], out[3]

    @translates("silu")
    def silu(x: Any) -> Any:
        return ort("QuickGelu")(x, alpha=1.0)

    @translates("rotary")
    def rotary(
        x: Any, cos: Any, sin: Any, positions: Any, rotary_dim: int, interleaved: bool, heads: int
    ) -> Any:
        size = x.shape[-1] if not heads else x.shape[-1] // heads
        partial = 0 if size == rotary_dim else rotary_dim
        return std.RotaryEmbedding(
            x,
            cos,
            sin,
            positions,
            interleaved=int(interleaved),
            rotary_embedding_dim=partial,
            num_heads=heads,
        )

    @translates("attention")
    def attention(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
        return std.Attention(query, key, value, mask, scale=scale)[0]

    @translates("tensor_scatter")
    def tensor_scatter(cache: Any, new: Any, start: Any) -> Any:
        return std.TensorScatter(cache, new, start, axis=2)

    @translates("seqlens")
    def seqlens(attention_mask: Any) -> Any:
        one = std.Constant(value_ints=[1])
        total = std.ReduceSum(attention_mask, one, keepdims=0)
        return std.Cast(std.Sub(total, one), to=6)

    @translates("total_length")
    def total_length(attention_mask: Any) -> Any:
        return std.Cast(std.Shape(attention_mask, start=1, end=2), to=6)

    @translates("gqa")
    def gqa(
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        seqlens: Any,
        total: Any,
        cos: Any,
        sin: Any,
        positions: Any,
        bias: Any,
        sinks: Any,
        key_scale: Any,
        value_scale: Any,
        heads: int,
        kv_heads: int,
        scale: float,
        softcap: float,
        window: int,
        interleaved: bool,
        bits: int,
        per_channel: bool,
    ) -> Any:
        inputs = [query, key, value, past_key, past_value, seqlens, total, cos, sin, positions]
        inputs += [bias, sinks, key_scale, value_scale]
        while inputs[-1] is None:
            inputs.pop()
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": kv_heads,
            "scale": scale,
            "do_rotary": int(cos is not None),
            "rotary_interleaved": int(interleaved),
            "local_window_size": window,
            "softcap": softcap,
        }
        if bits:
            kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
            attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
        return ort("GroupQueryAttention")(*inputs, **attributes)

    @translates("moe")
    def moe(
        x: Any,
        logits: Any,
        fc1: Any,
        fc1_bias: Any,
        fc2: Any,
        fc2_bias: Any,
        k: int,
        alpha: float,
        beta: float,
        limit: float,
    ) -> Any:
        inputs = [x, logits, fc1, fc1_bias, fc2, fc2_bias]
        while inputs[-1] is None:
            inputs.pop()
        extra = {"swiglu_limit": limit} if limit else {}
        return ort("MoE")(
            *inputs,
            k=k,
            activation_type="swiglu",
            normalize_routing_weights=1,
            swiglu_fusion=1,
            activation_alpha=alpha,
            activation_beta=beta,
            **extra,
        )

    @translates("qmoe")
    def qmoe(
        x: Any,
        chosen: Any,
        share: Any,
        fc1: Any,
        fc1_scale: Any,
        fc1_bias: Any,
        fc2: Any,
        fc2_scale: Any,
        fc2_bias: Any,
        fc1_zero: Any,
        fc2_zero: Any,
        k: int,
        alpha: float,
        beta: float,
        limit: float,
        bits: int,
        block: int,
    ) -> Any:
        extra: dict[str, Any] = {"swiglu_limit": limit} if limit else {}
        if block:
            extra["block_size"] = block
        return ort("QMoE")(
            *(x, chosen, fc1, fc1_scale, fc1_bias, fc2, fc2_scale, fc2_bias, None, None, None),
            *(fc1_zero, fc2_zero, None, share),
            k=k,
            activation_type="swiglu",
            normalize_routing_weights=0,
            swiglu_fusion=1,
            activation_alpha=alpha,
            activation_beta=beta,
            expert_weight_bits=bits,
            weights_prepacked=0,
            **extra,
        )

    @translates("matmul_nbits")
    def matmul_nbits(
        x: Any,
        weight: Any,
        scales: Any,
        zero_points: Any,
        columns: int,
        rows: int,
        bits: int,
        block: int,
    ) -> Any:
        inputs = [x, weight, scales] + ([] if zero_points is None else [zero_points])
        return ort("MatMulNBits")(*inputs, K=columns, N=rows, bits=bits, block_size=block)

    @translates("dequantize")
    def dequantize(x: Any, scale: Any, block: int, zero: Any = None) -> Any:
        return std.DequantizeLinear(x, scale, zero, axis=-1, block_size=block)

    return made


def _ints(std: Any, values: Any) -> Any:
    return std.Constant(value_ints=[int(v) for v in values])


# name: (domain, inputs, outputs, attributes). The types are left open: ONNX Runtime checks them.
_FLOAT, _INT, _STRING = "FLOAT", "INT", "STRING"
_CONTRIB: dict[str, tuple[str, int, int, dict[str, str]]] = {
    "SkipSimplifiedLayerNormalization": ("com.microsoft", 3, 4, {"epsilon": _FLOAT}),
    "SkipLayerNormalization": ("com.microsoft", 4, 4, {"epsilon": _FLOAT}),
    "QuickGelu": ("com.microsoft", 1, 1, {"alpha": _FLOAT}),
    "GroupQueryAttention": (
        "com.microsoft", 14, 3,
        {
            "num_heads": _INT, "kv_num_heads": _INT, "scale": _FLOAT, "do_rotary": _INT,
            "rotary_interleaved": _INT, "local_window_size": _INT, "softcap": _FLOAT,
            "k_quant_type": _STRING, "v_quant_type": _STRING, "kv_cache_bit_width": _INT,
        },
    ),
    "MatMulNBits": (
        "com.microsoft", 4, 1,
        {"K": _INT, "N": _INT, "bits": _INT, "block_size": _INT, "accuracy_level": _INT},
    ),
    "MoE": (
        "com.microsoft", 8, 1,
        {
            "k": _INT, "activation_type": _STRING, "normalize_routing_weights": _INT,
            "swiglu_fusion": _INT, "swiglu_limit": _FLOAT, "activation_alpha": _FLOAT,
            "activation_beta": _FLOAT, "use_sparse_mixer": _INT,
        },
    ),
    "QMoE": (
        "com.microsoft", 15, 1,
        {
            "k": _INT, "activation_type": _STRING, "normalize_routing_weights": _INT,
            "swiglu_fusion": _INT, "swiglu_limit": _FLOAT, "activation_alpha": _FLOAT,
            "activation_beta": _FLOAT, "expert_weight_bits": _INT, "block_size": _INT,
            "weights_prepacked": _INT,
        },
    ),
}  # fmt: skip
_made: dict[str, Any] = {}


def ort(name: str) -> Any:
    """One of ONNX Runtime's ops as something to call while translating."""
    if name in _made:
        return _made[name]
    import onnx
    import onnxscript

    domain, inputs, outputs, attributes = _CONTRIB[name]
    option = onnx.defs.OpSchema.FormalParameterOption.Optional
    kinds = onnx.defs.OpSchema.AttrType
    every = [
        "tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)", "tensor(uint8)",
        "tensor(int32)", "tensor(int64)",
    ]  # fmt: skip
    types = [f"T{i}" for i in range(inputs)] + [f"U{i}" for i in range(outputs)]
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=[
            onnx.defs.OpSchema.FormalParameter(f"input_{i}", f"T{i}", param_option=option)
            for i in range(inputs)
        ],
        outputs=[
            onnx.defs.OpSchema.FormalParameter(f"output_{i}", f"U{i}", param_option=option)
            for i in range(outputs)
        ],
        type_constraints=[(t, every, "") for t in types],
        attributes=[
            onnx.defs.OpSchema.Attribute(key, getattr(kinds, kind), required=False)
            for key, kind in attributes.items()
        ],
    )
    opset = onnxscript.values.Opset(domain, 1)
    _made[name] = onnxscript.values.Op(opset, name, schema)
    return _made[name]
