"""Proposals without a draft: what followed the same words before (prompt lookup), on the device.

The last n tokens are looked up in the request's own history; of the longest matches the most recent
one wins, and what came after it is proposed as a point mass. Matches below ``minimum`` tokens (a
trigram) are noise. Where the match reaches into the end, the proposal goes on periodically, so a
text that repeats itself is followed for a whole block.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Longer matches are no better.
LONGEST = 6


def propose(
    history: Tensor, lengths: Tensor, count: int, *, minimum: int = 3, longest: int = LONGEST
) -> tuple[Tensor, Tensor, Tensor]:
    """Propose ``count`` tokens for each request.

    Args:
        history: ``[R, L]`` int64, the committed tokens of each request (prompt and anchor too)
            from slot 0 on; what lies at or behind ``lengths [R]`` is ignored.
        minimum, longest: tokens that have to match, and beyond which longer is no better.

    Returns:
        Tokens ``[R, count]``; how many of them to verify ``[R]``: ``count``, or 0 where nothing
        matches; and how many tokens match ``[R]``, at most ``longest``.

    Raises:
        ValueError: ``minimum`` or ``longest`` is out of order.
    """
    if not 1 <= minimum <= longest:
        raise ValueError(f"minimum={minimum}, longest={longest}: 1 <= minimum <= longest")
    rows, size = history.shape
    slot = torch.arange(size, device=history.device)
    end = lengths[:, None] - 1
    # run[r, j]: how many tokens up to j equal as many at the end, at most `longest`.
    going = torch.ones(rows, size, dtype=torch.bool, device=history.device)
    run = torch.zeros(rows, size, dtype=torch.long, device=history.device)
    for back in range(min(longest, size)):
        last = history.gather(1, (end - back).clamp(min=0))
        here = torch.zeros_like(going)
        here[:, back:] = history[:, : size - back] == last
        going = going & here & (back <= end)
        run = run + going
    # A match ends before the end, and the n-gram lies within the history.
    legal = (slot < end) & (run >= minimum)
    score = torch.where(legal, run * size + slot, -1)
    best, at = score.max(dim=1)
    found = best >= 0
    start = at + 1
    period = (lengths - start).clamp(min=1)
    steps = torch.arange(count, device=history.device)
    source = start[:, None] + steps % period[:, None]
    tokens = history.gather(1, source.clamp(max=size - 1))
    match = torch.where(found, best // size, 0)
    return tokens, torch.where(found, count, 0), match
