"""Speculative decoding written plainly: the oracle for the compiled rounds.

Each request has its own `DynamicCache` and its own verification, so raggedness needs no thought;
the decisions (accept, schedule) are the same tensor functions that compiled rounds use, over all
requests at once. Slow, but right: taps by hooks, a crop after each round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.ops.token import draw, penalised
from dspark_compile.runtime.speculation.accept import (
    commit,
    distribution,
    greedy,
    is_greedy,
    rejection,
)
from dspark_compile.runtime.speculation.calibration import Calibration
from dspark_compile.runtime.speculation.proposers import Proposal, proposer_for
from dspark_compile.runtime.speculation.schedule import early_stop
from dspark_compile.runtime.speculation.sps import SPSCurve
from dspark_compile.runtime.speculation.taps import Taps, crop
from dspark_compile.runtime.speculation.telemetry import Counters, SpeculationStats
from dspark_compile.runtime.token_choice import TokenChoice

Schedule = Callable[[Tensor, Tensor], Tensor]  # (survival [R, K], live [R]) -> lengths [R]


@dataclass
class Speculated:
    """What `speculate` returns.

    Attributes:
        sequences: ``[R, L]``: prompts as given, then what was generated, padded on the right.
        generated: the new tokens of each request.
        stats: what happened.
    """

    sequences: Tensor
    generated: list[Tensor]
    stats: SpeculationStats


@dataclass
class _Request:
    """One request: its tokens, its target cache, whether it is done."""

    ids: Tensor
    prompt: int
    cache: Any
    done: bool = False


@torch.no_grad()
def speculate(
    target: Any,
    draft: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    choice: TokenChoice | None = None,
    processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    schedule: Schedule | SPSCurve | None = None,
    calibration: Calibration | None = None,
    num_drafted: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Generate with speculation, request by request.

    Args:
        target: a causal language model of transformers whose cache can be cropped.
        draft: a `DraftModel` bound to it, "ngram", a causal language model, or None for plain
            decoding.
        input_ids: ``[R, L]``; prompts padded on the left where ``attention_mask`` is 0.
        choice: how tokens are chosen; None is greedy.
        processor: more logits processing, as transformers' ``f(ids [1, L], logits [1, V])``, before
            ``choice``; on target and draft alike.
        schedule: a function of the survivals, or an `SPSCurve` for the early-stop scheduler; None
            verifies whole blocks.
        calibration: of the confidences; None takes the draft's own.
        num_drafted: tokens of a proposal, where the draft leaves it open (n-gram, causal model).
        eos_token_id: ends a request; it is part of the output.
        generator: of random numbers, on the target's device.

    Raises:
        ValueError: ``draft`` is no draft; or shapes do not fit.
        TypeError: the target's cache cannot be cropped (recurrent layers).
    """
    choice = choice or TokenChoice()
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids {list(input_ids.shape)}: give [requests, tokens], not empty")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: give 1 or more")
    proposer = proposer_for(draft, num_drafted)
    loop = _Loop(target, proposer, choice, processor, generator)
    ends = _ends(eos_token_id)
    requests = loop.prefill(input_ids, attention_mask, max_new_tokens)
    for request in requests:
        request.done = int(request.ids[-1]) in ends or max_new_tokens <= 1
    length = proposer.length if proposer else 0
    counters = Counters(length, input_ids.device)
    if calibration is None:
        own = getattr(draft, "calibration", None) if proposer else None
        calibration = Calibration.from_dict(own, length, sampled=loop.sample)
    scheduler = _scheduler(schedule)
    while not all(r.done for r in requests):
        loop.round(requests, max_new_tokens, ends, scheduler, calibration, counters)
    stats = SpeculationStats.read(
        counters, proposer=proposer.name if proposer else "none", seconds=dict(loop.seconds)
    )
    generated = [r.ids[r.prompt :] for r in requests]
    return Speculated(_join(input_ids, generated, pad_token_id), generated, stats)


