"""Mixtures of experts as people write them: raised or left alone, and right in either case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile

D, INNER, EXPERTS, K = 32, 48, 6, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, INNER, bias=False)
        self.up = nn.Linear(D, INNER, bias=False)
        self.down = nn.Linear(INNER, D, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Mixture(nn.Module):
    """A router and a list of experts; ``mix(model, x)`` is what is tested."""

    def __init__(self, mix):
        super().__init__()
        self.mix, self.router = mix, nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(K, -1)
        return self.mix(self, x, weights, chosen)


def every_row(model, x, weights, chosen):
    y = torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        y = y + expert(x) * (weights * (chosen == e)).sum(-1, keepdim=True)
    return y


def columns(model, x, weights, chosen):
    """As many tokens as columns: a score for each token multiplies columns instead."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        y = y + expert(x) * (weights * (chosen == e)).sum(-1)
    return y


def slots(model, x, weights, chosen):
    """Summed over tokens, as many as choices, in place of choices."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        y = y + expert(x) * (weights * (chosen == e)).sum(-2, keepdim=True).mT
    return y


@pytest.mark.parametrize(
    ("mix", "shape", "found"),
    [
        (every_row, (7, D), True),
        (every_row, (2, 5, D), True),
        (every_row, (2, 2, 3, D), True),
        (columns, (D, D), False),
        (slots, (3, K, D), False),
    ],
)
def test_a_score_for_every_row(mix, shape, found):
    model, x = Mixture(mix), torch.randn(shape)
    run = torch.compile(
        model, backend="dspark", fullgraph=True, options={"inner": "eager", "verify": True}
    )
    with torch.no_grad():
        want, got = model(x), run(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    graph = dspark_compile.last_report().graphs[-1]
    assert ("moe_experts" in graph.ops) == found


def picked(model, x, weights, chosen):
    every = torch.stack([expert(x) for expert in model.experts], -2)
    rows = every.gather(-2, chosen[..., None].expand(*chosen.shape, D))
    return (rows * weights[..., None]).sum(-2)


def scored(model, x, weights, chosen):
    """The scores' mask lies between other things than a sum."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(model.experts):
        y = y + expert(x) * (weights * (chosen == e)).amax(-1, keepdim=True)
    return y


@pytest.mark.parametrize("mix", [picked, scored])
def test_what_all_experts_compute_is_said(mix):
    model, x = Mixture(mix), torch.randn(2, 5, D)
    run = torch.compile(model, backend="dspark", options={"inner": "eager", "verify": True})
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    said = [r for r in dspark_compile.last_report().graphs[-1].rejections if r.kind == "experts"]
    assert any("all of them computed" in r.condition for r in said)


class Gathered(nn.Module):
    """Weights gathered for every row, which ``spread(x)`` gives."""

    def __init__(self, spread):
        super().__init__()
        self.spread, self.router = spread, nn.Linear(D, EXPERTS, bias=False)
        self.up = nn.Parameter(0.3 * torch.randn(EXPERTS, 2 * INNER, D))
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, D, INNER))

    def forward(self, x):
        weights, chosen = self.router(x).view(-1, EXPERTS).softmax(-1).topk(K, -1)
        flat = chosen.reshape(-1)
        both = torch.bmm(self.up[flat], self.spread(x).unsqueeze(-1)).squeeze(-1)
        gate, up = both.chunk(2, -1)
        y = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y.view(-1, K, D) * weights.unsqueeze(-1)).sum(1).view_as(x)


SPREADS = {
    "expanded": lambda x: x.view(-1, 1, D).expand(-1, K, -1).reshape(-1, D),
    "expanded rows": lambda x: x.view(-1, D)[:, None].expand(-1, K, -1).reshape(-1, D),
    "repeated": lambda x: x.view(-1, D).repeat_interleave(K, 0),
    "numbers repeated": lambda x: x.view(-1, D)[
        torch.arange(x.shape[0] * x.shape[1]).repeat_interleave(K)
    ],
    "numbers divided": lambda x: x.view(-1, D)[
        torch.arange(x.shape[0] * x.shape[1] * K).div(K, rounding_mode="floor")
    ],
}
WRONG = {  # rows of other tokens
    "tiled": lambda x: x.view(-1, 1, D).expand(-1, K, -1).transpose(0, 1).reshape(-1, D),
    "numbers tiled": lambda x: x.view(-1, D)[torch.arange(x.shape[0] * x.shape[1]).repeat(K)],
    "from the second": lambda x: F.pad(x.view(-1, D), (0, 0, 0, 1))[
        torch.arange(1, x.shape[0] * x.shape[1] + 1).repeat_interleave(K)
    ],
}


@pytest.mark.parametrize("spread", [*SPREADS, *WRONG])
def test_rows_of_choices(spread):
    model = Gathered({**SPREADS, **WRONG}[spread])
    run = torch.compile(
        model, backend="dspark", fullgraph=True, options={"inner": "eager", "verify": True}
    )
    for shape in ((2, 5, D), (3, 4, D)):
        x = torch.randn(shape)
        with torch.no_grad():
            want, got = model(x), run(x)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        graph = dspark_compile.last_report().graphs[-1]
        assert ("moe_experts" in graph.ops) == (spread in SPREADS)
