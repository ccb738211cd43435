"""Checks of what `generate` is told about speculation."""

from __future__ import annotations

from typing import Any

import torch

SCHEDULES = ("auto", "fixed")


def parts(draft: Any) -> tuple[bool, Any]:
    """Whether ``draft`` looks n-grams up, and what drafts beside that (None: nothing)."""
    if isinstance(draft, str):
        return True, None
    return (True, draft[1]) if isinstance(draft, (tuple, list)) else (False, draft)


def check_draft(model: Any, draft: Any, num_drafted: int | None, schedule: str) -> None:
    """Whether ``draft`` can draft for ``model``; a `DraftModel` is bound to it where it was not.

    Raises:
        ValueError: an argument has no meaning, or the two do not fit.
        DraftError: a `DraftModel` and the model do not fit.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose 'auto' or 'fixed'")
    if draft is None:
        if num_drafted is not None:
            raise ValueError(f"num_drafted={num_drafted}: it belongs to a draft; give draft=")
        return
    if num_drafted is not None and (type(num_drafted) is not int or not 1 <= num_drafted <= 64):
        raise ValueError(f"num_drafted={num_drafted!r}: give a whole number from 1 to 64")
    from dspark_compile.models.draft import DraftModel

    if isinstance(draft, (tuple, list)):
        if len(draft) != 2 or draft[0] != "ngram" or not isinstance(draft[1], torch.nn.Module):
            names = ", ".join(repr(d) if isinstance(d, str) else type(d).__name__ for d in draft)
            raise ValueError(
                f'draft=({names}): a pair is ("ngram", DraftModel) or ("ngram", causal language '
                "model)"
            )
        if not hasattr(model, "get_input_embeddings"):
            return  # as below
        if not isinstance(draft[1], DraftModel):
            _check_causal_model(model, draft[1])
            return
        if num_drafted is not None and num_drafted < draft[1].config.num_drafted:
            raise ValueError(
                f"num_drafted={num_drafted}: look-ups beside this draft give as many tokens as it "
                f"does or more, {draft[1].config.num_drafted}"
            )
        _check_draft_model(model, draft[1], None)
        return
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(
                f'draft={draft!r}: give "ngram", or load it: DraftModel.from_pretrained({draft!r})'
            )
        return
    if not isinstance(draft, torch.nn.Module) or not hasattr(model, "get_input_embeddings"):
        if isinstance(draft, torch.nn.Module):
            return  # not a Hugging Face model: it is decoded without, and the report says so
        raise ValueError(
            f'draft={type(draft).__name__}: give "ngram", a DraftModel, a causal language model, '
            '("ngram", one of these two) or None'
        )
    if isinstance(draft, DraftModel):
        _check_draft_model(model, draft, num_drafted)
    else:
        _check_causal_model(model, draft)


def _check_causal_model(model: Any, draft: Any) -> None:
    if not (hasattr(draft, "generate") and hasattr(draft, "get_output_embeddings")):
        raise ValueError(
            f"draft={type(draft).__name__} is neither a DraftModel nor a causal language model of "
            "Hugging Face"
        )
    if getattr(draft.config, "is_encoder_decoder", False):
        raise ValueError(
            f"draft={type(draft).__name__} is an encoder-decoder model: give a causal language "
            "model"
        )
    if draft is model:
        raise ValueError("draft is the model itself: nothing is gained")
    own, other = (_vocabulary(m) for m in (draft, model))
    if own != other:
        raise ValueError(
            f"the draft's vocabulary has {own} tokens and the model's {other}: both must use one "
            "tokenizer"
        )


def _check_draft_model(model: Any, draft: Any, num_drafted: int | None) -> None:
    count = draft.config.num_drafted
    if num_drafted not in (None, count):
        raise ValueError(
            f"num_drafted={num_drafted}: this draft was trained to draft {count}; another number "
            "makes it worse, so leave it out"
        )
    ours = model.get_input_embeddings()
    borrowed = draft.borrowed.embedding
    if draft.embed_tokens is None and borrowed is not ours:
        draft.bind(model)
    places = {p.device for p in (draft.fc.weight, ours.weight)}
    if len(places) > 1:
        raise ValueError(
            f"the draft lies on {draft.fc.weight.device} and the model on {ours.weight.device}: "
            f"call draft.to({str(ours.weight.device)!r})"
        )


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]
