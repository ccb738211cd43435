"""The decode loop: `Rounds` driven according to a `Plan` until every sequence has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .device_choice import DeviceChooser
from .device_rounds import MOST, DeviceRounds
from .rounds import POOL, Rounds
from .token_choice import Chooser, TokenChoice
from .visits import Visits

if TYPE_CHECKING:
    from .speculation.telemetry import SpeculationStats

PREFILL_CHUNK = 2048
FIRST_ROOM = 1024  # new tokens that a cache has room for at once
VISIT = 0.05  # seconds between two looks at a native loop: an interrupt waits that long
LOOK = 16  # tokens after which a GPU is asked whether all rows are done


@dataclass
class GenerationReport:
    """What one call of `generate` did.

    Attributes:
        path: ``"native"`` (a step is one native call), ``"captured"`` (a round is one launch of a
            CUDA graph), ``"compiled"``, ``"eager"``, ``"recomputed"`` (the whole text is run for
            every token) or ``"transformers"`` (its own loop).
        notes: why it is not a faster path, and what is called in Python at every step.
        prompt_tokens, new_tokens: for each sequence.
        seconds: of ``"prefill"``, ``"compile"`` (the first step) and ``"decode"``.
        steps_timed: steps that ``"decode"`` is the time of.
        cache_bytes: allocated for keys and values.
        looks: how often the host waited for tokens of a device; None where it did at every step.
        speculation: what a draft did (`SpeculationStats`); None without one.
    """

    path: str = "eager"
    notes: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    steps_timed: int = 0
    cache_bytes: int = 0
    looks: int | None = None
    speculation: SpeculationStats | None = None

    @property
    def tokens_per_s(self) -> float:
        """Steps a second, without prefill and compilation."""
        seconds = self.seconds.get("decode", 0.0)
        return self.steps_timed / seconds if seconds else 0.0

    def spend(self, name: str, seconds: float, steps: int = 0) -> None:
        """Add to a time."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if name == "decode":
            self.steps_timed += steps


@dataclass
class Plan:
    """What is asked for.

    Attributes:
        max_length: tokens of prompt and text together, at most.
        choice: how tokens are chosen.
        eos, pad: tokens that end a row, and the one that fills it from there on.
        pads: fill rows that ``asked`` has ended, too, without any ``eos``.
        called: logits processors called in Python, ``f(input_ids, scores)``.
        asked: stopping criteria asked in Python, ``f(input_ids, scores) -> [B] bool``.
        streamer: gets every token, as transformers has it.
        keep_scores, keep_logits: whether they are collected, float32, a tensor a step.
        keep_cache: whether the caller gets the cache.
        chunk: tokens of a prefill that are run at once.
        attention_mask, position_ids: ``[B, L]`` of the prompt.
        cache: a `DecodeCache` of the caller's.
    """

    max_length: int
    choice: TokenChoice = field(default_factory=TokenChoice)
    eos: Sequence[int] = ()
    pad: int = 0
    pads: bool = False
    called: Any = None
    asked: Sequence[Any] = ()
    streamer: Any = None
    keep_scores: bool = False
    keep_logits: bool = False
    keep_cache: bool = False
    chunk: int = PREFILL_CHUNK
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cache: Any = None


