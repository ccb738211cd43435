"""The cost model: every op has a formula, and the formulas are what one would count by hand."""

from __future__ import annotations

import pytest
import sympy
import torch

from dspark_compile.codegen.cost import _FORMULAS, Cost, T, cost, of_node, tensor
from dspark_compile.codegen.machine import Machine
from dspark_compile.ops import OPS

B, M, N, K, C = sympy.symbols("B M N K C", positive=True, integer=True)
MACHINE = Machine(
    name="test",
    threads=2,
    read={1: 15e9, 2: 30e9},
    copy={1: 10e9, 2: 20e9},
    cached=60e9,
    cache=4 << 20,
    rates={"float32": 100e9, "bfloat16": 1e12},
    launch=5e-6,
    region=1e-6,
)


def test_every_dialect_op_has_a_formula():
    assert set(OPS) - set(_FORMULAS) == set()


def test_linear_over_symbols():
    c = cost("linear", T((M, K)), T((N, K)))
    assert sympy.simplify(c.bytes - 2 * (M * K + N * K + M * N)) == 0
    assert c.flops == 2 * M * N * K
    small, large = ({M: m, N: 9728, K: 2560} for m in (1, 4096))
    assert c.bound(MACHINE, small) == "memory" and c.bound(MACHINE, large) == "compute"
    assert c.seconds(MACHINE, small) == pytest.approx(2 * 9728 * 2560 / 30e9, rel=0.02)
    with pytest.raises(ValueError, match="no value for"):
        c.seconds(MACHINE, {M: 1})


def test_time_is_that_of_memory_and_arithmetic_and_the_launch():
    c = Cost(sympy.Integer(30_000_000), sympy.S(0), sympy.S(0), torch.float32)
    assert c.seconds(MACHINE) == pytest.approx(1e-3 + 6e-6)
    assert c.seconds(MACHINE, resident=True) == pytest.approx(5e-4 + 6e-6)
    c = Cost(sympy.S(0), sympy.S(0), sympy.Integer(10**9), torch.float32)
    assert c.seconds(MACHINE) == pytest.approx(1e-2 + 6e-6)
    # Neither hides the other: 3 and 4 ms make 5.
    c = Cost(sympy.Integer(90_000_000), sympy.S(0), sympy.Integer(4 * 10**8), torch.float32)
    assert c.seconds(MACHINE) == pytest.approx(5e-3 + 6e-6)
    c = Cost(c.read, c.write, sympy.S(0), torch.bfloat16, vector=c.flops)
    assert c.seconds(MACHINE) == pytest.approx(5e-3 + 6e-6) and (c + c).vector == 2 * c.vector


def test_factors_of_a_machine_scale_the_parts_of_a_time():
    from dataclasses import replace

    slow = replace(
        MACHINE, factors={"memory": 2.0, "compute": 3.0, "score": 5.0}, launch=0, region=0
    )
    c = Cost(sympy.Integer(30_000_000), sympy.S(0), sympy.S(0), torch.bfloat16)
    assert c.seconds(slow) == pytest.approx(2e-3)
    # In cache, memory's factor has no say.
    assert c.seconds(slow, resident=True) == pytest.approx(5e-4)
    c = Cost(sympy.S(0), sympy.S(0), sympy.Integer(10**9), torch.bfloat16, sympy.Integer(10**8))
    assert c.seconds(slow) == pytest.approx(3e-3 + 5e-3)
    even = Cost(sympy.Integer(30_000_000), sympy.S(0), sympy.Integer(9 * 10**8), torch.bfloat16)
    assert even.bound(MACHINE) == "memory" and even.bound(slow) == "compute"


def test_attention_reads_the_keys_that_the_mask_leaves():
    q, kv = T((1, 16, M, 128)), T((1, 8, N, 128))
    args = (q, kv, kv, None, None, [], [])
    whole, part = cost("attention", *args), cost("attention", *args, keys=C)
    cache = 2 * 2 * 8 * 128
    assert whole.read.coeff(N) == cache and part.read.coeff(C) == cache
    assert N not in part.bytes.free_symbols
    int8, scale = T((1, 8, N, 128), torch.int8), T((1, 8, N))
    quantized = cost("attention_int8", q, int8, scale, int8, scale, None, None, [], [])
    assert quantized.read.coeff(N) == 2 * 8 * (128 + 2)


def test_in_place_appends_do_not_move_the_cache():
    cache, new, positions = T((1, 8, N, 64)), T((1, 8, 1, 64)), T((1,), torch.int64)
    assert N not in cost("cache_append_", cache, new, positions).bytes.free_symbols
    assert N in cost("cache_append", cache, new, positions).bytes.free_symbols


