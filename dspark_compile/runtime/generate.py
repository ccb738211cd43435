"""`generate`: text from a model, one compiled round a token.

    dspark_compile.generate(model, input_ids, max_new_tokens=100)
    model.generate(input_ids, max_new_tokens=100, custom_generate=dspark_compile.generate)

Both take the arguments of Hugging Face's ``generate`` and mean the same by them: transformers
prepares them, and hands over here where its own loop would begin. What cannot be decoded in rounds
(beam search, encoder-decoder models, a cache of another kind) goes to that loop, and
`last_generation` says why.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .decode_cache import DecodeCache, unsupported
from .rounds import POOL, Rounds, batch_bucket
from .token_choice import Chooser, TokenChoice, parse

log = logging.getLogger(__name__)

PREFILL_CHUNK = 2048
VISIT = 0.05  # seconds between two looks at a native loop: an interrupt waits that long
LOOK = 16  # tokens after which a GPU is asked whether all rows are done
_local = threading.local()


@dataclass
class GenerationReport:
    """What one call of `generate` did.

    Attributes:
        path: ``"native"`` (a step is one native call), ``"compiled"``, ``"eager"`` or
            ``"transformers"`` (its own loop).
        notes: why it is not a faster path, and what is called in Python at every step.
        prompt_tokens, new_tokens: for each sequence.
        seconds: of ``"prefill"``, ``"compile"`` (the first step) and ``"decode"``.
        steps_timed: steps that ``"decode"`` is the time of.
        cache_bytes: allocated for keys and values.
    """

    path: str = "eager"
    notes: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    steps_timed: int = 0
    cache_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Steps a second, without prefill and compilation."""
        seconds = self.seconds.get("decode", 0.0)
        return self.steps_timed / seconds if seconds else 0.0


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
    kv_cache: str = "model",
    options: Mapping[str, Any] | None = None,
    return_stats: bool = False,
    **kwargs: Any,
) -> Any:
    """Token ids ``[B, L + new]``, as ``model.generate`` gives them.

    Args:
        model: Hugging Face causal language model.
        input_ids: int64 ``[B, L]``, padded on the left where prompts differ in length.
        kv_cache: ``"model"`` (exact) or ``"int8"``.
        options: of the back end, for the step.
        return_stats: return ``(output, GenerationReport)``.
        logits_processor, stopping_criteria, generation_config, streamer, kwargs: as Hugging Face's
            ``generate`` has them.

    Raises:
        ValueError: an argument has no meaning; the message says which.
        KVCacheError: no memory for the cache; nothing is held on to, and the next call works.
    """
    if kv_cache not in ("model", "int8"):
        raise ValueError(f"kv_cache={kv_cache!r} is unknown; choose 'model' or 'int8'")
    own: dict[str, Any] = {"kv_cache": kv_cache, "options": dict(options or {})}
    if hasattr(generation_config, "_eos_token_tensor"):  # transformers calls
        output = _decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config,
            streamer=streamer if streamer is not None else _callers_streamer(), own=own, **kwargs,
        )  # fmt: skip
    else:
        if not hasattr(model, "generate"):
            raise ValueError(
                f"{type(model).__name__} has no generate(): it is no Hugging Face causal language "
                "model"
            )

        def decode(
            model: Any,
            input_ids: Any,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **given: Any,
        ) -> Any:
            given.setdefault("streamer", streamer)
            return _decode(
                model, input_ids, logits_processor, stopping_criteria, generation_config,
                own=own, **given,
            )  # fmt: skip

        output = model.generate(
            input_ids, generation_config=generation_config, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, streamer=streamer, custom_generate=decode,
            **kwargs,
        )  # fmt: skip
    return (output, last_generation()) if return_stats else output


