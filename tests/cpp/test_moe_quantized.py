"""Experts over int8 and int4 weights in C++: values against float64 over the same numbers."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.kernels import cpp
from dspark_compile.ops import OPS
from dspark_compile.ops.quantized import pack_int4
from dspark_compile.runtime.expert_load import expert_load
from tests.cpp.test_moe import GPT_OSS, check


def weight(count, rows, columns, groups, zero, top, dtype):
    """Numbers ``[E, N, K]``, scales and zero points ``[E, N, G]``."""
    q = torch.randint(-top - 1, top + 1, (count, rows, columns), dtype=torch.int8)
    scale = ((torch.rand(count, rows, groups) + 0.5) * 0.2 / top).to(dtype)
    points = None if zero is None else torch.randint(-3, 4, (count, rows, groups)).to(zero)
    return q, scale, points


def experts(
    dtype, tokens, bits=8, count=6, k=2, features=128, inner=64, outputs=56, *, groups=(1, 1),
    zero=None, lists=False, gated=True, bias=False, weigh_input=False, foreign=False, limits=(),
):  # fmt: skip
    """Arguments of ``moe_experts_int8`` or ``moe_experts_int4``."""
    top = 127 if bits == 8 else 7
    both = weight(count, 2 * inner, features, groups[0], zero, top, dtype)
    down = weight(count, outputs, inner, groups[1], zero, top, dtype)
    parts = [[None if t is None else t[:, a : a + inner] for t in both] for a in (0, inner)]
    parts = [[[None] * 3, parts[0]][gated], parts[1], down]
    lists = lists or bits == 4

    def split(tensor, pack=False):
        if tensor is None:
            return []
        made = [t.contiguous() for t in tensor] if lists else [tensor]
        return [pack_int4(t) for t in made] if pack else made

    index = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    if foreign:
        index = torch.where(torch.rand(index.shape) < 0.4, count, index)
        index[-1] = -1
    draw = lambda *shape: (torch.randn(*shape) * 0.2).to(dtype)  # noqa: E731
    biases = [draw(count, inner), draw(count, inner), draw(count, outputs)]
    biases = [[b] if bias and (i or gated) else [] for i, b in enumerate(biases)]
    return [
        draw(tokens, features) * 5, index, torch.rand(tokens, k).to(dtype),
        *(split(p[0], bits == 4) for p in parts), *(split(p[1]) for p in parts),
        *(split(p[2]) for p in parts), *biases, "silu", list(limits), weigh_input, "",
    ]  # fmt: skip


VARIANTS = {
    "plain": {},
    "torchao": {"zero": torch.int8, "lists": True},
    "groups": {"zero": torch.int8, "groups": (4, 2), "bias": True},
    "int4": {"bits": 4, "groups": (4, 2), "zero": torch.int8},
    "int4_rows": {"bits": 4, "inner": 48, "outputs": 40},
    "odd": {"features": 100, "inner": 40, "bias": True, "limits": GPT_OSS},
    "weighed": {"gated": False, "weigh_input": True, "lists": True},
    "shard": {"foreign": True, "zero": torch.float32},
}


def checked(dtype, tokens, bits=8, **given):
    check(f"moe_experts_int{bits}", experts(dtype, tokens, bits, **given), dtype)


@pytest.mark.parametrize("tokens", [1, 3, 8, 130])
def test_experts(tokens):
    """One token, several of an expert, and more than one pass takes."""
    checked(torch.bfloat16, tokens, zero=torch.int8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype):
    for tokens in (1, 3, 8, 40, 130):
        given = dict(VARIANTS[name])
        if tokens == 1:
            given.pop("foreign", None)
        checked(dtype, tokens, **given)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("isa", ["avx2", "portable"])
def test_other_cpus(isa, bits, monkeypatch):
    from dspark_compile.codegen.cpp import isa as levels

    if levels.detect() == "portable":
        pytest.skip("no vectors on this CPU")
    monkeypatch.setenv("DSPARK_CPU_ISA", isa)
    for tokens in (1, 3, 40):
        checked(torch.bfloat16, tokens, bits, groups=(4, 2), zero=torch.int8)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_token_that_has_an_expert_twice(tokens):
    """Hash routers may: an expert has more rows than there are tokens."""
    for name, args in (
        ("moe_experts_int8", experts(torch.bfloat16, tokens, k=6)),
        ("moe_experts", plain(tokens, 6)),
    ):
        args[1] = torch.full_like(args[1], 3)
        check(name, args, torch.bfloat16)


def plain(tokens, k):
    from tests.cpp.test_moe import experts as dense

    return dense(torch.bfloat16, tokens, k=k)


def test_load_counts_quantised_bytes():
    args = experts(torch.bfloat16, 4, count=32)
    args[-1] = "int8 block"
    with expert_load() as load:
        torch.ops.dspark_cpu.moe_experts_int8(*args)
    layer = next(x for x in load.layers() if x.site == "int8 block" and x.calls)
    one = sum(t[0].numel() * t.element_size() for part in args[3:9] for t in part)
    assert layer.experts_hit == len(args[1].unique())
    assert layer.bytes_read == layer.experts_hit * one


def test_what_is_refused():
    args = experts(torch.bfloat16, 3)
    args[8] = [args[8][0].float()]
    assert "differ in dtype" in cpp.supports("moe_experts_int8", *args)
    args = experts(torch.bfloat16, 3, groups=(8, 1))
    assert "no multiple of 32" in cpp.supports("moe_experts_int8", *args)
    args = experts(torch.bfloat16, 3)
    args[5] = [args[5][0].mT.contiguous().mT]
    assert "strides" in cpp.supports("moe_experts_int8", *args)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_reference_reads_the_experts_that_are_hit(bits):
    """As dense experts over the dequantised weights."""
    from dspark_compile.ops.quantized import dequantize_weight, unpack_int4

    args = experts(torch.float32, 5, bits, groups=(4, 2), zero=torch.int8, foreign=True)
    sizes = (128, 128, 64)
    dense = []
    for i in range(3):
        stacks = [args[3 + i], args[6 + i], args[9 + i]]
        each = [list(s[0]) if len(s) == 1 else s for s in stacks]
        dense.append([
            dequantize_weight(
                unpack_int4(q, s.shape[0], sizes[i]) if bits == 4 else q, s, z, torch.float32
            )
            for q, s, z in zip(*each, strict=True)
        ])  # fmt: skip
    want = OPS["moe_experts"].reference(*args[:3], *dense, *args[12:18])
    torch.testing.assert_close(OPS[f"moe_experts_int{bits}"].reference(*args), want)
