"""The zoo: every causal-LM family of transformers, tiny, through the compiler and compared with
eager mode.

    python benchmarks/zoo.py --backend eager                # graphs and recompiles of Dynamo alone
    python benchmarks/zoo.py                                # dspark's rewrites, without Inductor
    python benchmarks/zoo.py --dtype bfloat16 --modes prefill
    python benchmarks/zoo.py --families llama,qwen3 --force

Results gather in ``benchmarks/results/zoo.json``; a sweep that was stopped goes on where it was.
``docs/zoo.md`` is written from them after every sweep, or alone by ``--document``. The counts of
``--backend eager`` gather in ``tests/zoo/reference.json``, where the tests read them too.
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

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
DOCUMENT = ROOT / "docs" / "zoo.md"
KINDS = ("attention", "norm", "rope", "mlp")
MODES = ("prefill", "static", "dynamic", "static_prefill")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", help="comma-separated; default: all that are tested")
    parser.add_argument("--backend", default="dspark", choices=["dspark", "inductor", "eager"])
    parser.add_argument("--inner", default="eager", choices=["eager", "inductor"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--modes", default=",".join(MODES))
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

    chosen = arguments.families.split(",") if arguments.families else families.tested()
    modes = tuple(arguments.modes.split(","))
    options = {"inner": arguments.inner} if arguments.backend == "dspark" else None
    key = run_key(arguments.backend, arguments.inner, arguments.dtype)
    runner.warm(arguments.backend, options)
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
            backend=arguments.backend,
            options=options,
            dtype=getattr(torch, arguments.dtype),
            modes=tuple(missing),
        )
        if "modes" in result and "modes" in before:
            result["modes"] = {**before["modes"], **result["modes"]}
        done[family] = result
        results["environment"] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        results["excluded"] = dict(sorted(families.EXCLUDED.items()))
        results["aliases"] = dict(sorted(families.aliases().items()))
        if arguments.backend == "eager":
            keep_reference(runner, family, result)
        else:
            write(arguments.results, results)
        print(f"{family:24} {time.perf_counter() - start:6.1f} s  {brief(result)}", flush=True)


def keep_reference(runner: Any, family: str, result: dict[str, Any]) -> None:
    """The counts of Dynamo alone into the tests' file."""
    path = runner.REFERENCE
    kept = json.loads(path.read_text()) if path.exists() else {}
    mine = kept.setdefault(runner.versions(), {}).setdefault(family, {})
    for mode, entry in result.get("modes", {}).items():
        if entry["status"] == "ran":
            mine[mode] = [entry[name] for name in runner.COUNTS]
    text = json.dumps(kept, indent=None, sort_keys=True)
    path.write_text(text.replace("}, ", "},\n") + "\n")


def run_key(backend: str, inner: str, dtype: str) -> str:
    return f"{backend}-{inner}/{dtype}" if backend == "dspark" else f"{backend}/{dtype}"


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
            parts.append(f"{mode} {entry['error']:.1e} g{entry['graphs']}")
        else:
            parts.append(f"{mode} {entry['status']}: {entry['reason'][:90]}")
    sites = [f"{kind} {have}/{want}" for kind, (have, want) in site_counts(result).items() if want]
    return "; ".join(parts + sites)


