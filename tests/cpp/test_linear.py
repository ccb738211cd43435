"""Skinny products and feed-forward blocks: against float64, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dspark_compile.codegen.cpp import emit, isa
from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp._launch import run
from dspark_compile.kernels.cpp.linear import Norm, linear_call, mlp_call
from dspark_compile.ops import OPS
from dspark_compile.ops.mlp import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(48, 64), (37, 45), (1, 1), (100, 1061), (33, 31)]


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def check(got, aten, want, dtype):
    """Within 1e-5 in float32; no further from the truth than ATen in half precision."""
    limit = 1e-5 if dtype == torch.float32 else max(1e-6, 1.05 * error(aten, want))
    assert error(got, want) <= limit


def call(name, *args):
    assert cpp.supports(name, *args) is None
    return getattr(torch.ops.dspark_cpu, name)(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_linear(dtype, rows):
    for n, k in SIZES:
        x, w, b = (torch.randn(s).to(dtype) for s in ((rows, k), (n, k), (n,)))
        for bias in (None, b):
            want = F.linear(x.double(), w.double(), None if bias is None else b.double())
            check(call("linear", x, w, bias), F.linear(x, w, bias), want, dtype)


TILED = pytest.mark.skipif("amx" not in isa.available(), reason="the CPU has no AMX")


@TILED
@pytest.mark.parametrize("rows", [17, 40, pytest.param(67, marks=pytest.mark.slow)])
def test_more_rows_are_groups_of_tiles(rows):
    for n, k in SIZES:
        x, w, b = (torch.randn(s).bfloat16() for s in ((rows, k), (n, k), (n,)))
        want = F.linear(x.double(), w.double(), b.double())
        check(call("linear", x, w, b), F.linear(x, w, b), want, torch.bfloat16)
    gate, up = (torch.randn(90, 45).bfloat16() for _ in range(2))
    x, down = torch.randn(rows, 45).bfloat16(), torch.randn(37, 90).bfloat16()
    args = (x, gate, up, down, None, None, None, "silu")
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    want = OPS["gated_mlp"].reference(*exact)
    # The hidden values are rounded here and there, at other places.
    assert error(call("gated_mlp", *args), want) <= 1.5 * error(
        OPS["gated_mlp"].reference(*args), want
    )


@TILED
def test_too_many_rows_are_refused():
    x, w = torch.randn(129, 64), torch.randn(32, 64)
    assert "129 rows, more than 16" in cpp.supports("linear", x, w)
    assert "129 rows, more than 128" in cpp.supports("linear", x.bfloat16(), w.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("level", [x for x in isa.LEVELS if x in isa.available()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_on_every_instruction_set(level, dtype, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", level)
    for rows in (2, 6):
        for n, k in SIZES:
            x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
            want = F.linear(x.double(), w.double())
            check(call("linear", x, w, None), F.linear(x, w), want, dtype)


@pytest.mark.parametrize("reading", isa.READING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_to_read(reading, dtype, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_READ", reading)
    for rows, n, k in ((1, 70, 1100), (1, 33, 40), (4, 100, 2000), (8, 70, 256)):
        x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
        want = F.linear(x.double(), w.double())
        check(call("linear", x, w, None), F.linear(x, w), want, dtype)


# Passes of 4, 5, 7 and 8 rows, each alone and after another; weights whose rows go in runs of
# columns, are whole pages, or leave a rest.
@pytest.mark.parametrize(
    "dtype,rows,n,k",
    [
        (torch.bfloat16, 5, 70, 3110), (torch.bfloat16, 7, 97, 264), (torch.bfloat16, 9, 130, 2048),
        (torch.bfloat16, 13, 70, 4113), (torch.bfloat16, 16, 97, 2048), (torch.float32, 5, 97, 265),
        (torch.float32, 9, 70, 512), (torch.float32, 14, 70, 1024), (torch.float16, 11, 70, 2048),
    ],
)  # fmt: skip
def test_passes_and_runs(dtype, rows, n, k):
    x, w = torch.randn(rows, k).to(dtype), torch.randn(n, k).to(dtype)
    want = F.linear(x.double(), w.double())
    check(call("linear", x, w, None), F.linear(x, w), want, dtype)
    # x's own stride, and the weight's, are not its length.
    wide, strided = torch.randn(rows, k + 32).to(dtype), torch.randn(n, k + 8).to(dtype)
    want = F.linear(wide[:, :k].double(), strided[:, 8:].double())
    aten = F.linear(wide[:, :k], strided[:, 8:])
    check(call("linear", wide[:, :k], strided[:, 8:], None), aten, want, dtype)


def test_linear_without_intrinsics(monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", "portable")
    x, w = torch.randn(6, 45).bfloat16(), torch.randn(37, 45).bfloat16()
    want = F.linear(x.double(), w.double())
    check(call("linear", x, w, None), F.linear(x, w), want, torch.bfloat16)


def test_linear_takes_views():
    x = torch.randn(3, 80)[:, ::2]
    w = torch.randn(70, 100)[::2, 7:47]
    want = F.linear(x.double(), w.double())
    assert error(call("linear", x, w), want) < 1e-5
    lead = torch.randn(2, 1, 4, 40)
    got = call("linear", lead, w)
    assert got.shape == (2, 1, 4, 35)
    assert error(got, F.linear(lead.double(), w.double())) < 1e-5
    assert (
        error(call("linear", lead[0, 0, 0], w), F.linear(lead[0, 0, 0].double(), w.double())) < 1e-5
    )


def test_linear_keeps_infinities_and_nan():
    x = torch.ones(8, 64, dtype=torch.bfloat16)
    w = torch.ones(40, 64, dtype=torch.bfloat16)
    w[3, 5], w[39, 63] = float("inf"), float("nan")
    y = call("linear", x, w)
    assert y[:, 3].isinf().all() and y[:, 39].isnan().all()
    assert y.isfinite().sum() == 8 * 38


@pytest.mark.parametrize(
    "x, w, reason",
    [
        (torch.zeros(17, 8), torch.zeros(4, 8), "17 rows"),
        (torch.zeros(0, 8), torch.zeros(4, 8), "empty"),
        (torch.zeros(1, 8, dtype=torch.float64), torch.zeros(4, 8), "float64"),
        (torch.zeros(1, 8), torch.zeros(4, 8, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(1, 8), torch.zeros(8, 4).t(), "row-major"),
        (torch.zeros(1, 8), torch.zeros(8), "1 dimensions"),
    ],
)
def test_refusals(x, w, reason):
    assert reason in cpp.supports("linear", x, w)


@pytest.mark.parametrize("rows", [0, 17])
def test_a_call_that_was_not_promised_still_answers(rows):
    x, w = torch.randn(rows, 8), torch.randn(4, 8)
    torch.testing.assert_close(torch.ops.dspark_cpu.linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_linear(dtype):
    sizes = [50, 17, 33]
    x, w, b = (torch.randn(s).to(dtype) for s in ((2, 1, 72), (100, 72), (100,)))
    got = call("merged_linear", x, w, b, sizes)
    aten = F.linear(x, w, b).split(sizes, -1)
    want = F.linear(x.double(), w.double(), b.double()).split(sizes, -1)
    for g, a, t in zip(got, aten, want):
        assert g.is_contiguous()
        check(g, a, t, dtype)


def blocks(dtype, rows, hidden=64, inner=90, out=47):
    scaled = lambda *s: (torch.randn(*s) / s[-1] ** 0.5).to(dtype)  # noqa: E731
    x = torch.randn(rows, hidden).to(dtype)
    return x, scaled(inner, hidden), scaled(inner, hidden), scaled(out, inner)


@pytest.mark.parametrize(
    "dtype,rows", [(torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 8)]
)
def test_gated_mlp(dtype, rows):
    x, gate, up, down = blocks(dtype, rows)
    biases = [torch.randn(90).to(dtype), torch.randn(90).to(dtype), torch.randn(47).to(dtype)]
    for bias in ([None] * 3, biases):
        args = (x, gate, up, down, *bias, "silu")
        reference = OPS["gated_mlp"].reference
        wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        check(call("gated_mlp", *args), reference(*args), reference(*wide), dtype)
        both = None if bias[0] is None else torch.cat(bias[:2])
        merged = call("gated_mlp_merged", x, torch.cat((gate, up)), down, both, bias[2], "silu")
        check(merged, reference(*args), reference(*wide), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation):
    x, _, up, down = blocks(torch.float32, 2)
    args = (x * 6, up, down, None, None, activation)
    reference = OPS["mlp"].reference
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    assert error(call("mlp", *args), reference(*wide)) < 1e-5


@pytest.mark.parametrize("dtype,rows", [(torch.float32, 1), (torch.bfloat16, 6)])
@pytest.mark.parametrize("centre", [False, True])
def test_norm_in_front_and_residual_behind(dtype, rows, centre):
    x, gate, up, down = blocks(dtype, rows)
    weight, bias = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    prologue = emit.Prologue(dtype, centre=centre, first=False)
    norm = Norm(prologue, weight, bias if centre else None, 1e-5, 0.0)
    if centre:
        normed = F.layer_norm(x.double(), (64,), weight.double(), bias.double(), 1e-5)
    else:
        normed = F.rms_norm(x.double(), (64,), weight.double(), 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    residual = torch.randn(rows, 90).to(dtype)
    out = x.new_empty(rows, 90)
    run(linear_call(x, [(gate, None, out)], activation="silu", residual=residual, norm=norm))
    want = F.silu(F.linear(normed, gate.double())) + residual.double()
    assert error(out, want) < tolerance

    residual = torch.randn(rows, 47).to(dtype)
    out = x.new_empty(rows, 47)
    no = (None, None, None)
    run(mlp_call(x, gate, up, down, no, "silu", out, residual=residual, norm=norm))
    hidden = F.silu(F.linear(normed, gate.double())) * F.linear(normed, up.double())
    assert error(out, F.linear(hidden, down.double()) + residual.double()) < tolerance


def test_threads_agree():
    x, w = torch.randn(4, 300), torch.randn(1000, 300)
    outs = [torch.empty(4, 1000) for _ in range(3)]
    for threads, out in zip((1, 2, 5), outs):
        run(linear_call(x, [(w, None, out)]), threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype,rows", [(torch.float32, 1), (torch.bfloat16, 8)])
def test_several_weights_in_one_product(dtype, rows, threads):
    """Parts whose sizes are no multiples of a block, shared out over their sum."""
    x = torch.randn(rows, 100).to(dtype)
    weights = [torch.randn(n, 100).to(dtype) for n in (70, 5, 64, 33)]
    biases = [torch.randn(70).to(dtype), None, torch.randn(64).to(dtype), None]
    outs = [x.new_full((rows, w.shape[0]), float("nan")) for w in weights]
    run(linear_call(x, list(zip(weights, biases, outs))), threads)
    for w, b, out in zip(weights, biases, outs):
        want = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert error(out, want) < (1e-5 if dtype == torch.float32 else 1e-2)
