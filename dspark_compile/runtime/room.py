"""How much memory a cache gets: powers of two, so that growing copies each token a bounded number
of times."""

from __future__ import annotations

SMALLEST = 256  # rows


def bucket(rows: int) -> int:
    """The power of two, at least `SMALLEST`, that holds ``rows``."""
    return max(SMALLEST, 1 << (rows - 1).bit_length())
