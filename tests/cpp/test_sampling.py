"""Loops in user code that sample: one native loop, the right distribution, seeds reproduce."""

from __future__ import annotations

import copy

import pytest
import torch

import dspark_compile
from dspark_compile.codegen.cpp import sampling
from dspark_compile.kernels.cpp._launch import run
from tests.test_user_loops import Own, caches, notes

OPTIONS = {"kernels": "cpp"}


# ------------------------------------------------------------------------------------- the stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_and_topk(dtype):
    x = (3 * torch.randn(3, 1003)).to(dtype)
    x[1, 5:] = -torch.inf
    call, got = sampling.softmax(x, dtype)
    run(call)
    torch.testing.assert_close(got, x.softmax(-1), rtol=1e-5 if dtype == torch.float32 else 8e-3,
                               atol=1e-6)  # fmt: skip
    assert not got[1, 5:].any()
    call, (values, indices) = sampling.topk(x, 4)
    run(call)
    assert torch.equal(values, x.topk(4).values) and torch.equal(x.gather(1, indices), values)


def test_a_draw_is_the_inverse_of_the_sums():
    p = torch.rand(64, 77) * (torch.rand(64, 77) > 0.5)
    uniform = torch.rand(64)
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-24])
    call, got = sampling.draw(p, uniform, (64, 1))
    run(call)
    shares = p.double().cumsum(1) / p.double().sum(1, keepdim=True)
    want = (shares <= uniform[:, None]).sum(1)
    assert torch.equal(got[:, 0], want.clamp(max=76)) and p.gather(1, got).gt(0).all()


@pytest.mark.parametrize("bad", [torch.nan, -1.0, torch.inf, 0.0])
def test_what_are_no_weights(bad):
    p = torch.rand(2, 9) if bad else torch.zeros(2, 9)
    p[1, 3] = bad
    call, _ = sampling.draw(p, torch.rand(2), (2, 1))
    with pytest.raises(RuntimeError, match="probabilities to draw from are inf, nan, below 0"):
        run(call, threads=1)


def test_what_are_no_weights_in_a_race():
    """Arg-max takes the first NaN, and of zeros the first."""
    p = torch.zeros(3, 9)
    p[0, 4:6] = torch.nan
    p[2, 7] = 1
    call, got = sampling.draw(p, torch.rand(3), (3, 1), race=True)
    run(call, threads=1)
    assert got.flatten().tolist() == [4, 0, 7]


# -------------------------------------------------------------------------------------- the loops


def multinomial(p):
    return torch.multinomial(p, 1)


def race(p):
    noise = torch.empty_like(p).exponential_(1)
    return torch.argmax(p / noise, dim=-1, keepdim=True)


def decode(model, tok, k, v, n, draw, how):
    out = []
    for i in range(n):
        z = model(tok, k, v, i)[:, -1] / 0.8
        pivot = z.topk(12).values[:, -1:]
        if how == "where":
            z = torch.where(z < pivot, -float("inf"), z)
        elif how == "fill":
            z = z.masked_fill(z < pivot, -float("inf"))
        elif how == "put":
            z[z < pivot] = -float("inf")
        tok = draw(z.softmax(-1))
        out.append(tok)
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "draw, how", [(multinomial, "where"), (race, "fill"), (multinomial, "put")]
)
@torch.no_grad()
def test_a_sampled_loop_is_one_native_loop(draw, how):
    model, n = Own().eval(), 6
    compiled = torch.compile(decode, backend="dspark", fullgraph=True, options=OPTIONS)
    start = torch.full((16, 1), 3)

    def ours(seed):
        torch.manual_seed(seed)
        return compiled(model, start.clone(), *caches(rows=16), n, draw, how)

    first, again, other = ours(0), ours(0), ours(1)
    assert "6 steps, one compiled once: a native loop" in notes(dspark_compile.last_report())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(first.flatten().tolist())) > 12  # numbers differ from step to step
    # The last step's tokens against eager code's: chi-square, at 5 sigma.
    mine, theirs = torch.zeros(61), torch.zeros(61)
    for seed in range(60):
        mine += torch.bincount(ours(seed)[:, -1], minlength=61)
        eager = decode(model, start.clone(), *caches(rows=16), n, multinomial, "where")
        theirs += torch.bincount(eager[:, -1], minlength=61)
    distance = ((mine - theirs) ** 2 / (mine + theirs).clamp(min=1)).sum()
    assert distance < 60 + 5 * (2 * 60) ** 0.5


