"""Quantised weights: torchao's and plain spellings become one form, the rest says why not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.codegen.registry import implementations
from dspark_compile.diagnostics.state import last_report
from dspark_compile.ops.quantized import unpack_int4
from dspark_compile.passes.subclasses import CannotDesugar, Rebuild, desugar
from dspark_compile.runtime.packed_int4 import PackedInt4, packed
from tests.spellings import run

N, K = 48, 64


def numbers(n=N, k=K):
    return torch.randint(-128, 128, (n, k), dtype=torch.int8)


def scales(*size, dtype=torch.float32):
    return ((torch.rand(*size) + 0.1) / 128 / K**0.5).to(dtype)


def rejections(graph):
    return [r.condition for r in graph.rejections if r.pass_name == "raise_quantized"]


# -- plain spellings


def dequantize_first(x, q, s):
    return F.linear(x, q.to(x.dtype) * s[:, None])


def by_promotion(x, q, s):
    return x @ (q * s[:, None]).t()


def scale_behind(x, q, s):
    return F.linear(x, q.to(x.dtype)) * s


def scale_behind_mm(x, q, s):
    return (x.reshape(-1, K) @ q.t().to(x.dtype) * s).view(*x.shape[:-1], N)


def packed_mm(x, q, s):
    return torch._weight_int8pack_mm(x.reshape(-1, K), q, s).view(*x.shape[:-1], N)


def transposed_then_scaled(x, q, s):
    return x @ (q.t().to(x.dtype) * s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        dequantize_first,
        by_promotion,
        scale_behind,
        scale_behind_mm,
        packed_mm,
        transposed_then_scaled,
    ],
)
def test_plain_spellings(function, dtype):
    _, graph = run(function, torch.randn(2, 3, K).to(dtype), numbers(), scales(N, dtype=dtype))
    assert graph.ops == {"linear_int8": 1}, (graph.ops, graph.rejections)


def test_groups_zero_points_and_a_bias():
    def f(x, q, s, z, b):
        w = (q.view(N, 2, 32).to(x.dtype) - z.view(N, 2, 1).to(x.dtype)) * s.view(N, 2, 1)
        return F.linear(x, w.view(N, K), b)

    z = torch.randint(-20, 20, (N, 2), dtype=torch.int8)
    _, graph = run(f, torch.randn(5, K), numbers(), scales(N, 2), z, torch.randn(N))
    assert graph.ops == {"linear_int8": 1}, (graph.ops, graph.rejections)


def test_a_bias_behind_the_scale_joins():
    def f(x, q, s, b):
        return F.linear(x, q.to(x.dtype)) * s + b

    _, graph = run(f, torch.randn(5, K), numbers(), scales(N), torch.randn(N))
    assert graph.ops == {"linear_int8": 1}
    assert "aten.add" not in graph.programs["lowered"]


def test_gated_block():
    def f(x, g, gs, u, us, d, ds):
        def linear(y, q, s):
            return F.linear(y, q.to(y.dtype)) * s

        return linear(F.silu(linear(x, g, gs)) * linear(x, u, us), d, ds)

    inner = (numbers(), scales(N))
    args = (torch.randn(4, K), *inner, *(numbers(), scales(N)), numbers(K, N), scales(K))
    _, graph = run(f, *args)
    assert graph.ops == {"gated_mlp_int8": 1}, (graph.ops, graph.rejections)


def test_merged_gate_and_up():
    def f(x, q, s, d, ds):
        gate, up = (F.linear(x, q.to(x.dtype)) * s).chunk(2, -1)
        return F.linear(F.silu(gate) * up, d.to(x.dtype)) * ds

    args = (torch.randn(4, K), numbers(2 * N), scales(2 * N), numbers(K, N), scales(K))
    _, graph = run(f, *args)
    assert graph.ops == {"gated_mlp_int8": 1}, (graph.ops, graph.rejections)


def test_block_without_a_gate_is_two_linears():
    def f(x, u, us, d, ds):
        hidden = F.gelu(F.linear(x, u.to(x.dtype)) * us, approximate="tanh")
        return F.linear(hidden, d.to(x.dtype)) * ds

    _, graph = run(f, torch.randn(4, K), numbers(), scales(N), numbers(K, N), scales(K))
    assert graph.ops == {"linear_int8": 2}, (graph.ops, graph.rejections)


# -- what stays


@pytest.mark.parametrize(
    "reason, function",
    [
        ("are a number", lambda x, q, s: F.linear(x, q.to(x.dtype) * 0.01)),
        ("not one for each row", lambda x, q, s: F.linear(x, q.to(x.dtype) * s[0])),
        ("has no scale", lambda x, q, s: F.linear(x, q.to(x.dtype))),
        ("before the scale", lambda x, q, s: F.linear(x, q.to(x.dtype), s) * s),
        ("scaled twice", lambda x, q, s: F.linear(x, q.to(x.dtype) * s[:, None] * s[:, None])),
        ("not as (q - zero)", lambda x, q, s: F.linear(x, (q.to(x.dtype) * s[:, None]).abs())),
        ("computed in the graph", lambda x, q, s: F.linear(x, q.to(x.dtype) * s.exp()[:, None])),
        ("[in, out]", lambda x, q, s: x[:, :N] @ (q.to(x.dtype) * s[:, None])),
    ],
)
def test_what_is_not_known_says_why(reason, function):
    _, graph = run(function, torch.randn(4, K), numbers(), scales(N))
    found = rejections(graph)
    assert len(found) == 1 and reason in found[0], found
    assert "linear_int8" not in graph.ops


def test_a_product_that_is_read_unscaled_too():
    def f(x, q, s):
        y = F.linear(x, q.to(x.dtype))
        return y * s, y

    _, graph = run(f, torch.randn(4, K), numbers(), scales(N))
    assert "used before it is scaled" in rejections(graph)[0]


# -- torchao


def configs():
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    int4 = {"weight_dtype": torch.int4, "granularity": PerGroup(32)}
    return {
        "int8": Int8WeightOnlyConfig(),
        "int8_groups": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int4": IntxWeightOnlyConfig(**int4),
        "int4_asymmetric": IntxWeightOnlyConfig(**int4, mapping_type=MappingType.ASYMMETRIC),
    }


def tiny_llama(dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int8_groups", "int4", "int4_asymmetric"])
@pytest.mark.parametrize(
    "dtype,kernels,inner",
    [
        pytest.param(torch.float32, "auto", "eager", marks=pytest.mark.slow),
        (torch.bfloat16, "cpp", "eager"),
        pytest.param(torch.float32, "cpp", "inductor", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "auto", "inductor", marks=pytest.mark.slow),
    ],
)
def test_torchao_model(scheme, dtype, kernels, inner):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import StaticCache

    model = tiny_llama(dtype)
    quantization.quantize_(model, configs()[scheme])
    options = {"inner": inner, "fallback": "error", "verify": True, "kernels": kernels}
    compiled = torch.compile(model, backend="dspark", options=options)

    def steps(step):
        cache = StaticCache(model.config, max_cache_len=32)
        ids = torch.arange(40).view(2, 20) % 128
        first = step(ids, past_key_values=cache, use_cache=True).logits[:, -1:]
        return first, step(ids[:, :1], past_key_values=cache, use_cache=True).logits

    for got, want in zip(steps(compiled), steps(model), strict=True):
        limit = 1e-5 if dtype == torch.float32 else 3e-2
        assert (got - want).abs().max() <= limit * want.abs().max()
    prefill, decode = (last_report().graphs[i].ops for i in (0, -1))
    found = implementations("linear_int4", kernels, torch.device("cpu"))
    packs = scheme.startswith("int4") and any(item.name == "cpp" for item in found)
    bits = 4 if packs else 8
    assert prefill["linear_int8"] == 9 and prefill["gated_mlp_int8"] == 2
    assert decode[f"linear_int{bits}"] == 9 and decode[f"gated_mlp_int{bits}"] == 2
    assert "linear" not in decode and "dequantize_weight" not in decode


@torch.no_grad()
def test_weights_may_be_replaced_and_written_to():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(K, N, bias=False))
    quantization.quantize_(model, configs()["int4"])
    other = nn.Sequential(nn.Linear(K, N, bias=False))
    quantization.quantize_(other, configs()["int4"])
    run = torch.compile(model, backend="dspark", options={"inner": "eager", "kernels": "cpp"})
    x = torch.randn(2, K)
    torch.testing.assert_close(run(x), model(x))
    model[0].weight.qdata.copy_(other[0].weight.qdata)
    torch.testing.assert_close(run(x), model(x))
    model[0].weight = copy.deepcopy(other[0].weight)
    torch.testing.assert_close(run(x), other(x))


# -- subclasses


@torch.no_grad()
def test_inner_tensors_of_nested_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    def two(a, b):
        return TwoTensor(a, b)

    w = two(two(torch.randn(4), torch.randn(4)), torch.randn(4))
    rebuild = Rebuild(w)
    assert rebuild.paths == [("a", "a"), ("a", "b"), ("b",)]
    again = rebuild(w.a.a, w.a.b, w.b)
    assert torch.equal(again.a.b, w.a.b) and torch.equal(again.b, w.b)


def test_without_subclasses_nothing_changes():
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    inputs = [torch.ones(2)]
    same, flat, wrap = desugar(module, inputs)
    assert same is module and flat == inputs and wrap(len) is len


def test_a_ragged_tensor_is_refused():
    ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(CannotDesugar, match="NestedTensor"):
        desugar(torch.fx.symbolic_trace(lambda x: x + 1), [ragged])


# -- the packed copy


def test_one_packed_copy_for_all_graphs():
    q = torch.randint(-8, 8, (5, 70), dtype=torch.int8)
    first, second = PackedInt4(1, q), PackedInt4(0, q)
    assert first.value([None, q]) is second.value([q]) is packed(q)
    assert torch.equal(unpack_int4(first.value([None, q]), *q.shape), q)
    q[0, 0] = -q[0, 0] // 2
    assert torch.equal(unpack_int4(first.value([None, q]), *q.shape), q)
    assert first.value([None, q]) is second.value([q])
