"""The storage behind ``options={"kv_cache": "int8"}``: compressed twins of exact cache tensors.

The caller made an exact cache (a Hugging Face ``StaticCache``, buffers of a module); the compiler
rewrote its graphs to read and write int8. Both the prefill and the decode graph of one cache, and
any later graph, must see one storage: the *twin*, found by the identity of the exact tensor.
From the first `compress` on the exact tensor is a name without memory: its storage is freed, and
any read or write of it that does not go through the twin raises (see `_poison` for how, and for
what was tried). Shape, strides, dtype and device stay, so Dynamo's guards hold and nothing
recompiles.

A twin lives as long as its tensor. `restore` and `decompress_cache` bring the exact tensor back,
`reset` and `reset_cache` empty a cache for another prompt (``StaticCache.reset`` writes to the
exact tensors, hence raises).

All functions may be called from several threads. They change what exists, not what runs: do not
restore or release a cache while another thread decodes with it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark_compile.ops.cache import SCALE_DTYPE
from dspark_compile.runtime.large_pages import zeros

from . import _poison
from .errors import KVCacheError

SCHEMES = ("int8",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MESSAGE = (
    'this key/value cache was compressed to {scheme} by options={{"kv_cache": "{scheme}"}}, and '
    "its exact storage released. Use dspark_compile.runtime.decompress_cache(cache) to get the "
    "exact tensors back, reset_cache(cache) in place of cache.reset() to empty it, or "
    "dspark_compile.CompressedCache as past_key_values."
)


@dataclass(eq=False)
class CompressedTensor:
    """The compressed twin of a cache tensor ``[B, H, N, D]``.

    Attributes:
        data: int8 ``[B, H, N, D]``.
        scale: one scale for each token and head, ``[B, H, N]``.
        dtype: of the exact tensor.
        scheme: ``"int8"``.
    """

    data: Tensor
    scale: Tensor
    dtype: torch.dtype
    scheme: str = "int8"

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def nbytes_exact(self) -> int:
        """Bytes the exact tensor takes."""
        return self.data.numel() * self.dtype.itemsize

    def dequantize(self) -> Tensor:
        """The exact-typed content, in new memory."""
        return torch.ops.dspark.dequantize_kv(self.data, self.scale, self.dtype)

    def zero_(self) -> CompressedTensor:
        """Empty it in place."""
        with torch.no_grad():
            self.data.zero_()
            self.scale.zero_()
        return self


@dataclass(eq=False)
class _Entry:
    tensor: weakref.ref[Tensor]
    storage: int  # identity of the poisoned storage: a tensor given other memory is exact again
    twin: CompressedTensor | None  # None once released


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()


def unavailable() -> str | None:
    """Why no cache can be compressed in this process (CPU builds of torch need a C++ compiler to
    make memory unreadable), or None. The first call may build a small helper."""
    return _poison.unavailable()


def _find(tensor: Tensor) -> _Entry | None:
    entry = _entries.get(id(tensor))
    if entry is None or entry.storage != tensor.untyped_storage()._cdata:
        return None
    return entry if entry.tensor() is tensor else None


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise KVCacheError(f"unknown scheme {scheme!r}; the schemes are {', '.join(SCHEMES)}")


def _counts() -> tuple[int, int]:
    """(uses of the storage, uses of the tensor) that a tensor nobody shares has, as seen here."""
    alone = torch.empty(1)
    return _storage_uses(alone), alone._use_count()


def _storage_uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def why_not(tensor: Tensor, scheme: str = "int8") -> str | None:
    """The reason for which `compress` would refuse ``tensor``, or None. Changes nothing."""
    _check_scheme(scheme)
    if not isinstance(tensor, Tensor):
        return f"it is a {type(tensor).__name__}, not a tensor"
    functorch = torch._C._functorch.is_functorch_wrapped_tensor
    if type(tensor) not in (Tensor, torch.nn.Parameter) or functorch(tensor):
        return f"it is a {type(tensor).__name__}, not a plain tensor"
    entry = _find(tensor)
    if entry is not None:
        return None
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return "it has no memory of its own (sparse or meta)"
    if tensor.dim() != 4:
        return f"it has {tensor.dim()} dimensions, and a cache has 4: [batch, heads, length, size]"
    if tensor.dtype not in DTYPES:
        return f"its dtype is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}"
    if tensor.numel() == 0:
        return "it is empty"
    if tensor.requires_grad:
        return "it requires gradients"
    if tensor.is_conj() or tensor.is_neg():
        return "it is a conjugate or negative view"
    if not tensor.is_contiguous():
        return f"it is not contiguous: strides {tuple(tensor.stride())}"
    storage = tensor.untyped_storage()
    try:
        storage.data_ptr()
    except RuntimeError as error:
        return f"its memory cannot be read: {error}"
    if tensor._is_view() or tensor.storage_offset() != 0 or storage.nbytes() != tensor.nbytes:
        return "it is a view of a larger or another tensor"
    if tensor.is_shared() and tensor.device.type == "cpu":
        return "its memory is shared between processes"
    if not storage.resizable():
        return "its memory is not torch's own (exported to or taken from NumPy or another library)"
    del storage
    storage_uses, tensor_uses = _counts()
    if _storage_uses(tensor) > storage_uses:
        return "another tensor (a view, or one with the same storage) shares its memory"
    if tensor._use_count() > tensor_uses:
        return "C++ code or another library (DLPack) holds it"
    if tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return _poison.unavailable()


def compress(tensor: Tensor, scheme: str = "int8") -> CompressedTensor:
    """The compressed twin of the cache tensor ``tensor`` ``[B, H, N, D]``.

    The first call quantises what the tensor holds, frees its memory and makes it unreadable;
    later calls return the same twin, at the cost of a dictionary lookup.

    Raises:
        KVCacheError: it cannot be done soundly: the memory is shared with another tensor or
            another library, the tensor is not a contiguous 4-D floating-point one, requires
            gradients, or memory cannot be made unreadable here. The tensor is unchanged.
    """
    entry = _find(tensor)
    if entry is not None and entry.twin is not None and entry.twin.scheme == scheme:
        return entry.twin
    with _lock:
        reason = why_not(tensor, scheme)
        if reason is not None:
            raise KVCacheError(f"the cache cannot be compressed to {scheme}: {reason}")
        entry = _find(tensor)
        if entry is not None:
            if entry.twin is None:
                entry.twin = _empty_twin(tensor, scheme)
            return entry.twin
        try:
            made = _quantized(tensor, scheme)
        except RuntimeError as error:
            raise KVCacheError(f"the cache cannot be compressed to {scheme}: {error}") from error
        _poison.release_and_poison(tensor, MESSAGE.format(scheme=scheme))
        _remember(tensor, made)
        return made


def _remember(tensor: Tensor, made: CompressedTensor) -> None:
    key = id(tensor)

    def forget(ref: weakref.ref[Tensor]) -> None:
        entry = _entries.get(key)
        if entry is not None and entry.tensor is ref:
            del _entries[key]

    _entries[key] = _Entry(weakref.ref(tensor, forget), tensor.untyped_storage()._cdata, made)


def _empty_twin(tensor: Tensor, scheme: str) -> CompressedTensor:
    # Normal tensors even under inference_mode: they are written from both kinds of code later.
    with torch.inference_mode(False), torch.no_grad():
        return CompressedTensor(
            zeros(tensor.shape, dtype=torch.int8, device=tensor.device),
            zeros(tensor.shape[:-1], dtype=SCALE_DTYPE, device=tensor.device),
            tensor.dtype,
            scheme,
        )


def _quantized(tensor: Tensor, scheme: str) -> CompressedTensor:
    """The twin with the content of ``tensor``, one batch row at a time to bound the peak."""
    made = _empty_twin(tensor, scheme)
    with torch.no_grad():
        for row, data, scale in zip(tensor, made.data, made.scale):
            if row.any():
                q, s = torch.ops.dspark.quantize_kv(row, scale.dtype)
                data.copy_(q)
                scale.copy_(s)
    return made


def is_compressed(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a twin, and no memory of its own."""
    return twin(tensor) is not None


