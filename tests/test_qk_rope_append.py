"""qk_rope_append: q/k norm, RoPE and append become one op, in the right place, or not at all.

There is no kernel for it on a CPU, so the op's reference runs (``without_kernel``).
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dspark_compile.diagnostics.state import last_report
from dspark_compile.models.gpt_fast import GPT
from dspark_compile.passes.qk_rope_append import QKRopeAppend

STRICT = {"inner": "eager", "fallback": "error", "verify": True}
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setattr(QKRopeAppend, "without_kernel", True)
    with torch.no_grad():
        yield


def compiled(function, **options):
    return torch.compile(function, backend="dspark", options={**STRICT, **options})


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def rejections():
    return [r.condition for r in last_report().rejections if r.pass_name == "qk_rope_append"]


def decode(family, **options):
    """The largest difference of three steps, and the last graph's ops."""
    import transformers
    from transformers import StaticCache

    extra = {"sliding_window": 16} if family == "Gemma3" else {}
    name = family + ("TextConfig" if family == "Gemma3" else "Config")
    config = getattr(transformers, name)(**SIZES, **extra)
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    run, tokens = compiled(model, **options), torch.randint(0, 97, (2, 12))
    ours = StaticCache(config=config, max_cache_len=32)
    theirs = StaticCache(config=config, max_cache_len=32)
    worst = 0.0
    for start, end in ((0, 9), (9, 10), (10, 11)):
        got = run(tokens[:, start:end], past_key_values=ours).logits
        want = model(tokens[:, start:end], past_key_values=theirs).logits
        worst = max(worst, relative(got, want))
    return worst, last_report().graphs[-1].ops


class TestModels:
    @pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
    def test_decode(self, family):
        worst, ops = decode(family)
        assert worst < 1e-5
        assert ops["qk_norm_rope_append_"] == 2
        assert not {"rope", "cache_append_", "cache_append"} & set(ops)
        kinds = [s.kind for s in last_report().graphs[-1].sites if s.op == "qk_norm_rope_append_"]
        norms = 0 if family == "Llama" else 4
        assert [kinds.count(k) for k in ("rope", "cache", "norm")] == [4, 4, norms]

    def test_int8(self):
        worst, ops = decode("Qwen3", kv_cache="int8")
        assert worst < 2e-2
        assert ops["qk_norm_rope_append_int8_"] == 2
        assert ops["attention_int8"] == 2

    @pytest.mark.parametrize("batch", [1, 2])
    def test_rotation_before_the_transposition(self, batch):
        model = GPT.tiny(batch)
        run, other = compiled(model), copy.deepcopy(model)
        tokens = torch.randint(0, 97, (batch, 9))
        for start, end in ((0, 7), (7, 8), (8, 9)):
            at = torch.arange(start, end)
            assert relative(run(tokens[:, start:end], at), other(tokens[:, start:end], at)) < 1e-5
            assert last_report().graphs[-1].ops["qk_norm_rope_append_"] == 2

    def test_without_a_kernel_nothing_changes(self, monkeypatch):
        monkeypatch.setattr(QKRopeAppend, "without_kernel", False)
        model = GPT.tiny()
        compiled(model)(torch.randint(0, 97, (1, 3)), torch.arange(3))
        assert last_report().graphs[-1].ops["cache_append_"] == 4
        assert not rejections()


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def norm(x, weight, eps=1e-6):
    return F.rms_norm(x, weight.shape, weight, eps)


class Site:
    """One attention with its caches; ``step`` overrides say what is unusual."""

    def __init__(self):
        self.args = {
            "q": torch.randn(2, 4, 3, 8),
            "k": torch.randn(2, 2, 3, 8),
            "v": torch.randn(2, 2, 3, 8),
            "w": torch.randn(8),
            "u": torch.randn(8),
            "cos": torch.randn(3, 8),
            "sin": torch.randn(3, 8),
            "at": torch.tensor([5, 6, 7]),
        }
        self.caches = [torch.randn(2, 2, 12, 8) for _ in range(2)]

    def check(self, step):
        ours, theirs = [[c.clone() for c in self.caches] for _ in range(2)]
        got = compiled(step)(*ours, **self.args)
        want = step(*theirs, **self.args)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        return last_report().graphs[-1].ops