def site_counts(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """By kind: sites raised and expected, over the modes that ran."""
    counts = {}
    for kind in KINDS:
        have = want = 0
        for entry in result.get("modes", {}).values():
            if entry["status"] == "ran":
                have += entry.get("raised", {}).get(kind, 0)
                want += entry["expected"].get(kind, 0)
        counts[kind] = (have, want)
    return counts


def first_reasons(result: dict[str, Any], limit: int = 2) -> str:
    """What stopped the first sites, each with its source line."""
    counts = site_counts(result)
    missing = {kind for kind, (have, want) in counts.items() if have < 0.95 * want}
    found: dict[str, None] = {}
    for entry in result.get("modes", {}).values():
        for rejection in entry.get("rejections", []):
            if rejection["kind"] in missing:
                line = rejection["source"].rsplit("/", 1)[-1].split(" in ")[0]
                found.setdefault(f"{rejection['kind']}: {rejection['condition']} ({line})")
        for fallback in entry.get("fallbacks", []):
            found.setdefault(fallback)
    return "; ".join(list(found)[:limit]).replace("|", "\\|").replace("\n", " ")


def document(results: dict[str, Any]) -> None:
    key = next((k for k in results["runs"] if k.startswith("dspark")), None)
    reference = results["runs"].get(f"{REFERENCE}/float32", {})
    ours = results["runs"].get(key, {}) if key else {}
    families = sorted(set(reference) | set(ours))
    env = results.get("environment", {})
    lines = [
        "# The zoo: causal-LM families of transformers",
        "",
        f"Written by `benchmarks/zoo.py` (torch {env.get('torch')}, transformers "
        f"{env.get('transformers')}). Each family is built tiny from its config, with random "
        "parameters, and compared with eager mode in float32: one prefill without cache, then a "
        "prefill and three decode steps over a `StaticCache` and over a `DynamicCache`. Errors are "
        "max |a - b| / max |b| of the logits. Graphs are those of all three modes, ours and those "
        f"of `{REFERENCE}`, which shares Inductor's front end. Expected sites are counted in eager "
        "mode by hooks, without the compiler.",
        "",
        *totals(families, ours, reference),
        "",
        "| family | prefill | static | dynamic | graphs (ours/ref) | attention | norm | RoPE | MLP "
        "| not raised because |",
        "|" + "---|" * 10,
    ]
    for family in families:
        result = ours.get(family) or {}
        base = reference.get(family) or {}
        shown = result if "modes" in result else base
        cells = [mode_cell(shown.get("modes", {}).get(mode)) for mode in MODES]
        counts = site_counts(result)
        sites = [f"{have}/{want}" if want else "–" for have, want in counts.values()]
        why = result.get("failure") or base.get("failure") or first_reasons(result)
        graphs = f"{graph_count(result)}/{graph_count(base)}"
        lines.append(f"| {family} | {' | '.join(cells)} | {graphs} | {' | '.join(sites)} | {why} |")
    lines += ["", "Unsupported modes (what eager mode itself cannot do):", ""]
    for family in families:
        modes = (ours.get(family) or reference.get(family) or {}).get("modes", {})
        for mode, entry in modes.items():
            if entry["status"] == "unsupported":
                lines.append(f"- {family}, {mode}: {entry['reason'][:200]}")
    lines += ["", "Excluded:", ""]
    lines += [f"- {family}: {reason}" for family, reason in results.get("excluded", {}).items()]
    lines += ["", "The same classes as another family:", ""]
    lines += [f"- {family}: {other}" for family, other in results.get("aliases", {}).items()]
    DOCUMENT.parent.mkdir(parents=True, exist_ok=True)
    DOCUMENT.write_text("\n".join(lines) + "\n")


def totals(families: list[str], ours: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    ran = [f for f in families if "modes" in ours.get(f, {})]
    exact = [f for f in ran if all(good(e) for e in ours[f]["modes"].values())]
    more = [
        f
        for f in ran
        if "modes" in reference.get(f, {}) and graph_count(ours[f]) > graph_count(reference[f])
    ]
    lines = [
        f"- {len(families)} families run, {len(exact)} of them within 1e-5 in all supported modes",
        f"- {len(more)} with more graphs than the reference"
        + (f": {', '.join(more)}" if more else ""),
    ]
    for kind in KINDS:
        have = sum(min(*site_counts(ours[f])[kind]) for f in ran)
        want = sum(site_counts(ours[f])[kind][1] for f in ran)
        with_kind = [f for f in ran if site_counts(ours[f])[kind][1]]
        full = [
            f
            for f in with_kind
            if site_counts(ours[f])[kind][0] >= 0.95 * site_counts(ours[f])[kind][1]
        ]
        share = f"{100 * have / want:.1f} %" if want else "–"
        lines.append(
            f"- {kind}: {have} of {want} sites raised ({share}); {len(full)} of {len(with_kind)} "
            "families at 95 % or more"
        )
    return lines


def good(entry: dict[str, Any]) -> bool:
    return entry["status"] == "unsupported" or (entry["status"] == "ran" and entry["error"] <= 1e-5)


def graph_count(result: dict[str, Any]) -> int:
    return sum(entry.get("graphs", 0) for entry in result.get("modes", {}).values())


def mode_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    if entry["status"] == "ran":
        return f"{entry['error']:.0e}"
    return "no" if entry["status"] == "unsupported" else "**error**"


if __name__ == "__main__":
    main()
