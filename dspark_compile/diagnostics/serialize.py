"""The report as JSON, with a version.

``schema_version`` rises when the meaning of a field changes or one goes away. A field that is added
does not raise it: readers ignore names that they do not know and take defaults for missing ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from dspark_compile.diagnostics.report import (
    CompileReport,
    Fallback,
    GraphReport,
    Kernel,
    KVEntry,
    PassRecord,
    Rejection,
    Site,
)

SCHEMA_VERSION = 1

T = TypeVar("T")

_GRAPH_LISTS: dict[str, type] = {
    "passes": PassRecord,
    "rejections": Rejection,
    "sites": Site,
    "kv_plan": KVEntry,
    "kernels": Kernel,
    "fallbacks": Fallback,
}


def report_to_dict(report: CompileReport) -> dict[str, Any]:
    """The report as dicts, lists, strings and numbers, with its ``schema_version``."""
    data = {
        "graphs": [graph_to_dict(g) for g in report.graphs],
        "graph_breaks": list(report.graph_breaks),
        "environment": report.environment,
        "options": report.options,
    }
    return {"schema_version": SCHEMA_VERSION, **plain(data)}


def report_from_dict(data: Any) -> CompileReport:
    """The inverse of ``report_to_dict``.

    Raises:
        ValueError: not a report, or one of a newer schema.
    """
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if not isinstance(version, int):
        raise ValueError("not a dspark report: it has no schema_version")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"the report has schema_version {version}; this dspark reads up to {SCHEMA_VERSION}: "
            "update dspark-compile"
        )
    kwargs = _known(CompileReport, data)
    kwargs["graphs"] = [graph_from_dict(g) for g in data.get("graphs", [])]
    return _build(CompileReport, kwargs)


def graph_to_dict(graph: GraphReport) -> dict[str, Any]:
    """One graph's report as plain data, for storing beside a compile cache."""
    return {f.name: plain(getattr(graph, f.name)) for f in fields(GraphReport)}


def graph_from_dict(data: Any) -> GraphReport:
    """The inverse of ``graph_to_dict``.

    Raises:
        ValueError: not a graph's report.
    """
    kwargs = _known(GraphReport, data)
    for name, record in _GRAPH_LISTS.items():
        if name in kwargs:
            kwargs[name] = [_build(record, _known(record, item)) for item in kwargs[name]]
    return _build(GraphReport, kwargs)


def to_json(report: CompileReport, path: str | PathLike[str] | None = None) -> str:
    """The report as JSON text, also written to ``path`` if given.

    Raises:
        OSError: ``path`` cannot be written.
    """
    text = json.dumps(report_to_dict(report), indent=1, ensure_ascii=False, allow_nan=False)
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def from_json(text_or_path: str | PathLike[str]) -> CompileReport:
    """Read a report from JSON text (it starts with ``{``) or from a file.

    Raises:
        ValueError: not a report, or one of a newer schema.
        OSError: the file cannot be read.
    """
    if isinstance(text_or_path, str) and text_or_path.lstrip().startswith("{"):
        text = text_or_path
    else:
        text = Path(text_or_path).read_text(encoding="utf-8")
    return report_from_dict(json.loads(text))


def plain(value: Any) -> Any:
    """``value`` with only what JSON has; what it lacks becomes text, NaN and infinity null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    return str(value)


def _known(cls: type, data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"expected an object for {cls.__name__}, found {type(data).__name__}")
    names = {f.name for f in fields(cls)}
    return {k: v for k, v in data.items() if k in names}


def _build(cls: type[T], kwargs: dict[str, Any]) -> T:
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from error
