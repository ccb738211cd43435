"""Compile every kernel ahead of time, for GPUs that need not be there.

    python -m dspark_compile.kernels.triton.aot [--targets 90 gfx942] [--match TEXT]
                                                [--json benchmarks/results/aot.json]

The cases are launch plans over ``meta`` tensors, the very ones the launchers make: what is
compiled here is what a device would compile at its first call. Each row says what the back end
allotted: registers, spilled registers, shared memory, and the size of the binary. CUDA figures
come from the ``cuobjdump`` that Triton carries, AMD ones from the code object's metadata.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dspark_compile.kernels.triton import attention, cache, norm, rope
from dspark_compile.kernels.triton._launch import KNOWN_TARGETS, Launch, Target

TARGETS = ("80", "90", "100", "120", "gfx942", "gfx950")
CAUSAL = "k <= q + n0"
STATIC = "(k <= t0[q]) & t1[b, k]"
WINDOW = "(k <= q + n0) & (k > q + n0 - 1024)"
# Every construct of the mask language that the others leave out.
MIXED = "(k < 4) | (~(abs(q - k) // n0 % 3 == -1) & (t0[max(q, 1) - k] != t1) & (min(h, b) >= 0))"


@dataclass(frozen=True)
class Case:
    """A named launch for one target."""

    name: str
    launch: Launch


@dataclass(frozen=True)
class Row:
    """What one case became on one target.

    ``spills`` counts vector registers on AMD, bytes of stack on CUDA. ``scalar_spills`` (AMD)
    went to lanes of vector registers, not to memory, and are no fault.
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

    @property
    def good(self) -> bool:
        return not self.error and self.spills == 0 and self.shared <= self.shared_limit


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm_cases() -> Iterator[Case]:
    """Hidden sizes of real models, per-head norms, the largest that is supported."""
    for rows, features in ((1, 1024), (16, 4096), (4096, 4096), (4096, 128), (64, 5376)):
        x, w = _meta(rows, features), _meta(features)
        attributes = (1e-6, 0.0, False, True, None)
        name = f"{rows}x{features}"
        yield Case(f"rms_norm {name}", norm.plan(x, None, w, None, *attributes, centre=False)[0])
        yield Case(f"add_rms_norm {name}", norm.plan(x, x, w, None, *attributes, centre=False)[0])
    for dtype in (torch.float16, torch.float32):
        x, w = _meta(16, 2560, dtype=dtype), _meta(2560, dtype=dtype)
        attributes = (1e-6, 1.0, True, True, None)
        kind = str(dtype).removeprefix("torch.")
        launch = norm.plan(x, x, w, w, *attributes, centre=True)[0]
        yield Case(f"add_layer_norm 16x2560 {kind}", launch)
    x = _meta(16, norm.MAX_FEATURES, dtype=torch.float32)
    launch = norm.plan(x, x, x[0], x[0], 1e-6, 0.0, True, True, None, centre=True)[0]
    yield Case(f"add_layer_norm 16x{norm.MAX_FEATURES} float32", launch)


