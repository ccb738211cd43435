"""Writes into key/value caches become one op; what is no such write stays, with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}
B, H, N, D = 2, 3, 12, 8


def compiled(function, *args):
    """Run eagerly and compiled on equal copies; results and what was written agree."""
    first, second = ([a.clone() for a in args] for _ in range(2))
    run = torch.compile(function, backend="dspark", options=OPTIONS, dynamic=False)
    with torch.no_grad():
        want, got = function(*first), run(*second)
    torch.testing.assert_close([got, *second], [want, *first], atol=1e-5, rtol=1e-5)
    return last_report().graphs[-1]


def record(graph):
    return next(p for p in graph.passes if p.name == "raise_cache")


def reasons(graph):
    return [r.condition for r in graph.rejections if r.pass_name == "raise_cache"]


def step(m=1):
    """query, new key, new value, key cache, value cache"""
    q, k, v = (torch.randn(B, H, m, D) for _ in range(3))
    return q, k, v, torch.randn(B, H, N, D), torch.randn(B, H, N, D)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def index_copy(cache, new, at):
    cache.index_copy_(2, at, new)


def indexed(cache, new, at):
    cache[:, :, at] = new


@pytest.mark.parametrize("write", [index_copy, indexed])
@pytest.mark.parametrize("rows", [1, 4])
def test_rows_at_positions(write, rows):
    def f(q, k, v, keys, values, at):
        write(keys, k, at)
        write(values, v, at)
        return attend(q, keys, values)

    graph = compiled(f, *step(rows), torch.arange(5, 5 + rows))
    assert record(graph).rewritten == 2
    assert graph.ops.get("cache_append", 0) + graph.ops.get("cache_append_", 0) == 2


def test_a_slice():
    def f(q, k, v, keys, values):
        keys[:, :, 3:5] = k
        values[:, :, 3:5] = v
        return attend(q, keys, values)

    assert record(compiled(f, *step(2))).rewritten == 2


def test_at_batch_one_the_dropped_dimension_is_given_back():
    def f(q, k, v, keys, values, at):
        keys[:, :, at] = k[0]
        values[:, :, at] = v[0]
        return attend(q, keys, values)

    args = [x[:1] for x in step(2)]
    assert record(compiled(f, *args, torch.tensor([0, 7]))).rewritten == 2


def test_a_growing_cache():
    def f(q, k, v, keys, values):
        return attend(q, torch.cat([keys, k], 2), torch.cat([values, v], dim=-2))

    graph = compiled(f, *step(2))
    assert record(graph).rewritten == 2
    assert graph.ops.get("cache_extend") == 2


def test_read_through_eager_attention():
    def f(q, k, v, keys, values, at):
        index_copy(keys, k, at)
        index_copy(values, v, at)
        return (q @ keys.mT * 0.2).softmax(-1) @ values

    assert record(compiled(f, *step(), torch.tensor([2]))).rewritten == 2


def along_tokens(cache, new, at):
    cache.index_copy_(1, at, new)


def indexed_tokens(cache, new, at):
    cache[:, at] = new


def sliced_tokens(cache, new, at):
    cache[:, 4:5] = new


def tokens_first(count=1):
    """`step` with tokens before heads in all but the query."""
    q, *rest = step(count)
    return q, *(x.transpose(1, 2).contiguous() for x in rest)


@pytest.mark.parametrize("write", [along_tokens, indexed_tokens, sliced_tokens])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", ["aten", pytest.param("auto", marks=pytest.mark.slow)])
def test_tokens_before_heads(write, inner, kernels, monkeypatch):
    """[B, N, H, D]: the view with heads first is appended to, in place."""
    monkeypatch.setitem(OPTIONS, "inner", inner)
    monkeypatch.setitem(OPTIONS, "kernels", kernels)

    def f(q, k, v, keys, values, at):
        write(keys, k, at)
        write(values, v, at)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2)), keys[:, :3] * 2

    graph = compiled(f, *tokens_first(), torch.tensor([4]))
    assert record(graph).rewritten == 2
    assert graph.ops.get("cache_append_") == 2 and "cache_append" not in graph.ops


def test_tokens_before_heads_read_before_the_write():
    def f(q, k, v, keys, values, at):
        old = keys.transpose(1, 2).sum(-1)
        along_tokens(keys, k, at)
        along_tokens(values, v, at)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2)) + old.sum()

    graph = compiled(f, *tokens_first(), torch.tensor([4]))
    assert graph.ops.get("cache_append_") == 2

    def late(q, k, v, keys, values, at):
        old = keys.clone()
        along_tokens(keys, k, at)
        along_tokens(values, v, at)
        out = attend(q, keys.transpose(1, 2), values.transpose(1, 2))
        return out + old[:, 4].sum(), keys

    compiled(late, *tokens_first(), torch.tensor([4]))


def test_int8_wants_heads_first(monkeypatch):
    monkeypatch.setitem(OPTIONS, "kv_cache", "int8")

    def f(q, k, v, keys, values, at):
        along_tokens(keys, k, at)
        along_tokens(values, v, at)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2))

    graph = compiled(f, *tokens_first(), torch.tensor([4]))
    found = [r.condition for r in graph.rejections if r.pass_name == "kv_int8"]
    assert found == ["the cache is [B, N, H, D]"] * 2


def test_other_layout_is_a_rejection():
    """Written along dimension 1, which attention takes for the heads."""

    def f(q, k, v, keys, values, at):
        keys.index_copy_(1, at, k)
        values.index_copy_(1, at, v)
        return attend(q, keys, values)

    q, _, _, keys, values = step()
    new = torch.randn(B, 1, N, D)
    graph = compiled(f, q, new, new + 1, keys, values, torch.tensor([1]))
    assert record(graph).rewritten == 0
    assert reasons(graph) == ["the cache is written along dimension 1, not 2"] * 2


def test_accumulation_is_a_rejection():
    def f(q, k, v, keys, values, at):
        torch.ops.aten.index_put_.default(keys, [None, None, at], k, True)
        torch.ops.aten.index_put_.default(values, [None, None, at], v, True)
        return attend(q, keys, values)

    graph = compiled(f, *step(), torch.tensor([4]))
    assert record(graph).rewritten == 0
    assert reasons(graph) == ["the cache is accumulated into, not written"] * 2


def test_a_boolean_mask_is_a_rejection():
    def f(q, k, v, keys, values, at):
        keys[:, :, at] = k
        values[:, :, at] = v
        return attend(q, keys, values)

    at = torch.zeros(N, dtype=torch.bool)
    at[3] = True
    graph = compiled(f, *step(), at)
    assert record(graph).rewritten == 0


def test_a_broadcast_write_is_a_rejection():
    """One new head for all heads: the op wants every entry."""

    def f(q, k, v, keys, values, at):
        keys[:, :, at] = k[:, :1]
        values[:, :, at] = v[:, :1]
        return attend(q, keys, values)

    graph = compiled(f, *step(), torch.tensor([4]))
    assert record(graph).rewritten == 0
    assert len(reasons(graph)) == 2


def test_caches_along_other_dimensions_do_not_grow():
    """Heads joined: no cache."""

    def f(q, k, v, keys, values):
        return attend(torch.cat([q, q], 1), torch.cat([keys, k], 1), torch.cat([values, v], 1))

    graph = compiled(f, *step(N))
    assert record(graph).rewritten == 0
    assert reasons(graph) == ["the cache grows along dimension 1, not 2"] * 2


def test_a_table_that_attention_does_not_read():
    def f(table, new, at):
        table.index_copy_(2, at, new)
        return table.sum()

    graph = compiled(f, torch.randn(B, H, N, D), torch.randn(B, H, 1, D), torch.tensor([1]))
    assert record(graph).found == 0
