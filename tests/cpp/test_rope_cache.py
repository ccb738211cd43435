"""RoPE, appends and the fused norm + RoPE + append in C++: against the dialect's references."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp import rope
from dspark_compile.ops import OPS

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def call(name, *args):
    assert cpp.supports(name, *args) is None
    return getattr(torch.ops.dspark_cpu, name)(*args)


def close(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    tolerance = TOLERANCE.get(want.dtype, 1.0)  # an int8 value may turn one step
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


def angles(rows, features, dtype):
    turn = torch.rand(1, 1, rows, features) * 6
    return turn.cos().to(dtype), turn.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(dtype, interleaved):
    x = torch.randn(2, 3, 4, 40).to(dtype)
    view = torch.randn(2, 3, 5, 40).to(dtype).transpose(1, 2)
    for rotary, features in ((40, 40), (40, 20), (24, 24), (24, 12)):
        cos, sin = angles(4, features, torch.float32)
        close(
            call("rope", x, cos, sin, rotary, interleaved),
            OPS["rope"].reference(x, cos, sin, rotary, interleaved),
        )
        cos, sin = angles(3, features, torch.float32)
        close(
            call("rope", view, cos, sin, rotary, interleaved),
            OPS["rope"].reference(view, cos, sin, rotary, interleaved),
        )


def test_rope_of_what_is_broadcast():
    x = torch.randn(1, 1, 1, 16)
    cos, sin = (torch.randn(2, 1, 3, 16) for _ in range(2))
    close(call("rope", x, cos, sin, 16), OPS["rope"].reference(x, cos, sin, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_appends(dtype):
    new = torch.randn(2, 5, 3, 20).to(dtype).transpose(1, 2)
    positions = torch.tensor([7, 0, 3, 4, 1])
    ours, theirs = (torch.zeros(2, 3, 9, 20, dtype=dtype) for _ in range(2))
    call("cache_append_", ours, new, positions)
    OPS["cache_append_"].reference(theirs, new, positions)
    assert torch.equal(ours, theirs)
    ours, theirs = (torch.zeros(2, 3, 9, 20, dtype=torch.int8) for _ in range(2))
    scale, their_scale = (torch.zeros(2, 3, 9, dtype=torch.bfloat16) for _ in range(2))
    call("cache_append_int8_", ours, scale, new, positions)
    OPS["cache_append_int8_"].reference(theirs, their_scale, new, positions)
    assert torch.equal(scale, their_scale) and torch.equal(ours, theirs)


@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_is_an_error(position):
    cache, new = torch.zeros(1, 1, 9, 4), torch.ones(1, 1, 1, 4)
    with pytest.raises(IndexError, match="outside of the cache"):
        call("cache_append_", cache, new, torch.tensor([position]))
    assert (cache == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_prepare(dtype, norm, int8):
    rows, features = 2, 24
    query, key, value = (
        torch.randn(2, rows, heads, features).to(dtype).transpose(1, 2) for heads in (6, 2, 2)
    )
    weights = [torch.rand(features).to(dtype) for _ in range(2)] if norm else [None, None]
    cos, sin = angles(rows, 24, torch.float32)
    positions = torch.tensor([3, 4])

    def run(function):
        caches = [torch.zeros(2, 2, 9, features, dtype=torch.int8 if int8 else dtype) for _ in "kv"]
        if int8:
            scales = [torch.zeros(2, 2, 9) for _ in "kv"]
            caches = [caches[0], scales[0], caches[1], scales[1]]
        out = function(
            query, key, value, *weights, cos, sin, *caches, positions,
            1e-6, 0.0, False, norm, 24, False, True,
        )  # fmt: skip
        return [out, *caches]

    name = "qk_norm_rope_append_int8_" if int8 else "qk_norm_rope_append_"
    got = run(lambda *args: call(name, *args))
    for ours, theirs in zip(got, run(OPS[name].reference)):
        close(ours, theirs)


def test_python_lets_in_what_the_header_has_room_for():
    text = (Path(rope.__file__).parent / "rope.h").read_text()
    (most,) = re.findall(r"constexpr int MAX_FEATURES = (\d+);", text)
    assert int(most) == rope.MAX_FEATURES
