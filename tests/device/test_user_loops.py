"""Loops in user code as launches of one graph: run on the CPU over a stand-in for CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import dspark_compile
from dspark_compile.runtime import device_graph, user_loop
from tests.device.recorder import RecordedGraph
from tests.test_user_loops import QUICK, Own, caches, check, inner_greedy, notes


@pytest.fixture(autouse=True)
def loops(monkeypatch):
    """The loops that run, with graphs on the CPU."""
    monkeypatch.setitem(device_graph.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    seen = []
    original = user_loop.UserLoop.__call__

    def called(self, *args):
        seen.append(self)
        return original(self, *args)

    monkeypatch.setattr(user_loop.UserLoop, "__call__", called)
    return seen


START = torch.tensor([[3], [4]])


def test_a_long_loop_is_launched(loops):
    report = check(inner_greedy, Own().eval(), START, *caches(), 30)
    assert loops[0].launches == 27 and loops[0].reason is None
    assert "one launch a step, if it can be captured" in notes(report)
    assert RecordedGraph.made[0].calls is None  # given back


def test_what_was_before_a_step_and_what_the_last_one_made(loops):
    def decode(model, tok, k, v, n):
        before, text, sums = tok, [], []
        for i in range(n):
            logits = model(tok, k, v, i)
            text.append(before)
            text.append(tok)
            sums.append(logits.sum((1, 2)))
            before = tok
            tok = (logits[:, -1:].argmax(-1) + before) % 61
        return torch.cat(text, 1), torch.stack(sums), before, tok, logits, i

    check(decode, Own().eval(), START, *caches(), 24)
    assert loops[0].launches == 21


def test_short_loops_are_not(loops):
    check(inner_greedy, Own().eval(), START, *caches(), 8)
    assert loops[0].launches == 0 and not RecordedGraph.made


@torch.no_grad()
def test_sampling_makes_the_host_wait_and_says_so(loops):
    def sampled(model, tok, k, v, n):
        out = []
        for i in range(n):
            tok = torch.multinomial(model(tok, k, v, i)[:, -1].softmax(-1), 1)
            out.append(tok)
        return torch.cat(out, 1)

    model = Own().eval()
    compiled = torch.compile(sampled, backend="dspark", fullgraph=True, options=QUICK)
    torch.manual_seed(0)
    got = compiled(model, START, *caches(), 30)
    assert loops[0].launches == 0 and "aten::multinomial" in loops[0].reason
    torch.manual_seed(0)
    assert torch.equal(got, sampled(model, START, *caches(), 30))


@torch.no_grad()
def test_a_race_is_launched_and_draws_what_eager_code_draws(loops):
    def sampled(model, tok, k, v, n):
        out = []
        for i in range(n):
            p = model(tok, k, v, i)[:, -1].softmax(-1)
            tok = torch.argmax(p / torch.empty_like(p).exponential_(1), dim=-1, keepdim=True)
            out.append(tok)
        return torch.cat(out, 1)

    model = Own().eval()
    compiled = torch.compile(sampled, backend="dspark", fullgraph=True, options=QUICK)
    torch.manual_seed(0)
    got = compiled(model, START, *caches(), 30)
    assert loops[0].launches == 27
    torch.manual_seed(0)
    assert torch.equal(got, sampled(model, START, *caches(), 30))
    assert "30 steps, one compiled once" in notes(dspark_compile.last_report())