def _callers_streamer() -> Any:
    """transformers prepares a ``streamer`` and does not hand it to a ``custom_generate`` function:
    it is found where it is a local variable of ``GenerationMixin.generate``."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return None
        if frame.f_code.co_name == "generate" and "generation_mode_kwargs" in frame.f_locals:
            return frame.f_locals.get("streamer")
        frame = frame.f_back  # type: ignore[assignment]
    return None


# What a step does not need, or `_decode` reads itself.
_KNOWN = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "cache_position", "tokenizer", "synced_gpus", "return_dict", "streamer",
}  # fmt: skip


def _refusal(model: Any, input_ids: Any, config: Any, given: Mapping[str, Any]) -> str | None:
    """Why transformers' own loop must do it."""
    mode = str(getattr(config.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        return f"the generation mode is {mode}"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        return "there are no input_ids"
    other = sorted(k for k, v in given.items() if k not in _KNOWN and v is not None)
    if other:
        return f"the model gets {', '.join(other)} besides tokens"
    if config.output_attentions or config.output_hidden_states:
        return "attentions or hidden states are wanted"
    if given.get("use_cache") is False or not config.use_cache:
        return "use_cache is off"
    if given.get("synced_gpus"):
        return "synced_gpus is on"
    positions = given.get("position_ids")
    if positions is not None and positions.dim() != 2:
        return "position_ids have more than two dimensions"
    cache = given.get("past_key_values")
    if getattr(cache, "_is_user_defined", cache is not None and len(cache) and _held(cache)):
        if not isinstance(cache, DecodeCache):
            return f"past_key_values is a {type(cache).__name__} of the caller's"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    return unsupported(model.config)


def _held(cache: Any) -> int:
    try:
        return int(cache.get_seq_length())
    except (ValueError, AttributeError, TypeError):
        return 0


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    own: Mapping[str, Any],
    streamer: Any = None,
    **given: Any,
) -> Any:
    """transformers' decoding loop, in rounds."""
    report = _local.report = GenerationReport()
    reason = _refusal(model, input_ids, generation_config, given)
    if reason is not None:
        report.path = "transformers"
        report.notes.append(f"decoded by transformers: {reason}")
        log.info("decoded by transformers: %s", reason)
        return _by_transformers(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
            given,
        )  # fmt: skip
    return _Loop(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, given,
        own, report,
    ).run()  # fmt: skip


def _by_transformers(
    model: Any, input_ids: Any, processors: Any, criteria: Any, config: Any, streamer: Any,
    given: dict[str, Any],
) -> Any:  # fmt: skip
    from transformers.generation.utils import GENERATION_MODES_MAPPING

    mode = config.get_generation_mode()
    method = GENERATION_MODES_MAPPING[mode]
    if "/" in method:
        raise ValueError(
            f"{mode.value} is a custom_generate of its own: call "
            f"model.generate(..., custom_generate={method!r})"
        )
    return getattr(type(model), method)(
        model, input_ids, logits_processor=processors, stopping_criteria=criteria,
        generation_config=config, streamer=streamer, **given,
    )  # fmt: skip


class _Loop:
    """One call: its sequences, and who is asked at every step."""

    def __init__(
        self, model: Any, input_ids: Tensor, processors: Any, criteria: Any, config: Any,
        streamer: Any, given: dict[str, Any], own: Mapping[str, Any], report: GenerationReport,
    ) -> None:  # fmt: skip
        self.model, self.config, self.streamer = model, config, streamer
        self.report, self.given, self.own = report, given, own
        self.batch, self.length = input_ids.shape
        report.prompt_tokens = self.length
        self.prompt = input_ids.to(model.device)
        self.processors = processors
        self._criteria(criteria)
        self.finished = False
        self.start = 0
        self.scores: tuple[Tensor, ...] | None = None
        self.logits: tuple[Tensor, ...] | None = None
        if config.return_dict_in_generate:
            self.scores = () if config.output_scores else None
            self.logits = () if config.output_logits else None
        self._choice()
        # Tokens so far, with room that doubles.
        room = min(self.max_length, self.length + 1024)
        self.ids = torch.empty(self.batch, room, dtype=torch.long, device=model.device)
        self.ids[:, : self.length] = self.prompt

    def _criteria(self, criteria: Any) -> None:
        """Length and end-of-sequence tokens are checked here; others are asked at every step."""
        self.max_length = criteria.max_length
        if self.max_length is None:
            self.max_length = self.length + (1 << 40)
        self.eos: list[int] = []
        self.asked: list[Any] = []
        for criterion in criteria:
            name = type(criterion).__name__
            if name == "EosTokenCriteria":
                self.eos += criterion.eos_token_id.flatten().tolist()
            elif name != "MaxLengthCriteria":
                self.asked.append(criterion)
                self.report.notes.append(f"{name} is asked in Python at every step")

    def _choice(self) -> None:
        self.choice: TokenChoice = TokenChoice(sample=bool(self.config.do_sample))
        self.called = None
        parsed, reason = parse(self.processors, self.choice.sample)
        if reason is None and self.scores is not None:
            reason = "output_scores: logits processors are called in Python at every step"
        if parsed is not None and reason is None:
            self.choice = parsed
        elif len(self.processors):
            self.called = self.processors
            self.report.notes.append(reason or "")

    # --------------------------------------------------------------------------------- running

    def run(self) -> Any:
        """Decode. Whatever is raised on the way, by a streamer or a criterion say, leaves nothing
        behind: the cache is freed, and the next call begins anew."""
        rounds = self._take()
        try:
            self._run(rounds)
            rounds.set_length(rounds.length)
            self.cache = rounds.cache
        except BaseException:
            self._give_back(rounds, failed=True)
            raise
        self._give_back(rounds, failed=False)
        return self._result(rounds)

    def _take(self) -> Rounds:
        masked = self.batch > 1 or self.given.get("attention_mask") is not None
        cache = self.given.get("past_key_values")
        self.users = cache if isinstance(cache, DecodeCache) else None
        scheme = self.users.scheme if self.users is not None else self.own["kv_cache"]
        rows = batch_bucket(self.batch)
        rounds = POOL.take(self.model, rows, masked, scheme, self.own["options"])
        if self.users is not None:
            rounds.adopt(self.users)
        return rounds

    def _give_back(self, rounds: Rounds, failed: bool) -> None:
        if failed:
            if self.users is not None:
                self.users.set_length(self.start)
            return  # it goes, and its cache with it
        if self.users is not None or self.config.return_dict_in_generate:
            rounds.adopt(DecodeCache(self.model.config, scheme=rounds.scheme, rows=rounds.rows))
        POOL.give(rounds)

    def _run(self, rounds: Rounds) -> None:
        clock = time.perf_counter
        began = clock()
        self.start = rounds.length
        fresh = self.prompt[:, self.start :]
        if not fresh.shape[1]:
            raise ValueError(
                f"past_key_values holds all {self.start} tokens of input_ids: give one more"
            )
        positions = self.given.get("position_ids")
        if positions is not None:
            positions = positions[:, -fresh.shape[1] :].to(fresh.device)
        mask = self.given.get("attention_mask")
        if mask is None and self.batch > 1:
            mask = torch.ones_like(self.prompt)
        chunk = getattr(self.config, "prefill_chunk_size", None) or PREFILL_CHUNK
        # Room for what is surely needed, so that a short text never moves its cache.
        rounds.reserve(min(self.max_length, self.length + 1024))
        logits = rounds.prefill(fresh, mask, positions, chunk)
        report = self.report
        report.seconds["prefill"] = clock() - began
        if self.max_length <= self.length:
            return
        chooser = self._chooser(rounds, logits)
        self._add(rounds, chooser, logits)
        # Nobody looks at single steps: many at a time.
        alone = not self.asked and all(
            x is None for x in (self.called, self.streamer, self.scores, self.logits)
        )
        seconds = 0.01  # of a step; measured as it goes
        while not self.finished:
            if alone and rounds.program is not None:
                began = clock()
                count = max(1, int(VISIT / seconds))
                history = rounds.run(
                    chooser, self.batch, min(count, self.max_length - self.length, 1024)
                )
                if history is None:
                    alone = False
                    continue
                self._append(history)
                spent = clock() - began
                seconds = spent / len(history)
                report.seconds["decode"] = report.seconds.get("decode", 0.0) + spent
                report.steps_timed += len(history)
                self.finished = bool(chooser.done.all()) or self.length >= self.max_length
                continue
            compiles = rounds.program is None and rounds.reason is None
            began = clock()
            logits = rounds.step()[: self.batch]
            self._add(rounds, chooser, logits)
            name = "compile" if compiles else "decode"
            report.seconds[name] = report.seconds.get(name, 0.0) + clock() - began
            report.steps_timed += not compiles
        if self.streamer is not None:
            self.streamer.end()
        report.cache_bytes = rounds.cache.nbytes
        if rounds.program is not None:
            report.path = "native" if rounds.program.native else "compiled"
        elif rounds.reason is not None:
            report.notes.append(f"the step is not compiled: {rounds.reason}")

    def _chooser(self, rounds: Rounds, logits: Tensor) -> Chooser:
        pad = self.config._pad_token_tensor
        seen = self.choice.seen(self.prompt, logits.shape[-1])
        self.stopped = torch.zeros(self.batch, dtype=torch.bool, device=logits.device)
        return Chooser(
            rounds.tokens[: self.batch], rounds.done[: self.batch], self.choice, self.eos,
            0 if pad is None else int(pad.flatten()[0]), seen,
        )  # fmt: skip

    def _add(self, rounds: Rounds, chooser: Chooser, logits: Tensor) -> None:
        """Choose the next tokens, and ask who is to be asked whether to go on."""
        so_far = self.ids[:, : self.length]
        if self.logits is not None:
            self.logits += (logits.to(torch.float32, copy=True),)
        if self.called is not None or self.scores is not None:
            logits = self.processors(so_far, logits.to(torch.float32, copy=True))
        if self.scores is not None:
            self.scores += (logits,)
        still = chooser(logits)
        self._append(chooser.tokens.T)
        if self.streamer is not None:
            self.streamer.put(chooser.tokens[:, 0].cpu())
        if self.asked:
            so_far = self.ids[:, : self.length]
            for criterion in self.asked:
                self.stopped |= criterion(so_far, self.scores)
            if self.eos:
                chooser.done |= self.stopped
            still = int((~(chooser.done | self.stopped)).sum())
        if still is None and (self.length % LOOK == 0 or self.streamer is not None):
            still = int((~chooser.done).sum())
        self.finished = still == 0 or self.length >= self.max_length

    def _append(self, tokens: Tensor) -> None:
        """``tokens [steps, B]`` behind the text."""
        end = self.length + len(tokens)
        if end > self.ids.shape[1]:
            room = min(max(2 * self.length, end), self.max_length) - self.ids.shape[1]
            self.ids = torch.cat((self.ids, self.ids.new_empty(self.batch, room)), dim=1)
        self.ids[:, self.length : end] = tokens.T
        self.length = end

    def _result(self, rounds: Rounds) -> Any:
        sequences = self.ids[:, : self._end()].clone()
        self.report.new_tokens = sequences.shape[1] - self.report.prompt_tokens
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self.scores, logits=self.logits, past_key_values=self.cache
        )

    def _end(self) -> int:
        """Where the text ends: a device is only asked now and then whether all rows are done."""
        if self.ids.device.type == "cpu" or not self.eos:
            return self.length
        start = self.report.prompt_tokens
        new = self.ids[:, start : self.length]
        ended = torch.isin(new, torch.tensor(self.eos, device=new.device)).cumsum(1) > 0
        steps = int((~ended.all(0)).sum()) + 1
        return min(start + steps, self.length)
