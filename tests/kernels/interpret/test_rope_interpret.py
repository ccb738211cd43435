"""The RoPE kernel against the dialect."""

from __future__ import annotations

import pytest
import torch
from interpreted import compare

from dspark_compile.kernels.triton import supports


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rotary", "width"), [(40, 40), (24, 12), (24, 24)])
def test_styles(dtype, interleaved, rotary, width):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 40, dtype=dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 2, 1, 3, width, dtype=dtype)
    compare("rope", x, cos, sin, rotary, interleaved)


def test_dtypes():
    x, table = torch.randn(3, 16).half(), torch.randn(2, 3, 16)
    compare("rope", x, *table, 16)
    compare("rope", x, *table.half(), 16, False, True, tolerance=1e-2)
    compare("rope", x, *table, 16, False, True, torch.float32, tolerance=1e-3)


def test_broadcasting_both_ways():
    x = torch.randn(1, 4, 3, 8)
    compare("rope", x, *torch.randn(2, 3, 8), 8)
    compare("rope", x, *torch.randn(2, 2, 1, 3, 4), 8)
    compare("rope", x[:, :, :1].transpose(1, 2), *torch.randn(2, 1, 1, 8), 8)
    compare("rope", torch.randn(80, 8), *torch.randn(2, 80, 8), 8)


def test_refusals():
    x = torch.randn(2, 16)
    assert "rotary_dim 15" in supports("rope", x, x, x, 15)
    assert "cos has 16 features" in supports("rope", x, x, x, 8)
