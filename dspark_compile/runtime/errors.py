"""Errors of the runtime package."""

from __future__ import annotations


class KVCacheError(RuntimeError):
    """A key/value cache cannot be compressed, restored or written; the message says why."""
