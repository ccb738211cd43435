"""`DecodeCache`: the key/value cache that `generate` decodes over, exact or in int8.

It is a Hugging Face ``past_key_values`` of two natures. Eager code (a prefill) sees what a
``DynamicCache`` would give it: lengths are Python numbers and `update` returns only what is held.
Compiled code sees a static cache: fixed tensors, written in place at a position that is data.

    eager        update(k [b, H, M, D]) -> keys [b, H, held, D], views of the cache
    compiled     update(k [B, H, M, D]) -> keys [B, H, N, D], and the mask hides what is not held

Room grows in powers of two (`DecodeCache.reserve`): each tensor is allocated anew and what is held
is copied once. The number of rows N is a symbol in compiled graphs, so none is compiled again.

Sliding-window layers keep the full length, and the mask does the windowing. Recurrent states:
`state_layers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache

from .decode_layers import DecodeLayer, Int8DecodeLayer
from .errors import KVCacheError
from .room import bucket
from .state_layers import (
    KNOWN_STATES,
    HybridLayer,
    Int8HybridLayer,
    StateLayer,
    attribute,
)


class DummyLayer(attribute("DummyLayer") or object):  # type: ignore[misc]
    """A layer that holds nothing: it has no attention, or reads another layer's keys."""

    rows = 0
    nbytes = 0


# For each scheme: keys and values, and keys and values beside states.
SCHEMES: dict[str, tuple[type[DecodeLayer], type[HybridLayer]]] = {
    "model": (DecodeLayer, HybridLayer),
    "int8": (Int8DecodeLayer, Int8HybridLayer),
}
_ATTENTION = {"StaticLayer", "StaticSlidingWindowLayer"}
_HYBRID = {
    "LinearAttentionAndStaticFullAttentionLayer",
    "LinearAttentionAndStaticSlidingWindowAttentionLayer",
}


class DecodeCache(Cache):  # type: ignore[misc]
    """A cache for a model's text decoder, to be passed as ``past_key_values`` (``cache_params``).

    Args:
        config: the model's Hugging Face config: which layers there are.
        scheme: ``"model"``: exact, in the dtype of the model's keys; ``"int8"``: keys and values of
            8 bits. Recurrent states are always exact.
        rows: sequences it has room for; by default as many as the first `update` brings.

    Raises:
        KVCacheError: an unknown scheme, or a layer of a kind that is not known.
    """

    def __init__(self, config: Any, *, scheme: str = "model", rows: int = 0) -> None:
        if scheme not in SCHEMES:
            raise KVCacheError(f"kv_cache={scheme!r} is unknown; known: {', '.join(SCHEMES)}")
        reason = unsupported(config)
        if reason is not None:
            raise KVCacheError(reason)
        layers = [_layer(like, scheme) for like in StaticCache(config, max_cache_len=1).layers]
        for layer in layers:
            layer.rows = rows
        super().__init__(layers=layers)
        self.scheme = scheme
        self._room = 0  # where no layer has keys

    @property
    def attention(self) -> list[DecodeLayer]:
        """The layers that hold keys and values."""
        return [x for x in self.layers if isinstance(x, DecodeLayer)]

    @property
    def recurrent(self) -> list[StateLayer]:
        """The layers that hold states."""
        return [x for x in self.layers if isinstance(x, StateLayer)]

    def tensors(self) -> Iterator[tuple[DecodeLayer, str, Tensor]]:
        """Every tensor that grows (rows of it are dimension 2), with its layer and its name."""
        for layer in self.attention:
            for name, tensor in layer.tensors().items():
                yield layer, name, tensor

    def fixed(self) -> Iterator[tuple[Any, Tensor]]:
        """Every tensor of fixed shape that a step writes: lengths and states, with a key."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, DecodeLayer):
                yield (i, "length"), layer.cumulative_length
            if isinstance(layer, StateLayer):
                for key, tensor in layer.states().items():
                    yield (i, *key), tensor

    @property
    def rows(self) -> int:
        """Sequences it has room for; 0: not known yet."""
        return max((layer.rows for layer in self.layers), default=0)

    @property
    def known(self) -> int:
        """Tokens held."""
        layers = self.attention or self.recurrent
        return max((layer.known for layer in layers), default=0)

    def prepare(self, other: DecodeCache, rows: int) -> None:
        """Allocate for keys, values and states like ``other``'s, where `update` has not yet."""
        for layer, like in zip(self.layers, other.layers, strict=True):
            if isinstance(layer, StateLayer):
                layer.prepare_states(like, rows)
            if not isinstance(layer, DecodeLayer):
                continue
            if not layer.is_initialized and like.is_initialized:
                layer.rows = rows
                shape = (rows, like.num_heads, 0)
                options = {"dtype": like.dtype, "device": like.device}
                layer.lazy_initialization(
                    torch.empty(*shape, like.k_head_dim, **options),
                    torch.empty(*shape, like.v_head_dim, **options),
                )
            layer.rows = layer.rows or rows

    def use_rows(self, rows: int) -> None:
        """Eager code is about to bring ``rows`` sequences, or all of them."""
        for layer in self.recurrent:
            layer.use_rows(rows)

    @property
    def room(self) -> int:
        """Tokens for which there is memory."""
        return min((layer.max_cache_len for layer in self.attention), default=self._room)

    def reserve(self, tokens: int) -> bool:
        """Have room for ``tokens``; whether tensors were replaced.

        Raises:
            KVCacheError: there is not enough memory; the cache is as it was.
        """
        if tokens <= self.room:
            return False
        room = bucket(tokens)
        if not self.attention:
            self._room = room
            return False
        before = [(layer, layer.tensors(), layer.max_cache_len) for layer in self.attention]
        try:
            for layer in self.attention:
                layer.reserve(room)
        except (RuntimeError, MemoryError) as error:
            for layer, tensors, rows in before:
                layer.max_cache_len = rows
                for name, tensor in tensors.items():
                    setattr(layer, name, tensor)
            raise KVCacheError(
                f"no memory for a cache of {room} tokens ({error}); ask for fewer new tokens, a"
                " smaller batch, or kv_cache='int8'"
            ) from error
        return True

    def set_length(self, tokens: int) -> None:
        """``tokens`` are held in every layer from now on.

        Raises:
            KVCacheError: fewer than before, but some, and there are recurrent states.
        """
        for layer in self.layers:
            if not isinstance(layer, DummyLayer):
                layer.set_length(tokens)

    def snapshot(self) -> Any:
        """What `restore` needs to go back to now: lengths, and copies of the states."""
        return self.known, [layer.snapshot() for layer in self.recurrent]

    def restore(self, snapshot: Any) -> None:
        """Hold what was held at `snapshot`; no token before it may have been dropped since."""
        known, states = snapshot
        for layer, state in zip(self.recurrent, states, strict=True):
            layer.restore(state)
        self.set_length(known)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.layers if not isinstance(x, DummyLayer))


