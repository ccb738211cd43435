"""Calibrated confidences: sequential temperature scaling (STS).

A confidence head's product of probabilities should be the probability that a prefix is accepted.
For k = 1 ... K, with the temperatures before k fixed, T_k is the one of 41 values from 0.1 to 10,
log-spaced, that makes the expected calibration error (15 bins) of

    prod over i <= k of sigmoid(logit_i / T_i)      against      "the first k tokens were accepted"

smallest (DSpark, arXiv 2607.05147). A position that was never verified says nothing: it is left
out, not counted as rejected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TEMPERATURES = torch.logspace(-1, 1, 41)
BINS = 15


def expected_calibration_error(
    predicted: Tensor, happened: Tensor, observed: Tensor, bins: int = BINS
) -> Tensor:
    """ECE: the mean over equal bins of |predicted - frequency|, weighted by their counts.

    Args:
        predicted: probabilities ``[..., n]``. happened, observed: boolean ``[n]``.

    Returns:
        ``[...]`` float32; 0 where nothing was observed.
    """
    weight = observed.float()
    index = (predicted * bins).long().clamp(0, bins - 1)
    shape = (*predicted.shape[:-1], bins)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(shape, device=predicted.device).scatter_add_(
            -1, index, values.expand(predicted.shape).contiguous()
        )

    expected = total(predicted.float() * weight)
    seen = total(happened.float() * weight)
    return (expected - seen).abs().sum(-1) / weight.sum().clamp(min=1)


@dataclass
class Calibration:
    """Temperatures of the confidence logits, by position.

    Attributes:
        temperatures: ``[K]`` float32, 1 where nothing was fitted.
        before, after: ECE of the prefix probabilities at each k, without and with temperatures.
        observed: how often each position was verified in the fit.
    """

    temperatures: Tensor
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    observed: list[int] = field(default_factory=list)

    @classmethod
    def identity(cls, length: int, device: Any = None) -> Calibration:
        """No scaling."""
        return cls(torch.ones(length, device=device))

    def conditional(self, logits: Tensor) -> Tensor:
        """c_k ``[B, K]`` of confidence logits ``[B, K]``."""
        return torch.sigmoid(logits.float() / self.temperatures.to(logits.device))

    def survival(self, logits: Tensor) -> Tensor:
        """a_k = c_1 ... c_k ``[B, K]``: how likely the first k tokens are all accepted."""
        return self.conditional(logits).cumprod(-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the scheduler's part of ``calibration.json``."""
        return {
            "temperatures": [round(t, 6) for t in self.temperatures.tolist()],
            "ece_before": [round(e, 6) for e in self.before],
            "ece_after": [round(e, 6) for e in self.after],
            "observed": list(self.observed),
        }

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any] | None, length: int, *, sampled: bool = False
    ) -> Calibration:
        """Back from `to_dict`, or from a draft's ``calibration.json``; None gives `identity`.

        Args:
            sampled: take what was fitted to rejection sampling at temperature 1, if there is such.

        Raises:
            ValueError: the temperatures are not one positive number a position.
        """
        if not data:
            return cls.identity(length)
        if sampled and data.get("sampled"):
            data = data["sampled"]
        values = data.get("temperatures")
        legal = (
            isinstance(values, Sequence)
            and len(values) == length
            and all(isinstance(v, (int, float)) and v > 0 and math.isfinite(v) for v in values)
        )
        if not legal:
            raise ValueError(
                f"calibration.json: temperatures={values!r}; a block of {length} tokens needs "
                f"{length} positive numbers"
            )
        return cls(
            torch.tensor(values, dtype=torch.float32),
            list(data.get("ece_before", ())),
            list(data.get("ece_after", ())),
            list(data.get("observed", ())),
        )


