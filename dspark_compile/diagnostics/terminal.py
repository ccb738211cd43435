"""The report in a terminal.

Order: what was fused, what was not and why, the KV plan, then what it took. Rejections are never
left out; ``verbose`` adds every site, every pass and the printed programs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from textwrap import indent

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dspark_compile.diagnostics.report import (
    CompileReport,
    GraphReport,
    Kernel,
    PassRecord,
    Rejection,
)


def print_report(
    report: CompileReport, verbose: bool = False, console: Console | None = None
) -> None:
    """Print ``report`` to ``console``, by default the terminal."""
    (console or Console()).print(render(report, verbose))


def render_text(report: CompileReport, verbose: bool = False, width: int = 100) -> str:
    """The printed report as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(render(report, verbose))
    return capture.get()


def render(report: CompileReport, verbose: bool = False) -> RenderableType:
    """The report as something that rich prints."""
    parts: list[RenderableType] = [_heading(report)]
    if report.summary():
        parts.append(_summary_table(report))
    if report.rejections:
        parts.append(_rejections(report.rejections))
    if report.fallbacks:
        parts.append(_bullets("Fallbacks", [f"{f.where}: {f.reason}" for f in report.fallbacks]))
    if report.graph_breaks:
        parts.append(_bullets("Graph breaks", report.graph_breaks))
    if report.kv_plan:
        parts.append(_kv_table(report))
    if report.kernels:
        parts.append(_kernel_table(report))
    notes = [
        f"graph {g.index}: {n}" if len(report.graphs) > 1 else n
        for g in report.graphs
        for n in g.notes
    ]
    if notes:
        parts.append(_bullets("Notes", notes))
    for graph in report.graphs if verbose else []:
        parts += _graph_details(graph)
    if not verbose and (worked := _worked(report)):
        parts.append(_pass_table("Passes", worked))
    if report.environment:
        parts.append(_environment_line(report))
    return Group(*parts)


def human_bytes(n: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _heading(report: CompileReport) -> Text:
    if not report.graphs:
        return Text("dspark: no graph was compiled", style="bold yellow")
    before = sum(g.num_nodes_before for g in report.graphs)
    after = sum(g.num_nodes_after for g in report.graphs)
    seconds = sum(sum(g.seconds.values()) for g in report.graphs)
    cached = sum(g.from_cache for g in report.graphs)
    text = Text("dspark: ", style="bold")
    text.append(_count(len(report.graphs), "graph"))
    text.append(f", {_count(len(report.graph_breaks), 'graph break')}")
    text.append(f", {before} nodes before, {after} after, {seconds:.2f} s")
    if cached:
        text.append(f", {cached} from cache")
    return text


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _summary_table(report: CompileReport) -> Table:
    table = _table(
        "Sites", "kind", "raised", "rejected", "lowered to", right=("raised", "rejected")
    )
    for kind, counts in report.summary().items():
        impls = Counter(f"{s.op} → {s.impl or '?'}" for s in report.sites(kind) if s.op)
        rejected = counts["rejected"]
        table.add_row(
            kind,
            str(counts["raised"]),
            f"[red]{rejected}[/red]" if rejected else "0",
            escape(", ".join(f"{n}× {impl}" for impl, n in impls.most_common())),
        )
    return table


def _rejections(rejections: list[Rejection]) -> RenderableType:
    lines: list[RenderableType] = [Text("Not rewritten", style="bold")]
    for (kind, pass_name, source, condition, hint), group in _grouped(rejections).items():
        where = group[0].module or group[0].node
        more = f" and {len(group) - 1} more" if len(group) > 1 else ""
        lines.append(Text(f"  {where}{more}: {kind} left alone by {pass_name}", style="red"))
        labelled = (("because", condition), ("source", source), ("hint", hint))
        lines += [Text(f"    {label:8} {text}") for label, text in labelled if text]
    return Group(*lines)


def _grouped(rejections: list[Rejection]) -> dict[tuple[str, ...], list[Rejection]]:
    """Rejections that differ only in their node and module: one for each layer, as a rule."""
    groups: dict[tuple[str, ...], list[Rejection]] = {}
    for r in rejections:
        groups.setdefault((r.kind, r.pass_name, r.source, r.condition, r.hint), []).append(r)
    return groups


def _bullets(title: str, items: list[str]) -> RenderableType:
    lines = []
    for item, n in Counter(items).items():
        text = f"{n}× {item}" if n > 1 else item
        lines.append(Text(indent(text.strip(), "  ")))
    return Group(Text(title, style="bold"), *lines)


def _kv_table(report: CompileReport) -> Table:
    table = _table("KV cache", "tensors", "scheme", "before", "after", right=("before", "after"))
    schemes: dict[str, list[int]] = {}
    for graph in report.graphs:
        for entry in graph.kv_plan:
            total = schemes.setdefault(entry.scheme, [0, 0, 0])
            total[0] += 1
            total[1] += entry.bytes_before
            total[2] += entry.bytes_after
    for scheme, (count, before, after) in schemes.items():
        ratio = f" ({after / before:.2f}×)" if before else ""
        table.add_row(str(count), scheme, human_bytes(before), human_bytes(after) + ratio)
    return table


def _kernel_table(report: CompileReport) -> Table:
    """One row for each kernel, however many sites it has; files by name, under the folder that
    holds them all."""
    timed = any(k.predicted_us is not None or k.measured_us is not None for k in report.kernels)
    columns = ["op", "sites", "implementation"]
    columns += ["predicted", "measured"] if timed else []
    folders = {str(Path(k.source_path).parent.parent) for k in report.kernels if k.source_path}
    title = f"Kernels ({folders.pop()})" if len(folders) == 1 else "Kernels"
    table = _table(title, *columns, "source", right=("predicted", "measured"))
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for k in report.kernels:
        groups.setdefault((k.op, k.impl, k.source_path or ""), []).append(k)
    for (op, impl, path), members in groups.items():
        sites = members[0].site
        if len(members) > 1:
            sites = f"{len(members)}: {sites} …"
        cells = [op, sites, impl]
        if timed:
            cells += [_us(members[0].predicted_us), _us(members[0].measured_us)]
        short = path if folders or not path else "/".join(Path(path).parts[-2:])
        table.add_row(*(escape(cell) for cell in (*cells, short)))
    return table


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} µs"


