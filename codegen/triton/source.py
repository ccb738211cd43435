"""Generated sources as files: written once under a hash of their text, then imported.

Triton reads a kernel's source through `inspect`, so it has to be a file; and a file is what a
user can open. The folder is ``$DSPARK_CACHE_DIR/triton``, or ``~/.cache/dspark/triton``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def cache_directory() -> Path:
    """Where generated Triton sources go."""
    root = os.environ.get("DSPARK_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "dspark") / "triton"


def load_source(stem: str, text: str) -> ModuleType:
    """The module of ``text``, from the file ``<stem>_<hash>.py`` in the cache directory."""
    name = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    qualified = f"dspark_generated.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    path = write_source(cache_directory() / f"{name}.py", text)
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[qualified]
        raise
    return module


def write_source(path: Path, text: str) -> Path:
    """Write ``text`` so that no reader ever sees half of it; an equal file is left alone."""
    if path.exists() and path.read_text() == text:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