def twin(tensor: Tensor) -> CompressedTensor | None:
    """The twin of ``tensor``, or None. Never compresses."""
    entry = _find(tensor)
    return None if entry is None else entry.twin


def restore(tensor: Tensor) -> Tensor:
    """Give a compressed tensor its memory back, with the twin's content dequantised into it, and
    forget the twin. A tensor that is not compressed is returned as it is."""
    with _lock:
        entry = _find(tensor)
        if entry is None:
            return tensor
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            content = zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            if entry.twin is not None:
                for row, data, scale in zip(content, entry.twin.data, entry.twin.scale):
                    row.copy_(torch.ops.dspark.dequantize_kv(data, scale, tensor.dtype))
            tensor.data = content
        del _entries[id(tensor)]
        return tensor


def release(tensor: Tensor) -> None:
    """Free the twin now, and its content with it. The exact tensor stays unreadable; another
    `compress` (a compiled call with this cache) starts an empty twin, `restore` gives zeros."""
    with _lock:
        entry = _find(tensor)
        if entry is not None:
            entry.twin = None


def reset(tensor: Tensor) -> None:
    """Empty the twin of ``tensor`` in place, or ``tensor`` itself if it is not compressed."""
    with _lock:
        entry = _find(tensor)
        if entry is None:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.zero_()
        elif entry.twin is not None:
            entry.twin.zero_()


