"""`generate`: text from a model, one compiled round a token.

    dspark_compile.generate(model, input_ids, max_new_tokens=100)
    model.generate(input_ids, max_new_tokens=100, custom_generate=dspark_compile.generate)

For Hugging Face models both take the arguments of transformers' ``generate`` and mean the same by
them (`dspark_compile.runtime.hf_generate`). Any other module that maps token ids ``[B, S]`` to
logits ``[B, S, V]`` gets a cache inserted by the compiler
(`dspark_compile.runtime.module_generate`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_compile.options import Options

from .decode_loop import GenerationReport
from .module_logits import of_hugging_face
from .rounds import POOL, written_anywhere
from .speculation.options import check_draft

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
            model (or, for a module, another one) with the same vocabulary, ``"ngram"`` (lookup in
            the text so far), ``("ngram", draft)`` (lookup, and one of these where that does not
            serve), or None. The text is what it would be without.
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
        NotIncremental: a module that is not of Hugging Face is in training mode, or called under
            autocast; with ``options={"fallback": "error"}``: it cannot be decoded token by token,
            and the message names the node and the reason. (Otherwise the whole text is run for
            every token, and the report says why.)
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
    elif of_hugging_face(model):
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
        from .module_generate import decode_module

        with written_anywhere():
            output = decode_module(
                model, input_ids, own, report, streamer, list(logits_processor or ()),
                list(stopping_criteria or ()), **kwargs,
            )  # fmt: skip
    return output
