"""Choosing the next token from logits ``[..., V]``."""

from __future__ import annotations

import torch
from torch import Tensor

from ._define import define


@define(
    "greedy_token(Tensor logits) -> Tensor",
    family="token",
    fake=lambda logits: logits.new_empty(logits.shape[:-1], dtype=torch.int64),
)
def greedy_token(logits: Tensor) -> Tensor:
    """Arg-max over the vocabulary; int64 ``[...]``."""
    return logits.argmax(-1)


def penalised(logits: Tensor, seen: Tensor | None, penalty: float | Tensor) -> Tensor:
    """Float32 logits ``[..., V]`` with the repetition penalty of bool ``seen [..., V]``."""
    z = logits.float()
    if seen is None or _is(penalty, 1):
        return z
    return torch.where(seen, torch.where(z < 0, z * penalty, z / penalty), z)


def _is(value: float | Tensor, off: float) -> bool:
    """Whether a filter is off. A tensor's value is not looked at: the host would wait for it."""
    return not isinstance(value, Tensor) and value == off


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: ids ``[...]`` from weights ``[..., V]`` that need not sum to one."""
    cdf = weights.cumsum(-1)
    # Scaled by the last entry so that rounding in the sum cannot run off the end.
    picked = (cdf <= uniform.float().unsqueeze(-1) * cdf[..., -1:]).sum(-1)
    # Nor past the last token that has any weight.
    last = weights.shape[-1] - 1 - weights.flip(-1).gt(0).to(torch.int64).argmax(-1)
    return torch.minimum(picked, last)


def drawable(probabilities: Tensor, done: Tensor | None = None) -> Tensor:
    """The same, if each row ``[B, ..., V]`` is a distribution, but for those that are ``done [B]``;
    not looked at where that would wait for a device.

    Raises:
        RuntimeError: scores were NaN, infinite or all -inf, as torch.multinomial raises it.
    """
    if probabilities.device.type != "cpu":
        return probabilities
    looked_at = probabilities if done is None else probabilities[~done]
    if not bool(torch.isfinite(looked_at).all()):
        raise RuntimeError("probabilities to draw from are inf, nan, below 0, or all 0 in a row")
    return probabilities


def filtered_probabilities(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int,
    top_p: float | Tensor,
    min_p: float | Tensor,
) -> Tensor:
    """Float32 probabilities after temperature, top-k, top-p and min-p, in that order.

    ``top_k=0``, ``top_p=1`` and ``min_p=0`` switch a filter off; a tensor of one number, on the
    logits' device, is read there. Ties at the top-k threshold are all kept, as in Hugging Face.
    """
    z = logits.float() / temperature
    if top_k > 0:
        kth = z.topk(min(top_k, z.shape[-1]), dim=-1).values[..., -1:]
        z = z.masked_fill(z < kth, -torch.inf)
    if isinstance(top_p, Tensor) or top_p < 1.0:
        ordered, order = z.sort(dim=-1, descending=False)
        # Ascending: drop the tail whose cumulative mass stays within 1 - top_p.
        drop = ordered.softmax(-1).cumsum(-1) <= (1.0 - top_p)
        drop[..., -1] = False
        z = z.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    if isinstance(min_p, Tensor) or min_p > 0.0:
        p = z.softmax(-1)
        z = z.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return z.softmax(-1)


@define(
    "sample_token(Tensor logits, Tensor uniform, float temperature=1.0, int top_k=0, "
    "float top_p=1.0, float min_p=0.0) -> Tensor",
    family="token",
    fake=lambda logits, uniform, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0: logits.new_empty(
        logits.shape[:-1], dtype=torch.int64
    ),
)
def sample_token(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Inverse-CDF sample: ``uniform [...]`` in [0, 1) picks from the filtered softmax.

    The randomness is an argument so that a graph holding this op stays pure and a seed
    reproduces it. A temperature below 1e-5 is arg-max.
    """
    if temperature < 1e-5:
        return logits.argmax(-1)
    return draw(filtered_probabilities(logits, temperature, top_k, top_p, min_p), uniform)
