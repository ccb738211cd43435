"""Comparing a ``dspark_triton`` op with the dialect op of its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark_compile.kernels.triton import overload, supports
from dspark_compile.ops import OPS

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not expected.is_floating_point():
        # int8: a value on the edge between two steps may fall on either.
        assert (actual.int() - expected.int()).abs().max() <= 1
        assert (actual != expected).float().mean() < 0.01
        return
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(actual, expected, atol=limit, rtol=limit)


def compare(name: str, *args: Any, tolerance: float | None = None, **kwargs: Any) -> None:
    """Run both; results and layouts agree."""
    assert supports(name, *args, **kwargs) is None
    actual = overload(name)(*args, **kwargs)
    expected = OPS[name].overload(*args, **kwargs)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for a, e in zip(actual, expected):
        assert_close(a, e, tolerance)