class _Loop:
    """What stays the same over rounds."""

    def __init__(
        self, target: Any, proposer: Any, choice: TokenChoice, processor: Any, generator: Any
    ) -> None:
        self.target, self.proposer, self.choice = target, proposer, choice
        self.processor, self.generator = processor, generator
        self.sample = not is_greedy(choice)
        self.seconds = {"draft": 0.0, "verify": 0.0, "other": 0.0}

    # -- logits to choices, the same for both sides

    def logits(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Processed logits ``[V]`` behind ``ids [L]``."""
        logits = logits.float()
        if self.processor is not None:
            logits = self.processor(ids[None], logits[None])[0]
        seen = None
        if self.choice.penalty != 1:
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(0, ids, True)
        return penalised(logits, seen, self.choice.penalty)

    def probs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """What a token behind ``ids`` is drawn from ``[V]``."""
        plain = TokenChoice(
            True, self.choice.temperature, self.choice.top_k, self.choice.top_p, self.choice.min_p
        )
        return distribution(self.logits(logits, ids)[None], plain)[0]

    def uniform(self, *shape: int) -> Tensor:
        device = self.target.get_input_embeddings().weight.device
        return torch.rand(*shape, generator=self.generator, device=device)

    def draw(self, probs: Tensor) -> Tensor:
        """A token of ``probs [V]``."""
        return draw(probs[None], self.uniform(1))[0]

    # -- the target

    def run(self, request: _Request, feed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``[n, V]`` and taps ``[1, n, m * width]`` of ``feed [n]`` behind the cache."""
        taps: tuple[int, ...] = self.proposer.taps if self.proposer else ()
        kwargs = {"input_ids": feed[None], "past_key_values": request.cache, "use_cache": True}
        if not taps:
            return self.target(**kwargs).logits[0], None
        with Taps(self.target, taps) as tapped:
            logits = self.target(**kwargs).logits[0]
            return logits, tapped.take()

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None, room: int
    ) -> list[_Request]:
        """Requests with their first token chosen: the first anchor."""
        from transformers import DynamicCache

        requests, states = [], []
        for row, ids in enumerate(input_ids):
            if attention_mask is not None:
                ids = ids[attention_mask[row].bool()]
            if not len(ids):
                raise ValueError(f"prompt {row} is empty: attention_mask has no 1 in it")
            # Without a configuration every layer keeps all tokens, so that it can be cropped.
            request = _Request(ids, len(ids), DynamicCache())
            logits, taps = self.run(request, ids)
            request.ids = torch.cat((ids, self._next(logits[-1], ids)[None]))
            requests.append(request)
            states.append(taps)
        if self.proposer:
            room += self.proposer.length + 1
            self.proposer.start([r.ids[:-1] for r in requests], states, room)
        return requests

    def _next(self, logits: Tensor, ids: Tensor) -> Tensor:
        if self.sample:
            return self.draw(self.probs(logits, ids))
        return self.logits(logits, ids).argmax(-1)

    # -- one round

    def round(
        self,
        requests: list[_Request],
        most: int,
        ends: Sequence[int],
        schedule: Schedule | None,
        calibration: Calibration,
        counters: Counters,
    ) -> None:
        """Propose, schedule, verify, accept, commit, crop."""
        start = time.perf_counter()
        device = requests[0].ids.device
        live = torch.tensor([not r.done for r in requests], device=device)
        proposal, survival = self._propose(requests, calibration)
        # Nothing is verified past what the request may still have, its target token included.
        left = torch.tensor([most - (len(r.ids) - r.prompt) for r in requests], device=device)
        lengths = proposal.lengths
        if schedule is not None and survival is not None:
            lengths = torch.minimum(lengths, schedule(survival, live))
        lengths = torch.minimum(lengths, (left - 1).clamp(min=0)) * live
        self.seconds["draft"] += time.perf_counter() - start
        start = time.perf_counter()
        outputs = [
            self._verify(request, proposal.tokens[row, : int(lengths[row])])
            if not request.done
            else None
            for row, request in enumerate(requests)
        ]
        self.seconds["verify"] += time.perf_counter() - start
        start = time.perf_counter()
        accepted, following = self._accept(requests, proposal, lengths, outputs)
        done = commit(proposal.tokens, accepted, following, ends)
        counters.record(done.accepted, done.counts, lengths, live, survival)
        self._commit(requests, done, outputs, most)
        self.seconds["other"] += time.perf_counter() - start

    def _propose(
        self, requests: list[_Request], calibration: Calibration
    ) -> tuple[Proposal, Tensor | None]:
        if self.proposer is None:
            device = requests[0].ids.device
            none = torch.zeros(len(requests), 0, dtype=torch.long, device=device)
            return Proposal(none, torch.zeros(len(requests), dtype=torch.long, device=device)), None
        proposal = self.proposer.propose(
            [r.ids for r in requests], self.probs if self.sample else None, self.draw
        )
        confidence = proposal.confidence
        return proposal, None if confidence is None else calibration.survival(confidence)

    def _verify(self, request: _Request, drafted: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.run(request, torch.cat((request.ids[-1:], drafted)))

    def _accept(
        self,
        requests: list[_Request],
        proposal: Proposal,
        lengths: Tensor,
        outputs: list[tuple[Tensor, Tensor | None] | None],
    ) -> tuple[Tensor, Tensor]:
        """Accepted tokens and the target's token of each request."""
        rows, count = proposal.tokens.shape
        vocabulary = next(o[0].shape[-1] for o in outputs if o is not None)
        device = proposal.tokens.device
        table = torch.zeros(rows, count + 1, vocabulary, device=device)
        for row, output in enumerate(outputs):
            if output is None:
                table[row, :, 0] = 1  # a dead row needs something to choose from
                continue
            for k in range(int(lengths[row]) + 1):
                ids = torch.cat((requests[row].ids, proposal.tokens[row, :k]))
                make = self.probs if self.sample else self.logits
                table[row, k] = make(output[0][k], ids)
        if not self.sample:
            return greedy(proposal.tokens, table.argmax(-1), lengths)
        uniform = self.uniform(rows, count + 1)
        return rejection(proposal.tokens, proposal.probs, table, lengths, uniform)

    def _commit(
        self,
        requests: list[_Request],
        done: Any,
        outputs: list[tuple[Tensor, Tensor | None] | None],
        most: int,
    ) -> None:
        """Append tokens, crop the caches, hand the committed tokens' taps to the proposer."""
        states: list[Tensor] = []
        empty = next((o[1][:, :0] for o in outputs if o is not None and o[1] is not None), None)
        for row, (request, output) in enumerate(zip(requests, outputs)):
            if output is None:
                if empty is not None:
                    states.append(empty)
                continue
            count = int(done.counts[row])
            # The last committed token is the next anchor: it is not in any cache yet.
            crop(request.cache, len(request.ids) - 1 + count)
            if output[1] is not None:
                states.append(output[1][:, :count])
            request.ids = torch.cat((request.ids, done.tokens[row, :count]))
            full = len(request.ids) - request.prompt >= most
            request.done = bool(done.ended[row]) or full
        if self.proposer is not None and states:
            self.proposer.commit(states)


def _scheduler(schedule: Schedule | SPSCurve | None) -> Schedule | None:
    if not isinstance(schedule, SPSCurve):
        return schedule
    table = schedule.table()

    def by_curve(survival: Tensor, live: Tensor) -> Tensor:
        return early_stop(survival, table.to(survival.device), live)

    return by_curve


def _ends(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)


def _join(prompts: Tensor, generated: Sequence[Tensor], pad: int) -> Tensor:
    longest = max(len(g) for g in generated)
    tail = prompts.new_full((len(generated), longest), pad)
    for row, tokens in enumerate(generated):
        tail[row, : len(tokens)] = tokens
    return torch.cat((prompts, tail), dim=1)