def rope_cases() -> Iterator[Case]:
    """Decoding and prefill, half-split and interleaved, whole and partial."""
    for count, features, rotary, interleaved, full in (
        (1, 128, 128, False, True),
        (4096, 128, 128, False, True),
        (4096, 80, 32, False, False),
        (512, 64, 64, True, False),
        (512, 256, 256, False, True),
    ):
        x = _meta(1, count, 32, features).transpose(1, 2)
        cos = _meta(1, 1, count, rotary if full else rotary // 2)
        launch = rope.plan(x, cos, cos, rotary, interleaved, False, None)[0]
        style = "interleaved" if interleaved else "half-split"
        yield Case(f"rope {count}x{rotary}/{features} {style}", launch)


def cache_cases() -> Iterator[Case]:
    """The append alone and the whole preparation, exact and int8."""
    for count, features, int8 in (
        (1, 128, False),
        (1, 128, True),
        (16, 256, True),
        (4096, 128, False),
        (4096, 128, True),
        (4096, 80, True),
    ):
        kind = "int8" if int8 else "exact"
        new = _meta(1, count, 8, features).transpose(1, 2)
        query = _meta(1, count, 32, features).transpose(1, 2)
        store = _meta(1, 8, 8192, features, dtype=torch.int8 if int8 else torch.bfloat16)
        scale = _meta(1, 8, 8192) if int8 else None
        positions = _meta(count, dtype=torch.int64)
        launch = cache.plan_append(store, scale, new, positions)
        yield Case(f"cache_append {count}x{features} {kind}", launch)
        weight, cos = _meta(features), _meta(1, count, features)
        launch = cache.plan_prepare(
            query, new, new, weight, weight, cos, cos, store, scale, store, scale, positions,
            1e-6, 0.0, False, True, features, False, False,
        )[0]  # fmt: skip
        yield Case(f"qk_norm_rope_append {count}x{features} {kind}", launch)


def attention_cases(target: Target) -> Iterator[Case]:
    """Every tile size, head size, cache kind and mask form that changes the code."""
    shapes = (
        # (M, Hq, Hkv, D, Dv, dtype, int8)
        (1, 32, 8, 128, 128, torch.bfloat16, False),
        (1, 32, 8, 128, 128, torch.bfloat16, True),
        (8, 32, 8, 128, 128, torch.bfloat16, False),
        (8, 32, 8, 128, 128, torch.bfloat16, True),
        (16, 32, 8, 128, 128, torch.float16, True),
        (16, 64, 8, 64, 64, torch.bfloat16, False),
        (1, 16, 4, 256, 256, torch.bfloat16, False),
        (16, 16, 4, 256, 256, torch.bfloat16, True),
        (1, 16, 16, 192, 128, torch.bfloat16, False),
        (1, 32, 8, 80, 80, torch.float16, True),
        (1, 8, 4, 128, 128, torch.float32, False),
        (8, 8, 2, 128, 128, torch.float32, True),
        (4096, 32, 8, 128, 128, torch.bfloat16, False),
        (4096, 32, 8, 128, 128, torch.bfloat16, True),
        (4096, 64, 8, 64, 64, torch.float16, False),
        (4096, 16, 4, 256, 256, torch.bfloat16, False),
        (4096, 16, 16, 192, 128, torch.bfloat16, False),
        (4096, 8, 4, 128, 128, torch.float32, False),
        (4096, 8, 4, 256, 256, torch.float32, False),
    )
    for shape in shapes:
        yield from _attention(target, "causal", *shape, mask=CAUSAL, ints=[100])
    for shape in (shapes[0], shapes[12]):
        count, heads = shape[0], shape[1]
        tensors = [_meta(count, dtype=torch.int64), _meta(1, 8192, dtype=torch.bool)]
        yield from _attention(
            target, "eager-masked", *shape, mask=STATIC, tensors=tensors, mask_value=-3.4e38
        )
        yield from _attention(target, "window", *shape, mask=WINDOW, ints=[100])
        yield from _attention(
            target, "free, softcap, sinks", *shape, softcap=50.0, sinks=_meta(heads)
        )
        yield from _attention(target, "biased", *shape, bias=_meta(1, 1, count, 8192))
    tensors = [_meta(8192, dtype=torch.int32), _meta(dtype=torch.int64)]
    yield from _attention(
        target, "mixed", *shapes[0], mask=MIXED, tensors=tensors, ints=[7], mask_value=-1.0
    )
    tensors = [_meta(1, dtype=torch.int64), _meta(1, 8192, dtype=torch.bool)]
    yield from _attention(target, "static", *shapes[1], mask=STATIC, tensors=tensors)


def _attention(
    target: Target,
    label: str,
    count: int,
    heads: int,
    kv_heads: int,
    features: int,
    value_features: int,
    dtype: torch.dtype,
    int8: bool,
    *,
    mask: str = "",
    tensors: Iterable[Tensor] = (),
    ints: Iterable[int] = (),
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    mask_value: float | None = None,
) -> Iterator[Case]:
    store = torch.int8 if int8 else dtype
    query = _meta(1, count, heads, features, dtype=dtype).transpose(1, 2)
    key = _meta(1, kv_heads, 8192, features, dtype=store)
    value = _meta(1, kv_heads, 8192, value_features, dtype=store)
    scale = _meta(1, kv_heads, 8192) if int8 else None
    plan = attention.plan(
        query, key, scale, value, scale, bias, sinks, list(tensors), list(ints),
        features**-0.5, mask, softcap, mask_value, target=target,
    )  # fmt: skip
    kind = ("int8 under " if int8 else "") + str(dtype).removeprefix("torch.")
    name = f"M={count} G={heads // kv_heads} D={features}/{value_features} {kind} {label}"
    yield Case(f"attention {name}", plan.launches[0])
    if len(plan.launches) > 1 and label in ("causal", "free, softcap, sinks"):
        yield Case(f"combine {name}", plan.launches[1])


def cases(target: Target) -> list[Case]:
    """Everything to compile for ``target``."""
    return [*norm_cases(), *rope_cases(), *cache_cases(), *attention_cases(target)]


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
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
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


def compile_all(
    targets: Iterable[str] = TARGETS, match: str = "", only: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows for every case whose name contains ``match`` and is in ``only``, if given."""
    for name in targets:
        for case in cases(KNOWN_TARGETS[name]):
            if match in case.name and (not only or case.name in only):
                yield compile_case(case, name)


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
    for row in compile_all(options.targets, options.match, options.only):
        rows.append(row)
        print(
            f"{row.target:7} {row.registers:4} {row.spills:5} {row.scalar_spills:6} "
            f"{row.shared:7} {row.num_warps:2} "
            f"{row.num_stages:2} {row.seconds:5.1f}  {row.case}"
            + (f"  {row.error}" if row.error else "" if row.good else "  <- over"),
            flush=True,
        )
    bad = [row for row in rows if not row.good]
    print(f"{len(rows)} compiled, {len(bad)} failed, spilled or over their shared memory")
    if options.json:
        document: dict[str, Any] = {
            "version": 1,
            "triton": triton.__version__,
            "rows": [asdict(row) for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
