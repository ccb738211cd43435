"""absorb_mla: every spelling of latent attention is absorbed when it pays, and only then."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dspark_compile.codegen.aten import FORMS
from dspark_compile.diagnostics.state import last_report
from dspark_compile.ops import OPS

STRICT = {"inner": "eager", "fallback": "error", "verify": True}
H, DN, DR, DV, R = 3, 8, 4, 6, 12


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def compiled(function, dynamic=None, **options):
    return torch.compile(function, backend="dspark", dynamic=dynamic, options={**STRICT, **options})


def operands(rows=1, keys=64, batch=2, dtype=torch.float32):
    shapes = ((batch, H, rows, DN), (batch, H, rows, DR), (batch, keys, R), (batch, keys, DR))
    return [torch.randn(s, dtype=dtype) for s in (*shapes, (H * (DN + DV), R))]


def shared(k_rope):
    return k_rope[:, None].expand(-1, H, -1, -1)


def attend(q, q_rope, k, k_rope, v, **kwargs):
    query, key = torch.cat((q, q_rope), -1), torch.cat((k, shared(k_rope)), -1)
    return F.scaled_dot_product_attention(query, key, v, **kwargs)


def view_first(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    return attend(q, q_rope, kv[..., :DN], k_rope, kv[..., DN:])


def split_first(q, q_rope, c, k_rope, w):
    k, v = F.linear(c, w).view(*c.shape[:2], H, DN + DV).split([DN, DV], -1)
    return attend(q, q_rope, k.transpose(1, 2), k_rope, v.transpose(1, 2))


def two_projections(q, q_rope, c, k_rope, w):
    k, v = F.linear(c, w[: H * DN]), F.linear(c, w[H * DN :])
    k = k.view(*c.shape[:2], H, DN).transpose(1, 2)
    return attend(q, q_rope, k, k_rope, v.view(*c.shape[:2], H, DV).transpose(1, 2))


def blocks(q, q_rope, c, k_rope, w):
    k, v = F.linear(c, w).split([H * DN, H * DV], -1)
    k = k.view(*c.shape[:2], H, DN).transpose(1, 2)
    return attend(q, q_rope, k, k_rope, v.view(*c.shape[:2], H, DV).transpose(1, 2))


def one_head_cache(q, q_rope, c, k_rope, w):
    c = c[:, None]
    kv = F.linear(c, w).view(c.shape[0], c.shape[2], H, DN + DV).transpose(1, 2)
    return attend(q, q_rope, kv[..., :DN], k_rope, kv[..., DN:])


def rotary_first(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    query = torch.cat((q_rope, q), -1)
    key = torch.cat((shared(k_rope), kv[..., :DN]), -1)
    return F.scaled_dot_product_attention(query, key, kv[..., DN:])


def filled(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    key = kv.new_empty(*kv.shape[:-1], DN + DR)
    key[..., :DN].copy_(kv[..., :DN])
    key[..., DN:].copy_(shared(k_rope))
    return F.scaled_dot_product_attention(torch.cat((q, q_rope), -1), key, kv[..., DN:])


def normed(q, q_rope, c, k_rope, w):
    return view_first(q, q_rope, F.rms_norm(c, (R,)), k_rope, w)


def whole_query(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    query = torch.cat((q, q_rope), -1) * 2
    key = torch.cat((kv[..., :DN], shared(k_rope)), -1)
    return F.scaled_dot_product_attention(query, key, kv[..., DN:])


def masked(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    bias = torch.sin(c.sum(-1))[:, None, None, :]
    return attend(q, q_rope, kv[..., :DN], k_rope, kv[..., DN:], attn_mask=bias, scale=0.3)


def eager(q, q_rope, c, k_rope, w):
    kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
    query, key = torch.cat((q, q_rope), -1), torch.cat((kv[..., :DN], shared(k_rope)), -1)
    p = torch.softmax(query @ key.transpose(-1, -2) * 0.25, -1, dtype=torch.float32)
    return p.to(q.dtype) @ kv[..., DN:]


SPELLINGS = [
    view_first,
    split_first,
    two_projections,
    blocks,
    one_head_cache,
    rotary_first,
    filled,
    normed,
    whole_query,
    masked,
    eager,
]


class TestSpellings:
    @pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
    def test_absorbed(self, function):
        args = operands()
        got, want = compiled(function)(*args), function(*args)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        ops = last_report().graphs[-1].ops
        assert ops["mla_attention"] == 1
        assert "linear" not in ops
        assert "attention" not in ops
        last_report().assert_fused("attention", n=1)

    def test_several_new_tokens(self):
        args = operands(rows=3, keys=128)
        torch.testing.assert_close(
            compiled(view_first)(*args), view_first(*args), rtol=1e-5, atol=1e-5
        )
        assert last_report().graphs[-1].ops["mla_attention"] == 1

    def test_bfloat16(self):
        args = operands(dtype=torch.bfloat16)
        exact = view_first(*(a.double() for a in args))
        ours = (compiled(view_first)(*args).double() - exact).abs().max()
        assert ours < 2 * (view_first(*args).double() - exact).abs().max() + 1e-3


class TestRefusals:
    def refused(self, function, args, condition, **kwargs):
        torch.testing.assert_close(
            compiled(function, **kwargs)(*args), function(*args), rtol=1e-5, atol=1e-5
        )
        assert "mla_attention" not in last_report().graphs[-1].ops
        reasons = [r.condition for r in last_report().rejections if r.pass_name == "absorb_mla"]
        assert len(reasons) == 1 and condition in reasons[0], reasons

    def test_prefill(self):
        self.refused(view_first, operands(rows=32, keys=32), "not known to cost more")

    def test_dynamic_number_of_new_tokens(self):
        args = operands(rows=3)
        for i in (0, 1):
            torch._dynamo.mark_dynamic(args[i], 2)
        self.refused(view_first, args, "number of new tokens is dynamic")

    def test_bias(self):
        def biased(q, q_rope, c, k_rope, w):
            kv = F.linear(c, w, w[:, 0]).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
            return attend(q, q_rope, kv[..., :DN], k_rope, kv[..., DN:])

        self.refused(biased, operands(), "has a bias")

    def test_expanded_values_are_returned(self):
        def leaks(q, q_rope, c, k_rope, w):
            kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
            return attend(q, q_rope, kv[..., :DN], k_rope, kv[..., DN:]), kv.sum()

        self.refused(leaks, operands(), "used elsewhere")

    def test_two_latents(self):
        def two(q, q_rope, c, k_rope, w):
            k = F.linear(c, w[: H * DN]).view(*c.shape[:2], H, DN).transpose(1, 2)
            v = F.linear(c * 2, w[H * DN :]).view(*c.shape[:2], H, DV).transpose(1, 2)
            return attend(q, q_rope, k, k_rope, v)

        self.refused(two, operands(), "different latents")

    def test_rotary_part_per_head(self):
        def per_head(q, q_rope, c, k_rope, w):
            kv = F.linear(c, w).view(*c.shape[:2], H, DN + DV).transpose(1, 2)
            turn = torch.arange(1.0, H + 1).view(1, H, 1, 1)
            key = torch.cat((kv[..., :DN], shared(k_rope) * turn), -1)
            return F.scaled_dot_product_attention(torch.cat((q, q_rope), -1), key, kv[..., DN:])

        self.refused(per_head, operands(), "not shared by the heads")

    def test_features_interleaved_in_the_projection(self):
        def odd(q, q_rope, c, k_rope, w):
            k = F.linear(c, w[: H * DN]).view(*c.shape[:2], DN, H).permute(0, 3, 1, 2)
            v = F.linear(c, w[H * DN :]).view(*c.shape[:2], H, DV).transpose(1, 2)
            return attend(q, q_rope, k, k_rope, v)

        self.refused(odd, operands(), "not neighbours")


class TestDynamicSizes:
    def test_cache_length_and_batch(self):
        run = compiled(view_first)
        for keys, batch in ((64, 2), (70, 3), (90, 4)):
            args = operands(keys=keys, batch=batch)
            for tensor in args[:4]:
                torch._dynamo.mark_dynamic(tensor, 0)
            for tensor in args[2:4]:
                torch._dynamo.mark_dynamic(tensor, 1)
            torch.testing.assert_close(run(*args), view_first(*args), rtol=1e-5, atol=1e-5)
        assert len(last_report().graphs) == 1
        assert last_report().graphs[0].ops["mla_attention"] == 1

    def test_empty_batch(self):
        args = operands(batch=0)
        assert compiled(view_first)(*args).shape == (0, H, 1, DV)


class TestHuggingFace:
    @pytest.mark.parametrize("static", [True, False])
    @pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3", "MiniCPM3"])
    def test_decode(self, family, static):
        import transformers
        from transformers import DynamicCache, StaticCache

        config = getattr(transformers, family + "Config")(
            hidden_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=12,
            v_head_dim=10, intermediate_size=64, vocab_size=97, first_k_dense_replace=1,
        )  # fmt: skip
        model = getattr(transformers, family + "ForCausalLM")(config).eval()
        run, tokens = compiled(model), torch.randint(0, 97, (2, 40))
        kind, size = (StaticCache, {"max_cache_len": 64}) if static else (DynamicCache, {})
        ours, theirs = kind(config=config, **size), kind(config=config, **size)
        for start, end in ((0, 36), (36, 37), (37, 38)):
            got = run(tokens[:, start:end], past_key_values=ours).logits
            want = model(tokens[:, start:end], past_key_values=theirs).logits
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        ops = last_report().graphs[-1].ops
        assert ops["mla_attention"] == 1
        assert ops["cache_append_" if static else "cache_extend"] == 2


class TestJoinWrites:
    def joined(self, function, *args):
        torch.testing.assert_close(compiled(function, keep_programs=True)(*args), function(*args))
        return "slice_scatter" not in last_report().graphs[-1].programs["lowered"]

    def test_casts_and_broadcasts(self):
        def f(a, b):
            y = a.new_empty(2, 3, 5)
            y[..., :2] = a
            y[..., 2:] = b
            return y

        assert self.joined(f, torch.randn(3, 2), torch.randn(2, 1, 3, dtype=torch.float64))

    def test_a_later_write_wins(self):
        def f(a, b):
            y = a.new_zeros(2, 5)
            y[:, :2] = a
            y[:, 2:] = b
            y[:, :2] = a * 2
            return y

        assert self.joined(f, torch.randn(2, 2), torch.randn(2, 3))

    def test_a_hole_or_an_overlap_stays(self):
        def hole(a, b):
            y = a.new_zeros(2, 6)
            y[:, :2] = a
            y[:, 3:] = b
            return y

        def overlap(a, b):
            y = a.new_zeros(2, 4)
            y[:, :2] = a
            y[:, 1:] = b
            return y

        assert not self.joined(hole, torch.randn(2, 2), torch.randn(2, 3))
        torch._dynamo.reset()
        assert not self.joined(overlap, torch.randn(2, 2), torch.randn(2, 3))


@pytest.mark.parametrize(
    "mask", ["", "k <= q", "(k <= t0) & t1[b, k]", "~((k % 3 == h) & (min(k, q) > 0))", "False"]
)
def test_the_aten_form(mask):
    """All heads as rows of one: masks that tell them apart, and a bias of heads or of rows."""
    shapes = ((2, H, 4, R), (2, H, 4, DR), (2, 70, R), (2, 70, DR))
    tensors = [torch.tensor(40), torch.rand(2, 70) > 0.3]
    parts = [torch.randn(shape) for shape in shapes]
    for bias in (None, torch.randn(2, 1, 4, 70), torch.rand(1, H, 1, 70) > 0.5):
        for value, softcap in ((None, 0.0), (-3e38, 0.0), (-2.0, 0.0), (None, 2.0)):
            args = (*parts, bias, None, tensors, [])
            kwargs = {"scale": 0.2, "mask": mask, "mask_value": value, "softcap": softcap}
            got = FORMS["mla_attention"](*args, **kwargs)
            want = OPS["mla_attention"].reference(*args, **kwargs)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
