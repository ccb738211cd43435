"""Feed-forward blocks, in the spellings that people use, become one dialect op."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from spellings import call, raised, rejected, run

K, I = 8, 12  # noqa: E741


def weights(*shapes, dtype=torch.float32):
    return [torch.randn(*s).mul(0.3).to(dtype) for s in shapes]


ACTIVATIONS = {
    "silu": F.silu,
    "silu_": lambda x: x * torch.sigmoid(x),
    "silu__": lambda x: x / (1 + torch.exp(-x)),
    "gelu": F.gelu,
    "gelu_": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_tanh_new": lambda x: (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    ),
    "gelu_tanh_bloom": lambda x: (
        x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
    ),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu_": lambda x: x.clamp(min=0),
    "relu2": lambda x: F.relu(x).square(),
    "relu2_": lambda x: F.relu(x) * F.relu(x),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def base_name(key):
    return next(n for n in ("gelu_tanh", "quick_gelu", "relu2", "silu", "gelu", "relu", key)
                if key.startswith(n))  # fmt: skip


@pytest.mark.parametrize("key", ACTIVATIONS)
def test_gated(key):
    act = ACTIVATIONS[key]

    def f(x, g, u, d):
        return F.linear(act(F.linear(x, g)) * F.linear(x, u), d)

    x, ws = torch.randn(2, 3, K), weights((I, K), (I, K), (K, I))
    graph = raised("mlp", "gated_mlp", f, x, *ws)
    assert f"None, None, None, {base_name(key)})" in call(graph, "gated_mlp", "raise_mlp")


@pytest.mark.parametrize("key", ACTIVATIONS)
def test_plain(key):
    act = ACTIVATIONS[key]

    def f(x, u, b, d, c):
        return F.linear(act(F.linear(x, u, b)), d, c)

    x, ws = torch.randn(2, 3, K), weights((I, K), (I,), (K, I), (K,))
    graph = raised("mlp", "mlp", f, x, *ws)
    assert f", {base_name(key)})" in call(graph, "mlp", "raise_mlp")


def test_bf16_keeps_the_precision():
    def plain(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

    def wide(x, g, u, d):
        return F.linear((F.silu(F.linear(x, g).float()) * F.linear(x, u).float()).to(x.dtype), d)

    x = torch.randn(2, 3, K).bfloat16()
    ws = weights((I, K), (I, K), (K, I), dtype=torch.bfloat16)
    assert "silu)" in call(raised("mlp", "gated_mlp", plain, x, *ws), "gated_mlp", "raise_mlp")
    torch._dynamo.reset()
    graph = raised("mlp", "gated_mlp", wide, x, *ws)
    assert "silu, True)" in call(graph, "gated_mlp", "raise_mlp")


def test_up_first_in_the_product():
    def f(x, g, u, d):
        return F.linear(F.linear(x, u) * F.gelu(F.linear(x, g)), d)

    x, (g, u, d) = torch.randn(2, 3, K), weights((I, K), (I, K), (K, I))
    graph = raised("mlp", "gated_mlp", f, x, g, u, d)
    line = call(graph, "gated_mlp", "raise_mlp")
    assert line.index("%arg2_1") < line.index("%arg1_1") or "gelu" in line


@pytest.mark.parametrize("split", ["chunk", "slice", "view", "split"])
def test_merged(split):
    def f(x, w, b, d):
        y = F.linear(x, w, b)
        if split == "chunk":
            g, u = y.chunk(2, -1)
        elif split == "slice":
            g, u = y[..., :I], y[..., I:]
        elif split == "split":
            g, u = y.split([I, I], dim=2)
        else:
            y = y.view(*y.shape[:-1], 2, -1)
            g, u = y[..., 0, :], y[..., 1, :]
        return F.linear(u * F.silu(g), d)

    x, ws = torch.randn(2, 3, K), weights((2 * I, K), (2 * I,), (K, I))
    raised("mlp", "gated_mlp_merged", f, x, *ws)


def test_merged_with_the_up_rows_first():
    def f(x, w, b, d):
        u, g = F.linear(x, w, b).chunk(2, -1)
        return F.linear(u * F.silu(g), d)

    graph = raised("mlp", "gated_mlp", f, torch.randn(2, 3, K),
                   *weights((2 * I, K), (2 * I,), (K, I)))  # fmt: skip
    assert "aten.clone" not in graph.programs["after raise_mlp"]


def test_merged_with_rows_interleaved():
    def f(x, w, d):
        y = F.linear(x, w)
        return F.linear(y[..., 1::2] * F.silu(y[..., ::2]), d)

    raised("mlp", "gated_mlp", f, torch.randn(2, 3, K), *weights((2 * I, K), (K, I)))


@pytest.mark.parametrize("spelling", ["conv1d", "matmul", "matmul_t", "biased"])
def test_products_with_a_parameter(spelling):
    """GPT-2's Conv1D, ``x @ W`` and ``x @ W.T``, with the bias inside or outside."""

    def product(x, w, b):
        if spelling == "conv1d":
            return torch.addmm(b, x.view(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[1])
        if spelling == "matmul":
            return x @ w + b
        if spelling == "matmul_t":
            return x @ w.t().contiguous().t() + b
        return F.linear(x, w.t()) + b

    def f(x, u, b, d, c):
        return product(F.gelu(product(x, u, b)), d, c)

    x, ws = torch.randn(2, 3, K), weights((K, I), (I,), (I, K), (K,))
    graph = raised("mlp", "mlp", f, x, *ws)
    left = graph.programs["after raise_mlp"]
    assert "aten.mm" not in left and "aten.addmm" not in left


def test_two_dimensional_input():
    def f(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

    raised("mlp", "gated_mlp", f, torch.randn(3, K), *weights((I, K), (I, K), (K, I)))


def test_dynamic_tokens():
    def f(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

    x = torch.randn(2, 5, K)
    torch._dynamo.mark_dynamic(x, 1)
    raised("mlp", "gated_mlp", f, x, *weights((I, K), (I, K), (K, I)))


def test_scaled_result_is_outside():
    def f(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d) * 0.5

    raised("mlp", "gated_mlp", f, torch.randn(3, K), *weights((I, K), (I, K), (K, I)))


# -- left alone, with the reason ------------------------------------------------------------------


def gated(between):
    def f(x, g, u, d):
        return F.linear(between(F.linear(x, g), F.linear(x, u)), d)

    return f, torch.randn(2, 3, K), *weights((I, K), (I, K), (K, I))


@pytest.mark.parametrize(
    "between",
    [
        lambda g, u: F.silu(g * 0.5) * u,
        lambda g, u: F.silu(g) * (u + 1),
        lambda g, u: F.silu(g).clamp(max=7.0) * u,
        lambda g, u: F.silu(g) * u.clamp(-7.0, 7.0),
        lambda g, u: F.silu(g) + u,
        lambda g, u: F.silu(g * u),
        lambda g, u: F.mish(g) * u,
    ],
    ids=["gate scaled", "up offset", "clamped", "up clamped", "sum", "joint", "mish"],
)
def test_other_functions(between):
    function, *args = gated(between)
    rejected("mlp", "act(gate) * up", function, *args)


def test_unknown_activation():
    def f(x, u, d):
        return F.linear(F.hardtanh(F.linear(x, u)), d)

    rejected("mlp", "is not the activation", f, torch.randn(3, K), *weights((I, K), (K, I)))


def test_no_activation_is_no_mlp():
    def f(x, u, d):
        return F.linear(F.linear(x, u) * 0.5, d)

    _, graph = run(f, torch.randn(3, K), *weights((I, K), (K, I)))
    assert not [s for s in graph.sites if s.kind == "mlp"]


def test_intermediate_used_elsewhere():
    def f(x, g, u, d):
        h = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(h, d), h.sum()

    rejected("mlp", "also used by", f, torch.randn(3, K), *weights((I, K), (I, K), (K, I)))


def test_gate_used_elsewhere():
    def f(x, g, u, d):
        h = F.linear(x, g)
        return F.linear(F.silu(h) * F.linear(x, u), d), h + 1

    rejected("mlp", "also used by", f, torch.randn(3, K), *weights((I, K), (I, K), (K, I)))


def test_two_inputs():
    def f(x, y, g, u, d):
        return F.linear(F.silu(F.linear(x, g)) * F.linear(y, u), d)

    rejected("mlp", "different inputs", f, torch.randn(3, K), torch.randn(3, K),
             *weights((I, K), (I, K), (K, I)))  # fmt: skip


def test_merged_result_used_elsewhere():
    def f(x, w, d):
        g, u, z = F.linear(x, w).chunk(3, -1)
        return F.linear(F.silu(g) * u, d), z * 2

    rejected("mlp", "also used by", f, torch.randn(3, K), *weights((3 * I, K), (K, I)))
