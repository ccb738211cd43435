"""How many drafted tokens of each request to verify: DSpark's confidence scheduler, on the device.

Algorithm 1 (arXiv 2607.05147): over requests r and positions j, take the survivals a[r, j] from
the largest down. B starts at R tokens (the anchors), the expected committed tokens tau at R.
Admitting one makes ``B += 1``, ``tau += a``; go on while ``tau / seconds(B)`` rises, and **stop at
once** where it does not.

Why the early stop keeps sampling lossless: whether (r, j) is verified may depend on anything but
x[r, j] and what is drafted after it. Its own survival uses confidences up to j, which look at the
tokens before j; every decision made before it uses larger survivals. A search for the best budget
over all of them looks at later positions too, which were chosen after x[r, j]: that leaks, and the
paper's Appendix A shows by how much. `budgeted` is the other safe way (the budget comes from
rounds before this one), and `best_budget` the search itself, legal where nothing is sampled: at
temperature 0, with point-mass drafts, or for a later round's budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def early_stop(
    survival: Tensor,
    seconds: Tensor,
    live: Tensor | None = None,
    *,
    draft_seconds: float | Tensor = 0.0,
    edges: Tensor | None = None,
) -> Tensor:
    """Verify lengths ``[R]`` by Algorithm 1.

    Args:
        survival: a ``[R, K]``, not increasing along K.
        seconds: of a target step of B = 0, 1, ... tokens ``[n]`` (`SPSCurve.table`); sizes past its
            end are never admitted.
        live: requests that take part ``[R]``.
        draft_seconds: what drafting the round took: constant, but it belongs to the round's price.
            Without it one request would be scheduled as if its draft were free.
        edges: ascending sizes that programs exist for; after the stop the rest of the bucket, paid
            for already, is filled in the same order. That stays lossless: whether an item is filled
            in depends on items before it only.
    """
    rank, values, requests = _ranked(survival, live)
    better = _values(values, requests, seconds, draft_seconds)
    rising = better[1:] > better[:-1]
    admitted = (rising & (values > 0)).long().cumprod(0).sum()
    if edges is not None:
        at = torch.searchsorted(edges, (requests + admitted).view(1)).clamp(max=len(edges) - 1)
        # Selected with a tensor of one: a scalar tensor as an index is read by the host.
        room = (edges.index_select(0, at).sum() - requests).clamp(min=0)
        admitted = torch.maximum(admitted, torch.minimum(room, (values > 0).sum()))
        admitted = torch.minimum(admitted, (len(seconds) - 1 - requests).clamp(min=0))
    return _lengths(rank, admitted, survival)


def budgeted(survival: Tensor, budget: Tensor | int, live: Tensor | None = None) -> Tensor:
    """Verify lengths ``[R]`` that sum to at most ``budget``, largest survivals first.

    Lossless if the budget does not depend on this round's tokens: `best_budget` of confidences two
    rounds old (so that the host, or another stream, has the time to compute it).
    """
    rank, values, _ = _ranked(survival, live)
    admitted = (values > 0).sum().clamp(max=torch.as_tensor(budget, device=survival.device))
    return _lengths(rank, admitted, survival)


def best_budget(
    survival: Tensor,
    seconds: Tensor,
    live: Tensor | None = None,
    *,
    draft_seconds: float | Tensor = 0.0,
) -> Tensor:
    """The number of drafted tokens with the highest ``tau / seconds``, over all numbers: ``[]``.

    Not for scheduling the same round when sampling: see above.
    """
    _, values, requests = _ranked(survival, live)
    better = _values(values, requests, seconds, draft_seconds)
    # Entries that stand for nothing (dead requests) come last and add nothing.
    usable = torch.cat((values.new_ones(1), values)) > 0
    return torch.where(usable, better, -torch.inf).argmax()


class DelayedBudgets:
    """Budgets from confidences ``delay`` rounds old, kept on the device."""

    def __init__(self, first: int, *, delay: int = 2, device: torch.device | str | None = None):
        if delay < 1:
            raise ValueError(f"delay={delay}: a budget from the round itself is not lossless")
        self._queue = [torch.tensor(first, device=device) for _ in range(delay)]

    def next(self, survival: Tensor, seconds: Tensor, live: Tensor | None = None) -> Tensor:
        """This round's budget ``[]``; its confidences will count ``delay`` rounds on."""
        budget = self._queue.pop(0)
        self._queue.append(best_budget(survival, seconds, live))
        return budget


def fixed(length: int, survival: Tensor, live: Tensor | None = None) -> Tensor:
    """The same length for every live request: no scheduler."""
    rows, most = survival.shape
    lengths = torch.full((rows,), min(length, most), dtype=torch.long, device=survival.device)
    return lengths if live is None else lengths * live


def bucket_edges(rows: int, block: int, sizes: Sequence[int] = ()) -> list[int]:
    """Sizes of verify programs for up to ``rows`` requests: powers of two, and all tokens."""
    most = rows * (block + 1)
    edges = {most, rows, *(s for s in sizes if s <= most)}
    size = 1
    while size < most:
        edges.add(size)
        size *= 2
    return sorted(edges)


def _ranked(survival: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The order of all items ``[R * K]``, their survivals in it, and the number of requests."""
    if live is not None:
        survival = torch.where(live[:, None], survival, -1.0)
        requests = live.sum()
    else:
        requests = torch.tensor(survival.shape[0], device=survival.device)
    # Stable: of equal survivals in one request the earlier position comes first.
    values, rank = survival.flatten().sort(descending=True, stable=True)
    return rank, values, requests


def _values(
    values: Tensor, requests: Tensor, seconds: Tensor, draft_seconds: float | Tensor
) -> Tensor:
    """tau / seconds after admitting 0, 1, ... items ``[R * K + 1]``."""
    tau = requests + torch.cat((values.new_zeros(1), values.clamp(min=0).cumsum(0)))
    size = requests + torch.arange(len(tau), device=values.device)
    time = seconds[size.clamp(max=len(seconds) - 1)] + draft_seconds
    time = torch.where(size < len(seconds), time, torch.inf)
    return tau / time


def _lengths(rank: Tensor, admitted: Tensor, survival: Tensor) -> Tensor:
    """Verify lengths from the first ``admitted`` of the order."""
    rows, count = survival.shape
    first = (torch.arange(len(rank), device=rank.device) < admitted).long()
    # Counting positions of each request, rather than adding in place: vmap takes it too.
    return torch.zeros_like(first).scatter(0, rank, first).view(rows, count).sum(-1)
