"""Pointwise work, norms and copies between the kernels of a native step, as ATen computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.cpp.test_scatter import native, same

UNARY = (
    "neg", "abs", "cos", "sin", "exp", "tanh", "sigmoid", "relu", "round", "floor", "ceil", "trunc",
    "log1p", "expm1", "exp2", "tan", "atan", "sinh", "cosh", "asinh", "erf", "erfc", "sign", "sgn",
    "square", "isnan", "isinf",
)  # fmt: skip
NARROW = ("asin", "acos", "atanh")  # of -1 to 1
POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal", "log2", "log10")


def unary(x, w):
    y = F.linear(x, w)  # a native step has a product
    z = torch.where(y > 2, torch.nan, torch.where(y < -2, -torch.inf, y))
    safe = y.tanh() * 0.9
    large = y.abs() + 0.1
    return (
        *(getattr(torch, name)(y) for name in UNARY),
        *(getattr(torch, name)(safe) for name in NARROW),
        *(getattr(torch, name)(large) for name in POSITIVE), torch.acosh(large + 1),
        torch.erfinv(safe), torch.erfinv(safe.round()),
        z.relu(), z.isnan(), z.isinf(), z.sign(), torch.clamp(z, -1, 1), F.hardtanh(z),
    )  # fmt: skip


def with_numbers(x, w):
    y = F.linear(x, w)
    return (
        F.softplus(y), F.softplus(9 * y, 2.0, 5.0), F.leaky_relu(y), F.leaky_relu(y, 0.3), F.elu(y),
        F.elu(y, 0.7), F.celu(y, 1.3), F.selu(y), F.hardtanh(y, -0.5, 0.25), F.relu6(4 * y),
        F.hardsigmoid(4 * y), F.hardswish(4 * y), F.mish(y), F.gelu(y), F.silu(y),
        torch.atan2(y, y.flip(0)), torch.hypot(y, y + 1), y.clamp_min(0.1), y.clamp_max(0.1),
    )  # fmt: skip


def reduced(x, w):
    y = F.linear(x, w)
    return (
        y.norm(dim=-1), y.norm(dim=0, keepdim=True), torch.linalg.vector_norm(y, 1, -1),
        torch.linalg.vector_norm(y, torch.inf, 0), y.norm(), F.normalize(y, dim=-1),
        F.normalize(y, dim=0), y.var(-1), y.var(0, correction=0, keepdim=True), y.std(-1),
        (1 + 0.1 * y).prod(-1), (1 + 0.1 * y).prod(), torch.linspace(-2, 3, 7) + y[0, 0],
    )  # fmt: skip


def copies(x, w):
    y = F.linear(x, w)
    z = torch.zeros_like(y)
    z[:, ::3] = y[:, : z[:, ::3].shape[1]]
    u = y * 2
    u[1::2, 2:9:4] = 7.0
    return (
        y.repeat(1, 2), y.repeat(3, 1, 1), y[0].repeat(2, 3), z + 1, u + 1, F.pad(y, (2, 1)),
        F.pad(y, (-2, 3, 1, -1), value=-0.5), F.pad(y.long(), (1, -5, 0, 1), value=3),
        F.pad(y, (-24, 40)), F.pad(y > 0, (1, 1), value=1),
    )  # fmt: skip


def convolutions(x, w):
    y = F.linear(x, w).view(1, 9, 8)
    every, alone = w[:10, :18].reshape(10, 9, 2), w[:9, :4].reshape(9, 1, 4)
    long = F.linear(x, w).view(1, 72, 1).repeat(2, 16, 9)
    return (
        F.conv1d(y, alone, groups=9), F.conv1d(y, alone, w[0, :9], padding=3, groups=9),
        F.conv1d(y, every, w[1, :10], stride=2, dilation=2), F.conv1d(y, every, padding=1),
        F.conv1d(y, w[:12, :6].reshape(12, 3, 2), w[2, :12], groups=3),
        F.conv1d(long, w.reshape(-1)[:4].repeat(1152, 1, 1), groups=1152),
    )  # fmt: skip


def products(x, w):
    """Matrices of many rows and few columns, and the other way."""
    y = F.linear(x, w)
    few, many = y.view(1, 3, 24).mT, torch.cat([w.view(1, 24, 24)] * 2, 1) + y[0]
    return many @ few, many @ few[..., :1], few.mT @ many.mT, (many * 2).mT[:, :, :9] @ few[:, :9]


@pytest.mark.parametrize("function", [unary, with_numbers, reduced, copies, convolutions, products])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_aten(function, dtype):
    x, w = torch.randn(3, 24, dtype=dtype), torch.randn(24, 24, dtype=dtype) * 0.3
    want, got = native(function, x, w)
    if dtype == torch.bfloat16:
        want, got = ([r.float() for r in results] for results in (want, got))
    same(want, got, dtype)
