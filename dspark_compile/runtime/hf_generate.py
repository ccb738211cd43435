"""`generate` for Hugging Face models: transformers prepares its arguments, and hands over here
where its own loop would begin. What cannot be decoded in rounds goes to that loop."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark_compile.models.draft_config import DraftError
from dspark_compile.passes.incremental import NotIncremental

from .decode_cache import DecodeCache, rigid, unsupported
from .decode_loop import PREFILL_CHUNK, DecodeLoop, GenerationReport, Plan
from .index_errors import explained, known_to
from .inserted import InsertedRounds
from .lent_cache import LentCache
from .lent_cache import why_not as why_not_lent
from .rounds import POOL, NotRounds, Rounds, batch_bucket, pool_key, written_anywhere
from .token_choice import TokenChoice, parse

log = logging.getLogger(__name__)

# What a step does not need, or is read here.
_KNOWN = {
    "attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache",
    "logits_to_keep", "cache_position", "tokenizer", "synced_gpus", "return_dict", "streamer",
}  # fmt: skip


def callers_streamer() -> Any:
    """transformers prepares a ``streamer`` and does not hand it to a ``custom_generate`` function:
    it is found where it is a local variable of ``GenerationMixin.generate``."""
    return _locals_of_generate().get("streamer")


def _locals_of_generate() -> Mapping[str, Any]:
    """Of the ``GenerationMixin.generate`` that is under way; empty: there is none."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            break
        if frame.f_code.co_name == "generate" and "generation_mode_kwargs" in frame.f_locals:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def decode(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    streamer: Any,
    given: dict[str, Any],
    own: Mapping[str, Any],
    report: GenerationReport,
) -> Any:
    """What ``GenerationMixin._sample`` gives for prepared arguments.

    Args:
        given: keyword arguments of the model's.
        own: ``kv_cache`` and ``options`` of `generate`.
    """
    call = _Call(model, input_ids, processors, criteria, config, streamer, given, own, report)
    reason = _refusal(call)
    if reason is not None:
        return _decode(call, reason)
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are {input_ids.dtype}: give token ids, torch.int64")
    mask, cache = given.get("attention_mask"), _cache(given)
    held = cache is not None and _held(cache)
    if mask is not None and mask.dim() == 2 and not held and mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {list(mask.shape)} and input_ids are {list(input_ids.shape)}: "
            "give a number for every token"
        )
    if _locals_of_generate().get("assistant_model") is not None:
        report.notes.append("assistant_model is not used: give it as draft=")
    call = replace(call, input_ids=input_ids.long())  # as transformers' own loop gives them back
    length = _longest(criteria) or input_ids.shape[1]
    with explained(call.input_ids, length, *known_to(model)):
        return _decode(call)


@dataclass(frozen=True)
class _Call:
    """What transformers has prepared, and what `generate` was asked for beside: `decode`'s
    arguments."""

    model: Any
    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    given: dict[str, Any]
    own: Mapping[str, Any]
    report: GenerationReport


def _decode(call: _Call, reason: str | None = None) -> Any:
    """`decode`; with ``reason``, by transformers."""
    outcome: _Outcome | str
    if reason is None:
        with written_anywhere():
            outcome = _in_rounds(call)
    else:
        outcome = reason
    if isinstance(outcome, str):
        call.report.path = "transformers"
        call.report.notes.append(f"decoded by transformers: {outcome}")
        log.info("decoded by transformers: %s", outcome)
        return _by_transformers(call)
    if not call.config.return_dict_in_generate:
        return outcome[0]
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    sequences, scores, logits, cache = outcome
    return GenerateDecoderOnlyOutput(
        sequences=sequences, scores=scores, logits=logits, past_key_values=cache
    )


# Sequences, scores, logits and the cache.
_Outcome = tuple[Tensor, Any, Any, Any]


