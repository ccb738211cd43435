"""What proposes tokens in compiled rounds: a DSpark draft, a causal model, or n-grams.

    propose(state, uniform [B, K]) -> Drafted     tokens for the block, and what is known of them
    verified(width)                               the target has run: its tapped states are there
    committed(state)                              slots, positions and anchors have moved

The counterparts of `dspark_compile.runtime.speculation.proposers`, on the slots of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.kernels.cpp.linear import most_rows
from dspark_compile.kernels.cpp.speculate import PANEL
from dspark_compile.models.draft import DraftModel
from dspark_compile.ops.token import draw, penalised
from dspark_compile.runtime.index_errors import known_to
from dspark_compile.runtime.module_logits import of_hugging_face, token_function
from dspark_compile.runtime.rounds import signature
from dspark_compile.runtime.speculation.accept import distribution
from dspark_compile.runtime.speculation.draft_rounds import DraftRounds
from dspark_compile.runtime.speculation.inserted_rounds import InsertedSpeculativeRounds
from dspark_compile.runtime.speculation.rounds import SpeculativeRounds, Verifying
from dspark_compile.runtime.speculation.state import State


@dataclass
class Lookup:
    """What was looked up for a round.

    Attributes:
        tokens: ``[B, K]``. match: how many tokens match ``[B]``, 0 where none do.
        point: whether that is what is verified ``[B]`` bool.
        survival: how likely the first k tokens stand ``[B, K]``.
    """

    tokens: Tensor
    match: Tensor
    point: Tensor
    survival: Tensor


@dataclass
class Drafted:
    """Tokens of a round.

    Attributes:
        tokens: ``[B, K]``. lengths: how many there are ``[B]``.
        probs: ``[B, K, V]`` that they were drawn from; None for point masses.
        confidence: logits of a draft's D tokens ``[B, D]`` float32; None without a confidence head.
        source: `state.SOURCES`. lookup: what was looked up, if that was tried.
    """

    tokens: Tensor
    lengths: Tensor
    probs: Tensor | None = None
    confidence: Tensor | None = None
    source: str = "draft"
    lookup: Lookup | None = None


def verifying_rounds(
    model: Any,
    rows: int,
    masked: bool | str,
    scheme: str,
    options: Mapping[str, Any],
    *,
    count: int,
    taps: Sequence[int] = (),
    placed: bool = False,
) -> Verifying:
    """What verifies tokens by ``model``, whichever kind it is of.

    Raises:
        NotRounds: it cannot be driven in rounds of several tokens.
        NotIncremental: it is not of Hugging Face, and no cache can be inserted.
    """
    if of_hugging_face(model):
        return SpeculativeRounds(
            model, rows, bool(masked), scheme, options, count=count, taps=taps, placed=placed
        )
    return InsertedSpeculativeRounds(model, token_function(model), rows, options, count=count)


class _Picker:
    """Chooses drafted tokens as the target's are chosen."""

    def __init__(self, state: State, uniform: Tensor | None) -> None:
        self.state, self.uniform = state, uniform
        self.seen = None if state.seen is None else state.seen.clone()
        self.probs: list[Tensor] = []

    def __call__(self, logits: Tensor, k: int) -> Tensor:
        state = self.state
        if state.greedy:
            chosen = penalised(logits, self.seen, state.choice.penalty).argmax(-1)
        else:
            assert self.uniform is not None
            self.probs.append(distribution(logits, state.choice, self.seen))
            chosen = draw(self.probs[-1], self.uniform[:, k])
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        return chosen

    def all_probs(self) -> Tensor | None:
        return torch.stack(self.probs, dim=1) if self.probs else None


class Proposals:
    """What a round asks of a proposer; one that keeps nothing has nothing to do."""

    name = ""
    slack = 0  # slots that it writes to behind the target's

    def fits(self) -> bool:
        """Whether it is what its programs were compiled for."""
        return True

    def ensure(self) -> None:
        """Compile what it runs. Nothing that is held changes."""

    def caches(self) -> list[Tensor]:
        """Caches on the target's slots, to be moved with them."""
        return []

    def begin(self) -> None:
        """Forget the last call's requests."""

    def prefill(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, n: int) -> None:
        """The prompt, ``n`` tokens at a time."""

    def propose(self, state: State, uniform: Tensor | None, drafts: bool = True) -> Drafted:
        """Tokens for the block; without ``drafts`` what there is without a draft."""
        raise NotImplementedError

    def verified(self, width: int) -> None:
        """The target has run ``width`` tokens."""

    def committed(self, state: State, kept: int) -> None:
        """``kept`` slots stay of what was verified."""

    def replaced(self, rows: Tensor) -> None:
        """For ``rows [B]`` bool other tokens are verified than it drafted this round."""

    def before_moving(self, state: State) -> None:
        """Slots are about to be moved."""
        self.flush()

    def flush(self) -> None:
        """Bring the caches up to date."""