def _worked(report: CompileReport) -> list[PassRecord]:
    """One record for each pass that found something, summed over graphs."""
    total: dict[str, PassRecord] = {}
    for graph in report.graphs:
        for p in graph.passes:
            total[p.name] = _add(total[p.name], p) if p.name in total else p
    return [p for p in total.values() if p.found or p.rewritten]


def _add(a: PassRecord, b: PassRecord) -> PassRecord:
    delta = Counter(a.op_delta)
    delta.update(b.op_delta)
    found, rewritten = a.found + b.found, a.rewritten + b.rewritten
    return PassRecord(a.name, a.stage, found, rewritten, a.ms + b.ms, dict(delta))


def _pass_table(title: str, passes: list[PassRecord]) -> Table:
    right = ("found", "rewritten", "ms")
    table = _table(title, "stage", "pass", "found", "rewritten", "ms", "ops", right=right)
    for p in passes:
        delta = ", ".join(f"{n:+d} {op}" for op, n in sorted(p.op_delta.items()) if n)
        cells = (p.stage, p.name, str(p.found), str(p.rewritten), f"{p.ms:.1f}", delta)
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _graph_details(graph: GraphReport) -> list[RenderableType]:
    parts: list[RenderableType] = [_pass_table(f"Graph {graph.index}: passes", graph.passes)]
    sites = _table(
        f"Graph {graph.index}: sites", "kind", "module", "op", "status", "impl", "reason"
    )
    for s in graph.sites:
        cells = (s.kind, s.module or s.node, s.op, s.status, s.impl, s.reason)
        sites.add_row(*(escape(cell) for cell in cells))
    if graph.sites:
        parts.append(sites)
    for stage, program in graph.programs.items():
        parts += [Text(f"Graph {graph.index}: program, {stage}", style="bold"), Text(program)]
    return parts


def _environment_line(report: CompileReport) -> Text:
    env = report.environment
    versions = [
        f"{n} {env[n]}" for n in ("dspark", "torch", "triton", "transformers") if env.get(n)
    ]
    names = [d.get("name", "?") for d in env.get("devices") or []]
    names = names or [(env.get("cpu") or {}).get("name", "")]
    return Text(" · ".join(filter(None, [*versions, *names])), style="dim")
