"""No silent miss: what looks like a site is raised or rejected, once, and counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spellings import OPTIONS, run
from torch import nn

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

D = 8


def sites(graph, kind, status="rejected"):
    return [s for s in graph.sites if s.kind == kind and s.status == status]


def check_in_step(graph, kind, n):
    """As many rejected sites as rejections, each with its reason."""
    left, reasons = sites(graph, kind), [r for r in graph.rejections if r.kind == kind]
    assert len(left) == len(reasons) == n, reasons
    assert {s.reason for s in left} == {r.condition for r in reasons}
    assert all(r.condition for r in reasons)


def model_run(model, *args):
    with torch.no_grad():
        compiled = torch.compile(model, backend="dspark", options=OPTIONS)
        torch.testing.assert_close(compiled(*args), model(*args), atol=1e-5, rtol=1e-5)
    return last_report()


class OddNorm(nn.Module):
    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True)


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.elu(q) @ (F.elu(k).transpose(-1, -2) @ v)


class NormedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 12), nn.LayerNorm(12), nn.Linear(12, D)

    def forward(self, x):
        return self.down(self.norm(F.silu(self.up(x))))


class MoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, D, D) * 0.3)

    def forward(self, x):
        weight, index = self.gate(x).softmax(-1).topk(2)
        return (weight[..., None] * torch.einsum("td,tkde->tke", x, self.experts[index])).sum(1)


class Wrapped(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.first, self.part = nn.Linear(D, D), part

    def forward(self, x):
        return self.part(self.first(x)) + 1


@pytest.mark.parametrize(
    ("part", "kind", "reason"),
    [
        (OddNorm, "norm", "no mean of squares"),
        (LinearAttention, "attention", "no softmax"),
        (NormedMLP, "mlp", "dspark.layer_norm stands between"),
        (MoE, "experts", "tokens are sent to experts, and no experts were recognised"),
    ],
    ids=["norm", "attention", "mlp", "experts"],
)
def test_modules_that_promise_a_site(part, kind, reason):
    report = model_run(Wrapped(part()), torch.randn(5, D))
    graph = report.graphs[-1]
    check_in_step(graph, kind, 1)
    rejection = next(r for r in graph.rejections if r.kind == kind)
    assert reason in rejection.condition and rejection.pass_name == "audit"
    assert report.summary()[kind]["rejected"] == 1


def test_every_instance_is_reported():
    report = model_run(nn.Sequential(nn.Linear(D, D), OddNorm(), OddNorm()), torch.randn(5, D))
    check_in_step(report.graphs[-1], "norm", 2)


def test_what_a_pass_rejected_is_not_reported_again():
    class Norm(nn.Module):
        def forward(self, x):
            return x / ((x * x).mean(-1, keepdim=True).sqrt() + 1e-6)

    report = model_run(Wrapped(Norm()), torch.randn(5, D))
    check_in_step(report.graphs[-1], "norm", 1)
    assert [r.pass_name for r in report.rejections] == ["raise_norm"]


def test_what_was_raised_is_not_reported():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D))

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = RMSNorm(), nn.Linear(D, 12), nn.Linear(12, D)

        def forward(self, x):
            return x + self.down(F.silu(self.up(self.norm(x))))

    report = model_run(nn.Sequential(MLP(), MLP()), torch.randn(5, D))
    assert report.rejections == []
    assert report.summary() == {k: {"raised": 2, "rejected": 0} for k in ("norm", "mlp")}


def test_a_plain_program_has_nothing_to_report():
    def f(x, w):
        return F.linear(x, w).softmax(-1).std(-1) + x.norm(dim=-1)

    _, graph = run(f, torch.randn(5, D), torch.randn(D, D))
    assert graph.rejections == [] and graph.sites == []


def test_gating_of_another_tensor_is_no_mlp():
    """An attention output gated by a linear is not a feed-forward block."""

    def f(x, q, k, v, g, o):
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, D)
        return F.linear(a * torch.sigmoid(F.linear(x, g)), o)

    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    _, graph = run(f, torch.randn(2, 5, D), q, k, v, torch.randn(D, D), torch.randn(D, D))
    assert not [s for s in graph.sites if s.kind == "mlp"]


def test_a_function_named_after_rope():
    class Rotary(nn.Module):
        def forward(self, x):
            return apply_rotary_emb(x)

    def apply_rotary_emb(x):
        return x @ torch.eye(D)

    report = model_run(Wrapped(Rotary()), torch.randn(5, D))
    check_in_step(report.graphs[-1], "rope", 1)
