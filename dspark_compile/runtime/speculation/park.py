"""Parking: when drafting does not pay, decode plainly, and try again now and then.

A round that takes ``t`` seconds and commits tau tokens for each request costs ``t / tau`` a token;
a plain step costs its own time. Drafting is parked where the first is larger, and taken up where it
is smaller by a margin (3 %), so that noise does not flip it. While parked, a probe of some rounds
(one says little: it meets cold caches, and tau varies much from round to round) is drafted every 8
plain steps at first, and ever more rarely while probes keep failing: as rarely as it takes for what
probes lose to stay below a share (2 %) of the time.

A draft without a confidence head is known by what was verified alone. Where that once was little,
the schedule verifies nothing, and nothing more is learned: drafting would look bad for good, or
verify too few tokens. So now and then some rounds verify whatever was drafted (a *look*): before
anything is known, at the start of every probe, and among drafted rounds as often as keeps what
looks lose below a share (1 %). What scheduled rounds cost says whether to draft; looks teach the
schedule.

A machine has slow phases, so both prices have to be of the same time: among drafted rounds a few
plain steps are taken again and again.

Even a parked round costs something: the draft's context goes on. A call that ends parked, by far
after few rounds and clearly after many, therefore lets the next one rest, which is decoded without
the draft; then two, four, ... `MOST_RESTS`, until one ends drafting. A call behind many rests
judges afresh: what was measured long ago may have been a slow moment.

Times are the host's or the device's, measured by the caller; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

# How often a visit of many rounds counts at most: its seconds are one measurement, in one moment of
# the machine; its tokens were counted round by round.
MOST_ADDED, MOST_COUNTED = 4, 16
# Drafted rounds between two looks at what plain steps cost, and how many of these. At first, while
# one slow moment would be all that is known, they are taken sooner.
PLAIN_EVERY, PLAIN_STEPS = 48, 2
PLAIN_SOONER, PLAIN_KNOWN = 12, 8
# Rounds of a probe, and of a look. Plain steps to the next probe are doubled up to so many, and
# grow further only where probes would lose more than their share: a text may change.
PROBE, LOOK = 6, 6
MOST_DOUBLED = 512
# Share of the time that looks among drafted rounds may lose.
LOOK_SHARE = 0.01
# Where calls rest: how much dearer drafting is, by how many rounds say so. Few rounds must be very
# sure, since a call that rests learns nothing.
CLEARLY = ((18, 1.25), (30, 1.05))
# `burden` of rows of a batch before it was measured: rows commit different numbers of tokens, and
# all wait for the slowest; the holes between them are closed outside of rounds. (Two rows whose
# rounds were worth 306 us a token took about 400.)
BATCH_BURDEN, MOST_BURDEN, BURDEN_SHARE = 1.5, 3.0, 0.3
# Measurements that the price of a round rests on, and what is far above their median.
RECENT, SLOW = 32, 1.5
# Calls in a row that are decoded without the draft; after so many what was measured is of another
# time, and is forgotten.
MOST_RESTS, FORGET_AFTER = 16, 8


@dataclass
class _Average:
    """An exponential average that starts as a plain one."""

    share: float = 0.05
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(self.share, 1 / self.count) * (value - self.value)


@dataclass
class _Typical:
    """The mean of the latest measurements without those far above their median: a slow moment,
    such as the first rounds of cold programs, has no say. (The median itself would leave out the
    dearer of the widths that are verified.)"""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.values.append(value)

    @property
    def value(self) -> float:
        if not self.values:
            return 0.0
        most = SLOW * median(self.values)
        return mean(x for x in self.values if x <= most)


@dataclass
class ParkPolicy:
    """Decides round by round whether to draft.

        while not done:
            if policy.drafts():
                ...; policy.drafted(seconds, committed / requests)  # if policy.looks, all verified
            else:
                ...; policy.plain(seconds)

    Attributes:
        margin: how much better drafting has to be to come back, as a share.
        probe_every: plain steps between probes, at least.
        budget: share of the time that probes may lose.
        least: drafted rounds before anything is decided.
        burden: what a drafted token costs beside its share of the rounds measured, as a factor;
            learned by `took`.
        guesses: whether the schedule goes by what was verified before, for want of confidences.
        parked: whether drafting is parked now.
        parked_rounds, probes: counted.
    """

    margin: float = 0.03
    probe_every: int = 8
    budget: float = 0.02
    least: int = 12
    burden: float = 1.0
    guesses: bool = False
    parked: bool = False
    parked_rounds: int = 0
    probes: int = 0
    _round: _Typical = field(default_factory=_Typical)
    _tau: _Average = field(default_factory=_Average)
    _plain: _Typical = field(default_factory=_Typical)
    _since: int = 0
    _interval: int = 0
    _drafted: int = 0
    _rounds: int = 0
    _rests: int = 0
    _resting: int = 0
    _look: int = 0  # rounds of the look that goes on, or comes next
    _lost: float = 0.0  # seconds that looks among drafted rounds lost, beyond their share
    _probed: tuple[float, float] = (0.0, 0.0)  # seconds and tokens of the probe that goes on

    def __post_init__(self) -> None:
        if not 0 <= self.margin < 1 or not 0 < self.budget < 1:
            raise ValueError(f"margin={self.margin}, budget={self.budget}: shares from 0 to 1")
        if self.probe_every < 1 or self.least < 1:
            raise ValueError(f"probe_every={self.probe_every}, least={self.least}: give 1 or more")
        self._interval = self.probe_every
        self._look_again()

    def _look_again(self) -> None:
        self._look = LOOK if self.guesses else 0

    @property
    def looks(self) -> bool:
        """Whether the next drafted round verifies whatever was drafted, at any price."""
        return self._look > 0

    @property
    def price(self) -> float:
        """Seconds a token when drafting, as measured; infinite before."""
        tau = self._tau.value
        return self.burden * self._round.value / tau if tau else math.inf

    @property
    def plain_price(self) -> float:
        """Seconds a token of plain decoding; infinite before it was measured."""
        return self._plain.value if self._plain.count else math.inf

    def drafts(self) -> bool:
        """Whether the next round drafts. Plain steps are taken early, and now and then, to know
        their price."""
        if not self.parked:
            if self._round.count < self.least:
                return True
            return self._plain.count > 0 and self._drafted < self._every
        return self._since >= self._interval

    def most(self, first: int) -> int:
        """How many rounds may follow before it wants to be asked again: `PROBE` where it probes,
        ``first`` while it knows little."""
        if self.parked and self._since < self._interval:
            return self._interval - self._since
        if self.looks and self.drafts():
            return self._look
        if self.parked:
            return PROBE
        if self._drafted >= self._every:
            return PLAIN_STEPS
        if self._round.count == self.least and not self._plain.count:
            return first
        return min(first, self._every) if self._round.count < 4 * self.least else (
            self._every - self._drafted
        )  # fmt: skip

    @property
    def _every(self) -> int:
        return PLAIN_EVERY if self._plain.count >= PLAIN_KNOWN else PLAIN_SOONER

    def drafted(self, seconds: float, tau: float, rounds: int = 1) -> None:
        """Each of ``rounds`` took ``seconds`` and committed ``tau`` tokens a request.

        Raises:
            ValueError: a time or tau is not positive.
        """
        if not seconds > 0 or not tau > 0:
            raise ValueError(f"a round of {seconds} s with {tau} tokens: both are positive")
        self._drafted += rounds
        self._rounds += rounds
        spent, made = rounds * self.burden * seconds, rounds * tau
        if self.parked:
            self._probed = self._probed[0] + spent, self._probed[1] + made
        if self.looks:
            self._look = max(self._look - rounds, 0)
            if not self.parked:
                self._lost += max(spent - made * min(self.price, self.plain_price), 0.0)
            return
        self._lost = max(self._lost - LOOK_SHARE * rounds * seconds, 0.0)
        for _ in range(min(rounds, MOST_ADDED)):
            self._round.add(seconds)
        for _ in range(min(rounds, MOST_COUNTED)):
            self._tau.add(tau)
        if self.parked:
            self._end_probe()
        self._decide()

    def _end_probe(self) -> None:
        spent, made = self._probed
        self.probes += 1
        self._since, self._probed = 0, (0.0, 0.0)
        self._look_again()
        if spent < made * self.plain_price:
            # One good probe is luck: the averages decide, and they follow the next ones soon.
            self._interval = 1
            return
        loss = spent - made * self.plain_price
        least = math.ceil(loss / (self.budget * self.plain_price))
        doubled = min(2 * self._interval, MOST_DOUBLED)
        self._interval = max(doubled, self.probe_every, least)

    def plain(self, seconds: float, steps: int = 1) -> None:
        """Each of ``steps`` plain steps took ``seconds``.

        Raises:
            ValueError: the time is not positive.
        """
        if not seconds > 0:
            raise ValueError(f"a step of {seconds} s: times are positive")
        for _ in range(min(steps, MOST_ADDED)):
            self._plain.add(seconds)
        self._drafted = 0
        if self.parked:
            self.parked_rounds += steps
            self._since += steps
        elif self._lost == 0:
            self._look_again()
        self._decide()

    def took(self, rounds: int, tau: float, tokens: int, beside: float) -> None:
        """A call in which the request of the most tokens got ``tokens`` from ``rounds`` drafted
        rounds, where all requests together got ``tau`` a request and round, and time outside of
        rounds made it ``beside`` times as long: what its `burden` was."""
        if rounds >= self.least and tokens > 0:
            seen = min(max(rounds * tau / tokens * beside, 1.0), MOST_BURDEN)
            self.burden += BURDEN_SHARE * (seen - self.burden)

    def ended(self) -> None:
        """A call has ended."""
        dear = self.parked and any(
            self._rounds >= rounds and self.price > times * self.plain_price
            for rounds, times in CLEARLY
        )
        self._rests = min(max(2 * self._rests, 1), MOST_RESTS) if dear else 0
        self._resting = self._rests

    def rests(self) -> bool:
        """Whether the call that begins is to go without the draft."""
        if self._resting == 0:
            if self._rests >= FORGET_AFTER:
                self._round, self._tau, self._plain = _Typical(), _Average(), _Typical()
                self.parked, self._rounds, self._drafted = False, 0, 0
                self._interval, self._lost = self.probe_every, 0.0
                self._look_again()
            return False
        self._resting -= 1
        return True

    def _decide(self) -> None:
        if self._round.count < self.least or not self._plain.count:
            return
        if self.parked and self.price < (1 - self.margin) * self.plain_price:
            self.parked, self._interval = False, self.probe_every
        elif not self.parked and self.price > self.plain_price:
            self.parked, self._since = True, 0
            self._probed = 0.0, 0.0
            self._look_again()

    def to_dict(self) -> dict[str, Any]:
        """What the telemetry shows."""
        return {
            "parked": self.parked,
            "parked_rounds": self.parked_rounds,
            "probes": self.probes,
            "seconds_per_token_drafting": self.price if self._tau.count else None,
            "seconds_per_token_plain": self._plain.value if self._plain.count else None,
        }
