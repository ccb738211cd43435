"""What an export raises."""

from __future__ import annotations


class ExportError(ValueError):
    """An export cannot be done as asked: the message names the option, its value and the remedy."""


class VerificationError(ExportError):
    """The exported graph does not compute what the model does: the message names the first node
    whose values differ."""
