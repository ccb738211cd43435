"""The backend on real models: right answers, caches, fallbacks, safety."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile.diagnostics.state import last_report

STRICT = {"inner": "eager", "fallback": "error", "verify": True}


def tiny_llama(**overrides):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 128,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).eval()


def compiled(model, **options):
    return torch.compile(model, backend="dspark", options={**STRICT, **options})


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


class TestWholeModel:
    @torch.no_grad()
    def test_prefill_without_cache(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (2, 9))
        got = compiled(model)(ids, use_cache=False).logits
        assert relative(got, model(ids, use_cache=False).logits) < 1e-5
        last_report().assert_fused("attention", n=2)
        last_report().assert_fused("norm", n=5)
        last_report().assert_fused("rope", n=4)
        last_report().assert_fused("mlp", n=2)

    @torch.no_grad()
    @pytest.mark.parametrize("static", [True, False])
    def test_decode(self, static):
        from transformers import DynamicCache, StaticCache

        model = tiny_llama()
        run = compiled(model)

        def make():
            if static:
                return StaticCache(config=model.config, max_cache_len=32)
            return DynamicCache(config=model.config)

        ours, theirs = make(), make()
        ids = torch.randint(0, 128, (2, 12))
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 10)):
            got = run(ids[:, start:end], past_key_values=ours).logits
            want = model(ids[:, start:end], past_key_values=theirs).logits
            assert relative(got, want) < 1e-5

    @torch.no_grad()
    def test_static_cache_is_written_in_place(self):
        from transformers import StaticCache

        model = tiny_llama()
        run = compiled(model)
        cache = StaticCache(config=model.config, max_cache_len=32)
        ids = torch.randint(0, 128, (1, 4))
        run(ids, past_key_values=cache)
        address = cache.layers[0].keys.data_ptr()
        run(ids[:, :1], past_key_values=cache)
        assert cache.layers[0].keys.data_ptr() == address
        ops = last_report().graphs[-1].ops
        assert ops["cache_append_"] == 4
        assert "cache_append" not in ops

    @torch.no_grad()
    def test_bfloat16(self):
        model = tiny_llama().to(torch.bfloat16)
        ids = torch.randint(0, 128, (1, 9))
        reference = copy.deepcopy(model).float()(ids).logits
        got = compiled(model)(ids).logits
        assert got.dtype == torch.bfloat16
        assert relative(got.float(), reference) < 2 * relative(model(ids).logits.float(), reference)

    @torch.no_grad()
    @pytest.mark.parametrize("batch,length", [(1, 1), (1, 2), (3, 1)])
    def test_edge_shapes(self, batch, length):
        model = tiny_llama()
        ids = torch.randint(0, 128, (batch, length))
        got = compiled(model)(ids, use_cache=False).logits
        want = model(ids, use_cache=False).logits
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_empty_batch(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.qkv = nn.RMSNorm(16), nn.Linear(16, 48)

            def forward(self, x):
                q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        block = Block()
        x = torch.randn(0, 4, 16)
        assert compiled(block)(x).shape == block(x).shape == (0, 1, 4, 16)

    @torch.no_grad()
    def test_left_padding(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (2, 8))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        got = compiled(model)(ids, attention_mask=mask, use_cache=False).logits
        want = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[0, 3:], want[0, 3:], rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def test_dynamic_shapes_one_graph(self):
        model = tiny_llama()
        run = torch.compile(model, backend="dspark", options=STRICT, dynamic=True)
        for length in (5, 9, 17):
            ids = torch.randint(0, 128, (2, length))
            got = run(ids, use_cache=False).logits
            assert relative(got, model(ids, use_cache=False).logits) < 1e-5
        assert len(last_report().graphs) == 1
        last_report().assert_fused("norm", n=5)

    @torch.no_grad()
    @pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_dynamic_floats_of_modules_are_constants(self, inner):
        """``dynamic=True`` makes inputs of them, and an eps that is a tensor is in no norm."""

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.eps, self.weight = 1e-3, nn.Parameter(torch.randn(8))

            def forward(self, x, factor):
                y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
                return y * self.weight * factor

        model, x = Scaled(), torch.randn(3, 8)
        run = torch.compile(
            model, backend="dspark", dynamic=True, options={**STRICT, "inner": inner}
        )
        for factor in (2.0, 3.0):
            torch.testing.assert_close(run(x, factor), model(x, factor))
        assert len(last_report().graphs) == 1  # an argument is as dynamic as it was
        last_report().assert_fused("norm", n=1)
        model.eps = 0.5
        torch.testing.assert_close(run(x, 2.0), model(x, 2.0))

    @torch.no_grad()
    @pytest.mark.slow
    def test_inductor(self):
        from transformers import StaticCache

        model = tiny_llama()
        run = torch.compile(model, backend="dspark", options={"fallback": "error"})
        ours = StaticCache(config=model.config, max_cache_len=16)
        theirs = StaticCache(config=model.config, max_cache_len=16)
        ids = torch.randint(0, 128, (1, 6))
        for start, end in ((0, 4), (4, 5), (5, 6)):
            got = run(ids[:, start:end], past_key_values=ours).logits
            want = model(ids[:, start:end], past_key_values=theirs).logits
            assert relative(got, want) < 1e-5


class TestSafety:
    def test_gradients_go_to_the_inner_compiler_unchanged(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        run = torch.compile(model, backend="dspark", options={"inner": "eager"})
        x = torch.randn(3, 8)
        run(x).square().sum().backward()
        ours = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
        for mine, theirs in zip(ours, (p.grad for p in model.parameters()), strict=True):
            torch.testing.assert_close(mine, theirs)
        assert "gradients are needed" in last_report().fallbacks[0].reason

    @torch.no_grad()
    def test_data_dependent_mask_stays_exact(self):
        class Selective(nn.Module):
            def forward(self, q, k, v):
                scores = q.sum(-1, keepdim=True) + k.sum(-1).unsqueeze(-2)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=scores > 0)

        q, k, v = (torch.randn(2, 3, 6, 8) for _ in range(3))
        run = compiled(Selective())
        torch.testing.assert_close(run(q, k, v), Selective()(q, k, v))
        assert any(r.kind == "mask" for r in last_report().rejections)
        last_report().assert_fused("attention", n=1)

    @torch.no_grad()
    def test_mutated_and_aliased_inputs(self):
        def step(buffer, x):
            buffer[:, 1:3] = x
            view = buffer[:, :2]
            buffer.add_(1)
            return view * 2, buffer.sum()

        x = torch.randn(2, 2)
        mine, theirs = torch.zeros(2, 5), torch.zeros(2, 5)
        got = torch.compile(step, backend="dspark", options=STRICT)(mine, x)
        want = step(theirs, x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(mine, theirs)

    @torch.no_grad()
    def test_output_that_is_a_view_of_an_input(self):
        def f(x):
            return x.t(), x + 1

        x = torch.randn(2, 3)
        view, _ = torch.compile(f, backend="dspark", options=STRICT)(x)
        x.zero_()
        assert view.abs().sum() == 0

    @torch.no_grad()
    def test_clone_stays_a_copy(self):
        def f(x):
            return x.clone(), x.detach().clone().view(-1)

        x = torch.randn(2, 3)
        want = x.clone()
        first, second = torch.compile(f, backend="dspark", options=STRICT)(x)
        x.zero_()
        torch.testing.assert_close(first, want)
        torch.testing.assert_close(second, want.view(-1))

    @torch.no_grad()
    def test_graph_break(self):
        def f(x, norm):
            y = norm(x)
            torch._dynamo.graph_break()
            return norm(y * 2)

        norm, x = nn.RMSNorm(8), torch.randn(2, 8)
        torch.testing.assert_close(
            torch.compile(f, backend="dspark", options=STRICT)(x, norm), f(x, norm)
        )

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
    def test_uncommon_dtypes(self, dtype):
        def f(x, w):
            return (x @ w) * 2 + x.abs().sum()

        x, w = torch.randn(4, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)
        torch.testing.assert_close(
            torch.compile(f, backend="dspark", options=STRICT)(x, w), f(x, w)
        )

    @torch.no_grad()
    def test_float64_model(self):
        model = tiny_llama().double()
        ids = torch.randint(0, 128, (1, 5))
        got = compiled(model)(ids, use_cache=False).logits
        assert got.dtype == torch.float64
        # Norms compute in float32, as the model's own code does.
        assert relative(got, model(ids, use_cache=False).logits) < 1e-6

    @torch.no_grad()
    def test_autocast_falls_back_visibly(self):
        model = nn.Linear(8, 8)
        x = torch.randn(2, 8)
        run = torch.compile(model, backend="dspark", options={"inner": "eager"})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, want = run(x), model(x)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)
        assert "autocast" in last_report().fallbacks[0].reason

    @torch.no_grad()
    def test_tensor_subclasses_go_to_the_inner_compiler_unchanged(self):
        from torch.testing._internal.two_tensor import TwoTensor

        def f(x, w):
            return F.rms_norm(x @ w, (4,))

        x = torch.randn(3, 4)
        w = TwoTensor(torch.randn(4, 4), torch.randn(4, 4))
        run = torch.compile(f, backend="dspark", options={"inner": "eager"})
        got, want = run(x, w), f(x, w)
        torch.testing.assert_close(got.a, want.a)
        torch.testing.assert_close(got.b, want.b)
        assert "TwoTensor" in last_report().fallbacks[0].reason

    def test_inference_mode(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (1, 5))
        with torch.inference_mode():
            got = compiled(model)(ids, use_cache=False).logits
            want = model(ids, use_cache=False).logits
        assert relative(got, want) < 1e-5
        last_report().assert_fused("attention", n=2)

    @torch.no_grad()
    def test_buffers_and_tied_weights(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(11, 8)
                self.norm = nn.RMSNorm(8)
                self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

            def forward(self, ids):
                self.calls += 1
                return F.linear(self.norm(self.embed(ids)), self.embed.weight) * self.calls

        mine = Counter()
        theirs = copy.deepcopy(mine)
        run = compiled(mine)
        ids = torch.randint(0, 11, (2, 3))
        for _ in range(3):
            torch.testing.assert_close(run(ids), theirs(ids))
        assert int(mine.calls) == 3

    @torch.no_grad()
    def test_random_ops_stay_random(self):
        def f(x):
            return torch.rand_like(x) + torch.rand_like(x) * 0 - torch.rand_like(x)

        out = torch.compile(f, backend="dspark", options=STRICT)(torch.zeros(64))
        assert out.abs().max() > 0

    @torch.no_grad()
    def test_a_failing_pass_falls_back(self, monkeypatch):
        from dspark_compile.passes.normalize import Normalize

        def explode(self, graph, ctx):
            raise RuntimeError("boom")

        monkeypatch.setattr(Normalize, "run", explode)
        norm, x = nn.RMSNorm(8), torch.randn(2, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = torch.compile(norm, backend="dspark", options={"inner": "eager"})
            torch.testing.assert_close(run(x), norm(x))
        assert "boom" in last_report().fallbacks[0].reason
        torch._dynamo.reset()
        with pytest.raises(Exception, match="boom"):
            torch.compile(norm, backend="dspark", options=STRICT)(x)


class TestMergedLinears:
    @torch.no_grad()
    def test_numerics_and_sharing(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (2, 9))
        want = model(ids, use_cache=False).logits
        before = sum(p.numel() for p in model.parameters())
        run = compiled(model, merge_linears=True)
        assert relative(run(ids, use_cache=False).logits, want) < 1e-5
        assert last_report().graphs[-1].ops["merged_linear"] >= 2
        attention = model.model.layers[0].self_attn
        assert (
            attention.q_proj.weight.untyped_storage().data_ptr()
            == attention.k_proj.weight.untyped_storage().data_ptr()
        )
        assert sum(p.numel() for p in model.parameters()) == before
        # The model itself still computes the same.
        assert relative(model(ids, use_cache=False).logits, want) < 1e-6

    @torch.no_grad()
    def test_updates_are_seen(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (1, 5))
        run = compiled(model, merge_linears=True)
        run(ids, use_cache=False)
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.mul_(1.5)
        assert relative(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5
        weight.data = torch.randn_like(weight)
        assert relative(run(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 1e-5


class TestOptions:
    def test_unknown_name_lists_the_legal_ones(self):
        with pytest.raises(ValueError, match=r"kv_cach.*did you mean"):
            dspark_compile.Options.parse({"kv_cach": "int8"})

    def test_illegal_value_lists_the_legal_ones(self):
        with pytest.raises(ValueError, match="'model', 'int8'"):
            dspark_compile.Options(kv_cache="int3")
        with pytest.raises(ValueError, match="False, True"):
            dspark_compile.Options(verify=1)

    def test_unknown_pass(self):
        with pytest.raises(ValueError, match="the passes are"):
            dspark_compile.Options(disable=["no_such_pass"])

    @torch.no_grad()
    def test_error_reaches_the_user(self):
        with pytest.raises(Exception, match="unknown option 'colour'"):
            torch.compile(nn.Linear(2, 2), backend="dspark", options={"colour": 1})(
                torch.randn(1, 2)
            )

    @torch.no_grad()
    def test_mode_is_accepted(self):
        model, x = nn.Linear(4, 4), torch.randn(2, 4)
        run = torch.compile(model, backend="dspark", mode="default")
        torch.testing.assert_close(run(x), model(x))
        with pytest.raises(Exception, match="mode"):
            torch.compile(nn.Linear(4, 4), backend="dspark", mode="ludicrous")(x)

    @torch.no_grad()
    def test_disable_a_pass(self):
        model = tiny_llama()
        ids = torch.randint(0, 128, (1, 5))
        compiled(model, disable=["repeat_kv"])(ids, use_cache=False)
        assert "repeat_kv" not in {p.name for p in last_report().graphs[-1].passes}


@pytest.mark.slow
def test_inductor_caches_work_across_processes(tmp_path):
    """A second process finds the rewritten graph in Inductor's caches, report included."""
    import os
    import subprocess
    import sys

    program = """
import torch
from torch._dynamo.utils import counters
import dspark_compile
torch.manual_seed(0)
m = torch.nn.Sequential(torch.nn.RMSNorm(16), torch.nn.Linear(16, 16))
with torch.no_grad():
    torch.compile(m, backend="dspark", options={"fallback": "error"})(torch.randn(4, 16))
dspark_compile.last_report().assert_fused("norm", n=1)
c = counters["aot_autograd"]
print("hits", c["autograd_cache_hit"], "misses", c["autograd_cache_miss"],
      "bypass", c["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"])
"""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    lines = [
        subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert lines == ["hits 0 misses 1 bypass 0", "hits 1 misses 0 bypass 0"]


def test_garbage_is_collected_again_after_a_failure(monkeypatch):
    seen = []

    def broken(*args):
        seen.append(gc.isenabled())
        raise RuntimeError("broken pass")

    monkeypatch.setattr("dspark_compile.backend.run_pipeline", broken)
    model = torch.nn.Linear(4, 4)
    x = torch.randn(2, 4)
    with torch.no_grad():
        run = torch.compile(model, backend="dspark", options={"inner": "eager"})
        torch.testing.assert_close(run(x), model(x))
    assert seen == [False] and gc.isenabled()
