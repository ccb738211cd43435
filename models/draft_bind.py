"""Putting a draft beside its target: what has to agree, and what is shared.

Everything compared here is a reason why drafting would silently fail (an acceptance near zero) or
crash later. A quantised or fine-tuned target passes: that shows in the accepted length only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dspark_compile.models.draft_config import DraftError

if TYPE_CHECKING:
    from dspark_compile.models.draft import DraftModel


def bind(draft: DraftModel, target: nn.Module, tokenizer: Any = None) -> None:
    """Check, then borrow the embedding and the output layer that the draft lacks.

    Raises:
        DraftError: names each thing that differs, with both values.
    """
    embedding, head = vocabulary_modules(target)
    config, wrong = draft.config, []
    rows, width = embedding.weight.shape
    text = text_config(target)
    if rows != config.vocab_size:
        wrong.append(f"vocabulary: draft {config.vocab_size}, target {rows}")
    if config.draft_vocab_size != config.vocab_size and draft.d2t is None:
        wrong.append(
            f"draft vocabulary: {config.draft_vocab_size} of {config.vocab_size} tokens, and no "
            "d2t says which (set_vocabulary)"
        )
    hidden = getattr(text, "hidden_size", None) or width
    if hidden != config.target_hidden_size:
        wrong.append(f"width of a tap: draft {config.target_hidden_size}, target {hidden}")
    layers = getattr(text, "num_hidden_layers", None)
    if layers is not None:
        if "num_target_layers" in draft.declared and layers != config.num_target_layers:
            wrong.append(f"layers: draft made for {config.num_target_layers}, target has {layers}")
        elif config.target_layer_ids[-1] > layers - 2:
            wrong.append(
                f"taps {list(config.target_layer_ids)}: a target of {layers} layers has taps up "
                f"to {layers - 2}"
            )
    if draft.embed_tokens is None and width != config.hidden_size:
        wrong.append(
            f"width: draft {config.hidden_size} without an embedding of its own, target {width}"
        )
    if draft.lm_head is None and head.weight.shape[-1] != config.hidden_size:
        wrong.append(
            f"width: draft {config.hidden_size} without an lm_head of its own, target's output "
            f"layer takes {head.weight.shape[-1]}"
        )
    wrong += compare_tokenizers(draft, tokenizer)
    if wrong:
        raise DraftError(
            "the draft does not fit the target: "
            + "; ".join(wrong)
            + ". Take the draft that was trained for this target, or train one "
            "(dspark train-draft)."
        )
    if layers is not None and layers != config.num_target_layers:
        # The file did not say; now it is known, and saved.
        draft.config = dataclasses.replace(config, num_target_layers=layers)
    if draft.embed_tokens is None:
        draft.borrowed.embedding = embedding
    if draft.lm_head is None:
        draft.borrowed.head = _rows(head, draft.d2t)


def vocabulary_modules(target: nn.Module) -> tuple[Any, Any]:
    """The target's input embedding and its output layer (the embedding, as a product, if tied).

    Raises:
        DraftError: it has no ``get_input_embeddings``.
    """
    get = getattr(target, "get_input_embeddings", None)
    if get is None:
        raise DraftError(
            f"{type(target).__name__} has no get_input_embeddings(); a target is a causal "
            "language model of transformers, or a module with get_input_embeddings() and "
            "get_output_embeddings()"
        )
    embedding = get()
    output = getattr(target, "get_output_embeddings", lambda: None)()
    return embedding, output if output is not None else _Tied(embedding)


class _Tied:
    """An embedding used as the output layer."""

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding = embedding

    @property
    def weight(self) -> torch.Tensor:
        return self._embedding.weight  # type: ignore[return-value]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.weight)


def _rows(head: Any, ids: torch.Tensor | None) -> Any:
    """Some rows of an output layer: the draft's vocabulary. A module, since whoever moves the draft
    to another dtype moves it along."""
    if ids is None:
        return head
    bias = getattr(head, "bias", None)
    ids = ids.to(head.weight.device)
    weight = head.weight.detach()[ids]
    rows = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    rows.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        rows.bias = nn.Parameter(bias.detach()[ids], requires_grad=False)
    return rows


def text_config(target: nn.Module) -> Any:
    """The configuration of the language part, or None."""
    config = getattr(target, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get is not None else config


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's vocabulary (tokens and their ids)."""
    items = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(items, ensure_ascii=False).encode()).hexdigest()


def compare_tokenizers(draft: DraftModel, tokenizer: Any) -> list[str]:
    """What differs between a tokenizer and the one that the draft was trained with."""
    expected = draft.config.extra.get("target_tokenizer_sha256")
    if tokenizer is None or expected is None:
        return []
    found = tokenizer_digest(tokenizer)
    if found == expected:
        return []
    return [
        f"tokenizer: the draft was trained with vocabulary {expected[:12]}, this one "
        f"({len(tokenizer.get_vocab())} tokens) is {found[:12]}"
    ]
