"""Mixtures of experts as public code writes them: each style raised, or left with a reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile

OPTIONS = {"inner": "eager", "verify": True}
D, INNER, EXPERTS, K = 32, 48, 4, 2
SHAPES = [(1, 1), (3, 1), (1, 17), (2, 9)]


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(D, INNER, bias=False)
        self.w3 = nn.Linear(D, INNER, bias=False)
        self.w2 = nn.Linear(INNER, D, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Router, experts as modules and as stacks; ``mix(model, x, weights, choice)``, over flat
    tokens if it is among ``FLAT``."""

    def __init__(self, mix, k=K):
        super().__init__()
        self.mix, self.k = mix, k
        self.gate = nn.Linear(D, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        draw = lambda *sizes: nn.Parameter(torch.randn(*sizes) * 0.2)  # noqa: E731
        self.w1, self.w2, self.w3 = (
            draw(EXPERTS, INNER, D), draw(EXPERTS, D, INNER), draw(EXPERTS, INNER, D),
        )  # fmt: skip
        self.both, self.b1, self.b2 = (
            draw(EXPERTS, 2 * INNER, D), draw(EXPERTS, 2 * INNER), draw(EXPERTS, D),
        )  # fmt: skip
        self.register_buffer("bias", torch.randn(EXPERTS) * 0.1)

    def forward(self, x):
        rows = x.view(-1, D) if self.mix in FLAT else x
        weights, choice = self.gate(rows).softmax(-1).topk(self.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.k == 1:
            weights = self.gate(rows).softmax(-1).gather(-1, choice)
        return self.mix(self, rows, weights, choice).view_as(x)


# -- loops over experts ---------------------------------------------------------------------------


def counted_branches(m, x, weights, choice):
    """DeepSeek-V3's: a branch on the expert's count, rows by `where`."""
    y = torch.zeros_like(x)
    counts = torch.bincount(choice.flatten(), minlength=EXPERTS).tolist()
    for e in range(EXPERTS):
        if counts[e] == 0:
            continue
        token, slot = torch.where(choice == e)
        y[token] += m.experts[e](x[token]) * weights[token, slot, None]
    return y


def masks_of_a_table(m, x, weights, choice):
    """LitGPT's: masks are gone through together with the experts."""
    masks = (choice.unsqueeze(-1) == torch.arange(EXPERTS)).permute(2, 0, 1)
    y = torch.zeros_like(x)
    for mask, expert in zip(masks, m.experts, strict=True):
        token, slot = torch.where(mask)
        y[token] += weights[token, slot, None] * expert(x[token])
    return y


def slots_then_experts(m, x, weights, choice):
    y = torch.zeros_like(x)
    for k in range(K):
        for e in range(EXPERTS):
            mask = choice[:, k] == e
            if mask.any():
                y[mask] += weights[mask, k].unsqueeze(-1) * m.experts[e](x[mask])
    return y


def experts_then_slots(m, x, weights, choice):
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        for k in range(K):
            mask = choice[:, k] == e
            if mask.sum() > 0:
                y[mask] += weights[mask, k : k + 1] * expert(x[mask])
    return y


def slots_by_number(m, x, weights, choice):
    y = torch.zeros_like(x)
    for k in range(K):
        chosen, share = choice[:, k], weights[:, k]
        for e, expert in enumerate(m.experts):
            token = torch.where(chosen == e)[0]
            y.index_add_(0, token, expert(x[token]) * share[token].unsqueeze(-1))
    return y


def slots_everywhere(m, x, weights, choice):
    """All tokens through every expert, those of others masked."""
    y = torch.zeros_like(x)
    for k in range(K):
        for e, expert in enumerate(m.experts):
            mask = (choice[..., k] == e).unsqueeze(-1)
            y = y + torch.where(mask, expert(x) * weights[..., k : k + 1], torch.zeros_like(x))
    return y


def flat_masks(m, x, weights, choice):
    """makeMoE's: scores through a softmax of few logits, a flat mask for the rows, another for
    the result."""
    logits = m.gate(x)
    best, choice = logits.topk(K, -1)
    scores = torch.full_like(logits, float("-inf")).scatter(-1, choice, best).softmax(-1)
    y = torch.zeros_like(x)
    rows, flat = x.view(-1, D), scores.view(-1, EXPERTS)
    for e, expert in enumerate(m.experts):
        mask = (choice == e).any(dim=-1)
        inside = mask.view(-1)
        if inside.any():
            part = expert(rows[inside]) * flat[inside, e].unsqueeze(1)
            y[mask] += part.squeeze(1)
    return y


def three_columns(m, x, weights, choice):
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        batch, token, slot = torch.where(choice == e)
        y[batch, token] += expert(x[batch, token]) * weights[batch, token, slot].unsqueeze(-1)
    return y


def selected(m, x, weights, choice):
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = choice == e
        token = mask.any(dim=1).nonzero(as_tuple=False).squeeze(-1)
        if token.numel() == 0:
            continue
        share = (weights * mask.float()).sum(dim=1).index_select(0, token).unsqueeze(-1)
        y = y.index_add(0, token, expert(x.index_select(0, token)) * share)
    return y


def hit_lists(m, x, weights, choice):
    """Rows of `nonzero` as lists of one number."""
    y = torch.zeros_like(x)
    mask = F.one_hot(choice, num_classes=EXPERTS).permute(2, 1, 0)
    for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().tolist():
        slot, token = torch.where(mask[e[0]])
        y.index_add_(0, token, m.experts[e[0]](x[token]) * weights[token, slot, None])
    return y


def repeated_rows(m, x, weights, choice):
    """DeepSeek-MoE's for training: each token's row k times, each written by its expert."""
    flat, rows = choice.view(-1), x.repeat_interleave(K, dim=0)
    y = torch.empty_like(rows)
    for e, expert in enumerate(m.experts):
        y[flat == e] = expert(rows[flat == e])
    return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


def counts_without_end(m, x, weights, choice):
    """DeepSeek-MoE's for inference: running ends as an array that ends at the last expert."""
    flat, share = choice.view(-1), weights.view(-1, 1)
    y, order = torch.zeros_like(x), flat.argsort()
    ends = flat.bincount().cpu().numpy().cumsum(0)
    tokens = order // K
    for e, end in enumerate(ends):
        start = 0 if e == 0 else ends[e - 1]
        if start == end:
            continue
        token = tokens[start:end]
        part = m.experts[e](x[token])
        part.mul_(share[order[start:end]])
        y.scatter_reduce_(0, token.view(-1, 1).repeat(1, D), part, reduce="sum")
    return y


# -- one choice -----------------------------------------------------------------------------------


def written_by_mask(m, x, weights, choice):
    share, chosen = m.gate(x).softmax(-1).max(dim=-1)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = chosen == e
        if mask.any():
            y[mask] = share[mask].unsqueeze(-1) * expert(x[mask])
    return y


def written_over_the_input(m, x, weights, choice):
    """Switch's: every row is some expert's, weighted behind the loop."""
    scores = m.gate(x).softmax(-1)
    hot = F.one_hot(scores.argmax(-1), num_classes=EXPERTS)
    y = x.clone()
    for e, expert in enumerate(m.experts):
        mask = hot[:, :, e].bool()
        y[mask] = expert(x[mask])
    return scores.max(-1).values.unsqueeze(-1) * y


def written_by_number(m, x, weights, choice):
    scores = m.gate(x).softmax(-1)
    share, chosen = scores.topk(1, dim=-1)
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        token = (chosen.squeeze(-1) == e).nonzero(as_tuple=True)[0]
        y.index_copy_(0, token, expert(x[token]) * share[token])
    return y


# -- all experts, and weights gathered ------------------------------------------------------------


def one_hot_table(m, x, weights, choice):
    table = (F.one_hot(choice, EXPERTS).to(x.dtype) * weights.unsqueeze(-1)).sum(-2)
    h = F.silu(torch.einsum("btd,efd->btef", x, m.w1)) * torch.einsum("btd,efd->btef", x, m.w3)
    return torch.einsum("btef,edf,bte->btd", h, m.w2, table)


def one_hot_product(m, x, weights, choice):
    table = torch.einsum("btk,btke->bte", weights, F.one_hot(choice, EXPERTS).to(x.dtype))
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        y = y + table[..., e].unsqueeze(-1) * expert(x)
    return y


def masked_softmax(m, x, weights, choice):
    logits = m.gate(x)
    mask = torch.zeros_like(logits).scatter_(-1, logits.topk(K, -1).indices, 1.0)
    table = logits.masked_fill(mask == 0, float("-inf")).softmax(-1)
    return sum(table[..., e : e + 1] * expert(x) for e, expert in enumerate(m.experts))


def stacked_softmax(m, x, weights, choice):
    logits = m.gate(x)
    best, choice = logits.topk(K, -1)
    table = torch.full_like(logits, float("-inf")).scatter(-1, choice, best).softmax(-1)
    return (table.unsqueeze(-1) * torch.stack([e(x) for e in m.experts], dim=2)).sum(2)


def gathered(m, x, weights, choice):
    """gpt-fast's."""
    h = F.silu(torch.einsum("ti,taoi -> tao", x, m.w1[choice]))
    h = h * torch.einsum("ti,taoi -> tao", x, m.w3[choice])
    y = torch.einsum("tao,taio -> tai", h, m.w2[choice])
    return torch.einsum("tai,ta -> ti", y, weights)


def gathered_with_biases(m, x, weights, choice):
    """gpt-oss's: gate and up alternate, bounds, biases."""
    h = torch.einsum("beck,bk->bec", m.both[choice, ...], x) + m.b1[choice, ...]
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
    h = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    y = torch.einsum("beck,bek->bec", m.w2[choice, ...], h)
    y += m.b2[choice, ...]
    return torch.einsum("bec,be->bc", y, weights)


def gathered_of_a_batch(m, x, weights, choice):
    gate, up = torch.einsum("bsd,bskfd->bskf", x, m.both[choice]).chunk(2, -1)
    y = torch.einsum("bskf,bskdf->bskd", F.silu(gate) * up, m.w2[choice])
    return (y * weights.unsqueeze(-1)).sum(2)


FLAT = {
    counted_branches, masks_of_a_table, slots_then_experts, experts_then_slots, slots_by_number,
    selected, hit_lists, repeated_rows, counts_without_end, written_by_mask, written_by_number,
    gathered, gathered_with_biases,
}  # fmt: skip
RAISED = [
    counted_branches, masks_of_a_table, slots_then_experts, experts_then_slots, slots_by_number,
    slots_everywhere, flat_masks, three_columns, selected, hit_lists, repeated_rows,
    counts_without_end, written_by_mask, written_over_the_input, written_by_number, one_hot_table,
    one_hot_product, masked_softmax, stacked_softmax, gathered, gathered_with_biases,
    gathered_of_a_batch,
]  # fmt: skip


def answers(mix, fullgraph=True, **given):
    """(largest error, dialect ops of all graphs, report)."""
    torch.manual_seed(0)
    model, error = Mixture(mix, **given).eval(), 0.0
    call = torch.compile(model, backend="dspark", fullgraph=fullgraph, options=OPTIONS)
    with torch.no_grad():
        for lead in SHAPES:
            x = torch.randn(*lead, D)
            want, got = model(x), call(x)
            error = max(error, float((got - want).abs().max() / want.abs().max().clamp(min=1e-6)))
        alike = torch.randn(1, 1, D).expand(2, 9, D).contiguous()  # experts that nobody chooses
        want, got = model(alike), call(alike)
        error = max(error, float((got - want).abs().max() / want.abs().max().clamp(min=1e-6)))
    report = dspark_compile.last_report()
    return error, [name for graph in report.graphs for name in graph.ops], report


# -- what looks alike, and is not -----------------------------------------------------------------


def one_slot_of_two(m, x, weights, choice):
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = choice[:, 0] == e
        y[mask] += weights[mask, 0, None] * expert(x[mask])
    return y


def another_slots_weights(m, x, weights, choice):
    y = torch.zeros_like(x)
    for k in range(K):
        for e, expert in enumerate(m.experts):
            mask = choice[:, k] == e
            y[mask] += weights[mask, K - 1 - k, None] * expert(x[mask])
    return y


def written_over(m, x, weights, choice):
    """The last of a token's choices alone is left."""
    y = torch.zeros_like(x)
    for k in range(K):
        for e, expert in enumerate(m.experts):
            mask = choice[:, k] == e
            y[mask] = weights[mask, k, None] * expert(x[mask])
    return y


def some_keep_their_input(m, x, weights, choice):
    """The last expert's rows stay as they were."""
    chosen, y = choice[:, 0], x.clone()
    for e, expert in enumerate(m.experts[:-1]):
        mask = chosen == e
        y[mask] = expert(x[mask])
    return y


def another_count(m, x, weights, choice):
    """The branch asks for the next expert's count."""
    y = torch.zeros_like(x)
    counts = torch.bincount(choice.flatten(), minlength=EXPERTS).tolist()
    for e in range(EXPERTS):
        if counts[(e + 1) % EXPERTS] == 0:
            continue
        token, slot = torch.where(choice == e)
        y[token] += m.experts[e](x[token]) * weights[token, slot, None]
    return y


def turns_of_the_hit(m, x, weights, choice):
    """How many turns there were is seen: fewer than experts."""
    y, turns = torch.zeros_like(x), 0
    counts = choice.view(-1).bincount().tolist()
    for e, _ in enumerate(counts):
        token, slot = torch.where(choice == e)
        y.index_add_(0, token, m.experts[e](x[token]) * weights[token, slot, None])
        turns = turns + 1
    return y * turns


def gathered_twice(m, x, weights, choice):
    """The second product's experts are others than the first's."""
    h = F.silu(torch.einsum("ti,taoi->tao", x, m.w1[choice]))
    y = torch.einsum("tao,taio->tai", h, m.w2[choice.flip(-1)])
    return torch.einsum("tai,ta->ti", y, weights)


LEFT = [
    one_slot_of_two, another_slots_weights, written_over, some_keep_their_input, another_count,
    turns_of_the_hit, gathered_twice,
]  # fmt: skip
FLAT |= set(LEFT)
QUICK = {
    counted_branches, flat_masks, repeated_rows, written_over_the_input, one_hot_product,
    gathered_with_biases, one_slot_of_two, turns_of_the_hit,
}  # fmt: skip


def cases(mixes):
    return [
        pytest.param(m, id=m.__name__, marks=[] if m in QUICK else [pytest.mark.slow])
        for m in mixes
    ]


@pytest.mark.parametrize("mix", cases(RAISED))
def test_styles_are_raised(mix):
    error, ops, report = answers(mix)
    assert error <= 2e-5
    assert ops.count("moe_experts") == len(report.graphs), report.rejections
    assert ops.count("moe_router") == len(report.graphs), report.rejections


@pytest.mark.parametrize("mix", cases(LEFT))
def test_what_is_another_sum_stays(mix):
    error, ops, report = answers(mix, fullgraph=False)
    assert error <= 2e-5
    assert "moe_experts" not in ops
    said = [r.condition for r in report.rejections if r.kind == "experts"]
    notes = [note for graph in report.graphs for note in graph.notes]
    assert said or notes or report.graph_breaks
