"""Normalise: one spelling for each meaning; what decides aliasing outside stays."""

from __future__ import annotations

import pytest
import torch

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}


def program(function, *args, dynamic=False):
    """The program after normalise, once the compiled result is eager's."""
    first, second = ([a.clone() for a in args] for _ in range(2))
    run = torch.compile(function, backend="dspark", options=OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        want, got = function(*first), run(*second)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(second, first)
    return last_report().graphs[-1].programs["after normalize"]


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    "function, present, absent",
    [
        (lambda x: x.t() + 1, "permute", "aten.t."),
        (lambda x: x.transpose(0, 1) + 1, "permute", "transpose.int"),
        (lambda x: x.mT.exp(), "permute", "transpose.int"),
        (lambda x: x.reshape(2, 12) * 2, "aten.view", "reshape"),
        (lambda x: x.t().reshape(24) * 2, "aten.view", "aten._unsafe_view"),
        (lambda x: torch.square(x) + 1, "pow.Tensor_Scalar", "square"),
        (lambda x: x * x + 1, "pow.Tensor_Scalar", "mul.Tensor"),
        (lambda x: (x * x + 1).pow(-0.5) * 2, "rsqrt", "-0.5"),
        (lambda x: (x.abs() + 1).pow(0.5) * 2, "aten.sqrt", "0.5"),
        (lambda x: (x.abs() + 1).sqrt().reciprocal() * 2, "rsqrt", "aten.reciprocal"),
        (lambda x: x.split(3, -1)[1] * 2, "slice.Tensor", "split"),
        (lambda x: x.split([2, 4], -1)[1] * 2, "slice.Tensor", "split"),
        (lambda x: x.chunk(2, -1)[0] * 2, "slice.Tensor", "split"),
        (lambda x: x.unbind(0)[2] * 2, "select.int", "unbind"),
        (lambda x: x.clone() * 2, "mul", "clone"),
        (lambda x: (x.float() + 0).detach() * 2, "mul", "_to_copy"),
        (lambda x: (x * 1) * 2, "mul.Tensor](args = (%arg0_1, 2)", "1)"),
        (lambda x: x[:, 0:].exp(), "exp", "slice"),
        (lambda x: x.expand(4, 6).exp(), "exp", "expand"),
    ],
)
def test_one_spelling(function, present, absent):
    text = program(function, X)
    assert present in text
    assert absent not in text


def test_slices_have_numbers_from_zero():
    text = program(lambda x: x[:, -4:-1].exp(), X)
    assert "slice.Tensor](args = (%arg0_1, 1, 2, 5)" in text


def test_a_sum_of_integers_and_one_float_is_no_no_op():
    """``x + 0.0`` makes a float of an integer tensor."""
    text = program(lambda x: x + 0.0, torch.arange(5))
    assert "aten.add" in text


def test_a_broadcast_with_zero_is_no_no_op():
    text = program(lambda x, y: (x + 0) * y, torch.randn(1, 3), torch.randn(4, 3))
    assert "aten.add" not in text
    text = program(lambda x: x.expand(4, 3).exp(), torch.randn(1, 3))
    assert "expand" in text


def test_equal_calls_merge():
    text = program(lambda x: (x.exp() + 1) * (x.exp() + 1).neg(), X)
    assert text.count("aten.exp.default") == 1
    assert text.count("aten.add.Tensor") == 1


def test_unequal_constants_do_not_merge():
    text = program(lambda x: (x + 1) * (x + 1.0), torch.arange(6))
    assert text.count("aten.add.Tensor") == 2


def test_random_numbers_do_not_merge():
    def f(x):
        return (torch.rand(5) - torch.rand(5)).abs().sum() * 0 + x.sum()

    text = program(f, X)
    assert text.count("aten.rand.default") == 2


def test_a_clone_that_is_returned_stays():
    run = torch.compile(lambda x: x.clone(), backend="dspark", options=OPTIONS)
    y = run(X)
    assert y is not X and y.data_ptr() != X.data_ptr()


def test_equal_outputs_stay_distinct_tensors():
    run = torch.compile(lambda x: (x + 1, x + 1), backend="dspark", options=OPTIONS)
    a, b = run(X)
    a.zero_()
    torch.testing.assert_close(b, X + 1)


def test_a_copy_written_into_an_input_stays():
    """``x`` takes the old value of ``y``, which changes afterwards."""

    def f(x, y):
        old = y.clone()
        y.add_(1)
        x.copy_(old)
        return x + y

    program(f, torch.randn(4), torch.randn(4))
