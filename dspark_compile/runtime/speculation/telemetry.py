"""What speculation did: accepted length, conditional acceptance, lengths, time, parking.

Counters are tensors on the device, added to without reading them; `SpeculationStats` reads them
once, when somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Counters:
    """Device-resident sums over rounds, for blocks of K drafted tokens."""

    def __init__(self, length: int, device: torch.device | str | None = None) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        self.length = length
        self.rounds = zeros()
        self.committed = zeros()
        self.drafted = zeros()
        self.reached = zeros(length)
        self.passed = zeros(length)
        self.predicted = zeros(length)
        self.survived = zeros(length)
        self.predictions = zeros(length)
        self.lengths = zeros(length + 1)

    def record(
        self,
        accepted: Tensor,
        counts: Tensor,
        lengths: Tensor,
        live: Tensor,
        survival: Tensor | None = None,
    ) -> None:
        """Add a round.

        Args:
            accepted, counts, lengths: accepted and committed tokens, and those verified ``[R]``.
            live: requests that took part ``[R]``.
            survival: predicted ``[R, K]``.
        """
        on = live[:, None].to(self.reached.dtype)
        steps = torch.arange(self.length, device=accepted.device)
        verified = steps < lengths[:, None]
        reached = (verified & (accepted[:, None] >= steps)) * on
        passed = (verified & (accepted[:, None] > steps)) * on
        self.rounds += live.sum()
        self.committed += (counts * live).sum()
        self.drafted += (lengths * live).sum()
        self.reached += reached.sum(0)
        self.passed += passed.sum(0)
        self.lengths.scatter_add_(0, lengths.clamp(max=self.length), on[:, 0])
        if survival is not None:
            # Not where an earlier rejection settles it: that would choose rows by their outcome.
            known = verified * on
            self.predicted += (survival * known).sum(0)
            self.survived += ((accepted[:, None] > steps) * known).sum(0)
            self.predictions += known.sum(0)


@dataclass
class SpeculationStats:
    """Of one `generate`, or of the reference loop.

    Attributes:
        tau: committed tokens a round and request, bonus included.
        rounds: target steps, counted for each request.
        committed, drafted, accepted: tokens.
        conditional: c_k: accepted at position k, given that it was reached and verified.
        survival, predicted: how often a prefix of k tokens stood, and what the confidences said.
        verify_lengths: how often 0, 1, ... K tokens were verified.
        seconds: time by part: ``draft``, ``verify``, ``other``; and of ``draft`` the sequential
            stage, ``sequence``, where native rounds measure it.
        parked_rounds, probes: of the park policy.
        lookup_rounds: target steps that verified look-ups where there is a draft, too.
        proposer: what drafted.
        notes: warnings, in words.
    """

    tau: float = 0.0
    rounds: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    conditional: list[float] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    verify_lengths: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    parked_rounds: int = 0
    probes: int = 0
    lookup_rounds: int = 0
    proposer: str = "none"
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, counters: Counters, **others: Any) -> SpeculationStats:
        """From the counters; this waits for the device."""
        rounds, committed = float(counters.rounds), float(counters.committed)
        stats = cls(
            tau=committed / rounds if rounds else 0.0,
            rounds=round(rounds),
            committed=round(committed),
            drafted=round(float(counters.drafted)),
            accepted=round(float(counters.passed.sum())),
            conditional=_ratio(counters.passed, counters.reached),
            survival=_ratio(counters.survived, counters.predictions),
            predicted=_ratio(counters.predicted, counters.predictions),
            verify_lengths=[round(n) for n in counters.lengths.tolist()],
            **others,
        )
        stats._warn()
        return stats

    @property
    def acceptance_rate(self) -> float:
        """alpha: accepted of the verified tokens. It rises under truncation; look at tau."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def _warn(self) -> None:
        tested = self.rounds - (self.verify_lengths[0] if self.verify_lengths else 0)
        if tested >= 32 and self.conditional and self.conditional[0] < 0.1:
            self.notes.append(
                f"tau is {self.tau:.2f}: the target accepts almost nothing of what is drafted "
                f"({100 * self.conditional[0]:.0f} % of first tokens). Likely causes: the draft "
                "was made for another model or tokenizer, the target is a fine-tuned or quantised "
                "version of the one it was trained with, or a chat template or thinking mode that "
                "it never saw"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the report and ``return_stats``."""
        from dataclasses import asdict

        return asdict(self) | {"acceptance_rate": self.acceptance_rate}


def _ratio(part: Tensor, whole: Tensor) -> list[float]:
    return [p / w if w else 0.0 for p, w in zip(part.tolist(), whole.tolist())]
