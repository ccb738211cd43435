"""A Hugging Face causal language model behind a flat signature: ids, mask, positions and past in;
logits, present and taps out (`subject`'s docstring has the shapes).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError
from .subclass_weights import without_subclasses
from .subject import Case, Subject


def is_causal_lm(model: object) -> bool:
    """Whether ``model`` is a Hugging Face model that predicts tokens."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    return model.get_output_embeddings() is not None


class CausalLM(Subject):
    """A Hugging Face causal language model. See the module's docstring.

    Args:
        model: in eval mode, in the dtype of the graph.
        static: a cache of fixed capacity, else a growing one.
        taps: ids of decoder layers whose outputs ``[B, S, width]`` are outputs too, named
            ``hidden_states.<id>``; -1 is the embedding.

    Raises:
        ExportError: the model keeps state that is no key/value cache, or a tap does not exist.
    """

    def __init__(self, model: Any, *, static: bool, taps: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.static = model, static
        self.pool: Tensor | None = None  # token ids that cases are made of, if not random ones
        self.config = model.config.get_text_config(decoder=True)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        names = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in names
        probe = self._probe()
        self.layers = [i for i, (keys, _) in enumerate(probe) if keys is not None]
        self.taps = self._checked_taps(taps)
        past = [t for i in self.layers for t in probe[i] if t is not None]
        rows = past[0].shape[2] if past else 0
        capacity = rows + 8
        if static:
            past = [_padded(t, capacity) for t in past]
        batch, new = past[0].shape[0] if past else 2, 3
        ids = torch.randint(0, self.vocabulary, (batch, new), device=model.device)
        total = rows + new
        positions = torch.arange(rows, total, device=ids.device).expand(batch, new).contiguous()
        mask = torch.ones(batch, total, dtype=torch.int64, device=ids.device)
        self.example = [ids, mask, *([positions] if self.takes_positions else []), *past]
        token = {0: "batch_size", 1: "sequence_length"}
        length = "max_length" if static else "past_sequence_length"
        self.dynamic = [
            token,
            {0: "batch_size", 1: "total_sequence_length"},
            *([token] if self.takes_positions else []),
            *({0: "batch_size", 2: length} for _ in past),
        ]
        self.input_names = ["input_ids", "attention_mask"]
        self.input_names += ["position_ids"] if self.takes_positions else []
        self.output_names = ["logits"]
        for n in range(len(self.layers)):
            for kind in ("key", "value"):
                self.input_names.append(f"past_key_values.{n}.{kind}")
                self.output_names.append(f"present.{n}.{kind}")
                self.caches[self.input_names[-1]] = self.output_names[-1]
        self.output_names += [f"hidden_states.{i}" for i in self.taps]
        self.module = _Flat(
            without_subclasses(model), self.layers, self.takes_positions, static, self.taps
        )

    def _checked_taps(self, taps: Sequence[int]) -> list[int]:
        layers = int(self.config.num_hidden_layers)
        for i in taps:
            if isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < layers - 1:
                raise ExportError(
                    f"taps holds {i!r}; a tap is a decoder layer from 0 to {layers - 2}, or -1 for "
                    "the embedding (the last layer's output is normalised already)"
                )
        return list(taps)

    def _probe(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """Keys and values of every layer after a prefix of two rows of five tokens."""
        ids = torch.randint(0, self.vocabulary, (2, 5), device=self.model.device)
        try:
            with torch.no_grad():
                cache = self._run(ids, torch.ones_like(ids), _full_cache())[1]
        except Exception as error:
            raise ExportError(
                f"{type(self.model).__name__} does not run with a key/value cache in every layer "
                f"({type(error).__name__}: {_first_line(error)}); models with recurrent state are "
                "not exported"
            ) from error
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for i, layer in enumerate(cache.layers):
            states = [
                name
                for name in ("conv_states", "recurrent_states")
                if isinstance(getattr(layer, name, None), (Tensor, dict)) and getattr(layer, name)
            ]
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            plain = type(layer).__name__ == "DynamicLayer"
            if states or not plain:
                raise ExportError(
                    f"layer {i} of {type(self.model).__name__} keeps a {type(layer).__name__}: "
                    "only key/value caches are exported"
                )
            if keys is None or values is None or not layer.is_initialized:
                found.append((None, None))
                continue
            if keys.dim() != 4 or values.dim() != 4 or keys.shape[2] != 5:
                raise ExportError(
                    f"layer {i} of {type(self.model).__name__} caches tensors of shapes "
                    f"{tuple(keys.shape)} and {tuple(values.shape)}, not [batch, heads, rows, "
                    "features]: only key/value caches are exported"
                )
            found.append((keys, values))
        return found

    def _run(
        self, ids: Tensor, mask: Tensor, cache: Any, positions: Tensor | None = None
    ) -> tuple[Any, Any]:
        """``(output, cache)`` of the model as a user calls it."""
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": True}
        if cache is not None:
            kwargs["past_key_values"] = cache
        if self.takes_positions and positions is not None:
            kwargs["position_ids"] = positions
        if self.taps_wanted:
            kwargs["output_hidden_states"] = True
        out = self.model(**kwargs)
        return out, out.past_key_values

    @property
    def taps_wanted(self) -> bool:
        return bool(getattr(self, "taps", ()))

    def cases(
        self, shapes: Sequence[tuple[int, int, int]], seed: int, padded: bool = False
    ) -> list[Case]:
        generator = torch.Generator().manual_seed(seed)
        made = [self._case(*shape, padded=0, generator=generator) for shape in shapes]
        if padded:
            made.append(self._case(2, 2, 5, padded=2, generator=generator))
        return made

    def _case(
        self, batch: int, rows: int, past: int, *, padded: int, generator: torch.Generator
    ) -> Case:
        """One case; with ``padded`` the second row of the batch begins with that many pads."""
        total = past + rows
        ids = self._tokens(batch, total, generator).to(self.model.device)
        mask = torch.ones_like(ids)
        mask[1:, :padded] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        new = ids[:, past:]
        with torch.no_grad():
            natural = full = None
            if past:
                before = (ids[:, :past], mask[:, :past])
                natural = self._run(*before, None, positions[:, :past])[1]
                full = self._run(*before, _full_cache(), positions[:, :past])[1]
            given = [
                t.clone()
                for i in self.layers
                for t in (
                    (full.layers[i].keys, full.layers[i].values)
                    if full is not None
                    else self._nothing(i, batch)
                )
            ]
            out, _ = self._run(new, mask, natural, positions[:, past:])
            after = self._run(new, mask, full or _full_cache(), positions[:, past:])[1]
        expected: list[Tensor | None] = [out.logits]
        expected += [t for i in self.layers for t in (after.layers[i].keys, after.layers[i].values)]
        expected += [out.hidden_states[i + 1] for i in self.taps]
        if self.static:
            given = [_padded(t, total + 3) for t in given]
        inputs = [new.contiguous(), mask]
        inputs += [positions[:, past:].contiguous()] if self.takes_positions else []
        text = f"batch {batch}, {rows} new, {past} cached" + (", padded" if padded else "")
        valid = mask[:, past:].bool()
        return Case(text, [*inputs, *given], expected, total, valid)

    def caches_of(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values ``[B, H, N, D]`` of every layer for token ids ``[B, N]``."""
        with torch.no_grad():
            cache = self._run(ids, torch.ones_like(ids), _full_cache())[1]
        layers = [cache.layers[i] for i in self.layers]
        return [x.keys for x in layers], [x.values for x in layers]

    def _tokens(self, batch: int, count: int, generator: torch.Generator) -> Tensor:
        """Token ids to try: random, or windows of ``pool``."""
        if self.pool is None:
            return torch.randint(0, self.vocabulary, (batch, count), generator=generator)
        flat = self.pool.reshape(-1)
        flat = flat.repeat(-(-(count + 1) // flat.numel()) + 1)
        starts = torch.randint(0, flat.numel() - count, (batch,), generator=generator)
        return torch.stack([flat[i : i + count] for i in starts.tolist()])

    def _nothing(self, layer: int, batch: int) -> tuple[Tensor, Tensor]:
        start = 2 + self.takes_positions + 2 * self.layers.index(layer)
        made = []
        for t in self.example[start : start + 2]:
            made.append(t.new_zeros((batch, t.shape[1], 0, t.shape[3])))
        return made[0], made[1]


class _Flat(nn.Module):
    """The flat signature around a Hugging Face model."""

    def __init__(
        self, model: Any, layers: list[int], positions: bool, static: bool, taps: list[int]
    ) -> None:
        super().__init__()
        self.model = model
        self.layers, self.positions, self.static, self.taps = layers, positions, static, taps

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        ids, mask, *rest = flat
        kwargs: dict[str, Any] = {}
        if self.positions:
            kwargs["position_ids"] = rest.pop(0)
        rows, total = ids.shape[1], mask.shape[1]
        for x in (mask, *kwargs.values(), *rest):
            torch._check(x.shape[0] == ids.shape[0])
        for x in rest:
            torch._check(x.shape[2] == rest[0].shape[2])
        if self.positions:
            torch._check(kwargs["position_ids"].shape[1] == rows)
        if rest and not self.static:
            torch._check(total == rest[0].shape[2] + rows)
        cache = _full_cache()
        for n, layer in enumerate(self.layers):
            while len(cache.layers) <= layer:
                cache.layers.append(cache.layer_class_to_replicate())
            pair = rest[2 * n], rest[2 * n + 1]
            made = _static_layer(*pair, total - rows) if self.static else _growing_layer(*pair)
            cache.layers[layer] = made
        if self.taps:
            kwargs["output_hidden_states"] = True
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs
        )
        present = [t for i in self.layers for t in (cache.layers[i].keys, cache.layers[i].values)]
        return (out.logits, *present, *(out.hidden_states[i + 1] for i in self.taps))


def _full_cache() -> Any:
    """A cache whose every layer keeps all of its rows."""
    from transformers import DynamicCache

    return DynamicCache()


def _growing_layer(keys: Tensor, values: Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer


def _static_layer(keys: Tensor, values: Tensor, past: Any) -> Any:
    """A layer of fixed capacity with ``past`` valid rows, written without mutation."""
    from transformers.cache_utils import DynamicLayer

    class StaticRows(DynamicLayer):
        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            rows = key_states.shape[2]
            positions = torch.arange(past, past + rows, device=key_states.device)
            append = torch.ops.dspark.cache_append
            self.keys: Any = append(self.keys, key_states, positions)
            self.values: Any = append(self.values, value_states, positions)
            return self.keys, self.values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.keys.shape[2], 0

        def get_seq_length(self) -> Any:
            return past

    layer = StaticRows()
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True
    return layer


def _padded(x: Tensor, rows: int) -> Tensor:
    """``x [B, H, n, D]`` with zeros behind, up to ``rows``."""
    return nn.functional.pad(x, (0, 0, 0, rows - x.shape[2]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