def test_every_formula_takes_real_arguments():
    x, w = torch.zeros(2, 8), torch.zeros(6, 8)
    weight = torch.zeros(6, 8, dtype=torch.int8)
    packed = torch.zeros(6, 32, dtype=torch.uint8)
    heads = torch.zeros(1, 2, 3, 8)
    cos = torch.zeros(1, 1, 3, 8)
    cache, positions = torch.zeros(1, 2, 9, 8), torch.arange(3)
    int8, scale = cache.to(torch.int8), torch.zeros(1, 2, 9)
    prepare = (1e-6, 0.0, False, True, 8, False, False)
    front = (heads, heads, heads, None, None, cos, cos)
    mask = (None, None, [], [])
    chosen = (x, torch.zeros(*x.shape[:-1], 2, dtype=torch.int64), torch.zeros(*x.shape[:-1], 2))
    arguments = {
        "linear": (x, w, None),
        "merged_linear": (x, w, None, [2, 4]),
        "matmul": (x, w.t()),
        "gated_mlp": (x, w, w, w.t(), None, None, None, "silu"),
        "gated_mlp_merged": (x, w, torch.zeros(8, 3), None, None, "silu"),
        "mlp": (x, w, w.t(), None, None, "silu"),
        "dequantize_weight": (weight, torch.zeros(6), None, torch.float32),
        "linear_int8": (x, weight, torch.zeros(6, 2), torch.zeros(6, 2), None),
        "linear_int4": (x, packed, torch.zeros(6), None, None),
        "gated_mlp_int8": (x, *[(weight, torch.zeros(6))] * 3, None, None, None, "silu"),
        "gated_mlp_int4": (x, *[(packed, torch.zeros(6))] * 3, None, None, None, "silu"),
        "rms_norm": (x, None, 1e-6),
        "layer_norm": (x, None, None, 1e-6),
        "add_rms_norm": (x, x, None, 1e-6),
        "add_layer_norm": (x, x, None, None, 1e-6),
        "rope": (heads, cos, cos, 8),
        "attention": (heads, cache, cache, *mask),
        "attention_int8": (heads, int8, scale, int8, scale, *mask),
        "mla_attention": (heads, heads, cache[:, 0], cache[:, 0], *mask),
        "cache_append": (cache, heads, positions),
        "cache_extend": (cache, heads),
        "cache_append_": (cache, heads, positions),
        "quantize_kv": (heads, torch.float32),
        "dequantize_kv": (int8, scale, torch.float32),
        "cache_append_int8": (int8, scale, heads, positions),
        "cache_append_int8_": (int8, scale, heads, positions),
        "qk_norm_rope_append": (*front, cache, cache, positions, *prepare),
        "qk_norm_rope_append_": (*front, cache, cache, positions, *prepare),
        "qk_norm_rope_append_int8": (*front, int8, scale, int8, scale, positions, *prepare),
        "qk_norm_rope_append_int8_": (*front, int8, scale, int8, scale, positions, *prepare),
        "moe_router": (x, w, None, None, 2, "softmax", "sum", torch.float32, torch.float32),
        "moe_experts_int8": (
            *chosen,
            *[[weight]] * 3,
            *[[torch.zeros(6, 1)]] * 3,
            *[[]] * 6,
            "silu",
        ),
        "moe_experts_int4": (
            *chosen,
            *[[packed]] * 3,
            *[[torch.zeros(6, 1)]] * 3,
            *[[]] * 6,
            "silu",
        ),
        "moe_experts": (
            x,
            torch.zeros(*x.shape[:-1], 2, dtype=torch.int64),
            torch.zeros(*x.shape[:-1], 2),
            [w],
            [w],
            [w],
            [],
            [],
            [],
            "silu",
        ),
        "grouped_linear": (x, torch.tensor([1, 2, 3, 3]), [w], []),
        "greedy_token": (x,),
        "sample_token": (x, torch.zeros(2)),
    }
    for name in OPS:
        c = cost(name, *arguments[name])
        assert float(c.read) > 0 and float(c.write) > 0 and float(c.flops) >= 0
        assert c.seconds(MACHINE) > 0


def test_symbols_of_a_graph_are_kept():
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x, w):
        return torch.ops.dspark.linear(x, w)

    traced = make_fx(f, tracing_mode="symbolic")(torch.zeros(3, 8), torch.zeros(6, 8))
    (node,) = [
        n for n in traced.graph.nodes if n.op == "call_function" and "dspark" in str(n.target)
    ]
    c = of_node(node)
    symbols = tensor(node.args[0].meta["val"]).numel.free_symbols
    assert symbols and symbols <= c.flops.free_symbols


def test_experts_are_read_once_each():
    def experts(tokens):
        up, down = T((64, 512, 1024)), T((64, 1024, 512))
        x, chosen = T((tokens, 1024)), T((tokens, 8), torch.int64)
        args = (x, chosen, T((tokens, 8)), [up], [up], [down], [], [], [], "silu")
        return cost("moe_experts", *args)

    one = 3 * 512 * 1024 * 2
    assert float(experts(1).read) == pytest.approx(8 * one, rel=1e-3)
    assert float(experts(4096).read) == pytest.approx(64 * one, rel=0.1)
    assert 25 * one < float(experts(4).read) < 32 * one  # fewer than 32: some are shared
    assert experts(M).bytes.free_symbols == {M}
