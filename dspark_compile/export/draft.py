"""The DSpark draft as a graph: one call of it is the draft's part of a round.

    (anchor [B], taps [B, T, m * width], counts [B], lengths [B],
     past.0.key, past.0.value, … [B, G, capacity, D])
        -> (tokens [B, K], logits [B, K, V], confidence [B, K], new_lengths [B],
            present.0.key, present.0.value, …)

The first ``counts[b]`` of the tapped states are appended to the context of request b; then a block
is drafted behind the anchor by the backbone and the Markov loop, greedily, with the logits of the
confidence head. ``taps`` are the target's ``hidden_states.<id>`` outputs (see ``taps`` of
`export_onnx`) side by side. A host program verifies the tokens with the target's graph, and calls
again with what was committed. Caches keep their shape and may share memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import ops as _ops  # noqa: F401 - registers tensor_scatter
from .errors import ExportError
from .subject import Case, Subject


def is_draft(model: object) -> bool:
    """Whether ``model`` is a `dspark_compile.models.draft.DraftModel`."""
    module = sys.modules.get("dspark_compile.models.draft")
    return module is not None and isinstance(model, module.DraftModel)


class DraftBlock(Subject):
    """A draft model; see the module's docstring.

    Args:
        model: with an embedding and an lm_head, its own or its target's.
        consecutive: rows are written by TensorScatter (opset 24), else by a scatter.

    Raises:
        ExportError: the draft has no embedding or lm_head.
    """

    def __init__(self, model: Any, *, consecutive: bool) -> None:
        super().__init__()
        if (model.embed_tokens or model.borrowed.embedding) is None:
            raise ExportError(
                "the draft has no embedding of its own: bind it to its target before the export"
            )
        self.model = model
        config = model.config
        self.module = _Round(model, consecutive)
        batch, rows = 2, 3
        cache = model.new_cache(batch, config.block_size + 12)
        width = model.fc.weight.shape[1]
        vocabulary = int((model.embed_tokens or model.borrowed.embedding).weight.shape[0])
        self.vocabulary, self.width = vocabulary, width
        self.example = [
            torch.ones(batch, dtype=torch.int64),
            torch.randn(batch, rows, width, dtype=model.fc.weight.dtype),
            torch.full((batch,), rows, dtype=torch.int64),
            torch.full((batch,), 4, dtype=torch.int64),
        ]
        batched = {0: "batch_size"}
        self.dynamic = [batched, {0: "batch_size", 1: "committed"}, batched, batched]
        self.input_names = ["anchor", "taps", "counts", "lengths"]
        self.output_names = ["tokens", "logits"]
        if model.confidence_head is not None:
            self.output_names.append("confidence")
        self.output_names.append("new_lengths")
        for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for kind, tensor in (("key", key), ("value", value)):
                self.example.append(tensor)
                self.dynamic.append({0: "batch_size", 2: "max_length"})
                self.input_names.append(f"past.{i}.{kind}")
                self.output_names.append(f"present.{i}.{kind}")
                self.caches[f"past.{i}.{kind}"] = f"present.{i}.{kind}"

    def cases(
        self, shapes: Sequence[tuple[int, int, int]], seed: int, padded: bool = False
    ) -> list[Case]:
        """Rounds of fresh contexts; counts differ within a batch."""
        generator = torch.Generator().manual_seed(seed)
        return [self._case(*shape, generator) for shape in shapes]

    def _case(self, batch: int, rows: int, past: int, generator: torch.Generator) -> Case:
        model = self.model
        capacity = past + rows + model.config.block_size + 5

        def taps(count: int) -> Tensor:
            made = torch.randn(batch, count, self.width, generator=generator)
            return made.to(model.fc.weight.dtype)

        with torch.no_grad():
            cache = model.new_cache(batch, capacity)
            if past:
                model.append(cache, taps(past), past)
            before = [t.clone() for pair in zip(cache.keys, cache.values) for t in pair]
            lengths = cache.lengths.clone()
            anchor = torch.randint(0, self.vocabulary, (batch,), generator=generator)
            new = taps(rows)
            counts = torch.randint(1, rows + 1, (batch,), generator=generator)
            model.append(cache, new, counts)
            tokens, logits, confidence = model.propose(anchor, cache)
        expected: list[Tensor | None] = [tokens, logits]
        expected += [] if confidence is None else [confidence]
        # Behind the context lies what the block left there: not compared.
        expected += [cache.lengths, *([None] * len(before))]
        text = f"batch {batch}, up to {rows} committed, {past} before"
        return Case(text, [anchor, new, counts, lengths, *before], expected)


class _Round(nn.Module):
    """Append, then propose."""

    def __init__(self, draft: Any, consecutive: bool) -> None:
        super().__init__()
        self.draft = draft
        self.consecutive = consecutive
        # Borrowed modules belong to the target; here they are part of the graph.
        self.embedding, self.head = draft.borrowed.embedding, draft.borrowed.head

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        anchor, taps, counts, lengths, *past = flat
        for x in flat[1:]:
            torch._check(x.shape[0] == anchor.shape[0])
        for x in past:
            torch._check(x.shape[2] == past[0].shape[2])
        cache = _context(self.draft, past, lengths, self.consecutive)
        self.draft.append(cache, taps, counts)
        present = [t for pair in zip(cache.keys, cache.values) for t in pair]
        total = cache.lengths
        tokens, logits, confidence = self.draft.propose(anchor, cache)
        told = () if confidence is None else (confidence,)
        return (tokens, logits, *told, total, *present)


def _context(draft: Any, past: list[Tensor], lengths: Tensor, consecutive: bool) -> Any:
    """A context cache over given tensors that are never written in place."""
    from dspark_compile.models.draft_cache import ContextCache

    class Functional(ContextCache):
        def __init__(self) -> None:
            self.shape = tuple(past[0].shape)  # type: ignore[assignment]
            self.keys, self.values = list(past[0::2]), list(past[1::2])
            self.lengths = lengths

        def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
            for held, new in ((self.keys, key), (self.values, value)):
                new = new.to(held[layer].dtype)
                if consecutive:
                    start = slots[:, 0]
                    scatter = torch.ops.dspark_onnx.tensor_scatter
                    held[layer] = scatter(held[layer], new.contiguous(), start)
                else:
                    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                    held[layer] = held[layer].scatter(2, index, new)

        def commit(self, counts: Tensor | int) -> None:
            self.lengths = self.lengths + counts

    return Functional()
