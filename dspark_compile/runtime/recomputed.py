"""`RecomputedRounds`: decoding without a cache, the whole text through the module for every token.

What `generate` falls back to where no cache can be inserted into a module: slow, and what the
module's own author would get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import KVCacheError
from .module_logits import logits_of
from .rounds import Rounds, pool_key


def recomputed_key(rows: int, options: Mapping[str, Any]) -> Any:
    """Of the pool, for `RecomputedRounds`."""
    return pool_key(rows, "recomputed", "model", options)


class RecomputedRounds(Rounds):
    """`Rounds` of a module that is given all tokens.

    Args:
        model: token ids ``[B, S]`` to logits ``[B, S, V]``, or of the last token alone
            (``[B, 1, V]``, ``[B, V]``); held weakly.
        rows: B.
        options: of the back end; not used, but for the place in the pool.
        reason: why there is no cache.
    """

    without_program = "recomputed"

    def __init__(
        self,
        model: torch.nn.Module,
        rows: int,
        options: Mapping[str, Any] | None,
        reason: str,
    ) -> None:
        device = next((x.device for x in (*model.parameters(), *model.buffers())), None)
        self._start(model, rows, False, "model", options, device or torch.device("cpu"))
        self.key = recomputed_key(rows, self.options)
        self.reason = reason
        self.cache = _NoCache()
        self._text = self.tokens.new_zeros(rows, 0)

    def begin(self) -> None:
        self.length = 0
        self.done.zero_()

    def adopt(self, cache: Any) -> None:
        raise KVCacheError("the module is run without a cache: there is none to exchange")

    def reserve(self, tokens: int) -> None:
        if tokens > self._text.shape[1]:
            text = self._text.new_zeros(self.rows, max(tokens, 2 * self._text.shape[1]))
            text[:, : self.length] = self._text[:, : self.length]
            self._text = text

    def room_for(self, count: int) -> None:
        self.reserve(self.length + count)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        chunk: int,
    ) -> Tensor:
        count = input_ids.shape[1]
        self.reserve(self.length + count)
        self._text[:, self.length : self.length + count] = input_ids
        self.length += count
        return self._logits(self.length)

    def _eager_step(self) -> Tensor:
        self._text[:, self.length] = self.tokens[:, 0]
        return self._logits(self.length + 1)

    def _logits(self, length: int) -> Tensor:
        # (A copy: the module may keep what it is given, or write to it.)
        logits = logits_of(self.model(self._text[:, :length].clone()))
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or shape[0] != self.rows:
            raise ValueError(
                f"for tokens [{self.rows}, {length}] the model gives {shape}, and logits are "
                "[B, S, vocabulary], or [B, vocabulary] of the last token"
            )
        return logits if logits.dim() == 2 else logits[:, -1]


class _NoCache:
    """Holds nothing."""

    room = nbytes = known = 0

    def set_length(self, tokens: int) -> None:
        """There is nothing to set."""
