"""SPS(B): how many target steps a second there are at B tokens a step.

The compiler's cost model knows the shape of the curve (weights are read once however many tokens
there are, until arithmetic takes over), measurements know its height. `SPSCurve` joins them: the
model's seconds, times the ratio to what was measured, interpolated between measured sizes; at a
measured size the measurement is what counts.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SPSCurve:
    """Seconds of a target step by its number of tokens.

    Args:
        model: predicted seconds of B = 0 ... largest, a sequence (entry 0 is not used).
        measured: seconds by number of tokens; override the model.
        edges: sizes that programs exist for, ascending: a step of B tokens costs what the next
            edge costs. None: every size has its own.

    Raises:
        ValueError: a time is not a positive finite number, or an edge is out of order.
    """

    def __init__(
        self,
        model: Sequence[float],
        measured: Mapping[int, float] | None = None,
        edges: Sequence[int] | None = None,
    ) -> None:
        self.model = [float(s) for s in model]
        if len(self.model) < 2 or not all(s > 0 and math.isfinite(s) for s in self.model[1:]):
            raise ValueError("an SPS curve needs a positive, finite time for 1 token and more")
        self.edges = None if edges is None else [int(e) for e in edges]
        if self.edges is not None and (
            not self.edges or self.edges != sorted(set(self.edges)) or self.edges[0] < 1
        ):
            raise ValueError(f"edges={list(edges or ())}: ascending sizes from 1 on")
        self.measured: dict[int, float] = {}
        for size, seconds in (measured or {}).items():
            self.update(size, seconds, share=1.0)

    @classmethod
    def flat(cls, largest: int, seconds: float = 1.0) -> SPSCurve:
        """A step costs the same at any size: what is true where reading weights is all."""
        return cls([seconds] * (largest + 1))

    @classmethod
    def from_points(
        cls, points: Mapping[int, float], largest: int | None = None, **options: Any
    ) -> SPSCurve:
        """From measurements alone: lines between them, the first and the last one's slope outside.

        Raises:
            ValueError: there is no point.
        """
        sizes = sorted(points)
        if not sizes:
            raise ValueError("no measured step; give at least one {tokens: seconds}")
        largest = largest or sizes[-1]
        seconds = [0.0] + [_interpolate(sizes, points, b) for b in range(1, largest + 1)]
        return cls(seconds, **options)

    @classmethod
    def from_model(
        cls,
        target: nn.Module,
        largest: int,
        *,
        context: int = 512,
        requests: int = 1,
        machine: Any = None,
        **options: Any,
    ) -> SPSCurve:
        """From the compiler's cost model: the target's linear layers, and its attention's cache.

        Args:
            context: tokens in the cache of each request. requests: how many share a step.
            machine: a `codegen.machine.Machine`; None measures (or remembers) this one.
        """
        from dspark_compile.codegen.machine import describe

        machine = machine or describe()
        costs = _target_costs(target, context, requests)
        compute = machine.factor("compute")
        rates = [(c.read, c.write, c.flops, machine.rate(c.dtype) / compute) for c in costs]
        bandwidth = machine.bandwidth / machine.factor("memory")
        launch = machine.region  # stages of one native call, graph nodes of one replay
        seconds = [0.0]
        for b in range(1, largest + 1):
            total = 0.0
            for read, write, flops, rate in rates:
                move = (read(b) + write(b)) / bandwidth
                total += max(move, flops(b) / rate) + launch
            seconds.append(total)
        return cls(seconds, **options)

    @property
    def largest(self) -> int:
        """The largest size that the curve knows."""
        return len(self.model) - 1

    def update(self, size: int, seconds: float, share: float = 0.2) -> None:
        """A measured step: ``share`` of it goes into what is known of this size.

        Raises:
            ValueError: the time is not positive.
        """
        if not seconds > 0 or not math.isfinite(seconds):
            raise ValueError(f"a step of {size} tokens in {seconds} s: times are positive")
        size = min(max(int(size), 1), self.largest)
        known = self.measured.get(size)
        self.measured[size] = seconds if known is None else known + share * (seconds - known)

    def seconds(self, size: int) -> float:
        """Of a step of ``size`` tokens (that of the next edge, where there are edges)."""
        if self.edges is not None:
            at = bisect_left(self.edges, size)
            size = self.edges[min(at, len(self.edges) - 1)]
        size = min(max(size, 1), self.largest)
        return self.model[size] * self._ratio(size)

    def __call__(self, size: int) -> float:
        """SPS(B): steps a second."""
        return 1 / self.seconds(size)

    def _ratio(self, size: int) -> float:
        if not self.measured:
            return 1.0
        ratios = {b: s / self.model[b] for b, s in self.measured.items()}
        return _interpolate(sorted(ratios), ratios, size, beyond=False)

    def table(
        self, largest: int | None = None, *, smooth: bool = True, device: Any = None
    ) -> Tensor:
        """Seconds of B = 0 ... largest tokens as a tensor, for the scheduler on the device.

        ``smooth`` takes the greatest convex, non-decreasing curve below the points. The expected
        tokens are concave in B, so with a convex time the early stop finds the best of all sizes; a
        jagged one (graph buckets) would hold it at the first edge.
        """
        largest = min(largest or self.largest, self.largest)
        points = [self.seconds(b) for b in range(1, largest + 1)]
        if smooth:
            points = _convex(points)
        return torch.tensor([points[0], *points], dtype=torch.float32, device=device)


def measure(
    step: Callable[[int], Any],
    sizes: Sequence[int],
    *,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 3,
) -> dict[int, float]:
    """The shortest of ``repeats`` timed ``step(size)``, for each size, after one to warm up."""
    found = {}
    for size in sizes:
        step(size)
        times = []
        for _ in range(repeats):
            start = clock()
            step(size)
            times.append(clock() - start)
        found[size] = min(times)
    return found


def _interpolate(
    sizes: Sequence[int], values: Mapping[int, float], at: int, *, beyond: bool = True
) -> float:
    """The line between the neighbours; outside, their slope (``beyond``) or the last value."""
    if len(sizes) == 1 or (not beyond and not sizes[0] < at < sizes[-1]):
        return values[sizes[0] if at <= sizes[0] else sizes[-1]]
    i = min(max(bisect_left(sizes, at), 1), len(sizes) - 1)
    low, high = sizes[i - 1], sizes[i]
    slope = (values[high] - values[low]) / (high - low)
    value = values[low] + slope * (at - low)
    return value if value > 0 else min(values.values())


def _convex(points: list[float]) -> list[float]:
    """The lower convex hull, made non-decreasing."""
    hull: list[tuple[int, float]] = []
    for x, y in enumerate(points):
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) >= (y - y0) * (x1 - x0):
                hull.pop()
            else:
                break
        hull.append((x, y))
    xs, ys = [x for x, _ in hull], dict(hull)
    smooth = [_interpolate(xs, ys, x) for x in range(len(points))]
    lowest = smooth.index(min(smooth))
    return [max(s, smooth[lowest]) if x >= lowest else smooth[lowest] for x, s in enumerate(smooth)]


def _target_costs(target: nn.Module, context: int, requests: int) -> list[Any]:
    """One cost a weight matrix (as functions of B) and one for the caches."""
    import sympy

    from dspark_compile.codegen.cost import Cost, T, cost
    from dspark_compile.models.draft_bind import text_config, vocabulary_modules

    symbol = sympy.Symbol("B", positive=True)
    seen: set[int] = set()
    found = []

    def add(weight: Tensor) -> None:
        if id(weight) not in seen and weight.ndim == 2:
            seen.add(id(weight))
            n, k = weight.shape
            found.append(cost("linear", T((symbol, k), weight.dtype), T((n, k), weight.dtype)))

    for module in target.modules():
        if isinstance(module, nn.Linear):
            add(module.weight)
    embedding, head = vocabulary_modules(target)
    add(head.weight)
    text = text_config(target)
    layers = getattr(text, "num_hidden_layers", 0)
    heads = getattr(text, "num_attention_heads", 0)
    if layers and heads:
        keys = getattr(text, "num_key_value_heads", None) or heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        dtype = embedding.weight.dtype
        size = 2 * requests * keys * context * width * dtype.itemsize
        flops = 4 * symbol * heads * context * width
        found += [Cost(sympy.Integer(size), sympy.S(0), flops, torch.float32)] * layers
    return [_Numbers(c, symbol) for c in found]


class _Numbers:
    """A cost as plain functions of B."""

    def __init__(self, c: Any, symbol: Any) -> None:
        import sympy

        self.dtype = c.dtype
        self.read, self.write, self.flops = (
            sympy.lambdify(symbol, e) for e in (c.read, c.write, c.flops)
        )