class DraftProposals(Proposals):
    """A `DraftModel`."""

    name = "draft"

    def __init__(self, draft: DraftModel, rounds: Verifying) -> None:
        self.rounds, self.count = rounds, draft.config.num_drafted
        self.programs = DraftRounds(draft, rounds)
        self.draft = draft
        self._signature = signature(draft)
        self._panels: tuple[Any, Tensor] | None = None
        self.behind = 0  # tokens whose tapped states wait to be appended
        rounds.follow = self.programs.follow

    @property
    def slack(self) -> int:  # type: ignore[override]
        return self.programs.slack

    def fits(self) -> bool:
        """Whether the draft is what the programs were compiled for."""
        return self._signature == signature(self.draft)

    def caches(self) -> list[Tensor]:
        return self.programs.caches()

    def begin(self) -> None:
        self.behind = 0

    def ensure(self) -> None:
        """Compile what it runs. Nothing that is held changes."""
        self.programs.ensure()

    def panels(self, pairs: bool = False) -> Tensor:
        """The Markov head's W2 ``[V, r]`` as ``[V / 64, r, 64]``, which the native kernel reads;
        with ``pairs``, of an even r, as ``[V / 64, r / 2, 64, 2]``."""
        weight = self.draft.markov_head.markov_w2.weight.detach()  # type: ignore[union-attr]
        # A copy: made anew when the weight was written to, as training does between two calls.
        mark = pairs, 0 if weight.is_inference() else weight._version
        if self._panels is None or self._panels[0] != mark:
            tokens, rank = weight.shape
            padded = weight.new_zeros(-(-tokens // PANEL) * PANEL, rank)
            padded[:tokens] = weight
            cut = padded.view(-1, PANEL, rank // 2, 2) if pairs else padded.view(-1, PANEL, rank)
            self._panels = mark, cut.transpose(1, 2).contiguous()
        return self._panels[1]

    def propose(self, state: State, uniform: Tensor | None, drafts: bool = True) -> Drafted:
        programs, batch = self.programs, state.batch
        self.flush()
        programs.ids[:, 0] = self.rounds.block[:, 0]
        logits = programs.propose()[:batch].float()
        pick = _Picker(state, uniform)
        tokens, _, confidence = self.draft.sequence(
            programs.hidden[:batch], logits, self.rounds.block[:batch, 0],
            lambda z, k, chosen: pick(z, k),
        )  # fmt: skip
        lengths = torch.full((batch,), self.count, device=tokens.device)
        return Drafted(tokens, lengths, pick.all_probs(), confidence)

    def verified(self, width: int) -> None:
        """Remember the tapped states of the tokens verified."""
        programs, rounds = self.programs, self.rounds
        if self.behind + width > rounds.count + 1:
            self.flush()
        if self.behind == 0:
            programs.context_slot.copy_(rounds.slot)
            programs.context_positions.copy_(rounds.positions)
        programs.pending[:, self.behind : self.behind + width] = rounds.states[width]

    def committed(self, state: State, kept: int) -> None:
        """``kept`` slots stay of what was verified."""
        self.behind += kept
        if state.rounds.rows > 1:
            # Positions of rows go on differently: the next states cannot follow these.
            self.flush()

    def flush(self) -> None:
        """Append what waits."""
        if self.behind:
            self.programs.append()
            self.behind = 0


class ModelProposals(Proposals):
    """An ordinary causal language model with the target's vocabulary, token by token.

    Its cache lies on the target's slots. What it did not draft itself (plain steps, look-ups) its
    cache lacks: it reads that, `width` tokens at a time, before it drafts again. When all drafted
    tokens were accepted it lacks the last of them, so the first step of a round always runs two:
    that one again, and the anchor.

    Attributes:
        count: tokens that it drafts. width: tokens of the program that catches up.
        behind: slots before the target's that its cache lacks.
    """

    name = "model"

    def __init__(self, model: Any, count: int, rounds: Verifying) -> None:
        self.count, self.rounds = count, rounds
        self.behind = self._read = 0
        self.width = rounds.count + 1
        if rounds.tokens.device.type == "cpu":  # as many rows as its products take
            self.width = min(self.width, most_rows(next(model.parameters()).dtype) // rounds.rows)
        self.width = max(self.width, 2)
        self.own = verifying_rounds(
            model, rounds.rows, rounds.masked, rounds.scheme, rounds.options,
            count=self.width - 1, placed=True,
        )  # fmt: skip
        tokens = getattr(self.own, "vocabulary", known_to(model)[0])
        wanted = getattr(rounds, "vocabulary", None)
        if None not in (tokens, wanted) and tokens != wanted:
            raise ValueError(
                f"the draft's vocabulary has {tokens} tokens and the model's {wanted}: both must "
                "use one tokenizer"
            )
        # It may have fewer positions than the text; what it drafts beyond them is only a guess.
        known = known_to(model)[1]
        if known is not None:
            self.own.last.fill_(known - 1)
        rounds.growers.append(self._grow)

    @property
    def slack(self) -> int:  # type: ignore[override]
        return self.width

    @property
    def widths(self) -> list[int]:
        """Of its programs."""
        return sorted({1, 2, self.width})

    def _grow(self, replaced: dict[int, Tensor]) -> None:
        self.own.set_length(self.rounds.length)  # so much is kept
        self.own.reserve(self.rounds.cache.room)

    def fits(self) -> bool:
        return self.own.fits()

    def caches(self) -> list[Tensor]:
        return [x for _, _, x in self.own.cache.tensors()]

    def begin(self) -> None:
        self.own.begin()
        self.behind = self._read = 0

    def prefill(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, n: int) -> None:
        """The prompt, ``n`` tokens at a time."""
        if positions is None and ids.shape[1] > int(self.own.last):
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if positions is not None:
            positions = torch.minimum(positions.to(ids.device), self.own.last)
        self.own.prefill(ids, mask, positions, n)

    def ensure(self) -> None:
        """Compile what it runs. Nothing that is held changes."""
        own, length = self.own, self.rounds.length
        for width in self.widths:
            own.set_length(length)
            own.ensure(width)
        own.set_length(length)

    def propose(self, state: State, uniform: Tensor | None, drafts: bool = True) -> Drafted:
        own, rounds, batch = self.own, self.rounds, state.batch
        self._catch_up(state)
        start, positions = rounds.length, rounds.positions
        before = state.text.gather(1, (state.lengths - 2).clamp(min=0)[:, None])
        own.block[:batch, :1] = before
        own.block[:, 1:2] = rounds.block[:, :1]
        own.places[:, :2] = positions + torch.arange(-1, 1, device=positions.device)
        pick, tokens = _Picker(state, uniform), []
        for k in range(self.count):
            own.set_length(start - 1 if k == 0 else start + k)
            logits = own.verify(2 if k == 0 else 1)[:batch, -1]
            tokens.append(pick(logits.float(), k))
            own.block[:batch, 0] = tokens[-1]
            own.places[:, :1] = positions + k + 1
        self.behind, self._read = 0, self.count
        stacked = torch.stack(tokens, dim=1)
        lengths = torch.full((batch,), self.count, device=stacked.device)
        return Drafted(stacked, lengths, pick.all_probs())

    def replaced(self, rows: Tensor) -> None:
        """For ``rows [B]`` bool other tokens are verified than it drafted this round."""
        if bool(rows.any()):
            self._read = 1  # the anchor

    def committed(self, state: State, kept: int) -> None:
        """``kept`` slots stay of what was verified."""
        self.behind += kept - min(kept, self._read)
        self._read = 0

    def before_moving(self, state: State) -> None:
        self._catch_up(state)

    def _catch_up(self, state: State) -> None:
        """Read what lies in the slots that the cache lacks, but for the last one's."""
        own, rounds, batch, end = self.own, self.rounds, state.batch, self.rounds.length
        room = min(own.mask.shape[1], rounds.mask.shape[1])
        own.mask[:, :room].copy_(rounds.mask[:, :room])
        while self.behind > 1:
            # Behind a wide round there may be no room for as many: some it has are read again.
            start = min(end - self.behind, own.cache.room - self.width)
            count = min(end - start, self.width)
            held = rounds.mask[:batch, start:end] > 0
            # From here to the end each row has so many tokens; in a hole there is anything.
            left = held.flip(1).cumsum(1).flip(1)[:, :count]
            tokens = (state.lengths[:, None] - 1 - left).clamp(min=0)
            own.block[:batch, :count] = state.text.gather(1, tokens)
            own.places[:batch, :count] = (rounds.positions[:batch] - left).clamp(min=0)
            own.set_length(start)
            own.verify(self.width)
            self.behind = end - start - count
