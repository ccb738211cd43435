"""The report as plain data: what a compilation found, rewrote, left alone, and why.

Nothing here imports torch, so that a report written on one machine can be read on any other.
Rendering lives beside it: ``terminal.py``, ``serialize.py`` and ``html.py``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal, get_args

Kind = Literal["attention", "norm", "rope", "mlp", "linear", "cache", "mask", "experts", "other"]
KINDS: tuple[str, ...] = get_args(Kind)

Status = Literal["raised", "rejected"]
STATUSES: tuple[str, ...] = get_args(Status)


def check_kind(kind: str) -> None:
    """Raises ValueError, listing the legal ones, if ``kind`` is none of ``KINDS``."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; legal: {', '.join(KINDS)}")


@dataclass(frozen=True)
class Rejection:
    """A place that a pass looked at and left alone.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``.
    """

    pass_name: str
    kind: str
    node: str
    """Name of the graph node at which the match stopped."""
    module: str
    """Dotted path of the nn.Module that it came from."""
    source: str
    """Where the user's code says it: ``file.py:123 in forward: code line``."""
    condition: str
    """The condition that did not hold."""
    hint: str
    """What the user could change so that it would."""

    def __post_init__(self) -> None:
        check_kind(self.kind)


@dataclass(frozen=True)
class Site:
    """A place that is, or looks like, an attention, a norm, ...: raised to the dialect or not.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``, or ``status`` not one of ``STATUSES``.
    """

    kind: str
    node: str
    module: str = ""
    op: str = ""
    """Name of the dialect op that it became."""
    status: str = "raised"
    impl: str = ""
    """What the dialect op was lowered to."""
    reason: str = ""
    """Why it was rejected, or why this implementation was picked."""

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}; legal: {', '.join(STATUSES)}")


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass over one graph."""

    name: str
    stage: str
    found: int
    rewritten: int
    ms: float
    op_delta: dict[str, int] = field(default_factory=dict)
    """Ops whose count changed: count after minus count before."""


@dataclass(frozen=True)
class KVEntry:
    """How one cache tensor is stored, and its size before and after."""

    name: str
    scheme: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Kernel:
    """A kernel that the graph launches: its emitted source, and its predicted and measured time."""

    op: str
    site: str
    impl: str
    source_path: str = ""
    predicted_us: float | None = None
    measured_us: float | None = None


@dataclass(frozen=True)
class Fallback:
    """Something that runs as it would have without dspark, and why."""

    where: str
    reason: str


@dataclass
class GraphReport:
    """What happened to one graph."""

    index: int = 0
    passes: list[PassRecord] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    kv_plan: list[KVEntry] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Compile time by stage."""
    from_cache: bool = False
    num_nodes_before: int = 0
    num_nodes_after: int = 0
    ops: dict[str, int] = field(default_factory=dict)
    """How often each dialect op is in the final graph."""
    programs: dict[str, str] = field(default_factory=dict)
    """The graph as printable text, by stage; empty unless asked for."""

    def add_pass(
        self,
        name: str,
        stage: str,
        found: int = 0,
        rewritten: int = 0,
        ms: float = 0.0,
        op_delta: dict[str, int] | None = None,
    ) -> PassRecord:
        """Record one run of a pass."""
        record = PassRecord(name, stage, found, rewritten, ms, dict(op_delta or {}))
        self.passes.append(record)
        return record

    def reject(
        self,
        pass_name: str,
        kind: str,
        node: str,
        module: str = "",
        source: str = "",
        condition: str = "",
        hint: str = "",
    ) -> Rejection:
        """Record a rejection; one that is already there is not recorded twice.

        Raises:
            ValueError: ``kind`` is not one of ``KINDS``.
        """
        rejection = Rejection(pass_name, kind, node, module, source, condition, hint)
        if rejection not in self.rejections:
            self.rejections.append(rejection)
        return rejection

    def add_site(
        self,
        kind: str,
        node: str,
        module: str = "",
        op: str = "",
        status: str = "raised",
        impl: str = "",
        reason: str = "",
    ) -> Site:
        """Record a site.

        Raises:
            ValueError: ``kind`` is not one of ``KINDS``, or ``status`` not one of ``STATUSES``.
        """
        site = Site(kind, node, module, op, status, impl, reason)
        self.sites.append(site)
        return site

    def rename_site(self, node: str, new: str, op: str) -> None:
        """A raised site's node was replaced by node ``new``, which calls ``op``."""
        self.sites[:] = [
            replace(s, node=new, op=op) if s.node == node and s.status == "raised" else s
            for s in self.sites
        ]

    def add_kv(self, name: str, scheme: str, bytes_before: int, bytes_after: int) -> KVEntry:
        """Record how a cache tensor is stored."""
        entry = KVEntry(name, scheme, bytes_before, bytes_after)
        self.kv_plan.append(entry)
        return entry

    def add_kernel(
        self,
        op: str,
        site: str,
        impl: str,
        source_path: str = "",
        predicted_us: float | None = None,
        measured_us: float | None = None,
    ) -> Kernel:
        """Record a kernel."""
        kernel = Kernel(op, site, impl, source_path, predicted_us, measured_us)
        self.kernels.append(kernel)
        return kernel

    def add_fallback(self, where: str, reason: str) -> Fallback:
        """Record a fallback; one that is already there is not recorded twice."""
        fallback = Fallback(where, reason)
        if fallback not in self.fallbacks:
            self.fallbacks.append(fallback)
        return fallback

    def note(self, text: str) -> None:
        """Record a remark; one that is already there is not recorded twice."""
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of the ``with`` block to ``seconds[stage]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass
class CompileReport:
    """What happened to all graphs of one compilation group."""

    graphs: list[GraphReport] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)
    """Where, why, and what to write in its place (`diagnostics.breaks`)."""
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    owner: Any = field(default=None, repr=False, compare=False)
    """The ``torch.compile`` call this report belongs to; not serialised."""

    def add_graph(self, graph: GraphReport | None = None) -> GraphReport:
        """Append a graph, by default an empty one, and number it."""
        graph = GraphReport() if graph is None else graph
        graph.index = len(self.graphs)
        self.graphs.append(graph)
        return graph

    # -- views over all graphs ------------------------------------------------------------------

    def sites(self, kind: str | None = None) -> list[Site]:
        """All sites, or those of one kind.

        Raises:
            ValueError: ``kind`` is not one of ``KINDS``.
        """
        if kind is not None:
            check_kind(kind)
        return [s for g in self.graphs for s in g.sites if kind is None or s.kind == kind]

    @property
    def rejections(self) -> list[Rejection]:
        """All rejections, in graph order."""
        return [r for g in self.graphs for r in g.rejections]

    @property
    def fallbacks(self) -> list[Fallback]:
        """All fallbacks, in graph order."""
        return [f for g in self.graphs for f in g.fallbacks]

    @property
    def kv_plan(self) -> list[KVEntry]:
        """All cache tensors, in graph order; a cache that two graphs share appears for each."""
        return [e for g in self.graphs for e in g.kv_plan]

    @property
    def kernels(self) -> list[Kernel]:
        """All kernels, in graph order."""
        return [k for g in self.graphs for k in g.kernels]

    def summary(self) -> dict[str, dict[str, int]]:
        """Number of sites by kind and status: ``{"attention": {"raised": 4, "rejected": 0}}``.

        Only kinds that occur are listed.
        """
        counts = Counter((s.kind, s.status) for s in self.sites())
        present = [k for k in KINDS if any(counts[k, status] for status in STATUSES)]
        return {k: {status: counts[k, status] for status in STATUSES} for k in present}

    def diff(self, pass_name: str) -> dict[str, int]:
        """How the pass changed the number of each op, summed over all graphs and runs.

        Raises:
            KeyError: no pass of that name ran; the message lists those that did.
        """
        ran = {p.name for g in self.graphs for p in g.passes}
        if pass_name not in ran:
            raise KeyError(f"no pass named {pass_name!r} ran; ran: {', '.join(sorted(ran))}")
        total: Counter[str] = Counter()
        for graph in self.graphs:
            for record in graph.passes:
                if record.name == pass_name:
                    total.update(record.op_delta)
        return {op: n for op, n in sorted(total.items()) if n}

    def assert_fused(self, kind: str, n: int | None = None) -> None:
        """For a user's own CI: check that the sites of a kind were raised.

        Args:
            kind: one of ``KINDS``.
            n: how many sites must be raised, over all graphs. Without it, at least one must be
                raised and none rejected.

        Raises:
            ValueError: ``kind`` is not one of ``KINDS``.
            AssertionError: it is otherwise; the message lists what was raised, and every rejection
                of that kind with its source line, condition and hint.
        """
        sites = self.sites(kind)
        raised = [s for s in sites if s.status == "raised"]
        rejected = [s for s in sites if s.status == "rejected"]
        ok = len(raised) == n if n is not None else bool(raised) and not rejected
        if ok:
            return
        want = "all sites" if n is None else str(n)
        lines = [
            f"expected {want} of kind {kind!r} to be fused; "
            f"{len(raised)} raised, {len(rejected)} rejected",
            *(f"  raised   {s.module or s.node}: {s.op} -> {s.impl or '?'}" for s in raised),
            *(f"  rejected {s.module or s.node}: {s.reason}" for s in rejected),
        ]
        for r in self.rejections:
            if r.kind == kind:
                lines += [
                    f"  pass {r.pass_name} left {r.module or r.node} alone",
                    f"    source:    {r.source}",
                    f"    condition: {r.condition}",
                    f"    hint:      {r.hint}",
                ]
        lines += [f"  fallback {f.where}: {f.reason}" for f in self.fallbacks]
        if not self.graphs:
            lines.append("  nothing was compiled")
        raise AssertionError("\n".join(lines))

    def merge(self, other: CompileReport) -> CompileReport:
        """A new report with the graphs of both, renumbered; on a clash ``other`` wins."""
        graphs = [replace(g, index=i) for i, g in enumerate([*self.graphs, *other.graphs])]
        return CompileReport(
            graphs=graphs,
            graph_breaks=[*self.graph_breaks, *other.graph_breaks],
            environment={**self.environment, **other.environment},
            options={**self.options, **other.options},
        )

    # -- output ---------------------------------------------------------------------------------

    def print(self, verbose: bool = False) -> None:
        """Print to the terminal; ``verbose`` adds every site, pass and printed program."""
        from dspark_compile.diagnostics.terminal import print_report

        print_report(self, verbose=verbose)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON text, also written to ``path`` if given.

        Raises:
            OSError: ``path`` cannot be written.
        """
        from dspark_compile.diagnostics.serialize import to_json

        return to_json(self, path)

    @classmethod
    def from_json(cls, text_or_path: str | PathLike[str]) -> CompileReport:
        """Read back what ``to_json`` gave, from its text or from a file.

        Raises:
            ValueError: not a report, or one of a newer schema.
            OSError: the file cannot be read.
        """
        from dspark_compile.diagnostics.serialize import from_json

        return from_json(text_or_path)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write one HTML file that needs nothing else.

        Raises:
            OSError: ``path`` cannot be written.
        """
        from dspark_compile.diagnostics.html import write_html

        write_html(self, path)
