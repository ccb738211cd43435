"""The report as one HTML file that needs no network: styles inside, kernel sources pasted in."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from dspark_compile.diagnostics.report import CompileReport
from dspark_compile.diagnostics.terminal import human_bytes

# Sources longer than this are linked but not pasted.
MAX_SOURCE_BYTES = 256 * 1024


def write_html(report: CompileReport, path: str | PathLike[str]) -> None:
    """Write ``report`` to ``path``.

    Raises:
        OSError: ``path`` cannot be written.
    """
    Path(path).write_text(render_html(report), encoding="utf-8")


def render_html(report: CompileReport) -> str:
    """``report`` as HTML text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("dspark_compile.diagnostics", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["human_bytes"] = human_bytes
    sources = {k.source_path: text for k in report.kernels if (text := _source(k.source_path))}
    return env.get_template("report.html.j2").render(report=report, sources=sources)


def _source(path: str) -> str | None:
    try:
        file = Path(path)
        if not path or not file.is_file() or file.stat().st_size > MAX_SOURCE_BYTES:
            return None
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
