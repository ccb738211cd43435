"""Experts that all compute every token, weighted by a table that is mostly 0: the chosen ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.test_raise_moe import close, compiled, ops_of

HIDDEN, INNER, EXPERTS, K = 32, 48, 5, 2


class Dense(nn.Module):
    """Stacked weights or modules; ``how`` says how they are multiplied, ``scores`` what the table
    is made of."""

    def __init__(self, how, scores="scatter", fill=0.0):
        super().__init__()
        self.how, self.scores, self.fill = how, scores, fill
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.2)  # noqa: E731
        self.w1, self.w3 = draw(EXPERTS, INNER, HIDDEN), draw(EXPERTS, INNER, HIDDEN)
        self.w2, self.b1 = draw(EXPERTS, HIDDEN, INNER), draw(EXPERTS, INNER)
        self.both = draw(EXPERTS, HIDDEN, 2 * INNER)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, INNER), nn.SiLU(), nn.Linear(INNER, HIDDEN))
            for _ in range(EXPERTS)
        )

    def table(self, x):
        scores = self.gate(x).softmax(-1)
        weight, index = scores.topk(K, -1)
        if self.scores == "mask":
            return scores * torch.zeros_like(scores).scatter(-1, index, 1.0)
        if self.scores == "normalised":
            table = scores * torch.zeros_like(scores).scatter(-1, index, 1.0)
            return table / (table.sum(-1, keepdim=True) + 1e-9)
        if self.scores == "random":
            index = torch.stack((index[..., 0], index[..., 0]), -1)
        weight = weight / weight.sum(-1, keepdim=True)
        into = torch.full_like(scores, self.fill)
        if self.scores == "add":
            return into.scatter_add(-1, index, weight)
        return into.scatter(-1, index, weight)

    def forward(self, x):
        return getattr(self, self.how)(x, self.table(x))

    def einsum(self, x, table):
        h = F.silu(torch.einsum("td,efd->tef", x, self.w1))
        h = h * torch.einsum("td,efd->tef", x, self.w3)
        return torch.einsum("ted,te->td", torch.einsum("tef,edf->ted", h, self.w2), table)

    def experts_first(self, x, table):
        h = F.silu(torch.einsum("td,efd->etf", x, self.w1))
        h = h * torch.einsum("td,efd->etf", x, self.w3)
        return torch.einsum("etf,edf,te->td", h, self.w2, table)

    def weighted_hidden(self, x, table):
        h = F.silu(torch.einsum("td,efd->tef", x, self.w1))
        h = h * torch.einsum("td,efd->tef", x, self.w3)
        return torch.einsum("tef,edf->td", h * table[..., None], self.w2)

    def batched(self, x, table):
        h = F.gelu(torch.einsum("bsd,efd->bsef", x, self.w1))
        return torch.einsum("bsef,edf,bse->bsd", h, self.w2, table)

    def bmm(self, x, table):
        rows = x.unsqueeze(0).expand(EXPERTS, -1, -1)
        h = F.silu(torch.bmm(rows, self.w1.mT)) * torch.bmm(rows, self.w3.mT)
        return (torch.bmm(h, self.w2.mT) * table.t().unsqueeze(-1)).sum(0)

    def merged(self, x, table):
        gate, up = (x @ self.both).chunk(2, -1)
        return ((F.silu(gate) * up @ self.w2.mT) * table.t()[..., None]).sum(0)

    def biased(self, x, table):
        h = F.silu(torch.einsum("td,efd->tef", x, self.w1) + self.b1)
        return torch.einsum("tef,edf,te->td", h, self.w2, table)

    def expanded(self, x, table):
        """No expert of its own: the sum multiplies by the number of experts."""
        h = F.silu(torch.einsum("td,efd->tef", x, self.w1))
        out = torch.einsum("tef,edf,te->td", h, self.w2, table)
        return out[:, None].expand(-1, EXPERTS, -1).sum(1)

    def stack(self, x, table):
        outs = torch.stack([e(x) for e in self.experts], 1)
        return (outs * table.unsqueeze(-1)).sum(1)

    def stack_bmm(self, x, table):
        outs = torch.stack([e(x) for e in self.experts], 1)
        return torch.bmm(table.unsqueeze(1), outs).squeeze(1)

    def column(self, x, table):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out = out + expert(x) * table[:, number : number + 1]
        return out

    def columns(self, x, table):
        return sum(table[:, n, None] * expert(x) for n, expert in enumerate(self.experts))


def raised(how, shape=(7, HIDDEN), **given):
    torch.manual_seed(0)
    got, want, report = compiled(Dense(how, **given).eval(), torch.randn(*shape))
    close(got, want)
    assert got.shape == want.shape
    return ops_of(report), report


FORMS = ["einsum", "bmm", "merged", "stack_bmm", "columns"]
MORE = ["experts_first", "weighted_hidden", "expanded", "stack", "column"]


@pytest.mark.parametrize("how", [*FORMS, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)])
def test_forms(how):
    ops, report = raised(how)
    assert ops.get("moe_experts") == ops.get("moe_router") == 1
    assert not {"mlp", "gated_mlp", "matmul"} & set(ops)
    assert report.summary()["experts"] == {"raised": 1, "rejected": 0}


@pytest.mark.parametrize("how", ["einsum", pytest.param("stack", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scores", ["mask", "add", "normalised"])
def test_tables(how, scores):
    ops, _ = raised(how, scores=scores)
    assert ops.get("moe_experts") == 1


def test_tokens_of_a_batch():
    ops, _ = raised("batched", (2, 7, HIDDEN))
    assert ops.get("moe_experts") == 1


@pytest.mark.parametrize(
    ("how", "given"),
    [("einsum", {"fill": 0.1}), ("columns", {"fill": 0.1}), ("stack", {"scores": "random"}),
     ("biased", {})],
)  # fmt: skip
def test_what_is_not_zero_stays(how, given):
    """A table that is not known to be 0 elsewhere, or what is multiplied is not known."""
    ops, report = raised(how, **given)
    assert "moe_experts" not in ops
    reasons = [r for g in report.graphs for r in g.rejections if r.kind == "experts"]
    assert reasons and all(r.condition for r in reasons)


@pytest.mark.parametrize(("how", "lead"), [("einsum", ()), ("batched", (2,))])
def test_sizes_that_change(how, lead):
    torch.manual_seed(0)
    model = Dense(how).eval()
    call = torch.compile(model, backend="dspark", dynamic=True, fullgraph=True,
                         options={"inner": "eager", "verify": True})  # fmt: skip
    with torch.no_grad():
        for tokens in (3, 9, 17):
            x = torch.randn(*(n * tokens for n in lead), tokens, HIDDEN)
            close(call(x), model(x))
    import dspark_compile

    assert ops_of(dspark_compile.last_report()).get("moe_experts") == 1
