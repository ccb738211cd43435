"""Static scales for GroupQueryAttention's int8 and int4 caches, from a pass over sample text.

The op quantises every key and value by a scale that is part of the graph, one for each layer, head
and feature. It is taken as the largest magnitude that the eager model's own cache holds for the
sample; what is larger later is clipped, so the sample should be like what the model will see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ExportError
from .ops import quantize_static
from .subject import Case, CausalLM

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


def calibrated(subject: CausalLM, ids: Tensor, bits: int) -> CacheScales:
    """Scales from the caches that the model fills for ``ids``."""
    top = 127 if bits == 8 else 7
    keys, values = subject.caches_of(ids)

    def scale(x: Tensor) -> Tensor:
        largest = x.detach().float().abs().amax((0, 2), keepdim=True)
        return (largest / top).clamp(min=1e-8)

    return CacheScales(bits, [scale(k) for k in keys], [scale(v) for v in values])


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
