"""Decode attention in C++: against the dialect's reference in float64, over masks and layouts."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.codegen.cpp import isa
from dspark_compile.codegen.cpp.predicate import print_predicate
from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp._launch import run
from dspark_compile.kernels.cpp.attention import attention_call
from dspark_compile.ops import OPS
from dspark_compile.ops.cache import quantize_kv


def make(dtype, b=1, h=4, hk=2, m=2, n=70, d=24, dv=None):
    shapes = ((b, h, m, d), (b, hk, n, d), (b, hk, n, dv or d))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def wide(x):
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.double() if floating else x


def error(got, want):
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def check(name, *args, **attributes):
    """The op agrees with the float64 meaning, and is no further off than the reference."""
    attributes.setdefault("scale", 0.2)
    assert cpp.supports(name, *args, **attributes) is None
    got = getattr(torch.ops.dspark_cpu, name)(*args, **attributes)
    want = OPS[name].reference(*(wide(a) for a in args), **attributes)
    reference = OPS[name].reference(*args, **attributes)
    assert got.shape == want.shape and got.dtype == args[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    assert error(got, want) <= max(1e-5, 1.05 * error(reference, want))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3])
def test_sizes(dtype, rows):
    for b, n in ((1, 1), (2, 63), (1, 64), (1, 200)):
        q, k, v = make(dtype, b=b, m=rows, n=n)
        check("attention", q, k, v, None, None, [], [])


def test_features():
    check("attention", *make(torch.float32, d=5, dv=37), None, None, [], [])
    check("attention", *make(torch.bfloat16, h=6, hk=1, d=100, dv=128), None, None, [], [])
    check("attention", *make(torch.bfloat16, h=2, hk=2, m=1, d=64, dv=16), None, None, [], [])


@pytest.mark.slow
@pytest.mark.parametrize("level", [x for x in isa.LEVELS if x in isa.available()])
def test_every_instruction_set(level, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", level)
    check("attention", *make(torch.bfloat16, h=6), None, None, [], [])
    q, k, v = make(torch.float32)
    (k8, ks), (v8, vs) = quantize_kv(k, torch.float32), quantize_kv(v, torch.float32)
    check("attention_int8", q, k8, ks, v8, vs, None, None, [], [], mask="k <= q + 60", softcap=4.0)


@pytest.mark.parametrize("reading", isa.READING)
def test_ways_to_read(reading, monkeypatch):
    """Blocks read in order or as runs, for one query row and for several."""
    monkeypatch.setenv("DSPARK_CPU_READ", reading)
    for rows, n in ((1, 63), (1, 300), (1, 129)):
        q, k, v = make(torch.bfloat16, m=rows, n=n, d=64)
        check("attention", q, k, v, None, None, [], [n - rows], mask="k <= q + n0")
    # From four rows of a key head on (a position has two) weights are bfloat16, as eager's are.
    for rows, n in ((3, 129), (4, 1), (4, 200), (7, 255)):
        q, k, v = make(torch.bfloat16, m=rows, n=n, d=64)
        given = (None, None, [], [max(n - rows, 0)])
        attributes = {"mask": "k <= q + n0", "scale": 0.2}
        got = torch.ops.dspark_cpu.attention(q, k, v, *given, **attributes)
        want = OPS["attention"].reference(*map(wide, (q, k, v)), *given, **attributes)
        assert error(got, want) < 5e-3
    for rows in (1, 6):
        q, k, v = make(torch.float32, m=rows, n=150, d=96)
        check("attention", q, k, v, None, None, [], [])
        (k8, ks), (v8, vs) = quantize_kv(k, torch.float32), quantize_kv(v, torch.float32)
        check("attention_int8", q, k8, ks, v8, vs, None, None, [], [])


def test_many_rows_keep_what_is_not_a_number():
    """Rows whose keys give NaN, infinity, or nothing, in a block of an odd number of keys."""
    q, k, v = make(torch.bfloat16, m=8, n=37, d=64)
    q[:, 0, 3] = float("nan")
    v[:, 0, 36, 5] = float("inf")
    got = torch.ops.dspark_cpu.attention(
        q, k, v, None, None, [], [28], mask="(k <= q + n0) & (k != 36)", scale=0.2
    )
    want = OPS["attention"].reference(
        *(wide(x) for x in (q, k, v)),
        None,
        None,
        [],
        [28],
        mask="(k <= q + n0) & (k != 36)",
        scale=0.2,
    )
    assert got[:, 0, 3].isnan().all()
    fine = want.isfinite()
    assert fine[:, 2:].all()
    assert error(got[fine].float(), want[fine]) < 1e-2
    rows = torch.ops.dspark_cpu.attention(
        q[:, 1:2], k[:, :1], v[:, 1:], None, None, [], [], mask="False", scale=0.2
    )
    assert (rows == 0).all()


@pytest.mark.parametrize(
    "mask",
    [
        "k <= q + n0",
        "(k <= q + n0) & (k > q + n0 - 20)",
        "(k <= t0) & t1[b, k]",
        "((k // 16) == ((q + n0) // 16)) | (k < 3)",
        "~((k % 3 == h) & (min(k, q) > 0))",
        "False",
    ],
)
def test_masks(mask):
    q, k, v = make(torch.float32, b=2)
    tensors = [torch.tensor(40), torch.rand(2, 70) > 0.3]
    for value in (None, -3.0e38, -2.0):
        check("attention", q, k, v, None, None, tensors, [45], mask=mask, mask_value=value)


def test_forbidden_keys_are_not_read():
    # A weight of 0 times NaN is NaN: it would come through.
    q, k, v = make(torch.bfloat16, n=256)
    for x in (k, v):
        x[:, :, 50:], x[:, :, :20] = float("nan"), float("nan")
    attributes = {"mask": "(k <= q + n0) & (k >= 20)", "scale": 0.2}
    got = torch.ops.dspark_cpu.attention(q, k, v, None, None, [], [48], **attributes)
    clean = [x.nan_to_num(0.0) for x in (k, v)]
    want = OPS["attention"].reference(q, *clean, None, None, [], [48], **attributes)
    assert error(got, want.double()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias(dtype):
    q, k, v = make(dtype, b=2)
    for shape in ((2, 4, 2, 70), (1, 1, 2, 70), (2, 1, 1, 70)):
        check("attention", q, k, v, torch.randn(shape).to(dtype), None, [], [])
        check("attention", q, k, v, torch.rand(shape) > 0.5, None, [], [45], mask="k <= q + n0")
    nothing = torch.zeros(2, 1, 2, 70, dtype=torch.bool)
    assert (check("attention", q, k, v, nothing, None, [], []) == 0).all()


def test_sinks_and_softcap():
    q, k, v = make(torch.float32)
    sinks = torch.randn(4)
    check("attention", q, k, v, None, sinks, [], [], softcap=2.0)
    check("attention", q, k, v, None, sinks, [], [], mask="False")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16])
def test_int8(dtype, scales):
    q, k, v = make(dtype, m=1, n=150, d=64)
    (k8, ks), (v8, vs) = quantize_kv(k, scales), quantize_kv(v, scales)
    check("attention_int8", q, k8, ks, v8, vs, None, None, [], [100], mask="k <= q + n0")


def test_strided_cache_and_query():
    q, k, v = (torch.randn(2, n, h, 24).transpose(1, 2) for n, h in ((2, 4), (70, 2), (70, 2)))
    check("attention", q, k, v, None, None, [], [])
    q, k, v = make(torch.float32, n=140)
    check("attention", q, k[:, :, ::2], v[:, :, 70:], None, None, [], [])


@pytest.mark.parametrize(
    "rows,heads,features",
    [(1, 4, 128), (4, 4, 64), (5, 4, 64), (16, 4, 32), (16, 4, 128), (8, 10, 96)],
)
@pytest.mark.parametrize("int8", [False, True])
def test_matrix_tiles_in_bfloat16(rows, heads, features, int8):
    """Shapes for which matrix tiles are used where the CPU has them."""
    n, filled = 300, 257
    q = torch.randn(2, heads, rows, features).bfloat16()
    k, v = (torch.randn(2, 2, n, features).bfloat16() for _ in range(2))
    mask = (None, None, [], [filled])
    attributes = {"scale": 0.2, "mask": "(k <= q + n0) & (k > q + n0 - 200)"}
    if int8:
        k8, ks = quantize_kv(k, torch.float32)
        v8, vs = quantize_kv(v, torch.float32)
        reason = cpp.supports("attention_int8", q, k8, ks, v8, vs, *mask, **attributes)
        assert reason is None
        got = torch.ops.dspark_cpu.attention_int8(q, k8, ks, v8, vs, *mask, **attributes)
        k, v = k8.double() * ks.double()[..., None], v8.double() * vs.double()[..., None]
    else:
        assert cpp.supports("attention", q, k, v, *mask, **attributes) is None
        got = torch.ops.dspark_cpu.attention(q, k, v, *mask, **attributes)
    want = OPS["attention"].reference(q.double(), k.double(), v.double(), *mask, **attributes)
    eager = OPS["attention"].reference(q, k.bfloat16(), v.bfloat16(), *mask, **attributes)
    scale = want.abs().max()
    mine, theirs = ((x.double() - want).abs().max() / scale for x in (got, eager))
    assert mine < 1.2 * theirs + 2e-3


@pytest.mark.parametrize(
    "rows,heads,int8,attributes,biased",
    [
        (4, 4, False, {"mask": "(k <= q + n0) & t0[b, k]", "softcap": 3.0}, torch.bfloat16),
        (16, 4, False, {"mask": "~((k % 3 == h) & (k > q))", "mask_value": -2.0}, None),
        (3, 4, True, {"mask": "(k <= q + n0) & (k > q + n0 - 200)"}, torch.bool),
        (8, 4, True, {"mask": "(k <= q + n0) & t0[b, k]", "softcap": 3.0}, torch.float32),
    ],
)
def test_rows_in_lanes(rows, heads, int8, attributes, biased):
    """What happens between the two products of the tiles, and where keys end."""
    n, filled, features = 300, 257, 64
    q = torch.randn(2, heads, rows, features).bfloat16()
    q[0, 1, rows - 1] = float("nan")
    k, v = (torch.randn(2, 2, n, features).bfloat16() for _ in range(2))
    # Scores that grow: the running maximum has to follow them.
    k *= torch.linspace(0.1, 3, n)[:, None].bfloat16()
    bias = None
    if biased is torch.bool:
        bias = torch.rand(2, 1, rows, n) > 0.4
    elif biased is not None:
        bias = torch.randn(2, heads, rows, n).to(biased)
    rest = (bias, None, [torch.rand(2, n) > 0.3], [filled])
    attributes = {"scale": 0.2, **attributes}
    if int8:
        (k8, ks), (v8, vs) = quantize_kv(k, torch.float32), quantize_kv(v, torch.float32)
        got = torch.ops.dspark_cpu.attention_int8(q, k8, ks, v8, vs, *rest, **attributes)
        k, v = k8.double() * ks.double()[..., None], v8.double() * vs.double()[..., None]
    else:
        got = torch.ops.dspark_cpu.attention(q, k, v, *rest, **attributes)
    wide_rest = (None if bias is None else wide(bias), *rest[1:])
    want = OPS["attention"].reference(q.double(), k.double(), v.double(), *wide_rest, **attributes)
    eager = OPS["attention"].reference(q, k.bfloat16(), v.bfloat16(), *rest, **attributes)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    got, want, eager = (x.double().nan_to_num(0.0) for x in (got, want, eager))
    mine, theirs = ((x - want).abs().max() / want.abs().max() for x in (got, eager))
    assert mine < 1.2 * theirs + 2e-3


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_work_is_cut_anywhere(threads):
    q, k, v = make(torch.float32, b=1, h=6, hk=3, n=500)
    args = (None, None, [], [480], 0.2, "k <= q + n0", 0.0, None)
    call, got = attention_call(q, k, None, v, None, *args)
    run(call, threads)
    want = OPS["attention"].reference(
        *(x.double() for x in (q, k, v)), None, None, [], [480], scale=0.2, mask="k <= q + n0"
    )
    assert error(got, want) < 1e-5


def test_nan_and_empty():
    q, k, v = make(torch.float32, m=1)
    q[0, 0] = float("nan")
    got = torch.ops.dspark_cpu.attention(q, k, v, None, None, [], [], scale=0.2)
    assert got[0, 0].isnan().all() and got[0, 1:].isfinite().all()
    q, k, v = make(torch.float32, n=0)
    check("attention", q, k, v, None, None, [], [])
    q, k, v = make(torch.float32, b=0)
    check("attention", q, k, v, None, None, [], [])


@pytest.mark.parametrize(
    "mask,biased",
    [
        ("k <= q + n0", None),
        ("(k <= q + t0) & (k > q + t0 - 60) & t1[b, k]", None),
        ("(k <= q + n0) & ~((k >= 30) & (k < 40)) | (k == h)", torch.float32),
        ("(k <= q - 20) & (k >= 0)", torch.bool),  # rows without a key
    ],
)
def test_prefill(mask, biased):
    """More rows than a decode step has: in blocks, over the keys that they may attend to."""
    rows, n = 300, 700
    q, k, v = make(torch.float32, b=2, m=rows, n=n, d=16)
    bias = None if biased is None else torch.randn(2, 1, rows, n)
    if biased is torch.bool:
        bias = bias < 1
    rest = (bias, None, [torch.tensor(40), torch.rand(2, n) > 0.2], [45])
    check("attention", q, k, v, *rest, mask=mask)
    (k8, ks), (v8, vs) = quantize_kv(k, torch.float32), quantize_kv(v, torch.float32)
    check("attention_int8", q, k8, ks, v8, vs, *rest, mask=mask)
    if "n0" in mask and biased is None:
        k[:, :, 345:], v[:, :, 345:] = float("nan"), float("nan")
        got = torch.ops.dspark_cpu.attention(q, k, v, *rest, mask=mask, scale=0.2)
        assert got.isfinite().all()
    assert "300 query rows" in cpp.supports("attention", q, k, v, mask="k <= q", scale=1.0)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"m": 17}, "17 query rows"),
        ({"h": 5}, "5 query heads"),
        ({"d": 2000}, "2000 features"),
    ],
)
def test_refusals(change, reason):
    q, k, v = make(torch.float32, **change)
    assert reason in cpp.supports("attention", q, k, v, None, None, [], [], scale=1.0)


def test_predicates_print_with_bounds():
    printed = print_predicate("(k <= q + n0) & (k > q - 4) & t0[b, k]", (torch.bool,))
    assert "EXACT = false" in printed.text and "const bool* t0_ptr" in printed.text
    assert print_predicate("k <= q + n0").code.exact
    with pytest.raises(ValueError, match="float32"):
        print_predicate("t0[k] > 0", (torch.float32,))


def test_scales_of_another_shape():
    """They were read as if they had the right one: beyond their end."""
    q = torch.randn(1, 4, 1, 64)
    k8, ks = quantize_kv(torch.randn(1, 2, 40, 64), torch.float32)
    wrong = ks[..., None]
    assert "[B, Hkv, N]" in cpp.supports("attention_int8", q, k8, wrong, k8, ks, scale=1.0)
    assert "value_scale" in cpp.supports("attention_int8", q, k8, ks, k8, wrong, scale=1.0)
    assert "[B, Hkv, N]" in cpp.supports(
        "cache_append_int8_", k8, wrong, torch.randn(1, 2, 1, 64), torch.zeros(1, dtype=torch.long)
    )
    for scales in ((wrong, ks), (ks, ks[:, :, :39])):
        with pytest.raises(ValueError, match=r"\[B, Hkv, N\]"):
            torch.ops.dspark_cpu.attention_int8(
                q, k8, scales[0], k8, scales[1], None, None, [], [], scale=1.0
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_cache_for_many_rows(dtype):
    """A CPU without matrix tiles widens keys and values once for all rows of a head."""
    for shape in ({"d": 37, "dv": 50}, {"d": 64, "dv": 16, "n": 300}):
        q, k, v = make(dtype, b=2, h=6, hk=2, m=7, **shape)
        (k8, ks), (v8, vs) = quantize_kv(k, torch.float32), quantize_kv(v, torch.float32)
        check("attention_int8", q, k8, ks, v8, vs, None, None, [], [40], mask="k <= q + n0")