def fit(logits: Tensor, accepted: Tensor, verified: Tensor | None = None) -> Calibration:
    """Fit the temperatures.

    Args:
        logits: confidence logits ``[n, K]``.
        accepted: length of the accepted prefix ``[n]``.
        verified: how many positions were verified ``[n]``; None means all. A row counts at k only
            if k positions were verified. That an earlier rejection settles the matter is no reason
            to count it as well: rows would then be chosen by their outcome.
    """
    logits = logits.float()
    count, length = logits.shape
    verified = torch.full_like(accepted, length) if verified is None else verified
    grid = TEMPERATURES.to(logits.device)
    prefix = torch.ones(count, device=logits.device)
    plain = torch.sigmoid(logits).cumprod(-1)
    result = Calibration.identity(length, logits.device)
    for k in range(length):
        known = verified > k
        happened = accepted > k
        result.observed.append(int(known.sum()))
        result.before.append(float(expected_calibration_error(plain[:, k], happened, known)))
        if not result.observed[-1]:
            result.after.append(0.0)
            prefix = prefix * torch.sigmoid(logits[:, k])
            continue
        candidates = prefix * torch.sigmoid(logits[:, k] / grid[:, None])
        errors = expected_calibration_error(candidates, happened, known)
        best = int(errors.argmin())
        result.temperatures[k] = grid[best]
        result.after.append(float(errors[best]))
        prefix = candidates[best]
    return result


class OnlineCalibration:
    """Refines the temperatures from what generation sees, without touching the host in between.

    A ring of the latest rounds lies on the device; `record` writes rows into it (native rounds
    write them themselves), `refit` (now and then, off the critical path) fits anew once there is
    enough.

    Attributes:
        calibration: as it is now. refits: how often it was fitted anew.
        size: rounds that the ring holds. least: observations that a position's fit takes.
    """

    def __init__(self, start: Calibration, *, size: int = 4096, least: int = 1024) -> None:
        length, device = len(start.temperatures), start.temperatures.device
        self.calibration, self.size, self.least, self.refits = start, size, least, 0
        self._due = least
        self._logits = torch.zeros(size, length, device=device)
        self._accepted = torch.zeros(size, dtype=torch.long, device=device)
        self._verified = torch.zeros(size, dtype=torch.long, device=device)
        self._next = torch.zeros((), dtype=torch.long, device=device)

    def record(self, logits: Tensor, accepted: Tensor, verified: Tensor, live: Tensor) -> None:
        """Add a round: ``[B, K]``, then ``[B]`` each. Rows not ``live`` count as unverified.

        Device-resident: the number of rows is the batch's, whatever ``live`` says.
        """
        rows = (self._next + torch.arange(len(accepted), device=self._next.device)) % self.size
        self._logits.index_copy_(0, rows, logits.float())
        self._accepted.index_copy_(0, rows, torch.where(live, accepted, 0))
        self._verified.index_copy_(0, rows, torch.where(live, verified, 0))
        self._next += len(accepted)

    @property
    def ring(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `record` writes: logits ``[size, K]`` float32, accepted and verified ``[size]``, and
        how many rows there ever were ``[]``, int64."""
        return self._logits, self._accepted, self._verified, self._next

    def refine(self) -> bool:
        """`refit` where there is twice as much as last time, or the ring is new four times over: a
        fit takes as long as some rounds. Whether it did (one host read)."""
        seen = int(self._next)
        if seen < self._due:
            return False
        self._due = min(2 * seen, seen + 4 * self.size)
        before = self.calibration
        return self.refit() is not before

    def refit(self) -> Calibration:
        """Fit to what is there; with too little of it, the temperatures stay (one host read)."""
        seen = min(int(self._next), self.size)
        verified = self._verified[:seen]
        if int((verified > 0).sum()) >= self.least:
            new = fit(self._logits[:seen], self._accepted[:seen], verified)
            old = self.calibration.temperatures
            rare = torch.tensor([n < self.least for n in new.observed], device=old.device)
            new.temperatures = torch.where(rare, old, new.temperatures)
            self.calibration = new
            self.refits += 1
        return self.calibration
