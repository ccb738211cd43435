"""How far this machine's kernels fall short of its bandwidth and rates: the cost model's factors.

The cost model predicts a kernel from bytes over the bandwidth of a plain read and operations over
the rate of a large matrix product. Kernels reach shares of both that differ from CPU to CPU (skinny
products have few rows, an exponential is cheap on one and dear on the other). `calibrate` compiles
some kernels at shapes of its own, times them with cold operands and fits three factors: on the
time of the bytes (``memory``), of the operations in products (``compute``), and of what a softmax
costs beside them (``score``). ``dspark env --calibrate`` calls it and keeps the factors with the
machine's description; where nobody has, they are 1.

``benchmarks.cost_model`` measures the predictions at other shapes.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cost import Cost, cost
from dspark_compile.codegen.machine import FACTORS, Machine, _probes

PROBE_BYTES = 128 * 2**20  # read in turn with every kernel: the bandwidth of that moment
COLD_BYTES = 192 * 2**20  # operands of a kernel, so that none is in cache when its turn comes
LIMIT = 8.0  # of a factor, either way
BF16, F32 = torch.bfloat16, torch.float32

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        op: the dialect op.
        shape: its sizes, in words.
        rows: of the input.
        operands: makes one set of them; ``warm`` makes small ones, for the same code.
        keys: how many keys attention reads, None for other ops.
    """

    op: str
    shape: str
    rows: int
    operands: Callable[[], Call]
    warm: Callable[[], Call]
    keys: int | None = None


# -- operands


