"""Compile every kernel ahead of time, for GPUs that need not be there.

    python -m dspark_compile.kernels.triton.aot [--targets 90 gfx942] [--match TEXT]
                                                [--json benchmarks/results/aot.json]

The cases are launch plans over ``meta`` tensors, the very ones the launchers make: what is
compiled here is what a device would compile at its first call. Each row says what the back end
allotted: registers, spilled registers, shared memory, and the size of the binary. CUDA figures
come from the ``cuobjdump`` that Triton carries, AMD ones from the code object's metadata.

With ``--json``, rows of that file whose kernel, signature and options are still the same are kept
and not compiled again: the table can be made in pieces, and after an interruption.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark_compile.codegen.triton.source import write_source
from dspark_compile.kernels.triton._launch import KNOWN_TARGETS, Launch
from dspark_compile.kernels.triton.aot_cases import Case, cases

TARGETS = ("80", "90", "100", "120", "gfx942", "gfx950")


@dataclass(frozen=True)
class Row:
    """What one case became on one target.

    ``spills`` counts vector registers on AMD, bytes of stack on CUDA. ``scalar_spills`` (AMD)
    went to lanes of vector registers, not to memory, and are no fault. ``key`` names what was
    compiled: the same key, the same row.
    """

    case: str
    target: str
    registers: int
    spills: int
    scalar_spills: int
    shared: int
    shared_limit: int
    num_warps: int
    num_stages: int
    binary_bytes: int
    seconds: float
    error: str = ""
    key: str = ""

    @property
    def good(self) -> bool:
        return not self.error and self.spills == 0 and self.shared <= self.shared_limit


def _options(launch: Launch) -> dict[str, Any]:
    pdl = {"launch_pdl": True} if launch.pdl else {}
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **pdl}


def key_of(case: Case, target_name: str) -> str:
    """A hash of all that the compiler sees: source, signature, options, target, version."""
    launch = case.launch
    what = (
        *(target_name, triton.__version__, launch.kernel.cache_key),
        *(sorted(map(str, part.items())) for part in launch.specialise()),
        sorted(_options(launch).items()),
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def compile_case(case: Case, target_name: str) -> Row:
    """Compile one case and read what it takes; an error becomes a row."""
    target = KNOWN_TARGETS[target_name]
    launch = case.launch
    started = time.perf_counter()
    registers = spills = scalar_spills = shared = size = 0
    error = ""
    try:
        signature, constants, attributes = launch.specialise()
        source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp),
            options=_options(launch),
        )
        shared = compiled.metadata.shared
        if target.backend == "cuda":
            registers, spills = cubin_usage(compiled.asm["cubin"])
            size = len(compiled.asm["cubin"])
        else:
            registers, spills, scalar_spills = amdgcn_usage(compiled.asm["amdgcn"])
            size = len(compiled.asm["hsaco"])
    except Exception as failure:
        error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1:]}"
    return Row(
        case.name, target_name, registers, spills, scalar_spills, shared, target.shared,
        launch.num_warps, launch.num_stages, size, round(time.perf_counter() - started, 2), error,
        key_of(case, target_name),
    )  # fmt: skip


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """``(registers a thread, bytes of stack)`` of the largest function of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise ValueError(f"cuobjdump printed no resource usage: {text!r}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def amdgcn_usage(text: str) -> tuple[int, int, int]:
    """``(registers, spills, scalar spills)`` from an AMD code object's metadata."""

    def largest(name: str) -> int:
        return max((int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)

    return largest("vgpr_count"), largest("vgpr_spill_count"), largest("sgpr_spill_count")


@functools.lru_cache(maxsize=len(KNOWN_TARGETS))
def _cases(target_name: str) -> tuple[Case, ...]:
    return tuple(cases(KNOWN_TARGETS[target_name]))


def compile_all(
    targets: Iterable[str] = TARGETS,
    match: str = "",
    only: Sequence[str] = (),
    known: Mapping[tuple[str, str], Row] | None = None,
) -> Iterator[Row]:
    """Rows for every case whose name contains ``match`` and is in ``only``, if given.

    A row of ``known``, by target and case, stands in for its case.
    """
    for name in targets:
        for case in _cases(name):
            if match in case.name and (not only or case.name in only):
                yield (known or {}).get((name, case.name)) or compile_case(case, name)


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """Rows of an earlier table that compiling again would repeat, by target and case."""
    if not path.exists():
        return {}
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    keys = {
        (target, case.name): key_of(case, target)
        for target in {row.target for row in rows}
        for case in _cases(target)
    }
    return {
        (row.target, row.case): row
        for row in rows
        if not row.error and keys.get((row.target, row.case)) == row.key
    }


def write_rows(path: Path, rows: Mapping[tuple[str, str], Row]) -> None:
    """The table, in the order of targets and cases."""
    document = {
        "version": 1,
        "triton": triton.__version__,
        "rows": [
            asdict(rows[target, case.name])
            for target in KNOWN_TARGETS
            if any(t == target for t, _ in rows)
            for case in _cases(target)
            if (target, case.name) in rows
        ],
    }
    write_source(path, json.dumps(document, indent=1) + "\n")


def summary(rows: Iterable[Row]) -> str:
    """A table by target, as Markdown."""
    lines = [
        "| target | compiled | failed | spill | most registers | most shared memory (limit) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_target: dict[str, list[Row]] = {}
    for row in rows:
        by_target.setdefault(row.target, []).append(row)
    for target, own in by_target.items():
        done = [row for row in own if not row.error]
        lines.append(
            f"| {target} | {len(done)} | {len(own) - len(done)} "
            f"| {sum(row.spills > 0 for row in done)} "
            f"| {max((row.registers for row in done), default=0)} "
            f"| {max((row.shared for row in done), default=0)} ({own[0].shared_limit}) |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; exit status 1 if anything failed, spilled or asked for too much."""
    parser = argparse.ArgumentParser(prog="aot", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=KNOWN_TARGETS)
    parser.add_argument("--match", default="", help="cases whose name contains this")
    parser.add_argument("--only", nargs="+", default=[], help="cases of these names")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    header = (
        f"{'target':7} {'regs':>4} {'spill':>5} {'shared':>7} {'w':>2} {'st':>2} {'s':>5}  case"
    )
    print(header, flush=True)
    rows: list[Row] = []
    known = read_rows(options.json) if options.json else {}
    for row in compile_all(options.targets, options.match, options.only, known):
        rows.append(row)
        if options.json and (row.target, row.case) not in known:
            known[row.target, row.case] = row
            write_rows(options.json, known)
        print(
            f"{row.target:7} {row.registers:4} {row.spills:5} {row.scalar_spills:6} "
            f"{row.shared:7} {row.num_warps:2} "
            f"{row.num_stages:2} {row.seconds:5.1f}  {row.case}"
            + (f"  {row.error}" if row.error else "" if row.good else "  <- over"),
            flush=True,
        )
    bad = [row for row in rows if not row.good]
    print(summary(rows))
    print(f"{len(rows)} compiled, {len(bad)} failed, spilled or over their shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
