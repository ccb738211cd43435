"""What proposes tokens in the reference loop: a DSpark draft, a small causal model, or n-grams.

All have ``start``, ``propose`` and ``commit``; requests are rows of a batch of any lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.runtime.speculation import ngram
from dspark_compile.runtime.speculation.taps import crop

# (logits [V] float32, ids of the request [L]) -> probabilities [V], or None for arg-max.
Distribution = Callable[[Tensor, Tensor], Tensor]
# (probabilities [V]) -> id [].
Draw = Callable[[Tensor], Tensor]


@dataclass
class Proposal:
    """Drafted tokens of a batch.

    Attributes:
        tokens: ``[R, K]``.
        lengths: how many of them there are ``[R]``.
        probs: ``[R, K, V]`` that they were drawn from, None for point masses.
        confidence: logits ``[R, K]`` float32, None without a confidence head.
    """

    tokens: Tensor
    lengths: Tensor
    probs: Tensor | None = None
    confidence: Tensor | None = None


class DraftProposer:
    """A `DraftModel` and its context cache."""

    name = "draft"

    def __init__(self, draft: DraftModel) -> None:
        self.draft = draft
        self.length = draft.config.num_drafted
        self.taps: tuple[int, ...] = draft.config.target_layer_ids

    def start(self, requests: Sequence[Tensor], taps: Sequence[Tensor], room: int) -> None:
        """Take prompts ``[L]`` without their anchors, and their taps ``[1, L, m * width]``."""
        longest = max(len(r) for r in requests)
        self.cache = self.draft.new_cache(len(requests), longest + room)
        self.commit(taps)

    def propose(
        self, history: Sequence[Tensor], distribution: Distribution | None, draw: Draw
    ) -> Proposal:
        """Draft a block behind each anchor, the last token of each ``history [L]``."""
        anchor = torch.stack([ids[-1] for ids in history])
        self.cache.reserve(int(self.cache.lengths.max()) + self.draft.config.block_size)
        every: list[Tensor] = []

        def choose(logits: Tensor, k: int, chosen: list[Tensor]) -> Tensor:
            if distribution is None:
                return logits.argmax(-1)
            rows = [
                distribution(logits[r], torch.cat((ids, *(c[r, None] for c in chosen))))
                for r, ids in enumerate(history)
            ]
            every.append(torch.stack(rows))
            return torch.stack([draw(p) for p in rows])

        tokens, _, confidence = self.draft.propose(anchor, self.cache, choose)
        lengths = torch.full_like(anchor, self.length)
        probs = torch.stack(every, dim=1) if every else None
        return Proposal(tokens, lengths, probs, confidence)

    def commit(self, taps: Sequence[Tensor]) -> None:
        """Put newly committed tokens' taps ``[1, n, m * width]`` of each request in the context."""
        longest = max(t.shape[1] for t in taps)
        padded = taps[0].new_zeros(len(taps), longest, taps[0].shape[2])
        for row, states in enumerate(taps):
            padded[row, : states.shape[1]] = states[0]
        counts = torch.tensor([t.shape[1] for t in taps], device=padded.device)
        self.cache.reserve(int(self.cache.lengths.max()) + longest)
        self.draft.append(self.cache, padded, counts)


class NgramProposer:
    """Lookup in each request's own tokens."""

    name = "ngram"
    taps: tuple[int, ...] = ()

    def __init__(self, length: int = 10, minimum: int = 3) -> None:
        self.length, self.minimum = length, minimum

    def start(self, requests: Sequence[Tensor], taps: Sequence[Tensor], room: int) -> None:
        """Nothing to keep: the histories are given each time."""

    def propose(
        self, history: Sequence[Tensor], distribution: Distribution | None, draw: Draw
    ) -> Proposal:
        """The continuation of the most recent match."""
        table = torch.nn.utils.rnn.pad_sequence(list(history), batch_first=True)
        lengths = torch.tensor([len(h) for h in history], device=table.device)
        tokens, found, _ = ngram.propose(table, lengths, self.length, minimum=self.minimum)
        return Proposal(tokens, found)

    def commit(self, taps: Sequence[Tensor]) -> None:
        """Nothing to keep."""


class ModelProposer:
    """An ordinary causal language model with the target's vocabulary, drafting token by token."""

    name = "model"
    taps: tuple[int, ...] = ()

    def __init__(self, model: Any, length: int = 5) -> None:
        self.model, self.length = model, length

    def start(self, requests: Sequence[Tensor], taps: Sequence[Tensor], room: int) -> None:
        """One cache a request, empty: `propose` catches up with what was committed."""
        from transformers import DynamicCache

        self.caches = [DynamicCache() for _ in requests]

    def propose(
        self, history: Sequence[Tensor], distribution: Distribution | None, draw: Draw
    ) -> Proposal:
        """Decode ``length`` tokens for each request."""
        tokens, probs = [], []
        for row, ids in enumerate(history):
            cache, known = self.caches[row], self.caches[row].get_seq_length()
            chosen: list[Tensor] = []
            rows: list[Tensor] = []
            feed = ids[known:]
            for _ in range(self.length):
                logits = self.model(
                    input_ids=feed[None], past_key_values=cache, use_cache=True
                ).logits[0, -1]
                if distribution is None:
                    chosen.append(logits.argmax(-1))
                else:
                    rows.append(distribution(logits, torch.cat((ids, *(c[None] for c in chosen)))))
                    chosen.append(draw(rows[-1]))
                feed = chosen[-1][None]
            # Whatever is rejected goes; what stands is computed again, which is simple and right.
            crop(cache, len(ids) - 1)
            tokens.append(torch.stack(chosen))
            probs.append(torch.stack(rows) if rows else None)
        stacked = torch.stack(tokens)
        lengths = torch.full((len(history),), self.length, device=stacked.device)
        return Proposal(
            stacked,
            lengths,
            torch.stack(probs) if probs[0] is not None else None,  # type: ignore[arg-type]
        )

    def commit(self, taps: Sequence[Tensor]) -> None:
        """Nothing to do: `propose` feeds what its cache lacks."""


def proposer_for(draft: Any, length: int | None = None) -> Any:
    """The proposer of ``draft=``: None, "ngram", a `DraftModel`, or a causal language model.

    Raises:
        ValueError: it is none of them.
    """
    if draft is None:
        return None
    if isinstance(draft, str):
        if draft != "ngram":
            raise ValueError(
                f'draft={draft!r}: give "ngram", a DraftModel, a causal language model, or None'
            )
        return NgramProposer(length or 10)
    if isinstance(draft, DraftModel):
        return DraftProposer(draft)
    if hasattr(draft, "generate") and hasattr(draft, "get_output_embeddings"):
        return ModelProposer(draft, length or 5)
    raise ValueError(
        f'draft={type(draft).__name__}: give "ngram", a DraftModel, a causal language model or None'
    )
