"""What stands around experts in a native step: sorts, counts, sums, rows put where numbers say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

from dspark_compile.diagnostics import state

T, E, H = 5, 6, 24


def native(function, *args):
    """(results of eager mode, of one native call) on these arguments."""
    torch._dynamo.reset()
    call = torch.compile(
        function, backend="dspark", dynamic=False, fullgraph=True,
        options={"kernels": "auto", "verify": True, "fallback": "error"},
    )  # fmt: skip
    with torch.no_grad():
        want = function(*(a.clone() for a in args))
        got = call(*args)
    (graph,) = state.last_report().graphs
    assert any(note.startswith("one native call") for note in graph.notes), graph.notes
    return want, got


def same(want, got, dtype):
    half = {"atol": 1e-2, "rtol": 1e-2}
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else half
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, number
        torch.testing.assert_close(
            b, a, **tolerance, equal_nan=True, msg=lambda m, n=number: f"result {n}: {m}"
        )


def ordered(x, dim, descending=False):
    return torch.sort(x, dim=dim, descending=descending, stable=True)


def sorts(x, w):
    y = F.linear(x, w)  # a native step has a product
    z = y.round()  # many are equal
    i = (y * 3).long()
    return (
        *ordered(z, -1), *ordered(z, 0), *ordered(z, -1, True), *ordered(i, 1), *ordered(z.t(), 0),
        ordered(z > 0, -1)[0], i.view(-1).argsort(stable=True), i.view(-1).sort()[0],
        *ordered(torch.where(z > 0, torch.nan, z), -1),
        i % 3, i % -3, i // 2, i // -2, torch.fmod(i, 3), i >> 1, i.div(3, rounding_mode="trunc"),
        y // 0.3, y.div(0.7, rounding_mode="trunc"), torch.remainder(y, -0.4),
    )  # fmt: skip


def long_rows(x, w):
    """More than are sorted by comparing them: signs, zeros, infinities, NaN, types of all sizes."""
    y = F.linear(x, w)  # [3, 1200]
    y = torch.where(y.abs() < 1, torch.where(y > 0, 0.0, -0.0), y)
    y = torch.where(y > 6, torch.inf, torch.where(y < -6, -torch.inf, y))
    i = (y.clamp(-9, 9) * 1000).long()
    return (
        *ordered(y, -1), *ordered(y, -1, True), *ordered(torch.where(y == 2, torch.nan, y), -1),
        *ordered(i, -1), *ordered(i * 2**40, -1), *ordered(i * 2**40, -1, True),
        *ordered(y.double(), -1), *ordered(i.int(), -1, True), *ordered(y.bfloat16(), -1),
        *ordered(i.to(torch.int8), -1), *ordered(y.t()[:600], 0),
    )  # fmt: skip


def test_long_rows_are_sorted_by_their_digits():
    torch.manual_seed(0)
    x, w = torch.randint(-9, 9, (3, H)) / 8, torch.randn(1200, H).sign()
    same(*native(long_rows, x, w), torch.float32)


def sums(x, w):
    y = F.linear(x, w)
    cube = y.view(T, 2, E // 2)
    i = (y * 4).long()
    return (
        y.sum(), y.sum(0), y.sum(-1, keepdim=True), cube.sum((0, 2)), y.t().sum(1), cube.mean(1),
        y.mean(), y.amax(-1), y.amin((0, 1)), cube.amax((0, 2), keepdim=True), (y > 0).sum(0),
        (y > 0).any(1), (y > -9).all(0), (y > 0).any(), i.sum(1), i.amax(0), i.cumsum(0),
        y.cumsum(-1), torch.where(y > 0.5, torch.nan, y).amax(-1),
        (i.view(-1, 1) <= torch.arange(3)).sum(0), y.sum(0, dtype=torch.float64),
    )  # fmt: skip


TWICE = torch.tensor([1, 3, 1, 0, 3])
AROUND = torch.tensor([[0], [-1]])


def places(x, w, twice, around):
    y = F.linear(x, w)
    order = y[:, 0].argsort()
    two = torch.stack([order, twice], 1)
    wide = x.view(T, H, 1).expand(T, H, 400).reshape(T, -1)  # too much for one thread
    empty = torch.empty_like(y)
    empty[order] = y
    last = y.clone()
    last[:, twice[:3]] = x[:, :3]
    added = y.clone().index_put((order, twice), x[:, 0], accumulate=True)
    return (
        y.index_add(0, twice, y), y.index_add(1, order, y[:, :5]), empty, last, added,
        y.index_put((around,), x[0, 0].expand(2, 1, E), accumulate=True),
        wide.index_add(0, twice, wide), torch.zeros(T, 24 * 400).index_add_(0, order, wide),
        y.index_copy(0, order, y), torch.zeros(T, E).scatter(1, two, y[:, :2]),
        torch.zeros(T, E).scatter(1, two, 1.5), y.scatter_add(1, two, y[:, 1:3]),
        torch.zeros(T, E, dtype=torch.long).scatter_(1, two, 1).sum(0), y.gather(1, two),
        y.gather(0, twice.view(1, 5).expand(2, 5)), y.new_full((3,), 2.5) + y[0, :3],
        torch.ones_like(y) + y, F.one_hot(twice, E), y[two], y.view(-1)[twice],
    )  # fmt: skip


@pytest.mark.parametrize("function", [sorts, sums, places])
def test_in_float32(function):
    torch.manual_seed(0)
    more = (TWICE, AROUND) if function is places else ()
    same(*native(function, torch.randn(T, H), torch.randn(E, H), *more), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    """Sorted and put are the same numbers; sums are rounded once."""

    def f(x, w, twice):
        y = F.linear(x, w)
        zero = torch.zeros(T, E, dtype=dtype)
        return (
            *ordered(y, -1), y.sum(0), y.amax(1), y.index_add(0, twice, y),
            zero.scatter_add(1, twice.view(5, 1), y[:, :1]), zero.index_put((twice,), y[:1]),
        )  # fmt: skip

    torch.manual_seed(1)
    same(*native(f, torch.randn(T, H).to(dtype), torch.randn(E, H).to(dtype), TWICE), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_as_long_as_a_vocabulary(rows):
    """Top-p as transformers has it, over more than one thread does alone."""

    def f(x, w):
        z = F.linear(x, w)  # [rows, 12000]
        ordered, order = torch.sort(z, descending=False, stable=True)
        remove = ordered.softmax(-1).cumsum(-1) <= 0.4
        remove[..., -2:] = 0
        remove[:, 5] = True
        remove = remove.scatter(1, order, remove)
        kept = z.masked_fill(remove, -1e4)
        back = torch.zeros_like(z).scatter_add(1, order.flip(-1)[:, :9000], z[:, :9000])
        return kept, back, ordered.gather(1, order), z.sum(), z.amax(-1), z.view(rows, 2, -1).sum(1)

    torch.manual_seed(0)
    # Sums of whole numbers, which are the same in any order: so are their places when sorted.
    want, got = native(f, torch.randint(-9, 9, (rows, H)) / 8, torch.randn(12000, H).sign())
    assert (want[0] == -1e4).sum() > 1000
    same(want, got, torch.float32)


def test_a_number_outside_is_an_error():
    def f(x, w, i):
        return F.linear(x, w).index_add(0, i, x[:, :E])

    torch._dynamo.reset()
    call = torch.compile(f, backend="dspark", fullgraph=True, options={"kernels": "auto"})
    x, w = torch.randn(T, H), torch.randn(E, H)
    with torch.no_grad():
        call(x, w, torch.tensor([0, 1, 2, 3, 4]))
        for wrong in (5, -1):
            with pytest.raises(IndexError):
                call(x, w, torch.tensor([0, 1, wrong, 3, 4]))


def test_what_has_no_stage_says_why():
    def f(x, w):
        return F.linear(x, w).view(1, -1).expand(9000, T * E).reshape(-1).sort(-1)[0]

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend="dspark", options={"kernels": "auto"})(
            torch.randn(T, H), torch.randn(E, H)
        )
    notes = [n for g in state.last_report().graphs for n in g.notes]
    assert any("a sort of 270000 elements, more than 262144" in n for n in notes), notes


class Sorted(nn.Module):
    """Products of rows sorted by expert, with something between them that no op of ours knows."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up = nn.Parameter(torch.randn(E, 32, H) * 0.2)
        self.down = nn.Parameter(torch.randn(E, H, 32) * 0.2)

    def parts(self, rows, sizes, weight):
        rows = rows.split(sizes)
        return torch.cat([F.linear(rows[e], weight[e]) for e in range(E)])

    def forward(self, x):
        weight, choice = self.gate(x).softmax(-1).topk(2)
        order = choice.flatten().argsort(stable=True)
        sizes = torch.bincount(choice.flatten(), minlength=E).tolist()
        rows = self.parts(x[order // 2], sizes, self.up)
        rows = rows / (1 + rows.cumsum(0).abs().sum(-1, keepdim=True))
        rows = self.parts(rows, sizes, self.down)
        back = torch.empty_like(rows)
        back[order] = rows
        return (back.view(*choice.shape, -1) * weight[..., None]).sum(1)


def test_rows_sorted_by_expert_are_one_native_call():
    torch.manual_seed(0)
    model = Sorted().eval()
    want, got = native(model, torch.randn(4, H))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert state.last_report().graphs[0].ops["grouped_linear"] == 2


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_of_jetmoe_is_one_native_call(batch):
    """Experts in attention: a sort, counts, two products of sorted rows, rows added up."""
    torch.manual_seed(0)
    config = tf.JetMoeConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, kv_channels=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    model = tf.JetMoeForCausalLM(config).eval()
    ids = torch.randint(0, 199, (batch, 10))

    def decode(call):
        cache = tf.StaticCache(config, max_cache_len=32)
        model(ids[:, :6], past_key_values=cache)
        steps = [call(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 10)]
        return torch.cat(steps, 1)

    torch._dynamo.reset()
    options = {"kernels": "auto", "verify": True, "fallback": "error"}
    call = torch.compile(model, backend="dspark", dynamic=False, fullgraph=True, options=options)
    with torch.no_grad():
        want, got = decode(model), decode(call)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    graph = state.last_report().graphs[-1]
    assert any(note.startswith("one native call") for note in graph.notes), graph.notes
    assert graph.ops["grouped_linear"] == 4 and graph.ops["qk_norm_rope_append_"] == 2
