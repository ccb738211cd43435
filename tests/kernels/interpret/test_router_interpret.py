"""The router's kernel against the dialect."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import TOLERANCE, assert_close

from dspark_compile.kernels.triton import overload, supports
from dspark_compile.ops import OPS

F32 = torch.float32


def arguments(tokens, experts=12, top_k=3, *, dtype=F32, bias=False, correction=False):
    torch.manual_seed(tokens + experts)
    x = torch.randn(tokens, 40).to(dtype)
    weight = (torch.randn(experts, 40) * 0.3).to(dtype)
    extra = [torch.randn(experts).to(dtype) if bias else None]
    extra.append(torch.rand(experts) if correction else None)
    return [x, weight, *extra, top_k]


def compare(*args, tolerance=None, **kwargs):
    """Logits agree, the choice is that of these logits, and the weights are."""
    assert supports("moe_router", *args, **kwargs) is None
    logits, weights, indices = overload("moe_router")(*args, **kwargs)
    wanted = OPS["moe_router"].overload(*args, **kwargs)
    limit = TOLERANCE[args[0].dtype] if tolerance is None else tolerance
    assert_close(logits, wanted[0], limit)
    assert indices.dtype == torch.int64 and weights.dtype == wanted[1].dtype

    # A rounding of the logits may exchange two that are all but equal: the choice of a token is
    # compared as a set with its weights.
    def choices(weights, indices):
        pairs = zip(indices.flatten(0, -2).tolist(), weights.flatten(0, -2).tolist(), strict=True)
        return [dict(zip(*pair, strict=True)) for pair in pairs]

    for mine, theirs in zip(choices(weights, indices), choices(*wanted[1:]), strict=True):
        assert mine.keys() == theirs.keys()
        for expert, weight in theirs.items():
            assert mine[expert] == pytest.approx(weight, abs=limit, rel=limit, nan_ok=True)


@pytest.mark.parametrize("scoring", ["identity", "softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalise", ["none", "sum", "softmax"])
def test_scorings(scoring, normalise):
    compare(*arguments(5, correction=True), scoring, normalise, F32, F32, 2.5, 1e-20)


def test_sparsemixer():
    compare(*arguments(6, top_k=2), "sparsemixer", "none", F32, F32, 1.0, 0.1)


@pytest.mark.parametrize("tokens", [1, 17, 70])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (7, 3), (33, 33)])
def test_sizes(tokens, experts, top_k):
    compare(*arguments(tokens, experts, top_k, bias=True), "softmax", "sum", F32, F32)


@pytest.mark.parametrize("score", ["max", "top2"])
@pytest.mark.parametrize("fill", [0.0, -math.inf])
@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (4, 2), (6, 6)])
def test_groups(score, fill, groups, kept):
    rest = (1.5, 1e-20, groups, kept, score, fill)
    compare(*arguments(9, 24, 4, correction=True), "sigmoid", "sum", F32, F32, *rest)


def test_more_choices_than_the_best_groups_hold():
    """-inf is chosen then, each expert once."""
    args = arguments(4, 12, 6)
    _, _, indices = overload("moe_router")(
        *args, "softmax", "none", F32, F32, 1.0, 0.0, 4, 1, "max", -math.inf
    )
    for row in indices.tolist():
        assert len(set(row)) == 6 and all(0 <= i < 12 for i in row)
        assert len({i // 3 for i in row[:3]}) == 1


@pytest.mark.parametrize(
    ("x", "weight", "logits", "weights"),
    [
        (torch.float16, torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float16, torch.float32, torch.float16),
        (torch.float16, torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float32, torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_dtypes(x, weight, logits, weights, tokens):
    args = arguments(tokens, 16, 2)
    args[0], args[1] = args[0].to(x), args[1].to(weight)
    compare(*args, "sigmoid", "sum", logits, weights, tolerance=1e-2)


def test_nan_is_chosen_first_as_by_topk():
    args = arguments(3)
    args[1][5] = math.nan
    _, weights, indices = overload("moe_router")(*args, "sigmoid", "none", F32, F32)
    assert (indices[:, 0] == 5).all() and weights[:, 0].isnan().all()
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_equal_logits_go_to_the_lower_index():
    args = arguments(2, 16, 4)
    args[1].zero_()
    _, _, indices = overload("moe_router")(*args, "softmax", "none", F32, F32)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2


def test_layouts():
    args = arguments(6)
    args[0] = args[0].t().contiguous().t().reshape(2, 3, 40)
    args[1] = args[1].t().contiguous().t()
    compare(*args, "softmax", "none", F32, F32)
    empty = arguments(0)
    got = overload("moe_router")(*empty, "softmax", "none", F32, F32)
    assert [t.shape for t in got] == [(0, 12), (0, 3), (0, 3)]


def test_refusals():
    args = arguments(3)
    tail = ("softmax", "none")
    assert "float64" in supports("moe_router", *args, *tail, torch.float64, F32)
    assert "13 of 12" in supports("moe_router", *args[:4], 13, *tail, F32, F32)
    assert "5 groups" in supports("moe_router", *args, *tail, F32, F32, 1.0, 0.0, 5, 1)
    assert "second" in supports("moe_router", *args, *tail, F32, F32, 1.0, 0.0, 12, 1, "top2")
    assert "not one of" in supports("moe_router", *args, "softmin", "none", F32, F32)
