"""Edge cases of routers and experts in C++, drawn at random, for every instruction set there is.

Zero tokens to an expert and all to one, experts that a token has twice or that another rank holds,
numbers of experts and sizes that fill no vector, every expert for every token, one token and many.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_compile.codegen.cpp import isa
from dspark_compile.kernels import cpp
from dspark_compile.ops import OPS
from dspark_compile.ops.moe import _scores, route
from tests.cpp.test_grouped import grouped
from tests.cpp.test_moe import ROUTERS, double
from tests.cpp.test_moe import experts as plain
from tests.cpp.test_moe_quantized import experts as quantised

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 33, 40, 64, 65, 72, 100, 129])
TOKENS = st.sampled_from([1, 1, 2, 3, 5, 8, 15, 16, 17, 31, 65, 130, 300])
COUNTS = st.sampled_from([1, 2, 3, 5, 8, 13, 31, 64])
EACH = settings(deadline=None, max_examples=30, derandomize=True)


@pytest.fixture(params=[pytest.param(level, marks=pytest.mark.slow) for level in isa.LEVELS])
def level(request):
    """The instruction set that kernels are built for."""
    if request.param not in isa.available():
        pytest.skip(f"this CPU has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CPU_ISA", request.param)
        yield request.param


def choices(tokens, count, k, how):
    """``[tokens, k]`` experts; see the module's docstring."""
    if how == "one":
        return torch.full((tokens, k), count - 1)
    if how == "same":
        return torch.randperm(count)[:k].expand(tokens, k).contiguous()
    if how == "elsewhere":
        index = torch.randint(-2, count + 3, (tokens, k))
        return torch.where(torch.rand(tokens, k) < 0.1, 2**31 - 1, index)
    if how == "nobody":
        return torch.full((tokens, k), count)
    return torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])


HOW = st.sampled_from(["any", "one", "same", "elsewhere", "nobody"])


def near(name, args, dtype):
    """The kernel is as near to float64 as the plain form in the model's dtype is."""
    reason = cpp.supports(name, *args)
    assert reason is None, reason
    want = OPS[name].reference(*double(args))
    got = getattr(torch.ops.dspark_cpu, name)(*args)
    own = OPS[name].reference(*args).double()
    scale = want.abs().max().clamp(min=1e-6)
    error, allowed = (float((x.double() - want).abs().max() / scale) for x in (got, own))
    assert got.dtype == dtype and error <= max(TOLERANCE[dtype], 2 * allowed), (error, allowed)


PLAIN = [
    (torch.bfloat16, {}),
    (torch.bfloat16, {"lie": "alternating", "bias": True}),
    (torch.float32, {"lists": True, "bias": True}),
    (torch.float16, {"gated": False, "weigh_input": True}),
    (torch.float32, {"norm": True}),
]


@pytest.mark.parametrize("dtype, form", PLAIN)
def test_experts(level, dtype, form):
    @EACH
    @given(TOKENS, COUNTS, st.integers(1, 64), SIZES, SIZES, SIZES, HOW, st.integers(0, 2**16))
    def check(tokens, count, k, features, inner, outputs, how, seed):
        torch.manual_seed(seed)
        k = min(k, count)
        if form.get("norm"):
            outputs += 15  # of few numbers near zero a norm makes what rounding leaves of them
        args = plain(dtype, tokens, count, k, features, inner, outputs, **form)
        args[1] = choices(tokens, count, k, how)
        near("moe_experts", args, dtype)

    check()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("grouped_scales", [False, True])
