"""Rounds driven by torch ops: on any device, with compiled programs or without.

The decisions are those of `accept`, `schedule` and `state`; the host reads one number a round, how
far the slots move. Where everything is native, `native_engine` does the same in one call.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.ops.token import drawable, penalised
from dspark_compile.runtime.speculation.accept import (
    commit,
    distribution,
    greedy,
    rejection,
    seen_along,
)
from dspark_compile.runtime.speculation.compiled_proposers import Drafted
from dspark_compile.runtime.speculation.lookup_proposals import drafting_part
from dspark_compile.runtime.speculation.state import (
    FIRST_GUESS,
    HICCUP,
    SHARE,
    State,
    Visit,
    verify_length,
)


class TorchEngine:
    """Runs rounds over a `State`."""

    native = False

    def __init__(self, state: State) -> None:
        self.state = state
        self.seconds = {"draft": 0.0, "verify": 0.0, "other": 0.0}

    def again(self) -> TorchEngine:
        """After tensors of the state were replaced."""
        return self

    def finish(self) -> None:
        """The telemetry is where it is read."""

    @torch.no_grad()
    def visit(self, count: int, drafting: bool | str) -> Visit:
        """Up to ``count`` rounds; fewer where all requests end, or there is no more room.

        ``drafting``: whether anything is proposed; ``"lookup"``: not by the draft; ``"look"``:
        whatever the draft proposes is verified, at any price.
        """
        state, done = self.state, Visit()
        began = time.perf_counter()
        while done.rounds < count and not state.finished() and state.has_room():
            self._round(drafting, done)
        done.seconds = time.perf_counter() - began
        return done

    def _round(self, drafting: bool | str, done: Visit) -> None:
        state, clock = self.state, time.perf_counter
        requests, began = int((~state.done).sum()), time.perf_counter()
        rounds, proposer, batch = state.rounds, state.proposer, state.batch
        live = ~state.done
        start, uniform = clock(), None
        count = rounds.count
        if not state.greedy:
            uniform = torch.rand(batch, 2 * count + 1, device=state.text.device)
        drafted, survival, lengths = None, None, state.lengths.new_zeros(batch)
        source = "plain"
        if drafting and proposer is not None:
            drafted = proposer.propose(state, uniform, drafting != "lookup")
            source = drafted.source
            survival = self._survival(drafted)
            lengths = self._lengths(drafted, survival, live, drafting == "look")
            rounds.block[:batch, 1 : 1 + drafted.tokens.shape[1]] = drafted.tokens
        width = self._width(int(lengths.max()))
        if source == "lookup" and width == 1:
            source = "plain"
        drafting_seconds = clock() - start
        start = clock()
        logits = rounds.verify(width)[:batch]
        if proposer is not None:
            proposer.verified(width)
        # A device has only been asked so far; its time is measured by what is read next.
        verify_seconds = clock() - start
        start = clock()
        tokens = rounds.block[:batch, 1:width]
        lengths = lengths.clamp(max=width - 1)
        left = state.limit - (state.lengths - state.prompts)
        lengths = torch.minimum(lengths, (left - 1).clamp(min=0)) * live
        accepted, following = self._accept(logits, tokens, lengths, drafted, uniform)
        if drafted is not None:
            self._record(drafted, accepted, lengths, live)
        made = commit(tokens, accepted, following, list(state.eos))
        counts = made.counts * live
        state.counters.record(made.accepted, counts, lengths, live, survival)
        self._take(made.tokens, counts, made.ended, left)
        if drafted is not None:
            self._learn(drafted, made.accepted, lengths, live)
            self._learn_looked(drafted, made.tokens, counts)
        total = int(counts.sum())
        price = state.prices
        price.verify[width] = _blend(price.verify.get(width, 0.0), verify_seconds)
        if width in price.first:
            price.forget(width)
        whole = clock() - began
        if source == "draft":
            price.draft = _blend(price.draft, drafting_seconds)
            tokens, seconds = price.drafted
            price.drafted = [_blend(tokens, total / requests), _blend(seconds, whole)]
        done.add(source, total, requests, whole)
        self.seconds["draft"] += drafting_seconds
        self.seconds["verify"] += verify_seconds
        self.seconds["other"] += clock() - start

    def _survival(self, drafted: Drafted) -> Tensor:
        """How likely the first k tokens stand ``[B, K]``."""
        state, looked = self.state, drafted.lookup
        if looked is not None and drafted.source == "lookup":
            return looked.survival
        if drafted.confidence is not None:
            own = state.calibration.survival(drafted.confidence)
        else:
            known = state.prices.conditional
            if not known:
                known[:] = [FIRST_GUESS] * state.rounds.count
            most = drafted.tokens.shape[1] if looked is None else state.proposer.inner.count
            guess = torch.tensor(known[:most], device=drafted.tokens.device).cumprod(0)
            own = guess.expand(len(drafted.tokens), -1)
        own = F.pad(own, (0, state.rounds.count - own.shape[1]))
        if looked is not None:
            own = torch.where(looked.point[:, None], looked.survival, own)
        return own

    def _lengths(
        self, drafted: Drafted, survival: Tensor, live: Tensor, looks: bool = False
    ) -> Tensor:
        state = self.state
        most = max(state.widths) - 1
        if looks and drafted.source == "draft":
            most = self._width(min(most, drafting_part(state.proposer).count)) - 1
        elif not state.fixed:
            rows = survival[live].tolist()
            if not any(row[0] > 0 for row in rows):
                most = 0
            else:
                table = state.prices.table(state.rounds.count)
                drafts = drafted.source == "draft"
                draft, weights = (state.prices.draft, None) if drafts else (0.0, state.fair())
                most = verify_length(rows, table, draft, min(most, len(rows[0])), weights)
                # The rest of the width is paid for.
                most = self._width(most) - 1
        return drafted.lengths.clamp(max=most)

    def _width(self, length: int) -> int:
        return next(w for w in self.state.widths if w > length)

    def _accept(
        self,
        logits: Tensor,
        tokens: Tensor,
        lengths: Tensor,
        drafted: Drafted | None,
        uniform: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        state = self.state
        seen = None if state.seen is None else seen_along(state.seen, tokens)
        if state.greedy:
            choice = penalised(logits, seen, state.choice.penalty).argmax(-1)
            return greedy(tokens, choice, lengths)
        assert uniform is not None
        target = drawable(distribution(logits, state.choice, seen), state.done)
        count = tokens.shape[1]
        own = None
        if drafted is not None and drafted.probs is not None:
            own = drafted.probs[:, :count]
        most = state.rounds.count
        tests = torch.cat((uniform[:, most : most + count], uniform[:, -1:]), dim=1)
        return rejection(tokens, own, target, lengths, tests)

    def _take(self, tokens: Tensor, counts: Tensor, ended: Tensor, left: Tensor) -> None:
        """Commit ``counts [B]`` of ``tokens [B, M]``: text, state, slots."""
        state = self.state
        rounds, batch = state.rounds, state.batch
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        taken = steps < counts[:, None]
        room = state.text.shape[1]
        at = torch.where(taken, state.lengths[:, None] + steps, room)
        wide = torch.cat((state.text, state.text.new_zeros(batch, 1)), dim=1)
        state.text = wide.scatter_(1, at, tokens)[:, :room].contiguous()
        if state.seen is not None:
            marks = torch.zeros_like(state.seen, dtype=torch.long)
            marks.scatter_add_(1, tokens, taken.long())
            state.seen |= marks > 0
        state.lengths += counts
        anchors = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])
        rounds.block[:batch, :1] = torch.where(
            (counts > 0)[:, None], anchors, rounds.block[:batch, :1]
        )
        state.done |= (ended & (counts > 0)) | (counts >= left)
        kept = rounds.commit(counts, ~state.done)
        if state.proposer is not None:
            state.proposer.committed(state, kept)

    def _record(self, drafted: Drafted, accepted: Tensor, lengths: Tensor, live: Tensor) -> None:
        """What became of the confidences."""
        online, looked = self.state.online, drafted.lookup
        if online is None or drafted.source != "draft" or drafted.confidence is None:
            return
        own = live if looked is None else live & ~looked.point
        online.record(drafted.confidence, accepted, lengths, own)

    def _learn(self, drafted: Drafted, accepted: Tensor, lengths: Tensor, live: Tensor) -> None:
        """How often drafted tokens stand, where no head says so."""
        if drafted.source != "draft" or drafted.confidence is not None:
            return
        known = self.state.prices.conditional
        for row in range(len(accepted)):
            if not live[row] or (drafted.lookup is not None and drafted.lookup.point[row]):
                continue
            for k in range(int(lengths[row])):
                if k > accepted[row]:
                    break
                known[k] += SHARE * (float(accepted[row] > k) - known[k])

    def _learn_looked(self, drafted: Drafted, tokens: Tensor, counts: Tensor) -> None:
        """What was committed, ``counts [B]`` of ``tokens [B, M]``, says what look-ups are worth,
        verified or not."""
        looked = drafted.lookup
        if looked is None:
            return
        for row in range(len(counts)):
            match, count = int(looked.match[row]), int(counts[row])
            known = self.state.prices.trust(looked.tokens.shape[1])[match - 1]
            for k in range(min(count, len(known)) if match else 0):
                stood = bool(looked.tokens[row, k] == tokens[row, k])
                known[k] += SHARE * (float(stood) - known[k])
                if not stood:
                    break


def _blend(known: float, seen: float) -> float:
    """A running average that a hiccup does not throw."""
    return known + SHARE * (min(seen, HICCUP * known) - known) if known else seen
