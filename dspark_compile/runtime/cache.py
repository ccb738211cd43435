"""`CompressedCache`: a Hugging Face ``past_key_values`` whose keys and values live in int8.

Each layer is a static cache: int8 ``[B, H, N, D]`` and one scale ``[B, H, N]`` per token and
head, allocated once, appended to in place. `update` returns ``dequantize_kv(data, scale)``, so
eager code sees ordinary keys and values; under ``torch.compile(backend="dspark")`` attention over
them is fused to read int8 itself, and nothing is expanded.

Sliding-window and chunked layers keep the full length too, and the mask does the windowing: no
length is a Python number, so no step recompiles, and `crop` is exact. (``StaticCache`` keeps only
the window there. With ``max_cache_len`` beyond about twice the window it is the smaller one for
those layers.) Layers that are no plain attention (linear attention, convolutions, hybrids, sparse
indexers) stay what ``StaticCache`` makes them.

transformers is needed for a cache made from a config, not for `CompressedCache.from_shape`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark_compile.ops.cache import SCALE_DTYPE
from dspark_compile.runtime.large_pages import zeros

from .errors import KVCacheError
from .kv_storage import SCHEMES

try:
    from transformers.cache_utils import Cache as _Cache
    from transformers.cache_utils import StaticLayer as _StaticLayer

    _HF_ERROR: ImportError | None = None
except ImportError as error:
    _Cache = _StaticLayer = object  # type: ignore[assignment, misc]
    _HF_ERROR = error


class CompressedLayer(_StaticLayer):  # type: ignore[misc, valid-type]
    """One layer: int8 keys and values with their scales, allocated at the first `update`.

    Args:
        max_cache_len: tokens it holds.
        is_sliding: whether the model attends to a window here; the mask restricts it.
        dtype: of what `update` returns; by default that of the first keys.
    """

    is_compileable = True
    is_croppable = True
    supports_early_init = True

    def __init__(
        self,
        max_cache_len: int,
        *,
        is_sliding: bool = False,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if _StaticLayer is object:
            self.max_cache_len = max_cache_len
            self.cumulative_length = torch.tensor(0, dtype=torch.long)
            self.is_initialized = False
        else:
            super().__init__(max_cache_len=max_cache_len)
        self.is_sliding = is_sliding
        self.dtype = dtype
        self.key_data: Tensor | None = None
        self.key_scale: Tensor | None = None
        self.value_data: Tensor | None = None
        self.value_scale: Tensor | None = None
        # The length as far as Python knows it; None after compiled code has appended. Compiled
        # code only ever writes it, so it is not guarded on.
        self._known_length: int | None = 0

    def __repr__(self) -> str:
        return f"CompressedLayer(max_cache_len={self.max_cache_len})"

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A dequantised copy ``[B, H, N, D]``: writing to it does not change the cache."""
        if not self.is_initialized:
            return None
        return torch.ops.dspark.dequantize_kv(self.key_data, self.key_scale, self.dtype)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._no_assignment("keys", value)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A dequantised copy ``[B, H, N, Dv]``: writing to it does not change the cache."""
        if not self.is_initialized:
            return None
        return torch.ops.dspark.dequantize_kv(self.value_data, self.value_scale, self.dtype)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._no_assignment("values", value)

    @staticmethod
    def _no_assignment(name: str, value: Tensor | None) -> None:
        if value is not None:
            raise KVCacheError(f"{name} of a CompressedCache cannot be assigned; use update()")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys ``[B, H, *, D]`` and values ``[B, H, *, Dv]`` like these."""
        self.dtype = self.dtype or key_states.dtype
        self.device = key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        shape = (self.batch_size, self.num_heads, self.max_cache_len)
        self.key_data = zeros((*shape, self.k_head_dim), dtype=torch.int8, device=self.device)
        self.key_scale = zeros(shape, dtype=SCALE_DTYPE, device=self.device)
        self.value_data = zeros((*shape, self.v_head_dim), dtype=torch.int8, device=self.device)
        self.value_scale = zeros(shape, dtype=SCALE_DTYPE, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._mark_static()
        self.is_initialized = True

    def _stored(self) -> tuple[Tensor, ...]:
        if not self.is_initialized:
            return ()
        return self.key_data, self.key_scale, self.value_data, self.value_scale  # type: ignore[return-value]

    def _mark_static(self) -> None:
        """Tell CUDA graphs that the addresses do not change; not possible while tracing."""
        if not torch.compiler.is_compiling():
            for tensor in (
                self.key_data,
                self.key_scale,
                self.value_data,
                self.value_scale,
                self.cumulative_length,
            ):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, M, D]`` and return everything ``[B, H, N, D]``, rows not written yet
        as zeros.

        Raises:
            KVCacheError: in eager mode: there is no room, or the shape is another one.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        if torch.compiler.is_compiling():
            self._known_length = None
        else:
            self._check(key_states, value_states)
        positions = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        ops = torch.ops.dspark
        ops.cache_append_int8_(self.key_data, self.key_scale, key_states, positions)
        ops.cache_append_int8_(self.value_data, self.value_scale, value_states, positions)
        return (
            ops.dequantize_kv(self.key_data, self.key_scale, self.dtype),
            ops.dequantize_kv(self.value_data, self.value_scale, self.dtype),
        )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, count, size = key_states.shape
        expected = (self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim)
        if (batch, heads, size, value_states.shape[-1]) != expected:
            raise KVCacheError(
                f"this CompressedCache holds (batch, heads, key size, value size) = {expected}, "
                f"and got {(batch, heads, size, value_states.shape[-1])}; make another one for "
                "another batch or model"
            )
        if self.device.type == "cpu" or self._known_length is None:
            self._known_length = int(self.cumulative_length)
        needed = self._known_length + count
        if needed > self.max_cache_len:
            raise KVCacheError(
                f"CompressedCache is full: {count} tokens at position {self._known_length} need "
                f"{needed} rows, and max_cache_len={self.max_cache_len}. Make it with "
                f"max_cache_len={needed} or more, or reset() it"
            )
        self._known_length = needed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(rows that `update` returns, position of the first)."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Tokens held: 0, or an int tensor on the device, as ``StaticLayer`` has it."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_max_cache_shape(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        """Empty it in place."""
        for tensor in self._stored():
            tensor.zero_()
        self.cumulative_length.zero_()
        self._known_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (a negative number); a positive number is
        the length to keep. Dropped rows are out of every mask until they are written again."""
        if tokens_to_remove < 0:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
        elif tokens_to_remove > 0:
            self.cumulative_length.clamp_(max=tokens_to_remove)
        self._known_length = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` of the batch becomes row ``beam_idx[i]``, in place."""
        for tensor in self._stored():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch ``repeats`` times, in new memory."""
        self._rebatch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of the batch, in new memory."""
        self._rebatch(lambda tensor: tensor[indices.to(tensor.device)].contiguous())

    def _rebatch(self, change: Any) -> None:
        if self.is_initialized:
            self.key_data, self.key_scale, self.value_data, self.value_scale = (
                change(tensor) for tensor in self._stored()
            )
            self.batch_size = self.key_data.shape[0]
            self._mark_static()

    def offload(self) -> None:
        raise KVCacheError("a CompressedCache cannot be offloaded: it stays on its device, in int8")

    def prefetch(self) -> None:
        self.offload()

    @property
    def nbytes(self) -> int:
        """Bytes stored; 0 before the first `update`."""
        return sum(tensor.nbytes for tensor in self._stored())

    @property
    def nbytes_exact(self) -> int:
        """Bytes of the same rows in ``dtype``."""
        if self.key_data is None or self.value_data is None or self.dtype is None:
            return 0
        return (self.key_data.numel() + self.value_data.numel()) * self.dtype.itemsize


class CompressedCache(_Cache):  # type: ignore[misc, valid-type]
    """A static key/value cache in int8, to be passed as ``past_key_values``.

    >>> cache = CompressedCache(model.config, max_cache_len=4096)
    >>> model(input_ids, past_key_values=cache)

    It takes 0.52 of the bytes of bfloat16 at a head size of 64 and 0.51 at 128.

    Args:
        config: the model's Hugging Face config: which layers there are and of which kind.
        max_cache_len: tokens it holds for each sequence.
        scheme: ``"int8"``: symmetric, one bfloat16 scale for each token and head.
        batch_size: allocate now, for this batch (sizes from the config), rather than at the
            first forward. For a prefill inside ``torch.compile`` with CUDA graphs.
        device, dtype: where, and what keys and values come back as. By default as the model's
            keys; with ``batch_size``, the config's dtype on the CPU.

    Raises:
        ImportError: transformers is not installed.
        KVCacheError: an option has no meaning here.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        *,
        scheme: str = "int8",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offloading: bool = False,
    ) -> None:
        if _HF_ERROR is not None:
            raise ImportError(
                "CompressedCache(config, ...) needs transformers: pip install 'dspark-compile[hf]' "
                "(CompressedCache.from_shape(...) does not)"
            ) from _HF_ERROR
        from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

        _check_arguments(max_cache_len, scheme, offloading)
        layers: list[Any] = []
        for layer in StaticCache(config, max_cache_len=max_cache_len).layers:
            if type(layer) in (StaticLayer, StaticSlidingWindowLayer):
                layer = CompressedLayer(max_cache_len, is_sliding=layer.is_sliding, dtype=dtype)
            layers.append(layer)
        self._set_layers(layers, scheme)
        if batch_size is not None:
            text = config.get_text_config(decoder=True)
            heads = text.num_attention_heads
            kv_heads = getattr(text, "num_key_value_heads", None) or heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            kind = dtype or getattr(text, "dtype", None) or torch.get_default_dtype()
            self._allocate(batch_size, kv_heads, head_dim, head_dim, kind, device)

    @classmethod
    def from_shape(
        cls,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        max_cache_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.bfloat16,
        *,
        value_head_dim: int | None = None,
        device: torch.device | str | None = None,
        scheme: str = "int8",
    ) -> CompressedCache:
        """An allocated cache for a model without a Hugging Face config: call
        ``cache.update(k, v, layer_idx)`` with ``[B, num_heads, M, head_dim]`` in its attention."""
        _check_arguments(max_cache_len, scheme, False)
        self = cls.__new__(cls)
        self._set_layers([CompressedLayer(max_cache_len, dtype=dtype) for _ in range(num_layers)],
                         scheme)  # fmt: skip
        self._allocate(batch_size, num_heads, head_dim, value_head_dim or head_dim, dtype, device)
        return self

    def _set_layers(self, layers: list[Any], scheme: str) -> None:
        if _Cache is object:
            self.layers = layers
        else:
            super().__init__(layers=layers)
        self.scheme = scheme

    def _allocate(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.lazy_initialization(
                    torch.empty((batch, heads, 0, key_dim), dtype=dtype, device=device),
                    torch.empty((batch, heads, 0, value_dim), dtype=dtype, device=device),
                )

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"CompressedCache(scheme={self.scheme!r}, layers={self.layers})"

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to layer ``layer_idx`` and return its keys and values."""
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """Tokens it holds for each sequence."""
        if layer_idx is not None:
            return self.layers[layer_idx].get_max_length()
        return max(layer.get_max_length() for layer in self.layers)

    def offload(self, *args: Any, **kwargs: Any) -> None:
        raise KVCacheError("a CompressedCache cannot be offloaded: it stays on its device, in int8")

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        self.offload()

    @property
    def nbytes(self) -> int:
        """Bytes that the compressed layers store; 0 before they are allocated."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    @property
    def nbytes_exact(self) -> int:
        """Bytes of the same rows in the model's dtype."""
        return sum(getattr(layer, "nbytes_exact", 0) for layer in self.layers)

    if _Cache is object:  # what transformers' Cache gives otherwise

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            """Tokens held."""
            return self.layers[layer_idx].get_seq_length()

        def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
            return self.layers[layer_idx].get_mask_sizes(query_length)

        def reset(self) -> None:
            for layer in self.layers:
                layer.reset()

        def crop(self, tokens_to_remove: int) -> None:
            for layer in self.layers:
                layer.crop(tokens_to_remove)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            for layer in self.layers:
                layer.reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            for layer in self.layers:
                layer.batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: Tensor) -> None:
            for layer in self.layers:
                layer.batch_select_indices(indices)


def _check_arguments(max_cache_len: int, scheme: str, offloading: bool) -> None:
    if scheme not in SCHEMES:
        raise KVCacheError(f"scheme={scheme!r} is unknown; the schemes are {', '.join(SCHEMES)}")
    if not isinstance(max_cache_len, int) or max_cache_len < 1:
        raise KVCacheError(f"max_cache_len={max_cache_len!r} must be a positive int")
    if offloading:
        raise KVCacheError("offloading=True: a CompressedCache stays on its device, in int8")
