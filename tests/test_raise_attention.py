"""Eager attention, in the spellings that people use, becomes ``dspark.attention``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}


def compiled(function, *args, dynamic=None, options=None):
    """``(result, graph report)`` of one compiled call."""
    run = torch.compile(function, backend="dspark", options=options or OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        result = run(*args)
    return result, last_report().graphs[-1]


def raised(function, *args, n=1, tol=1e-5, dynamic=None):
    """Compile and check: ``n`` attentions, no softmax left (those of routers are raised before),
    the result is eager's."""
    with torch.no_grad():
        want = function(*args)
    got, graph = compiled(function, *args, dynamic=dynamic)
    assert graph.ops.get("attention", 0) == n, (graph.ops, graph.rejections)
    assert len([s for s in graph.sites if s.kind == "attention"]) == n
    final = graph.programs["after raise_attention"]
    assert "_softmax.default" not in final and "aten.exp." not in final
    assert got.dtype == want.dtype and got.shape == want.shape
    torch.testing.assert_close(got.float(), want.float(), atol=tol, rtol=tol)
    return graph


def rejected(function, *args, reason):
    """Compile and check: nothing raised, the reason is in the report, the result is eager's."""
    with torch.no_grad():
        want = function(*args)
    got, graph = compiled(function, *args)
    assert graph.ops.get("attention", 0) == 0
    reasons = [r.condition for r in graph.rejections if r.kind == "attention"]
    assert any(reason in r for r in reasons), reasons
    flat = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for g, w in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-5)
    return graph


def qkv(b=2, h=4, m=5, n=7, d=8, kv=None, dtype=torch.float32):
    kv = h if kv is None else kv
    q = torch.randn(b, h, m, d, dtype=dtype)
    return q, torch.randn(b, kv, n, d, dtype=dtype), torch.randn(b, kv, n, d, dtype=dtype)


def causal(m, n):
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


# --- spellings of the products and the scale -------------------------------------------------


def test_plain_matmul():
    raised(lambda q, k, v: F.softmax(q @ k.transpose(-2, -1) * 8**-0.5, dim=-1) @ v, *qkv())


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: q @ k.mT / math.sqrt(8),
        lambda q, k: (q * 8**-0.5) @ k.mT,
        lambda q, k: q @ (k / math.sqrt(8)).mT,
        lambda q, k: (q * 8**-0.25) @ (k * 8**-0.25).mT,
        lambda q, k: torch.matmul(q, k.permute(0, 1, 3, 2)) * torch.tensor(0.3),
        lambda q, k: torch.matmul(q, k.mT) / torch.full([], 8**0.5),
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.2,
        lambda q, k: 0.5 * (q @ k.mT) * 0.5,
        lambda q, k: -0.1 * (q @ k.mT),
    ],
)
def test_scales(scores):
    raised(lambda q, k, v: scores(q, k).softmax(-1) @ v, *qkv())


def test_scale_folds_into_the_op():
    def f(q, k, v):
        return (torch.matmul(q * 0.5, k.mT) * 0.25).softmax(-1) @ v

    graph = raised(f, *qkv())
    assert "scale: 0.125" in graph.programs["after raise_attention"]
    assert "aten.mul" not in graph.programs["after raise_attention"]


def test_a_scale_for_each_head_goes_to_the_query():
    temperature = torch.rand(4, 1, 1) + 0.5
    raised(lambda q, k, v, t: (q @ k.mT * t).softmax(-1) @ v, *qkv(), temperature)


def test_manual_softmax():
    def f(q, k, v):
        s = q @ k.mT * 0.3
        e = torch.exp(s - s.amax(-1, keepdim=True))
        return (e / e.sum(-1, keepdim=True)) @ v

    raised(f, *qkv())


def test_different_value_width():
    q, k, _ = qkv()
    raised(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, torch.randn(2, 4, 7, 12))


# --- layouts ---------------------------------------------------------------------------------


