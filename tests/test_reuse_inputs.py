"""Kept steps whose inputs a compilation changed: quantised weights, taken apart and packed, and
caches in int8."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import dspark_compile
from dspark_compile.passes.kv_int8 import CompressedInput
from dspark_compile.reuse import files, key
from dspark_compile.reuse.inputs import Inputs
from dspark_compile.reuse.layout import CannotKeep
from dspark_compile.runtime import captured
from dspark_compile.runtime.generate import free
from dspark_compile.runtime.packed_int4 import PackedInt4

ON = {"kernels": "cpp", "reuse": "on"}


pytestmark = pytest.mark.usefixtures("steps")


def quantized(module, bits, group=32):
    """``module`` with weights of 8 or 4 bits, as torchao keeps them."""
    torchao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    config = (
        torchao.Int8WeightOnlyConfig()
        if bits == 8
        else torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(group)
        )
    )
    torchao.quantize_(module, config)
    return module


def linear(bits, group=32, seed=0):
    torch.manual_seed(seed)
    return quantized(nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 96, bias=False)), bits, group)


def run(model, expect_found, *args, **options):
    """A fresh compilation; its result is the module's own."""
    torch._dynamo.reset()
    args = args or (torch.randn(2, 64),)
    with torch.no_grad():
        compiled = torch.compile(model, backend="dspark", dynamic=False, options={**ON, **options})
        out = compiled(*args)
        graph = dspark_compile.last_report().graphs[-1]
        assert graph.from_cache == expect_found, graph.notes
        want = model(*args)
        assert (out - want).norm() <= 0.01 * want.norm()
    return compiled


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_taken_apart_as_then(bits):
    run(linear(bits), False)
    compiled = run(linear(bits, seed=1), True)  # other values
    model = linear(bits)
    compiled = run(model, True)
    x = torch.randn(2, 64)
    with torch.no_grad():
        before = compiled(x)
        other = linear(bits, seed=2)[1].weight
        # Other values in place: what is packed is packed anew.
        for name in other.__tensor_flatten__()[0]:
            getattr(model[1].weight, name).copy_(getattr(other, name))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
        assert (compiled(x) - before).abs().max() > 0.1


def test_what_differs_inside_of_a_weight_has_another_key():
    run(linear(4), False)
    run(linear(8), False)
    run(linear(4, group=16), False)
    run(linear(4), True)


def tiny(bits):
    torch.manual_seed(1)
    config = tf.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return quantized(tf.AutoModelForCausalLM.from_config(config).eval(), bits)


@pytest.mark.parametrize(("bits", "cache"), [(8, "model"), (4, "model"), (4, "int8")])
def test_generate_finds_steps_of_quantised_models(bits, cache, monkeypatch):
    """By the model, without a trace; of a model that differs inside of a weight it finds none."""
    traced, trace = [], captured.trace_whole
    monkeypatch.setattr(captured, "trace_whole", lambda *a, **k: traced.append(1) or trace(*a, **k))

    def text(model, options=ON):
        free(model)
        torch._dynamo.reset()
        got, stats = dspark_compile.generate(
            model, torch.arange(3, 12)[None], max_new_tokens=20, do_sample=False,
            eos_token_id=None, return_stats=True, options=options, kv_cache=cache,
        )  # fmt: skip
        assert stats.path == "native"
        return got

    want = text(tiny(bits), {**ON, "reuse": "off"})
    assert torch.equal(text(tiny(bits)), want)
    traced.clear()
    assert torch.equal(text(tiny(bits)), want)
    assert not traced
    text(tiny(12 - bits))
    assert traced


class Attend(nn.Module):
    """A step over a cache that its caller brings."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(128, 64, bias=False)

    def forward(self, keys, values, k, v, q, positions):
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        at = torch.arange(keys.shape[2])
        allowed = (at <= positions)[None, None, None]
        out = nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=allowed)
        return self.out(out.transpose(1, 2).flatten(2)).flatten(0, 1)


def test_a_cache_in_int8_is_found_where_it_can_be_compressed():
    def step(model, expect_found, keys, values):
        torch._dynamo.reset()
        exact, given = [keys.clone(), values.clone()], (keys, values)
        new = [torch.randn(1, 2, 1, 64) for _ in range(3)]
        options = {**ON, "kv_cache": "int8"}
        with torch.no_grad():
            compiled = torch.compile(model, backend="dspark", dynamic=False, options=options)
            for at in (3, 4):
                out = compiled(*given, *new, torch.tensor([at]))
                want = model(*exact, *new, torch.tensor([at]))
                assert (out - want).norm() <= 0.03 * want.norm()
        graph = dspark_compile.last_report().graphs[-1]
        assert graph.from_cache == expect_found
        return graph

    model = Attend()
    first = step(model, False, *torch.randn(2, 1, 2, 64, 64).unbind())
    assert len(first.kv_plan) == 0  # views of one tensor: they stay exact
    first = step(model, False, torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64))
    assert len(first.kv_plan) == 2
    second = step(model, True, torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64))
    assert second.kv_plan == first.kv_plan
    # Of the same shape, but somebody else reads this one's memory: it stays exact.
    shared = torch.randn(1, 2, 64, 64)
    view = shared.view(-1)
    third = step(model, False, shared, torch.randn(1, 2, 64, 64))
    assert len(third.kv_plan) == 0 and torch.isfinite(view).all()


def test_recipes_as_json_and_back():
    fake = torch.empty(0)
    inputs = Inputs(
        [(0, ("qdata",)), (0, ("scale", "inner")), (1, ())], [1, 2],
        [PackedInt4(0, fake), CompressedInput(2, "data", fake)],
    )  # fmt: skip
    data = inputs.to_data()
    again = Inputs.from_data(data)
    assert again.to_data() == data and again.paths == inputs.paths
    assert isinstance(again.extra[0], PackedInt4) and again.extra[1].part == "data"
    with pytest.raises(CannotKeep, match="passes changed"):
        Inputs(extra=[object()]).to_data()
    for bad in (["int3", 0], ["int8 cache", 0, "codes"], ["int8 cache", 0]):
        with pytest.raises(ValueError, match="no input is"):
            Inputs.from_data({"paths": None, "kept": [], "extra": [bad]})


def test_a_recipe_that_is_none_is_no_entry(steps):
    run(linear(4), False)
    (path,) = steps.glob("*.json")
    data = files.read(path.stem)
    data["inputs"]["extra"] = [["int3", 0]]
    files.write(path.stem, data)
    run(linear(4), False)
    run(linear(4), True)


class Halves(torch.Tensor):
    """A tensor of tensors that belongs to no package with a version."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_ = data

    def __tensor_flatten__(self):
        return ["data_"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["data_"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_subclass_of_no_version_has_no_key():
    tensor = Halves(torch.ones(2, 2))
    assert is_traceable_wrapper_subclass(tensor)
    with pytest.raises(key.NoKey, match="Halves, of a package without a version"):
        key.inner(tensor)
