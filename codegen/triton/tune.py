"""Measured choices of tile sizes, made at first use within a budget and kept on disk.

``DSPARK_TUNE_SECONDS`` is the time that one process may spend on measuring; the default, 0, is
none. What has been measured is kept in ``$DSPARK_CACHE_DIR/tune`` (``~/.cache/dspark/tune``), one
file for each device name, version of Triton and version of dspark, and is used by every later
process, whatever its budget. Where nothing is known, the cost model's choice stands.

A choice may change the order of summation, and so the last bits of a result, between a process
that knows it and one that does not; within a process it never changes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dspark_compile._version import __version__
from dspark_compile.codegen.triton.source import cache_directory, write_source

log = logging.getLogger("dspark_compile")
Config = TypeVar("Config")

VERSION = 1
ROUNDS = 5
_spent = 0.0
_settled: dict[tuple[str, str, str], Any] = {}


def budget() -> float:
    """Seconds that this process may still spend on measuring.

    Raises:
        ValueError: ``DSPARK_TUNE_SECONDS`` is not a number.
    """
    text = os.environ.get("DSPARK_TUNE_SECONDS") or "0"
    try:
        return float(text) - _spent
    except ValueError:
        raise ValueError(f"DSPARK_TUNE_SECONDS={text!r} is not a number of seconds") from None


@functools.lru_cache(maxsize=16)
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def table_path(device_name: str) -> Path:
    """The file of measured choices for a device."""
    import triton

    slug = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    name = f"{slug}_triton-{triton.__version__}_dspark-{__version__}.json"
    return cache_directory().parent / "tune" / name


def read_table(path: Path) -> dict[str, dict[str, Any]]:
    """Measured choices by key; empty if there is no readable file of this version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return dict(document["choices"]) if document.get("version") == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def keep(path: Path, device_name: str, key: str, entry: dict[str, Any]) -> None:
    """Add one choice to a table. Readers see the old file or the new one, never a part."""
    document = {
        "version": VERSION,
        "device": device_name,
        "choices": {**read_table(path), key: entry},
    }
    write_source(path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def pick(
    op: str,
    key: str,
    default: Config,
    candidates: Callable[[], Sequence[Config]],
    build: Callable[[Config], Callable[[], Any]],
    device: torch.device,
) -> Config:
    """The configuration to run: measured before, measured now if the budget allows, or ``default``.

    Args:
        op, key: name the choice. Configurations are dataclasses of plain numbers.
        candidates: what may be run.
        build: makes a function that runs one configuration on the caller's operands; running it
            must not change them.
        device: only CUDA and ROCm devices have measured choices.
    """
    if device.type != "cuda":
        return default
    name = _device_name(device.index)
    known = _settled.get((name, op, key))
    if known is not None:
        return known
    path = table_path(name)
    entry = read_table(path).get(f"{op} {key}")
    choice = None if entry is None else _restore(entry.get("config"), default, candidates())
    if choice is None and budget() > 0 and not torch.cuda.is_current_stream_capturing():
        choice = measure(op, key, default, candidates(), build, device, path)
    # The model's choice is settled too: a result must not change its last bits half-way.
    choice = default if choice is None else choice
    _settled[name, op, key] = choice
    return choice


def _restore(fields: Any, default: Config, legal: Sequence[Config]) -> Config | None:
    """The configuration of a table's entry, unless it is not among the legal ones any more."""
    try:
        config = type(default)(**fields)
    except TypeError:
        return None
    return config if config in legal else None


def measure(
    op: str,
    key: str,
    default: Config,
    candidates: Sequence[Config],
    build: Callable[[Config], Callable[[], Any]],
    device: torch.device,
    path: Path,
    *,
    clock: Callable[[Callable[[], Any], torch.device], float] | None = None,
) -> Config | None:
    """Time ``default`` and then the others until the budget is spent; keep the fastest.

    A configuration that fails to compile or run is passed over. None if nothing ran.
    """
    global _spent
    clock = clock or device_seconds
    left = budget()
    started = time.perf_counter()
    times: dict[Config, float] = {}
    complete = True
    for config in dict.fromkeys((default, *candidates)):
        if times and time.perf_counter() - started > left:
            complete = False
            break
        try:
            times[config] = clock(build(config), device)
        except Exception as error:
            log.debug("tuning %s %s: %s failed: %s", op, key, config, error)
    seconds = time.perf_counter() - started
    _spent += seconds
    if not times:
        return None
    best = min(times, key=lambda config: times[config])
    entry = {
        "config": dataclasses.asdict(best),  # type: ignore[call-overload]
        "seconds": times[best],
        "default": dataclasses.asdict(default),  # type: ignore[call-overload]
        "default_seconds": times.get(default),
        "measured": len(times),
        "complete": complete,
    }
    try:
        keep(path, _device_name(device.index), f"{op} {key}", entry)
    except OSError as error:
        log.warning("tuning: %s is not kept: %s", path, error)
    log.info("tuning %s %s: %d measured in %.1f s, %s", op, key, len(times), seconds, best)
    return best


def device_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median time of ``run`` with its operands out of the device's caches."""
    with torch.cuda.device(device):
        run()  # compiles
        flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
        times = []
        for _ in range(ROUNDS):
            flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after) * 1e-3)
    return statistics.median(times)
