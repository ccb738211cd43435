"""Cache layers with recurrent states, alone or beside keys and values.

A linear attention, state space or convolution layer keeps tensors of fixed shape, one row for each
sequence, and overwrites them at every token:

    conv_states[i]       [R, channels, kernel]   the last inputs of convolution i
    recurrent_states[i]  [R, ...]                what recurrence i has summed up

They are allocated once for all R rows of the batch and written in place, so that a compiled step
may own them. A prompt of b < R sequences sees views of the first b rows (`StateLayer.use_rows`).

No token can be taken out of a state. What has to go back (a check that runs a step twice, a call
that failed) takes a copy first: `StateLayer.snapshot`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from .decode_layers import DecodeLayer, Int8DecodeLayer
from .errors import KVCacheError

# Several states a layer, by number: older transformers have one of each, and other methods.
KNOWN_STATES = "number_of_states" in inspect.signature(LinearAttentionLayer.__init__).parameters


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """The states of one layer.

    Args:
        number_of_states: how many convolutions and recurrences there are.
    """

    device: Any
    dtype: Any
    conv_kernel_size: dict[int, int | None]

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        self.rows = 0  # of the batch
        self.known = 0  # tokens held: what `set_length` was told
        self._whole: dict[tuple[str, int], Tensor] = {}

    # ------------------------------------------------------------------------------- storage

    def _kinds(self) -> tuple[tuple[str, dict[int, Tensor | None], dict[int, bool]], ...]:
        return (
            ("conv_states", self.conv_states, self.is_conv_states_initialized),
            ("recurrent_states", self.recurrent_states, self.is_recurrent_states_initialized),
        )

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocate for states ``[b, ...]`` like those given by name: all rows, zeros."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)
        index = kwargs.get("state_idx", 0)
        for name, held, _ in self._kinds():
            given = kwargs.get(name)
            if given is not None:
                self._allocate_state(name, index, held[index], given.shape[0])

    def _allocate_state(self, name: str, index: int, like: Tensor | None, rows: int) -> None:
        assert like is not None
        self.rows = max(self.rows, rows)
        whole = like.new_zeros(self.rows, *like.shape[1:])
        self._whole[name, index] = whole
        getattr(self, name)[index] = whole if rows == self.rows else whole[:rows]

    def states(self) -> dict[tuple[str, int], Tensor]:
        """What is stored, all rows of it, by kind and number."""
        return dict(self._whole)

    def prepare_states(self, other: StateLayer, rows: int) -> None:
        """Allocate ``rows`` rows of states like ``other``'s, where there are none yet."""
        self.rows = self.rows or rows
        for (name, index), like in other.states().items():
            if (name, index) not in self._whole:
                self._allocate_state(name, index, like[:0], 0)
                getattr(self, f"is_{name}_initialized")[index] = True
                self.conv_kernel_size[index] = other.conv_kernel_size[index]
        if self.device is None:
            self.device, self.dtype = other.device, other.dtype
        self.use_rows(self.rows)

    def use_rows(self, rows: int) -> None:
        """Show the model the first ``rows`` rows."""
        for (name, index), whole in self._whole.items():
            getattr(self, name)[index] = whole if rows == whole.shape[0] else whole[:rows]

    # ------------------------------------------------------------------------- going back

    def snapshot(self) -> Any:
        """A copy of everything, for `restore`."""
        states = {key: x.clone() for key, x in self._whole.items()}
        return states, dict(self.has_previous_state), self.known

    def restore(self, snapshot: Any) -> None:
        """Be what it was."""
        states, flags, self.known = snapshot
        for key, x in self._whole.items():
            if key in states:
                x.copy_(states[key])
            else:
                x.zero_()
        self.has_previous_state.update(flags)

    def set_length(self, tokens: int) -> None:
        """``tokens`` are held from now on, 0 of them or no fewer than before.

        Raises:
            KVCacheError: some would have to be taken out of the states.
        """
        if 0 < tokens < self.known:
            raise KVCacheError(
                f"a cache with recurrent states holds {self.known} tokens and cannot go back to "
                f"{tokens}: empty it with set_length(0), or keep a copy"
            )
        if tokens == 0:
            LinearAttentionLayer.reset(self)
            for x in self._whole.values():
                x.zero_()
        self.known = tokens

    def reset(self) -> None:
        """Empty it; the memory stays."""
        self.set_length(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens: none, or it is refused."""
        if tokens_to_remove < 0:
            self.set_length(max(self.known + tokens_to_remove, 0))
        else:
            self.set_length(min(self.known, tokens_to_remove))

    @property
    def is_croppable(self) -> bool:
        """No: see `set_length`."""
        return False

    def activate_past_recording(self) -> None:
        """
        Raises:
            KVCacheError: always: a compiled step overwrites its states.
        """
        raise KVCacheError("a DecodeCache does not record past states: use a DynamicCache")

    # --------------------------------------------------------------------------- the batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` of the batch becomes row ``beam_idx[i]``."""
        for x in self._whole.values():
            x[: len(beam_idx)] = x.index_select(0, beam_idx.to(x.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch ``repeats`` times."""
        self._rebatch_states(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of the batch."""
        self._rebatch_states(lambda x: x[indices.to(x.device)].contiguous())

    def _rebatch_states(self, change: Any) -> None:
        whole = self._whole
        for key, x in whole.items():
            whole[key] = change(x)
            self.rows = whole[key].shape[0]
        self.use_rows(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self._whole.values())


class HybridLayer(StateLayer, DecodeLayer):  # type: ignore[misc, override]
    """A layer with keys and values, and states beside them."""

    _attention: type[DecodeLayer] = DecodeLayer

    def __init__(self, *, is_sliding: bool = False, number_of_states: int = 1) -> None:
        self._attention.__init__(self, is_sliding=is_sliding)
        StateLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, given in order, or of states, given by name."""
        if args:
            self._attention.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def snapshot(self) -> Any:
        return self.known, StateLayer.snapshot(self)

    def restore(self, snapshot: Any) -> None:
        known, states = snapshot
        StateLayer.restore(self, states)
        self._attention.set_length(self, known)

    def set_length(self, tokens: int) -> None:
        StateLayer.set_length(self, tokens)
        self._attention.set_length(self, tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        StateLayer.reorder_cache(self, beam_idx)
        self._attention.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        StateLayer.batch_repeat_interleave(self, repeats)
        self._attention.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        StateLayer.batch_select_indices(self, indices)
        self._attention.batch_select_indices(self, indices)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors().values()) + sum(
            x.nbytes for x in self.states().values()
        )


class Int8HybridLayer(HybridLayer, Int8DecodeLayer):  # type: ignore[misc, override]
    """The same with keys and values in int8; states stay exact."""

    _attention = Int8DecodeLayer


def attribute(name: str) -> type | None:
    """A layer class of transformers; None where this version has none of that name."""
    return getattr(cache_utils, name, None)
