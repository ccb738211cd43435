"""Instruction sets that kernels are emitted for, and the compiler flags of each.

The headers in ``kernels/cpp`` choose by the compiler's own macros (``__AMX_BF16__`` …), so
a level is no more than a set of flags. `detect` gives the best one this CPU has;
``$DSPARK_CPU_ISA`` takes a lesser one.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VNNI = (*_AVX512, "-mavx512vnni")

# Best first: name -> (CPU flags that must be there, compiler flags).
LEVELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "amx": (
        ("avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    ),
    "avx512_bf16": (
        ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        (*_VNNI, "-mavx512bf16"),
    ),
    "avx512_vnni": (("avx512f", "avx512bw", "avx512vl", "avx512_vnni"), _VNNI),
    "avx512": (("avx512f", "avx512bw", "avx512vl"), _AVX512),
    "avx2": (("avx2", "fma", "f16c"), _AVX2),
    "portable": ((), ()),
}


@functools.lru_cache(maxsize=1)
def available() -> tuple[str, ...]:
    """The levels that this CPU can run, best first."""
    from dspark_compile.diagnostics.environment import cpu_isa

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    has = set(cpu_isa()) if x86 else set()
    found = [name for name, (needs, _) in LEVELS.items() if has.issuperset(needs)]
    if "amx" in found and not _tiles_allowed():
        found.remove("amx")
    return tuple(found)


def _tiles_allowed() -> bool:
    """Ask Linux for the tile registers, which a process must before it touches them."""
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    except (OSError, AttributeError):
        return False


def detect() -> str:
    """The level to emit for.

    Raises:
        ValueError: ``$DSPARK_CPU_ISA`` names no level that this CPU has.
    """
    return _chosen(os.environ.get("DSPARK_CPU_ISA", ""))


@functools.lru_cache(maxsize=8)
def _chosen(wanted: str) -> str:
    levels = available()
    if not wanted:
        return levels[0]
    if wanted not in levels:
        raise ValueError(f"DSPARK_CPU_ISA={wanted!r} is not one of {', '.join(levels)}")
    return wanted


# How kernels read memory -> what the compiler is told.
READING: dict[str, tuple[str, ...]] = {"runs": (), "sequence": ("-DDSPARK_SEQUENCE",)}


def reading() -> str:
    """How this CPU likes to read what comes from memory; ``$DSPARK_CPU_READ`` takes the other way.

    ``runs``: as several runs side by side with prefetches between the instructions, since the
    hardware's own prefetch stops at every page (Intel). ``sequence``: long sequential readers
    left alone, since the hardware's own does better (AMD).

    Raises:
        ValueError: ``$DSPARK_CPU_READ`` is neither.
    """
    wanted = os.environ.get("DSPARK_CPU_READ", "")
    if not wanted:
        from dspark_compile.diagnostics.environment import cpu_vendor

        return "sequence" if cpu_vendor() == "AuthenticAMD" else "runs"
    if wanted not in READING:
        raise ValueError(f"DSPARK_CPU_READ={wanted!r} is not one of {', '.join(READING)}")
    return wanted


def flags(level: str) -> tuple[str, ...]:
    """Compiler flags of a level, for this CPU."""
    return (*LEVELS[level][1], *READING[reading()])
