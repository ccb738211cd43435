"""Sequences of about equal length, batch after batch, without end and reproducible by step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_compile.training.regenerate import Text


class Batches:
    """Right-padded batches ``ids [B, S]``, ``mine [B, S]`` (tokens to train on).

    Step n has the same content in every run with the same seed, so a resumed run needs no state.
    """

    def __init__(self, texts: Sequence[Text], size: int, longest: int, seed: int) -> None:
        # A prompt longer than what fits would leave nothing to learn from: keep the end.
        self.texts = [_cut(t, longest) for t in texts]
        self.size, self.seed = size, seed
        self._epoch, self._order = -1, []  # type: int, list[list[int]]

    def __len__(self) -> int:
        """Batches of one pass."""
        return -(-len(self.texts) // self.size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return collate([self.texts[i] for i in self._order[index]])

    def _shuffle(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 7919 + epoch)
        noise = (torch.rand(len(self.texts), generator=generator) * 64).tolist()
        # Neighbours by a blurred length share a batch; batches come in random order.
        order = sorted(range(len(self.texts)), key=lambda i: len(self.texts[i].ids) + noise[i])
        groups = [order[i : i + self.size] for i in range(0, len(order), self.size)]
        return [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]


def collate(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Pad with zeros on the right, where a causal target is not disturbed by them."""
    longest = max(len(t.ids) for t in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mine = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = text.ids
        # The last token of the prompt is an anchor as well: it is what generation starts from.
        mine[row, max(text.prompt - 1, 0) : len(text.ids)] = True
    return ids, mine


def _cut(text: Text, longest: int) -> Text:
    extra = len(text.ids) - longest
    if extra <= 0:
        return text
    front = min(extra, max(text.prompt - 16, 0))
    return Text(text.ids[front:][:longest], text.prompt - front, text.temperature)
