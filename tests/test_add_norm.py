"""Residual additions join the norms that read them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spellings import raised, run

D = 8


def rms(x, w):
    return F.rms_norm(x, (D,), w, 1e-5)


def layer(x, w):
    return F.layer_norm(x, (D,), w, None, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("norm", [rms, layer], ids=["rms", "layer"])
def test_sum_feeds_norm_and_residual(norm, dtype):
    def f(x, r, w):
        s = r + x
        return norm(s, w), s * 2

    op = "add_rms_norm" if norm is rms else "add_layer_norm"
    args = (torch.randn(2, 3, D).to(dtype), torch.randn(2, 3, D).to(dtype), torch.randn(D))
    graph = raised("norm", op, f, *args[:2], args[2].to(dtype))
    assert "aten.add.Tensor" not in graph.programs["after add_norm"]
    assert graph.sites[0].op == op and graph.sites[0].impl


def test_the_branch_is_the_later_addend():
    def f(x, w, v):
        y = rms(x, w)
        return rms(x + y.sin(), v)

    graph = raised_both(f, torch.randn(3, D), torch.randn(D), torch.randn(D))
    line = next(x for x in graph.programs["after add_norm"].splitlines() if "add_rms_norm" in x)
    assert "(%sin, %arg" in line


def raised_both(f, *args):
    _, graph = run(f, *args)
    assert graph.ops["add_rms_norm"] == graph.ops["rms_norm"] == 1
    return graph


def test_two_norms_of_one_sum():
    """Parallel attention and MLP: the second norm reads the first one's sum."""

    def f(x, r, w, v):
        s = x + r
        return rms(s, w), rms(s, v), s

    args = (torch.randn(3, D), torch.randn(3, D), torch.randn(D), torch.randn(D))
    graph = raised_both(f, *args)
    assert len([s for s in graph.sites if s.kind == "norm"]) == 2


def test_views_move_behind():
    """OPT flattens the tokens between the sum and the norm."""

    def f(x, r, w):
        s = (x + r).view(-1, D)
        return rms(s, w), s.sum(0)

    raised("norm", "add_rms_norm", f, torch.randn(2, 3, D), torch.randn(2, 3, D), torch.randn(D))


def test_weight_computed_between():
    def f(x, r, w):
        s = x + r
        t = s.sin()
        return rms(s, w.cos()), t

    _, graph = run(f, torch.randn(3, D), torch.randn(3, D), torch.randn(D))
    # Either joined or left with the reason; never reordered wrongly.
    rejections = [r.condition for r in graph.rejections if r.pass_name == "add_norm"]
    assert graph.ops.get("add_rms_norm") or "before the norm's weight" in rejections[0]


@pytest.mark.parametrize(
    "total",
    [
        lambda x, b: x + b[0],
        lambda x, b: x + 1.0,
        lambda x, b: x - b,
        lambda x, b: torch.add(x, b, alpha=2),
    ],
    ids=["broadcast", "scalar", "difference", "alpha"],
)
def test_other_sums_stay(total):
    def f(x, b, w):
        return rms(total(x, b), w)

    _, graph = run(f, torch.randn(3, D), torch.randn(3, D), torch.randn(D))
    assert not graph.ops.get("add_rms_norm") and graph.ops["rms_norm"] == 1


def test_mixed_dtypes_stay():
    def f(x, r, w):
        return rms(x + r, w)

    _, graph = run(f, torch.randn(3, D).bfloat16(), torch.randn(3, D), torch.randn(D))
    assert not graph.ops.get("add_rms_norm")


def test_an_optimisation_left_out_is_no_lost_site():
    def f(x, b, w):
        return rms(torch.add(x, b, alpha=2), w)

    _, graph = run(f, torch.randn(3, D), torch.randn(3, D), torch.randn(D))
    assert [s.status for s in graph.sites if s.kind == "norm"] == ["raised"]
    assert [r.pass_name for r in graph.rejections] == ["add_norm"]
