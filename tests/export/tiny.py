"""Tiny models for export tests, and running what was exported."""

from __future__ import annotations

import collections
from typing import Any

import torch


def qwen3(layers: int = 2, **changes: Any) -> Any:
    """A Qwen3-style model: grouped queries, norms of queries and keys, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    values = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "tie_word_embeddings": True, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    return randomised(Qwen3ForCausalLM(Qwen3Config(**values)).eval())


def llama(layers: int = 2, **changes: Any) -> Any:
    """A Llama-style model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(LlamaConfig(**values)).eval())


def randomised(model: Any) -> Any:
    """Norm weights that are not one, so that leaving one out shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def ops(path: Any) -> collections.Counter[str]:
    """How often each op is in a model file's graph."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return collections.Counter(n.op_type for n in model.graph.node)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """``max |a - b| / max |b|``."""
    return float((a - b).abs().max() / b.abs().max())
