"""What `aot` compiles: launch plans over ``meta`` tensors, the very ones the launchers make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.kernels.triton import (
    attention,
    cache,
    grouped,
    linear,
    moe,
    norm,
    qk_norm_rope_append,
    rope,
    router,
)
from dspark_compile.kernels.triton._launch import Launch, Target
from dspark_compile.kernels.triton.linear_tiles import Shape, Tiles, candidates

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
        launch = qk_norm_rope_append.plan_prepare(
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


def linear_cases(target: Target) -> Iterator[Case]:
    """The model's choice for layers of real models, every prologue and every epilogue."""
    for n, k, weights in ((2048, 2048, 1), (6144, 4096, 1), (14336, 4096, 2), (512, 14336, 1)):
        for rows in (1, 16):
            yield from _linear(target, f"{n}x{k}", rows, n, k, gated=weights == 2)
    for rows in (1, 5):
        for dtype in (torch.float32, torch.float16):
            yield from _linear(target, "3072x1000", rows, 3072, 1000, dtype)
        norm = linear.Norm(_meta(4096), None, 1e-6)
        shift = linear.Norm(_meta(4096), _meta(4096), 1e-6, 1.0, True, True)
        n = 14336
        yield from _linear(target, "rms norm", rows, n, gated=True, norm=norm)
        yield from _linear(target, "layer norm, gelu", rows, n, activation="gelu", norm=shift)
        yield from _linear(target, "residual", rows, residual=_meta(rows, 4096))
        yield from _linear(target, "3 outputs", rows, 6144, sizes=[4096, 1024, 1024])
        stages = 1 if rows == 1 else 3 if target.backend == "cuda" else 2
        halves, split = Tiles(16, 128, 8, 4, stages), Tiles(16, 256, 8, 4, stages)
        yield from _linear(target, "split", rows, n, gated=True, tiles=halves)
        yield from _linear(target, "split", rows, residual=_meta(rows, 4096), tiles=split)


def linear_tile_cases(target: Target) -> Iterator[Case]:
    """Every configuration that a tuner may try; the number of splits does not change the code."""
    for dtype, m, weights in itertools.product((torch.bfloat16, torch.float32), (1, 16), (1, 2)):
        shape = Shape(m, 8192, 8192, dtype.itemsize, weights)
        for tiles in candidates(shape, target):
            if tiles.splits == 1:
                label = f"tiles {tiles.n}x{tiles.k} w{tiles.warps} s{tiles.stages}"
                yield from _linear(
                    target, label, m, 8192, 8192, dtype, gated=weights == 2, tiles=tiles
                )


def _linear(
    target: Target,
    label: str,
    rows: int,
    n: int = 4096,
    k: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    *,
    gated: bool = False,
    activation: str | None = None,
    norm: linear.Norm | None = None,
    residual: Tensor | None = None,
    sizes: Sequence[int] = (),
    tiles: Tiles | None = None,
) -> Iterator[Case]:
    weight = _meta(n, k, dtype=dtype)
    plan = linear.plan(
        _meta(rows, k, dtype=dtype), weight, _meta(n, dtype=dtype),
        up=weight if gated else None, activation="silu" if gated else activation,
        norm=norm, residual=residual, sizes=sizes, target=target, tiles=tiles,
    )  # fmt: skip
    kind = str(dtype).removeprefix("torch.") + (" gated" if gated else "")
    name = f"M={rows} {kind} {label}"
    yield Case(f"linear {name}", plan.launches[0])
    if len(plan.launches) > 1:
        yield Case(f"linear sums {name}", plan.launches[1])