def _layer(like: Any, scheme: str) -> Any:
    """Ours for a layer of transformers' `StaticCache`."""
    name, sliding = type(like).__name__, getattr(like, "is_sliding", False)
    attention, hybrid = SCHEMES[scheme]
    if name == "DummyLayer":
        return DummyLayer()
    if name == "LinearAttentionLayer":
        return StateLayer(like.number_of_states)
    if name in _HYBRID:
        return hybrid(is_sliding=sliding, number_of_states=like.number_of_states)
    return attention(is_sliding=sliding)


def unsupported(config: Any) -> str | None:
    """Why a model of this config cannot decode over a `DecodeCache`; None if it can."""
    try:
        layers = StaticCache(config, max_cache_len=1).layers
    except Exception as error:  # a config may lack anything
        return f"transformers makes no static cache for it: {type(error).__name__}: {error}"
    known = {*_ATTENTION, "DummyLayer"}
    if KNOWN_STATES:
        known |= {*_HYBRID, "LinearAttentionLayer"}
    other = {type(x).__name__ for x in layers} - known
    if "StaticIndexedLayer" in other:
        # Scores are sums of ReLUs: many keys have exactly 0, and which of them top-k takes depends
        # on how many numbers it looks at, also where all that follow are -inf.
        return (
            "it has cache layers with an indexer (StaticIndexedLayer): among keys of equal score"
            " its top-k takes others where a cache has room than where it ends with the text"
        )
    if other:
        return f"it has cache layers of kinds that are not known ({', '.join(sorted(other))})"
    return None


def rigid(config: Any) -> str | None:
    """Why tokens cannot be taken back out of a `DecodeCache` of this config; None if they can."""
    layers = StaticCache(config, max_cache_len=1).layers
    names = {type(x).__name__ for x in layers} - _ATTENTION
    if names:
        return (
            "tokens cannot be taken back out of its cache, which holds more than keys and values "
            f"({', '.join(sorted(names))})"
        )
    return None
