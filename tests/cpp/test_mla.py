"""Latent attention in C++ and the products around it: numerics, and whole models as one call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dspark_compile
from dspark_compile.codegen.cpp import isa
from dspark_compile.diagnostics.state import last_report
from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp._launch import run
from dspark_compile.kernels.cpp.attention import call_of
from dspark_compile.kernels.cpp.batched import bmm_call
from dspark_compile.ops import OPS
from tests.cpp.test_attention import error, wide
from tests.zoo import families

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(dtype=torch.float32, b=1, h=4, m=2, n=70, r=24, dr=8):
    """Query in two parts, latents and rotary parts."""
    shapes = ((b, h, m, r), (b, h, m, dr), (b, n, r), (b, n, dr))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def check(parts, bias=None, sinks=None, tensors=(), ints=(), **attributes):
    """The op agrees with the float64 meaning about as the reference does."""
    args = (*parts, bias, sinks, list(tensors), list(ints))
    attributes.setdefault("scale", 0.15)
    assert cpp.supports("mla_attention", *args, **attributes) is None
    got = torch.ops.dspark_cpu.mla_attention(*args, **attributes)
    want = OPS["mla_attention"].reference(*(wide(a) for a in args), **attributes)
    reference = OPS["mla_attention"].reference(*args, **attributes)
    assert got.shape == want.shape and got.dtype == args[0].dtype
    assert got.transpose(1, 2).is_contiguous()
    # Weights may be bfloat16, as eager's are.
    slack = 2e-3 if got.dtype == torch.bfloat16 else 1e-5
    assert error(got, want) <= 1.2 * error(reference, want) + slack
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
def test_sizes(dtype, rows):
    """Blocks of keys that are not full, feature counts of no whole vector, groups of heads."""
    sizes = [{"b": 2, "h": 3, "n": 61, "r": 24, "dr": 8}, {"h": 16, "n": 300, "r": 64, "dr": 32}]
    if rows == 1:
        sizes.append({"h": 6, "n": 129, "r": 12, "dr": 4})
    for size in sizes:
        check(make(dtype, m=rows, **size), ints=[size["n"] - rows], mask="k <= q + n0")


def test_sizes_of_deepseek():
    check(make(torch.bfloat16, h=16, m=1, n=600, r=512, dr=64))


@pytest.mark.slow
@pytest.mark.parametrize("level", [x for x in isa.LEVELS if x in isa.available()])
def test_every_instruction_set(level, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", level)
    for dtype, rows in ((torch.bfloat16, 8), (torch.bfloat16, 1), (torch.float32, 3)):
        check(make(dtype, m=rows, r=64, dr=32, n=200), ints=[150], mask="k <= q + n0")
        for turned in (False, True):
            check_bmm(dtype, 3, rows, 40, 70, turned)


@pytest.mark.parametrize(
    "mask",
    [
        "(k <= q + n0) & (k > q + n0 - 20)",
        "(k <= t0) & t1[b, k]",
        "~((k % 3 == h) & (min(k, q) > 0))",
        "False",
    ],
)
def test_masks(mask):
    args = make(b=2, h=32, m=3, n=150)  # two groups of heads
    tensors = [torch.tensor(90), torch.rand(2, 150) > 0.3]
    for value in (None, -3.0e38, -2.0):
        check(args, None, None, tensors, [120], mask=mask, mask_value=value)


def test_bias_sinks_and_softcap():
    args = make(b=2, h=32, m=3, n=150)
    check(args, torch.randn(2, 32, 3, 150), torch.randn(32), [], [], softcap=2.0)
    check(args, torch.rand(2, 1, 3, 150) > 0.5, None, [], [140], mask="k <= q + n0")


def test_rows_in_lanes_and_pairs():
    """bfloat16 where tiles or pairs may do it, between the two products."""
    args = make(torch.bfloat16, h=8, m=8, n=300, r=64, dr=32)
    args[0][0, 1, 7] = float("nan")
    rest = (torch.randn(1, 8, 8, 300).bfloat16(), None, [torch.rand(1, 300) > 0.3], [250])
    attributes = {"mask": "(k <= q + n0) & t0[b, k]", "softcap": 3.0, "scale": 0.15}
    got = torch.ops.dspark_cpu.mla_attention(*args, *rest, **attributes)
    want = OPS["mla_attention"].reference(*map(wide, (*args, rest[0])), *rest[1:], **attributes)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
    assert error(got.nan_to_num(0.0), want.nan_to_num(0.0)) < 1e-2


def test_forbidden_keys_are_not_read():
    args = make(torch.bfloat16, n=256)
    for x in args[2:]:
        x[:, 50:], x[:, :20] = float("nan"), float("nan")
    attributes = {"mask": "(k <= q + n0) & (k >= 20)", "scale": 0.2}
    got = torch.ops.dspark_cpu.mla_attention(*args, None, None, [], [48], **attributes)
    clean = [x.nan_to_num(0.0) for x in args]
    want = OPS["mla_attention"].reference(*clean, None, None, [], [48], **attributes)
    assert error(got, want.double()) < 1e-2


def test_strides_as_models_have_them():
    """Parts of a larger cache, and a query of heads that lie side by side."""
    q, q_rope, latent, rope = make(b=2, n=100, m=3)
    both = torch.cat((q, q_rope), -1).transpose(1, 2).contiguous().transpose(1, 2)
    parts = both[..., :24], both[..., 24:]
    room = torch.zeros(2, 1, 160, 24), torch.zeros(2, 1, 160, 8)
    for cache, x in zip(room, (latent, rope)):
        cache[:, 0, 30:130] = x
    got = check((*parts, *(cache.squeeze(1)[:, 30:130] for cache in room)))
    assert torch.equal(got, check((q, q_rope, latent, rope)))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_work_is_cut_anywhere(threads):
    args = make(h=16, m=8, n=500)
    attributes = {"scale": 0.15, "mask": "k <= q + n0"}
    call, got = call_of("mla_attention", (*args, None, None, [], [480]), attributes)
    run(call, threads)
    rest = (None, None, [], [480])
    want = OPS["mla_attention"].reference(*map(wide, args), *rest, **attributes)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize(
    "change, reason",
    [({"m": 17}, "17 query rows"), ({"r": 1000, "dr": 32}, "1032 features")],
)
def test_refusals(change, reason):
    assert reason in cpp.supports("mla_attention", *make(**change), scale=1.0)


def test_nothing():
    check(make(n=0))
    check(make(b=0))


# ------------------------------------------------------------------ the products around it


def check_bmm(dtype, batch, rows, size, outputs, turned, threads=None):
    x = torch.randn(rows, batch, size).to(dtype).transpose(0, 1)
    lie = (batch, size, outputs) if turned else (batch, outputs, size)
    # A slice of each head's rows, as one projection for keys and values has them.
    weight = torch.randn(lie[0], lie[1] + 5, lie[2]).to(dtype)[:, 2:-3]
    weight = weight if turned else weight.transpose(1, 2)
    assert cpp.supports("matmul", x, weight) is None
    call, got = bmm_call(x, weight)
    run(call, threads)
    want = torch.bmm(x.double(), weight.double())
    assert got.shape == want.shape and got.transpose(0, 1).is_contiguous()
    assert error(got, want) <= 1.05 * error(
        torch.bmm(x.float(), weight.float()).to(dtype), want
    ) + (1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("turned", [False, True])
def test_bmm(dtype, rows, turned):
    for batch, size, outputs in ((1, 5, 3), (4, 32, 70), (3, 130, 64)):
        check_bmm(dtype, batch, rows, size, outputs, turned)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bmm_is_cut_by_columns(threads):
    for batch in (1, 7):
        for turned in (False, True):
            check_bmm(torch.float32, batch, 3, 33, 200, turned, threads)


def test_bmm_refusals():
    x, weight = torch.randn(2, 3, 8), torch.randn(2, 8, 5)
    assert "17 rows" in cpp.supports("matmul", torch.randn(2, 17, 8), torch.randn(2, 8, 20))
    assert "float64" in cpp.supports("matmul", x.double(), weight.double())
    assert "bfloat16" in cpp.supports("matmul", x.bfloat16(), weight)
    assert "strides" in cpp.supports("matmul", x, torch.randn(2, 16, 10)[:, ::2, ::2])
    assert "nothing" in cpp.supports("matmul", x[:, :, :0], weight[:, :0])


# ------------------------------------------------------------------------------ whole models

ASKED = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", *(pytest.param(f, marks=pytest.mark.slow) for f in ("minicpm3", "youtu"))],
)
def test_a_step_is_one_native_call(family):
    model, prompt = families.build(family), families.tokens(family, 9)
    want = model.generate(prompt, max_new_tokens=8, **ASKED)
    got, report = dspark_compile.generate(
        model, prompt, max_new_tokens=8, options={"kernels": "cpp"}, return_stats=True, **ASKED
    )
    assert torch.equal(got, want)
    assert report.path == "native", report.notes
    kinds = [kernel.op for kernel in last_report().graphs[-1].kernels]
    layers = model.config.num_hidden_layers
    assert sum(kind.startswith("mla_attention") for kind in kinds) == layers
    assert sum(kind.startswith("bmm") for kind in kinds) == 2 * layers


@pytest.mark.slow
def test_verification_is_one_native_call():
    """Drafts from the text so far: steps of several rows."""
    model, prompt = families.build("deepseek_v3"), families.tokens("deepseek_v3", 9)[:1]
    want = model.generate(prompt, max_new_tokens=24, **ASKED)
    got, report = dspark_compile.generate(
        model, prompt, max_new_tokens=24, draft="ngram", num_drafted=7, schedule="fixed",
        options={"kernels": "cpp"}, return_stats=True, **ASKED,
    )  # fmt: skip
    assert torch.equal(got, want)
    assert report.path == "native", report.notes
    assert report.speculation.committed == 23


@torch.no_grad()
def test_heads_and_rows_of_a_bmm_in_a_step():
    """Products elsewhere: matrices that no weight holds, rows behind a transposition."""

    def step(x, matrices, weight):
        y = torch.bmm(F.rms_norm(x, (16,)).transpose(0, 1), matrices.mT)
        y = torch.bmm(y, matrices + 1)[None] @ matrices[None].mT
        return F.linear(y[0].transpose(0, 1).reshape(3, -1), weight)

    options = {"kernels": "cpp", "fallback": "error"}
    compiled = torch.compile(step, backend="dspark", dynamic=False, options=options)
    args = torch.randn(3, 2, 16), torch.randn(2, 24, 16), torch.randn(10, 48)
    torch.testing.assert_close(compiled(*args), step(*args), rtol=1e-4, atol=1e-4)
    notes = last_report().graphs[-1].notes
    assert any(note.startswith("one native call") for note in notes), notes
