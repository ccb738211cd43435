"""The configuration of a new draft, from its target's."""

from __future__ import annotations

from typing import Any

from dspark_compile.models.draft_bind import text_config, tokenizer_digest, vocabulary_modules
from dspark_compile.models.draft_config import DraftConfig
from dspark_compile.training.options import TrainError, TrainOptions


def new_config(target: Any, tokenizer: Any, options: TrainOptions) -> DraftConfig:
    """A draft of the target's family, heads and rotation, as small as ``options`` say.

    Qwen3 and Gemma4 targets get their own kind of layer. Every other family gets a pre-norm layer
    with the target's head geometry and activation where it has such, which is all that the draft's
    quality depends on: it learns its own weights.

    Raises:
        TrainError: the target's configuration has no width or number of layers.
    """
    text = text_config(target)
    embedding, _ = vocabulary_modules(target)
    vocabulary, width = embedding.weight.shape
    layers = getattr(text, "num_hidden_layers", None)
    if not layers:
        raise TrainError(
            f"{type(target).__name__}.config has no num_hidden_layers; a draft needs to know what "
            "it taps"
        )
    kind = str(getattr(text, "model_type", ""))
    family = "qwen3" if kind.startswith("qwen3") else "generic"
    heads = getattr(text, "num_attention_heads", None) or max(1, width // 64)
    head_dim = getattr(text, "head_dim", None) or max(2, width // heads // 2 * 2)
    keys = getattr(text, "num_key_value_heads", None) or heads
    values: dict[str, Any] = {}
    if kind.startswith("gemma4") and getattr(text, "global_head_dim", None):
        family, head_dim = "gemma4", text.global_head_dim
        if getattr(text, "attention_k_eq_v", False):
            values["attention_k_eq_v"] = True
            keys = text.num_global_key_value_heads or keys
        values |= {"attention_scale": 1.0, "embed_scale": float(width) ** 0.5}
    else:
        # Elsewhere the scale of the rows is the target's business only where it is Gemma's.
        scale = getattr(embedding, "embed_scale", None)
        if scale is not None:
            values["embed_scale"] = float(scale)
    activation = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", None)
    if activation not in ("silu", "gelu", "gelu_pytorch_tanh", "relu"):
        activation = "silu"
    if getattr(text, "final_logit_softcapping", None):
        values["final_logit_softcapping"] = float(text.final_logit_softcapping)
    extra: dict[str, Any] = {"model_type": kind, "num_anchors": options.anchors}
    if tokenizer is not None:
        extra["target_tokenizer_sha256"] = tokenizer_digest(tokenizer)
    assert options.taps is not None and options.markov_rank is not None
    return DraftConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=options.intermediate_size or _inner(text, width),
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head_dim,
        mask_token_id=_mask_token(options, tokenizer, text, vocabulary),
        target_layer_ids=options.taps,
        num_target_layers=layers,
        family=family,
        block_size=options.block_size,
        markov_rank=options.markov_rank,
        markov_head_type=options.markov_head,
        enable_confidence_head=options.confidence,
        confidence_head_with_markov=options.confidence and options.markov_rank > 0,
        target_hidden_size=getattr(text, "hidden_size", None) or width,
        rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-6,
        rope_parameters=_rope(text),
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 32768,
        hidden_act=activation,
        extra=extra,
        **values,
    )


def _inner(text: Any, width: int) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        size = getattr(text, name, None)
        if isinstance(size, int) and size:
            return size
    return (8 * width // 3 + 63) // 64 * 64


def _rope(text: Any) -> dict[str, Any]:
    """The target's rotation if the draft knows its kind, else a plain one."""
    rope = getattr(text, "rope_parameters", None) or {}
    if isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]
    known = ("default", "linear", "llama3", "yarn", "proportional")
    if rope.get("rope_theta") and rope.get("rope_type", "default") in known:
        return {k: v for k, v in rope.items() if isinstance(v, (int, float, str, bool))}
    return {"rope_type": "default", "rope_theta": float(getattr(text, "rope_theta", 0) or 10_000.0)}


def _mask_token(options: TrainOptions, tokenizer: Any, text: Any, vocabulary: int) -> int:
    """An id that does not occur in text if there is one, else the padding or end token."""
    if options.mask_token_id is not None:
        if not 0 <= options.mask_token_id < vocabulary:
            raise TrainError(
                f"mask_token_id={options.mask_token_id}: the target's vocabulary has {vocabulary}"
            )
        return options.mask_token_id
    if tokenizer is not None:
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is not None:
            return int(mask)
        used = max(tokenizer.get_vocab().values(), default=vocabulary - 1)
        if used + 1 < vocabulary:
            return used + 1
    for source in (tokenizer, text):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            found = getattr(source, name, None)
            found = found[0] if isinstance(found, list) and found else found
            if isinstance(found, int) and 0 <= found < vocabulary:
                return found
    return 0