def test_single_head_three_dimensions():
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    raised(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, q, k, v)
    mask = torch.randn(2, 5, 7)
    raised(lambda q, k, v, m: (q @ k.mT * 0.3 + m).softmax(-1) @ v, q, k, v, mask)


def test_two_dimensions():
    def f(q, k, v, m):
        q, k, v = q.relu(), k.relu(), v.relu()  # a product with an input is a linear layer
        return (q @ k.T * 0.3 + m).softmax(-1) @ v

    raised(f, torch.randn(5, 8), torch.randn(7, 8), torch.randn(7, 8), torch.randn(5, 7))


@pytest.mark.parametrize("mask", [(2, 1, 5, 7), (1, 1, 5, 7), (2, 4, 5, 7), (5, 7), (7,)])
def test_folded_batch_and_heads(mask):
    def f(q, k, v, mask):
        b, h, m, d = q.shape
        q, k, v = q.reshape(b * h, m, d), k.reshape(b * h, -1, d), v.reshape(b * h, -1, d)
        s = torch.bmm(q, k.transpose(1, 2)).view(b, h, m, -1) * 0.3 + mask
        p = s.softmax(-1).view(b * h, m, -1)
        return torch.bmm(p, v).view(b, h, m, d).transpose(1, 2).reshape(b, m, h * d)

    raised(f, *qkv(), torch.randn(mask))


def test_folded_heads_throughout():
    def f(q, k, v, mask):
        s = torch.bmm(q, k.transpose(1, 2)) * 0.3 + mask
        return torch.bmm(s.softmax(-1), v)

    raised(f, *(torch.randn(6, 5, 8) for _ in range(3)), torch.randn(6, 1, 5))


def test_baddbmm_alibi_as_bloom():
    def f(q, k, v, alibi, mask):
        b, h, m, d = q.shape
        n = k.shape[2]
        q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
        s = alibi.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=0.5, alpha=0.3)
        s = s.view(b, h, m, n) + mask
        p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(p.view(b * h, m, n), v).view(b, h, m, d)

    mask = torch.zeros(2, 1, 5, 7).masked_fill(~causal(5, 7), torch.finfo(torch.float32).min)
    graph = raised(f, *qkv(), torch.randn(8, 1, 7), mask)
    assert "scale: 0.3" in graph.programs["after raise_attention"]


def test_baddbmm_of_zeros():
    def f(q, k, v):
        zeros = torch.zeros(6, 5, 5)
        return torch.baddbmm(zeros, q, k.mT, beta=1.0, alpha=0.3).softmax(-1) @ v

    graph = raised(f, *(torch.randn(6, 5, 8) for _ in range(3)))
    assert "None, None" in graph.programs["after raise_attention"]  # no bias


@pytest.mark.parametrize(
    "mask", [(2, 1, 1, 5, 7), (1, 2, 1, 5, 7), (2, 2, 3, 5, 7), (1, 1, 3, 1, 7)]
)
def test_grouped_five_dimensions(mask):
    def f(q, k, v, mask):
        b, h, m, d = q.shape
        q = q.view(b, 2, 3, m, d)
        s = q @ k.unsqueeze(2).mT * 0.3 + mask
        return (s.softmax(-1) @ v.unsqueeze(2)).reshape(b, h, m, d)

    graph = raised(f, *qkv(h=6, kv=2), torch.randn(mask))
    repeated = "expand" in graph.programs["after raise_attention"]
    assert repeated == (1 < mask[1] * mask[2] < 6)  # only a mask for some heads is


def test_multi_query():
    graph = raised(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, *qkv(kv=1))
    assert "expand" not in graph.programs["after raise_attention"]


def test_repeated_heads_are_grouped():
    def f(q, k, v):
        k, v = (t[:, :, None].expand(2, 2, 2, 7, 8).reshape(2, 4, 7, 8) for t in (k, v))
        return (q @ k.mT * 0.3).softmax(-1) @ v

    graph = raised(f, *qkv(kv=2))
    assert "expand" not in graph.programs["lowered"]


