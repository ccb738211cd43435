"""`State`: the requests of one speculative `generate`, as tensors that the engines write in place.

An engine (`torch_engine`, `native_engine`) runs rounds over it: propose, schedule, verify, accept,
commit, crop. B requests, K drafted tokens of a round, V the vocabulary, T tokens of room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark_compile.runtime.speculation.accept import is_greedy
from dspark_compile.runtime.speculation.calibration import Calibration, OnlineCalibration
from dspark_compile.runtime.speculation.ngram import LONGEST
from dspark_compile.runtime.speculation.rounds import Verifying
from dspark_compile.runtime.speculation.sps import SPSCurve
from dspark_compile.runtime.speculation.telemetry import Counters
from dspark_compile.runtime.token_choice import TokenChoice

# What a round is thought to accept before anything was seen.
FIRST_GUESS = 0.7
# How much a new outcome or time counts, and how many times what is known a time counts at most.
SHARE, HICCUP = 0.1, 2.0
# How much nearer the price of an unused width comes, a round, to what it was beside the one used.
FORGOTTEN = 0.02
# How far ahead of the slowest a request is whose tokens count 1 / e: a share of what that one has
# to go.
AHEAD = 1 / 16
# How much better verifying look-ups has to look than a plain step, as a share.
MARGIN = 0.05
# How much a new measurement of what closing holes costs counts, and the most it may cost.
HOLES_SHARE, MOST_BESIDE = 0.3, 3.0


# What a round verifies: nothing, what was looked up, or what was drafted.
SOURCES = ("plain", "lookup", "draft")


@dataclass
class Visit:
    """What some rounds did: their number, the tokens they committed for all requests, the requests
    that took part (summed over rounds), and seconds; ``parts``: the same by source."""

    rounds: int = 0
    committed: int = 0
    requests: int = 0
    seconds: float = 0.0
    parts: dict[str, Visit] = field(default_factory=dict)

    def add(
        self, source: str, committed: int, requests: int, seconds: float, rounds: int = 1
    ) -> None:
        """Rounds of a source. `seconds` of the whole, which has more in it, are its caller's."""
        if not rounds:
            return
        self.rounds += rounds
        self.committed += committed
        self.requests += requests
        part = self.parts.setdefault(source, Visit())
        part.rounds += rounds
        part.committed += committed
        part.requests += requests
        part.seconds += seconds


@dataclass
class Prices:
    """Measured seconds of what a round consists of, kept from call to call.

    Attributes:
        verify: by width. first: each at its best, before the first round.
        draft: of drafting a round.
        conditional: how often a drafted token stood, where no head says so ``[K]``.
        matched: how often the k-th token behind a match stood, by the match's length ``[n][K]``.
        drafted: tokens of a request, and seconds, of a drafted round; 0 before there was one.
        beside: how many times its own time a round of a batch costs that verifies: rows that commit
            different numbers of tokens leave holes, which are closed outside of rounds.
    """

    verify: dict[int, float] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    draft: float = 0.0
    conditional: list[float] = field(default_factory=list)
    matched: list[list[float]] = field(default_factory=list)
    drafted: list[float] = field(default_factory=lambda: [0.0, 0.0])
    beside: float = 1.0

    def trust(self, count: int) -> list[list[float]]:
        """`matched`, of ``count`` tokens behind matches of 1, 2, ... `ngram.LONGEST`."""
        if not self.matched:
            self.matched = [[FIRST_GUESS] * count for _ in range(LONGEST)]
        return self.matched

    def forget(self, used: int, share: float = FORGOTTEN) -> None:
        """Bring prices nearer to what they were beside the one of width ``used``, which was
        measured just now: what is not used is not measured, and one slow moment would shut a width
        out for good."""
        first = self.first
        for width in first:
            like = first[width] / first[used] * self.verify[used]
            self.verify[width] += share * (like - self.verify[width])

    def closed(self, holes: float, rounds: float) -> None:
        """Closing the holes of rounds that took ``rounds`` seconds took ``holes``."""
        if rounds > 0:
            seen = min(1 + holes / rounds, MOST_BESIDE)
            self.beside += HOLES_SHARE * (seen - self.beside)

    def table(self, count: int) -> list[float]:
        """Seconds of verifying 0, 1, ... ``count + 1`` tokens a row: convex, as the early stop
        wants it."""
        known = {w: s * (self.beside if w > 1 else 1) for w, s in self.verify.items()} or {1: 1.0}
        return SPSCurve.from_points(known, count + 1).table().tolist()