def test_quantised_experts(level, bits, grouped_scales):
    sizes = st.sampled_from([32, 64, 96, 160] if grouped_scales else [32, 34, 40, 64, 100, 130])

    @EACH
    @given(TOKENS, COUNTS, st.integers(1, 16), sizes, sizes, SIZES, HOW, st.integers(0, 2**16))
    def check(tokens, count, k, features, inner, outputs, how, seed):
        torch.manual_seed(seed)
        k = min(k, count)
        groups = (features // 32, inner // 32) if grouped_scales else (1, 1)
        args = quantised(
            torch.bfloat16, tokens, bits, count, k, features, inner, outputs, groups=groups,
            zero=torch.int8 if grouped_scales else None, bias=not grouped_scales,
        )  # fmt: skip
        args[1] = choices(tokens, count, k, how)
        near(f"moe_experts_int{bits}", args, torch.bfloat16)

    check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_grouped_rows(level, dtype, turned):
    @EACH
    @given(TOKENS, COUNTS, SIZES, SIZES, st.integers(0, 2**16))
    def check(rows, count, features, outputs, seed):
        torch.manual_seed(seed)
        args = grouped(dtype, rows, count + 1, features, outputs, turned=turned, bias=turned)
        near("grouped_linear", args, dtype)

    check()


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers(level, name, dtype):
    """The choice is torch's over the same logits, many of which are equal."""
    form = {**ROUTERS[name]}
    biased, corrected = form.pop("bias", False), form.pop("correction", False)
    kinds = [form.pop("scoring"), form.pop("normalise")]
    groups, kept = form.get("groups", 1), form.get("top_groups", 1)

    @EACH
    @given(TOKENS, st.sampled_from([4, 8, 24, 64, 160, 256]), st.integers(1, 8), SIZES,
           st.booleans(), st.integers(0, 2**16))  # fmt: skip
    def check(tokens, count, k, features, ties, seed):
        torch.manual_seed(seed)
        k = min(k, count // groups * kept if groups > 1 else count)
        x, w = torch.randn(tokens, features), torch.randn(count, features) * 0.3
        if ties:
            x, w = x.round(), w.sign()
        bias = torch.randn(count).to(dtype) if biased else None
        correction = torch.randn(count) * 0.3 if corrected else None
        if form.get("group_score") == "top2" and count // groups < 2:
            return
        args = (x.to(dtype), w.to(dtype), bias, correction, k, *kinds, dtype, torch.float32)
        assert cpp.supports("moe_router", *args, **form) is None
        logits, weights, indices = torch.ops.dspark_cpu.moe_router(*args, **form)
        exact = torch.nn.functional.linear(args[0].double(), args[1].double())
        exact = exact if bias is None else exact + bias.double()
        scale = exact.abs().max().clamp(min=1e-6)
        assert float((logits.double() - exact).abs().max() / scale) <= TOLERANCE[dtype]
        share, chosen = route(logits.float(), correction, k, *kinds, **form)
        ours, theirs = indices.sort(-1)[0], chosen.sort(-1)[0]
        if ties and kinds[0] == "identity":
            assert torch.equal(ours, theirs)
        # Elsewhere scores that differ in their last bit may stand in another order, and so may
        # groups of them.
        same = (ours == theirs).all(-1)
        if groups > 1:
            assert tokens < 8 or same.float().mean() >= 0.5
        elif not same.all():
            scores = logits.double()
            scores = scores if kinds[0] == "sparsemixer" else _scores(scores, kinds[0])
            scores = scores if correction is None else scores + correction.double()
            ranked = (scores.gather(1, index).sort(-1)[0] for index in (indices, chosen))
            torch.testing.assert_close(*ranked, atol=1e-5, rtol=1e-5)
        mine = torch.zeros(tokens, count).scatter(1, indices, weights)[same]
        torch.testing.assert_close(
            mine, torch.zeros(tokens, count).scatter(1, chosen, share)[same], atol=2e-5, rtol=1e-4
        )

    check()


@pytest.mark.parametrize("name", ["moe_experts", "moe_experts_int8", "grouped_linear"])
def test_no_rows(name):
    """A batch of nothing, and a token without experts."""
    if name == "grouped_linear":
        args = grouped(torch.float32, 3)
        args[0], args[1] = args[0][:0], torch.zeros_like(args[1])
    else:
        make = plain if name == "moe_experts" else quantised
        args = make(torch.float32, 3)
        args[:3] = (a[:0] for a in args[:3])
    got = getattr(torch.ops.dspark_cpu, name)(*args)
    assert got.shape == (0, 56) and got.dtype == torch.float32


def test_choices_in_batches_of_any_shape():
    args = plain(torch.float32, 6)
    want = torch.ops.dspark_cpu.moe_experts(*args)
    args[:3] = (a.view(1, 3, 2, -1).expand(1, 3, 2, a.shape[-1]) for a in args[:3])
    got = torch.ops.dspark_cpu.moe_experts(*args)
    assert torch.equal(got.view(6, -1), want)
