"""Writing: everything lands beside its place first and is moved there when it is whole.

A model is one file, or a file and its weights in ``<name>.data``. Names inside of a model file are
plain file names; nothing that is written can be outside of the folder that was named.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ExportError

EXTERNAL_FROM = 1 << 30  # bytes of weights; protobuf ends at 2 GiB


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, removed whatever happens.

    Raises:
        ExportError: the folder cannot be written to.
    """
    try:
        made = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise ExportError(
            f"path={str(target)!r}: cannot write into {str(target.parent)!r} ({error.strerror})"
        ) from error
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def plain_name(name: str) -> str:
    """``name`` if it is a file name without a folder.

    Raises:
        ExportError: it is not.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ExportError(f"{name!r} is not a plain file name")
    return name


def weight_bytes(model: Any) -> int:
    """How much a model's initializers hold."""
    return sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )


def save(model: Any, folder: Path, name: str, external: bool | None) -> list[Path]:
    """Write an ``onnx_ir`` model as ``folder/name``; the files that were written."""
    import onnx_ir as ir

    path = folder / plain_name(name)
    if external is None:
        external = weight_bytes(model) >= EXTERNAL_FROM
    if not external:
        ir.save(model, path)
        return [path]
    data = plain_name(name + ".data")
    ir.save(model, path, external_data=data, size_threshold_bytes=1024)
    return [path, *([folder / data] if (folder / data).exists() else [])]


def move_files(files: list[Path], folder: Path) -> None:
    """Put written files into their folder, the model file last, so that a model that can be seen
    has its weights."""
    for file in sorted(files, key=lambda f: f.suffix == ".onnx"):
        _sync(file)
        os.replace(file, folder / file.name)


def move_folder(made: Path, target: Path) -> None:
    """``made`` in place of ``target``, whose former state is removed afterwards."""
    for file in made.rglob("*"):
        if file.is_file():
            _sync(file)
    made.chmod(0o755)
    if not target.exists():
        os.rename(made, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.rename(target, old / "folder")
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(old / "folder", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
