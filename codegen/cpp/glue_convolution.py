"""Convolutions along one dimension, as loops: those of a decode step's states, a few taps wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dspark_compile.codegen.cpp.glue_loops import SMALL, NotGlue
from dspark_compile.codegen.cpp.scatter import read, store

MOST = 1 << 20  # products; above, a library's kernel is wanted


def convolution(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    """``x [B, C, L]`` with ``w [C', C / groups, k]``."""
    x, w, bias, strides, padding, dilation, transposed, _, groups = args[:9]
    if x.dim() != 3 or transposed:
        raise NotGlue("a convolution that is not along one dimension")
    (outputs, inputs, taps) = w.shape
    if (work := out.numel() * inputs * taps) > MOST:
        raise NotGlue(f"a convolution of {work} products")
    compute = "double" if x.dtype.itemsize == 8 else "float"
    batch, _, length = out.shape
    step, pad, apart = strides[0], padding[0], dilation[0]
    channel = f"(c / {outputs // groups} * {inputs} + i)"
    at = f"b * {x.stride(0)} + {channel} * {x.stride(1)} + p * {x.stride(2)}"
    weight = f"c * {w.stride(0)} + i * {w.stride(1)} + j * {w.stride(2)}"
    start = "0" if bias is None else read(pointer(bias), bias.dtype, f"c * {bias.stride(0)}")
    to = f"b * {out.stride(0)} + c * {out.stride(1)} + t * {out.stride(2)}"
    share = f"team.share({outputs}, 16)"
    if out.numel() <= SMALL:
        share = f"std::pair<int64_t, int64_t>(0, {outputs})"
    product = f"{read(pointer(x), x.dtype, at)} * {read(pointer(w), w.dtype, weight)}"
    return [
        f"const auto [begin, end] = {share};",
        f"for (int64_t b = 0; b < {batch}; ++b)",
        "  for (int64_t c = begin; c < end; ++c)",
        f"    for (int64_t t = 0; t < {length}; ++t) {{",
        f"      {compute} total = {start};",
        f"      for (int64_t i = 0; i < {inputs}; ++i)",
        f"        for (int64_t j = 0; j < {taps}; ++j) {{",
        f"          const int64_t p = t * {step} + j * {apart} - {pad};",
        f"          if (p >= 0 && p < {x.shape[2]}) total += {product};",
        "        }",
        f"      {store(pointer(out), out.dtype, to, 'total')}",
        "    }",
    ]
