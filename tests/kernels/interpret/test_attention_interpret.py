"""Attention kernels, split and whole, against the dialect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interpreted import assert_close, compare

from dspark_compile.kernels.triton import attention as module
from dspark_compile.kernels.triton import overload, supports
from dspark_compile.ops import OPS


def _tensors(queries, keys, *, group=2, kv_heads=1, batch=1, features=32, value_features=None,
             dtype=torch.float32):  # fmt: skip
    torch.manual_seed(0)
    query = torch.randn(batch, queries, group * kv_heads, features, dtype=dtype).transpose(1, 2)
    key = torch.randn(batch, kv_heads, keys, features, dtype=dtype)
    value = torch.randn(batch, kv_heads, keys, value_features or features, dtype=dtype)
    return query, key, value


def _check(qkv, *, bias=None, sinks=None, tensors=(), ints=(), tolerance=None, **attributes):
    operands = (*qkv, bias, sinks, list(tensors), list(ints))
    attributes.setdefault("scale", qkv[0].shape[-1] ** -0.5)
    compare("attention", *operands, tolerance=tolerance, **attributes)


MASKS = {
    "causal": ("k <= q + n0", lambda n: [], [90]),
    "strict": ("k < q", lambda n: [], []),
    "window": ("(k <= q + n0) & (q + n0 - k < 20)", lambda n: [], [90]),
    "padded": ("(k <= q + n0) & t0[b, k]", lambda n: [torch.rand(2, n) > 0.4], [90]),
    "positions": (
        "(k <= t0[q]) & (t1[b, k] != 0)",
        lambda n: [torch.tensor([60, 3, 90]), torch.randint(0, 2, (2, n))],
        [],
    ),
    "packed": (
        "(t0[b, q] == t1[b, k]) & (k >= t2)",
        lambda n: [torch.tensor([[0, 1, 2]] * 2), torch.randint(0, 3, (2, n)), torch.tensor(4)],
        [],
    ),
    "blocks": ("(q - k) // 7 % 3 == 1", lambda n: [], []),
    "prefix or window": ("(k < 4) | ~(abs(q + n0 - k) > max(3, n1))", lambda n: [], [50, 9]),
    "wrapped index": ("t0[k - n0] & (h != 1)", lambda n: [torch.rand(n) > 0.5], [40]),
    "heads": ("k <= t0[h] + b", lambda n: [torch.tensor([5, 40])], []),
    "never": ("False", lambda n: [], []),
    "mixed": (
        "(k < 4) | (~(abs(q - k) // n0 % 3 == -1) & (t0[max(q, 1) - k] != t1) & (min(h, b) >= 0))",
        lambda n: [torch.randint(0, 3, (n,)), torch.tensor(1)],
        [7],
    ),
    "always": ("True | (k < 3)", lambda n: [], []),
}


@pytest.mark.parametrize("name", MASKS)
def test_predicates(name):
    mask, tensors, ints = MASKS[name]
    qkv = _tensors(3, 100, batch=2)
    _check(qkv, mask=mask, tensors=tensors(100), ints=ints)


@pytest.mark.parametrize("value", [-3.4028234e38, -5.0])
@pytest.mark.parametrize("name", ["strict", "window", "positions"])
def test_additive_mask_values(name, value):
    """With a finite value a row that may see nothing averages over every key."""
    mask, tensors, ints = MASKS[name]
    operands = tensors(70)
    if name == "positions":
        operands[0] = torch.tensor([60, -1, 80])
    _check(_tensors(3, 70, batch=2), mask=mask, tensors=operands, ints=ints, mask_value=value)


@pytest.mark.parametrize(
    ("queries", "keys", "group", "kv_heads", "features", "value_features"),
    [
        (1, 200, 1, 2, 16, 16),
        (1, 33, 5, 1, 40, 24),
        (16, 65, 2, 1, 8, 8),
        (2, 1, 2, 2, 16, 16),
        (1, 0, 2, 1, 16, 16),
    ],
)
def test_shapes(queries, keys, group, kv_heads, features, value_features):
    _check(_tensors(queries, keys, group=group, kv_heads=kv_heads, features=features,
                    value_features=value_features))  # fmt: skip


def test_half_precision():
    qkv = _tensors(2, 90, dtype=torch.float16)
    _check(qkv, mask="k <= q + n0", ints=[70])
    _check((qkv[0], qkv[1].float(), qkv[2]), mask="k <= q + n0", ints=[70])


def test_strides():
    """A cache that lies as [B, N, H, D], and keys stored transposed."""
    query, key, value = _tensors(2, 40, kv_heads=2)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    _check((query, key, value))


@pytest.mark.parametrize("shape", [(3, 50), (2, 1, 3, 50), (1, 2, 1, 50), (2, 2, 3, 50)])
def test_float_bias(shape):
    bias = torch.randn(shape)
    bias[..., :4] = -torch.inf
    _check(_tensors(3, 50, batch=2), bias=bias)


def test_bool_bias():
    qkv = _tensors(3, 50, batch=2)
    bias = torch.rand(2, 1, 3, 50) > 0.5
    bias[0, 0, 1] = False
    _check(qkv, bias=bias)
    _check(qkv, bias=bias, mask="k <= q + n0", ints=[40])
    _check(qkv, bias=bias, mask="k <= q + n0", ints=[40], mask_value=-1e30)


@pytest.mark.parametrize("mask", ["", "k < q"])
def test_softcap_and_sinks(mask):
    qkv = _tensors(3, 100)
    _check(qkv, mask=mask, softcap=2.0, scale=1.5)
    _check(qkv, mask=mask, sinks=torch.tensor([0.5, -1.0]), softcap=5.0)


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_split_counts(splits):
    """The same result however the keys are dealt, also where some programs get none."""
    query, key, value = _tensors(2, 300)
    sinks = torch.tensor([0.3, -0.2])
    plan = module.plan(query, key, None, value, None, None, sinks, [], [130], 0.2,
                       "k <= q + n0", 0.0, None, splits=splits)  # fmt: skip
    for launch in plan.launches:
        launch.run()
    expected = OPS["attention"].reference(
        query, key, value, None, sinks, [], [130], scale=0.2, mask="k <= q + n0"
    )
    assert_close(plan.out, expected)


def _int8(query, key, value, dtype):
    quantise = OPS["quantize_kv"].reference
    return (query, *quantise(key, dtype), *quantise(value, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 5])
def test_int8(dtype, queries):
    operands = _int8(*_tensors(queries, 90, features=40, dtype=dtype), dtype)
    compare("attention_int8", *operands, None, None, [], [80], scale=0.2, mask="k <= q + n0")


def test_prefill_whole_blocks():
    """Tall tiles take the blocks below every bound without a test."""
    _check(_tensors(40, 150, features=16), mask="k <= q + n0", ints=[100])
    _check(_tensors(40, 150, features=16), mask="k <= q + n0", ints=[100], mask_value=-1e30)


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_prefill_predicates(name):
    mask, tensors, ints = MASKS[name]
    operands = [
        torch.arange(70).expand_as(torch.empty(2, 70)).contiguous()
        if t.dim() == 2 and t.shape[1] == 3
        else torch.arange(70)
        if tuple(t.shape) == (3,)
        else t
        for t in tensors(150)
    ]
    _check(_tensors(70, 150, batch=2), mask=mask, tensors=operands, ints=ints)


@pytest.mark.slow
def test_prefill_int8():
    operands = _int8(*_tensors(70, 150), torch.float32)
    compare("attention_int8", *operands, None, None, [], [80], scale=0.2, mask="k <= q + n0")


def test_refusals():
    query, key, value = _tensors(1, 8, features=16)
    rest = (None, None, [], [])
    wide = torch.randn(1, 2, 1, 320)
    assert "320 features" in supports("attention", wide, wide, wide, *rest, scale=1.0)
    assert "t0 is missing" in supports("attention", query, key, value, *rest, scale=1.0,
                                       mask="t0[k]")  # fmt: skip
    floats = (None, None, [torch.randn(8)], [])
    assert "t0 is float32" in supports("attention", query, key, value, *floats, scale=1.0,
                                       mask="t0[k]")  # fmt: skip
    assert "not int8" in supports("attention_int8", query, key, key[..., 0], value, value[..., 0],
                                  *rest, scale=1.0)  # fmt: skip


def test_generated_source_is_a_file_a_user_can_open():
    qkv = _tensors(1, 20)
    mask = "k <= q + n0"
    assert overload("attention")(*qkv, None, None, [], [10], scale=1.0, mask=mask).isfinite().all()
    generated, _ = module.attention_module(mask)
    text = Path(generated.__file__).read_text()
    assert text.startswith("# Attention for the mask 'k <= q + n0'")
    assert "return (k <= (q + n0))" in text
    assert "# mask: parameters" not in text and "# mask: arguments" not in text
