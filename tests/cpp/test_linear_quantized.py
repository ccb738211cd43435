"""Products with int8 and int4 weights: against float64, on every instruction set here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dspark_compile.codegen.cpp import isa
from dspark_compile.kernels import cpp
from dspark_compile.ops import OPS
from dspark_compile.ops.quantized import pack_int4, unpack_int4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K, groups of a row): tails in both, one group, groups of 32, 64 and 128, an odd number of 32s.
SIZES = [
    (48, 64, 1),
    (37, 45, 1),
    (1, 1, 1),
    (33, 1061, 1),
    (70, 192, 6),
    (40, 96, 3),
    (35, 640, 5),
]


def weight(bits, n, k, groups, scale=torch.float32, zero=None):
    """``(numbers, what the op takes)``."""
    limit = 2 ** (bits - 1)
    q = torch.randint(-limit, limit, (n, k), dtype=torch.int8)
    s = (torch.rand(n, groups) + 0.1) / limit / k**0.5
    tensors = [q if bits == 8 else pack_int4(q), s.to(scale)]
    if zero is not None:
        tensors.append(torch.randint(-limit, limit, (n, groups)).to(zero))
    return q, tensors


def exact(q, tensors):
    """The weight in float64."""
    n, k = q.shape
    groups = q.view(n, tensors[1].numel() // n, -1).double()
    if len(tensors) > 2:
        groups = groups - tensors[2].view(n, -1, 1).double()
    return (groups * tensors[1].view(n, -1, 1).double()).view(n, k)


def error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def check(got, eager, want, dtype):
    """Within 1e-5 in float32; in half precision no further from the truth than eager is, or than
    rounding the truth once."""
    assert got.dtype == dtype and got.shape == want.shape
    rounding = 0.51 * torch.finfo(dtype).eps
    limit = 1e-5 if dtype == torch.float32 else max(rounding, 1.05 * error(eager, want))
    assert error(got, want) <= limit


def call(name, *args):
    assert cpp.supports(name, *args) is None
    return getattr(torch.ops.dspark_cpu, name)(*args)


def compare(bits, dtype, rows, size, scale=torch.float32, zero=None, bias=False):
    q, tensors = weight(bits, *size, scale=scale, zero=zero)
    x = torch.randn(rows, size[1]).to(dtype)
    b = torch.randn(size[0]).to(dtype) if bias else None
    w = exact(q, tensors)
    want = F.linear(x.double(), w, None if b is None else b.double())
    eager = F.linear(x, w.to(dtype), b)
    tensors += [None] * (3 - len(tensors))
    check(call(f"linear_int{bits}", x, *tensors, b), eager, want, dtype)


# Each is a form of the kernel: float lanes, bytes, tiles. The rest of the grid is slow: a
# case is two kernels to build.
FORMS = [(torch.float32, 4), (torch.bfloat16, 1), (torch.bfloat16, 2), (torch.bfloat16, 8)]
GRID = [(d, m) for d in DTYPES for m in (1, 4, 8, 16) if (d, m) not in FORMS]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "dtype,rows", [*FORMS, *(pytest.param(*c, marks=pytest.mark.slow) for c in GRID)]
)
def test_linear(bits, dtype, rows):
    for size in SIZES:
        compare(bits, dtype, rows, size, bias=rows == 4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero", [torch.int8, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype,rows", FORMS[1:] + [(torch.float32, 3)])
def test_zero_points(bits, zero, dtype, rows):
    for size in SIZES:
        compare(bits, dtype, rows, size, dtype, zero)


@pytest.mark.parametrize("reading", isa.READING)
@pytest.mark.parametrize("bits", [8, 4])
def test_ways_to_read(reading, bits, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_READ", reading)
    for size in ((70, 192, 6 if bits == 4 else 1), (33, 1061, 1)):
        compare(bits, torch.bfloat16, 1, size)


@pytest.mark.slow
@pytest.mark.parametrize("level", [x for x in isa.LEVELS if x in isa.available()])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_on_every_instruction_set(level, bits, dtype, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", level)
    for rows in (2, 6):
        for size in SIZES:
            compare(bits, dtype, rows, size)
            compare(bits, dtype, rows, size, torch.float16, torch.int8, bias=True)


@pytest.mark.parametrize("level", ["portable", pytest.param("avx2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_without_wide_registers(level, bits, monkeypatch):
    if level not in isa.available():
        pytest.skip(f"no {level} here")
    monkeypatch.setenv("DSPARK_CPU_ISA", level)
    compare(bits, torch.bfloat16, 6, (37, 192, 6), torch.bfloat16, torch.int8)


def test_a_group_behind_the_end_has_no_scale():
    """K = 96 ends in the middle of a step: what lies behind the scales must not be read."""
    for bits in (8, 4):
        q, (w, s) = weight(bits, 32, 96, 3)
        wide = torch.full((33, 3), float("nan"))
        wide[:32] = s
        x = torch.randn(1, 96)
        got = call(f"linear_int{bits}", x, w, wide[:32])
        assert error(got, F.linear(x.double(), exact(q, [w, s]))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_long_rows(dtype):
    """K above 65536: sums of bytes are kept in several runs, so that none overflows."""
    q = torch.randint(-128, 128, (5, 65536 + 200), dtype=torch.int8)
    q[0], q[1] = -128, 127
    s = torch.rand(5, 1)
    x = torch.rand(2, q.shape[1]).to(dtype)
    want = F.linear(x.double(), q.double() * s.double())
    eager = F.linear(x, (q.double() * s.double()).to(dtype))
    got = call("linear_int8", x, q, s)
    limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert error(got, want) <= max(limit, 1.05 * error(eager, want))


def test_linear_takes_views():
    q = torch.randint(-128, 128, (70, 100), dtype=torch.int8)[::2, 7:47]
    s = torch.rand(35, 1)
    x = torch.randn(2, 1, 4, 80)[..., ::2]
    want = F.linear(x.double(), q.double() * s.double())
    got = call("linear_int8", x, q, s)
    assert got.shape == (2, 1, 4, 35)
    assert error(got, want) < 1e-5
    assert error(call("linear_int8", x, q, s.view(-1)), want) < 1e-5
    assert error(call("linear_int8", x[0, 0, 0], q, s), want[0, 0, 0]) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "groups,dtype,rows",
    [
        ((1, 1), torch.bfloat16, 1),
        ((2, 3), torch.bfloat16, 1),
        *(
            pytest.param(groups, *form, marks=pytest.mark.slow)
            for groups in ((1, 1), (2, 3), (1, 3))
            for form in ((torch.float32, 3), (torch.bfloat16, 8))
        ),
    ],
)
def test_gated_mlp(bits, groups, dtype, rows):
    hidden, inner, out = 64, 96, 47
    x = torch.randn(rows, hidden).to(dtype)
    made = [
        weight(bits, inner, hidden, groups[0]),
        weight(bits, inner, hidden, groups[0]),
        weight(bits, out, inner, groups[1]),
    ]
    biases = [
        torch.randn(inner).to(dtype),
        torch.randn(inner).to(dtype),
        torch.randn(out).to(dtype),
    ]
    reference = OPS["gated_mlp"].reference
    for bias in ([None] * 3, biases):
        ws = [exact(*m) for m in made]
        want = reference(x.double(), *ws, *(b if b is None else b.double() for b in bias), "silu")
        eager = reference(x, *(w.to(dtype) for w in ws), *bias, "silu")
        got = call(f"gated_mlp_int{bits}", x, *(m[1] for m in made), *bias, "silu")
        # What lies between the products is rounded too: a second rounding beside eager's.
        limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert error(got, want) <= max(limit, 1.05 * error(eager, want))


@pytest.mark.parametrize("columns", [3, 31, 64, 100, 192])
def test_packing(columns):
    q = torch.randint(-8, 8, (21, columns), dtype=torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (2, (columns + 31) // 32, 4, 16, 4)
    assert torch.equal(unpack_int4(packed, 21, columns), q)
    # Row 1's third byte of the first line: numbers 2 and 6.
    assert int(packed[0, 0, 0, 1, 2]) == (int(q[1, 2]) & 15) | (
        (int(q[1, 6]) & 15) << 4 if columns > 6 else 0
    )
    with pytest.raises(ValueError, match="4 bits"):
        pack_int4(q + 9)


Q = torch.zeros(4, 64, dtype=torch.int8)
S = torch.ones(4)


@pytest.mark.parametrize(
    "args, reason",
    [
        ((torch.zeros(17, 64), Q, S), "17 rows"),
        ((torch.zeros(0, 64), Q, S), "empty"),
        ((torch.zeros(1, 64, dtype=torch.float64), Q, S), "float64"),
        ((torch.zeros(1, 64), Q.float(), S), "float32"),
        ((torch.zeros(1, 32), Q, S), "[4, 64]"),
        ((torch.zeros(1, 4), Q.t(), torch.ones(64)), "row-major"),
        ((torch.zeros(1, 64), Q, torch.ones(4, 4)), "multiple of 32"),
        ((torch.zeros(1, 64), Q, S.double()), "float64"),
        ((torch.zeros(1, 64), Q, S, None, S.bfloat16()), "bfloat16"),
        ((torch.zeros(1, 64), Q, S, S.int()), "int32"),
    ],
)
def test_refusals(args, reason):
    assert reason in cpp.supports("linear_int8", *args)


@pytest.mark.parametrize("rows", [0, 17])
def test_a_call_that_was_not_promised_still_answers(rows):
    x, q = torch.randn(rows, 64), torch.randint(-8, 8, (4, 64), dtype=torch.int8)
    want = F.linear(x, q.float())
    torch.testing.assert_close(torch.ops.dspark_cpu.linear_int8(x, q, S), want)
    torch.testing.assert_close(torch.ops.dspark_cpu.linear_int4(x, pack_int4(q), S), want)


# -- x as whole numbers: one power of two for a row (int8), for 32 numbers (int4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_very_different_size(bits, dtype):
    """One number is far larger than the others, which must not drown in its scale."""
    q, tensors = weight(bits, 48, 256, 1)
    q[:, 7] = 0  # what is large has no say: only the precision of the others is left
    tensors[0] = q if bits == 8 else pack_int4(q)
    x = torch.randn(1, 256).to(dtype)
    x[0, 7] = (4096.0 if bits == 8 else 16.0) * x.abs().max()
    got = call(f"linear_int{bits}", x, *tensors)
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    assert error(got, F.linear(x.double(), exact(q, tensors))) <= limit


def test_more_numbers_than_an_integer_sum_holds():
    q = torch.full((2, 140000), 127, dtype=torch.int8)
    x = torch.ones(1, 140000, dtype=torch.bfloat16)
    got = call("linear_int8", x, q, torch.full((2,), 1e-7))
    assert error(got, F.linear(x.double(), q.double() * 1e-7)) < 4e-3


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bits, value):
    _, tensors = weight(bits, 20, 64, 1)
    x = torch.randn(2, 64).bfloat16()
    x[1, 3] = value
    got = call(f"linear_int{bits}", x, *tensors)
    assert got[0].isfinite().all() and not got[1].isfinite().any()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_rows(bits, dtype):
    """Digits of several rows share a tile, and of more rows take several."""
    for rows in range(1, 17):
        compare(bits, dtype, rows, (37, 192, 1))
