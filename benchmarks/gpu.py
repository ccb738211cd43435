"""Everything that needs a GPU, unattended: the machine, kernels, whole decode steps.

    python -m benchmarks.gpu [--minutes 7.5] [--only SECTION ...] [--tune SECONDS] [--layers N]
    python -m benchmarks.gpu --smoke           tiny sizes on the CPU: does the code still run?

Writes ``benchmarks/results/gpu.json``, or ``--write-to``'s file, after every section. A section
runs in a process of its own with a budget of its own; one that fails, hangs, does not fit memory or
finds no time left is in the file with the reason, together with the rows it had finished. The order
is that of interest: what comes last is what a short run leaves out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# (section, seconds). A model's sections are "decode MODEL BATCH": a step with a static cache, and
# "generate MODEL BATCH": whole captured decode loops.
SECTIONS = (
    ("machine", 20),
    ("products", 90),
    ("decode_attention", 70),
    ("decode llama-1b 1", 80),
    ("decode qwen3-8b 1", 80),
    ("generate llama-1b 1", 60),
    ("prefill_attention", 25),
    ("experts", 60),
    ("decode qwen3-30b-a3b 1", 80),
    ("gated", 45),
    ("decode qwen3-8b 8", 80),
    ("decode qwen3-8b 64", 80),
    ("generate qwen3-8b 1", 80),
    ("decode llama-1b 8", 80),
    ("decode llama-1b 64", 80),
    ("decode qwen3-30b-a3b 8", 80),
    ("decode qwen3-30b-a3b 64", 80),
)
SMOKE_SECTIONS = (
    "machine", "products", "gated", "decode_attention", "prefill_attention",
    "experts", "decode llama-1b 2", "decode qwen3-30b-a3b 1", "generate llama-1b 2",
)  # fmt: skip
# A child that has not ended by its deadline gets this long to finish the row at hand.
GRACE = 10


def run_section(name: str, seconds: float, into: Path, options: argparse.Namespace) -> None:
    """One section, in this process; rows are written to ``into`` as they come."""
    import torch

    from benchmarks import _gpu_experts, _gpu_kernels, _gpu_models, _gpu_rounds
    from benchmarks._gpu_timing import Bench, describe

    device = torch.device("cpu" if options.smoke else "cuda")
    bench = Bench(device, options.smoke, time.monotonic() + seconds)
    bench.bandwidth, bench.rate = options.bandwidth, options.rate
    torch.manual_seed(0)
    result: dict[str, Any] = {"section": name, "budget_s": seconds, "rows": []}
    started = time.monotonic()
    try:
        if name.startswith("decode "):
            _, model, batch = name.split()
            rows = _gpu_models.decode(bench, model, int(batch), options.layers)
        elif name.startswith("generate "):
            _, model, batch = name.split()
            rows = _gpu_rounds.generate(bench, model, int(batch), options.layers)
        else:
            rows = getattr(_gpu_experts if name == "experts" else _gpu_kernels, name)(bench)
        with torch.no_grad():
            for row in rows:
                result["rows"].append(row)
                result["seconds"] = time.monotonic() - started
                into.write_text(json.dumps(result))
                show(name, row)
    except Exception as error:
        result["skipped"] = describe(error)
    result["seconds"] = time.monotonic() - started
    into.write_text(json.dumps(result))


def show(section: str, row: dict[str, Any]) -> None:
    """One line about a row."""
    plain = (str, int, float)
    keys = {"skipped", "failed", "what", "rows", "batch", "context", "contender", "rate", "tokens"}
    what = " ".join(f"{k}={v}" for k, v in row.items() if k in keys and isinstance(v, plain))
    times = row.get("times") or row.get("step_s") or {}
    if "token_s" in row:
        times = {"token": {"median_s": row["token_s"]}}
    if "wall" in row:
        times = {row["contender"]: row["wall"]}
    figures = "  ".join(f"{n} {t['median_s'] * 1e6:.1f} us" for n, t in times.items())
    print(f"{section:24} {what}  {figures}", flush=True)


def child(
    name: str, seconds: float, options: argparse.Namespace, known: dict[str, float]
) -> dict[str, Any]:
    """One section in a fresh process, ended at its deadline; its rows, whatever became of it."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "rows.json"
        command = [
            *(sys.executable, "-m", "benchmarks.gpu", "--section", name, "--into", str(into)),
            *("--seconds", str(seconds), "--layers", str(options.layers)),
            *("--bandwidth", str(known.get("copy", 0.0)), "--rate", str(known.get("matmul", 0.0))),
            *(["--smoke"] if options.smoke else []),
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        reason = ""
        try:
            _, errors = process.communicate(timeout=seconds + GRACE)
            if process.returncode:
                reason = f"exit status {process.returncode}: {errors.strip()[-500:]}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            reason = f"ended after {seconds + GRACE:.0f} s"
        try:
            result = json.loads(into.read_text())
        except (OSError, ValueError):
            result = {"section": name, "rows": []}
    if reason:
        result["cut_short"] = reason
    return result


def inline(
    name: str, seconds: float, options: argparse.Namespace, known: dict[str, float]
) -> dict[str, Any]:
    """One section in this process: a smoke test cannot afford to import torch seven times."""
    options.bandwidth, options.rate = known.get("copy", 0.0), known.get("matmul", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "rows.json"
        run_section(name, seconds, into, options)
        return json.loads(into.read_text())


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Every section that finds time; writes the file after each."""
    from benchmarks._common import conditions, write

    started = time.monotonic()
    end = started + 60 * options.minutes
    planned = [(name, 600.0) for name in SMOKE_SECTIONS] if options.smoke else list(SECTIONS)
    known: dict[str, float] = {}
    done: list[dict[str, Any]] = []
    payload: dict[str, Any] = {}
    for name, seconds in planned:
        if options.only and name not in (*options.only, "machine"):
            continue
        left = end - time.monotonic() - GRACE
        if left < 5:
            done.append({"section": name, "rows": [], "skipped": "no time left for this section"})
            print(f"{name:24} skipped: no time left", flush=True)
        else:
            # The machine's section stays a process of its own, so that a smoke test starts one.
            start = inline if options.smoke and name != "machine" else child
            done.append(start(name, min(seconds, left), options, known))
        for row in done[-1]["rows"]:
            if name == "machine":
                known[row["what"]] = row["rate"]
        for key in ("skipped", "cut_short"):
            if key in done[-1]:
                print(f"{name:24} {key}: {done[-1][key]}", flush=True)
        payload = {
            "smoke": options.smoke,
            "seconds": time.monotonic() - started,
            "copy_bandwidth": known.get("copy"),
            "matmul_rate": known.get("matmul"),
            "tune_seconds": os.environ.get("DSPARK_TUNE_SECONDS", "0"),
            "sections": done,
        }
        if options.write_to:
            document = {"conditions": conditions(), **payload}
            options.write_to.write_text(json.dumps(document, indent=1) + "\n")
        elif not options.smoke:
            write("gpu", payload)
    return payload


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; those of a child process are not for people."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything together")
    parser.add_argument("--only", nargs="+", default=[], help="sections by name, quoted")
    parser.add_argument("--tune", type=float, default=0, help="DSPARK_TUNE_SECONDS of each section")
    parser.add_argument("--layers", type=int, default=-1, help="of each model; 0 all, -1 a few")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--write-to", type=Path, help="another file; a smoke test writes none else")
    hidden = argparse.SUPPRESS
    parser.add_argument("--section", help=hidden)
    parser.add_argument("--into", type=Path, help=hidden)
    for name in ("--seconds", "--bandwidth", "--rate"):
        parser.add_argument(name, type=float, default=0.0, help=hidden)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and write ``gpu.json``; exit status 2 where there is no GPU."""
    options = parse(arguments)
    if options.smoke:
        # Before Triton is imported: its kernels then run on the CPU, very slowly.
        os.environ["TRITON_INTERPRET"] = "1"
    if options.tune:
        os.environ["DSPARK_TUNE_SECONDS"] = str(options.tune)
    if options.section:
        run_section(options.section, options.seconds, options.into, options)
        return 0
    import torch

    if not options.smoke and not torch.cuda.is_available():
        print("no GPU; --smoke runs tiny sizes on the CPU")
        return 2
    payload = run_all(options)
    return 0 if any(section["rows"] for section in payload["sections"]) else 1


if __name__ == "__main__":
    sys.exit(main())
