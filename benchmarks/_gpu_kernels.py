"""Sections of `benchmarks.gpu` about the machine and single kernels.

Each yields rows of plain data, to be written as they come.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._gpu_timing import Bench, Call, Skip, memory, verdict
from dspark_compile.kernels.triton import linear
from dspark_compile.ops.cache import quantize_kv

ours = torch.ops.dspark_triton

# (what, N, K) of the products of a decode step.
PRODUCTS = (
    ("1B qkv", 3072, 2048),
    ("1B down", 2048, 8192),
    ("8B qkv", 6144, 4096),
    ("8B o", 4096, 4096),
    ("8B down", 4096, 14336),
    ("8B gate and up", 28672, 4096),
    ("1B lm_head", 128256, 2048),
)
GATED = (("1B", 8192, 2048), ("8B", 14336, 4096))
SMOKE_PRODUCTS = (("smoke", 48, 64),)
ROWS = (1, 4, 16)
CONTEXTS = (1024, 4096, 16384, 65536)
BATCHES = (1, 8, 64)
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def machine(bench: Bench) -> Iterator[dict[str, Any]]:
    """Copy bandwidth (bytes read and written) and the rate of a large matrix product."""
    size = 2**20 if bench.smoke else 2**30
    x = torch.empty(size, dtype=torch.int8, device=bench.device).fill_(1)
    y = torch.empty_like(x)
    times = bench.turns({"copy": lambda: y.copy_(x)})
    yield {"what": "copy", "bytes": 2 * size, "rate": 2 * size / times["copy"]["median_s"], **times}
    n = 64 if bench.smoke else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    times = bench.turns({"matmul": lambda: a @ b})
    rate = 2 * n**3 / times["matmul"]["median_s"]
    yield {"what": "matmul", "n": n, "dtype": str(bench.dtype), "rate": rate, **times}


def tuned(function: Call, bench: Bench) -> Call:
    """Inductor's best, without its own CUDA graphs: the timing captures one."""
    mode = None if bench.smoke else "max-autotune-no-cudagraphs"
    backend = "eager" if bench.smoke else "inductor"
    return torch.compile(function, backend=backend, mode=mode, dynamic=False)


def products(bench: Bench) -> Iterator[dict[str, Any]]:
    """Skinny linear layers: first against cuBLAS, all of them, then against Inductor too."""
    rows_of = (1, 4) if bench.smoke else ROWS
    cases = list(itertools.product(SMOKE_PRODUCTS if bench.smoke else PRODUCTS, rows_of))
    for with_inductor in (False, True):
        for (what, n, k), rows in cases:
            if with_inductor and rows == 4:
                continue
            if bench.left < (10 if with_inductor else 2):
                yield {"what": what, "rows": rows, "skipped": "no time left"}
                continue
            yield product(bench, what, n, k, rows, with_inductor)


def product(
    bench: Bench, what: str, n: int, k: int, rows: int, with_inductor: bool
) -> dict[str, Any]:
    """One shape: all contenders over weights that no cache holds."""
    nbytes = n * k * bench.dtype.itemsize
    row = {"op": "linear", "what": what, "n": n, "k": k, "rows": rows, "bytes": nbytes}
    with memory():
        weights = [bench.randn(n, k) for _ in range(bench.copies(nbytes))]
        x = bench.randn(rows, k)
        contenders: dict[str, Call] = {
            "dspark": lambda w: ours.linear(x, w),
            "cublas": lambda w: F.linear(x, w),
        }
        if rows == 1 and not with_inductor:
            # The same kernel without programmatic dependent launch, where the device has it.
            contenders["dspark no pdl"] = lambda w: linear.plan(x, w, pdl=False).run()[0]
        if with_inductor:
            torch._dynamo.reset()
            compiled = tuned(lambda x, w: F.linear(x, w), bench)
            contenders["inductor max-autotune"] = lambda w: compiled(x, w)
        row |= bench.measure(contenders, weights)
    return verdict(row, bench, flops=2.0 * rows * n * k)


def gated(bench: Bench) -> Iterator[dict[str, Any]]:
    """Whole gated MLPs: three products and what lies between."""
    shapes = (("smoke", 48, 64),) if bench.smoke else GATED
    for (what, inner, k), rows in itertools.product(shapes, (4,) if bench.smoke else ROWS):
        if bench.left < 12:
            yield {"what": what, "rows": rows, "skipped": "no time left"}
            continue
        nbytes = 3 * inner * k * bench.dtype.itemsize
        row = {"op": "gated_mlp", "what": what, "inner": inner, "k": k, "rows": rows}

        def block(x: Any, gate: Any, up: Any, down: Any) -> Any:
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

        with memory():
            x = bench.randn(rows, k)
            weights = [
                (bench.randn(inner, k), bench.randn(inner, k), bench.randn(k, inner))
                for _ in range(bench.copies(nbytes))
            ]
            torch._dynamo.reset()
            compiled = tuned(block, bench)
            contenders = {
                "dspark": lambda w, x=x: ours.gated_mlp(x, *w, None, None, None, "silu"),
                "eager": lambda w, x=x: block(x, *w),
                "inductor max-autotune": lambda w, x=x, run=compiled: run(x, *w),
            }
            row |= {"bytes": nbytes, **bench.measure(contenders, weights)}
        yield verdict(row, bench, flops=6.0 * rows * inner * k)


