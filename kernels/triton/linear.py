"""Linear layers of at most 16 rows: launch plans, and what they refuse.

The kernel is in `linear_kernel`, its tile sizes in `linear_tiles`. More rows than 16 are the
vendor library's: there the matrix units decide, not the reading of the weights. Reference:
`dspark_compile.ops.linear`. `plan` can do more than the dialect's ops ask for: a norm of x in
front, an activation, a second weight as in a gated MLP, a residual behind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.codegen.triton import tune
from dspark_compile.kernels.triton import linear_kernel as kernels
from dspark_compile.kernels.triton._launch import (
    TL_DTYPE,
    Launch,
    Target,
    cdiv,
    device_reason,
    dtype_reason,
    next_power_of_2,
    pdl_ready,
    target_of,
)
from dspark_compile.kernels.triton.linear_tiles import (
    MAX_ROWS,
    Shape,
    Tiles,
    candidates,
    choose,
)

MAX_PARTS = 4


@dataclass(frozen=True)
class Norm:
    """A norm of x in front of the product, as `dspark_compile.ops.norm` computes it in float32.

    Attributes:
        weight, bias: ``[K]`` of x's dtype, or None.
        centre: layer norm; otherwise RMS norm.
        in_compute: weight and bias are applied in float32, before the rounding to x's dtype.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    weight_offset: float = 0.0
    in_compute: bool = False
    centre: bool = False


@dataclass(frozen=True)
class Plan:
    """The launches of one product, in order, and its outputs."""

    launches: tuple[Launch, ...]
    outs: tuple[Tensor, ...]

    def run(self) -> tuple[Tensor, ...]:
        """Launch; the outputs."""
        for launch in self.launches:
            launch.run()
        return self.outs