@torch.no_grad()
def test_a_step_alone_draws_anew_at_every_call():
    model = Own().eval()

    def step(tok, k, v):
        return multinomial(model(tok, k, v, 2)[:, -1].softmax(-1))

    compiled = torch.compile(step, backend="dspark", fullgraph=True, options=OPTIONS)
    k, v = caches(rows=16)
    tok = torch.full((16, 1), 3)
    texts = [compiled(tok, k, v).clone() for _ in range(6)]
    assert "one native call" in notes(dspark_compile.last_report())
    assert any(not torch.equal(texts[0], x) for x in texts[1:])


@torch.no_grad()
def test_a_race_of_what_may_be_negative_is_left_alone():
    def step(model, tok, k, v):
        return race(model(tok, k, v, 2)[:, -1])  # logits, no weights

    compiled = torch.compile(
        step, backend="dspark", fullgraph=True, options={"kernels": "cpp", "inner": "auto"}
    )
    compiled(Own().eval(), torch.full((2, 1), 3), *caches())
    assert "not one native call: e" in notes(dspark_compile.last_report())  # noise, or its memory


@torch.no_grad()
def test_top_p_is_a_native_loop():
    """A sort, the sums of what is larger, a draw, and back: of many rows each token is a nucleus's,
    and as frequent as its share there."""

    def nucleus(p):
        ordered, order = p.sort(-1, descending=True)
        kept = ordered * ((ordered.cumsum(-1) - ordered) < 0.6)
        return order.gather(1, torch.multinomial(kept, 1))

    def text(model, tok, k, v, n):
        for i in range(n):
            tok = nucleus(model(tok, k, v, i)[:, -1].softmax(-1))
        return tok

    def step(model, tok, k, v):
        return nucleus(model(tok, k, v, 0)[:, -1].softmax(-1))

    model, rows = Own().eval(), 16
    first = torch.full((rows, 1), 3)
    compiled = torch.compile(text, backend="dspark", fullgraph=True, options=OPTIONS)
    assert compiled(model, first, *caches(rows=rows), 5).shape == (rows, 1)
    assert "a native loop" in notes(dspark_compile.last_report())
    p = model(first, *caches(rows=rows), 0)[0, -1].softmax(-1)
    ordered, order = p.sort(descending=True)
    kept = order[(ordered.cumsum(0) - ordered) < 0.6]
    compiled = torch.compile(step, backend="dspark", fullgraph=True, options=OPTIONS)
    torch.manual_seed(0)
    drawn = torch.cat([compiled(model, first, *caches(rows=rows)) for _ in range(200)])
    assert "one native call" in notes(dspark_compile.last_report())
    assert set(drawn.flatten().tolist()) <= set(kept.tolist())
    share = p[kept] / p[kept].sum()
    counts = torch.bincount(drawn.flatten(), minlength=len(p))[kept] / len(drawn)
    assert (counts - share).abs().max() < 0.06  # more than 6 standard deviations of 3200 draws


@torch.no_grad()
def test_what_samples_otherwise_is_no_native_loop():
    def at_most_five(model, tok, k, v, n):
        for i in range(n):
            p = model(tok, k, v, i)[:, -1].softmax(-1)
            least = p.kthvalue(p.shape[-1] - 5, dim=-1, keepdim=True).values
            tok = torch.multinomial(p * (p > least), 1)
        return tok

    model = Own().eval()
    compiled = torch.compile(
        at_most_five, backend="dspark", fullgraph=True, options={"kernels": "cpp", "inner": "auto"}
    )
    args = (torch.tensor([[3], [4]]), *caches(), 5)
    torch.manual_seed(0)
    got = compiled(model, *copy.deepcopy(args))
    assert got.shape == (2, 1)
    said = notes(dspark_compile.last_report())
    assert "not one native call: kthvalue" in said and "one compiled call a step" in said
