"""What stands between experts' products and has no name is read as a formula, and printed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile.kernels.cpp import moe as cpp
from dspark_compile.ops.formula import BINARY, UNARY, evaluate
from dspark_compile.ops.moe import moe_experts
from dspark_compile.passes import expert_gate


def soft(x, cap):
    return torch.tanh(x / cap) * cap


GATES = {
    "soft caps beside the sigmoid": lambda g, u: soft(g, 3.0) * torch.sigmoid(g) * soft(u, 2.0),
    "soft cap before the activation": lambda g, u: F.silu(soft(g, 5.0)) * u,
    "float32": lambda g, u: (F.gelu(g.float()) * torch.exp(-u.float().square())).to(g.dtype),
    "softplus": lambda g, u: F.softplus(g) * (u.abs() + 0.5),
    "divided": lambda g, u: g * u / (1.0 + u.abs()),
    "bounded": lambda g, u: g.clamp(-1.0, 2.0).pow(3) * u.clamp(max=1.5) - u.clamp(min=0.5),
    "from one": lambda g, u: (1.0 - torch.sigmoid(g)) * torch.tanh(u),
}


class Experts(nn.Module):
    """Top-2 of stacked experts, their weights gathered, with any function between them."""

    def __init__(self, gate, gated=True, dtype=torch.float32):
        super().__init__()
        self.gate, self.gated = gate, gated
        self.router = nn.Linear(32, 5, bias=False, dtype=dtype)
        rows = 96 if gated else 48
        self.up = nn.Parameter(0.3 * torch.randn(5, rows, 32, dtype=dtype))
        self.down = nn.Parameter(0.3 * torch.randn(5, 32, 48, dtype=dtype))

    def forward(self, x):
        rows = x.reshape(-1, 32)
        weights, chosen = self.router(rows).softmax(-1).topk(2, -1)
        tokens = torch.arange(len(rows)).repeat_interleave(2)
        flat = chosen.reshape(-1)
        h = torch.bmm(self.up[flat], rows[tokens].unsqueeze(-1)).squeeze(-1)
        h = self.gate(*h.chunk(2, -1)) if self.gated else self.gate(h)
        y = torch.bmm(self.down[flat], h.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
        return y.view(-1, 2, 32).sum(1).view(x.shape)


def check(model, tolerance, found, scale=2.0, **options):
    torch._dynamo.reset()
    run = torch.compile(
        model, backend="dspark", fullgraph=True, options={"verify": True, **options}
    )
    exact = Experts(model.gate, model.gated)
    exact.load_state_dict(model.state_dict())
    for tokens in (1, 9):
        x = scale * torch.randn(2, tokens, 32, dtype=model.up.dtype)
        with torch.no_grad():
            want, got = exact(x.float()), run(x).float()
        assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-6)
    report = dspark_compile.last_report()
    assert any("moe_experts" in graph.ops for graph in report.graphs) == found
    return report


@pytest.mark.parametrize("gate", GATES)
def test_functions_without_a_name_are_raised(gate):
    check(Experts(GATES[gate]), 1e-5, True, inner="eager", kernels="aten")


@pytest.mark.parametrize(
    "gate", ["soft caps beside the sigmoid", pytest.param("bounded", marks=pytest.mark.slow)]
)
def test_kernels_print_them(gate):
    model = Experts(GATES[gate])
    check(model, 1e-5, True, kernels="cpp")
    half = Experts(GATES[gate], dtype=torch.bfloat16)
    half.router.float()  # near ties apart, both choose alike
    half.router.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    half.load_state_dict(model.state_dict())
    model.load_state_dict(half.state_dict())
    check(half, 2e-2, True, kernels="cpp")


def test_without_a_gate():
    check(Experts(lambda h: soft(h, 2.0) * h, gated=False), 1e-5, True, kernels="cpp")


@pytest.mark.parametrize(
    "gate",
    [
        lambda g, u: torch.where(g > 0, g, 0.1 * g) * u,
        lambda g, u: torch.add(g, u, alpha=2.0).sin(),
        lambda g, u: F.softplus(g, beta=2.0) * u,
        lambda g, u: torch.maximum(g, u),
    ],
)
def test_what_has_no_words_stays_and_says_so(gate):
    report = check(Experts(gate), 1e-5, False, inner="eager", kernels="aten")
    said = [r for graph in report.graphs for r in graph.rejections]
    assert any("activation" in str(r) for r in said)


def test_names_come_before_formulas():
    seen = []
    recognise = expert_gate.recognise

    def watched(program):
        seen.append(recognise(program))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_compile.passes.raise_moe_experts.recognise", watched)
        plain = Experts(lambda g, u: g * torch.sigmoid(g) * u)
        check(plain, 1e-5, True, inner="eager", kernels="aten")
    assert {found.activation for found in seen} == {"silu"}


@pytest.mark.parametrize("word", [*BINARY, *UNARY])
def test_every_word_is_printed(word):
    first = "g square 0.5 +" if word in ("log", "sqrt") else "g"
    formula = f"= {first} {word} u *" if word in UNARY else f"= 0.75 g {word} u *"
    if word == "/":
        formula = "= 0.75 g square 1 + / u *"
    x, weights = torch.randn(7, 32), torch.rand(7, 2)
    chosen = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    up, gate = (0.3 * torch.randn(5, 40, 32) for _ in range(2))
    down = 0.3 * torch.randn(5, 24, 40)
    given = (x, chosen, weights, [gate], [up], [down], [], [], [], formula)
    stacks = ([w.double() for w in given[i]] for i in (3, 4, 5))
    want = moe_experts(x.double(), chosen, weights.double(), *stacks, *given[6:])
    got = cpp.moe_experts(*given)
    assert (got - want).abs().max() <= 2e-6 * want.abs().max().clamp(min=1.0)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("g u *", "begins with"),
        ("= g *", r"'\*' takes 2"),
        ("= g 2", "leaves 2"),
        ("= g sin", "'sin' is unknown"),
        ("= g inf *", "not finite"),
        ("= g u *", "no gate"),
    ],
)
def test_what_is_no_formula_is_refused(formula, words):
    with pytest.raises(ValueError, match=words):
        evaluate(formula, torch.ones(2), None)
