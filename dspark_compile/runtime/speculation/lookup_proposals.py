"""Proposals looked up in the text so far, alone or with a draft where they do not serve.

How far a look-up can be trusted is learned by the length of its match (`Prices.matched`), whether
or not it was verified: what a round commits says whether it would have stood.

Whether tokens are looked up or drafted is decided by what rounds before were worth, not by what
this round's draft says: a choice that knew the drafted tokens would bias sampling.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.runtime.speculation import ngram
from dspark_compile.runtime.speculation.compiled_proposers import Drafted, Lookup, Proposals
from dspark_compile.runtime.speculation.rounds import Verifying
from dspark_compile.runtime.speculation.state import State, best_length


class NgramProposals(Proposals):
    """Lookup in each request's own tokens.

    Args:
        count: K, tokens of a proposal.
        rounds: the target's.
        minimum: tokens that have to match.
        inner: what drafts where nothing matches, or where that was worth more: a `DraftProposals`
            or `ModelProposals` of at most K tokens.
    """

    def __init__(self, count: int, rounds: Verifying, minimum: int = 3, inner: Any = None) -> None:
        self.count, self.rounds, self.minimum, self.inner = count, rounds, minimum, inner
        self.name = "ngram" if inner is None else f"ngram+{inner.name}"
        self.slack = 0 if inner is None else inner.slack

    def propose(self, state: State, uniform: Tensor | None, drafts: bool = True) -> Drafted:
        """Look up; draft too if ``drafts`` and look-ups are not enough."""
        tokens, found, match = ngram.propose(
            state.text, state.lengths, self.count, minimum=self.minimum
        )
        live = ~state.done
        match = match * live
        trust = torch.tensor(state.prices.trust(self.count), device=tokens.device)
        point = match > 0
        survival = trust[(match - 1).clamp(min=0)].cumprod(-1) * point[:, None]
        looked = Lookup(tokens, match, point, survival)
        if self.inner is None or not drafts or self._instead(state, survival[live], point[live]):
            return Drafted(tokens, found * live, source="lookup", lookup=looked)
        drafted: Drafted = self.inner.propose(state, uniform)
        if not state.fixed:
            looked.point = point & (1 + survival.sum(-1) > state.prices.drafted[0])
        self.inner.replaced(looked.point)
        return self._joined(drafted, looked)

    def _instead(self, state: State, survival: Tensor, point: Tensor) -> bool:
        """Whether every live request has a look-up, worth what drafted rounds were."""
        tokens, seconds = state.prices.drafted
        if not bool(point.all()):
            return False
        if state.fixed or not seconds:
            return True
        table, rows = state.prices.table(self.count), survival.tolist()
        most = min(max(state.widths) - 1, self.count)
        worth = best_length(rows, table, 0.0, most, state.fair())[1]
        return worth >= len(rows) * tokens / seconds

    def _joined(self, drafted: Drafted, looked: Lookup) -> Drafted:
        """Rows of the look-up where it is taken, the draft's elsewhere, with room for K tokens."""
        point, more = looked.point[:, None], self.count - drafted.tokens.shape[1]
        probs = drafted.probs
        if probs is not None:
            probs = F.pad(probs, (0, 0, 0, more))
            sure = F.one_hot(looked.tokens, probs.shape[-1]).to(probs.dtype)
            probs = torch.where(point[..., None], sure, probs)
        return Drafted(
            torch.where(point, looked.tokens, F.pad(drafted.tokens, (0, more))),
            torch.where(looked.point, self.count, drafted.lengths),
            probs, drafted.confidence, lookup=looked,
        )  # fmt: skip

    # ------------------------------------------------------------------- the draft's own affairs

    def fits(self) -> bool:
        return self.inner is None or self.inner.fits()

    def ensure(self) -> None:
        if self.inner is not None:
            self.inner.ensure()

    def caches(self) -> list[Tensor]:
        return [] if self.inner is None else self.inner.caches()

    def begin(self) -> None:
        if self.inner is not None:
            self.inner.begin()

    def prefill(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, n: int) -> None:
        if self.inner is not None:
            self.inner.prefill(ids, mask, positions, n)

    def verified(self, width: int) -> None:
        if self.inner is not None:
            self.inner.verified(width)

    def committed(self, state: State, kept: int) -> None:
        if self.inner is not None:
            self.inner.committed(state, kept)

    def before_moving(self, state: State) -> None:
        if self.inner is not None:
            self.inner.before_moving(state)

    def flush(self) -> None:
        if self.inner is not None:
            self.inner.flush()


def drafting_part(proposer: Any) -> Any:
    """What drafts in ``proposer``: itself, unless it looks up; None where nothing does."""
    return proposer.inner if isinstance(proposer, NgramProposals) else proposer
