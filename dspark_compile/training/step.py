"""One training step: the target's taps and logits, the draft's blocks, the loss, gradients."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.runtime.speculation.taps import Taps
from dspark_compile.training.anchors import block_targets, sample_anchors
from dspark_compile.training.loss import LossTerms, draft_loss, position_weights


@dataclass
class Blocks:
    """What a batch's blocks are taught and by what: all ``[B, A, ...]``."""

    ids: Tensor  # [B, S]
    anchors: Tensor  # [B, A]
    previous: Tensor  # [B, A, K]
    labels: Tensor  # [B, A, K]
    mask: Tensor  # [B, A, K]
    taps: Tensor  # [B, S, m * width]
    target_logits: Tensor  # [B, P, V] at the positions that any block needs
    where: Tensor  # [B, A, K] index into P


@torch.no_grad()
def observe(
    target: Any,
    draft: DraftModel,
    ids: Tensor,
    mine: Tensor,
    anchors: int,
    generator: torch.Generator | None = None,
) -> Blocks:
    """Run the target on a batch and choose anchors; nothing of it is stored on disk.

    The output layer is applied only where a block needs its logits, if the target lets one say so.
    """
    length = draft.config.num_drafted
    at, keep = sample_anchors(mine, anchors, generator)
    previous, labels, where, mask = block_targets(ids, mine, at, keep, length)
    keyword: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(target.forward).parameters:
        needed = where[mask].unique()
        keyword["logits_to_keep"] = needed
        where = torch.searchsorted(needed, where).clamp(max=max(len(needed) - 1, 0))
    with Taps(target, draft.config.target_layer_ids) as taps:
        out = target(input_ids=ids, use_cache=False, **keyword)
    return Blocks(ids, at, previous, labels, mask, taps.take(), out.logits, where)


def block_logits(blocks: Blocks, rows: slice) -> Tensor:
    """The target's logits ``[rows, K, V]`` of some blocks, numbered through the batch."""
    batch, anchors = blocks.where.shape[:2]
    owner = torch.arange(batch, device=blocks.where.device).repeat_interleave(anchors)[rows]
    return blocks.target_logits[owner[:, None], blocks.where.flatten(0, 1)[rows]]


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """bfloat16 products over float32 weights, or nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@dataclass
class Programs:
    """The parts of a step that are worth compiling, compiled or not."""

    blocks: Callable[..., Tensor]
    forced: Callable[..., tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, draft: DraftModel, compiled: bool = False) -> Programs:
        """Lengths are dynamic, so that two graphs of each part serve a run."""
        if not compiled:
            return cls(draft.blocks, draft.forced)
        make: Any = torch.compile
        return cls(make(draft.blocks), make(draft.forced))


def learn(
    draft: DraftModel,
    blocks: Blocks,
    dtype: torch.dtype,
    elements: int,
    programs: Programs | None = None,
) -> tuple[float, LossTerms]:
    """Loss and gradients of a batch.

    Logits of a large vocabulary are made, used and dropped in pieces of ``elements``; the
    gradient of the hidden rows is collected and passed on once.

    Returns:
        The sum of weights, and the terms summed over the batch.
    """
    programs = programs or Programs.of(draft)
    device = blocks.ids.device
    with autocast(device, dtype):
        context = draft.context(blocks.taps)
        hidden = programs.blocks(blocks.ids, context, blocks.anchors).flatten(0, 1)
    leaf = hidden.detach().requires_grad_()
    previous, labels, mask = (
        t.flatten(0, 1) for t in (blocks.previous, blocks.labels, blocks.mask)
    )
    weight = float(position_weights(mask).sum().clamp(min=1e-6))
    count = max(1, elements // (mask.shape[1] * draft.config.draft_vocab_size))
    terms: LossTerms | None = None
    for start in range(0, len(mask), count):
        rows = slice(start, start + count)
        with autocast(device, dtype):
            logits, confidence = programs.forced(leaf[rows], previous[rows])
        piece = draft_loss(
            logits, confidence, block_logits(blocks, rows), labels[rows], mask[rows], draft.d2t
        )
        (piece.total / weight).backward()
        terms = piece if terms is None else _add(terms, piece)
    hidden.backward(leaf.grad)
    assert terms is not None
    return weight, terms


def _add(a: LossTerms, b: LossTerms) -> LossTerms:
    names = ("total", "ce", "l1", "bce", "accept", "count")
    return LossTerms(**{n: getattr(a, n).detach() + getattr(b, n).detach() for n in names})
