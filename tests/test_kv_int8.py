"""int8 caches inserted by the compiler, and `CompressedCache` under it."""

from __future__ import annotations

import pytest
import torch

import dspark_compile
from dspark_compile.diagnostics.state import last_report

transformers = pytest.importorskip("transformers")

STRICT = {"inner": "eager", "fallback": "error", "verify": True}


def tiny(head_dim=64):
    config = transformers.Qwen3Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=128,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def static(model, length=32):
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def decode(run, cache, ids, splits):
    start, out = 0, []
    for rows in splits:
        out.append(run(ids[:, start : start + rows], past_key_values=cache).logits)
        start += rows
    return torch.cat(out, 1)


@torch.no_grad()
def test_static_cache_lives_in_int8():
    model = tiny()
    run = torch.compile(model, backend="dspark", options={**STRICT, "kv_cache": "int8"})
    ids = torch.randint(0, 128, (2, 12))
    cache = static(model)
    got = decode(run, cache, ids, (7, 1, 1, 3))
    want = model(ids, use_cache=False).logits
    assert (got - want).abs().max() < 0.03 * want.abs().max()
    report = last_report()
    # The first graph makes the cache; every later one has it in int8.
    for graph in report.graphs[1:]:
        assert graph.ops["attention_int8"] == 2
        assert "attention" not in graph.ops
        assert len(graph.kv_plan) == 4
    entry = report.graphs[-1].kv_plan[0]
    assert entry.bytes_after <= 0.53 * entry.bytes_before / 2  # the model is float32
    layer = cache.layers[0]
    for read in (lambda: layer.keys.sum(), lambda: layer.keys.clone(), lambda: cache.reset()):
        with pytest.raises(RuntimeError, match="compressed to int8"):
            read()
    exact = dspark_compile.decompress_cache(cache)
    assert exact is not None
    assert torch.isfinite(layer.keys).all()


@torch.no_grad()
def test_two_caches_do_not_mix():
    model = tiny()
    run = torch.compile(model, backend="dspark", options={**STRICT, "kv_cache": "int8"})
    first, second = torch.randint(0, 128, (2, 1, 8))
    caches = static(model), static(model)
    decode(run, caches[0], first, (4, 1))
    decode(run, caches[1], second, (4, 1))
    got = run(first[:, 5:6], past_key_values=caches[0]).logits
    want = model(first[:, :6], use_cache=False).logits[:, -1:]
    assert (got - want).abs().max() < 0.03 * want.abs().max()


@torch.no_grad()
def test_reset_cache_starts_again():
    model = tiny()
    run = torch.compile(model, backend="dspark", options={**STRICT, "kv_cache": "int8"})
    cache = static(model)
    ids = torch.randint(0, 128, (1, 8))
    decode(run, cache, ids, (4, 1, 1))
    dspark_compile.reset_cache(cache)
    other = torch.randint(0, 128, (1, 6))
    got = decode(run, cache, other, (4, 1, 1))
    want = model(other, use_cache=False).logits
    assert (got - want).abs().max() < 0.03 * want.abs().max()


@torch.no_grad()
def test_exact_is_the_default():
    model = tiny()
    run = torch.compile(model, backend="dspark", options=STRICT)
    cache = static(model)
    ids = torch.randint(0, 128, (1, 6))
    decode(run, cache, ids, (4, 1, 1))
    assert not last_report().kv_plan
    assert torch.isfinite(cache.layers[0].keys).all()


@torch.no_grad()
def test_a_cache_that_is_read_otherwise_stays_exact():
    class Peek(torch.nn.Module):
        def forward(self, cache_k, cache_v, k, v, q, positions):
            cache_k.index_copy_(2, positions, k)
            cache_v.index_copy_(2, positions, v)
            out = torch.nn.functional.scaled_dot_product_attention(q, cache_k, cache_v)
            return out, cache_k.mean()

    options = {**STRICT, "kv_cache": "int8"}
    run = torch.compile(Peek(), backend="dspark", options=options)
    cache = [torch.randn(1, 2, 8, 16) for _ in range(2)]
    mine, theirs = [c.clone() for c in cache], [c.clone() for c in cache]
    new = [torch.randn(1, 2, 1, 16) for _ in range(3)]
    got = run(*mine, *new, torch.tensor([3]))
    want = Peek()(*theirs, *new, torch.tensor([3]))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine, theirs)
    assert any("also used by" in r.condition for r in last_report().rejections)


@torch.no_grad()
def test_compressed_cache_is_fused():
    model = tiny()
    run = torch.compile(model, backend="dspark", options=STRICT)
    ids = torch.randint(0, 128, (1, 9))
    ours = dspark_compile.CompressedCache(model.config, max_cache_len=32)
    theirs = dspark_compile.CompressedCache(model.config, max_cache_len=32)
    got = decode(run, ours, ids, (6, 1, 1, 1))
    want = decode(model, theirs, ids, (6, 1, 1, 1))
    assert (got - want).abs().max() < 1e-3 * want.abs().max()
    assert last_report().graphs[-1].ops["attention_int8"] == 2
    assert "dequantize_kv" not in last_report().graphs[-1].ops


@torch.no_grad()
def test_overflow_is_an_error():
    model = tiny()
    run = torch.compile(model, backend="dspark", options=STRICT)
    cache = static(model, length=8)
    ids = torch.randint(0, 128, (1, 12))
    with pytest.raises((RuntimeError, IndexError)):
        decode(run, cache, ids, (8, 1, 1, 1))
