"""Complex numbers that are read as pairs become two real tensors."""

from __future__ import annotations

import pytest
import torch

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}
X, Y = torch.randn(4, 6), torch.randn(4, 6)
C = torch.randn(4, 6, dtype=torch.complex64)


pairs, polar, complex_ = torch.view_as_real, torch.polar, torch.complex


@pytest.mark.parametrize(
    "function, args",
    [
        (lambda x, y: pairs(polar(x.abs(), y)[1:, None, ::2]).flatten(-2) + 1, (X, Y)),
        (lambda x, y: pairs(polar(torch.ones_like(y), y).t().reshape(3, 8))[..., 0] * 2, (X, Y)),
        (lambda x, y: pairs(complex_(x, y) * polar(x.abs(), y)).sum(-1), (X, Y)),
        (lambda x, y: pairs(complex_(x, y).conj() * 2.5 - complex_(y, x) / 3).exp(), (X, Y)),
        (lambda x, y: pairs(torch.cat((complex_(x, y), complex_(y, y)), 1)[:, 3:9]) + 1, (X, Y)),
        (lambda x, c: pairs(c[1:3].unsqueeze(0) * x[1:3]).exp(), (X, C)),
        (lambda x, c: pairs((c * x)[torch.tensor([2, 0])]) * x[0, 0], (X, C)),
    ],
)  # fmt: skip
def test_no_complex_number_is_left(function, args):
    run = torch.compile(function, backend="dspark", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(run(*args), function(*args), rtol=1e-6, atol=1e-6)
    program = last_report().graphs[-1].programs["after audit"]
    for op in ("polar", "aten.complex", "view_as_complex", "_conj"):
        assert op not in program
    for line in program.splitlines():  # a complex input is read as pairs where it lies
        assert "ops.aten.view_as_real" not in line or "(args = (%arg" in line


def test_what_is_read_in_another_way_stays():
    function = lambda x, y: pairs(polar(x.abs(), y).sqrt()) + 1  # noqa: E731
    run = torch.compile(function, backend="dspark", options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(run(X, Y), function(X, Y))
    assert "polar" in last_report().graphs[-1].programs["after audit"]


def test_a_view_that_escapes_is_a_view():
    c = C.clone()
    run = torch.compile(lambda c: pairs(c), backend="dspark", options=OPTIONS)
    with torch.no_grad():
        got = run(c)
        c.mul_(2)
    assert torch.equal(got, pairs(c))
