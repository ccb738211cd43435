"""One matrix an expert over sorted rows, in C++."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.kernels import cpp
from tests.cpp.test_moe import check


def grouped(
    dtype, rows, count=6, features=72, outputs=56, *, turned=False, lists=False, bias=False
):
    """Arguments of ``grouped_linear``; some experts have no row."""
    draw = lambda *shape: (torch.randn(*shape) * 0.2).to(dtype)  # noqa: E731
    weight = draw(count, features, outputs).mT if turned else draw(count, outputs, features)
    expert = torch.randint(0, count - 1, (rows,))
    ends = torch.bincount(expert, minlength=count).cumsum(0)
    offsets = [draw(count, outputs)] if bias else []
    if lists:
        return [draw(rows, features), ends, list(weight), list(offsets[0]) if bias else []]
    return [draw(rows, features), ends, [weight], offsets]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_rows(rows):
    check("grouped_linear", grouped(torch.bfloat16, rows), torch.bfloat16)
    check("grouped_linear", grouped(torch.bfloat16, rows, lists=True, bias=True), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [False, True])
def test_variants(dtype, turned):
    for rows in (1, 5, 40):
        args = grouped(dtype, rows, count=5, features=33, outputs=40, turned=turned, bias=True)
        check("grouped_linear", args, dtype)


def test_all_rows_of_one_expert_and_none():
    args = grouped(torch.float32, 20)
    args[1] = torch.tensor([0, 0, 20, 20, 20, 20])
    check("grouped_linear", args, torch.float32)
    empty = [args[0][:0], torch.zeros(6, dtype=torch.int64), *args[2:]]
    assert torch.ops.dspark_cpu.grouped_linear(*empty).shape == (0, 56)


def test_what_is_refused():
    args = grouped(torch.float32, 3)
    args[2] = [args[2][0].bfloat16()]
    assert "a weight bfloat16" in cpp.supports("grouped_linear", *args)
