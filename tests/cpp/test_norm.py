"""RMS and layer norm in C++: against the dialect's references."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.kernels import cpp
from dspark_compile.ops import OPS


def both(name, *args, **kwargs):
    assert cpp.supports(name, *args, **kwargs) is None
    got = getattr(torch.ops.dspark_cpu, name)(*args, **kwargs)
    want = OPS[name].reference(*args, **kwargs)
    return (got, want) if isinstance(got, (tuple, list)) else ([got], [want])


def close(got, want):
    # In bfloat16 and float16 a mean summed in another order may turn one rounding.
    for g, w in zip(got, want):
        assert g.dtype == w.dtype and g.shape == w.shape and g.is_contiguous()
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[w.dtype]
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 37, 64, 1000])
def test_rms_norm(dtype, features):
    x = (3 * torch.randn(2, 3, features)).to(dtype)
    weight = torch.randn(features).to(dtype)
    close(*both("rms_norm", x, weight, 1e-6))
    close(*both("rms_norm", x, None, 1e-6))
    close(*both("rms_norm", x, weight, 1e-6, 1.0, True))


def test_other_spellings():
    x, weight = torch.randn(5, 40).bfloat16(), torch.randn(40)
    close(*both("rms_norm", x, weight, 1e-6, 0.0, False, True, torch.float32))
    close(*both("rms_norm", x, weight.bfloat16(), 1e-6, 1.0, False))
    close(*both("rms_norm", x.float(), weight, 1e-6, 0.0, False, False))
    assert "computes in bfloat16" in cpp.supports("rms_norm", x, None, 1e-6, 0.0, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm(dtype):
    x = (torch.randn(4, 77) + 5).to(dtype)
    weight, bias = torch.randn(77).to(dtype), torch.randn(77).to(dtype)
    close(*both("layer_norm", x, weight, bias, 1e-5, 0.0, True))
    close(*both("layer_norm", x, None, None, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norms(dtype):
    x, residual = torch.randn(2, 3, 50).to(dtype), torch.randn(2, 3, 50).to(dtype)
    weight, bias = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    got, want = both("add_rms_norm", x, residual, weight, 1e-6)
    close(got, want)
    assert torch.equal(got[1], want[1])
    close(*both("add_layer_norm", x, residual, weight, bias, 1e-5, 0.0, True))
    close(*both("add_rms_norm", x, residual[:, :1], weight, 1e-6))


def test_strides_and_empty():
    x = torch.randn(2, 3, 4, 6, 20).permute(3, 1, 0, 2, 4)[::2]
    weight = torch.randn(20)
    close(*both("rms_norm", x, weight, 1e-6))
    close(*both("rms_norm", torch.randn(4, 40)[:, ::2], weight, 1e-6))
    close(*both("rms_norm", torch.randn(0, 20), weight, 1e-6))
    close(*both("rms_norm", torch.randn(20), weight, 1e-6))