def decode_attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """One query token, 32 heads over 8, 128 features; every context and batch that fits."""
    heads, kv_heads, features = (4, 2, 16) if bench.smoke else (32, 8, 128)
    contexts, batches = ((64,), (2,)) if bench.smoke else (CONTEXTS, BATCHES)
    for context, batch in itertools.product(contexts, batches):
        row = {"op": "attention", "batch": batch, "context": context}
        if bench.left < 5:
            yield {**row, "skipped": "no time left"}
            continue
        try:
            with memory():
                row |= one_decode(bench, batch, context, heads, kv_heads, features)
        except (Skip, torch.OutOfMemoryError) as error:
            row["skipped"] = str(error).splitlines()[0]
        yield row


def one_decode(
    bench: Bench, batch: int, context: int, heads: int, kv_heads: int, features: int
) -> dict[str, Any]:
    """Exact and int8 caches against every SDPA backend over exact ones."""
    numel = batch * kv_heads * context * features
    nbytes = 2 * numel * bench.dtype.itemsize
    # Twice over: int8 values and scales lie beside the exact ones while they are made.
    copies = max(1, bench.copies(2 * nbytes))
    q = bench.randn(batch, heads, 1, features)
    scale = features**-0.5
    shape = (batch, kv_heads, context, features)
    exact, small = [], []
    for _ in range(copies):
        k, v = bench.randn(*shape), bench.randn(*shape)
        exact.append((k, v))
        small.append((*quantize_kv(k, bench.dtype), *quantize_kv(v, bench.dtype)))
    attributes = {"scale": scale, "mask": "k <= q + n0"}
    rest = (None, None, [], [context - 1])
    contenders: dict[str, Call] = {
        "dspark": lambda kv: ours.attention(q, *kv, *rest, **attributes),
    }
    for name, backend in BACKENDS.items():
        contenders[name] = sdpa(q, scale, backend, bench)
    measured = bench.measure(contenders, exact)
    int8 = bench.measure(
        {"dspark int8": lambda kv: ours.attention_int8(q, *kv, *rest, **attributes)},
        small,
        ours.attention(q, *exact[0], *rest, **attributes),
    )
    for figures in ("times", "difference"):
        measured[figures] |= int8[figures]
    if "failed" in int8:
        measured.setdefault("failed", {}).update(int8["failed"])
    return verdict({"bytes": nbytes, **measured}, bench)


def sdpa(q: Any, scale: float, backend: SDPBackend, bench: Bench, causal: bool = False) -> Call:
    """Torch's attention by one backend."""

    def run(kv: Any) -> Any:
        with sdpa_kernel([SDPBackend.MATH if bench.smoke else backend]):
            return F.scaled_dot_product_attention(
                q, *kv, is_causal=causal, scale=scale, enable_gqa=True
            )

    return run


def prefill_attention(bench: Bench) -> Iterator[dict[str, Any]]:
    """Causal, 4096 tokens; 32 heads over 8 with 128 features, 32 over 8 with 64."""
    count = 32 if bench.smoke else 4096
    for heads, kv_heads, features in ((32, 8, 128), (32, 8, 64)):
        if bench.smoke:
            heads, kv_heads, features = 2, 1, 16
        q = bench.randn(1, heads, count, features)
        kvs = [tuple(bench.randn(1, kv_heads, count, features) for _ in range(2))] * 2
        scale = features**-0.5
        contenders: dict[str, Call] = {
            "dspark": lambda kv, q=q, scale=scale: ours.attention(
                q, *kv, None, None, [], [], scale=scale, mask="k <= q"
            ),
        }
        for name, backend in BACKENDS.items():
            contenders[name] = sdpa(q, scale, backend, bench, causal=True)
        row = {
            "op": "attention", "tokens": count, "heads": heads, "features": features,
            "bytes": (2 * heads + 2 * kv_heads) * count * features * bench.dtype.itemsize,
        }  # fmt: skip
        row |= bench.measure(contenders, kvs)
        # Two products over half of the square.
        yield verdict(row, bench, flops=2.0 * heads * count * count * features)
        if bench.smoke:
            break
