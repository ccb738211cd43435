"""Compile a function and look at what became of one kind of site: shared by the raise tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}
# Relative to the largest value; the dialect rounds at most as often as eager.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def run(function: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[Any, Any]:
    """``(compiled result, graph report)``, the result checked against eager."""
    with torch.no_grad():
        want = function(*args)
        got = torch.compile(function, backend="dspark", options=OPTIONS, dynamic=dynamic)(*args)
    pairs = zip(
        got if isinstance(got, tuple) else (got,),
        want if isinstance(want, tuple) else (want,),
        strict=True,
    )
    for g, w in pairs:
        assert g.dtype == w.dtype and g.shape == w.shape
        scale = w.abs().max().clamp_min(1e-3).item()
        low = min((t.dtype for t in (g, *args) if torch.is_tensor(t) and t.is_floating_point()),
                  key=lambda d: d.itemsize)  # fmt: skip
        torch.testing.assert_close(
            g.double() / scale, w.double() / scale, atol=TOLERANCE[low], rtol=0
        )
    return got, last_report().graphs[-1]


def raised(
    kind: str, op: str, function: Callable[..., Any], *args: Any, n: int = 1, **kw: Any
) -> GraphReport:
    """Compile: ``n`` sites of ``kind`` became ``op``, and none was rejected."""
    _, graph = run(function, *args, **kw)
    sites = [s for s in graph.sites if s.kind == kind]
    assert [s.status for s in sites] == ["raised"] * n, (sites, graph.rejections)
    assert graph.ops.get(op, 0) == n, graph.ops
    return graph


def rejected(kind: str, reason: str, function: Callable[..., Any], *args: Any) -> GraphReport:
    """Compile: nothing of ``kind`` is raised; exactly one rejection, which gives ``reason``."""
    _, graph = run(function, *args)
    sites = [s for s in graph.sites if s.kind == kind]
    reasons = [r.condition for r in graph.rejections if r.kind == kind]
    assert len(reasons) == 1 and reason in reasons[0], reasons
    assert [s.status for s in sites] == ["rejected"] and reason in sites[0].reason, sites
    return graph


def call(graph: GraphReport, op: str, after: str) -> str:
    """The first printed call of a dialect op after a pass."""
    lines = graph.programs[f"after {after}"].splitlines()
    return next(line for line in lines if f"dspark.{op}." in line)
