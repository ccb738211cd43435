"""A `DynamicCache` of the caller's, as a conversation in Hugging Face's style hands it on from call
to call: `generate` decodes over a `DecodeCache` with the same tokens, and appends what is new."""

from __future__ import annotations

from typing import Any

import torch

from .decode_cache import DecodeCache
from .rounds import batch_bucket


def why_not(cache: Any, model: Any, batch: int, scheme: str) -> str | None:
    """Why ``cache`` cannot be lent; None if it can."""
    name = f"past_key_values is a {type(cache).__name__} of the caller's"
    if type(cache).__name__ != "DynamicCache" or not type(cache).__module__.startswith(
        "transformers."
    ):
        return name
    if scheme != "model":
        return f"{name}, which is exact, and kv_cache={scheme!r} is not"
    if getattr(cache, "offloading", False):
        return f"{name}, which is offloaded"
    held = [x for x in cache.layers if type(x).__name__ != "DummyLayer"]
    like = DecodeCache(model.config)
    plain = len(like.attention) == len(like.layers) and not any(x.is_sliding for x in like.layers)
    if not plain or any(type(x).__name__ != "DynamicLayer" for x in held):
        return f"{name} with other layers than keys and values of all tokens"
    if held and len(held) != len(like.layers):
        return f"{name} with {len(held)} layers, and the model has {len(like.layers)}"
    lengths = {int(x.get_seq_length()) for x in held}
    if len(lengths) > 1 or any(x.is_initialized and x.keys.shape[0] != batch for x in held):
        return f"{name}, whose layers are not those of this batch"
    return None


class LentCache:
    """A `DecodeCache` in place of ``cache``.

    Args:
        cache: `why_not` has nothing against it.
        config: of the model.
        batch: sequences.

    Attributes:
        ours: decoded over.
    """

    def __init__(self, cache: Any, config: Any, batch: int) -> None:
        self.cache, self.batch = cache, batch
        self.ours = DecodeCache(config, rows=batch_bucket(batch))
        self.held = int(cache.get_seq_length())
        if self.held:
            self.ours.reserve(self.held + 1)
            for mine, theirs in zip(self.ours.layers, cache.layers, strict=True):
                mine.update(theirs.keys, theirs.values)

    def give_back(self) -> None:
        """Append what was decoded to the caller's cache."""
        new = slice(self.held, self.ours.known)
        with torch.no_grad():
            for i, layer in enumerate(self.ours.layers):
                keys, values = (x[: self.batch, :, new] for x in (layer.keys, layer.values))
                self.cache.update(keys.clone(), values.clone(), i)
