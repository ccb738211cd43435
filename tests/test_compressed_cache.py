"""`CompressedCache`: an int8 cache that Hugging Face models take as ``past_key_values``."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dspark_compile.runtime import KVCacheError

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from dspark_compile.runtime import CompressedCache  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral_sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, sliding_window=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
LENGTH = 40
PREFILL_AND_DECODE = (12, *[1] * 12)
CHUNKS = (7, 9, 1, 5, 1, 1, 10)


class RoundingCache(DynamicCache):
    """What a CompressedCache means: every key and value rounded once, when it is written."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        ops = torch.ops.dspark

        def rounded(x):
            return ops.dequantize_kv(*ops.quantize_kv(x, torch.bfloat16), x.dtype)

        return super().update(
            rounded(key_states), rounded(value_states), layer_idx, *args, **kwargs
        )


@pytest.fixture(params=CONFIGS)
def model(request):
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]()).eval()


def logits(model, cache, ids, splits, **kwargs):
    """The logits of all positions, fed ``splits[i]`` tokens at a time."""
    out, at = [], 0
    with torch.no_grad():
        for size in splits:
            if "attention_mask" in kwargs:
                kwargs = {"attention_mask": MASK[:, : at + size]}
            out.append(model(ids[:, at : at + size], past_key_values=cache, **kwargs).logits)
            at += size
    return torch.cat(out, 1)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def tokens(splits):
    return torch.randint(3, 97, (2, sum(splits)))


MASK = torch.ones(2, LENGTH, dtype=torch.long)
MASK[0, :5] = 0


@pytest.mark.parametrize(
    ("splits", "padded"),
    [(PREFILL_AND_DECODE, False), (CHUNKS, True)],
    ids=["decode", "padded_chunks"],
)
def test_it_is_a_cache_that_rounds(model, splits, padded):
    ids = tokens(splits)
    kwargs = {"attention_mask": MASK} if padded else {}
    ours = logits(model, CompressedCache(model.config, LENGTH), ids, splits, **kwargs)
    meaning = logits(model, RoundingCache(config=model.config), ids, splits, **kwargs)
    exact = logits(model, DynamicCache(config=model.config), ids, splits, **kwargs)
    if padded:  # a pad token attends to nothing, and what it gives is nobody's business
        ours, meaning, exact = (x[:, 5:] for x in (ours, meaning, exact))
    assert relative(ours, meaning) < 1e-4
    assert relative(ours, exact) < 0.03
    assert (ours.argmax(-1) == exact.argmax(-1)).float().mean() > 0.95


def test_generate(model):
    ids = tokens((10,))
    cache = CompressedCache(model.config, LENGTH)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ours = model.generate(ids, past_key_values=cache, **options)
    meaning = model.generate(ids, past_key_values=RoundingCache(config=model.config), **options)
    exact = model.generate(ids, **options)
    assert (ours == meaning).float().mean() > 0.95
    assert (ours == exact).float().mean() > 0.7  # random weights: near ties, then another text
    assert int(cache.get_seq_length()) == 21


@pytest.mark.parametrize(
    ("family", "early"),
    [
        ("gemma3_text", False),
        *(
            pytest.param(family, early, marks=pytest.mark.slow)
            for family in CONFIGS
            for early in (True, False)
            if (family, early) != ("gemma3_text", False)
        ),
    ],
)
def test_two_graphs_and_no_more(family, early):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    ids = tokens((12, *[1] * 8))
    for _ in range(2):
        cache = CompressedCache(model.config, LENGTH, batch_size=2 if early else None)
        ours = logits(compiled, cache, ids, (12, *[1] * 8))
        meaning = logits(model, CompressedCache(model.config, LENGTH), ids, (12, *[1] * 8))
        assert relative(ours, meaning) < 1e-4
        assert counter.frame_count == 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bytes(head_dim):
    cache = CompressedCache.from_shape(2, 2, 3, 50, head_dim, torch.bfloat16)
    assert cache.nbytes_exact == 2 * 2 * (2 * 3 * 50 * head_dim) * 2
    assert cache.nbytes <= 0.53 * cache.nbytes_exact
    assert cache.nbytes == sum(t.nbytes for layer in cache.layers for t in layer._stored())


