"""`generate` for modules that are none of Hugging Face's.

A module that maps token ids to logits and remembers nothing gets a cache inserted by the compiler
(`dspark_compile.runtime.inserted`), and decodes token by token, or in rounds with a draft. Where
that cannot be, the whole text is run for every token (`dspark_compile.runtime.recomputed`), and the
report says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.options import Options
from dspark_compile.passes.incremental_core import NotIncremental

from .decode_loop import DecodeLoop, GenerationReport, Plan
from .index_errors import explained
from .inserted import InsertedRounds
from .module_logits import token_function
from .recomputed import RecomputedRounds, recomputed_key
from .rounds import POOL, NotRounds, pool_key
from .speculation.inserted_rounds import ONE_LENGTH
from .speculation.lookup_proposals import drafting_part
from .speculation.loop import SpeculativeLoop, Speculator, refusal, take
from .speculation.options import parts
from .token_choice import TokenChoice

log = logging.getLogger(__name__)


def decode_module(
    model: Any,
    input_ids: Tensor | None,
    own: Mapping[str, Any],
    report: GenerationReport,
    streamer: Any,
    processors: list[Any],
    criteria: list[Any],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    **unknown: Any,
) -> Tensor:
    """`generate` of a module that is none of Hugging Face's: its arguments, and its errors.

    Args:
        own: ``kv_cache``, ``options``, ``draft``, ``num_drafted`` and ``schedule`` of `generate`.
        report: filled in.
    """
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: not known for a {type(model).__name__}, which is no "
            "Hugging Face model"
        )
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
        shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(
            f"input_ids are {shape}: they must be int64 [B, L] with at least one row and one token"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are {input_ids.dtype}: give token ids, torch.int64")
    input_ids = input_ids.long()
    if torch.is_autocast_enabled(input_ids.device.type):
        raise NotIncremental("autocast is on: cast the model instead, and call generate outside")
    if own["kv_cache"] != "model":
        raise ValueError(
            "kv_cache='int8' is for Hugging Face models: a cache that the compiler inserts is exact"
        )
    if (max_new_tokens is None) == (max_length is None):
        raise ValueError("give one of max_new_tokens and max_length")
    length = max_length if max_length is not None else input_ids.shape[1] + int(max_new_tokens or 0)
    if length <= input_ids.shape[1]:
        name = "max_length" if max_length is not None else "max_new_tokens"
        raise ValueError(f"{name} leaves no room for a new token behind the prompt: raise it")
    if not do_sample and temperature == 0:  # another way to say so
        temperature = 1.0
    top_k = 0 if top_k is None else top_k
    for name, value in (("temperature", temperature), ("repetition_penalty", repetition_penalty)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: it must be above 0")
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k={top_k!r}: give a number of tokens, or 0 for all")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value!r}: it must lie between 0 and 1")
    if isinstance(eos_token_id, Tensor):
        eos_token_id = eos_token_id.flatten().tolist()
    eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    if not all(isinstance(e, int) for e in eos):
        raise ValueError(f"eos_token_id={eos_token_id!r}: give token ids")
    sampling = (temperature, top_k, top_p, min_p) if do_sample else (1.0, 0, 1.0, 0.0)

    def called(ids: Tensor, scores: Tensor) -> Tensor:
        for processor in processors:
            scores = processor(ids, scores)
        return scores

    plan = Plan(
        max_length=length,
        choice=TokenChoice(do_sample, *sampling, repetition_penalty),
        eos=eos,
        pad=pad_token_id if pad_token_id is not None else (eos[0] if eos else 0),
        called=called if processors else None,
        asked=criteria,
        streamer=streamer,
    )

    return _decode(model, input_ids, plan, own, report)


def _decode(
    model: torch.nn.Module,
    input_ids: Tensor,
    plan: Plan,
    own: Mapping[str, Any],
    report: GenerationReport,
) -> Tensor:
    """With a draft if there is one; else token by token; without a cache where none can be."""
    batch, options = len(input_ids), own["options"]
    rounds = POOL.idle(model, recomputed_key(batch, options))
    if rounds is None and own["draft"] is not None:
        output = _speculate(model, input_ids, plan, own, report)
        if output is not None:
            return output
    elif own["draft"] is not None:
        report.notes.append(f"no speculation: {rounds.reason}")  # type: ignore[union-attr]
    rounds = rounds or POOL.idle(model, pool_key(batch, "inserted", "model", options))
    if rounds is None:
        try:
            rounds = InsertedRounds(model, token_function(model), batch, options)
        except NotIncremental as error:
            if model.training or Options.parse(options).fallback == "error":
                raise
            reason = f"no cache can be inserted: {error}"
            log.warning(
                "%s: the whole text is run for every token: %s", type(model).__name__, reason
            )
            rounds = RecomputedRounds(model, batch, options, reason)
    limit = getattr(rounds, "limit", None)
    if limit is not None and plan.max_length > limit:
        POOL.give(rounds)
        raise ValueError(
            f"prompt and new tokens are {plan.max_length} together, and the model has tables for "
            f"{limit} positions: ask for fewer"
        )
    if plan.streamer is not None:
        plan.streamer.put(input_ids.cpu())
    with explained(input_ids, plan.max_length, getattr(rounds, "vocabulary", None), limit):
        return DecodeLoop(rounds, input_ids, plan, report).run()


def _speculate(
    model: torch.nn.Module,
    input_ids: Tensor,
    plan: Plan,
    own: Mapping[str, Any],
    report: GenerationReport,
) -> Tensor | None:
    """With a draft; None, with the reason in the report, where there must be none."""
    draft, options, batch = own["draft"], own["options"], len(input_ids)
    fixed = own["schedule"] == "fixed"
    reason = None
    if isinstance(parts(draft)[1], DraftModel):
        reason = (
            "a DraftModel reads hidden states of a Hugging Face model's layers, and a "
            f"{type(model).__name__} is none: draft with n-grams or a language model"
        )
    elif batch > 1:
        reason = ONE_LENGTH
    reason = reason or refusal(model, draft, plan, batch)
    drawn = torch.get_rng_state()
    if reason is None:
        try:
            speculator = take(
                model, draft, batch, "inserted", "model", options, own["num_drafted"], fixed
            )
            reason = _too_long(speculator, plan.max_length)
            if reason is None:
                if plan.streamer is not None:
                    plan.streamer.put(input_ids.cpu())
                vocabulary = speculator.rounds.vocabulary  # type: ignore[attr-defined]
                with explained(input_ids, plan.max_length, vocabulary, None):
                    return SpeculativeLoop(speculator, input_ids, plan, report, fixed).run()
            POOL.give(speculator.rounds)
        except (NotRounds, NotIncremental) as error:
            reason = str(error)
            torch.set_rng_state(drawn)  # as in later calls, which know of it
    report.notes.append(f"no speculation: {reason}")
    return None


def _too_long(speculator: Speculator, length: int) -> str | None:
    """Why a text of ``length`` tokens leaves no room for drafted ones; None: it does."""
    rounds, proposer = speculator.rounds, speculator.proposer
    slack = max(rounds.count + 1, proposer.slack)
    for x in (rounds, getattr(drafting_part(proposer), "own", None)):
        limit = getattr(x, "limit", None)
        if limit is not None and length + slack > limit:
            return (
                f"drafted tokens may stand up to {slack} behind the end of the text, position "
                f"{length}, and there are tables for {limit} positions"
            )
    return None
