"""Where the numbers of a safetensors file begin.

A tensor that is read from the file lies in its mapped pages, at the offset that it has there.
Behind a header of any length vector loads of 64 bytes miss the cache lines' starts: each reads two.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

ALIGNMENT = 64


def align(path: str | os.PathLike[str]) -> None:
    """Lengthen the header of the safetensors file ``path``: its numbers begin at whole cache lines.

    The format allows spaces behind the header. What the file holds stays the same.

    Raises:
        ValueError: it is no safetensors file.
    """
    path = Path(path)
    data = path.read_bytes()
    if len(data) < 8:
        raise ValueError(f"{path} is no safetensors file: it has {len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    if len(header) < length or not header.startswith(b"{"):
        raise ValueError(f"{path} is no safetensors file: it has no header of {length} bytes")
    more = -(8 + length) % ALIGNMENT
    if not more:
        return
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", length + more) + header + b" " * more)
        file.write(memoryview(data)[8 + length :])
    temporary.chmod(path.stat().st_mode)
    os.replace(temporary, path)
