"""The loss of a draft: what it is trained on, position by position.

    0.1 * CE(x) + 0.9 * ||p_d - p_t||_1 + 1.0 * BCE(confidence, 1 - ||p_d - p_t||_1 / 2)

each weighted by ``exp(-k / 4)`` over the positions k of a block and divided by the sum of weights.
``1 - ||p_d - p_t||_1 / 2`` is exactly the probability that rejection sampling accepts, so the
second term maximises acceptance and the third learns to predict it. DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CE, L1, CONFIDENCE, DECAY = 0.1, 0.9, 1.0, 4.0


@dataclass
class LossTerms:
    """Sums over positions, each with the weights applied; divide by ``weight``.

    Attributes:
        total: what is minimised, a sum, with gradients.
        ce, l1, bce: its parts, detached.
        accept: sum of acceptance probabilities by position ``[K]``, unweighted.
        count: positions that counted ``[K]``.
    """

    total: Tensor
    ce: Tensor
    l1: Tensor
    bce: Tensor
    accept: Tensor
    count: Tensor


def position_weights(mask: Tensor, decay: float = DECAY) -> Tensor:
    """``exp(-k / decay)`` where ``mask [..., K]`` is true, else 0; float32."""
    steps = torch.arange(mask.shape[-1], device=mask.device)
    return mask.float() * torch.exp(-steps / decay)


def draft_loss(
    logits: Tensor,
    confidence: Tensor | None,
    target_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    vocabulary: Tensor | None = None,
) -> LossTerms:
    """The loss of blocks.

    Args:
        logits: the draft's ``[n, K, Vd]`` float32.
        confidence: logits ``[n, K]`` float32, or None.
        target_logits: ``[n, K, V]``, of the same positions.
        labels: the text's tokens ``[n, K]``.
        mask: which positions count ``[n, K]``.
        vocabulary: ids of the draft's vocabulary ``[Vd]`` where it is a part.
    """
    weight = position_weights(mask)
    with torch.no_grad():
        target = torch.softmax(target_logits.float(), dim=-1)
        outside = torch.zeros_like(weight)
        if vocabulary is not None:
            # What the draft cannot propose differs by all of its mass.
            target = target.index_select(-1, vocabulary)
            outside = 1 - target.sum(-1)
            known = torch.full(
                (target_logits.shape[-1],), -1, dtype=torch.long, device=labels.device
            )
            known[vocabulary] = torch.arange(len(vocabulary), device=labels.device)
            labels = known[labels]
    log_draft = torch.log_softmax(logits, dim=-1)
    distance = (log_draft.exp() - target).abs().sum(-1) + outside
    ce = F.nll_loss(log_draft.flatten(0, -2), labels.flatten().clamp(min=0), reduction="none")
    ce = ce.view_as(weight) * (labels >= 0)
    accept = (1 - 0.5 * distance.detach()).clamp(0, 1)
    bce = torch.zeros_like(weight)
    if confidence is not None:
        bce = F.binary_cross_entropy_with_logits(confidence, accept, reduction="none")
    ce, distance, bce = (weight * term for term in (ce, distance, bce))
    total = (CE * ce + L1 * distance + CONFIDENCE * bce).sum()
    over = tuple(range(mask.ndim - 1))
    return LossTerms(
        total=total,
        ce=ce.detach().sum(),
        l1=distance.detach().sum(),
        bce=bce.detach().sum(),
        accept=(accept * mask).sum(over),
        count=mask.sum(over).float(),
    )