def test_windows():
    def f(q, k, v, mask):
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    q, k, v = (torch.randn(2, 3, 4, 5, 8) for _ in range(3))
    raised(f, q, k, v, torch.randn(3, 1, 5, 5))
    raised(f, q, k, v, torch.randn(4, 5, 5))


def test_shared_keys_over_the_batch():
    q, _, _ = qkv()
    k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 7, 8)
    raised(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, q, k, v)


@pytest.mark.parametrize(
    "product, values",
    [
        ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
        ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
        ("bqhd,bkd->bhqk", "bhqk,bkd->bqhd"),
        ("bqd,bkd->bqk", "bqk,bkd->bqd"),
        ("ibnd,jbnd->bnij", "bnij,jbnd->ibnd"),
        ("bqkgd,bskd->bkgqs", "bkgqs,bskd->bqkgd"),
    ],
)
def test_einsum(product, values):
    sizes = dict(zip("bhqkdijnsg", (2, 3, 5, 7, 8, 5, 7, 3, 6, 2), strict=True))
    left, right = product.split("->")[0].split(",")
    shapes = [left, right, values.split("->")[0].split(",")[1]]
    args = [torch.randn([sizes[c] for c in s]) for s in shapes]

    def f(q, k, v):
        return torch.einsum(values, (torch.einsum(product, q, k) * 0.3).softmax(-1), v)

    raised(f, *args)


def test_dynamic_shapes():
    def f(q, k, v, mask):
        return (q @ k.mT * 0.3 + mask).softmax(-1) @ v

    q, k, v = qkv()
    raised(f, q, k, v, torch.randn(2, 1, 5, 7), dynamic=True)

    def folded(q, k, v, mask):
        b, h, m, d = q.shape
        q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))
        s = torch.bmm(q, k.transpose(1, 2)).view(b, h, m, -1) * 0.3 + mask
        return torch.bmm(s.softmax(-1).view(b * h, m, -1), v).view(b, h, m, d)

    torch._dynamo.reset()
    raised(folded, q, k, v, torch.randn(2, 1, 5, 7), dynamic=True)

    def scaled_by_size(q, k, v):
        return (q @ k.mT / math.sqrt(q.size(-1))).softmax(-1) @ v

    torch._dynamo.reset()
    raised(scaled_by_size, q, k, v, dynamic=True)


# --- masks and biases ------------------------------------------------------------------------


