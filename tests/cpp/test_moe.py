"""Routers and experts in C++: values against float64, and as stages of a native decode step."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

from dspark_compile.codegen.cpp import isa
from dspark_compile.diagnostics import state
from dspark_compile.kernels import cpp
from dspark_compile.ops import OPS
from dspark_compile.runtime.expert_load import expert_load

GPT_OSS = [1.702, -math.inf, 7.0, -7.0, 7.0, 1.0]


def double(x):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.double()
    return [double(y) for y in x] if isinstance(x, list) else x


def experts(
    dtype, tokens, count=6, k=2, features=72, inner=40, outputs=56, *, lie="rows", gated=True,
    bias=False, limits=(), weigh_input=False, norm=False, lists=False, foreign=False,
):  # fmt: skip
    """Arguments of ``moe_experts``."""
    draw = lambda *shape: (torch.randn(*shape) * 0.2).to(dtype)  # noqa: E731
    if lie == "rows":
        both, down = draw(count, 2 * inner, features), draw(count, outputs, inner)
    else:
        both = draw(count, features, 2 * inner).mT
        down = draw(count, inner, outputs).mT
    gate, up = (both[:, ::2], both[:, 1::2]) if lie == "alternating" else both.chunk(2, 1)
    if not gated:
        up = both[:, :inner]
    biases = [draw(count, inner), draw(count, inner), draw(count, outputs)] if bias else []
    index = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)])
    if foreign:
        index = torch.where(torch.rand(index.shape) < 0.4, count, index)
        index[-1] = -1
    stack = lambda t: list(t) if lists else [t]  # noqa: E731
    return [
        draw(tokens, features) * 5, index, torch.rand(tokens, k).to(dtype),
        stack(gate) if gated else [], stack(up), stack(down),
        stack(biases[0]) if bias and gated else [], stack(biases[1]) if bias else [],
        stack(biases[2]) if bias else [], "silu", list(limits), weigh_input,
        draw(outputs) + 1 if norm else None, 1e-6, "",
    ]  # fmt: skip


def check(name, args, dtype):
    assert cpp.supports(name, *args) is None
    want = OPS[name].reference(*double(args))
    got = getattr(torch.ops.dspark_cpu, name)(*args)
    low = OPS[name].reference(*args)
    scale = want.abs().max().clamp(min=1e-6)
    error = (got.double() - want).abs().max() / scale
    own = (low.double() - want).abs().max() / scale
    assert got.dtype == dtype and error <= max(1e-5, 1.5 * float(own)), (error, own)


VARIANTS = {
    "plain": {},
    "ungated": {"gated": False},
    "halves": {"lie": "halves", "bias": True},
    "alternating": {"lie": "alternating", "bias": True, "limits": GPT_OSS},
    "weighed": {"weigh_input": True},
    "normed": {"norm": True, "foreign": True},
    "lists": {"lists": True, "bias": True},
    "shard": {"foreign": True, "bias": True},
    "one": {"count": 1, "k": 1},
    "all": {"k": 6},
}


@pytest.mark.parametrize("tokens", [2, 7, 40])
def test_experts(tokens):
    check("moe_experts", experts(torch.bfloat16, tokens), torch.bfloat16)
    check("moe_experts", experts(torch.bfloat16, tokens, lists=True), torch.bfloat16)


def test_one_token():
    """Few and many experts, of sizes that fill no vector."""
    for k in (1, 3, 6):
        check("moe_experts", experts(torch.float32, 1, k=k), torch.float32)
    check("moe_experts", experts(torch.float32, 1, count=13, k=11, inner=33), torch.float32)


@pytest.mark.parametrize("reading", isa.READING)
def test_ways_to_read(reading, monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_READ", reading)
    check("moe_experts", experts(torch.bfloat16, 1, k=3), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype):
    for tokens in (1, 6, 50):
        given = {"foreign": False, **VARIANTS[name]} if tokens == 1 else VARIANTS[name]
        check("moe_experts", experts(dtype, tokens, **given), dtype)


@pytest.mark.slow
def test_many_tokens_of_one_expert():
    """More than are packed at a time."""
    args = experts(torch.bfloat16, 600, count=3)
    args[1] = torch.tensor([[1, 2]]).expand(600, 2).contiguous()
    check("moe_experts", args, torch.bfloat16)


@pytest.mark.parametrize("tokens", [4, 16])
def test_a_verification_block_reads_the_union_once(tokens):
    """An expert that nobody chose is not read, and one that several tokens share counts once."""
    args = experts(torch.float32, tokens, count=32)
    chosen = args[1].unique()
    others = [e for e in range(32) if e not in chosen.tolist()]
    args[3:6] = [[t.contiguous() for t in stack] for stack in args[3:6]]
    for stack in args[3:6]:
        stack[0][others] = torch.nan
    args[-1] = "block"
    with expert_load() as load:
        got = torch.ops.dspark_cpu.moe_experts(*args)
    assert others and got.isfinite().all()
    layer = next(layer for layer in load.layers() if layer.site == "block" and layer.calls)
    assert layer.experts_hit == len(chosen) <= 2 * tokens
    assert layer.bytes_read == len(chosen) * sum(s[0][0].nbytes for s in args[3:6])


def test_what_is_refused():
    args = experts(torch.float32, 3)
    assert "a weight bfloat16" in cpp.supports("moe_experts", *args[:5], [args[5][0].bfloat16()],
                                               *args[6:])  # fmt: skip
    args = experts(torch.float32, 3, lie="alternating")
    args[3] = [args[3][0].contiguous()]
    assert "differently" in cpp.supports("moe_experts", *args)


ROUTERS = {
    "softmax": {"scoring": "softmax", "normalise": "sum"},
    "gpt_oss": {"scoring": "identity", "normalise": "softmax", "bias": True},
    "deepseek": {
        "scoring": "sigmoid", "normalise": "sum", "correction": True, "scale": 2.5, "eps": 1e-20,
        "groups": 4, "top_groups": 2, "group_score": "top2",
    },
    "best_of_group": {
        "scoring": "softmax", "normalise": "none", "groups": 4, "top_groups": 1,
        "group_fill": -math.inf,
    },
    "sqrt_softplus": {"scoring": "sqrt_softplus", "normalise": "sum"},
    "sparsemixer": {"scoring": "sparsemixer", "normalise": "none", "eps": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name):
    given = {**ROUTERS[name]}
    bias = torch.randn(24) if given.pop("bias", False) else None
    correction = torch.randn(24) * 0.3 if given.pop("correction", False) else None
    for tokens in (1, 21):
        x, w = torch.randn(tokens, 40), torch.randn(24, 40) * 0.3
        args = (x, w, bias, correction, 3, given["scoring"], given["normalise"])
        rest = {k: v for k, v in given.items() if k not in ("scoring", "normalise")}
        kinds = (torch.float32, torch.float32)
        assert cpp.supports("moe_router", *args, *kinds, **rest) is None
        got = torch.ops.dspark_cpu.moe_router(*args, *kinds, **rest)
        want = OPS["moe_router"].reference(*args, *kinds, **rest)
        torch.testing.assert_close(got[0], want[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(got[2].sort(-1)[0], want[2].sort(-1)[0])
        order, other = got[2].argsort(-1), want[2].argsort(-1)
        torch.testing.assert_close(
            got[1].gather(1, order), want[1].gather(1, other), atol=1e-5, rtol=1e-5
        )


def test_equal_logits_go_where_torch_sends_them():
    x = torch.randn(64, 16).round().bfloat16()
    w = torch.randn(32, 16).sign().bfloat16()  # sums of whole numbers: many are equal
    kinds = (torch.bfloat16, torch.float32)
    got = torch.ops.dspark_cpu.moe_router(x, w, None, None, 4, "softmax", "none", *kinds)
    logits = torch.nn.functional.linear(x, w)
    assert torch.equal(got[0], logits)
    want = logits.float().softmax(-1).topk(4, -1).indices
    assert torch.equal(got[2].sort(-1)[0], want.sort(-1)[0])


def moe_model(dtype):
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        vocab_size=199, hidden_size=64, intermediate_size=96, moe_intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, max_position_embeddings=64,
    )  # fmt: skip
    return tf.Qwen3MoeForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def decode(model, call, ids, batch):
    cache = tf.StaticCache(model.config, max_cache_len=32)
    model(ids[:, :6], past_key_values=cache)
    steps = [call(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, ids.shape[1])]
    return torch.cat(steps, 1)


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_decode_step_is_one_native_call(batch):
    model = moe_model(torch.float32)
    ids = torch.randint(0, 199, (batch, 10))
    options = {"kernels": "auto", "verify": True, "fallback": "error"}
    call = torch.compile(model, backend="dspark", dynamic=False, fullgraph=True, options=options)
    want = decode(model, model, ids, batch)
    got = decode(model, call, ids, batch)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    graph = state.last_report().graphs[-1]
    assert any("one native call" in note for note in graph.notes), graph.notes
    assert graph.ops["moe_router"] == graph.ops["moe_experts"] == 2

    with expert_load() as load:
        decode(model, call, ids, batch)
    layers = load.layers()
    mine = [layer for layer in layers if layer.site.endswith("mlp.experts") and layer.calls == 4]
    assert [layer.site for layer in mine] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    one = 3 * 64 * 48 * 4
    for layer in mine:
        assert layer.tokens == 4 * batch and int(layer.tokens_per_expert.sum()) == 8 * batch
        assert layer.bytes_read == layer.experts_hit * one <= 4 * min(8, 2 * batch) * one
    decode(model, call, ids, batch)  # off again: nothing more is counted
    assert [c.calls for c in load.layers()] == [c.calls for c in layers]
