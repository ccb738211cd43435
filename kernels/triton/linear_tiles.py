"""Tile sizes of the skinny products: what may be run, and which of it is expected to be fastest.

`candidates` is the table, `predicted` the cost model over it, `choose` the smallest prediction.
`dspark_compile.codegen.triton.tune` may put a measured choice in the place of `choose`.

The model: a multiprocessor keeps so many bytes of weights in flight, and gets its share of the
memory's bandwidth only if these are enough to cover the latency (Little's law). The slower of all
together and the busiest one alone decides. Splitting k costs a workspace and a second launch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from dspark_compile.kernels.triton._launch import Target, cdiv, next_power_of_2

# Of one multiprocessor: its share of bandwidth, the bytes in flight that the share takes, and how
# many shares it can draw while others idle. Orders of magnitude from data sheets; nothing here
# was measured, and only the relation of bandwidth to the times of a start and a launch matters.
SHARE = 25e9
IN_FLIGHT = 32_768
ALONE = 2.0
START = 0.5e-6
LAUNCH = 2.5e-6
MAX_SPLITS = 16
MAX_ROWS = 16


@dataclass(frozen=True, order=True)
class Tiles:
    """One configuration: a program's rows and columns of W, parts of k, warps, pipeline stages."""

    n: int
    k: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Shape:
    """What a choice depends on: ``weights`` (1, or 2 for gate and up) of ``[n, k]``, m rows."""

    m: int
    n: int
    k: int
    itemsize: int
    weights: int = 1

    @property
    def key(self) -> str:
        """Names the shape in a table of measured choices."""
        return f"m{self.m} n{self.n} k{self.k} bytes{self.itemsize} weights{self.weights}"


def _one_row(shape: Shape, target: Target) -> Iterator[Tiles]:
    """Tiles of 4 Ki or 8 Ki float32 sums in the registers of all warps."""
    widest = max(128, min(2048, next_power_of_2(shape.k)))
    for sums in (4096, 8192):
        for n in (2, 4, 8, 16):
            k = min(widest, sums // n // shape.weights)
            if k < 128 or (sums == 8192 and k * n * shape.weights <= 4096):
                continue
            if sums == 8192 and shape.weights == 2 and n < 8:
                continue  # long rows of two weights: a register spills on sm_120
            staged = target.backend == "cuda" and sums == 4096
            # ptxas spills a register of float32 loads where it could do with fewer programs.
            if not (staged and shape.itemsize == 4):
                yield Tiles(n, k, 1, 4, 1)
            # Through shared memory, asynchronously; AMD has enough registers for plain loads.
            if staged:
                yield Tiles(n, k, 1, 4, 3)


def _some_rows(shape: Shape, target: Target) -> Iterator[Tiles]:
    """Tiles for matrix units: two programs' stages fit the shared memory of a multiprocessor."""
    depths = (2,) if target.backend == "hip" else (3, 4, 5)
    # Each float32 product is three tf32 ones: two weights' halves in wide tiles would spill.
    widths = (64, 128, 256) if shape.itemsize == 2 else (32, 64)[: 3 - shape.weights]
    for n in (16, 32, 64):
        for k in widths:
            if k > max(next_power_of_2(shape.k), widths[0]):
                continue
            if k > 128 and shape.k % k:
                continue  # a wide tile's mask spills on sm_120, and most of its tail is idle
            stage = (n * shape.weights + MAX_ROWS) * k * shape.itemsize
            for stages in depths:
                buffers = stages if target.backend == "cuda" else 1
                if buffers * stage <= target.shared // 2:
                    yield Tiles(n, k, 1, 4, stages)


@functools.lru_cache(maxsize=4096)
def candidates(shape: Shape, target: Target) -> tuple[Tiles, ...]:
    """Every configuration that may be run for ``shape`` on ``target``."""
    found = []
    base = _one_row(shape, target) if shape.m == 1 else _some_rows(shape, target)
    for tiles in dict.fromkeys(base):
        splits = 1
        while splits <= MAX_SPLITS:
            if splits == 1 or cdiv(shape.k, tiles.k) >= 2 * splits:
                found.append(Tiles(tiles.n, tiles.k, splits, tiles.warps, tiles.stages))
            splits *= 2
    return tuple(found)


def predicted(tiles: Tiles, shape: Shape, target: Target) -> float:
    """Seconds, up to a factor that all configurations of a shape share."""
    tile = tiles.n * tiles.k * shape.itemsize * shape.weights
    steps = cdiv(cdiv(shape.k, tiles.k), tiles.splits)
    programs = cdiv(shape.n, tiles.n) * tiles.splits
    busiest = cdiv(programs, target.units)
    # Shared memory, or registers with room for eight programs of four warps.
    held = tile * tiles.stages if tiles.stages > 1 else 0
    resident = min(busiest, 8, max(1, target.shared // held) if held else 8)
    flight = tile * max(1, tiles.stages - 1) * resident
    rate = SHARE * min(ALONE, flight / IN_FLIGHT)
    weights = shape.weights * shape.n * shape.k * shape.itemsize
    parts = 0 if tiles.splits == 1 else 8 * tiles.splits * shape.weights * shape.m * shape.n
    together = (weights + parts) / (SHARE * target.units)
    alone = busiest * steps * tile / rate
    extra = LAUNCH if tiles.splits > 1 else 0.0
    return max(together, alone) + busiest / resident * START + extra


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, target: Target) -> Tiles:
    """The configuration with the smallest prediction; among equals few parts and large tiles."""
    return min(
        candidates(shape, target),
        key=lambda t: (predicted(t, shape, target), t.splits, -t.n * t.k, t.stages, t.n),
    )
