"""Appends, alone and behind qk-norm and RoPE, against the dialect."""

from __future__ import annotations

import pytest
import torch
from interpreted import assert_close

from dspark_compile.kernels.triton import overload, supports
from dspark_compile.ops import OPS


def _in_place(name, caches, before, after):
    """The Triton op on clones of the caches, and the functional dialect op."""
    written = [c.clone() for c in caches]
    assert supports(name, *before, *written, *after) is None
    returned = overload(name)(*before, *written, *after)
    expected = OPS[name.removesuffix("_")].overload(*before, *caches, *after)
    actual = written if returned is None else [returned, *written]
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected):
        assert_close(a, e)


def test_append():
    new = torch.randn(2, 3, 2, 12).transpose(1, 2)
    positions = torch.tensor([6, 0, 3])
    cache = torch.randn(2, 2, 7, 12)
    _in_place("cache_append_", [cache], [], [new, positions])
    other = torch.randn(2, 7, 2, 12).transpose(1, 2).half()
    _in_place("cache_append_", [other], [], [new, positions])
    short = cache.clone()
    overload("cache_append_")(short, new, positions.int())
    torch.testing.assert_close(short, cache.index_copy(2, positions, new))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_append_int8(scale_dtype):
    cache = torch.randint(-127, 128, (1, 2, 7, 20), dtype=torch.int8)
    scale = torch.rand(1, 2, 7).to(scale_dtype)
    new = torch.randn(1, 2, 3, 20)
    new[0, 1, 1] = 0
    _in_place("cache_append_int8_", [cache, scale], [], [new, torch.tensor([4, 2, 6])])


def test_positions_outside_are_not_written():
    cache = torch.zeros(1, 1, 4, 8)
    overload("cache_append_")(cache, torch.ones(1, 1, 3, 8), torch.tensor([-1, 4, 2]))
    assert cache.sum(-1).flatten().tolist() == [0, 0, 8, 0]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("tokens", "features", "rotary", "width", "norm", "in_compute", "interleaved", "dtype"),
    [
        (1, 40, 40, 40, True, False, False, torch.float32),
        (3, 40, 24, 12, True, True, True, torch.float32),
        (9, 32, 32, 32, False, False, False, torch.float32),
        (2, 32, 32, 32, True, False, False, torch.float16),
    ],
)
def test_prepare(int8, tokens, features, rotary, width, norm, in_compute, interleaved, dtype):
    torch.manual_seed(0)
    query = torch.randn(1, tokens, 4, features, dtype=dtype).transpose(1, 2)
    key = torch.randn(1, tokens, 2, features, dtype=dtype).transpose(1, 2)
    value = torch.randn(1, tokens, 2, 24, dtype=dtype).transpose(1, 2)
    weights = torch.randn(2, features, dtype=dtype)
    table = torch.randn(2, 1, 1, tokens, width, dtype=dtype)
    positions = torch.randperm(11)[:tokens]
    if int8:
        caches = []
        for size in (features, 24):
            caches.append(torch.randint(-127, 128, (1, 2, 11, size), dtype=torch.int8))
            caches.append(torch.rand(1, 2, 11).to(dtype))
    else:
        caches = [torch.randn(1, 2, 11, size, dtype=dtype) for size in (features, 24)]
    _in_place(
        "qk_norm_rope_append_int8_" if int8 else "qk_norm_rope_append_",
        caches,
        [query, key, value, *weights, *table],
        [positions, 1e-6, 0.5 * in_compute, in_compute, norm, rotary, interleaved, False],
    )


def test_refusals():
    new, positions = torch.randn(1, 2, 1, 8), torch.tensor([0])
    wrong = torch.zeros(1, 2, 4, 8)
    assert "not int8" in supports("cache_append_int8_", wrong, wrong[..., 0], new, positions)
    assert "positions" in supports("cache_append_", wrong, new, positions.float())
    assert "not contiguous" in supports("cache_append_", wrong.transpose(2, 3), new, positions)