def test_lazy_cache_takes_the_models_dtype():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](), dtype=torch.bfloat16).eval()
    cache = CompressedCache(model.config, LENGTH)
    assert cache.nbytes == cache.nbytes_exact == 0
    with torch.no_grad():
        model(tokens((5,)), past_key_values=cache)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.nbytes <= 0.53 * cache.nbytes_exact


def filled(batch=2, length=6):
    cache = CompressedCache.from_shape(2, batch, 2, 10, 16, torch.float32, value_head_dim=8)
    for i in range(2):
        cache.update(torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 8), i)
    return cache


def test_full_is_an_error_that_says_so():
    cache = filled()
    with pytest.raises(KVCacheError, match=r"5 tokens at position 6 .* max_cache_len=10.*11 or"):
        cache.update(torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 8), 0)
    cache.update(torch.randn(2, 2, 4, 16), torch.randn(2, 2, 4, 8), 0)


def test_another_batch_is_an_error_that_says_so():
    with pytest.raises(KVCacheError, match="batch"):
        filled().update(torch.randn(3, 2, 1, 16), torch.randn(3, 2, 1, 8), 0)


def test_reset_empties_in_place():
    cache = filled()
    address = cache.layers[0].key_data.data_ptr()
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert not cache.layers[0].keys.any()
    assert cache.layers[0].key_data.data_ptr() == address
    cache.update(torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 8), 0)


def test_crop_and_write_again():
    cache = filled()
    cache.crop(-2)
    assert int(cache.get_seq_length()) == 4
    k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 8)
    before = cache.layers[0].keys
    keys, _ = cache.update(k, v, 0)
    torch.testing.assert_close(keys[:, :, :4], before[:, :, :4], rtol=0, atol=0)
    torch.testing.assert_close(keys[:, :, 4:5], k, rtol=0.01, atol=0.03)
    cache.crop(3)
    assert int(cache.get_seq_length(0)) == 3


def test_batch_operations():
    cache = filled()
    keys, values = cache.layers[1].keys, cache.layers[1].values
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(cache.layers[1].keys, keys[[1, 0]])
    cache.batch_repeat_interleave(3)
    torch.testing.assert_close(cache.layers[1].values, values[[1, 1, 1, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 3]))
    torch.testing.assert_close(cache.layers[1].keys, keys[[1, 0]])
    cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 8), 1)


def test_what_has_no_meaning_is_an_error():
    config = CONFIGS["llama"]()
    with pytest.raises(KVCacheError, match="int8"):
        CompressedCache(config, 16, scheme="int3")
    with pytest.raises(KVCacheError, match="max_cache_len=0"):
        CompressedCache(config, 0)
    with pytest.raises(KVCacheError, match="offload"):
        CompressedCache(config, 16, offloading=True)
    cache = filled()
    with pytest.raises(KVCacheError, match="offload"):
        cache.offload(0)
    with pytest.raises(KVCacheError, match="assigned"):
        cache.layers[0].keys = torch.zeros(1)


def test_beam_search(model):
    ids = tokens((6,))
    out = model.generate(
        ids,
        past_key_values=CompressedCache(model.config, LENGTH),
        num_beams=2,
        max_new_tokens=5,
        do_sample=False,
    )
    assert out.shape[0] == 2


def test_linear_attention_layers_stay_exact():
    config = transformers.Lfm2Config(
        **{name: size for name, size in SIZES.items() if name != "head_dim"},
        layer_types=["conv", "full_attention"],
        full_attn_idxs=[1],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(PREFILL_AND_DECODE)
    cache = CompressedCache(config, LENGTH)
    ours = logits(model, cache, ids, PREFILL_AND_DECODE)
    exact = logits(model, DynamicCache(config=config), ids, PREFILL_AND_DECODE)
    assert relative(ours, exact) < 0.03
    assert [type(x).__name__ for x in cache.layers][1] == "CompressedLayer"


WITHOUT = """
import sys
sys.modules["transformers"] = None
import torch, dspark_compile.runtime
from dspark_compile.runtime import CompressedCache
try:
    CompressedCache(object(), 8)
except ImportError as error:
    assert "dspark-compile[hf]" in str(error), error
else:
    raise SystemExit("no error")
cache = CompressedCache.from_shape(1, 1, 2, 8, 16, torch.float32)
k, v = cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
assert k.shape == (1, 2, 8, 16) and int(cache.get_seq_length()) == 3
cache.crop(-1)
cache.reset()
"""


def test_without_transformers():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
