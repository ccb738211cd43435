"""Which report is being written: one for each compilation group of this process.

A *group* is whatever the back end gives one key, such as one ``torch.compile`` call: its graphs
gather in one ``CompileReport``. ``explain`` redirects everything that compiles inside its call to a
report of its own with ``recording``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from dspark_compile.diagnostics.report import CompileReport

MAX_GROUPS = 32

_lock = threading.RLock()
_groups: OrderedDict[Hashable, CompileReport] = OrderedDict()
_last: CompileReport | None = None
_recording: ContextVar[CompileReport | None] = ContextVar("dspark_recording", default=None)


def start_report(key: Hashable = None) -> CompileReport:
    """The report of the group ``key``, from now on the last one; made if there is none yet.

    With ``key=None`` it is always a new one. Inside ``recording`` it is the one recorded to. Of
    many groups the 32 most recent are kept.
    """
    global _last
    with _lock:
        report = _recording.get()
        if report is None:
            report = _groups.get(key) if key is not None else None
            if report is None:
                report = CompileReport()
            if key is not None:
                _groups[key] = report
                _groups.move_to_end(key)
                while len(_groups) > MAX_GROUPS:
                    _groups.popitem(last=False)
        _last = report
        return report


def current_report() -> CompileReport:
    """The report to write to now: the last one started, or a new one if there is none."""
    with _lock:
        report = _recording.get() or _last
        return report if report is not None else start_report()


def last_report() -> CompileReport:
    """The report of the most recent compilation group.

    Raises:
        RuntimeError: nothing was compiled with ``backend="dspark"`` in this process yet.
    """
    with _lock:
        if _last is None:
            raise RuntimeError(
                'nothing was compiled with backend="dspark" in this process yet; call the compiled '
                "model once (torch.compile compiles on the first call)"
            )
        return _last


@contextmanager
def recording(report: CompileReport | None = None) -> Iterator[CompileReport]:
    """Within the ``with`` block, all that this thread compiles goes to one report."""
    global _last
    report = CompileReport() if report is None else report
    token = _recording.set(report)
    try:
        yield report
    finally:
        _recording.reset(token)
        with _lock:
            _last = report


def clear() -> None:
    """Forget all groups."""
    global _last
    with _lock:
        _groups.clear()
        _last = None
