"""`DecodeLayer`: keys and values of one layer of a `DecodeCache`, exact or in int8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from dspark_compile.ops.cache import SCALE_DTYPE
from dspark_compile.runtime.large_pages import zeros

from .errors import KVCacheError
from .room import bucket


class DecodeLayer(StaticLayer):  # type: ignore[misc]
    """Keys ``[B, H, N, D]`` and values ``[B, H, N, Dv]`` of one layer.

    Args:
        is_sliding: whether the model attends to a window here; the mask restricts it.
    """

    is_compileable = True
    is_croppable = True
    cumulative_length: Tensor

    def __init__(self, *, is_sliding: bool = False) -> None:
        super().__init__(max_cache_len=0)
        self.is_sliding = is_sliding
        self.rows = 0  # of the batch
        self.known = 0  # tokens held, as far as eager code knows

    # ------------------------------------------------------------------------------- storage

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by attribute name; rows of the cache are dimension 2."""
        return {"keys": self.keys, "values": self.values} if self.is_initialized else {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys ``[b, H, *, D]`` and values ``[b, H, *, Dv]`` like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.num_heads = key_states.shape[1]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.batch_size = self.rows = max(self.rows, key_states.shape[0])
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._allocate(max(self.max_cache_len, bucket(1)))
        self.is_initialized = True

    def _zeros(self, room: int, heads: int, size: int) -> Tensor:
        # Zeros: what no token was written to is multiplied by a probability of 0.
        shape = (self.rows, heads, room, size)
        return zeros(shape, dtype=self.dtype, device=self.device)

    def _allocate(self, room: int) -> None:
        self.keys = self._zeros(room, self.num_heads, self.k_head_dim)
        self.values = self._zeros(room, self.num_heads, self.v_head_dim)
        self.max_cache_len = room

    def reserve(self, room: int) -> None:
        """Have ``room`` rows; what is held is copied once."""
        if room <= self.max_cache_len:
            return
        if not self.is_initialized:
            self.max_cache_len = room
            return
        old = self.tensors()
        self._allocate(room)
        for name, new in self.tensors().items():
            new[:, :, : self.known].copy_(old.pop(name)[:, :, : self.known])

    # ------------------------------------------------------------------- what a model calls

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[b, H, M, D]``; all keys and values.

        Raises:
            KVCacheError: in eager mode: another batch or shape than the cache was made for.
        """
        if torch.compiler.is_compiling():
            count = key_states.shape[-2]
            positions = torch.arange(count, device=self.device) + self.cumulative_length
            self.cumulative_length.add_(count)
            return self._append_compiled(key_states, value_states, positions)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, heads, count, size = key_states.shape
        if rows > self.rows or (heads, size) != (self.num_heads, self.k_head_dim):
            raise KVCacheError(
                f"this cache holds {self.rows} rows of {self.num_heads} heads of "
                f"{self.k_head_dim} features, and got {tuple(key_states.shape)}: use another one"
            )
        start, self.known = self.known, self.known + count
        if self.known > self.max_cache_len:
            self.known = start
            self.reserve(bucket(start + count))
            self.known = start + count
        self.cumulative_length.fill_(self.known)
        return self._append(key_states, value_states, slice(start, self.known))

    def _append_compiled(
        self, key_states: Tensor, value_states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        return self.keys, self.values

    def _append(
        self, key_states: Tensor, value_states: Tensor, where: slice
    ) -> tuple[Tensor, Tensor]:
        rows = key_states.shape[0]
        self.keys[:rows, :, where] = key_states
        self.values[:rows, :, where] = value_states
        return self.keys[:rows, :, : where.stop], self.values[:rows, :, : where.stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(rows that `update` returns, position of the first)."""
        if torch.compiler.is_compiling():
            return next(iter(self.tensors().values())).shape[2], 0
        return self.known + int(query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens held: a number, or an int tensor in compiled code.

        The tensor is a copy: `update` counts on in place, and a model may ask first and use the
        answer behind it (Inkling's positions).
        """
        return self.cumulative_length.clone() if torch.compiler.is_compiling() else self.known

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def set_length(self, tokens: int) -> None:
        """``tokens`` are held from now on: compiled code has written, or the rest is dropped."""
        self.known = tokens
        if self.is_initialized:
            self.cumulative_length.fill_(tokens)

    def reset(self) -> None:
        """Empty it; the room stays."""
        self.set_length(0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (a negative number); a positive number is the
        length to keep."""
        if tokens_to_remove < 0:
            self.set_length(max(self.known + tokens_to_remove, 0))
        else:
            self.set_length(min(self.known, tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` of the batch becomes row ``beam_idx[i]``."""
        rows = len(beam_idx)
        for tensor in self.tensors().values():
            tensor[:rows] = tensor.index_select(0, beam_idx.to(tensor.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch ``repeats`` times."""
        self._rebatch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of the batch."""
        self._rebatch(lambda x: x[indices.to(x.device)].contiguous())

    def _rebatch(self, change: Any) -> None:
        for name, tensor in self.tensors().items():
            new = change(tensor)
            setattr(self, name, new)
            self.batch_size = self.rows = new.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.tensors().values())


class Int8DecodeLayer(DecodeLayer):
    """The same in int8: data ``[B, H, N, D]`` and one scale ``[B, H, N]`` a token and head."""

    def tensors(self) -> dict[str, Tensor]:
        names = ("key_data", "key_scale", "value_data", "value_scale")
        return {name: getattr(self, name) for name in names} if self.is_initialized else {}

    def _allocate(self, room: int) -> None:
        shape = (self.rows, self.num_heads, room)
        for name, size in (("key", self.k_head_dim), ("value", self.v_head_dim)):
            data = zeros((*shape, size), dtype=torch.int8, device=self.device)
            setattr(self, f"{name}_data", data)
            setattr(self, f"{name}_scale", zeros(shape, dtype=SCALE_DTYPE, device=self.device))
        self.max_cache_len = room

    def _append_compiled(
        self, key_states: Tensor, value_states: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        ops = torch.ops.dspark
        ops.cache_append_int8_(self.key_data, self.key_scale, key_states, positions)
        ops.cache_append_int8_(self.value_data, self.value_scale, value_states, positions)
        return (
            ops.dequantize_kv(self.key_data, self.key_scale, self.dtype),
            ops.dequantize_kv(self.value_data, self.value_scale, self.dtype),
        )

    def _append(
        self, key_states: Tensor, value_states: Tensor, where: slice
    ) -> tuple[Tensor, Tensor]:
        rows, ops = key_states.shape[0], torch.ops.dspark
        positions = torch.arange(where.start, where.stop, device=self.device)
        both = []
        for name, new in (("key", key_states), ("value", value_states)):
            data, scale = (
                getattr(self, f"{name}_data")[:rows],
                getattr(self, f"{name}_scale")[:rows],
            )
            ops.cache_append_int8_(data, scale, new, positions)
            held = slice(where.stop)
            both.append(ops.dequantize_kv(data[:, :, held], scale[:, :, held], self.dtype))
        return both[0], both[1]
