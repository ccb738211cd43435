"""RMSNorm and LayerNorm kernels against the dialect."""

from __future__ import annotations

import pytest
import torch
from interpreted import compare

from dspark_compile.kernels.triton import supports

HALF, FULL = torch.float16, torch.float32


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "offset", "in_compute", "fp32", "out_dtype"),
    [
        (FULL, FULL, 0.0, False, True, None),
        (HALF, HALF, 1.0, True, True, None),
        (HALF, HALF, 0.5, False, True, FULL),
        (HALF, FULL, 0.0, False, True, None),
        (HALF, HALF, 0.0, False, False, None),
        (HALF, None, 0.0, True, True, HALF),
    ],
)
def test_attributes(name, dtype, weight_dtype, offset, in_compute, fp32, out_dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, dtype=dtype)
    weight = None if weight_dtype is None else torch.randn(40, dtype=weight_dtype)
    operands = [x]
    if name.startswith("add"):
        operands.append(torch.randn(2, 3, 40, dtype=dtype))
    operands.append(weight)
    if name.endswith("layer_norm"):
        operands.append(weight)
    tolerance = 1e-2 if HALF in (dtype, out_dtype) else None
    compare(name, *operands, 1e-5, offset, in_compute, fp32, out_dtype, tolerance=tolerance)


@pytest.mark.parametrize("features", [1, 7, 64, 129])
def test_any_width(features):
    compare("rms_norm", torch.randn(3, features), torch.randn(features), 1e-6)


def test_rows_with_strides():
    """Heads behind tokens, a slice, an expanded residual, features that are not contiguous."""
    x = torch.randn(2, 5, 3, 24).transpose(1, 2)
    weight = torch.randn(24)
    compare("rms_norm", x, weight, 1e-6)
    compare("rms_norm", torch.randn(4, 60)[:, 10:34], weight, 1e-6)
    compare("add_rms_norm", x, torch.randn(24).expand(3, 1, 24), weight, 1e-6)
    compare("layer_norm", torch.randn(24, 5).t(), weight, weight, 1e-6)
    compare("rms_norm", torch.randn(2, 2, 2, 2, 48).transpose(0, 3)[..., ::2], weight, 1e-6)


def test_many_rows_share_a_program():
    compare("add_layer_norm", torch.randn(67, 20), torch.randn(67, 20), None, None, 1e-5)


def test_no_rows():
    compare("rms_norm", torch.randn(0, 16), torch.randn(16), 1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.randn(2, 8, 16), torch.randn(8, 16), "weight is [8, 16], not [16]"),
        (torch.randn(2, 16).double(), None, "x is float64"),
        (torch.randn(2, 20000), None, "20000 features"),
    ],
)
def test_refusals(x, weight, reason):
    assert reason in supports("rms_norm", x, weight, 1e-6)
