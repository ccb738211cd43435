"""An evaluation as an SVG: acceptance by position, and how far confidences can be believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark_compile.training.evaluate import Evaluation

SIDE = 300


def write_svg(evaluation: Evaluation, path: Path) -> None:
    """Write ``path``.

    Raises:
        OSError: it cannot be written.
    """
    path.write_text(render(evaluation), encoding="utf-8")


def render(evaluation: Evaluation) -> str:
    """The SVG's text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    env = Environment(
        loader=PackageLoader("dspark_compile.training", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    length = max(len(evaluation.conditional), 1)
    survival, product = [], 1.0
    for c in evaluation.conditional:
        product *= c
        survival.append(product)
    by_position = {
        "name": "accepted by position",
        "axis": "position in the block",
        "diagonal": False,
        "labels": [{"x": _place(k, length), "text": str(k + 1)} for k in range(length)],
        "lines": [
            _curve("given the prefix, T=0", "#1f77b4", evaluation.conditional, length),
            _curve("whole prefix, T=0", "#d62728", survival, length),
            _curve("probability, T=1", "#2ca02c", evaluation.accept_sampled, length),
        ],
    }
    plots: list[dict[str, Any]] = [by_position]
    if evaluation.reliability:
        lines = []
        for name, colour in (("before", "#ff7f0e"), ("after", "#1f77b4")):
            errors = getattr(evaluation, f"ece_{name}")
            mean = sum(errors) / max(len(errors), 1)
            points = [
                {
                    "x": round(SIDE * p, 1),
                    "y": round(SIDE * (1 - h), 1),
                    "text": f"predicted {p:.3f}, happened {h:.3f}, {n} prefixes",
                }
                for p, h, n in evaluation.reliability[name]
            ]
            label = f"{name} STS: ECE {100 * mean:.1f} %"
            lines.append({"name": label, "colour": colour, "points": points})
        plots.append(
            {
                "name": "predicted and observed survival",
                "axis": "predicted",
                "diagonal": True,
                "labels": [{"x": SIDE * t, "text": t} for t in (0.0, 0.5, 1.0)],
                "lines": lines,
            }
        )
    for i, plot in enumerate(plots):
        plot["x"] = 50 + i * (SIDE + 70)
    told = evaluation.told
    title = (
        f"tau {told(evaluation.tau_greedy)} at T=0 over {evaluation.rounds} rounds, "
        f"{told(evaluation.tau_sampled)} expected at T=1 over {evaluation.anchors} anchors"
    )
    return env.get_template("evaluation.svg.j2").render(
        plots=plots,
        title=title,
        side=SIDE,
        ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
        width=50 + len(plots) * (SIDE + 70),
        height=SIDE + 90,
    )


def _place(k: int, length: int) -> float:
    return round(SIDE * (k + 0.5) / length, 1)


def _curve(name: str, colour: str, values: list[float], length: int) -> dict[str, Any]:
    points = [
        {
            "x": _place(k, length),
            "y": round(SIDE * (1 - min(max(v, 0.0), 1.0)), 1),
            "text": f"{v:.3f}",
        }
        for k, v in enumerate(values)
    ]
    return {"name": name, "colour": colour, "points": points}
