"""Plain PyTorch decoders as people write them: what once fell back, or came near."""

from __future__ import annotations

import math

import torch

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

STRICT = {"inner": "eager", "fallback": "error", "verify": True}


def same(function, calls, **options):
    """Compiled for any size, it does what it does eagerly; the last graph's report."""
    run = torch.compile(function, backend="dspark", dynamic=True, options={**STRICT, **options})
    with torch.no_grad():
        for args in calls:
            torch.testing.assert_close(run(*args), function(*args), rtol=1e-4, atol=1e-5)
    return last_report().graphs[-1]


def sites(graph, kind):
    return [s.status for s in graph.sites if s.kind == kind]


def test_folded_heads_and_a_batch_of_any_size():
    """GPT-NeoX of old: ``baddbmm`` over batch and heads at once, the values as they are."""

    def attend(query, keys, values, key, value):
        batch, heads, rows, size = query.shape
        keys, values = torch.cat((keys, key), -2), torch.cat((values, value), -2)
        count = keys.size(-2)
        mask = torch.tril(torch.ones(count, count, dtype=torch.bool))[None, None]
        scores = torch.baddbmm(
            torch.zeros(batch * heads, rows, count),
            query.reshape(batch * heads, rows, size),
            keys.reshape(batch * heads, count, size).transpose(1, 2),
            beta=1.0,
            alpha=size**-0.5,
        ).view(batch, heads, rows, count)
        scores = torch.where(
            mask[:, :, count - rows : count], scores, torch.finfo(scores.dtype).min
        )
        out = scores.softmax(-1) @ values
        return out.permute(0, 2, 1, 3).contiguous().view(batch, rows, -1), keys

    def args(batch, held, new):
        sizes = (new, held, held, new, new)
        return [torch.randn(batch, 3, n, 8) for n in sizes]

    graph = same(attend, [args(2, 7, 3), args(3, 9, 2), args(4, 5, 4)])
    assert sites(graph, "attention") == ["raised"]


def test_a_mask_made_in_place_at_any_size():
    """``triu_`` of a tensor whose size is a symbol."""

    def attend(query, key, value):
        size = query.shape[2]
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        scores += torch.full((size, size), -math.inf).triu_(1)
        return scores.softmax(-1) @ value

    calls = [[torch.randn(2, 3, n, 8) for _ in range(3)] for n in (5, 6, 9)]
    graph = same(attend, calls)
    assert sites(graph, "attention") == ["raised"]
    assert any("causal" in note for note in graph.notes)


def test_a_sink_for_every_head_of_a_group():
    """gpt-oss of old: the scores of a group's heads lie beside each other, and so do the sinks."""

    def attend(query, key, value, sinks, allowed):
        batch, heads, rows, size = query.shape
        groups = key.shape[1]
        query = query.view(batch, groups, heads // groups, rows, size)
        scores = torch.einsum("bhgqd,bhkd->bhgqk", query, key) * size**-0.5
        scores = scores + torch.where(allowed, 0.0, -math.inf)
        sink = sinks.view(1, groups, heads // groups, 1, 1).expand(batch, -1, -1, rows, 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        return torch.einsum("bhgqk,bhkd->bhgqd", weights, value).reshape(batch, heads, rows, size)

    def args(batch, rows, keys):
        sizes = ((batch, 6, rows, 8), (batch, 2, keys, 8), (batch, 2, keys, 8), (6,))
        allowed = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        return [*(torch.randn(*s) for s in sizes), allowed]

    graph = same(attend, [args(2, 5, 7), args(3, 4, 9)])
    assert sites(graph, "attention") == ["raised"]
