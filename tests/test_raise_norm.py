"""RMSNorm and LayerNorm, in the spellings that people use, become one dialect op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spellings import call, raised, rejected, run
from torch import nn

EPS = 1e-5


def llama(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def gemma(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


def weight_before_cast(x, w):
    h = x.float()
    return (w * (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def weight_right(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, True) + EPS)).type_as(x) * w


def no_cast(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def factor_cast(x, w):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype) * w


def divided(x, w):
    return w * (x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS))


def power(x, w):
    return w * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5))


def reciprocal(x, w):
    return w * x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def restored(x, w):
    return w * x * torch.rsqrt(x.pow(2).mean(-1) + EPS).unsqueeze(-1)


def indexed(x, w):
    return w * x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[..., None]


def summed(x, w):
    return x * torch.rsqrt((x**2).sum(-1, keepdim=True) / x.shape[-1] + EPS) * w


def weight_first(x, w):
    return x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w)


def eps_left(x, w):
    return x * torch.rsqrt(EPS + x.pow(2).mean(-1, keepdim=True)) * w


def torch_norm(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, EPS)


RMS = [llama, gemma, weight_before_cast, weight_right, no_cast, factor_cast, divided, power,
       reciprocal, restored, indexed, summed, weight_first, eps_left, torch_norm]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", RMS, ids=lambda f: f.__name__)
def test_rms_norm(function, dtype):
    x, w = torch.randn(2, 3, 16).to(dtype), torch.randn(16).to(dtype)
    graph = raised("norm", "rms_norm", function, x, w)
    left = graph.programs["after raise_norm"]
    assert not any(op in left for op in ("rsqrt", "aten.mean", "aten.sqrt", "aten.pow"))


def test_attributes_keep_the_roundings():
    x, w = torch.randn(2, 16).bfloat16(), torch.randn(16).bfloat16()
    assert "1e-05, 0.0, False, True, None" in call(
        raised("norm", "rms_norm", llama, x, w), "rms_norm", "raise_norm"
    )
    torch._dynamo.reset()
    assert "1e-05, 1.0, True, True, None" in call(
        raised("norm", "rms_norm", gemma, x, w), "rms_norm", "raise_norm"
    )


def test_wide_weight_widens_the_result():
    graph = raised("norm", "rms_norm", llama, torch.randn(2, 16).bfloat16(), torch.randn(16))
    assert "torch.float32" in call(graph, "rms_norm", "raise_norm")


def test_without_weight():
    def l2(x):
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)

    raised("norm", "rms_norm", l2, torch.randn(2, 4, 8).bfloat16())


def test_weight_per_head():
    raised("norm", "rms_norm", llama, torch.randn(2, 3, 4, 8), nn.Parameter(torch.randn(4, 8)))


def test_gate_is_not_a_weight():
    """A gate of one token has the shape of a weight with leading ones."""

    def gated(x, w, g):
        return llama(x, w) * F.silu(g)

    graph = raised("norm", "rms_norm", gated, *(torch.randn(1, 1, 8), torch.randn(8)),
                   torch.randn(1, 1, 8))  # fmt: skip
    assert "silu" in graph.programs["after raise_norm"]


def test_two_weights_on_one_normalised_tensor():
    def both(x, w, v):
        return llama(x, w), llama(x, v)

    raised("norm", "rms_norm", both, torch.randn(2, 8), torch.randn(8), torch.randn(8), n=2)


def test_the_bare_norm_is_used_too():
    def both(x, w):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return h * w, h + 1

    raised("norm", "rms_norm", both, torch.randn(2, 8), torch.randn(8), n=2)


def test_dynamic_shape():
    def f(x, w):
        return w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    raised("norm", "rms_norm", f, torch.randn(3, 5, 8), torch.randn(8), dynamic=True)


# -- layer norm -----------------------------------------------------------------------------------


def by_hand(x, w, b):
    h = x.float()
    centred = h - h.mean(-1, keepdim=True)
    return (w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + b).to(
        x.dtype
    )


def by_var(x, w, b):
    u = x.mean(-1, keepdim=True)
    s = x.var(-1, keepdim=True, unbiased=False)
    return (x - u) / torch.sqrt(s + EPS) * w + b


def by_var_mean(x, w, b):
    s, u = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - u) * torch.rsqrt(s + EPS) * w + b


def by_squares(x, w, b):
    u = x.mean(-1, keepdim=True)
    s = (x * x).mean(-1, keepdim=True) - u * u
    return (x - u) * torch.rsqrt(s + EPS) * w + b


def by_torch(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w, b, EPS)


def one_plus(x, w, b):
    return F.layer_norm(x, (x.shape[-1],), w + 1, b, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "function", [by_hand, by_var, by_var_mean, by_squares, by_torch, one_plus],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_layer_norm(function, dtype):
    x, w, b = (torch.randn(*s).to(dtype) for s in ((2, 3, 16), (16,), (16,)))
    raised("norm", "layer_norm", function, x, w, b)


def test_casts_around_a_captured_norm_are_folded():
    def olmo(x):
        return F.layer_norm(x.float(), (x.shape[-1],), None, None, 1e-5).to(x.dtype)

    graph = raised("norm", "layer_norm", olmo, torch.randn(2, 8).bfloat16())
    assert "_to_copy" not in graph.programs["after raise_norm"]


def test_residual_is_not_a_bias():
    def block(x, r, w, b):
        return by_hand(x, w, b) + r

    graph = raised("norm", "layer_norm", block, *(torch.randn(1, 1, 8) for _ in range(2)),
                   torch.randn(8), torch.randn(8))  # fmt: skip
    assert "aten.add.Tensor" in graph.programs["after raise_norm"]


# -- left alone, with the reason --------------------------------------------------------------


def test_wrong_dimension():
    def f(x):
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)

    rejected("norm", "not the last", f, torch.randn(4, 4, 4))


def test_other_tensor_is_scaled():
    def f(x, y):
        return y * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)

    rejected("norm", "does not scale", f, torch.randn(4, 8), torch.randn(4, 8))


def test_uncentred_variance():
    def f(x):
        return x * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)

    rejected("norm", "does not scale", f, torch.randn(4, 8))


def test_unbiased_variance():
    def f(x):
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS)

    rejected("norm", "unbiased", f, torch.randn(4, 8))


def test_eps_outside_the_root():
    def f(x):
        return x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + EPS)

    rejected("norm", "outside the root", f, torch.randn(4, 8))


def test_clamped_mean():
    def f(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp_min(EPS))

    rejected("norm", "clamped", f, torch.randn(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_l2_norm_is_a_norm_times_a_constant(dtype):
    def f(x):
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)

    def g(x):
        return x / x.norm(dim=-1, keepdim=True)

    for function in (f, g):
        torch._dynamo.reset()
        raised("norm", "rms_norm", function, torch.randn(4, 6).to(dtype))


def test_clamped_vector_norm():
    rejected("norm", "outside the root", lambda x: F.normalize(x, dim=-1), torch.randn(4, 8))


def test_wide_weight_after_the_cast():
    """The product with a weight cast to float32 is not rounded to the narrow type."""

    def f(x, w):
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return h * (w.float() + 0.01)

    x, w = torch.randn(2, 16).bfloat16(), torch.randn(16).bfloat16()
    got, graph = run(f, x, w)
    torch.testing.assert_close(got, f(x, w), atol=1e-5, rtol=1e-5)
    assert graph.ops["rms_norm"] == 1


def test_eps_as_a_tensor():
    def f(x, e):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e)

    rejected("norm", "eps is a tensor", f, torch.randn(4, 8), torch.tensor(1e-5))


def test_over_two_dimensions():
    def f(x):
        return F.layer_norm(x, (4, 8))

    rejected("norm", "more than the last", f, torch.randn(2, 4, 8))


def test_vector_norm_over_the_root_of_the_size():
    def f(x):
        return x / (x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5)

    raised("norm", "rms_norm", f, torch.randn(4, 8))


def test_weight_of_another_shape_stays_outside():
    def f(x, w):
        return no_cast(x, w)

    raised("norm", "rms_norm", f, torch.randn(2, 4, 3, 8), torch.randn(4, 1, 8))


def test_float64_inside_is_left_alone():
    def f(x):
        h = x.double()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    _, graph = run(f, torch.randn(4, 8))
    assert not graph.ops.get("rms_norm")
