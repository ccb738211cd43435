"""`generate`: text from a model, one compiled round a token.

    dspark_compile.generate(model, input_ids, max_new_tokens=100)
    model.generate(input_ids, max_new_tokens=100, custom_generate=dspark_compile.generate)

For Hugging Face models both take the arguments of transformers' ``generate`` and mean the same by
them (`dspark_compile.runtime.hf_generate`). Any other module that maps token ids ``[B, S]`` to
logits ``[B, S, V]`` gets a cache inserted by the compiler (`dspark_compile.runtime.inserted`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_compile.options import Options

from .decode_loop import DecodeLoop, GenerationReport, Plan
from .index_errors import explained
from .rounds import POOL, pool_key, written_anywhere
from .speculation.options import check_draft
from .token_choice import TokenChoice

_local = threading.local()


def last_generation() -> GenerationReport | None:
    """The report of this thread's last `generate`."""
    return getattr(_local, "report", None)


def free(model: Any | None = None) -> None:
    """Free the compiled steps and caches that wait for the next `generate`, of ``model`` or of all
    models."""
    POOL.drop(model)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | None = None,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    streamer: Any = None,
    draft: Any = None,
    num_drafted: int | None = None,
    schedule: str = "auto",
    kv_cache: str = "model",
    options: Mapping[str, Any] | None = None,
    return_stats: bool = False,
    **kwargs: Any,
) -> Any:
    """Token ids ``[B, L + new]``, as ``model.generate`` gives them.

    Args:
        model: Hugging Face causal language model, or a module that maps token ids to logits.
        input_ids: int64 ``[B, L]``, padded on the left where prompts differ in length (a module
            that has no mask takes none).
        draft: what proposes tokens that the model then verifies: a `DraftModel`, a causal language
            model with the same vocabulary, ``"ngram"`` (lookup in the text so far), ``("ngram",
            draft)`` (lookup, and one of these two where that does not serve), or None. The text is
            what it would be without.
        num_drafted: tokens of a proposal, where the draft leaves it open (n-gram: 15, model: 5, or
            fewer where look-ups beside it give fewer).
        schedule: ``"auto"``: as many drafted tokens are verified as pays, by confidences and
            measured times, and drafting is parked where it does not; ``"fixed"``: always all of
            them, which makes sampled text depend on the seed alone.
        kv_cache: ``"model"`` (exact) or ``"int8"``.
        options: of the back end, for the step.
        return_stats: return ``(output, GenerationReport)``.
        logits_processor, stopping_criteria, generation_config, streamer, kwargs: as Hugging Face's
            ``generate`` has them. For another module: ``max_new_tokens`` or ``max_length``,
            ``do_sample``, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``,
            ``eos_token_id``, ``pad_token_id``, and lists of functions ``f(input_ids, scores)``.

    Raises:
        ValueError: an argument has no meaning; the message says which.
        OptionsError: ``options`` has an unknown option or an illegal value.
        IndexError: a token that the model does not know, or more tokens than it has positions.
        DraftError: draft and model do not fit each other.
        KVCacheError: no memory for the cache; nothing is held on to, and the next call works.
        NotIncremental: a module that is not of Hugging Face cannot be decoded token by token; the
            message names the node and the reason.
    """
    if kv_cache not in ("model", "int8"):
        raise ValueError(f"kv_cache={kv_cache!r} is unknown; choose 'model' or 'int8'")
    check_draft(model, draft, num_drafted, schedule)
    Options.parse(options)
    for name, value in (
        ("logits_processor", logits_processor), ("stopping_criteria", stopping_criteria)
    ):  # fmt: skip
        if value is not None and not isinstance(value, Iterable):
            raise ValueError(f"{name} is a {type(value).__name__}: give a list of them")
    if input_ids is None:  # transformers' name for it
        input_ids = kwargs.pop("inputs", None)
    if input_ids is not None and not (isinstance(input_ids, Tensor) and input_ids.dim() >= 2):
        shape = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids are {shape}: give a tensor of token ids, int64 [B, L]")
    own: dict[str, Any] = {
        "kv_cache": kv_cache, "options": dict(options or {}), "draft": draft,
        "num_drafted": num_drafted, "schedule": schedule,
    }  # fmt: skip
    report = GenerationReport()
    with contextlib.ExitStack() as stack:
        if torch.get_default_device().type != "cpu" and _on_the_cpu(model):
            # ``torch.set_default_device`` is for the caller's tensors, not for the step's.
            stack.enter_context(torch.device("cpu"))
        output = _decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
            own, report, kwargs,
        )  # fmt: skip
    _local.report = report
    return (output, report) if return_stats else output


