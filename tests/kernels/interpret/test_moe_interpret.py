"""The experts' kernels against the dialect."""

from __future__ import annotations

import math

import pytest
import torch
from interpreted import compare

from dspark_compile.kernels.triton import moe, supports
from dspark_compile.kernels.triton._launch import KNOWN_TARGETS
from dspark_compile.kernels.triton.moe import blocks_of
from dspark_compile.kernels.triton.moe_forms import predicted, prefers_sorting

GPT_OSS = [1.702, -math.inf, 7.0, -7.0, 7.0, 1.0]


def arguments(tokens, dtype=torch.float32, *, count=5, k=2, bias=False, turned=False, gated=True,
              foreign=False):  # fmt: skip
    torch.manual_seed(0)
    features, inner, outputs = 40, 24, 36
    draw = lambda *shape: (torch.randn(*shape) * 0.2).to(dtype)  # noqa: E731
    both = draw(count, features, 2 * inner).mT if turned else draw(count, 2 * inner, features)
    gate, up = (both[:, ::2], both[:, 1::2]) if turned else both.chunk(2, 1)
    index = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    if foreign:
        index = torch.where(torch.rand(index.shape) < 0.4, count, index)
        index[0] = -1
    biases = [[draw(count, inner)], [draw(count, inner)], [draw(count, outputs)]]
    if not bias:
        biases = [[], [], []]
    elif not gated:
        biases[0] = []
    return [
        draw(tokens, features), index, torch.rand(tokens, k).to(dtype), [gate] if gated else [],
        [up], [draw(count, outputs, inner)], *biases, "silu",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 21])
def test_tokens(tokens, dtype):
    compare("moe_experts", *arguments(tokens, dtype))


@pytest.mark.parametrize("tokens", [3, 18])
def test_variants(tokens):
    compare("moe_experts", *arguments(tokens, bias=True, turned=True), GPT_OSS)
    compare("moe_experts", *arguments(tokens, gated=False, bias=True))
    compare("moe_experts", *arguments(tokens, foreign=True))
    compare("moe_experts", *arguments(tokens, k=5), [], True)
    compare("moe_experts", *arguments(tokens, count=1, k=1))


@pytest.mark.parametrize("tokens", [4, 16])
def test_both_forms_agree(tokens, monkeypatch):
    """The same call without and with sorting, and whichever the cost model takes."""
    seen = []
    compare("moe_experts", *arguments(tokens, count=9, k=3))
    for sorting in (False, True):
        monkeypatch.setattr(
            moe, "prefers_sorting", lambda *args, now=sorting: seen.append(args) or now
        )
        compare("moe_experts", *arguments(tokens, count=9, k=3))
    assert len(seen) >= 2


def test_the_crossover_is_the_cost_models():
    """Few choices go without sorting, many with; between the two it changes once."""
    target = KNOWN_TARGETS["90"]
    layer = (128, 768, 2048, 2048, 2, 2, target)  # experts, width, features, …: Qwen3-30B-A3B's
    chosen = [prefers_sorting(1, k, *layer) for k in (1, 8, 64, 128)]
    assert chosen[0] is False and chosen == sorted(chosen)
    rows = [prefers_sorting(tokens, 8, *layer) for tokens in range(1, 40)]
    assert rows[0] is False and rows[-1] is True and rows == sorted(rows)
    assert prefers_sorting(16, 64, *layer), "1,024 choices, one after the other"
    few, ordered = predicted(16, 64, *layer)
    assert ordered < few


def test_blocks():
    indices = torch.tensor([3, 0, 3, 3, 7, -1, 0, 3])
    blocks = blocks_of(indices, 5, 2)
    got = [
        (int(e), sorted(blocks.order[s:t].tolist()))
        for e, s, t in zip(blocks.experts, blocks.start, blocks.end)
        if e < 5
    ]
    assert [e for e, _ in got] == [0, 3, 3]
    assert got[0][1] == [1, 6] and sorted(got[1][1] + got[2][1]) == [0, 2, 3, 7]


def test_refusals():
    args = arguments(3)
    assert "separate" in supports("moe_experts", *args[:5], list(args[5][0]), *args[6:])
    assert "norm" in supports("moe_experts", *args, [], False, torch.ones(36))