def shape_of(rows: int, weight: Tensor, weights: int = 1) -> Shape:
    """What the choice of tiles depends on; any number of rows above 1 is padded to 16."""
    n, k = weight.shape
    return Shape(1 if rows == 1 else MAX_ROWS, n, k, weight.element_size(), weights)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = None,
    compute_fp32: bool = False,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    sizes: Sequence[int] = (),
    target: Target | None = None,
    tiles: Tiles | None = None,
    pdl: bool | None = None,
) -> Plan:
    """What to launch for ``act(z @ weight^T + bias) * (z @ up^T + up_bias) + residual``.

    z is x or its norm, and what is not given is left out.

    Args:
        x: ``[..., K]``, at most 16 rows. weight, up: ``[N, K]``. bias, up_bias: ``[N]``.
        residual: ``[..., N]``. All of one dtype: float16, bfloat16 or float32.
        activation: a name of ``ACTIVATIONS``; without one there is none, and no ``up``.
        compute_fp32: whether activation and gating are rounded to float32, not to x's dtype.
        sizes: widths of the outputs that the columns go to, at most four; default one output.
        tiles: default the measured choice, or else the model's.
        pdl: programmatic dependent launch; default where the target has it, unless
            ``DSPARK_PDL=0``.

    Returns:
        The plan; its outputs are contiguous ``[..., n]``, in x's dtype.
    """
    count, features = weight.shape
    lead = x.shape[:-1]
    rows = math.prod(lead)
    sizes = list(sizes) or [count]
    outs = tuple(x.new_empty((*lead, size)) for size in sizes)
    if rows == 0 or count == 0:
        return Plan((), outs)
    target = target or target_of(x)
    shape = shape_of(rows, weight, 1 if up is None else 2)
    if tiles is None:

        def build(tiles: Tiles) -> Plan:
            return plan(
                x, weight, bias, up=up, up_bias=up_bias, activation=activation,
                compute_fp32=compute_fp32, norm=norm, residual=residual, sizes=sizes,
                target=target, tiles=tiles, pdl=pdl,
            )  # fmt: skip

        tiles = tune.pick(
            "linear", shape.key, choose(shape, target), lambda: candidates(shape, target),
            lambda tiles: build(tiles).run, x.device,
        )  # fmt: skip
    x = x.reshape(rows, features)
    if x.stride(1) != 1 and features > 1:
        x = x.contiguous()
    if residual is not None:
        residual = residual.reshape(rows, count).contiguous()
    block_m = shape.m
    steps = cdiv(cdiv(features, tiles.k), tiles.splits)
    splits = cdiv(features, steps * tiles.k)
    dtype = TL_DTYPE[x.dtype]
    if pdl is None:
        pdl = os.environ.get("DSPARK_PDL", "1") != "0"
    pdl = pdl and pdl_ready(target)
    compute = torch.float32 if compute_fp32 else x.dtype
    ends = [sum(sizes[: i + 1]) for i in range(MAX_PARTS - 1)]
    part = None
    if splits > 1:
        part = x.new_empty((splits, shape.weights, rows, count), dtype=torch.float32)
    epilogue = {
        "Bias_ptr": None if bias is None else bias.contiguous(),
        "Up_bias_ptr": None if up_bias is None else up_bias.contiguous(),
        "Residual_ptr": residual,
        **{f"Y{i or ''}_ptr": outs[i] if i < len(outs) else None for i in range(MAX_PARTS)},
        "Residual_row_stride": count,
        "M": rows,
        "N": count,
        "end_0": ends[0],
        "end_1": ends[1],
        "end_2": ends[2],
    }
    constants = {
        "GATED": up is not None,
        "ACTIVATION": activation,
        "COMPUTE": TL_DTYPE[compute],
        "DTYPE": dtype,
        "PDL": pdl,
    }
    vectors = {"Norm_ptr": None, "Shift_ptr": None}
    if norm is not None:
        vectors = {
            "Norm_ptr": None if norm.weight is None else norm.weight.contiguous(),
            "Shift_ptr": None if norm.bias is None else norm.bias.contiguous(),
        }
    multiply = Launch(
        kernels.skinny_kernel,
        (cdiv(count, tiles.n), splits),
        {
            **epilogue,
            **vectors,
            "X_ptr": x,
            "W_ptr": weight,
            "Up_ptr": up,
            "Part_ptr": part,
            "X_row_stride": x.stride(0) if rows > 1 else 0,
            "W_row_stride": weight.stride(0),
            "Up_row_stride": 0 if up is None else up.stride(0),
            "K": features,
            "span": steps * tiles.k,
            "eps": 0.0 if norm is None else float(norm.eps),
            "weight_offset": 0.0 if norm is None else float(norm.weight_offset),
        },
        {
            **constants,
            "BLOCK_M": block_m,
            "BLOCK_N": tiles.n,
            "BLOCK_K": tiles.k,
            "BLOCK_S": min(next_power_of_2(features), 2048 if block_m == 1 else 256),
            "STAGES": tiles.stages,
            "EVEN": features % tiles.k == 0,
            "LINE": 128 // x.element_size(),
            "NORM": None if norm is None else "layer" if norm.centre else "rms",
            "NORM_IN_COMPUTE": norm is not None and norm.in_compute,
            "PRECISION": "tf32x3" if target.backend == "cuda" and x.element_size() == 4 else "ieee",
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        pdl=pdl,
    )
    if part is None:
        return Plan((multiply,), outs)
    add = Launch(
        kernels.finish_kernel,
        (cdiv(count, 128), rows),
        {**epilogue, "Part_ptr": part, "splits": splits},
        {**constants, "BLOCK_N": 128, "BLOCK_P": next_power_of_2(splits)},
        num_warps=4,
        num_stages=1,
        pdl=pdl,
    )
    return Plan((multiply, add), outs)


def reason(x: Tensor, **weights: Tensor | None) -> str | None:
    """Why ``x`` and the weights ``[n, k]`` and biases ``[n]`` of linear layers do not fit.

    The first weight takes x's features. None when they fit.
    """
    given = {name: t for name, t in weights.items() if t is not None}
    features = x.shape[-1] if x.dim() else None
    rows = math.prod(x.shape[:-1])
    if not isinstance(rows, int):
        return "the number of rows is not fixed"
    if rows > MAX_ROWS:
        return f"{rows} rows, more than {MAX_ROWS}: the vendor library's matrix product is taken"
    for name, t in given.items():
        if t.dtype != x.dtype:
            mine, other = (str(d).removeprefix("torch.") for d in (x.dtype, t.dtype))
            return f"x is {mine}, {name} is {other}"
        if not all(isinstance(size, int) for size in t.shape):
            return f"{name} has no fixed shape"
        if name.endswith("bias"):
            if t.dim() != 1:
                return f"{name} is {list(t.shape)}, not a vector"
        elif t.dim() != 2 or 0 in t.shape:
            return f"{name} is {list(t.shape)}, not a matrix"
        elif t.stride(1) != 1 and t.shape[1] > 1:
            return f"the rows of {name} are not contiguous"
    first = next(iter(given.values()))
    if features != first.shape[1]:
        return f"x has {features} features, the weight {first.shape[1]}"
    return dtype_reason(x=x) or device_reason(x, *given.values())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight[N, K]^T + bias[N]``, at most 16 rows."""
    return plan(x, weight, bias).run()[0]


def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """`linear` over stacked weights, each part of the result a tensor of its own."""
    return list(plan(x, weight, bias, sizes=sizes).run())


def supports_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    return reason(x, weight=weight, bias=bias)


def supports_merged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]
) -> str | None:
    if len(sizes) > MAX_PARTS:
        return f"{len(sizes)} outputs, more than {MAX_PARTS}"
    return reason(x, weight=weight, bias=bias)
