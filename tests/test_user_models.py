"""Models that nobody wrote for Hugging Face: found by their arithmetic, exact, in place."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dspark_compile.diagnostics.state import last_report
from dspark_compile.models.alibi import Alibi
from dspark_compile.models.dense import Dense
from dspark_compile.models.gpt_fast import GPT
from dspark_compile.models.mla import MLA
from dspark_compile.models.selective import Selective

STRICT = {"inner": "eager", "fallback": "error", "verify": True}


def compiled(model, dynamic=None, **options):
    return torch.compile(model, backend="dspark", dynamic=dynamic, options={**STRICT, **options})


def relative(a, b):
    assert a.isfinite().all()
    return ((a - b).abs().max() / b.abs().max()).item()


def ids(batch, length):
    return torch.randint(0, 97, (batch, length))


def raised(kind, graph=-1):
    report = last_report().graphs[graph]
    return sum(s.kind == kind and s.status == "raised" for s in report.sites)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class TestDense:
    @pytest.mark.parametrize("batch,length", [(2, 9), (1, 1), (1, 2), (3, 1)])
    def test_prefill(self, batch, length):
        model, tokens = Dense.tiny(), ids(batch, length)
        assert relative(compiled(model)(tokens), model(tokens)) < 1e-5
        assert [raised(k) for k in ("attention", "norm", "rope", "mlp")] == [2, 5, 4, 2]

    def test_repeated_heads_are_read_directly(self):
        model, tokens = Dense.tiny(), ids(2, 9)
        compiled(model, keep_programs=True)(tokens)
        program = last_report().graphs[-1].programs["lowered"]
        assert "expand" not in program.split("attention")[0].split("rope")[-1]
        assert "'k <= q'" in program or "mask: k <= q" in program

    def test_dynamic_shapes(self):
        model = Dense.tiny()
        run = compiled(model, dynamic=True)
        for batch, length in ((2, 5), (3, 9), (2, 17)):
            tokens = ids(batch, length)
            assert relative(run(tokens), model(tokens)) < 1e-5
        assert len(last_report().graphs) == 1
        assert raised("attention") == 2

    def test_bfloat16(self):
        model, tokens = Dense.tiny().to(torch.bfloat16), ids(2, 9)
        exact = copy.deepcopy(model).float()(tokens)
        got = compiled(model)(tokens)
        assert got.dtype == torch.bfloat16
        assert relative(got.float(), exact) < 2 * relative(model(tokens).float(), exact)


class TestGPTFast:
    @staticmethod
    def steps(model, run, other, batch=1, dtype_tolerance=1e-5):
        tokens = ids(batch, 12)
        for start, end in ((0, 7), (7, 8), (8, 9), (9, 12)):
            at = torch.arange(start, end)
            got, want = run(tokens[:, start:end], at), other(tokens[:, start:end], at)
            assert relative(got, want) < dtype_tolerance

    @pytest.mark.parametrize("batch", [1, 2])
    def test_prefill_and_decode(self, batch):
        model = GPT.tiny(batch)
        self.steps(model, compiled(model), copy.deepcopy(model), batch)
        for graph in range(len(last_report().graphs)):
            sites = [raised(k, graph) for k in ("attention", "norm", "rope", "mlp", "cache")]
            assert sites == [2, 5, 4, 2, 4]

    def test_buffers_are_written_in_place(self):
        model = GPT.tiny()
        run = compiled(model)
        cache = model.layers[0].attention.kv_cache
        address = cache.k.data_ptr()
        run(ids(1, 3), torch.arange(3))
        assert cache.k.data_ptr() == address
        assert cache.k[:, :, :3].abs().amin() > 0
        assert cache.k[:, :, 3:].abs().max() == 0
        ops = last_report().graphs[-1].ops
        assert ops["cache_append_"] == 4
        assert "cache_append" not in ops

    def test_a_changed_mask_buffer_is_seen(self):
        """The mask is data of a buffer, which its owner may change: nothing is baked in."""
        model = GPT.tiny()
        run, tokens, at = compiled(model), ids(1, 6), torch.arange(6)
        run(tokens, at)
        model.causal_mask[:, 1] = False
        other = copy.deepcopy(model)
        assert relative(run(tokens, at), other(tokens, at)) < 1e-5
        assert len(last_report().graphs) == 1

    def test_int8_cache(self):
        model = GPT.tiny()
        self.steps(model, compiled(model, kv_cache="int8"), copy.deepcopy(model), 1, 2e-2)
        assert last_report().graphs[-1].ops["attention_int8"] == 2

    def test_bfloat16(self):
        model = GPT.tiny()
        exact = copy.deepcopy(model)
        model = model.to(torch.bfloat16)
        eager, tokens, at = copy.deepcopy(model), ids(1, 9), torch.arange(9)
        got, want = compiled(model)(tokens, at).float(), exact(tokens, at)
        assert relative(got, want) < 2 * relative(eager(tokens, at).float(), want)


class TestAlibi:
    def test_prefill_and_decode(self):
        model = Alibi.tiny()
        run = compiled(model)
        got, ours = run(ids(2, 9))
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, tokens = Alibi.tiny(), ids(2, 9)
        run = compiled(model)
        (got, ours), (want, theirs) = run(tokens), model(tokens)
        assert relative(got, want) < 1e-5
        for _ in range(3):
            token = ids(2, 1)
            (got, ours), (want, theirs) = run(token, ours), model(token, theirs)
            assert relative(got, want) < 1e-5
        for graph in range(len(last_report().graphs)):
            assert [raised(k, graph) for k in ("attention", "norm", "mlp")] == [2, 5, 2]
        assert raised("cache") == 4

    def test_bias_stays(self):
        """A causal predicate alone would forget the slopes."""
        model, tokens = Alibi.tiny(), ids(1, 12)
        run = compiled(model)
        assert relative(run(tokens)[0], model(tokens)[0]) < 1e-5
        model.slopes.zero_()
        assert relative(run(tokens)[0], model(tokens)[0]) < 1e-5

    @pytest.mark.slow
    def test_dynamic_shapes(self):
        model = Alibi.tiny()
        run = compiled(model, dynamic=True)
        for length in (5, 9, 17):
            tokens = ids(2, length)
            assert relative(run(tokens)[0], model(tokens)[0]) < 1e-5
        assert len(last_report().graphs) == 1


class TestSelective:
    def test_exact_and_said(self):
        model, tokens = Selective.tiny(), ids(2, 9)
        assert relative(compiled(model)(tokens), model(tokens)) < 1e-5
        assert [raised(k) for k in ("attention", "norm", "mlp")] == [2, 5, 2]
        rejected = [r for r in last_report().rejections if r.kind == "mask"]
        assert len(rejected) == 2
        assert "data" in rejected[0].condition
        assert "selective.py" in rejected[0].source

    def test_the_mask_matters(self):
        """The test would not notice a forgotten mask if the mask did nothing."""
        model, tokens = Selective.tiny(), ids(2, 9)
        want = model(tokens)
        sdpa = F.scaled_dot_product_attention
        try:
            F.scaled_dot_product_attention = lambda q, k, v, attn_mask: sdpa(
                q, k, v, is_causal=True
            )
            assert relative(model(tokens), want) > 1e-2
        finally:
            F.scaled_dot_product_attention = sdpa

    def test_dynamic_shapes(self):
        model = Selective.tiny()
        run = compiled(model, dynamic=True)
        for length in (5, 9):
            tokens = ids(2, length)
            assert relative(run(tokens), model(tokens)) < 1e-5

    def test_bfloat16(self):
        """In bf16 a selector near 0 may flip; what is masked must still be what eager masks."""
        model, tokens = Selective.tiny().to(torch.bfloat16), ids(2, 9)
        assert relative(compiled(model)(tokens).float(), model(tokens).float()) < 5e-2


class TestMLA:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_prefill_and_decode(self, batch):
        model = MLA.tiny(batch)
        run, other, tokens = compiled(model), copy.deepcopy(model), ids(batch, 36)
        for start, end in ((0, 32), (32, 33), (33, 34), (34, 36)):
            at = torch.arange(start, end)
            assert relative(run(tokens[:, start:end], at), other(tokens[:, start:end], at)) < 1e-5
        prefill, decode = last_report().graphs[:2]
        assert prefill.ops["attention"] == 2
        assert decode.ops["mla_attention"] == 2
        assert decode.ops["linear"] == prefill.ops["linear"] - 2
        for graph in range(len(last_report().graphs)):
            sites = [raised(k, graph) for k in ("attention", "norm", "rope", "mlp", "cache")]
            assert sites == [2, 9, 4, 2, 4]
            assert last_report().graphs[graph].ops["cache_append_"] == 4


class TestCaches:
    def test_a_view_of_the_old_cache_read_after_the_write(self):
        def step(cache, values, query, new, at):
            old = cache[:, :, :5].clone()
            cache.index_copy_(2, at, new)
            values.index_copy_(2, at, new)
            return F.scaled_dot_product_attention(query, cache, values), old * 2

        ours = [torch.randn(1, 2, 8, 4) for _ in range(2)]
        theirs = [c.clone() for c in ours]
        query, new, at = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4), torch.tensor([2])
        got = compiled(step)(*ours, query, new, at)
        want = step(*theirs, query, new, at)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("batch", [1, 2])
    def test_indexed_assignment(self, batch):
        def step(k_cache, v_cache, query, new, at):
            k_cache[:, :, at] = new
            v_cache[:, :, at] = new * 2
            return F.scaled_dot_product_attention(query, k_cache, v_cache)

        ours = [torch.randn(batch, 2, 8, 4) for _ in range(2)]
        theirs = [c.clone() for c in ours]
        query, new = torch.randn(batch, 2, 3, 4), torch.randn(batch, 2, 2, 4)
        at = torch.tensor([4, 2])
        got, want = compiled(step)(*ours, query, new, at), step(*theirs, query, new, at)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(ours, theirs)
        assert last_report().graphs[-1].ops["cache_append_"] == 2
