"""Products with weights that lie [in, out]: of a native step, without repacking."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.diagnostics import state
from tests.cpp.test_scatter import native, same


def dense(x, a, b, c, d, e):
    return F.rms_norm(x @ a + b, (64,)) @ c + d


def block(x, a, b, c, d, e):
    y = F.gelu(F.linear(x, a.t(), b), approximate="tanh")
    return x + F.linear(y, c.t(), d)


def gated(x, a, b, c, d, e):
    y = F.silu(x @ a + b) * F.linear(x, e.t())
    return x + (y @ c + d)


def mixed(x, a, b, c, d, e):
    """One of the two lies as usual."""
    return F.linear(F.relu(x @ a), c.t().contiguous(), d)


@pytest.mark.parametrize("function", [dense, block, gated, mixed])
@pytest.mark.parametrize("rows", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_eager(function, rows, dtype):
    x, a, c = torch.randn(1, rows, 40), torch.randn(40, 64) / 6, torch.randn(64, 40) / 8
    args = [t.to(dtype) for t in (x, a, torch.randn(64), c, torch.randn(40), a.flip(0))]
    want, got = native(lambda *args: (function(*args),), *args)
    if dtype == torch.bfloat16:
        want, got = ([r.float() for r in results] for results in (want, got))
    same(want, got, dtype)


@torch.no_grad()
def test_gpt2_is_one_native_call():
    from tests.zoo import families

    model, ids = families.build("gpt2").eval(), families.tokens("gpt2", 9, 2)
    given = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for draft in (None, "ngram"):
        got = dspark_compile.generate(
            model, ids[:1], options={"kernels": "cpp"}, draft=draft, **given
        )
        assert torch.equal(got, model.generate(ids[:1], **given))
        assert last_generation().path == "native", last_generation().notes
    (graph,) = state.last_report().graphs[-1:]
    assert any("turned" in kernel.op for kernel in graph.kernels)
