"""The report: what dspark did with a model, and why.

``report.py`` is the data, ``terminal.py``, ``serialize.py`` and ``html.py`` show it, ``state.py``
says which one is being written, ``explain.py`` makes one for a model. Nothing imported here imports
torch.
"""

from __future__ import annotations

from dspark_compile.diagnostics.report import (
    KINDS,
    CompileReport,
    Fallback,
    GraphReport,
    Kernel,
    KVEntry,
    PassRecord,
    Rejection,
    Site,
)
from dspark_compile.diagnostics.state import current_report, last_report, recording, start_report

__all__ = [
    "KINDS",
    "CompileReport",
    "Fallback",
    "GraphReport",
    "KVEntry",
    "Kernel",
    "PassRecord",
    "Rejection",
    "Site",
    "current_report",
    "last_report",
    "recording",
    "start_report",
]
