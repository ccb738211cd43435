"""`runtime.large_pages.zeros`: zeros as torch's, for which the kernel is asked for large pages."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dspark_compile.runtime import large_pages


@pytest.fixture
def asked(monkeypatch):
    """What `madvise` is asked."""
    calls = []
    monkeypatch.setattr(large_pages, "_madvise", lambda: lambda *args: calls.append(args) or -1)
    return calls


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_only_pages_that_lie_in_the_tensor(dtype, asked):
    made = large_pages.zeros((3, 5, 2**20), dtype=dtype)
    assert made.dtype == dtype and made.shape == (3, 5, 2**20) and not made.any()
    ((start, size, advice),) = asked
    assert advice == 14 and start % large_pages.PAGE == 0 and size % large_pages.PAGE == 0
    assert made.data_ptr() <= start and start + size <= made.data_ptr() + made.nbytes
    assert size > made.nbytes - 2 * large_pages.PAGE


def test_small_and_other_tensors_are_torchs(asked):
    assert not large_pages.zeros((2, 3), dtype=torch.int8).any()
    assert large_pages.zeros((8, 2**20), dtype=torch.int8, device="meta").device.type == "meta"
    with FakeTensorMode():
        assert large_pages.zeros((8, 2**20), dtype=torch.int8).shape == (8, 2**20)
    traced = torch.compile(
        lambda x: x + large_pages.zeros((8, 2**20), dtype=torch.float32).sum(),
        backend="eager", fullgraph=True,
    )  # fmt: skip
    assert traced(torch.ones(2)).tolist() == [1, 1]
    assert asked == []


def test_without_the_call(monkeypatch):
    monkeypatch.setattr(large_pages.sys, "platform", "darwin")
    large_pages._madvise.cache_clear()
    try:
        assert large_pages._madvise() is None
        assert not large_pages.zeros((8, 2**20), dtype=torch.int8).any()
    finally:
        large_pages._madvise.cache_clear()
