"""What runs after compilation: compressed key/value caches and their storage.

* `CompressedCache` — a Hugging Face ``past_key_values`` that stores int8 (needs transformers).
* `compress`, `twin`, `is_compressed`, `why_not`, `release`, `restore`, `reset` — the registry
  behind ``options={"kv_cache": "int8"}``, which compresses a cache the caller made.
* `decompress_cache`, `reset_cache`, `cache_bytes` — the same for a whole cache object.

Importing this package needs torch only; names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import KVCacheError

if TYPE_CHECKING:
    from .cache import CompressedCache
    from .kv_storage import (
        CompressedTensor,
        cache_bytes,
        compress,
        decompress_cache,
        is_compressed,
        release,
        reset,
        reset_cache,
        restore,
        twin,
        unavailable,
        why_not,
    )

_HOMES = {
    "CompressedCache": "cache",
    "CompressedTensor": "kv_storage",
    "cache_bytes": "kv_storage",
    "compress": "kv_storage",
    "decompress_cache": "kv_storage",
    "is_compressed": "kv_storage",
    "release": "kv_storage",
    "reset": "kv_storage",
    "reset_cache": "kv_storage",
    "restore": "kv_storage",
    "twin": "kv_storage",
    "unavailable": "kv_storage",
    "why_not": "kv_storage",
}

__all__ = [
    "CompressedCache",
    "CompressedTensor",
    "KVCacheError",
    "cache_bytes",
    "compress",
    "decompress_cache",
    "is_compressed",
    "release",
    "reset",
    "reset_cache",
    "restore",
    "twin",
    "unavailable",
    "why_not",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
