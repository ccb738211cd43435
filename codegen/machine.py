"""What this machine can do, measured once: the constants of the cost model.

Bandwidths by number of threads (from memory, and from cache), matrix rates by dtype, the cost of
entering a parallel region and of calling a kernel. `describe` returns what is known, from the
first of: ``$DSPARK_MACHINE`` (a JSON file, or JSON text), the file kept in
``$DSPARK_CACHE_DIR/machine`` (``~/.cache/dspark/machine``) under a key of CPU, cores, instruction
set and torch, or a measurement of at most 5 seconds. Partial overrides are filled from the rest.

A machine that is busy while it is measured looks slow. `measure` takes the best of several rounds;
a measurement made under load says so (`Machine.busy`) and is made again after ten minutes, or by
`dspark env --measure`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSION = 1
FACTORS = ("memory", "compute", "score")  # of the cost model: see `codegen.calibrate`
BUSY_SECONDS = 600  # how long a measurement made under load is kept


@dataclass(frozen=True)
class Machine:
    """Rates are per second, times in seconds.

    Attributes:
        name: the CPU's.
        threads: what torch used when this was measured.
        read: bytes read from memory, by number of threads.
        copy: bytes copied (read plus written), by number of threads.
        cached: bytes read from the last-level cache or nearer, with all threads.
        cache: how many bytes count as cached.
        rates: floating-point operations in matrix products, by dtype, with all threads.
        launch: calling one kernel from Python.
        region: entering and leaving a parallel region.
        busy: whether other work was running when this was measured.
        factors: how many times longer than by the rates above kernels take for their bytes
            (``memory``), operations in products (``compute``) and softmax (``score``), as
            `codegen.calibrate` found them; 1 where it was not asked.
    """

    name: str
    threads: int
    read: dict[int, float]
    copy: dict[int, float]
    cached: float
    cache: int
    rates: dict[str, float] = field(default_factory=dict)
    launch: float = 10e-6
    region: float = 2e-6
    busy: bool = False
    factors: dict[str, float] = field(default_factory=dict)

    def factor(self, name: str) -> float:
        """One of `FACTORS`."""
        return self.factors.get(name, 1.0)

    @property
    def bandwidth(self) -> float:
        """Bytes read from memory with all threads."""
        return max(self.read.values())

    def rate(self, dtype: torch.dtype | str) -> float:
        """Operations in products of a dtype; float32's where it was not measured."""
        name = str(dtype).removeprefix("torch.")
        return self.rates.get(name) or self.rates["float32"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Machine:
        """Back from `to_dict`, or from JSON, where numbers of threads are text.

        Raises:
            ValueError: a field is unknown or missing, or no rate is positive.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = set(data) - fields - {"version"}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}; known are {sorted(fields)}")
        values = {k: v for k, v in data.items() if k in fields}
        for name in ("read", "copy"):
            if name in values:
                values[name] = {int(k): float(v) for k, v in values[name].items()}
        try:
            machine = cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None
        positive = (*machine.read.values(), *machine.copy.values(), machine.cached)
        if not machine.read or not all(x > 0 for x in (*positive, *machine.rates.values())):
            raise ValueError("bandwidths and rates must be positive, and read must not be empty")
        strange = set(machine.factors) - set(FACTORS)
        if strange or not all(x > 0 for x in machine.factors.values()):
            raise ValueError(
                f"factors={machine.factors!r}: give positive numbers for any of {list(FACTORS)}"
            )
        if "float32" not in machine.rates:
            raise ValueError("rates must have float32")
        return machine


def keep_factors(factors: dict[str, float]) -> None:
    """Makes these the factors of what `describe` returns from now on, in other processes too."""
    path = _path()
    if path is not None:
        _keep(path, dataclasses.replace(_kept_or_measured(), factors=factors))
    _known.cache_clear()


def describe(*, fresh: bool = False) -> Machine:
    """The machine's description: overridden, kept, or measured now.

    Raises:
        ValueError: ``$DSPARK_MACHINE`` is neither a file nor legal JSON.
    """
    override = os.environ.get("DSPARK_MACHINE", "")
    if fresh:
        _known.cache_clear()
        _measure_and_keep()
    return _known(override, torch.get_num_threads())


@functools.lru_cache(maxsize=8)
def _known(override: str, threads: int) -> Machine:
    given = _override(override)
    required = {f.name for f in dataclasses.fields(Machine)} - {"factors"}
    if given and required <= set(given):
        return Machine.from_dict(given)
    return Machine.from_dict({**_kept_or_measured().to_dict(), **given})


def _override(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        source = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        data = json.loads(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"DSPARK_MACHINE={text!r} is neither a JSON file nor JSON: {error}"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"DSPARK_MACHINE={text!r} is not a JSON object")
    data.pop("version", None)
    return data


def _path() -> Path | None:
    """The file that a measurement is kept in."""
    from dspark_compile.diagnostics.environment import cpu_isa, cpu_name

    key = (
        *(VERSION, cpu_name(), os.cpu_count(), torch.get_num_threads(), torch.__version__),
        *cpu_isa(),
    )
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    root = os.environ.get("DSPARK_CACHE_DIR")
    try:
        folder = Path(root) if root else Path.home() / ".cache" / "dspark"
    except RuntimeError:
        return None
    return folder / "machine" / f"{digest}.json"


def _kept() -> Machine | None:
    """What is kept, also where it is due to be measured again."""
    path = _path()
    if path is None:
        return None
    try:
        return Machine.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _kept_or_measured() -> Machine:
    kept, path = _kept(), _path()
    if kept is None or path is None:
        return _measure_and_keep()
    with contextlib.suppress(OSError):
        if not kept.busy or time.time() - path.stat().st_mtime < BUSY_SECONDS:
            return kept
    return _measure_and_keep()


def _measure_and_keep() -> Machine:
    """A new measurement; a calibration outlives it."""
    kept, machine, path = _kept(), measure(), _path()
    if kept is not None:
        machine = dataclasses.replace(machine, factors=kept.factors)
    if path is not None:
        _keep(path, machine)
    return machine


def _keep(path: Path, machine: Machine) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(machine.to_dict(), file, indent=2)
        os.replace(temporary, path)
    except OSError:
        # A machine that cannot keep its description measures it again.
        return


def busy() -> bool:
    """Whether other work has been running in the last minute, as far as the system says."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) / 2 + 0.5


def measure(seconds: float = 4.0) -> Machine:
    """Measure this machine in about ``seconds``: the best of what fits."""
    from dspark_compile.diagnostics.environment import cpu_name

    threads = torch.get_num_threads()
    counts = sorted({1, threads} | {n for n in (2, 4, 8, 16, 32, 64, 128) if n < threads})
    probes = _probes()
    share = seconds / (2 * len(counts) + 5)
    # Larger than any cache in sight; reads and copies keep to what memory allows.
    size = 256 * 2**20
    buffer = torch.ones(size // 4)
    half = size // 8
    read, copy = {}, {}
    for count in counts:
        read[count] = size / _best(functools.partial(probes.read, buffer, count), share)
        back = functools.partial(probes.copy, buffer[half:], buffer[:half], count)
        copy[count] = size / _best(back, share)
    cache = 4 * 2**20
    small = buffer[: cache // 4]
    # Calls one by one: the best of many short ones is free of what else runs.
    alone = _best(functools.partial(probes.read, small[:64], 1), share)
    together = _best(functools.partial(probes.read, small[:64], threads), share)
    taken = _best(functools.partial(probes.read, small, threads), share)
    cached = max(cache / taken, *read.values())
    rates = {}
    side = 768
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(side, side, dtype=dtype)
        taken = _best(functools.partial(torch.mm, square, square), share)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / taken
    return Machine(
        name=cpu_name(),
        threads=threads,
        read=read,
        copy=copy,
        cached=cached,
        cache=cache,
        rates=rates,
        launch=alone,
        region=max(together - alone, 1e-7),
        busy=busy(),
    )


def _best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit into a time, after one to warm up."""
    run()
    best, stop = float("inf"), time.perf_counter() + seconds
    for _ in range(1000):
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > stop:
            break
    return best


@dataclass(frozen=True)
class _Probes:
    read: Callable[[torch.Tensor, int], Any]
    copy: Callable[[torch.Tensor, torch.Tensor, int], Any]


def _probes() -> _Probes:
    """C++ probes, or torch's own sum and copy where there is no compiler."""
    from dspark_compile.codegen.cpp import build, emit, isa

    try:
        level = isa.detect()
        read = emit.kernel(emit.probe("read"), level)
        copy = emit.kernel(emit.probe("copy"), level)
    except (build.BuildError, ValueError):
        return _Probes(_torch_read, _torch_copy)
    out = torch.zeros(1)
    return _Probes(
        lambda x, n: read(x.data_ptr(), out.data_ptr(), x.numel(), n),
        lambda x, y, n: copy(x.data_ptr(), y.data_ptr(), x.numel(), n),
    )


def _with_threads(count: int, run: Callable[[], Any]) -> None:
    before = torch.get_num_threads()
    if before == count:
        run()
        return
    torch.set_num_threads(count)
    try:
        run()
    finally:
        torch.set_num_threads(before)


def _torch_read(x: torch.Tensor, count: int) -> None:
    _with_threads(count, lambda: x.sum())


def _torch_copy(x: torch.Tensor, y: torch.Tensor, count: int) -> None:
    _with_threads(count, lambda: y.copy_(x))