def _tensors(cache: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors of a cache: a tensor, a module, a container, or an object with attributes."""
    if isinstance(cache, Tensor):
        yield cache
    elif isinstance(cache, torch.nn.Module):
        yield from cache.parameters()
        yield from cache.buffers()
    elif depth:
        if isinstance(cache, Mapping):
            items = list(cache.values())
        elif isinstance(cache, (list, tuple)):
            items = list(cache)
        else:
            items = list(getattr(cache, "__dict__", {}).values())
        for item in items:
            yield from _tensors(item, depth - 1)


def _attributes(cache: Any, depth: int = 4) -> Iterator[tuple[Any, str, Tensor]]:
    """(owner, attribute, tensor) of the tensors that objects in ``cache`` hold as attributes."""
    if depth and isinstance(cache, (list, tuple)):
        for item in cache:
            yield from _attributes(item, depth - 1)
    elif depth and not isinstance(cache, (Tensor, torch.nn.Module)):
        for name, value in list(getattr(cache, "__dict__", {}).items()):
            if isinstance(value, Tensor):
                yield cache, name, value
            else:
                yield from _attributes(value, depth - 1)


def decompress_cache(cache: Any) -> Any:
    """`restore` every compressed tensor of ``cache``: a Hugging Face cache, a module with cache
    buffers, a tensor, or containers of them. Returns ``cache``. Tensors that are not compressed
    stay as they are. The next compiled call with ``kv_cache="int8"`` compresses it again."""
    for tensor in _tensors(cache):
        restore(tensor)
    return cache


def reset_cache(cache: Any) -> Any:
    """Empty ``cache`` for another sequence, as ``cache.reset()`` does for an exact one: twins are
    zeroed in place, everything else is left to the cache's own ``reset``, if it has one.
    Returns ``cache``."""
    held = [
        (owner, name, tensor)
        for owner, name, tensor in _attributes(cache)
        if _find(tensor) is not None
    ]
    for tensor in _tensors(cache):
        if _find(tensor) is not None:
            reset(tensor)
    if callable(getattr(cache, "reset", None)):
        try:
            for owner, name, _ in held:
                vars(owner)[name] = torch.empty(0)
            cache.reset()
        finally:
            for owner, name, tensor in held:
                vars(owner)[name] = tensor
    return cache


def cache_bytes(cache: Any) -> tuple[int, int]:
    """``(bytes stored, bytes an exact cache takes)`` over the compressed tensors of ``cache``."""
    twins = [found for tensor in _tensors(cache) if (found := twin(tensor)) is not None]
    return sum(t.nbytes for t in twins), sum(t.nbytes_exact for t in twins)