class NanoGPT(nn.Module):
    def __init__(self, width=32, heads=4, block=16):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.heads, self.width = heads, width
        tril = torch.tril(torch.ones(block, block)).view(1, 1, block, block)
        self.register_buffer("bias", tril)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.c_attn(x).split(self.width, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.dropout(F.softmax(att, dim=-1))
        y = att @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


def test_nanogpt():
    raised(NanoGPT().eval(), torch.randn(2, 9, 32))


def test_nanogpt_training_dropout_is_rejected():
    # Under no_grad in training mode dropout is active: results are random, the reason is told.
    _, graph = compiled(NanoGPT().train(), torch.randn(2, 9, 32))
    assert graph.ops.get("attention", 0) == 0
    assert any("before they meet the values" in r.condition for r in graph.rejections)


@pytest.mark.parametrize(
    "mask",
    [
        lambda s, m: s.masked_fill(~m, float("-inf")),
        lambda s, m: s.masked_fill(m.logical_not(), torch.finfo(s.dtype).min),
        lambda s, m: s.masked_fill(~m, -1e9),
        lambda s, m: torch.where(m, s, torch.finfo(s.dtype).min),
        lambda s, m: torch.where(m, s, torch.full([], -1e10)),
        lambda s, m: torch.where(~m, float("-inf"), s),
        lambda s, m: s + torch.where(m, 0.0, -10000.0),
        lambda s, m: s + (1.0 - m.float()) * -1e4,
        lambda s, m: s - (~m).float() * 1e30,
        lambda s, m: torch.max(
            s + torch.zeros_like(s).masked_fill(~m, float("-inf")),
            torch.tensor(torch.finfo(s.dtype).min),
        ),
        lambda s, m: s.masked_fill(~m, -1e9).masked_fill(~m.tril(2), float("-inf")) + 0.0,
    ],
)
def test_masks(mask):
    m = causal(5, 7)
    raised(lambda q, k, v, m: mask(q @ k.mT * 0.3, m).softmax(-1) @ v, *qkv(), m)


def test_fully_masked_rows():
    mask = causal(5, 7)
    mask[2] = False
    q, k, v = qkv()

    def f(q, k, v, m):
        s = (q @ k.mT * 0.3).masked_fill(~m, torch.finfo(q.dtype).min)
        return s.softmax(-1) @ v

    raised(f, q, k, v, mask)

    def infinite(q, k, v, m):
        return (q @ k.mT * 0.3).masked_fill(~m, float("-inf")).softmax(-1) @ v

    got, graph = compiled(infinite, q, k, v, mask)
    assert graph.ops["attention"] == 1
    want = infinite(q, k, v, mask).nan_to_num()  # the op gives zeros for such a row
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_weights_set_to_zero_by_the_same_mask():
    mask = causal(5, 7)
    mask[2] = False

    def f(q, k, v, m):
        s = torch.masked_fill(q @ k.mT * 0.3, m == False, torch.scalar_tensor(float("-inf")))  # noqa: E712
        p = torch.masked_fill(s.softmax(-1), m == False, torch.scalar_tensor(0.0))  # noqa: E712
        return p @ v

    raised(f, *qkv(), mask)  # the row without keys is zero in both

    def other(q, k, v, m):
        return (q @ k.mT).masked_fill(~m, -1e9).softmax(-1).masked_fill(~m.mT.tril(), 0) @ v

    rejected(other, *qkv(m=7), causal(7, 7), reason="masked_fill")


def test_alibi_and_mask():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]).view(4, 1, 1)

    def f(q, k, v, slopes):
        m, n = q.shape[2], k.shape[2]
        distance = torch.arange(n)[None, :] - torch.arange(n - m, n)[:, None]
        s = q @ k.mT / math.sqrt(8) + slopes * distance
        s = s.masked_fill(distance > 0, float("-inf"))
        return F.softmax(s.float(), dim=-1).type_as(s) @ v

    raised(f, *qkv(), slopes)


def test_t5_position_bias():
    def f(q, k, v, table, mask):
        buckets = (torch.arange(5)[:, None] - torch.arange(7)[None]).clamp(-3, 3) + 3
        bias = table[buckets].permute(2, 0, 1).unsqueeze(0) + mask
        s = torch.matmul(q, k.transpose(3, 2))
        s += bias
        p = F.softmax(s.float(), dim=-1).type_as(s)
        return torch.matmul(p, v)

    mask = torch.zeros(2, 1, 1, 7)
    mask[0, ..., 5:] = torch.finfo(torch.float32).min
    raised(f, *qkv(), torch.randn(7, 4), mask)


def test_relative_scores_are_a_bias():
    def f(q, k, v, r):
        content = q @ k.mT
        position = torch.einsum("bhqd,qkd->bhqk", q, r)
        return ((content + position) * 0.3).softmax(-1) @ v

    raised(f, *qkv(), torch.randn(5, 7, 8))


def test_scale_after_the_mask():
    def f(q, k, v, m):
        return ((q @ k.mT + m) / math.sqrt(8)).softmax(-1) @ v

    raised(f, *qkv(), torch.randn(2, 1, 5, 7))


def test_data_dependent_mask_stays_exact():
    def f(q, k, v):
        s = q @ k.mT * 0.3
        allowed = k.sum(-1)[:, :, None, :] > 0
        return s.masked_fill(~allowed, -1e9).softmax(-1) @ v

    raised(f, *qkv())


# --- soft-cap and sinks ----------------------------------------------------------------------


