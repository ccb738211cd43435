"""Where the numbers of a safetensors file begin.

A tensor that is read from the file lies in its mapped pages, at the offset that it has there.
Behind a header of any length vector loads of 64 bytes miss the cache lines' starts: each reads two.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ALIGNMENT = 64


def align(path: str | os.PathLike[str]) -> None:
    """Lengthen the header of the safetensors file ``path``: its numbers begin at whole cache lines.

    The format allows spaces behind the header. What the file holds stays the same.

    Raises:
        ValueError: it is no safetensors file.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        # Before the header is read: of another file the number may be anything.
        if len(start) < 8 or length > path.stat().st_size - 8 or file.read(1) != b"{":
            raise ValueError(f"{path} is no safetensors file: it has no header")
        more = -(8 + length) % ALIGNMENT
        if not more:
            return
        header = b"{" + file.read(length - 1)
        temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
        with temporary.open("wb") as to:
            to.write((length + more).to_bytes(8, "little") + header + b" " * more)
            shutil.copyfileobj(file, to)
    temporary.chmod(path.stat().st_mode)
    os.replace(temporary, path)
