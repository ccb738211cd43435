"""Mask predicates printed for Triton: the bounds they prove, what they need, what is refused.

The printed expressions themselves run in the interpreter suite; here their bounds are checked
against the meaning of the predicate, by brute force.
"""

from __future__ import annotations

import ast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_compile.codegen.triton import attention, source
from dspark_compile.codegen.triton.predicate import print_predicate
from dspark_compile.ops.predicate import evaluate

BOUNDS = [
    # predicate, exclusive upper bound, lower bound, exact
    ("k <= q + n0", "((q + n0) + 1)", "", True),
    ("q + n0 >= k", "((q + n0) + 1)", "", True),
    ("q - k > -5", "(q + 5)", "", True),
    ("(k <= q) & (q - k < 8)", "(q + 1)", "((q + -8) + 1)", True),
    ("(k <= q) & t0[b, k]", "(q + 1)", "", False),
    ("k == 3", "4", "3", True),
    ("~(k > q)", "(q + 1)", "", True),
    ("(k < 4) | (k > q - 8)", "", "", False),
    ("(k < 4) | (k < q)", "tl.maximum(4, q)", "", False),
    ("~((k < 4) | (k > q))", "(q + 1)", "4", True),
    ("(k <= t0[q]) & (k < n0)", None, "", True),
    ("2 * k <= q", "", "", False),
    ("k % 2 == 0", "", "", False),
    ("k + k <= q + k", "(q + 1)", "", True),
    ("k != q", "", "", False),
    ("t0[b, q] == t0[b, k]", "", "", False),
    ("True", "", "", True),
]


@pytest.mark.parametrize(("text", "upper", "lower", "exact"), BOUNDS)
def test_bounds(text, upper, lower, exact):
    code = print_predicate(text)
    assert code.lower == lower
    assert code.exact == exact
    if upper is None:
        assert "k" not in {n.id for n in ast.walk(ast.parse(code.upper)) if isinstance(n, ast.Name)}
    else:
        assert code.upper == upper


_LEAF = st.sampled_from(["q", "n0", "1", "5", "(q - n0)", "(q + 2)", "(n0 // 3)"])
_TERM = st.builds(
    str.format,
    st.sampled_from(["k {} {}", "{1} {0} k", "{1} - k {0} 3", "k - {1} {0} -2", "-k {0} {1} - 6"]),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    _LEAF,
).map("({})".format)
_MASK = st.recursive(
    _TERM,
    lambda inner: st.one_of(
        st.builds("({} & {})".format, inner, inner),
        st.builds("({} | {})".format, inner, inner),
        st.builds("~{}".format, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(text=_MASK, n0=st.integers(-4, 12))
def test_no_allowed_key_lies_outside_its_bounds(text, n0):
    rows, keys = 7, 16
    code = print_predicate(text)
    allowed = evaluate(text, [], [n0], (1, 1, rows, keys), torch.device("cpu"))
    allowed = allowed.expand(1, 1, rows, keys)[0, 0]
    k = torch.arange(keys)
    for q in range(rows):
        inside = torch.ones(keys, dtype=torch.bool)
        names = {"q": torch.tensor(q), "n0": torch.tensor(n0), "tl": _Elementwise,
                 "floor_divide": lambda a, b: a // b}  # fmt: skip
        if code.upper:
            inside &= k < eval(code.upper, names)
        if code.lower:
            inside &= k >= eval(code.lower, names)
        assert not (allowed[q] & ~inside).any()
        if code.exact:
            assert (allowed[q] == inside).all()


class _Elementwise:
    @staticmethod
    def minimum(a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def maximum(a, b):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def test_parameters_and_their_values():
    code = print_predicate("(k <= t1[q] + n2) & t0[b, k - n0] & (t3 > 0)")
    # Bounds print after the test and reuse its parameters.
    assert code.parameters == (
        "t1_ptr", "t1_stride_0", "n2", "t0_ptr", "t0_stride_0", "t0_stride_1", "t0_size_1", "n0",
        "t3_ptr",
    )  # fmt: skip
    assert code.integers == ("n2", "t0_size_1", "n0")
    tensors = [torch.zeros(2, 9, dtype=torch.bool), torch.arange(6)[::2], None, torch.tensor(1)]
    values = code.arguments(tensors, [4, 5, 6])
    assert [values[name] for name in ("t1_stride_0", "t0_size_1", "n0", "n2")] == [2, 9, 4, 6]
    assert code.reason(tensors, [4, 5, 6]) is None


@pytest.mark.parametrize(
    ("text", "tensors", "reason"),
    [
        ("t0[k]", [], "t0 is missing"),
        ("t0[k]", [torch.zeros(2)], "t0 is float32"),
        ("t0[k]", [torch.zeros(2, 2, dtype=torch.bool)], "2 dimensions but 1 indices"),
        ("k < t0", [torch.zeros(2, dtype=torch.int64)], "used whole"),
        ("k < n0", [], "n0 is missing"),
    ],
)
def test_reasons(text, tensors, reason):
    assert reason in print_predicate(text).reason(tensors, [])


def test_refused_text():
    with pytest.raises(ValueError, match="takes 1 and 2 indices"):
        print_predicate("t0[k] & t0[b, k]")
    with pytest.raises(ValueError, match="not in the language"):
        print_predicate("k.real < 2")


def test_sources_are_written_once_and_repaired(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    path = source.write_source(source.cache_directory() / "x.py", "a = 1\n")
    written = path.stat().st_mtime_ns
    assert source.write_source(path, "a = 1\n").stat().st_mtime_ns == written
    path.write_text("a =")
    assert source.write_source(path, "a = 1\n").read_text() == "a = 1\n"
    assert [p.name for p in path.parent.iterdir()] == ["x.py"]
    assert source.load_source("y", "b = 2\n").b == 2


def test_filled_template_is_python():
    pytest.importorskip("triton")
    for text in ("", *(row[0] for row in BOUNDS)):
        filled = attention.fill(attention._template(), print_predicate(text))
        ast.parse(filled)