def some(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Numbers of a tensor of that shape, every row the same: quick to make."""
    if not dtype.is_floating_point:
        return torch.randint(0, 127, (shape[-1],)).to(dtype).expand(shape).contiguous()
    return (torch.randn(shape[-1]) * 0.05).to(dtype).expand(shape).contiguous()


def linear(n: int, k: int, rows: int, dtype: torch.dtype) -> Case:
    """x ``[rows, k]`` times a weight ``[n, k]`` of ``dtype``."""

    def make(n: int) -> Callable[[], Call]:
        return lambda: ((some(rows, k, dtype=dtype), some(n, k, dtype=dtype)), {})

    return Case("linear", f"{str(dtype)[6:]} {n}x{k}", rows, make(n), make(64))


def linear_int8(n: int, k: int, rows: int) -> Case:
    """The same with an int8 weight and a scale for each row of it."""

    def make(n: int) -> Callable[[], Call]:
        return lambda: ((some(rows, k), some(n, k, dtype=torch.int8), some(n, 1)), {})

    return Case("linear_int8", f"int8 {n}x{k}", rows, make(n), make(64))


def linear_int4(n: int, k: int, rows: int) -> Case:
    """The same with an int4 weight in groups of 32."""
    from dspark_compile.ops.quantized import pack_int4

    def make(n: int) -> Callable[[], Call]:
        return lambda: (
            (some(rows, k), pack_int4(some(n, k, dtype=torch.int8) % 8), some(n, k // 32)),
            {},
        )

    return Case("linear_int4", f"int4 {n}x{k}", rows, make(n), make(64))


def gated_mlp(inner: int, k: int, rows: int) -> Case:
    """A gated MLP of bfloat16: gate and up ``[inner, k]``, down ``[k, inner]``."""

    def make(inner: int) -> Callable[[], Call]:
        def operands() -> Call:
            weights = (some(inner, k), some(inner, k), some(k, inner))
            return (some(rows, k), *weights, None, None, None, "silu"), {}

        return operands

    return Case("gated_mlp", f"{inner}x{k}", rows, make(inner), make(64))


def experts(count: int, choices: int, inner: int, k: int, rows: int) -> Case:
    """Gated experts of bfloat16, ``choices`` of ``count`` a row."""

    def make(count: int) -> Callable[[], Call]:
        def operands() -> Call:
            indices = torch.stack([torch.randperm(count)[:choices] for _ in range(rows)])
            stacks = [[some(count, inner, k)], [some(count, inner, k)], [some(count, k, inner)]]
            weights = some(rows, choices)
            return (some(rows, k), indices, weights, *stacks, [], [], [], "silu"), {}

        return operands

    name = f"{choices} of {count}, {inner}x{k}"
    return Case("moe_experts", name, rows, make(count), make(choices))


def rms_norm(rows: int, k: int) -> Case:
    """A norm of ``rows`` rows."""

    def make(rows: int) -> Callable[[], Call]:
        return lambda: ((some(rows, k), some(k), 1e-6), {})

    return Case("rms_norm", f"{rows}x{k}", rows, make(rows), make(4))


def attention(
    heads: int, kv_heads: int, features: int, rows: int, context: int, room: int, int8: bool
) -> Case:
    """Decode attention of ``rows`` queries over ``context`` keys of a cache with ``room``."""

    def make(context: int, room: int) -> Callable[[], Call]:
        def operands() -> Call:
            query = some(1, heads, rows, features)
            given = {"scale": features**-0.5, "mask": "k <= q + n0"}
            if int8:
                numbers = (1, kv_heads, room, features)
                k, v = (some(*numbers, dtype=torch.int8) for _ in range(2))
                ks, vs = (some(1, kv_heads, room).abs() for _ in range(2))
                return (query, k, ks, v, vs, None, None, [], [context - rows]), given
            k, v = (some(1, kv_heads, room, features) for _ in range(2))
            return (query, k, v, None, None, [], [context - rows]), given

        return operands

    op = "attention_int8" if int8 else "attention"
    shape = f"{heads} over {kv_heads} heads of {features}, {context} keys"
    return Case(op, shape, rows, make(context, room), make(64, 64), context)


def cases() -> list[Case]:
    """What `calibrate` times: every kind of kernel, one row and several."""
    found = [
        linear(*sizes, rows, BF16) for sizes in ((4608, 2304), (1792, 7168)) for rows in (1, 8)
    ]
    found.append(linear(3072, 2304, 1, F32))
    found += [make(6144, 2560, rows) for make in (linear_int8, linear_int4) for rows in (1, 8)]
    found += [gated_mlp(4864, 1280, rows) for rows in (1, 4)]
    found.append(experts(24, 4, 1024, 1280, 1))
    for int8, rows in itertools.product((False, True), (1, 4, 16)):
        found.append(attention(20, 4, 128, rows, 3000, 3072, int8))
        found.append(attention(16, 8, 64, rows, 4500, 4608, int8))
    return found


# -- times


def measure(
    case: Case, machine: Machine, rounds: int, cold: int = COLD_BYTES
) -> dict[str, Any] | None:
    """What a case took, seconds: ``measured_s`` (median), ``min_s``, the parts of its prediction
    (`parts`) and ``read_bandwidth``, bytes/s in the same minute; None where no kernel takes it."""
    from dspark_compile.kernels import cpp

    args, kwargs = case.operands()
    if cpp.supports(case.op, *args, **kwargs) is not None:
        return None
    function = getattr(torch.ops.dspark_cpu, case.op)
    keys = {} if case.keys is None else {"keys": case.keys}
    model = cost(case.op, *args, **kwargs, **keys)
    copies = max(2, min(64, math.ceil(cold / float(model.bytes))))
    following = itertools.cycle([(args, kwargs), *(case.operands() for _ in range(copies - 1))])
    few, threads = case.warm(), torch.get_num_threads()
    probes, buffer = _probes(), torch.ones(PROBE_BYTES // 4)

    def ours() -> Any:
        args, kwargs = next(following)
        return function(*args, **kwargs)

    runs: tuple[Callable[[], Any], ...] = (
        lambda: probes.read(buffer, threads),
        # Python and the dispatcher are in no cache behind a probe: that is not the kernel's time.
        lambda: function(*few[0], **few[1]),
        ours,
    )
    times: tuple[list[float], ...] = ([], [], [])
    for turn in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if turn:  # the first one compiles
                taken.append(time.perf_counter() - start)
    bandwidth = PROBE_BYTES / statistics.median(times[0])
    now = replace(machine, read={threads: bandwidth})
    return {
        "op": case.op, "shape": case.shape, "rows": case.rows, "read_bandwidth": bandwidth,
        "measured_s": statistics.median(times[2]), "min_s": min(times[2]),
        **parts(model, now),
    }  # fmt: skip


def parts(model: Cost, machine: Machine) -> dict[str, float]:
    """What a prediction is made of, before any factor: seconds of bytes, products, scores and a
    launch."""
    return {
        "memory_s": float(model.bytes) / machine.bandwidth,
        "compute_s": float(model.flops) / machine.rate(model.dtype),
        "score_s": float(model.vector) / machine.rate(F32),
        "launch_s": machine.launch + machine.region,
    }


def predicted(r: dict[str, Any], factors: Sequence[float]) -> float:
    """`Cost.seconds` from its parts, with factors in the order of `FACTORS`."""
    memory, compute, score = factors
    work = compute * r["compute_s"] + score * r["score_s"]
    return math.hypot(memory * r["memory_s"], work) + r["launch_s"]


# -- the fit


def misfit(results: Sequence[dict[str, Any]], factors: Sequence[float]) -> float:
    """Mean of the logarithmic errors: no single kernel decides."""
    return statistics.fmean(abs(math.log(predicted(r, factors) / r["measured_s"])) for r in results)


def fit(results: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """The factors that fit best, by a search along one after another in ever smaller steps."""
    factors, step = [1.0] * len(FACTORS), 1.6
    best = misfit(results, factors)
    while step > 1.01:
        moved = False
        for i, up in itertools.product(range(len(FACTORS)), (step, 1 / step)):
            tried = [f * up if j == i else f for j, f in enumerate(factors)]
            value = misfit(results, tried)
            if value < best - 1e-9:
                factors, best, moved = tried, value, True
        if not moved:
            step = math.sqrt(step)
    return tuple(factors)


@torch.no_grad()
def calibrate(
    machine: Machine, *, rounds: int = 15, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """The factors that fit this machine's kernels: up to two minutes where none of them is
    compiled yet, seconds after. ``progress`` is called with how many of how many are done.

    Raises:
        RuntimeError: kernels cannot be built here (`BuildError`), or none is for this machine.
    """
    results, chosen = [], cases()
    for done, case in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        result = measure(case, machine, rounds)
        if result is not None:
            results.append(result)
    if not results:
        raise RuntimeError("no kernel is for this machine, so there is nothing to calibrate with")
    # What lies outside was no measurement of these kernels: a busy machine, a swap.
    values = [round(min(max(f, 1 / LIMIT), LIMIT), 4) for f in fit(results)]
    return dict(zip(FACTORS, values, strict=True))