def _on_the_cpu(model: Any) -> bool:
    first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    return first is not None and first.device.type == "cpu"


def _decode(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    own: dict[str, Any],
    report: GenerationReport,
    kwargs: dict[str, Any],
) -> Any:
    """What the model gives: by the way that its kind and its caller ask for."""
    if hasattr(generation_config, "_eos_token_tensor"):  # transformers calls
        from .hf_generate import callers_streamer, decode

        streamer = streamer if streamer is not None else callers_streamer()
        output = decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config,  # type: ignore[arg-type]
            streamer, kwargs, own, report,
        )  # fmt: skip
    elif _of_hugging_face(model):
        from .hf_generate import decode

        def custom(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **given: Any,
        ) -> Any:
            given.pop("streamer", None)
            return decode(
                model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
                given, own, report,
            )  # fmt: skip

        output = model.generate(
            input_ids, generation_config=generation_config, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, streamer=streamer, custom_generate=custom,
            **kwargs,
        )  # fmt: skip
    else:
        if generation_config is not None:
            raise ValueError("generation_config is for Hugging Face models: give its fields")
        with written_anywhere():
            output = _module(
                model, input_ids, own, report, streamer, list(logits_processor or ()),
                list(stopping_criteria or ()), **kwargs,
            )  # fmt: skip
    return output


def _of_hugging_face(model: Any) -> bool:
    """Whether ``model.generate`` is transformers', or hands on to it: nanoGPT and its kin have a
    ``generate`` and a ``config`` of their own."""
    try:
        takes = inspect.signature(model.generate).parameters
    except (AttributeError, TypeError, ValueError):
        return False
    any_name = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    return "custom_generate" in takes or (
        any_name and hasattr(getattr(model, "config", None), "to_dict")
    )


def _logits(out: Any) -> Tensor:
    """The logits in what a module returns: a tensor, an object or mapping that names them, or the
    first of several results."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "logits"):
        return out.logits
    if isinstance(out, Mapping):
        if "logits" not in out:
            raise ValueError(f"the model returns a mapping of {sorted(out)}: name one 'logits'")
        return out["logits"]
    return out[0]


def _module(
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
    """`generate` of a module that is none of Hugging Face's."""
    from dspark_compile.passes.incremental_core import NotIncremental

    from .inserted import InsertedRounds

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

    if own["draft"] is not None:
        report.notes.append(
            "the draft is not used: a cache that the compiler inserts takes one token at a time"
        )
    plan = Plan(
        max_length=length,
        choice=TokenChoice(do_sample, *sampling, repetition_penalty),
        eos=eos,
        pad=pad_token_id if pad_token_id is not None else (eos[0] if eos else 0),
        called=called if processors else None,
        asked=criteria,
        streamer=streamer,
    )

    def function(ids: Tensor) -> Tensor:
        return _logits(model(ids))

    batch = input_ids.shape[0]
    rounds = POOL.idle(model, pool_key(batch, "inserted", "model", own["options"]))
    rounds = rounds or InsertedRounds(model, function, batch, own["options"])
    limit = getattr(rounds, "limit", None)
    if limit is not None and length > limit:
        POOL.give(rounds)
        raise ValueError(
            f"prompt and new tokens are {length} together, and the model has tables for {limit} "
            "positions: ask for fewer"
        )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    vocabulary = getattr(rounds, "vocabulary", None)
    with explained(input_ids, length, vocabulary, limit):
        return DecodeLoop(rounds, input_ids, plan, report).run()
