"""Where fewer than 95 % of a family's sites are raised, and why."""

from __future__ import annotations

KNOWN_GAPS: dict[tuple[str, str], str] = {}
"""(family, kind) -> reason. An entry that is no longer needed fails the test that would use it."""
