"""Whole tiny models with ``kernels="cpp"``: the answers of eager, from C++ ops."""

from __future__ import annotations

import copy

import pytest
import torch

from dspark_compile.diagnostics.state import last_report

STRICT = {"inner": "eager", "fallback": "error", "verify": True, "kernels": "cpp"}


def tiny(**overrides):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": 130,
        "max_position_embeddings": 128,
    }
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **overrides})).eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def chosen():
    return {site.impl for site in last_report().graphs[-1].sites if site.status == "raised"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_over_a_static_cache(dtype):
    from transformers import StaticCache

    model = tiny().to(dtype)
    truth = copy.deepcopy(model).double()
    run = torch.compile(model, backend="dspark", options=STRICT)

    def caches():
        return StaticCache(config=model.config, max_cache_len=96)

    ids = torch.randint(0, 130, (1, 14))
    ours, theirs, exact = caches(), caches(), caches()
    for start, end in ((0, 12), (12, 13), (13, 14)):
        step = ids[:, start:end]
        got = run(step, past_key_values=ours).logits.double()
        eager = model(step, past_key_values=theirs).logits.double()
        want = truth(step, past_key_values=exact).logits
        if dtype == torch.float32:
            assert relative(got, eager) < 1e-5
        else:
            assert relative(got, want) < 1.5 * relative(eager, want)
    assert "cpp" in chosen()
    graph = last_report().graphs[-1]
    assert not [f for f in graph.fallbacks if "attention" in str(f) or "linear" in str(f)]


@torch.no_grad()
def test_long_prompts_keep_aten():
    model = tiny()
    ids = torch.randint(0, 130, (1, 30))
    run = torch.compile(model, backend="dspark", options=STRICT)
    assert relative(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5
    assert "30 rows, more than 16" in str(last_report().graphs[-1].fallbacks)


@torch.no_grad()
def test_under_auto_a_declined_kernel_is_a_choice():
    """Not a fallback: the site tells who took it instead, and why."""
    model = tiny()
    ids = torch.randint(0, 130, (1, 30))
    run = torch.compile(model, backend="dspark", options={**STRICT, "kernels": "auto"})
    assert relative(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5
    graph = last_report().graphs[-1]
    assert not graph.fallbacks
    (site, *_) = [s for s in graph.sites if s.kind == "mlp"]
    assert site.impl == "aten" and "30 rows, more than 16" in site.reason


@torch.no_grad()
def test_under_inductor():
    model = torch.nn.Sequential(torch.nn.RMSNorm(32), torch.nn.Linear(32, 48)).eval()
    x = torch.randn(2, 32)
    run = torch.compile(model, backend="dspark", options={"kernels": "cpp"})
    torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
