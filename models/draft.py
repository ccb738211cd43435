"""The DSpark draft in plain PyTorch: a block of tokens in one pass, then a light sequential stage.

    draft = DraftModel.from_pretrained(folder_or_hub_id, target=model)
    cache = draft.new_cache(batch, capacity)
    draft.append(cache, taps, counts)              # committed tokens' tapped states
    tokens, logits, confidence = draft.propose(anchor, cache, choose)

The anchor is the last committed token; its own tapped states do not exist yet, so it is the first
row of the block and not part of the context. Rows are ``[anchor, MASK, ...]`` at the positions from
the anchor's on; row k predicts the token behind its position. Attention is bidirectional in a
block and sees all of the context. Source: DSpark, arXiv 2607.05147.

Shapes: B requests, N context tokens, m taps, d width, K drafted tokens, V the target's vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_compile.models.draft_cache import ContextCache
from dspark_compile.models.draft_config import DraftConfig, DraftError
from dspark_compile.models.draft_heads import ConfidenceHead, MarkovHead
from dspark_compile.models.draft_layers import DraftLayer, RMSNorm, Rotary

Choose = Callable[[Tensor, int, list[Tensor]], Tensor]


def _joined(before: Tensor, same: Tensor) -> Tensor:
    """One mask ``[B, A * M, N + A * M]`` of context and blocks."""
    batch, blocks, rows = same.shape[:3]
    own = same.new_zeros(batch, blocks, rows, blocks, rows)
    at = torch.arange(blocks, device=same.device)
    own[:, at, :, at] = same.transpose(0, 1)
    return torch.cat((before, own.flatten(3, 4).flatten(1, 2)), dim=-1)


class Borrowed:
    """The target's embedding and output layer, where the draft has none (or not its own)."""

    def __init__(self) -> None:
        self.embedding: Any = None
        self.head: Any = None


def greedy(logits: Tensor, k: int, chosen: list[Tensor]) -> Tensor:
    """The token choice at temperature 0: ``logits [B, V]`` to ids ``[B]``."""
    return logits.argmax(-1)


