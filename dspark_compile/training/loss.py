"""The loss of a draft: what it is trained on, position by position.

    0.1 * CE(x) + 0.9 * ||p_d - p_t||_1 + 1.0 * BCE(confidence, 1 - ||p_d - p_t||_1 / 2)

each weighted by ``exp(-k / 4)`` over the positions k of a block and divided by the sum of weights.
``1 - ||p_d - p_t||_1 / 2`` is exactly the probability that rejection sampling accepts, so the
second term maximises acceptance and the third learns to predict it. DSpark, arXiv 2607.05147.

Rows of logits are large, so the gradient of the first two terms is written out (`_Distance`):
with ``s = sign(p_d - p_t)`` it is ``0.1 (p_d - onehot(x)) + 0.9 p_d (s - sum(s p_d))``, few passes
over the rows instead of many, and one tensor kept instead of five.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CE, L1, CONFIDENCE, DECAY = 0.1, 0.9, 1.0, 4.0


@dataclass
class LossTerms:
    """Sums over positions, each with the weights applied; divide by the sum of weights.

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
    target = torch.softmax(target_logits.detach().float(), dim=-1)
    outside = torch.zeros_like(weight)
    if vocabulary is not None:
        # What the draft cannot propose differs by all of its mass.
        target = target.index_select(-1, vocabulary)
        outside = 1 - target.sum(-1)
        known = torch.full((target_logits.shape[-1],), -1, dtype=torch.long, device=labels.device)
        known[vocabulary] = torch.arange(len(vocabulary), device=labels.device)
        labels = known[labels]
    total, ce, distance = _Distance.apply(logits, target, labels, weight)
    distance = distance + outside
    accept = (1 - 0.5 * distance).clamp(0, 1)
    bce = torch.zeros_like(weight)
    if confidence is not None:
        bce = F.binary_cross_entropy_with_logits(confidence, accept, reduction="none")
    bce = (weight * bce).sum()
    over = tuple(range(mask.ndim - 1))
    return LossTerms(
        total=total + L1 * (weight * outside).sum() + CONFIDENCE * bce,
        ce=(weight * ce).sum(),
        l1=(weight * distance).sum(),
        bce=bce.detach(),
        accept=(accept * mask).sum(over),
        count=mask.sum(over).float(),
    )


class _Distance(torch.autograd.Function):
    """``sum of weight (0.1 CE + 0.9 L1)`` of ``logits [n, K, V]``, and both terms ``[n, K]``.

    Labels below 0 have no cross-entropy. The target's probabilities are used up.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, labels: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        at = labels.clamp(min=0)[..., None]
        has = (labels >= 0).to(weight.dtype)
        chosen = logits.gather(-1, at)[..., 0]
        ce = (torch.logsumexp(logits, dim=-1) - chosen) * has
        own = torch.softmax(logits, dim=-1)
        sign = target.neg_().add_(own)  # p_d - p_t
        distance = torch.linalg.vector_norm(sign, 1, dim=-1)
        sign.sign_()
        mean = (sign.unsqueeze(-2) @ own.unsqueeze(-1))[..., 0, 0]
        # p_d (0.9 w (s - mean) + 0.1 w has) - 0.1 w has onehot
        l1, one = L1 * weight, CE * weight * has
        gradient = sign.mul_(l1[..., None]).add_((one - l1 * mean)[..., None]).mul_(own)
        gradient.scatter_add_(-1, at, -one[..., None])
        ctx.save_for_backward(gradient)
        total = (weight * (CE * ce + L1 * distance)).sum()
        ctx.mark_non_differentiable(ce, distance)
        return total, ce, distance

    @staticmethod
    def backward(ctx: Any, total: Tensor, *terms: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * total, None, None, None
