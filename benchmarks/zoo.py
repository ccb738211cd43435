"""The zoo: every causal-LM family of transformers, tiny, through the compiler and compared with
eager mode.

    python benchmarks/zoo.py                                # the rewrites, without Inductor
    python benchmarks/zoo.py --dtype bfloat16 --modes prefill
    python benchmarks/zoo.py --families llama,qwen3 --force
    python benchmarks/zoo.py --families experts --fullgraph --force

Results gather in ``benchmarks/results/zoo.json``; a sweep that was stopped goes on where it was.
``docs/zoo.md`` is written from them after every sweep, or alone by ``--document``. Where a family
needs more than one graph for a mode, Dynamo alone (``backend="eager"``) is run too; its counts
gather in ``tests/zoo/reference.json``, where the tests read them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from zoo.runner import site_counts  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
DOCUMENT = ROOT / "docs" / "zoo.md"
KINDS = ("attention", "norm", "rope", "mlp", "experts")
MODES = ("prefill", "static", "dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--families",
        help="comma-separated; 'experts': those with mixtures of experts; default: all that are "
        "tested",
    )
    parser.add_argument(
        "--fullgraph", action="store_true", help="a graph break is an error, as users ask for it"
    )
    parser.add_argument("--inner", default="eager", choices=["eager", "inductor"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--modes", default=",".join(MODES), help="static_prefill is another")
    parser.add_argument("--timeout", type=float, default=420, help="seconds for one family")
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    parser.add_argument("--document", action="store_true", help="only write docs/zoo.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.document:
        sweep(arguments)
    if arguments.results == RESULTS:
        document(read(arguments.results))


def sweep(arguments: argparse.Namespace) -> None:
    import torch
    import transformers
    from zoo import families, runner

    chosen = families.tested()
    if arguments.families == "experts":
        chosen = [family for family in chosen if families.has_experts(family)]
    elif arguments.families:
        chosen = arguments.families.split(",")
    modes = tuple(arguments.modes.split(","))
    options = {"inner": arguments.inner}
    key = f"dspark-{arguments.inner}/{arguments.dtype}"
    runner.warm(options=options)
    for family in chosen:
        results = read(arguments.results)
        done = results["runs"].setdefault(key, {})
        before = done.get(family, {})
        missing = [m for m in modes if arguments.force or m not in before.get("modes", {})]
        if not missing:
            continue
        start = time.perf_counter()
        result = runner.run_guarded(
            family,
            arguments.timeout,
            options=options,
            dtype=getattr(torch, arguments.dtype),
            modes=tuple(missing),
            fullgraph=arguments.fullgraph,
        )
        for mode, entry in result.get("modes", {}).items():
            if entry["status"] == "ran":
                dtype = getattr(torch, arguments.dtype)
                entry["dynamo"] = runner.reference_counts(family, mode, entry, dtype)
        if "modes" in result and "modes" in before:
            result["modes"] = {**before["modes"], **result["modes"]}
        done[family] = result
        results["environment"] = {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }
        results["excluded"] = dict(sorted(families.EXCLUDED.items()))
        results["aliases"] = dict(sorted(families.aliases().items()))
        write(arguments.results, results)
        runner.keep_counts()
        print(f"{family:24} {time.perf_counter() - start:6.1f} s  {brief(result)}", flush=True)


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {"runs": {}, "environment": {}, "excluded": {}, "aliases": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def brief(result: dict[str, Any]) -> str:
    """One line about a family: error and graphs by mode, sites raised of expected."""
    if "failure" in result:
        return f"FAILURE {result['failure']}"
    parts = []
    for mode, entry in result["modes"].items():
        if entry["status"] == "ran":
            mark = "" if good(entry) else " BAD"
            parts.append(f"{mode} {entry['error']:.0e}{mark} g{entry['graphs']}")
            parts += [f"FALLBACK {reason}" for reason in entry.get("fallbacks", [])]
        else:
            parts.append(f"{mode} {entry['status']}: {entry['reason'][:90]}")
    for kind, (have, want) in site_counts(result).items():
        if want:
            parts.append(f"{kind} {have}/{want}{' MISS' if have < want else ''}")
    return "; ".join(parts)


def reasons(result: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    """(kind, condition, source line) of what was not raised, for kinds with sites missing."""
    missing = {kind for kind, (have, want) in site_counts(result).items() if have < want}
    found: dict[tuple[str, str, str], int] = {}
    for entry in result.get("modes", {}).values():
        for r in entry.get("rejections", []):
            if r["kind"] in missing and r["pass"].startswith(("raise_", "audit")):
                line = r["source"].split(" in ")[0]
                key = (r["kind"], r["condition"], line)
                found[key] = found.get(key, 0) + 1
    return found


def good(entry: dict[str, Any]) -> bool:
    """Exact, or as near to float32 as eager mode in the model's dtype is."""
    if entry["status"] != "ran":
        return entry["status"] == "unsupported"
    if "eager_error" in entry:
        return entry["error"] <= 2 * entry["eager_error"] + 5e-3
    return entry["error"] <= 1e-5


