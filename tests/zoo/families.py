"""Tiny models of every causal-LM family that transformers can build from a config.

A family is a model type of ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``. Its config class is filled
generically: every recognised field that exists gets a small value (``GENERIC``), then a few per-
family values follow (``OVERRIDES``). Parameters are randomised so that every weight and bias
matters: a norm weight is never one, a bias never zero.

Families that cannot be tested are listed in ``EXCLUDED`` with the reason. Nothing is dropped
silently: what is neither built nor excluded is an error of the zoo.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import re
import zlib
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
MAX_POSITIONS = 256
WINDOW = 8

_LAYERS = 2
_HIDDEN = 64
_HEADS = 4
_KV_HEADS = 2
_HEAD_DIM = 16
_MLP = 96

GENERIC: dict[str, Any] = {
    # sizes
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": _HIDDEN,
    "d_model": _HIDDEN,
    "n_embd": _HIDDEN,
    "n_embed": _HIDDEN,
    "emb_dim": _HIDDEN,
    "embedding_size": _HIDDEN,
    "dim": _HIDDEN,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": _MLP,
    "ffn_dim": _MLP,
    "d_inner": _MLP,
    "dff": _MLP,
    "n_inner": _MLP,
    "dim_ff": _MLP,
    "decoder_ffn_dim": _MLP,
    "encoder_ffn_dim": _MLP,
    "dense_intermediate_size": _MLP,
    "intermediate_size_mlp": _MLP,
    "shared_intermediate_size": _MLP,
    "num_hidden_layers": _LAYERS,
    "num_layers": _LAYERS,
    "n_layer": _LAYERS,
    "n_layers": _LAYERS,
    "decoder_layers": _LAYERS,
    "encoder_layers": _LAYERS,
    "num_decoder_layers": _LAYERS,
    "num_encoder_layers": _LAYERS,
    # attention
    "num_attention_heads": _HEADS,
    "num_heads": _HEADS,
    "n_head": _HEADS,
    "n_heads": _HEADS,
    "attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_attention_heads": _HEADS,
    "num_decoder_attention_heads": _HEADS,
    "num_encoder_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "num_kv_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "dim_head": _HEAD_DIM,
    "attention_head_dim": _HEAD_DIM,
    "kv_channels": _HEAD_DIM,
    "query_pre_attn_scalar": _HEAD_DIM,
    "max_position_embeddings": MAX_POSITIONS,
    "n_positions": MAX_POSITIONS,
    "max_seq_len": MAX_POSITIONS,
    "context_length": MAX_POSITIONS,
    "max_target_positions": MAX_POSITIONS,
    "sliding_window": WINDOW,
    "local_attention": WINDOW,
    "window_size": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "qk_head_dim": 24,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # state space and linear attention
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "lru_width": _HIDDEN,
    "laurel_rank": 8,
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "mask_token_id": 0,
    "is_decoder": True,
    # training-only parts
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}

DEFAULT = object()
"""As a value of an override: leave the field at its default."""

_LINEAR_AND_FULL = ["linear_attention", "full_attention"]
_LINEAR_AND_HYBRID = ["linear_attention", "hybrid"] * 2


def _qwen(model_type: str) -> dict[str, Any]:
    """The text config of a shell that names its language model by type."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    return {"model_type": model_type, **{name: GENERIC[name] for name in names}}


_QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 1000,
    "heads_per_ngram": 2,
    "hc_lowrank": 8,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            }
        }
    },
    "cpmant": {"prompt_length": 4, "prompt_types": 4, "segment_types": 4},
    "dbrx": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attn_config": {"kv_n_heads": _KV_HEADS, "clip_qkv": 2.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_lora_rank": 16, "o_groups": 2},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_rms_norm": True},
    "fuyu": {"text_config": {"model_type": "persimmon"}, "patch_size": 4, "image_size": 8},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_experts": None,
        "top_k_experts": None,
    },
    "got_ocr2": {"text_config": _qwen("qwen2")},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL},
    "hrm_text": {"H_cycles": 1, "L_cycles": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"no_rope_layers": [1, 0], "moe_layers": [1], "interleave_moe_layer_step": 2},
    "longcat_flash": {
        "head_dim": 8,
        "qk_head_dim": DEFAULT,
        "zero_expert_num": 2,
        "ffn_hidden_size": _MLP,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minicpm3": {"v_head_dim": 16},
    "moshi": {"audio_vocab_size": 16, "num_key_value_heads": _KV_HEADS},
    "moss_transcribe_diarize": {"text_config": _qwen("qwen3")},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
    },
    "qwen4_exp": _QWEN4_EXP,
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _LINEAR_AND_HYBRID,
        "attention_head_dim": DEFAULT,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _LINEAR_AND_HYBRID,
        "use_mem_rope": True,
        "adapter_rank": 8,
        "attention_head_dim": DEFAULT,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}

EXCLUDED: dict[str, str] = {
    "blt": "byte patches: sequence lengths inside the model depend on the data of a second model",
    "fuyu": "vision-language shell around persimmon, which is in the zoo",
    "gemma3n": "vision-language shell around gemma3n_text, its vision tower needs timm",
    "gemma4": "vision-language shell around gemma4_text, its audio tower has no sdpa",
    "gemma4_assistant": "a draft head: takes the target's hidden states and shared KV, not tokens",
    "gemma4_unified_assistant": "a draft head: takes the target's hidden states and shared KV",
    "git": "image-captioning decoder",
    "musicgen": "input ids are audio codebooks, one row per codebook",
    "musicgen_melody": "input ids are audio codebooks, one row per codebook",
    "reformer": "LSH attention with random hashing; no KV cache",
}

