"""Static scales for GroupQueryAttention's int8 and int4 caches, from a pass over sample text.

The op quantises every key and value by a scale that is part of the graph, one for each layer, head
and feature; what exceeds its range is clipped. The sample should be like what the model will see.

8 bits    the largest magnitude that the eager model's own cache holds for the sample, and headroom
          (`headroom`): clipping one large key costs far more than a slightly coarser step.
          Features that RoPE turns into one another share their largest modulus, which bounds both
          at every position, those behind the sample too.
4 bits    the scale with the least squared error over the sample: with 16 steps a finer step is
          worth some clipping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.passes.graph import is_dialect_op

from .causal_lm import CausalLM
from .errors import ExportError
from .ops import quantize_static
from .program import Program
from .subject import Case
from .weights import _args

MAX_TOKENS = 4096


@dataclass
class CacheScales:
    """Scales float32 ``[1, H, 1, D]`` of keys and values, by layer, and the width in bits."""

    bits: int
    keys: list[Tensor]
    values: list[Tensor]

    def pack(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Exact caches of a layer as the graph takes them."""
        return (
            quantize_static(key, self.keys[layer], self.bits),
            quantize_static(value, self.values[layer], self.bits),
        )


def sample_ids(sample: Any, tokenizer: Any, subject: CausalLM) -> Tensor:
    """Token ids ``[B, N]`` of what a user gave as ``calibration``.

    Raises:
        ExportError: it is neither text nor ids, holds too little, or text comes without tokenizer.
    """
    if isinstance(sample, str) or (
        isinstance(sample, Sequence) and sample and all(isinstance(s, str) for s in sample)
    ):
        if isinstance(tokenizer, (str, type(None))) or not callable(tokenizer):
            tokenizer = _tokenizer(tokenizer, subject)
        texts = [sample] if isinstance(sample, str) else list(sample)
        ids = [t for text in texts for t in tokenizer(text)["input_ids"]]
        sample = torch.tensor([ids[:MAX_TOKENS]])
    elif not isinstance(sample, Tensor):
        try:
            sample = torch.cat([torch.as_tensor(s).reshape(1, -1) for s in sample], 1)
        except (TypeError, ValueError, RuntimeError):
            raise ExportError(
                f"calibration is a {type(sample).__name__}; give text or token ids [B, N]"
            ) from None
    if sample.dim() == 1:
        sample = sample[None]
    if sample.dim() != 2 or sample.is_floating_point() or sample.numel() < 2:
        raise ExportError(
            f"calibration holds a {sample.dtype} tensor of shape {tuple(sample.shape)}; give at "
            "least 2 token ids, as [B, N]"
        )
    if int(sample.min()) < 0 or int(sample.max()) >= subject.vocabulary:
        raise ExportError(
            f"calibration holds token ids outside of 0 … {subject.vocabulary - 1}; was it made "
            "with another tokenizer?"
        )
    limit = getattr(subject.config, "max_position_embeddings", None) or MAX_TOKENS
    return sample[:, : min(int(limit), MAX_TOKENS)].to(torch.int64)


def _tokenizer(given: Any, subject: CausalLM) -> Any:
    from transformers import AutoTokenizer

    name = given or getattr(subject.model.config, "_name_or_path", "")
    if not name:
        raise ExportError("calibration is text: give tokenizer= too, or token ids")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExportError(
            f"calibration is text, and there is no tokenizer in {name!r}: give tokenizer="
        ) from error


def calibrated(
    subject: CausalLM, ids: Tensor, bits: int, rotation: tuple[int, bool] | None = None
) -> CacheScales:
    """Scales from the caches that the model fills for ``ids [B, N]``.

    Args:
        bits: 8 or 4.
        rotation: how many features of a key RoPE rotates, and whether in interleaved pairs; see
            `rotation_of`.
    """
    keys, values = subject.caches_of(ids)
    if bits == 4:
        return CacheScales(
            4, [_least_squares(k) for k in keys], [_least_squares(v) for v in values]
        )
    room = headroom(ids.numel())

    def scale(x: Tensor, turned: tuple[int, bool] | None = None) -> Tensor:
        largest = _largest(x.detach().float(), turned)
        return (largest * room / 127).clamp(min=1e-8)

    return CacheScales(8, [scale(k, rotation) for k in keys], [scale(v) for v in values])


def headroom(tokens: int) -> float:
    """How far beyond the largest magnitude among ``tokens`` samples an int8 cache reaches.

    On the shipped model the error of the logits on other texts is least from 1.2 to 1.3 after
    1024 to 2048 tokens and near 1.5 after 256: a short sample has not seen the largest yet.
    """
    return 1.0 + max(0.25, 8.0 / math.sqrt(max(tokens, 1)))


def rotation_of(program: Program) -> tuple[int, bool] | None:
    """``(features that RoPE rotates, interleaved)`` if all of a program's RoPEs agree."""
    found = set()
    for node in program.graph.nodes:
        if is_dialect_op(node, "rope"):
            _, _, _, rotary_dim, interleaved, *_ = _args(node, 7)
            found.add((int(rotary_dim), bool(interleaved)))
    return found.pop() if len(found) == 1 else None


def _largest(x: Tensor, rotation: tuple[int, bool] | None) -> Tensor:
    """The largest magnitude ``[1, H, 1, D]`` of each feature of ``x [B, H, N, D]``, of each rotated
    pair the largest modulus."""
    largest = x.abs().amax((0, 2), keepdim=True)
    if rotation is None or not 0 < rotation[0] <= x.shape[-1] or rotation[0] % 2:
        return largest
    width, interleaved = rotation
    pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    dim = -1 if interleaved else -2
    modulus = pairs.square().sum(dim, keepdim=True).sqrt().amax((0, 2), keepdim=True)
    turned = modulus.expand(*modulus.shape[:3], *pairs.shape[3:]).flatten(-2)
    return torch.cat((turned, largest[..., width:]), -1)


def _least_squares(x: Tensor) -> Tensor:
    """The scale ``[1, H, 1, D]`` of 4 bits with the least squared error, of 21 that reach from 0.3
    to 1.3 of the largest magnitude."""
    x = x.detach().float()
    largest = x.abs().amax((0, 2), keepdim=True).clamp(min=1e-8)
    best, scale = torch.full_like(largest, math.inf), largest / 7
    for factor in torch.linspace(0.3, 1.3, 21).tolist():
        tried = largest * factor / 7
        rounded = torch.round(x / tried).clamp(-8, 7) * tried
        error = (rounded - x).square().sum((0, 2), keepdim=True)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return scale


def packed_case(case: Case, scales: CacheScales, first: int, count: int) -> Case:
    """A case of the exact graph as one of the quantised graph, whose caches start at input
    ``first`` and output 1; presents are not compared, the logits they lead to are."""
    inputs = list(case.inputs)
    expected = list(case.expected)
    for layer in range(count):
        i = first + 2 * layer
        inputs[i], inputs[i + 1] = scales.pack(layer, inputs[i], inputs[i + 1])
        expected[1 + 2 * layer] = expected[2 + 2 * layer] = None
    return Case(case.name, inputs, expected, case.rows, case.valid)