def document(results: dict[str, Any]) -> None:
    """Write docs/zoo.md."""
    from zoo.gaps import GUARDED_BY_TRACING, KNOWN_GAPS

    runs = results["runs"]
    ours = runs.get("dspark-eager/float32", {})
    half = runs.get("dspark-eager/bfloat16", {})
    env = results.get("environment", {})
    lines = [
        "# The zoo: causal-LM families of transformers",
        "",
        f"Written by `benchmarks/zoo.py` (torch {env.get('torch')}, transformers "
        f"{env.get('transformers')}); the numbers are in `benchmarks/results/zoo.json`. Each "
        "family is built tiny from its config, with random parameters, and its logits are "
        "compared with eager mode:",
        "",
        "- *prefill*: 9 tokens without a cache",
        "- *static*, *dynamic*: three decode steps over a `StaticCache` or a `DynamicCache`",
        "- *bf16*: the prefill in bfloat16; its error against float32 arithmetic on the same "
        "weights, and that of eager bfloat16",
        "",
        "An error is max |a - b| / max |b|, in float32 unless said. *no* is what eager mode itself "
        "cannot do, – what was not run. Graphs are those of all float32 modes, ours and those of "
        "Dynamo alone, which every back end shares; where one is all that we need, Dynamo was not "
        "run alone and has at least as many (≥). Sites are those of all float32 modes: raised, "
        "of those that hooks count in eager mode without the compiler. Where Dynamo breaks a "
        "graph, layers share graphs and some code reaches no back end; then the sites are those "
        "that it saw. A sweep goes on where it was stopped: rows may come from different "
        "revisions of the code.",
        "",
        *totals(ours, half),
        "",
        "| family | prefill | static | dynamic | bf16 (eager) | graphs (Dynamo) | attention | norm "
        "| RoPE | MLP | experts |",
        "|" + "---|" * 11,
    ]
    for family in sorted(ours):
        result = ours[family]
        cells = [mode_cell(result.get("modes", {}).get(mode)) for mode in MODES]
        cells.append(half_cell(half.get(family, {}).get("modes", {}).get("prefill")))
        cells.append(graphs(result))
        for have, want in site_counts(result).values():
            cell = f"{have}/{want}" if want else "–"
            cells.append(f"**{cell}**" if have < want else cell)
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", "## Sites that are not raised", ""]
    for family in sorted(ours):
        for kind, (have, want) in site_counts(ours[family]).items():
            if have == want:
                continue
            known = KNOWN_GAPS.get((family, kind))
            lines.append(
                f"- {family}, {want - have} of {want} {kind}" + (f": {known}" if known else "")
            )
            for (other, condition, line), count in reasons(ours[family]).items():
                if other == kind:
                    lines.append(f"    - {count} × {condition} (`{line}`)")
    lines += ["", "## Compared with AOTAutograd, not Dynamo alone", ""]
    lines += [f"- {family}: {why}" for family, why in GUARDED_BY_TRACING.items()]
    lines += ["", "## What eager mode cannot do", ""]
    for family in sorted(ours):
        for mode, entry in ours[family].get("modes", {}).items():
            if entry["status"] == "unsupported":
                lines.append(f"- {family}, {mode}: {entry['reason'].removeprefix('eager: ')[:160]}")
            elif "note" in entry:
                lines.append(f"- {family}, {mode} (a note): {entry['note']}")
    lines += ["", "## Excluded", ""]
    lines += [f"- {family}: {reason}" for family, reason in results.get("excluded", {}).items()]
    lines += ["", "## The same classes as another family", ""]
    lines += [f"- {family}: {other}" for family, other in results.get("aliases", {}).items()]
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def totals(ours: dict[str, Any], half: dict[str, Any]) -> list[str]:
    ran = {f: r for f, r in ours.items() if "modes" in r}
    exact = [f for f, r in ran.items() if all(good(e) for e in r["modes"].values())]
    inexact = sorted(set(ours) - set(exact))
    lines = [
        f"- {len(ours)} families; {len(exact)} within 1e-5 in every mode that was run"
        + (f"; not: {', '.join(inexact)}" if inexact else "")
    ]
    for mode in MODES:
        able = [r for r in ran.values() if r["modes"].get(mode, {}).get("status") == "ran"]
        lines.append(f"    - {mode.replace('_', ' ')}: {len(able)} families")
    near = {f: r["modes"]["prefill"] for f, r in half.items() if "prefill" in r.get("modes", {})}
    if near:
        off = sorted(f for f, entry in near.items() if not good(entry))
        lines.append(
            f"- bfloat16: {len(near) - len(off)} of {len(near)} with an error of at most twice "
            "that of eager mode plus 5e-3" + (f"; not: {', '.join(off)}" if off else "")
        )
    more = [
        f
        for f, r in ran.items()
        for e in r["modes"].values()
        if e["status"] == "ran" and any(a > b for a, b in zip(counted(e), e["dynamo"], strict=True))
    ]
    lines.append(
        f"- {len(more)} with more graphs or recompiles than Dynamo alone"
        + (f": {', '.join(more)}" if more else "")
    )
    whole = {f: [e for e in r["modes"].values() if e["status"] == "ran"] for f, r in ran.items()}
    whole = {f: entries for f, entries in whole.items() if entries}
    asked = [f for f, entries in whole.items() if all(e.get("fullgraph") for e in entries)]
    lines.append(f"- {len(asked)} compiled with `fullgraph=True` in every mode that ran")
    fell = [f for f, r in ran.items() if any(e.get("fallbacks") for e in r["modes"].values())]
    lines.append(
        f"- {len(fell)} with a graph that was handed on unchanged"
        + (f": {', '.join(fell)}" if fell else "")
    )
    for kind in KINDS:
        counts = {f: site_counts(r)[kind] for f, r in ran.items()}
        have, want = (sum(c[i] for c in counts.values()) for i in (0, 1))
        with_kind = {f: c for f, c in counts.items() if c[1]}
        full = [f for f, c in with_kind.items() if c[0] >= 0.95 * c[1]]
        share = f"{100 * have / want:.1f} %" if want else "–"
        lines.append(
            f"- {kind}: {have} of {want} sites raised ({share}); {len(full)} of {len(with_kind)} "
            "families at 95 % or more"
        )
    return lines


def graphs(result: dict[str, Any]) -> str:
    """Graphs over the modes that ran: ours, Dynamo's alone. Where one is all that we need, Dynamo
    alone was not run: it has one at least."""
    entries = [e for e in result.get("modes", {}).values() if e["status"] == "ran"]
    ours, alone = sum(e["graphs"] for e in entries), sum(e["dynamo"][0] for e in entries)
    least = any(counted(e) == [1, 0, 0] for e in entries)
    return f"{ours} ({'≥ ' if least else ''}{alone})"


def counted(entry: dict[str, Any]) -> list[int]:
    """Graphs, recompiles and breaks of one mode."""
    return [entry[name] for name in ("graphs", "recompiles", "graph_breaks")]


def mode_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if entry["status"] == "ran":
        text = f"{entry['error']:.0e}"
        return text if good(entry) else f"**{text}**"
    return "no" if entry["status"] == "unsupported" else "**error**"


def half_cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["status"] != "ran" or "eager_error" not in entry:
        return "–"
    text = f"{entry['error']:.0e} ({entry['eager_error']:.0e})"
    return text if good(entry) else f"**{text}**"


if __name__ == "__main__":
    main()
