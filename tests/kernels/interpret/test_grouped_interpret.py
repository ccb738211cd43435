"""One matrix an expert over sorted rows, against the dialect."""

from __future__ import annotations

import pytest
import torch
from interpreted import compare

from dspark_compile.kernels.triton import overload, supports


def arguments(rows, dtype=torch.float32, *, count=6, features=40, outputs=36, turned=False,
              bias=False, seed=0):  # fmt: skip
    """Arguments of ``grouped_linear``; the last expert has no row, and others may have none."""
    torch.manual_seed(seed)
    draw = lambda *shape: (torch.randn(*shape) * 0.2).to(dtype)  # noqa: E731
    weight = draw(count, features, outputs).mT if turned else draw(count, outputs, features)
    expert = torch.randint(0, max(count - 1, 1), (rows,))
    ends = torch.bincount(expert, minlength=count).cumsum(0)
    return [draw(rows, features), ends, [weight], [draw(count, outputs)] if bias else []]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 45, 150])
def test_rows(rows, dtype):
    compare("grouped_linear", *arguments(rows, dtype))
    compare("grouped_linear", *arguments(rows, dtype, bias=True, turned=True, seed=1))


def test_experts_in_every_distribution():
    """All rows of one, one row each, blocks that are just full, a number of experts of no power
    of two."""
    for ends in (
        [0, 0, 40, 40],
        [40, 40, 40, 40],
        [0, 0, 0, 40],
        [16, 32, 32, 40],
        [1, 17, 33, 40],
    ):
        args = arguments(40, count=4)
        args[1] = torch.tensor(ends)
        compare("grouped_linear", *args)
    args = arguments(13, count=13)
    args[1] = torch.arange(1, 14, dtype=torch.int32)
    compare("grouped_linear", *args)
    compare("grouped_linear", *arguments(5, count=1))
    compare("grouped_linear", *arguments(90, count=2, features=130, outputs=70))


def test_rows_that_are_not_contiguous_and_none():
    args = arguments(9)
    args[0] = torch.randn(9, 80)[:, ::2]
    compare("grouped_linear", *args)
    args[0] = torch.randn(9, 80)[:, :40]
    compare("grouped_linear", *args)
    empty = [args[0][:0], torch.zeros(6, dtype=torch.int64), *args[2:]]
    assert overload("grouped_linear")(*empty).shape == (0, 36)


def test_an_expert_without_rows_is_not_read():
    args = arguments(20)
    args[1] = torch.tensor([5, 5, 12, 20, 20, 20])
    args[2][0][[1, 4, 5]] = torch.nan
    assert overload("grouped_linear")(*args).isfinite().all()


def test_what_is_refused():
    args = arguments(4)
    assert supports("grouped_linear", *args[:2], list(args[2][0]), []) == (
        "the experts' weights are separate tensors"
    )
    assert "weights are not" in supports("grouped_linear", *args[:2], [args[2][0].half()], [])
    assert supports("grouped_linear", args[0], args[1].float(), *args[2:]) == "ends are float32"
