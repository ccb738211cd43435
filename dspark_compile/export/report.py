"""What an export did: dialect op to ONNX op, what fell back, how close the graph is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from .verify import Check


@dataclass
class ExportReport:
    """The result of `export_onnx`.

    Attributes:
        path: the model file, or the genai folder.
        options: what was asked for, defaults filled in.
        nodes: how often each ONNX op is in the graph; contrib ops with their domain.
        translations: for each dialect op, the ONNX ops that it became, with counts.
        fallbacks: ``(op and node, reason)`` of what has no form of its own in this target.
        checks: the compared cases.
        inputs, outputs: the graph's names.
        passes: ``(pass, rewritten)`` of the passes that changed something.
        rejections: ``(module, condition, hint)`` of what the passes left alone.
        seconds: by stage.
    """

    path: str
    options: dict[str, Any]
    nodes: dict[str, int] = field(default_factory=dict)
    translations: dict[str, dict[str, int]] = field(default_factory=dict)
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    passes: list[tuple[str, int]] = field(default_factory=list)
    rejections: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph, functions not looked into."""
        return sum(self.nodes.values())

    @property
    def error(self) -> float:
        """The largest error of the compared cases; NaN if none was compared."""
        return max((c.error for c in self.checks), default=float("nan"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": 1, **asdict(self)}

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The report as JSON; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, default=str)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def print(self) -> None:
        """In the terminal."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        console.print(
            f"[bold]{self.path}[/]: target {self.options['target']}, opset "
            f"{self.options['opset']}, {self.num_nodes} nodes"
        )
        table = Table("dialect op", "ONNX ops", box=None, pad_edge=False)
        for name, ops in self.translations.items():
            table.add_row(name, ", ".join(f"{op} × {n}" for op, n in ops.items()))
        console.print(table)
        reasons = Counter((w.split(" at ")[0], reason) for w, reason in self.fallbacks)
        for (what, reason), count in reasons.items():
            console.print(f"[yellow]{what}[/] × {count}: {reason}", highlight=False)
        for check in self.checks:
            console.print(f"{check.case}: error {check.error:.1e}", highlight=False)
        if not self.checks:
            console.print("[yellow]not compared with the model[/]")


def counts(model: Any) -> dict[str, int]:
    """Ops of an ``onnx_ir`` model's graph by name."""
    found = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph)
    return dict(sorted(found.items()))


def translations(model: Any) -> dict[str, dict[str, int]]:
    """For each dialect op, what it became."""
    found: dict[str, Counter[str]] = {}
    for node in model.graph:
        name = node.metadata_props.get("dspark.op", "")
        if name.startswith("dspark::"):
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            found.setdefault(name, Counter())[op] += 1
    return {name: dict(ops) for name, ops in sorted(found.items())}
