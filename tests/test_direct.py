"""Graphs that run without an inner compiler: which, why not, and their results."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import transformers as tf
from torch import nn

from dspark_compile.backend import dspark
from dspark_compile.diagnostics import state

SIZES = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
AUTO = {"kernels": "auto", "inner": "auto", "fallback": "error", "verify": True}


def machine(monkeypatch, bandwidth):
    """A machine whose memory reads this fast: the slower, the less calls weigh."""
    known = {
        "name": "test", "threads": torch.get_num_threads(), "read": {"1": bandwidth},
        "copy": {"1": 1e12}, "cached": bandwidth, "cache": 1 << 20, "rates": {"float32": 1e12},
        "launch": 1e-6, "region": 1e-6, "busy": False,
    }  # fmt: skip
    monkeypatch.setenv("DSPARK_MACHINE", json.dumps(known))


def notes():
    return state.last_report().graphs[-1].notes[-1]


@torch.no_grad()
def test_a_prompt_runs_without_inductor(monkeypatch):
    machine(monkeypatch, 1e8)
    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES)).eval()
    compiled = torch.compile(model, backend="dspark", dynamic=False, options=AUTO)
    mine, eager = (tf.StaticCache(model.config, max_cache_len=64) for _ in range(2))
    for _ in range(2):  # the first call makes the caches, the second appends to them
        ids = torch.randint(3, 199, (1, 24))
        got = compiled(ids, past_key_values=mine).logits
        want = model(ids, past_key_values=eager).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert notes().startswith("no inner compiler"), notes()
        for layer, other in zip(mine.layers, eager.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.values, other.values, rtol=1e-5, atol=1e-5)
    assert mine.layers[0].keys.data_ptr() != mine.layers[1].keys.data_ptr()
    sites = state.last_report().graphs[-1].sites
    assert {s.impl for s in sites if s.kind in ("norm", "rope", "cache")} == {"cpp"}


class Body(nn.Module):
    def __init__(self, then=lambda y: y):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.then = then

    def forward(self, x):
        return self.then(self.linear(x))


def compiled_with(monkeypatch, model, x, *, stub=True, **options):
    """The last note of compiling ``model``; Inductor itself is left out."""
    calls = []

    def inductor(gm, *args):
        calls.append(gm)
        return gm.forward

    if stub:
        monkeypatch.setattr("dspark_compile._torch_compat.inductor", inductor)
    run = torch.compile(model, backend="dspark", options={**AUTO, **options})
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    return notes(), len(calls)


def test_what_inductor_would_fuse_goes_to_it(monkeypatch):
    machine(monkeypatch, 1e12)
    chain = Body(lambda y: (y.sin() + y.cos()) * y.abs())
    note, calls = compiled_with(monkeypatch, chain, torch.randn(32, 64))
    assert "compiled by Inductor: fusing what lies between kernels saves" in note and calls == 1


def test_the_cost_decides(monkeypatch):
    machine(monkeypatch, 1e6)  # the product takes 30 ms
    chain = Body(lambda y: (y.sin() + y.cos()) * y.abs())
    note, calls = compiled_with(monkeypatch, chain, torch.randn(32, 64))
    assert note.startswith("no inner compiler") and calls == 0


def test_inner_inductor_is_always_inductor(monkeypatch):
    machine(monkeypatch, 1e6)
    _, calls = compiled_with(monkeypatch, Body(), torch.randn(32, 64), inner="inductor")
    assert calls == 1


@pytest.mark.parametrize(
    "then,reason",
    [
        (lambda y: y[y[:, 0] > -9], "dynamic size"),
        (lambda y: y @ y.mT.softmax(-1), None),
    ],
)
def test_what_is_not_counted_goes_to_inductor(monkeypatch, then, reason):
    machine(monkeypatch, 1e6)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        note, calls = compiled_with(monkeypatch, Body(then), torch.randn(32, 64))
    assert (calls == 1) == (reason is not None)
    assert reason is None or reason in note


def test_a_graph_without_kernels_of_ours(monkeypatch):
    model = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    note, calls = compiled_with(monkeypatch, model, torch.randn(32, 64))
    assert "no kernel of ours takes part" in note and calls == 1


@pytest.mark.parametrize("mode,calls", [(None, 0), ("max-autotune-no-cudagraphs", 1)])
def test_a_torch_compile_mode_is_inductors(monkeypatch, mode, calls):
    """A graph that would run as it is goes to Inductor where a mode of Inductor's is asked for."""
    machine(monkeypatch, 1e6)
    seen = []
    monkeypatch.setattr(
        "dspark_compile._torch_compat.inductor", lambda gm, *a: seen.append(a) or gm.forward
    )
    run = torch.compile(Body(), backend=functools.partial(dspark, mode=mode, options=AUTO))
    with torch.no_grad():
        run(torch.randn(32, 64))
    assert len(seen) == calls