def write(kc, vc, at, k, v):
    kc.index_copy_(2, at, k)
    vc.index_copy_(2, at, v)


def attend(q, kc, vc):
    return F.scaled_dot_product_attention(q, kc, vc, enable_gqa=True)


class TestConditions:
    def fused(self, step):
        ops = Site().check(step)
        assert ops["qk_norm_rope_append_"] == 1
        return ops

    def refused(self, step, condition):
        ops = Site().check(step)
        assert "qk_norm_rope_append_" not in ops
        assert len(rejections()) == 1 and condition in rejections()[0], rejections()

    def test_plain(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(norm(k, u), cos, sin), v)
            return attend(turn(norm(q, w), cos, sin), kc, vc)

        assert "rms_norm" not in self.fused(step)

    def test_norms_that_differ_stay_in_front(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(norm(k, u, 1e-3), cos, sin), v)
            return attend(turn(norm(q, w), cos, sin), kc, vc)

        assert self.fused(step)["rms_norm"] == 2

    def test_a_norm_of_the_query_alone_stays_in_front(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(turn(norm(q, w), cos, sin), kc, vc)

        assert self.fused(step)["rms_norm"] == 1

    def test_a_norm_that_is_read_elsewhere_stays_in_front(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            normed = norm(q, w)
            write(kc, vc, at, turn(norm(k, u), cos, sin), v)
            return attend(turn(normed, cos, sin), kc, vc), normed * 2

        assert self.fused(step)["rms_norm"] == 2

    def test_values_that_come_late(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            kc.index_copy_(2, at, turn(k, cos, sin))
            rotated = turn(q, cos, sin)
            vc.index_copy_(2, at, torch.tanh(v) * w)
            return attend(rotated, kc, vc)

        self.fused(step)

    def test_the_old_cache_is_read_before(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            old = kc.sum() + vc[:, :, 1:].amax()
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(turn(q, cos, sin), kc, vc), old

        self.fused(step)

    def test_the_new_cache_is_read_after(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(turn(q, cos, sin), kc, vc), kc[:, :, 2:].sum() + vc.sum()

        self.fused(step)

    def test_no_place(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            kc.index_copy_(2, at, turn(k, cos, sin))
            v = v * kc.sum()
            vc.index_copy_(2, at, v)
            return attend(turn(q, cos, sin), kc, vc)

        self.refused(step, "no place")

    def test_the_query_depends_on_the_new_keys(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(turn(q + kc.mean(), cos, sin), kc, vc)

        self.refused(step, "no place")

    def test_rotated_differently(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(turn(q, sin, cos), kc, vc)

        self.refused(step, "rotated differently")

    def test_only_the_key_is_rotated(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            return attend(q, kc, vc)

        self.refused(step, "the query is not")

    def test_rotated_keys_are_returned(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            rotated = turn(k, cos, sin)
            write(kc, vc, at, rotated, v)
            return attend(turn(q, cos, sin), kc, vc), rotated * 2

        self.refused(step, "read elsewhere")

    def test_different_rows(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            kc.index_copy_(2, at, turn(k, cos, sin))
            vc.index_copy_(2, at - 1, v)
            return attend(turn(q, cos, sin), kc, vc)

        self.refused(step, "different positions")

    def test_positions_that_are_advanced_in_the_graph(self):
        def step(kc, vc, q, k, v, w, u, cos, sin, at):
            write(kc, vc, at, turn(k, cos, sin), v)
            out = attend(turn(q, cos, sin), kc, vc)
            return out, at + 1

        self.fused(step)