@dataclass
class State:
    """Requests, and what they are asked for.

    Attributes:
        rounds: the target's programs. proposer: what drafts; None decodes plainly.
        choice: how tokens are chosen. eos: tokens that end a request. limit: new tokens of each.
        text ``[B, T]``: every request's tokens without padding; lengths ``[B]`` of them.
        prompts ``[B]``: tokens of the prompts. done ``[B]`` bool.
        seen ``[B, V]`` bool: what the repetition penalty hits.
        counters: the telemetry.
        prices: measured. fixed: verify every drafted token, whatever it costs.
        calibration: of the confidences, for this call. online: what refines it for the next ones.
        widths: that programs exist for.
    """

    rounds: Verifying
    proposer: Any
    choice: TokenChoice
    eos: Sequence[int]
    limit: int
    text: Tensor
    lengths: Tensor
    prompts: Tensor
    done: Tensor
    seen: Tensor | None
    counters: Counters
    prices: Prices
    calibration: Calibration
    fixed: bool = False
    online: OnlineCalibration | None = None
    widths: list[int] = field(default_factory=list)

    @property
    def greedy(self) -> bool:
        """Whether nothing is random."""
        return is_greedy(self.choice)

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def slack(self) -> int:
        """Cache slots that a round may write behind what is held."""
        more = 0 if self.proposer is None else self.proposer.slack
        return max(self.rounds.count + 1, more)

    def fair(self) -> list[float]:
        """What a token of each live request counts (`fair`)."""
        left = self.limit - (self.lengths - self.prompts)
        return fair(left[~self.done].tolist())

    def finished(self) -> bool:
        """Whether all requests have ended."""
        return bool(self.done.all())

    def has_room(self) -> bool:
        """Whether a round fits into the cache and the text."""
        rounds = self.rounds
        fits = rounds.length + self.slack <= rounds.cache.room
        return fits and int(self.lengths.max()) + rounds.count + 1 <= self.text.shape[1]

    def make_room(self) -> bool:
        """Close holes, or grow; whether there were holes."""
        rounds = self.rounds
        caches = []
        if self.proposer is not None:
            self.proposer.before_moving(self)
            caches = self.proposer.caches()
        rounds.live[: self.batch] = ~self.done
        moved = rounds.compact(caches)
        rounds.reserve(rounds.length + self.slack)
        need = int(self.lengths.max()) + rounds.count + 1
        if need > self.text.shape[1]:
            more = self.text.new_zeros(self.batch, max(need, self.text.shape[1]))
            self.text = torch.cat((self.text, more), dim=1)
        return moved


def widths_for(rows: int, count: int, limit: int | None = None) -> list[int]:
    """Widths to have programs for: one token, all of them, and powers of two between (for a single
    row of up to eight, half of them); no more than make ``limit`` rows together (`most_rows` of the
    native products)."""
    most = count + 1
    if limit is not None:
        most = max(1, min(most, limit // rows))
    widths = {1, most}
    if rows > 1 or most > 8:
        widths |= {w for w in (2, 4, 8) if w < most}
    elif most > 6:
        widths.add(most // 2)
    return sorted(widths)


def fair(left: Sequence[int]) -> list[float]:
    """What a token of each request counts, 1 on average, where they have ``left`` tokens to go, at
    most: a batch is ready when the slowest is, so tokens of those that are ahead of it count less,
    and what brings only them on is not verified for long."""
    most = max(left)
    scale = max(AHEAD * most, 1.0)
    weights = [math.exp((n - most) / scale) for n in left]
    return [w * len(left) / sum(weights) for w in weights]


def verify_length(
    survival: Sequence[Sequence[float]],
    table: Sequence[float],
    draft: float,
    most: int,
    weights: Sequence[float] | None = None,
) -> int:
    """How many drafted tokens of every request to verify: Algorithm 1 by columns.

    A program verifies the same number for all rows, so a column of the block is admitted at a time:
    position k of all requests, while the expected tokens over the seconds rise, and stop at once
    where they do not. Whether position k is admitted depends on confidences up to k, which look at
    tokens before k only: as lossless as the order of single tokens is.

    Args:
        survival: ``[R][K]`` of the live requests. table: seconds by width (`Prices.table`).
        draft: seconds of drafting. most: at most so many. weights: of look-ups, what a token of
            each request counts, 1 on average (`fair`), and the first position has to be worth more
            by a margin; without them all count alike.
    """
    return best_length(survival, table, draft, most, weights)[0]


def best_length(
    survival: Sequence[Sequence[float]],
    table: Sequence[float],
    draft: float,
    most: int,
    weights: Sequence[float] | None = None,
) -> tuple[int, float]:
    """`verify_length`, and the expected tokens a second there."""
    tau = float(len(survival))
    best = tau / (draft + table[1])
    least = best if weights is None else (1 + MARGIN) * best
    weights = weights or [1.0] * len(survival)
    for k in range(most):
        tau += sum(w * row[k] for w, row in zip(weights, survival, strict=True))
        value = tau / (draft + table[k + 2])
        if not value > least:
            return k, best
        best = least = value
    return most, best