class DecodeLoop:
    """One call: its sequences, and who is asked at every step.

    Args:
        rounds: to decode with; given back to the pool, or dropped where something is raised.
        prompt: int64 ``[B, L]``.
        plan: what is asked for.
        report: filled in.
    """

    def __init__(self, rounds: Rounds, prompt: Tensor, plan: Plan, report: GenerationReport):
        self.rounds, self.plan, self.report = rounds, plan, report
        self.prompt = prompt.to(rounds.tokens.device)
        self.batch, self.length = prompt.shape
        self.start = 0
        self.finished = False
        self.scores: tuple[Tensor, ...] | None = () if plan.keep_scores else None
        self.logits: tuple[Tensor, ...] | None = () if plan.keep_logits else None
        self.stopped = torch.zeros(self.batch, dtype=torch.bool, device=self.prompt.device)
        self.cache: Any = None
        self.kept = plan.keep_cache or plan.cache is not None
        report.prompt_tokens = self.length
        # Tokens so far, with room that doubles.
        room = min(plan.max_length, self.length + FIRST_ROOM)
        self.ids = self.prompt.new_empty(self.batch, max(room, self.length))
        self.ids[:, : self.length] = self.prompt

    def run(self) -> Tensor:
        """Decode; int64 ``[B, L + new]``.

        Whatever is raised on the way, by a streamer or a criterion say, leaves nothing behind: the
        cache is freed (a caller's holds what it held), and the next call begins anew.
        """
        rounds, plan = self.rounds, self.plan
        if plan.cache is not None:
            rounds.adopt(plan.cache)
            held = plan.cache.snapshot()
        try:
            self._run()
            end = self._end()
            if self.kept:  # it holds the text, but for the last token if that is new
                new = end > self.report.prompt_tokens
                rounds.set_length(min(rounds.length, end - 1) if new else rounds.length)
        except BaseException:
            rounds.release()
            if plan.cache is not None:
                plan.cache.restore(held)
            raise
        self.cache = rounds.cache
        if self.kept:
            rounds.adopt(rounds.another_cache())
        POOL.give(rounds)
        sequences = self.ids[:, :end].clone()
        self.report.new_tokens = sequences.shape[1] - self.report.prompt_tokens
        return sequences

    def _run(self) -> None:
        rounds, plan, report, clock = self.rounds, self.plan, self.report, time.perf_counter
        began = clock()
        self.start = rounds.length
        fresh = self.prompt[:, self.start :]
        if not fresh.shape[1]:
            raise ValueError(
                f"past_key_values holds all {self.start} tokens of input_ids: give one more"
            )
        positions = plan.position_ids
        if positions is not None:
            positions = positions[:, -fresh.shape[1] :].to(fresh.device)
        mask = plan.attention_mask
        if mask is None and rounds.masked:
            mask = torch.ones_like(self.prompt)
        rounds.expect(min(plan.max_length, self.length + FIRST_ROOM))
        logits = rounds.prefill(fresh, mask, positions, plan.chunk)
        report.spend("prefill", clock() - began)
        if plan.max_length <= self.length:
            return
        device = rounds.on_device()
        chooser: Chooser | DeviceChooser
        if device is None:
            chooser = Chooser(
                rounds.tokens[: self.batch], rounds.done[: self.batch], plan.choice,
                list(plan.eos), plan.pad, plan.choice.seen(self.prompt, logits.shape[-1]),
            )  # fmt: skip
        else:
            chooser = device.chooser
            chooser.begin(plan.choice, plan.eos, plan.pad, self.prompt, logits.shape[-1])
        self._add(chooser, logits)
        # Nobody takes part in single steps: many at a time.
        free = not plan.asked and all(x is None for x in (plan.called, self.scores, self.logits))
        alone = device is None and free and plan.streamer is None
        seconds = rounds.seconds or 0.01  # of a step; measured as it goes
        while not self.finished:
            began = clock()
            if device is not None and free and rounds.program is not None:
                self._visit(device)
                break
            if alone and rounds.program is not None:
                assert isinstance(chooser, Chooser)
                most = min(max(1, int(VISIT / seconds)), plan.max_length - self.length, 1024)
                history = rounds.run(chooser, self.batch, most)
                if history is not None:
                    self._append(history)
                    spent = clock() - began
                    seconds = rounds.seconds = spent / len(history)
                    report.spend("decode", spent, len(history))
                    self.finished = bool(chooser.done.all()) or self.length >= plan.max_length
                    continue
                alone = rounds.program is None  # gone with the room it was for
            compiles = rounds.program is None and rounds.reason is None
            self._add(chooser, rounds.step()[: self.batch])
            report.spend("compile" if compiles else "decode", clock() - began, 1)
        if plan.streamer is not None:
            plan.streamer.end()
        report.cache_bytes = rounds.cache.nbytes
        if rounds.program is not None:
            report.path = "native" if rounds.program.native else "compiled"
            if device is not None:
                report.path = "captured" if device.captured else "compiled"
                if device.reason is not None:
                    report.notes.append(device.reason)
        elif rounds.reason is not None:
            report.path = rounds.without_program
            report.notes.append(f"the step is not compiled: {rounds.reason}")

    def _visit(self, device: DeviceRounds) -> None:
        """Rounds on a device until the text has ended; the host looks now and then."""
        rounds, plan, began = self.rounds, self.plan, time.perf_counter()
        start = self.length

        def launch(count: int) -> Tensor:
            rounds.room_for(count)
            tokens = device.launch(count)[:, : self.batch]
            self._append(tokens)
            return tokens

        # What is run for nothing behind the end is dropped from a cache, but not from states.
        exact = self.kept and bool(plan.eos) and bool(getattr(rounds.cache, "recurrent", False))
        visits = Visits(
            launch, plan.eos, 1 if exact or plan.streamer is not None else MOST, 0 if exact else 1,
            None if plan.streamer is None else plan.streamer.put,
        )  # fmt: skip
        done = device.chooser.done.cpu()
        taken = visits.run(plan.max_length - start, done)
        self.length, self.finished = start + taken, True
        rounds.length = self.length - 1
        self.report.looks = visits.looks
        self.report.spend("decode", time.perf_counter() - began, taken)

    def _add(self, chooser: Chooser | DeviceChooser, logits: Tensor) -> None:
        """Choose the next tokens, and ask who is to be asked whether to go on."""
        plan = self.plan
        so_far = self.ids[:, : self.length]
        if self.logits is not None:
            self.logits += (logits.to(torch.float32, copy=True),)
        if plan.called is not None or self.scores is not None:
            logits = logits.to(torch.float32, copy=True)
            if plan.called is not None:
                logits = plan.called(so_far, logits)
        if self.scores is not None:
            self.scores += (logits,)
        still = chooser(logits)
        self._append(chooser.tokens.T)
        if plan.streamer is not None:
            plan.streamer.put(chooser.tokens[:, 0].to("cpu", copy=True))  # it may keep them
        if plan.asked:
            so_far = self.ids[:, : self.length]
            for criterion in plan.asked:
                self.stopped |= criterion(so_far, self.scores)
            if plan.eos or plan.pads:
                chooser.done |= self.stopped
            still = int((~(chooser.done | self.stopped)).sum())
        look = self.length % LOOK == 0 or plan.streamer is not None or self.kept
        if still is None and look:
            still = int((~chooser.done).sum())
        self.finished = still == 0 or self.length >= plan.max_length

    def _append(self, tokens: Tensor) -> None:
        """``tokens [steps, B]`` behind the text."""
        end = self.length + len(tokens)
        if end > self.ids.shape[1]:
            room = min(max(2 * self.length, end), self.plan.max_length) - self.ids.shape[1]
            self.ids = torch.cat((self.ids, self.ids.new_empty(self.batch, room)), dim=1)
        self.ids[:, self.length : end] = tokens.T
        self.length = end

    def _end(self) -> int:
        """Where the text ends: a device is only asked now and then whether all rows are done."""
        if self.rounds.device is None or not self.plan.eos:
            return self.length
        start = self.report.prompt_tokens
        new = self.ids[:, start : self.length]
        ended = torch.isin(new, torch.tensor(self.plan.eos, device=new.device)).cumsum(1) > 0
        steps = int((~ended.all(0)).sum()) + 1
        return min(start + steps, self.length)