# Families whose sdpa path raises: the eager spelling is what users run.
ATTENTION: dict[str, str] = {}

# In the name of a module's class, or of a parameter or what holds it.
EXPERTS_NAME = re.compile(r"(^|_)experts?$|Experts$|MoE$|SparseMoe")

# What differs from ``past_key_values`` in a model's forward.
CACHE_ARGUMENT: dict[str, str] = {
    "mamba": "cache_params",
    "mamba2": "cache_params",
    "falcon_mamba": "cache_params",
    "xlstm": "cache_params",
}


def all_families() -> list[str]:
    """Every model type of the auto-mapping, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(family: str) -> type[PreTrainedModel]:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(family)}")
    cls = getattr(module, name, None)
    if cls is None:
        import transformers

        cls = getattr(transformers, name)
    return cls


def config_class(family: str) -> type[PreTrainedConfig]:
    """The config of the model type, or its text part where the causal model wants only that."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own, wanted = CONFIG_MAPPING[family], model_class(family).config_class
    return own if wanted is None or issubclass(own, wanted) else wanted


def aliases() -> dict[str, str]:
    """Model types that build the same model class from the same config class as an earlier one."""
    seen: dict[tuple[type, type], str] = {}
    found = {}
    own_name_first = sorted(
        all_families(), key=lambda family: config_class(family).model_type != family
    )
    for family in own_name_first:
        if family in EXCLUDED:
            continue
        key = (model_class(family), config_class(family))
        if key in seen:
            found[family] = seen[key]
        else:
            seen[key] = family
    return found


def tested() -> list[str]:
    """The families the zoo runs: neither excluded nor the same classes as another."""
    skip = aliases()
    return [family for family in all_families() if family not in EXCLUDED and family not in skip]


def has_experts(family: str) -> bool:
    """Whether the tiny model of a family has a mixture of experts."""
    with torch.device("meta"):
        model = model_class(family)._from_config(tiny_config(family))
    names = {type(m).__name__ for m in model.modules()}
    names |= {part for name, _ in model.named_parameters() for part in name.split(".")}
    return any(EXPERTS_NAME.search(name) for name in names)


def tiny_fields(
    cls: type[PreTrainedConfig], overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {name: value for name, value in GENERIC.items() if name in names}
    if "kv_lora_rank" in names:  # the latent is expanded to one key and value per query head
        values["num_key_value_heads"] = _HEADS
    for key, sub in (cls.sub_configs or {}).items():
        if dataclasses.is_dataclass(sub):
            values[key] = tiny_fields(sub)
    with contextlib.suppress(Exception):  # a config without a default: its overrides name layers
        values.update(_one_layer_of_each(cls(), names))
    for key, value in (overrides or {}).items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}
        elif value is DEFAULT:
            values.pop(key, None)
        else:
            values[key] = value
    return values


def _one_layer_of_each(config: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """Explicit layer types that hold each type of the family's default config at least once."""
    values: dict[str, Any] = {}
    kinds = {}
    for field in ("layer_types", "mlp_layer_types"):
        default = getattr(config, field, None)
        if field in names and isinstance(default, (list, tuple)) and default:
            kinds[field] = list(dict.fromkeys(default))
    if not kinds:
        return values
    layers = max(_LAYERS, *(len(found) for found in kinds.values()))
    for field, found in kinds.items():
        values[field] = [found[min(i, len(found) - 1)] for i in range(layers)]
    if layers != _LAYERS:
        values["num_hidden_layers"] = layers
    return values


def tiny_config(family: str) -> PreTrainedConfig:
    cls = config_class(family)
    config = cls(**tiny_fields(cls, OVERRIDES.get(family)))
    config.use_cache = True
    return config


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every parameter and score bias a value under which dropping it changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise * 0.5)
            elif parameter.ndim >= 2 and parameter.shape[-1] > 1:
                fan_in = parameter.shape[-1] if parameter.ndim != 4 else parameter[0].numel()
                parameter.copy_(noise / math.sqrt(fan_in))
            else:
                parameter.add_(noise * 0.1)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and "bias" in name and buffer.ndim == 1:
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)


def attention_implementation(cls: type[PreTrainedModel], family: str) -> str:
    if family in ATTENTION:
        return ATTENTION[family]
    return "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"


def build(
    family: str, dtype: torch.dtype = torch.float32, seed: int | None = None
) -> PreTrainedModel:
    """The tiny model of a family: eval mode, randomised parameters, the same on every run."""
    if seed is None:
        seed = zlib.crc32(family.encode()) & 0xFFFF
    torch.manual_seed(seed)
    cls, config = model_class(family), tiny_config(family)
    model = cls._from_config(
        config, attn_implementation=attention_implementation(cls, family), dtype=torch.float32
    )
    randomise(model, seed)
    return model.to(dtype).eval()


def tokens(family: str, length: int, batch: int = 2) -> torch.Tensor:
    """Random token ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(zlib.crc32(family.encode()) ^ 7)
    return torch.randint(3, VOCABULARY - 3, (batch, 64), generator=generator)[:, :length]