def _in_rounds(call: _Call) -> _Outcome | str:
    """What rounds give, or why they do not."""
    lent, report = None, call.report
    cache = _cache(call.given)
    if _uses_cache(call.config, call.given) and _is_callers(cache):
        lent = LentCache(cache, call.model.config, call.input_ids.shape[0])
        call = replace(call, given={**call.given, "past_key_values": lent.ours})
    if call.own.get("draft") is not None:
        outcome = _speculate(call)
        if outcome is not None:
            return outcome
        report.notes = [n for n in report.notes if n.startswith("no speculation")]
    try:
        rounds = _take(call)
    except NotIncremental as error:
        return f"use_cache is off, and no cache can be inserted: {error}"
    loop = DecodeLoop(rounds, call.input_ids, _plan(call), report)
    try:
        sequences = loop.run()
    except NotRounds as error:  # found out behind the prompt, before there is any token
        return str(error)
    if lent is not None:
        lent.give_back()
        loop.cache = lent.cache
    return sequences, loop.scores, loop.logits, loop.cache


def _speculate(call: _Call) -> _Outcome | None:
    """With a draft; None, with the reason in the report, where there must be none."""
    from .speculation.loop import SpeculativeLoop, refusal, take
    from .speculation.options import parts

    model, own, given, report = call.model, call.own, call.given, call.report
    plan, batch = _plan(call), call.input_ids.shape[0]
    reason = refusal(model, own["draft"], plan, batch)
    if reason is None and not _uses_cache(call.config, given):
        reason = "use_cache is off"
    for which in (model, parts(own["draft"])[1]):
        if reason is None and hasattr(getattr(which, "config", None), "get_text_config"):
            reason = rigid(which.config)
    if reason is None:
        masked = batch > 1 or given.get("attention_mask") is not None
        fixed = own["schedule"] == "fixed"
        drawn = torch.get_rng_state()
        try:
            speculator = take(
                model, own["draft"], batch, masked, own["kv_cache"], own["options"],
                own["num_drafted"], fixed,
            )  # fmt: skip
            loop = SpeculativeLoop(speculator, call.input_ids, plan, report, fixed)
            sequences = loop.run()
        except (NotRounds, DraftError) as error:
            reason = str(error)
            torch.set_rng_state(drawn)  # as in later calls, which know of it
        else:
            return sequences, None, None, loop.cache
    report.notes.append(f"no speculation: {reason}")
    return None


def _refusal(call: _Call) -> str | None:
    """Why transformers' own loop must do it."""
    model, input_ids, config, given = call.model, call.input_ids, call.config, call.given
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        return f"the generation mode is {mode}"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        return "there are no input_ids"
    if torch.is_autocast_enabled(input_ids.device.type):
        # Programs are kept from call to call, and a later one may be without.
        return "autocast is on: cast the model instead"
    # (An empty mapping is what transformers encoded of no images.)
    other = sorted(k for k, v in given.items() if k not in _KNOWN and v is not None and v != {})
    if other:
        return f"the model gets {', '.join(other)} besides tokens"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are wanted"
    if given.get("synced_gpus"):
        return "synced_gpus is on"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    if not _uses_cache(config, given):
        if given.get("attention_mask") is not None:
            return "use_cache is off, and sequences are padded"
        if config.return_dict_in_generate:
            return "use_cache is off, and a dictionary is wanted"
        return None
    positions = given.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return "position_ids have more than two dimensions"
    reason = unsupported(model.config) or _own_ways(model)
    cache = _cache(given)
    if reason is None and _is_callers(cache):
        if given.get("past_key_values") is not cache:
            return f"cache_params is a {type(cache).__name__} of the caller's"
        return why_not_lent(cache, model, input_ids.shape[0], call.own["kv_cache"])
    return reason


_WINDOW_MASKS = {
    "create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate",
}  # fmt: skip


def _own_ways(model: Any) -> str | None:
    """Why a `DecodeCache` is not what the model takes its cache for."""
    general = getattr(model, "_supports_default_dynamic_cache", None)
    if general is not None and not general():
        return "it has a cache of its own kind"
    # Some models have no mask for their windows: transformers' caches drop what lies outside, and
    # ours, which keeps everything, would show it.
    modules = {type(m).__module__ for m in model.modules()}
    masks = any(_WINDOW_MASKS & set(vars(sys.modules[m])) for m in modules if m in sys.modules)
    if not masks and any(x.is_sliding for x in DecodeCache(model.config).attention):
        return "its sliding windows are those of its cache: it has no mask for them"
    return None