def moe_cases(target: Target) -> Iterator[Case]:
    """Qwen3-30B-A3B's and gpt-oss's layers: one token, few, and many that are sorted."""
    bounds = (1.702, -math.inf, 7.0, -7.0, 7.0, 1.0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 8, 16, 4096):
            for label, count, k, size, inner in (
                ("qwen3", 128, 8, 2048, 768),
                ("gpt-oss", 32, 4, 2880, 2880),
            ):
                turned = label == "gpt-oss"
                shape = (count, size, 2 * inner) if turned else (count, 2 * inner, size)
                both = _meta(*shape, dtype=dtype)
                both = both.transpose(1, 2) if turned else both
                gate, up = (both[:, ::2], both[:, 1::2]) if turned else both.chunk(2, 1)
                down = _meta(count, size, inner, dtype=dtype)
                bias = _meta(count, 2 * inner, dtype=dtype)
                none: list[Tensor] = []
                biases = (none, none, none)
                if turned:
                    biases = ([bias[:, ::2]], [bias[:, 1::2]], [_meta(count, size, dtype=dtype)])
                index = _meta(tokens, k, dtype=torch.int64)
                blocks = None
                if tokens > moe.FEW:
                    rows = [_meta(n, dtype=torch.int64) for n in (tokens * k, 640, 640, 640)]
                    blocks = moe.Blocks(*rows)
                launches, _ = moe.plan(
                    _meta(tokens, size, dtype=dtype), index, _meta(tokens, k, dtype=dtype), [gate],
                    [up], [down], *biases, "silu",
                    bounds if turned else (), blocks=blocks, target=target,
                )  # fmt: skip
                name = f"{label} M={tokens} {str(dtype).removeprefix('torch.')}"
                yield Case(f"experts up {name}", launches[0])
                yield Case(f"experts down {name}", launches[1])


def grouped_cases(target: Target) -> Iterator[Case]:
    """JetMoE's products in attention, and many experts: one row, few, and a prompt's."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (1, 16, 8192):
            for label, count, size, outputs in (
                ("jetmoe", 8, 2048, 4096),
                ("many", 256, 2880, 1000),
            ):
                turned = label == "many"
                weight = _meta(count, outputs, size, dtype=dtype)
                if turned:
                    weight = _meta(count, size, outputs, dtype=dtype).transpose(1, 2)
                launch, _ = grouped.plan(
                    _meta(rows, size, dtype=dtype), _meta(count, dtype=torch.int64), weight,
                    _meta(count, outputs, dtype=dtype) if turned else None, target=target,
                )  # fmt: skip
                kind = str(dtype).removeprefix("torch.")
                yield Case(f"grouped linear {label} S={rows} {kind}", launch)


ROUTERS: dict[str, tuple[tuple[int, int, int], str, str, torch.dtype, dict[str, object]]] = {
    # (experts, features, k), scoring, normalise, dtype of the logits, the rest
    "qwen3": ((128, 2048, 8), "softmax", "sum", torch.bfloat16, {}),
    "deepseek": (
        (256, 7168, 8), "sigmoid", "sum", torch.float32,
        {"scale": 2.5, "eps": 1e-20, "groups": 8, "top_groups": 4, "group_score": "top2"},
    ),
    "gpt-oss": ((32, 2880, 4), "identity", "softmax", torch.bfloat16, {}),
    "phi": ((16, 4096, 2), "sparsemixer", "none", torch.float32, {"eps": 0.01}),
    "largest": ((2048, 4096, 64), "sqrt_softplus", "sum", torch.float32, {}),
}  # fmt: skip


def router_cases(target: Target) -> Iterator[Case]:
    """Every kind of scoring, with and without groups; one token, few, many."""
    for label, ((count, size, k), scoring, normalise, logits, rest) in ROUTERS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in (1, 8, 4096):
                launch, _ = router.plan(
                    _meta(tokens, size, dtype=dtype), _meta(count, size, dtype=dtype),
                    _meta(count, dtype=dtype) if label == "gpt-oss" else None,
                    _meta(count, dtype=torch.float32) if label == "deepseek" else None,
                    k, scoring, normalise, logits if dtype == torch.bfloat16 else dtype, dtype,
                    target=target, **rest,  # type: ignore[arg-type]
                )  # fmt: skip
                kind = str(dtype).removeprefix("torch.")
                yield Case(f"router {label} M={tokens} {kind}", launch)


def cases(target: Target) -> list[Case]:
    """Everything to compile for ``target``."""
    return [
        *norm_cases(),
        *rope_cases(),
        *cache_cases(),
        *attention_cases(target),
        *linear_cases(target),
        *linear_tile_cases(target),
        *moe_cases(target),
        *grouped_cases(target),
        *router_cases(target),
    ]
