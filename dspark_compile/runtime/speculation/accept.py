"""Verification: which drafted tokens stand, and the token that the target adds.

Pure functions on tensors, batched and ragged, without a copy to the host. Names: R requests, K
drafted tokens of a block, V the vocabulary. ``lengths [R]`` is how many drafted tokens of each
request were verified (0 to K); what lies behind is ignored.

Greedy: a token is accepted while it is the target's arg-max; the arg-max where it is not is the
correction, and the one behind the last accepted token the bonus.

Sampling (speculative sampling, Leviathan et al. 2023, Chen et al. 2023): x is accepted with
probability ``min(1, p_t(x) / p_d(x))``; the first rejection is replaced by a draw from the
normalised residual ``max(p_t - p_d, 0)``; if all stand, the bonus is drawn from ``p_t``. A point
mass (an n-gram's guess, a greedy draft) has ``p_d(x) = 1``: accepted with ``p_t(x)``, residual
``p_t`` without x. Committed tokens are then distributed as the target's, whatever the draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.ops.token import draw, filtered_probabilities, penalised
from dspark_compile.runtime.token_choice import TokenChoice

# Below this the residual is rounding, and the two distributions are the same.
RESIDUAL_MASS = 1e-8


@dataclass(frozen=True)
class Accepted:
    """The outcome of a round.

    Attributes:
        tokens: ``[R, K + 1]``: accepted tokens, then the target's; what is behind ``counts`` is
            of no meaning.
        accepted: drafted tokens that stand ``[R]``.
        counts: tokens committed ``[R]``: ``accepted + 1``, less where the request ended in between.
        anchor: the last committed token ``[R]``.
        ended: requests that committed an end token ``[R]``.
    """

    tokens: Tensor
    accepted: Tensor
    counts: Tensor
    anchor: Tensor
    ended: Tensor


def greedy(drafted: Tensor, choice: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while the target's arg-max agrees.

    Args:
        drafted: ``[R, K]``. choice: the target's arg-max ``[R, K + 1]`` behind the anchor and
            behind each drafted token. lengths: ``[R]``.

    Returns:
        How many are accepted, and the target's token that follows them: ``[R]`` each.
    """
    steps = torch.arange(drafted.shape[1], device=drafted.device)
    stands = (drafted == choice[:, :-1]) & (steps < lengths[:, None])
    accepted = stands.long().cumprod(-1).sum(-1)
    return accepted, choice.gather(1, accepted[:, None])[:, 0]


def rejection(
    drafted: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    lengths: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rejection sampling.

    Args:
        drafted: ``[R, K]``.
        draft_probs: ``[R, K, V]`` that they were drawn from; None for point masses.
        target_probs: ``[R, K + 1, V]``, after the same processing of logits.
        lengths: ``[R]``.
        uniform: ``[R, K + 1]`` in [0, 1): a test for each token, and the last one for the draw.

    Returns:
        How many are accepted, and the token that follows them: ``[R]`` each.
    """
    count = drafted.shape[1]
    steps = torch.arange(count, device=drafted.device)
    p_target = target_probs[:, :-1].gather(2, drafted[..., None])[..., 0]
    if draft_probs is None:
        p_draft = torch.ones_like(p_target)
    else:
        p_draft = draft_probs.gather(2, drafted[..., None])[..., 0]
    stands = (uniform[:, :-1] * p_draft < p_target) & (steps < lengths[:, None])
    accepted = stands.long().cumprod(-1).sum(-1)
    final = residual(drafted, draft_probs, target_probs, lengths, accepted)
    return accepted, draw(final, uniform[:, -1])


def residual(
    drafted: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    lengths: Tensor,
    accepted: Tensor,
) -> Tensor:
    """What the token behind the accepted ones is drawn from ``[R, V]``, not normalised."""
    wide = accepted[:, None, None].expand(-1, 1, target_probs.shape[2])
    target = target_probs.gather(1, wide)[:, 0]
    if not drafted.shape[1]:
        return target
    at = accepted.clamp(max=drafted.shape[1] - 1)
    if draft_probs is None:
        token = drafted.gather(1, at[:, None])
        rest = target.scatter(1, token, 0.0)
    else:
        draft = draft_probs.gather(1, at[:, None, None].expand_as(wide))[:, 0]
        rest = (target - draft).clamp(min=0)
    # A bonus, or a residual that is nothing but rounding, is the target's own distribution.
    rejected = (accepted < lengths) & (rest.sum(-1) > RESIDUAL_MASS)
    return torch.where(rejected[:, None], rest, target)


def commit(
    drafted: Tensor, accepted: Tensor, following: Tensor, ends: Tensor | Sequence[int] = ()
) -> Accepted:
    """Put the round's tokens in order, and stop at an end token inside.

    Args:
        drafted: ``[R, K]``. accepted, following: ``[R]``. ends: ids that end a request.
    """
    tokens = torch.cat((drafted, following[:, None]), dim=1)
    tokens = tokens.scatter(1, accepted[:, None], following[:, None])
    counts = accepted + 1
    ended = torch.zeros_like(accepted, dtype=torch.bool)
    ends = torch.as_tensor(ends, dtype=tokens.dtype, device=tokens.device)
    if ends.numel():
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        hit = (tokens[..., None] == ends).any(-1) & (steps < counts[:, None])
        ended = hit.any(-1)
        counts = torch.where(ended, hit.to(torch.int8).argmax(-1) + 1, counts)
    anchor = tokens.gather(1, counts[:, None] - 1)[:, 0]
    return Accepted(tokens, torch.minimum(accepted, counts), counts, anchor, ended)


def is_greedy(choice: TokenChoice) -> bool:
    """Whether a choice is arg-max: it does not sample, or at a temperature of practically zero."""
    return not choice.sample or choice.temperature < 1e-5


def distribution(logits: Tensor, choice: TokenChoice, seen: Tensor | None = None) -> Tensor:
    """Probabilities ``[..., V]`` float32 of target or draft: both sides go through this."""
    return filtered_probabilities(
        penalised(logits, seen, choice.penalty),
        choice.temperature,
        choice.top_k,
        choice.top_p,
        choice.min_p,
    )


def seen_along(seen: Tensor, drafted: Tensor) -> Tensor:
    """``[R, K + 1, V]``: what came before each verified position.

    Args:
        seen: ``[R, V]`` bool, the context with the anchor. drafted: ``[R, K]``.
    """
    rows, count = drafted.shape
    marks = torch.zeros(rows, count + 1, seen.shape[1], dtype=torch.bool, device=seen.device)
    steps = torch.arange(count, device=seen.device)
    marks[torch.arange(rows, device=seen.device)[:, None], steps + 1, drafted] = True
    return seen[:, None] | marks.cummax(1).values
