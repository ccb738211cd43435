"""Skinny products and feed-forward blocks against the dialect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreted import assert_close, compare

from dspark_compile.kernels.triton import linear_tiles, supports
from dspark_compile.kernels.triton._launch import KNOWN_TARGETS
from dspark_compile.kernels.triton.linear import Norm, plan
from dspark_compile.kernels.triton.linear_tiles import Shape, Tiles, candidates, choose, predicted
from dspark_compile.ops import OPS
from dspark_compile.ops.mlp import ACTIVATIONS

HALF, FULL = torch.float16, torch.float32
SLOW = pytest.mark.slow
TOLERANCE = {HALF: 1e-2, FULL: 5e-5}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def weight(n, k, dtype=FULL):
    return (torch.randn(n, k) / k**0.5).to(dtype)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (70, 200), (5, 33), (1, 1)])
def test_linear(dtype, rows, n, k):
    x, w, b = torch.randn(rows, k).to(dtype), weight(n, k, dtype), torch.randn(n).to(dtype)
    compare("linear", x, w, b, tolerance=TOLERANCE[dtype])


def test_layouts():
    """Leading dimensions, rows with strides, features with strides, a weight that is a slice."""
    compare("linear", torch.randn(48), weight(20, 48))
    compare("linear", torch.randn(2, 3, 48), weight(20, 48))
    compare("linear", torch.randn(5, 60)[:, 7:55], weight(20, 48))
    compare("linear", torch.randn(48, 5).t(), weight(20, 48))
    compare("linear", torch.randn(3, 48), weight(20, 60)[::2, 6:54])
    compare("linear", torch.randn(0, 48), weight(20, 48))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("sizes", [[50], [40, 10], [8, 30, 12], [1, 20, 9, 20]])
def test_merged_linear(rows, sizes):
    x, w = torch.randn(2, rows, 64), weight(50, 64)
    compare("merged_linear", x, w, torch.randn(50), sizes)
    compare("merged_linear", x, w, None, sizes)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("dtype", "fp32"), [(FULL, False), (HALF, False), (HALF, True)])
@pytest.mark.parametrize(
    "activation",
    [
        name if name in ("silu", "gelu_tanh", "relu2") else pytest.param(name, marks=SLOW)
        for name in ACTIVATIONS
    ],
)
def test_activations(rows, dtype, fp32, activation):
    x = torch.randn(rows, 40).to(dtype)
    gate, up, down = (weight(n, k, dtype) for n, k in ((24, 40), (24, 40), (12, 24)))
    biases = [torch.randn(n).to(dtype) for n in (24, 24, 12)]
    limit = TOLERANCE[dtype]
    compare("gated_mlp", x, gate, up, down, *biases, activation, fp32, tolerance=limit)
    compare("mlp", x, up, down, *biases[1:], activation, fp32, tolerance=limit)


@pytest.mark.parametrize("rows", [1, 3])
def test_gate_and_up_in_one_weight(rows):
    x, both, down = torch.randn(rows, 40), weight(48, 40), weight(12, 24)
    biases = torch.randn(48), torch.randn(12)
    compare("gated_mlp_merged", x, both, down, *biases, "silu")
    compare("gated_mlp_merged", x, both, down, None, None, "silu", True)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize(("splits", "k"), [(2, 256), (3, 200), (8, 300)])
def test_split(rows, splits, k):
    """Partial sums in a workspace; the number of parts follows from whole tiles."""
    tiles = Tiles(32, 32, splits, 4, 1)
    x, w, b = torch.randn(rows, k), weight(70, k), torch.randn(70)
    r = torch.randn(rows, 70)
    made = plan(x, w, b, residual=r, tiles=tiles)
    assert len(made.launches) == 2
    assert_close(made.run()[0], F.linear(x, w, b) + r)
    parts = plan(x, w, b, sizes=[30, 40], tiles=tiles).run()
    for part, expected in zip(parts, F.linear(x, w, b).split([30, 40], -1)):
        assert_close(part, expected.contiguous())
    up = weight(70, k)
    gated = plan(x, w, b, up=up, up_bias=b, activation="silu", tiles=tiles).run()[0]
    assert_close(gated, F.silu(F.linear(x, w, b)) * F.linear(x, up, b))


def test_splits_repeat_bit_for_bit():
    x, w = torch.randn(4, 256), weight(48, 256)
    runs = [plan(x, w, tiles=Tiles(16, 32, 8, 4, 1)).run()[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [HALF, pytest.param(FULL, marks=SLOW)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("offset", "in_compute"), [(0.0, False), (1.0, False), (1.0, True)])
def test_norm_in_front(dtype, rows, centre, offset, in_compute):
    x = (torch.randn(rows, 200) + 0.5).to(dtype)
    w, g, s = weight(40, 200, dtype), torch.randn(200).to(dtype), torch.randn(200).to(dtype)
    op, vectors = ("layer_norm", (g, s)) if centre else ("rms_norm", (g,))
    normed = OPS[op].overload(x, *vectors, 1e-5, offset, in_compute)
    norm = Norm(g, s if centre else None, 1e-5, offset, in_compute, centre)
    for tiles in (Tiles(64, 64, 1, 4, 1), Tiles(64, 32, 4, 4, 1)):
        actual = plan(x, w, norm=norm, activation="gelu", tiles=tiles).run()[0]
        assert_close(actual, F.gelu(F.linear(normed, w)), TOLERANCE[dtype])
    bare = plan(x, w, norm=Norm(None, None, 1e-5)).run()[0]
    expected = F.linear(OPS["rms_norm"].overload(x, None, 1e-5), w)
    assert_close(bare, expected, TOLERANCE[dtype])


def test_residual_of_several_dimensions():
    x, w, r = torch.randn(2, 3, 64), weight(20, 64), torch.randn(3, 20)
    residual = r.expand(2, 3, 20)
    assert_close(plan(x, w, residual=residual).run()[0], F.linear(x, w) + residual)


@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        (torch.randn(17, 8), torch.randn(4, 8), "17 rows, more than 16"),
        (torch.randn(4, 5, 8), torch.randn(4, 8), "20 rows, more than 16"),
        (torch.randn(1, 8).double(), torch.randn(4, 8).double(), "x is float64"),
        (torch.randn(1, 8).half(), torch.randn(4, 8), "x is float16, weight is float32"),
        (torch.randn(1, 8), torch.randn(8, 4).t(), "the rows of weight are not contiguous"),
        (torch.randn(1, 8), torch.randn(4, 9), "x has 8 features, the weight 9"),
        (torch.randn(1, 8), torch.randn(8), "weight is [8], not a matrix"),
    ],
)
def test_refusals(x, w, reason):
    assert reason in supports("linear", x, w)


def test_other_refusals():
    x, w = torch.randn(1, 8), torch.randn(10, 8)
    assert "5 outputs, more than 4" in supports("merged_linear", x, w, None, [2] * 5)
    down = torch.randn(8, 10)
    assert "unknown" in supports("mlp", x, w, down, None, None, "swish")
    assert "17 rows" in supports(
        "gated_mlp", torch.randn(17, 8), w, w, down, None, None, None, "silu"
    )


@pytest.mark.parametrize("name", ["80", "90", "100", "120", "gfx942", "gfx950"])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("weights", [1, 2])
def test_every_target_has_tiles(name, m, itemsize, weights):
    target = KNOWN_TARGETS[name]
    for n, k in ((1, 1), (64, 40), (1024, 4096), (4096, 14336), (151936, 1024)):
        shape = Shape(m, n, k, itemsize, weights)
        chosen = choose(shape, target)
        assert chosen in candidates(shape, target)
        assert predicted(chosen, shape, target) > 0


def test_a_small_result_of_long_rows_is_split():
    """64 columns of 16 Ki features: blocks of columns alone would leave the device idle."""
    assert choose(Shape(16, 64, 16384, 2), KNOWN_TARGETS["90"]).splits > 1
    assert choose(Shape(16, 65536, 4096, 2), KNOWN_TARGETS["90"]).splits == 1
    assert linear_tiles.MAX_SPLITS >= choose(Shape(1, 2, 65536, 2), KNOWN_TARGETS["80"]).splits > 1
