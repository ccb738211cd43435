"""What the compilation ran on: versions, devices, instruction sets, the C++ compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import lru_cache
from importlib import metadata
from typing import Any

from dspark_compile._version import __version__

# Of the hundred flags a CPU has, those that decide which kernel runs.
_ISA_FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme"),
)


def environment() -> dict[str, Any]:
    """Versions, devices and CPU as a plain dict; what cannot be found out is None."""
    import torch

    return {
        "dspark": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices(),
        "cpu": {
            "name": cpu_name(),
            "isa": cpu_isa(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "compiler": compiler_version(),
    }


def devices() -> list[dict[str, Any]]:
    """The accelerators that torch sees; empty on a machine without one."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        props = torch.cuda.get_device_properties(index)
        arch = getattr(props, "gcnArchName", "") if torch.version.hip else ""
        found.append(
            {
                "name": props.name,
                "arch": arch or f"sm_{props.major}{props.minor}",
                "bytes": props.total_memory,
            }
        )
    return found


def package_version(name: str) -> str | None:
    """The installed version of a distribution, without importing it; None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            first = file.read().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_name() -> str:
    """The CPU's model name, as far as the system tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """The CPU's maker as x86 names it (``AuthenticAMD``), or ""."""
    return _cpuinfo().get("vendor_id", "")


def cpu_isa() -> list[str]:
    """The instruction-set flags that matter to kernels; empty where the system lists none."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in _ISA_FLAGS if flag in flags]


@lru_cache(maxsize=1)
def compiler_version() -> str | None:
    """First line of the C++ compiler's ``--version``; None if there is no compiler."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    path = next((p for c in candidates if c and (p := shutil.which(c))), None)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if lines else None