class DraftModel(nn.Module):
    """A DSpark (or, without a Markov head, DFlash) draft.

    The names of parameters are the DeepSpec layout's. ``embed_tokens`` and ``lm_head`` are None
    unless the checkpoint has its own; `bind` then borrows the target's.

    Attributes:
        config: the `DraftConfig`.
        calibration: the contents of ``calibration.json`` beside the weights (the scheduler's
            temperatures), or None.
    """

    d2t: Tensor | None

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        width, eps, late = config.hidden_size, config.rms_norm_eps, config.family == "gemma4"
        self.embed_tokens: nn.Embedding | None = None
        self.lm_head: nn.Linear | None = None
        # The target's own modules: borrowed, so not among this module's parameters.
        self.borrowed = Borrowed()
        self.fc = nn.Linear(
            len(config.target_layer_ids) * config.target_hidden_size, width, bias=False
        )
        self.hidden_norm = RMSNorm(width, eps, late=late)
        self.layers = nn.ModuleList(DraftLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(width, eps, late=late)
        self.rotary = Rotary(config)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        self.confidence_head = ConfidenceHead(config) if config.enable_confidence_head else None
        # Draft id to target id, where the draft's lm_head has rows for a part of the vocabulary.
        self.register_buffer("d2t", None, persistent=False)
        self.calibration: dict[str, Any] | None = None
        # What the file said itself; the rest of the configuration is defaults.
        self.declared: frozenset[str] = frozenset(f.name for f in dataclasses.fields(config))

    # -- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        target: nn.Module | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **hub: Any,
    ) -> DraftModel:
        """Load a draft from a folder, or from the Hugging Face Hub by its id.

        Args:
            path: a folder with ``config.json`` and safetensors, or ``"owner/name"``.
            target: a causal language model to check the draft against and to share its embedding
                and lm_head with (`bind`).
            tokenizer: the target's, compared with the one saved beside the draft, if any.
            dtype: of the weights; None and "auto" keep the checkpoint's.
            hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            DraftError: the folder is no draft, a tensor is missing, left over or of another shape,
                weights are not safetensors, or draft and target do not fit.
        """
        from dspark_compile.models.draft_io import load

        draft = load(cls, path, dtype=dtype, device=device, **hub)
        if target is not None:
            draft.bind(target, tokenizer=tokenizer)
        return draft

    def save_pretrained(self, path: str | PathLike[str], *, own_vocabulary: bool = False) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``calibration.json`` (DeepSpec layout).

        Args:
            own_vocabulary: also write the embedding and the lm_head that are shared with the
                target; without them the file is small and needs its target to run.
        """
        from dspark_compile.models.draft_io import save

        save(self, path, own_vocabulary=own_vocabulary)

    def bind(self, target: nn.Module, *, tokenizer: Any = None) -> DraftModel:
        """Check the draft against a target, and share the vocabulary matrices it lacks.

        Raises:
            DraftError: vocabulary, width, number of layers, taps or mask token do not fit.
        """
        from dspark_compile.models.draft_bind import bind

        bind(self, target, tokenizer)
        return self

    # -- context

    def new_cache(self, batch: int, capacity: int) -> ContextCache:
        """An empty context cache on the draft's device, in its dtype."""
        weight = self.fc.weight
        return ContextCache(self.config, batch, capacity, device=weight.device, dtype=weight.dtype)

    def context(self, taps: Tensor) -> Tensor:
        """``H_ctx [B, N, d]`` of tapped states ``[B, N, m * width]``, concatenated in order."""
        return self.hidden_norm(self.fc(taps.to(self.fc.weight.dtype)))

    def append(self, cache: ContextCache, taps: Tensor, counts: Tensor | int) -> None:
        """Put the first ``counts [B]`` of ``taps [B, N, m * width]`` into the context.

        All N are written behind the lengths; those past ``counts`` stay invisible.
        """
        context = self.context(taps)
        slots = cache.slots(taps.shape[1])
        angles = self.rotary(slots)
        for i, layer in enumerate(self._layers()):
            key, value = layer.self_attn.key_value(context, angles)
            cache.write(i, key, value, slots)
        cache.commit(counts)

    # -- the backbone

    def embed(self, ids: Tensor) -> Tensor:
        """Embedded rows of token ids, scaled as the family does."""
        module = self.embed_tokens or self.borrowed.embedding
        if module is None:
            raise DraftError(
                "this draft has no embedding of its own; give from_pretrained(..., target=model) "
                "or call bind(model)"
            )
        # By its weight: a target's module may scale its rows already, as Gemma's does.
        rows = F.embedding(ids, module.weight)
        scale = self.config.embed_scale
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype)

    def rows(self, anchor: Tensor) -> Tensor:
        """Token ids of block rows ``[..., block_size]`` from anchors ``[...]``."""
        masks = anchor[..., None].expand(*anchor.shape, self.config.block_size - 1)
        return torch.cat(
            (anchor[..., None], torch.full_like(masks, self.config.mask_token_id)), dim=-1
        )

    def block(self, anchor: Tensor, cache: ContextCache) -> Tensor:
        """Hidden rows ``[B, K, d]`` (after the final norm) that predict K tokens.

        Args:
            anchor: ``[B]``, the token at position ``cache.lengths``.
        """
        slots = cache.slots(self.config.block_size)
        angles = self.rotary(slots)
        x = self.embed(self.rows(anchor)).to(self.fc.weight.dtype)
        keys = torch.arange(cache.capacity, device=slots.device)[None, None]
        seen = keys < (slots[:, -1:] + 1)[:, :, None]
        full = seen.expand(-1, slots.shape[1], -1)[:, None]
        sliding = self._slide(seen, slots[:, :, None], keys, slots[:, :1, None])
        for i, layer in enumerate(self._layers()):
            query, key, value = layer.start(x, angles)
            cache.write(i, key, value, slots)
            allowed = sliding[:, None] if layer.sliding else full
            x = layer.finish(x, query, cache.keys[i], cache.values[i], allowed)
        return self._predicting(self.norm(x))

    def blocks(self, ids: Tensor, context: Tensor, anchors: Tensor) -> Tensor:
        """Hidden rows ``[B, A, K, d]`` of many blocks in one pass: what training uses.

        Each block sees the context strictly before its anchor, and itself.

        Args:
            ids: ``[B, S]`` tokens. context: ``H_ctx [B, S, d]``. anchors: positions ``[B, A]``.
        """
        batch, length = ids.shape
        size = self.config.block_size
        x = self.embed(self.rows(ids.gather(1, anchors))).to(self.fc.weight.dtype).flatten(1, 2)
        places = torch.arange(length, device=ids.device).expand(batch, -1)
        at = (anchors[..., None] + torch.arange(size, device=ids.device)).flatten(1)
        context_angles, angles = self.rotary(places), self.rotary(at)
        starts = anchors.repeat_interleave(size, dim=1)[:, :, None]
        before = places[:, None] < starts
        inside = at.unflatten(1, (-1, size))
        whole = torch.ones(size, size, dtype=torch.bool, device=ids.device)
        same = whole.expand(batch, anchors.shape[1], -1, -1)
        near = self._slide(before, at[:, :, None], places[:, None], starts)
        beside = self._slide(
            same, inside[..., None], inside[..., None, :], anchors[..., None, None]
        )
        for layer in self._layers():
            query, key, value = layer.start(x, angles)
            seen = layer.self_attn.key_value(context, context_angles)
            masks = (near, beside) if layer.sliding else (before, same)
            if ids.device.type == "cpu":
                mixed = layer.self_attn.attend_blocks(query, seen, (key, value), *masks)
                x = layer.after(x, mixed)
            else:
                keys, values = torch.cat((seen[0], key), dim=2), torch.cat((seen[1], value), dim=2)
                x = layer.finish(x, query, keys, values, _joined(*masks)[:, None])
        return self._predicting(self.norm(x).unflatten(1, (-1, size)))

    def _layers(self) -> list[DraftLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _slide(self, allowed: Tensor, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
        """A sliding layer's mask: the window, and a causal block where it was trained so."""
        window = self.config.sliding_window
        if window is None:
            return allowed
        allowed = allowed & (query - key < window)
        if not self.config.sliding_window_non_causal:
            allowed = allowed & ((key <= query) | (key < start))
        return allowed

    def _predicting(self, hidden: Tensor) -> Tensor:
        return hidden if self.config.sample_from_anchor else hidden[..., 1:, :]

    # -- the sequential stage

    def base_logits(self, hidden: Tensor) -> Tensor:
        """``U = lm_head(h)`` float32, over the draft's vocabulary, soft-capped where Gemma's is."""
        head = self.lm_head or self.borrowed.head
        if head is None:
            raise DraftError(
                "this draft has no lm_head of its own; give from_pretrained(..., target=model) or "
                "call bind(model)"
            )
        logits = head(hidden.to(head.weight.dtype)).float()
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def propose(
        self, anchor: Tensor, cache: ContextCache, choose: Choose = greedy
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draft K tokens for each request; the context stays as it is.

        Args:
            anchor: ``[B]`` int64.
            choose: ``(logits [B, V], k, tokens before) -> ids [B]``.

        Returns:
            Tokens ``[B, K]`` int64, the logits they were chosen from ``[B, K, V]`` float32 (-inf
            outside of a draft vocabulary), and confidence logits ``[B, K]`` float32 or None.
        """
        hidden = self.block(anchor, cache)
        return self.sequence(hidden, self.base_logits(hidden), anchor, choose)

    def sequence(
        self, hidden: Tensor, base: Tensor, anchor: Tensor, choose: Choose = greedy
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sequential stage alone: `propose` behind ``hidden [B, K, d]`` and its `base_logits`
        ``[B, K, V]``."""
        previous, state = anchor, hidden.new_zeros(anchor.shape[0], self.config.markov_rank)
        tokens: list[Tensor] = []
        every, confidences = [], []
        for k in range(hidden.shape[1]):
            logits, e = base[:, k], None
            if self.markov_head is not None:
                e = self.markov_head.embed(previous)
                bias, state = self.markov_head.step(e, hidden[:, k], state)
                logits = logits + bias.float()
            logits = self.to_target_vocabulary(logits)
            if self.confidence_head is not None:
                confidences.append(self.confidence_head(hidden[:, k], e))
            previous = choose(logits, k, tokens)
            tokens.append(previous)
            every.append(logits)
        confidence = torch.stack(confidences, dim=1) if confidences else None
        return torch.stack(tokens, dim=1), torch.stack(every, dim=1), confidence

    def forced(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits over the draft's vocabulary and confidence logits, previous tokens given.

        Args:
            hidden: ``[B, K, d]``. previous: ``[B, K]``, the anchor first.
        """
        logits, e = self.base_logits(hidden), None
        if self.markov_head is not None:
            e = self.markov_head.embed(previous)
            logits = logits + self.markov_head.block(e, hidden).float()
        confidence = None if self.confidence_head is None else self.confidence_head(hidden, e)
        return logits, confidence

    def to_target_vocabulary(self, logits: Tensor) -> Tensor:
        """Logits ``[..., V]`` from those of the draft's vocabulary; -inf for what it lacks."""
        if self.d2t is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return wide.index_copy(-1, self.d2t, logits)

    def set_vocabulary(self, ids: Tensor | None) -> None:
        """Give the draft's vocabulary: the target id of each row of the lm_head.

        Raises:
            DraftError: the ids are not distinct tokens of the target, one for each row.
        """
        if ids is None:
            self.d2t = None
            return
        count = self.config.draft_vocab_size
        ids = ids.detach().to(torch.long).flatten()
        distinct = ids.unique()
        if len(ids) != count or len(distinct) != count:
            raise DraftError(
                f"d2t names {len(distinct)} distinct tokens in {len(ids)} entries; "
                f"draft_vocab_size={count} needs as many"
            )
        if distinct[0] < 0 or distinct[-1] >= self.config.vocab_size:
            raise DraftError(
                f"d2t reaches from {int(distinct[0])} to {int(distinct[-1])}; the target's "
                f"vocabulary has {self.config.vocab_size} tokens"
            )
        self.d2t = ids.to(self.fc.weight.device)