def test_softcap():
    def f(q, k, v, m):
        s = q @ k.mT * 0.3
        s = torch.tanh(s / 2.0) * 2.0 + m
        return s.softmax(-1) @ v

    graph = raised(f, *qkv(), torch.randn(5, 7))
    assert "softcap: 2.0" in graph.programs["after raise_attention"]
    raised(lambda q, k, v: torch.tanh(q @ k.mT).softmax(-1) @ v, *qkv())


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_sinks(subtract, first):
    def f(q, k, v, sinks):
        s = q @ k.mT * 0.3
        sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        s = torch.cat([sinks, s] if first else [s, sinks], dim=-1)
        if subtract:
            s = s - s.max(dim=-1, keepdim=True).values
        p = F.softmax(s, dim=-1, dtype=s.dtype)
        return (p[..., 1:] if first else p[..., :-1]) @ v

    raised(f, *qkv(), torch.randn(4))


def test_softmax_off_by_one():
    def f(q, k, v):
        return F.pad(q @ k.mT * 0.3, (0, 1)).softmax(-1)[..., :-1] @ v

    raised(f, *qkv())


def test_sink_as_a_gate_on_the_result():
    def f(q, k, v, sinks):
        s = q @ k.mT * 0.3
        gate = (torch.logsumexp(s, -1) - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
        out = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        return out * gate.unsqueeze(-1).to(out.dtype)

    graph = raised(f, *qkv(), torch.randn(4))
    assert "logsumexp" not in graph.programs["after raise_attention"]


# --- several readers of one softmax, dtypes --------------------------------------------------


def test_two_values_with_the_same_weights():
    def f(q, k, v):
        p = (q @ k.mT * 0.3).softmax(-1)
        return torch.cat([p @ v, p @ (v + 1)], -1)

    raised(f, *qkv(), n=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    def f(q, k, v):
        s = q @ k.mT * 0.3
        return F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    graph = raised(f, *qkv(dtype=dtype), tol=2e-2)
    assert "_to_copy" not in graph.programs["after raise_attention"]


def test_upcast_for_the_product():
    def f(q, k, v):
        s = torch.matmul(q.float(), k.float().transpose(-1, -2)) / 8**0.5
        return torch.matmul(s.softmax(-1).to(v.dtype), v)

    graph = raised(f, *qkv(dtype=torch.bfloat16), tol=2e-2)
    assert "_to_copy" not in graph.programs["after raise_attention"]


def test_float32_throughout_keeps_its_precision():
    def f(q, k, v):
        q, k, v = q.float(), k.float(), v.float()
        return (q @ k.mT * 0.3).softmax(-1) @ v

    raised(f, *qkv(dtype=torch.bfloat16), tol=1e-5)


def test_float32_query_and_key_with_low_precision_value():
    q, k, _ = qkv()
    v = torch.randn(2, 4, 7, 8, dtype=torch.bfloat16)
    raised(lambda q, k, v: (q @ k.mT).softmax(-1).to(v.dtype) @ v, q, k, v, tol=2e-2)


def test_float64():
    raised(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv(dtype=torch.float64))


# --- what must not be rewritten --------------------------------------------------------------


@pytest.mark.parametrize(
    "weights, reason",
    [
        (lambda s: s.softmax(-2), "not over the keys"),
        (lambda s: s.sigmoid().softmax(-1), "not attention's"),
        (lambda s: s.clamp(-1, 1).softmax(-1), "clamped"),
        (lambda s: (s * torch.rand(7)).softmax(-1), "differs between keys"),
        (lambda s: s.masked_fill(causal(5, 7), -3.0).softmax(-1), "does not forbid"),
        (lambda s: torch.tanh(s + 1.0).softmax(-1), "added"),
        (lambda s: s.softmax(-1) * torch.rand(4, 1, 1), "before they meet the values"),
        (lambda s: s.softmax(-1).square(), "before they meet the values"),
        (lambda s: torch.einsum("bhqk,hg->bgqk", s.softmax(-1), torch.rand(4, 4)), ""),
        (lambda s: torch.cat([s, s + 1], -1).softmax(-1)[..., :7], "concatenated"),
        (lambda s: torch.cat([s, torch.zeros(2, 4, 5, 1)], -1).softmax(-1)[..., 1:], "sink"),
    ],
)
def test_other_things_are_rejected(weights, reason):
    def f(q, k, v):
        torch.manual_seed(0)
        return weights(q @ k.mT * 0.3) @ v

    q, k, v = qkv()
    _, graph = compiled(f, q, k, v)
    assert graph.ops.get("attention", 0) == 0
    reasons = [r.condition for r in graph.rejections if r.kind == "attention"]
    assert reasons and any(reason in r for r in reasons), reasons


def test_returned_weights_are_rejected():
    def f(q, k, v):
        p = (q @ k.mT * 0.3).softmax(-1)
        return p @ v, p

    rejected(f, *qkv(), reason="weights are returned")


def test_returned_scores_are_rejected():
    def f(q, k, v):
        s = q @ k.mT * 0.3
        return s.softmax(-1) @ v, s

    rejected(f, *qkv(), reason="scores are returned")


def test_other_softmaxes_are_no_sites():
    def f(x, w):
        return F.softmax(x @ w, dim=-1).topk(2).values

    _, graph = compiled(f, torch.randn(3, 8), torch.randn(8, 4))
    assert not [r for r in graph.rejections if r.kind == "attention"]


def test_captured_sdpa_is_recorded_once():
    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v) @ v.mT

    _, graph = compiled(f, *qkv(m=7))
    assert len([s for s in graph.sites if s.kind == "attention"]) == 1


def test_matmuls_that_stay_are_lowered():
    def f(a, b, w):
        return F.linear(torch.matmul(a, b), w).relu() @ b

    a, b, w = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(5, 5)
    got, graph = compiled(f, a, b, w)
    torch.testing.assert_close(got, f(a, b, w))
    assert not graph.fallbacks and "ops.dspark" not in graph.programs["lowered"]
    assert graph.ops == {"matmul": 2, "linear": 1}


def test_disabled():
    options = {**OPTIONS, "disable": ["raise_attention"]}
    q, k, v = qkv()

    def f(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    got, graph = compiled(f, q, k, v, options=options)
    assert "attention" not in graph.ops
    torch.testing.assert_close(got, f(q, k, v), atol=1e-5, rtol=1e-5)


def test_through_inductor():
    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        s = (q @ k.mT * 0.3).masked_fill(~m, float("-inf"))
        return s.softmax(-1) @ v

    args = (*qkv(), causal(5, 7))
    got, graph = compiled(f, *args, options={"fallback": "error", "verify": True})
    assert graph.ops["attention"] == 1
    torch.testing.assert_close(got, f(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spelling", ["fill", "where", "where not"])
def test_weights_set_to_zero_where_the_mask_forbids(spelling):
    """It changes only rows without an allowed key: they are zero, here and in the op."""
    mask = causal(5, 7)
    mask[2] = False

    def f(q, k, v, mask):
        forbidden = ~mask if spelling != "where" else mask
        scores = q @ k.mT * 0.3
        if spelling == "where":
            weights = torch.where(mask, scores, -math.inf).softmax(-1)
            weights = torch.where(mask, weights, 0.0)
        else:
            weights = scores.masked_fill(forbidden, -math.inf).softmax(-1)
            if spelling == "fill":
                weights = weights.masked_fill(forbidden, 0)
            else:
                weights = torch.where(forbidden, 0.0, weights)
        return weights @ v

    raised(f, *qkv(), mask)


@pytest.mark.parametrize("fill, zero, same", [(-math.inf, 0.5, True), (-math.inf, 0, False)])
def test_weights_changed_otherwise_stay(fill, zero, same):
    mask = causal(5, 7)

    def f(q, k, v, mask):
        scores = (q @ k.mT * 0.3).masked_fill(~mask, fill)
        return scores.softmax(-1).masked_fill(~mask if same else mask, zero) @ v

    rejected(f, *qkv(), mask, reason="go through aten.masked_fill")


class GPTFast(nn.Module):
    """Grouped heads and a static cache, masked by a buffer that positions index."""

    def __init__(self, width=32, heads=4, groups=2, length=12):
        super().__init__()
        self.wqkv = nn.Linear(width, (heads + 2 * groups) * (width // heads), bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.heads, self.groups, self.size = heads, groups, width // heads
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
        self.register_buffer("causal_mask", mask)
        shape = (2, groups, length, width // heads)
        self.register_buffer("k_cache", torch.zeros(shape))
        self.register_buffer("v_cache", torch.zeros(shape))

    def forward(self, x, positions):
        b, t, _ = x.shape
        kv = self.groups * self.size
        q, k, v = self.wqkv(x).split([self.heads * self.size, kv, kv], dim=-1)
        q = q.view(b, t, self.heads, self.size).transpose(1, 2)
        k = k.view(b, t, self.groups, self.size).transpose(1, 2)
        v = v.view(b, t, self.groups, self.size).transpose(1, 2)
        self.k_cache[:, :, positions] = k
        self.v_cache[:, :, positions] = v
        k = self.k_cache.repeat_interleave(self.heads // self.groups, dim=1)
        v = self.v_cache.repeat_interleave(self.heads // self.groups, dim=1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.size)
        scores = scores.masked_fill(~self.causal_mask[None, None, positions], float("-inf"))
        return self.wo((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


def test_gpt_fast_with_a_static_cache():
    model = GPTFast().eval()
    reference = GPTFast().eval()
    reference.load_state_dict(model.state_dict())
    run = torch.compile(model, backend="dspark", options=OPTIONS, dynamic=False)
    with torch.no_grad():
        for positions in (torch.arange(5), torch.tensor([5]), torch.tensor([6])):
            x = torch.randn(2, len(positions), 32)
            got, want = run(x, positions), reference(x, positions)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            graph = last_report().graphs[-1]
            assert graph.ops["attention"] == 1, graph.rejections


# --- Hugging Face ----------------------------------------------------------------------------

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
_LLAMA = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
FAMILIES = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64},
    "falcon": {**_SMALL, "alibi": True},
    "gpt_neox": {**_SMALL, "intermediate_size": 48},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "gpt2": _GPT,
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "llama": _LLAMA,
    "gemma2": {**_LLAMA, "sliding_window": 4},
    "gpt_oss": {**_LLAMA, "num_local_experts": 4, "sliding_window": 4},
    "granite_swa": {**_LLAMA, "sliding_window": 4},
}


def family(name, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name], **ends)
    make = transformers.AutoModelForCausalLM.from_config
    return make(config, attn_implementation="eager").eval().to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face(name, dtype):
    model = family(name, dtype)
    ids = torch.randint(3, 64, (2, 9))
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :3] = 0

    def f(ids, padding):
        return model(ids, attention_mask=padding, use_cache=False).logits[:, 3:]

    n = model.config.num_hidden_layers
    tol = 1e-5 if dtype == torch.float32 else 3e-2
    raised(f, ids, padding, n=n, tol=tol)


@pytest.mark.slow
def test_hugging_face_returned_weights():
    model = family("llama")

    def f(ids):
        out = model(ids, use_cache=False, output_attentions=True)
        return (out.logits, *out.attentions)

    rejected(f, torch.randint(3, 64, (2, 9)), reason="weights are returned")


@pytest.mark.slow
def test_t5_encoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64
    )
    config._attn_implementation = "eager"
    model = transformers.T5EncoderModel(config).eval()
    ids = torch.randint(3, 64, (2, 9))
    raised(lambda ids: model(ids).last_hidden_state, ids, n=2)


def test_a_mask_added_after_a_finite_fill():
    """In a row without an allowed key, keys that both forbid get nothing, the others share."""
    low = torch.finfo(torch.float32).min
    fill = torch.zeros(5, 7, dtype=torch.bool)
    fill[1, :4], fill[2] = True, True
    added = torch.zeros(5, 7)
    added[1, 3:], added[2, 5:] = low, low

    def f(q, k, v, fill, added):
        scores = (q @ k.mT * 0.3).masked_fill(fill, low)
        return (scores + added).softmax(-1) @ v

    raised(f, *qkv(), fill, added)