def _cache(given: Mapping[str, Any]) -> Any:
    """The cache that is to be used, by whichever name the model has for it."""
    cache = given.get("past_key_values")
    return given.get("cache_params") if cache is None else cache


def _is_callers(cache: Any) -> bool:
    """Whether ``cache`` is one that the caller will look at, and no `DecodeCache`."""
    if cache is None or isinstance(cache, DecodeCache):
        return False
    return bool(getattr(cache, "_is_user_defined", False)) or _held(cache) > 0


def _uses_cache(config: Any, given: Mapping[str, Any]) -> bool:
    return given.get("use_cache") is not False and bool(config.use_cache)


def _held(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except (ValueError, AttributeError, TypeError):
        return 0


def _take(call: _Call) -> Rounds:
    model, given, batch = call.model, call.given, call.input_ids.shape[0]
    options = call.own["options"]
    if not _uses_cache(call.config, given):
        idle = POOL.idle(model, pool_key(batch, "inserted", "model", options))

        def function(ids: Tensor) -> Tensor:
            return model(input_ids=ids, use_cache=False).logits

        return idle or InsertedRounds(model, function, batch, options)
    masked = batch > 1 or given.get("attention_mask") is not None
    cache = _cache(given)
    scheme = cache.scheme if isinstance(cache, DecodeCache) else call.own["kv_cache"]
    return POOL.take(model, batch_bucket(batch), masked, scheme, options)


def _longest(criteria: Any) -> int | None:
    """Tokens of a text at most, as the criteria say."""
    from transformers.generation.stopping_criteria import MaxLengthCriteria

    return min(
        (int(c.max_length) for c in criteria if isinstance(c, MaxLengthCriteria)), default=None
    )


def _plan(call: _Call) -> Plan:
    config, given, processors = call.config, call.given, call.processors
    cache, pad = _cache(given), config._pad_token_tensor
    plan = Plan(
        max_length=_longest(call.criteria) or call.input_ids.shape[1] + (1 << 40),
        choice=TokenChoice(sample=bool(config.do_sample)),
        pad=0 if pad is None else int(pad.flatten()[0]),
        streamer=call.streamer,
        chunk=getattr(config, "prefill_chunk_size", None) or PREFILL_CHUNK,
        attention_mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"),
        cache=cache if isinstance(cache, DecodeCache) else None,
    )
    if config.return_dict_in_generate:
        plan.keep_cache = True
        plan.keep_scores, plan.keep_logits = bool(config.output_scores), bool(config.output_logits)
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    eos, asked = [], []
    for criterion in call.criteria:
        if type(criterion) is EosTokenCriteria:
            eos += criterion.eos_token_id.flatten().tolist()
        elif type(criterion) is not MaxLengthCriteria:
            asked.append(criterion)
            name = getattr(criterion, "__name__", type(criterion).__name__)
            call.report.notes.append(f"{name} is asked in Python at every step")
    plan.eos, plan.asked = eos, asked
    plan.pads = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
    parsed, reason = parse(processors, plan.choice.sample)
    if plan.keep_scores and len(processors):
        parsed, reason = None, "output_scores: logits processors are called in Python at every step"
    if parsed is not None:
        plan.choice = parsed
    else:
        plan.called = processors
        call.report.notes.append(reason or "")
    return plan


def _by_transformers(call: _Call) -> Any:
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = call.config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise ValueError(
            f"{mode.value} is a custom_generate of its own: call "
            f"model.generate(..., custom_generate={method!r})"
        )
    return getattr(type(call.model), method)(
        call.model, call.input_ids, logits_processor=call.processors,
        stopping_criteria=call.criteria, generation_config=call.config, streamer=call.streamer,
        **call.given,
    )  # fmt: skip
