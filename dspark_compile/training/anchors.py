"""Anchors: which tokens of a sequence are made the first row of a training block."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_anchors(
    mask: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Distinct random anchors of each sequence, ascending.

    An anchor is a token of the target's own text whose successor is one too. Sequences with fewer
    candidates than ``count`` repeat position 0 with ``keep`` false.

    Args:
        mask: tokens that the target wrote ``[B, S]``.

    Returns:
        Positions ``[B, A]`` int64 and ``keep [B, A]``.
    """
    candidate = mask[:, :-1] & mask[:, 1:]
    count = min(count, candidate.shape[1])
    noise = torch.rand(candidate.shape, generator=generator).to(mask.device)
    noise = noise.masked_fill(~candidate, 2.0)
    _, order = noise.sort(dim=1)
    chosen = order[:, :count]
    keep = candidate.gather(1, chosen)
    chosen = chosen.masked_fill(~keep, 0)
    chosen, order = chosen.sort(dim=1)
    return chosen, keep.gather(1, order)


def block_targets(
    ids: Tensor, mask: Tensor, anchors: Tensor, keep: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the blocks at ``anchors`` are taught.

    Args:
        ids, mask: ``[B, S]``. anchors, keep: ``[B, A]``. length: K, tokens a block drafts.

    Returns:
        Each ``[B, A, K]``: the tokens before (the anchor first), the labels, the positions whose
        target logits predict the labels, and which of them count: those before the end of the text,
        without a gap.
    """
    steps = torch.arange(length, device=ids.device)
    at = anchors[..., None] + steps
    last = ids.shape[1] - 1
    inside = at + 1 <= last
    where = at.clamp(max=last)
    after = (at + 1).clamp(max=last)

    def pick(values: Tensor, index: Tensor) -> Tensor:
        return values.gather(1, index.flatten(1)).view_as(index)

    counts = pick(mask, after) & inside & keep[..., None]
    return pick(ids, where), pick(ids, after), where, counts.cumprod(-1).bool()
