"""What a pass is, and what it may use.

A pass rewrites one idea. It yields `Match`es (`pattern`), says why a match must not be
rewritten (`check`: None or a `Problem`), and rewrites the rest (`rewrite`). The driver
`Pass.run` counts, times and records rejections, so that no pass can miss silently.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from dspark_compile.diagnostics.report import GraphReport, PassRecord
from dspark_compile.options import Options
from dspark_compile.passes.graph import dialect_name, module_path, op_counts, source

# What the report counts as raised or not; other kinds only have passes and rejections.
SITE_KINDS = ("attention", "norm", "rope", "mlp", "experts")


class UserError(Exception):
    """An error of the user's input: it is raised out of ``torch.compile``, never turned
    into a fallback."""


@dataclass
class Match:
    """One place a pass may rewrite.

    Attributes:
        anchor: the node whose value the rewrite replaces (and which the report names).
        nodes: every node of the match, for the report.
        captures: what `rewrite` needs, by name.
    """

    anchor: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    captures: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]


@dataclass(frozen=True)
class Problem:
    """Why a match is left alone: the failed condition, and what would help."""

    condition: str
    hint: str = ""
    node: fx.Node | None = None


@dataclass
class PassContext:
    """What passes share during one graph's way through the pipeline.

    Attributes:
        options: the user's options.
        report: where findings go.
        fake_mode: the mode that ``node.meta["val"]`` belongs to.
        example_inputs: the real (or fake) inputs, one for each placeholder.
        extra_inputs: placeholders that passes added, each with the recipe that the
            runtime wrapper follows to produce its value (see ``backend.py``).
        dropped_inputs: indices of the caller's inputs whose placeholders passes removed.
        shared: what one pass leaves for another, e.g. the mask prover.
    """

    options: Options
    report: GraphReport
    fake_mode: Any
    example_inputs: list[Any]
    extra_inputs: list[Any] = field(default_factory=list)
    dropped_inputs: set[int] = field(default_factory=set)
    shared: dict[str, Any] = field(default_factory=dict)

    def reject(
        self,
        pass_name: str,
        kind: str,
        node: fx.Node,
        condition: str,
        hint: str = "",
        site: bool = False,
    ) -> None:
        """Record that something of ``kind`` was not rewritten, and why; with ``site``, that
        it is a site that stays unraised."""
        known = len(self.report.rejections)
        path = module_path(node)
        self.report.reject(pass_name, kind, node.name, path, source(node), condition, hint)
        if site and len(self.report.rejections) > known:
            self.report.add_site(kind, node.name, path, status="rejected", reason=condition)

    def raised(self, kind: str, node: fx.Node) -> None:
        """Record a site that became a dialect op (``node`` is that op)."""
        name = getattr(node.target, "_schema", None)
        op = name.name.split("::")[-1] if name is not None else str(node.target)
        self.report.add_site(kind, node.name, module_path(node), op)

    def moved(self, old: fx.Node, new: fx.Node) -> None:
        """Record that the site of the dialect op ``old`` is now part of ``new``."""
        op = dialect_name(new)
        self.report.sites[:] = [
            replace(s, node=new.name, op=op) if s.node == old.name and s.status == "raised" else s
            for s in self.report.sites
        ]


class Pass(ABC):
    """One rewrite. Subclasses set ``name`` and ``kind`` and give the three steps."""

    name: ClassVar[str]
    kind: ClassVar[str] = "other"
    stage: ClassVar[str] = "raise"
    changes_numerics: ClassVar[bool] = False

    @property
    def finds_sites(self) -> bool:
        """Whether what this pass rejects is a site that stays unraised."""
        return self.name.startswith("raise_") and self.kind in SITE_KINDS

    def enabled(self, ctx: PassContext) -> bool:
        """Whether the options ask for this pass."""
        return self.name not in ctx.options.disable

    @abstractmethod
    def pattern(self, graph: fx.Graph, ctx: PassContext) -> Iterator[Match]:
        """Places that look like a match, partial ones too, in graph order."""

    def check(self, match: Match, ctx: PassContext) -> Problem | None:
        """None if the match may be rewritten, else what stands in the way."""
        return None

    @abstractmethod
    def rewrite(self, match: Match, graph: fx.Graph, ctx: PassContext) -> None:
        """Rewrite a match that passed `check`."""

    def run(self, graph: fx.Graph, ctx: PassContext) -> PassRecord:
        """Find, check, rewrite; record in the report."""
        start = time.perf_counter()
        before = op_counts(graph)
        known = set(graph.nodes)
        found = rewritten = 0
        for match in self.pattern(graph, ctx):
            found += 1
            problem = self.check(match, ctx)
            if problem is None:
                self.rewrite(match, graph, ctx)
                rewritten += 1
            else:
                ctx.reject(
                    self.name,
                    self.kind,
                    problem.node or match.anchor,
                    problem.condition,
                    problem.hint,
                    site=self.finds_sites,
                )
        if rewritten:
            graph.eliminate_dead_code()
        for node in graph.nodes:
            if node not in known:
                node.meta["dspark_pass"] = self.name
        after = op_counts(graph)
        delta = Counter(after)
        delta.subtract(before)
        return ctx.report.add_pass(
            self.name,
            self.stage,
            found,
            rewritten,
            (time.perf_counter() - start) * 1e3,
            {op: n for op, n in sorted(delta.items()) if n},
        )


def dialect(name: str) -> torch._ops.OpOverload:
    """The overload of the dialect op ``name``."""
    return getattr(torch.ops.dspark, name).default
