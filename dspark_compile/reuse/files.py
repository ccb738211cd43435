"""The folder of kept compilations: ``$DSPARK_CACHE_DIR/steps`` (``~/.cache/dspark/steps``).

A file is named after the key of what it holds. It is written under another name and renamed, so no
process sees half of one, and carries a hash of its text: what is torn or changed is no entry. An
entry tells native code which memory to read and write; as with libraries, a folder or file that
somebody else could have written is not read (`build.UnsafeCacheError`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dspark_compile.codegen.cpp import build

# The most entries that are kept; the oldest go.
MOST = 256


def folder() -> Path:
    """Where entries lie."""
    return build.cache_directory().parent / "steps"


def read(key: str) -> Any | None:
    """What `write` was given for ``key``; None: there is nothing, or nothing whole.

    Raises:
        build.UnsafeCacheError: somebody else could have written it.
    """
    path = folder() / f"{key}.json"
    if not path.exists():
        return None
    build.check_owner(path.parent)
    build.check_owner(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    sum_, _, body = text.partition("\n")
    if sum_ != _sum(body):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was of use
    return json.loads(body)


def write(key: str, data: Any) -> None:
    """Keep ``data``, plain lists, dicts, strings and numbers, under ``key``.

    Raises:
        build.BuildError: the folder cannot be made, or is somebody else's.
        OSError: it cannot be written to.
    """
    directory = folder()
    build.own_directory(directory)
    body = json.dumps(data, separators=(",", ":"))
    build.write(directory / f"{key}.json", f"{_sum(body)}\n{body}")
    _prune(directory)


def _sum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def _prune(directory: Path) -> None:
    entries = list(directory.glob("*.json"))
    if len(entries) <= MOST:
        return
    ages = {}
    for path in entries:
        with contextlib.suppress(OSError):  # another process removed it
            ages[path] = path.stat().st_mtime
    for path in sorted(ages, key=ages.__getitem__)[: len(entries) - MOST]:
        path.unlink(missing_ok=True)
