"""`generate` as people call it: models, drafts and arguments at their edges."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MaxLengthCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.runtime.generate import free
from tests.test_generate import QUICK, Listener, check, prompt, qwen, ragged

V = 97


def settled(model, scale=0.3):
    for p in model.parameters():
        p.data.normal_(0, scale if p.dim() > 1 else 0.1)
    return model.eval()


def gpt2(positions, layers=2, seed=1):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=V, n_embd=32, n_layer=layers, n_head=4, n_positions=positions, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return settled(GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def model():
    model = qwen()
    yield model
    free(model)


# ------------------------------------------------------------------------------------ drafts


@pytest.mark.parametrize("kernels", ["aten", pytest.param("cpp", marks=pytest.mark.slow)])
def test_drafted_tokens_beyond_the_targets_positions(kernels):
    """What is drafted behind the last token has a place in no table, and is verified all the
    same: programs have one width."""
    target, options = gpt2(24), dict(QUICK) if kernels == "aten" else {"kernels": kernels}
    for given, new in (({"input_ids": prompt()}, 17), ({"input_ids": prompt(1, 20)}, 5),
                       (ragged(), 15)):  # fmt: skip
        want = target.generate(**given, max_new_tokens=new, do_sample=False)
        got, report = dspark_compile.generate(
            target, **given, max_new_tokens=new, do_sample=False, draft="ngram",
            schedule="fixed", options=options, return_stats=True,
        )  # fmt: skip
        assert torch.equal(got, want)
        # Rows of a batch are driven natively or not at all; how many fit is the CPU's matter.
        assert report.speculation is not None or len(want) > 1


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_with_fewer_positions_than_the_text(model, rows):
    draft = gpt2(12, layers=1)
    for length, new in ((7, 20), (30, 8)):
        given = ragged(rows, length) if rows > 1 else {"input_ids": prompt(1, length)}
        report = check(
            model, **given, max_new_tokens=new, own={"draft": draft, "schedule": "fixed"}
        )
        assert report.speculation is not None or rows > 1


@pytest.mark.slow
def test_a_draft_that_takes_no_positions(model):
    torch.manual_seed(2)
    config = BloomConfig(
        vocab_size=V, hidden_size=32, n_layer=1, n_head=4, pad_token_id=0, eos_token_id=None
    )
    bloom = settled(BloomForCausalLM(config))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    for draft in (bloom, "ngram"):
        own = {"draft": draft, "schedule": "fixed"}
        check(model, input_ids=prompt(), attention_mask=mask, own=own)
    check(bloom, input_ids=prompt(), attention_mask=mask, own={"draft": "ngram"})


def test_a_streamer_gets_every_row(model):
    """Rows that speculate go on at their own pace; a streamer wants a token of each at a time."""
    listener = Listener()
    report = check(model, **ragged(), own={"draft": "ngram", "streamer": listener})
    assert report.speculation is None and "a streamer gets a token of every row" in report.notes[0]
    assert all(x.shape == (3,) for x in listener.heard[1:]) and len(listener.heard) == 13


@pytest.mark.parametrize("length", [9, 13, 15])
def test_a_criterion_ends_inside_of_the_last_block(model, length):
    """The block that reaches the most tokens may reach past what a criterion allows."""

    def long(input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= length)

    def again(input_ids, scores, **kwargs):
        return input_ids[:, -1] == input_ids[:, -2]

    for criterion in (long, again):
        given = {"stopping_criteria": StoppingCriteriaList([criterion]), "max_new_tokens": 12}
        report = check(
            model, input_ids=prompt(), own={"draft": "ngram", "schedule": "fixed"}, **given
        )
        assert report.speculation is not None


@pytest.mark.slow
def test_a_seed_where_speculation_is_found_to_be_impossible():
    """The first call finds it out on the way; the text is that of later calls."""
    target, texts = qwen(), []
    for _ in range(3):
        torch.manual_seed(3)
        texts.append(
            dspark_compile.generate(
                target, **ragged(), do_sample=True, max_new_tokens=9, draft="ngram", options=QUICK
            )
        )
        assert "no speculation" in last_generation().notes[0]
    assert all(torch.equal(text, texts[0]) for text in texts)


def test_an_encoder_decoder_is_no_draft(model):
    config = T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        dspark_compile.generate(
            model, prompt(), max_new_tokens=3, draft=T5ForConditionalGeneration(config)
        )


# --------------------------------------------------------------------------------- arguments


def test_a_vision_model_without_an_image():
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        image_token_index=96,
    )  # fmt: skip
    llava = settled(LlavaForConditionalGeneration(config))
    given = {"eos_token_id": None, "pad_token_id": 0}
    assert check(llava, input_ids=prompt() % 96, **given).path == "compiled"
    ids = prompt() % 96
    ids[:, 1:5] = 96
    report = check(llava, input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), **given)
    assert report.path == "transformers" and "besides tokens" in report.notes[0]


def test_inputs_is_a_name_of_the_tokens(model):
    got = dspark_compile.generate(
        model, inputs=prompt(), max_new_tokens=5, do_sample=False, options=QUICK
    )
    assert torch.equal(got, model.generate(prompt(), max_new_tokens=5, do_sample=False))


def test_the_shortest_of_several_lengths(model):
    criteria = StoppingCriteriaList([MaxLengthCriteria(15), MaxLengthCriteria(11)])
    report = check(model, input_ids=prompt(), stopping_criteria=criteria, max_new_tokens=30)
    assert report.new_tokens == 4


def test_a_criterion_that_knows_an_end_token_pads(model):
    """transformers fills rows that have ended wherever a criterion has an ``eos_token_id``."""

    class Multiples:
        eos_token_id = (7,)

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 0

    class EosTokenCriteria:
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 5 == 0

    for criterion in (Multiples(), EosTokenCriteria()):
        check(
            model, **ragged(), stopping_criteria=StoppingCriteriaList([criterion]),
            pad_token_id=0, max_new_tokens=40,
        )  # fmt: skip


# ------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("made_for", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_conversation_over_a_dynamic_cache(model, rows, made_for):
    """Hugging Face's way: the caller's cache has what was said, and what was added."""
    config = {"config": model.config} if made_for else {}
    ours, theirs = DynamicCache(**config), DynamicCache(**config)
    given = ragged(rows) if rows > 1 else {"input_ids": prompt()}
    for turn in range(3):
        asked = given | {"do_sample": False, "max_new_tokens": 5 + turn}
        want = model.generate(**asked, past_key_values=theirs)
        got = dspark_compile.generate(model, **asked, past_key_values=ours, options=QUICK)
        assert torch.equal(got, want)
        assert last_generation().path == "compiled", last_generation().notes
        assert ours.get_seq_length() == theirs.get_seq_length() == want.shape[1] - 1
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(mine.values, other.values, rtol=1e-3, atol=1e-3)
        said = torch.cat((want, prompt(rows, 4, seed=turn)), dim=1)
        new = torch.ones(rows, said.shape[1] - given["input_ids"].shape[1], dtype=torch.long)
        if "attention_mask" in given:
            given["attention_mask"] = torch.cat((given["attention_mask"], new), dim=1)
        given["input_ids"] = said


def test_a_dynamic_cache_that_is_not_lent(model):
    """Windows are dropped by the cache itself; int8 would not be what it holds."""
    sliding = qwen(
        sliding_window=6, use_sliding_window=True, max_window_layers=0,
        layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    for which, own, says in ((sliding, {}, "other layers"), (model, {"kv_cache": "int8"}, "exact")):
        cache = DynamicCache(config=which.config)
        report = check(which, input_ids=prompt(), own=own | {"past_key_values": cache})
        assert report.path == "transformers" and says in report.notes[0]


@pytest.mark.slow
def test_a_draft_and_the_cache_that_is_handed_over(model):
    asked = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 12}
    want = model.generate(prompt(), **asked)
    got, report = dspark_compile.generate(
        model, prompt(), **asked, draft="ngram", schedule="fixed", options=QUICK, return_stats=True
    )
    assert report.speculation is not None and torch.equal(got.sequences, want.sequences)
    held = got.past_key_values
    assert held.known == want.sequences.shape[1] - 1
    longer = torch.cat((got.sequences, prompt(1, 3, seed=4)), dim=1)
    check(model, input_ids=longer, own={"past_key_values": held})
    report = check(model, **ragged(), own={"draft": "ngram"})
    asked["max_new_tokens"] = 4
    got, report = dspark_compile.generate(
        model, **ragged(), **asked, draft="ngram", options=QUICK, return_stats=True
    )
    assert report.speculation is None and "that of a batch has holes" in report.notes[0]


# ----------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("kind", ["plain", pytest.param("draft", marks=pytest.mark.slow), "module"])
def test_inference_mode_comes_and_goes(kind):
    """What a call under inference mode makes and keeps serves calls outside of it."""
    with torch.inference_mode():
        inside = settled(Small()) if kind == "module" else qwen()
    for which in (inside, settled(Small()) if kind == "module" else qwen()):
        own = {"draft": "ngram", "schedule": "fixed"} if kind == "draft" else {}
        for mode in (True, False, True, False):
            with torch.inference_mode(mode), torch.no_grad():
                if kind == "module":
                    got = dspark_compile.generate(which, prompt(), max_new_tokens=6, options=QUICK)
                    assert torch.equal(got, which.generate(prompt(), 6))
                else:
                    report = check(which, input_ids=prompt(), own=own)
                    assert report.path == "compiled", report.notes
                    check(which, **ragged(), own=own)


class Small(nn.Module):
    """As nanoGPT: a ``config`` and a ``generate`` that are no others' business."""

    def __init__(self, positions=64, width=32):
        super().__init__()
        self.config = SimpleNamespace(block_size=positions)
        self.tokens, self.places = nn.Embedding(V, width), nn.Embedding(positions, width)
        self.norm, self.join = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, V, bias=False)

    def forward(self, idx, targets=None):
        batch, length = idx.size()
        assert length <= self.config.block_size
        x = self.tokens(idx) + self.places(torch.arange(length, device=idx.device))
        q, k, v = (
            t.view(batch, length, 4, -1).transpose(1, 2)
            for t in self.join(self.norm(x)).split(x.shape[-1], dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        return self.head(x[:, [-1]]), None

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
        return idx


def test_a_module_with_a_generate_of_its_own():
    torch.manual_seed(0)
    small = settled(Small())
    want = small.generate(prompt(2), 9)
    for more in ({}, {"temperature": 0.0}, {"top_k": None}):
        got = dspark_compile.generate(small, prompt(2), max_new_tokens=9, options=QUICK, **more)
        assert torch.equal(got, want) and last_generation().path == "compiled"
    with pytest.raises(ValueError, match=r"temperature=0\.0: it must be above 0"):
        dspark_compile.generate(small, prompt(), max_new_tokens=3, temperature=0.0, do_sample=True)


def test_weights_in_two_parts_and_a_deviation():
    """What is computed of weights alone may have several results; a deviation over features keeps
    tokens apart."""

    class Odd(Small):
        def forward(self, idx, targets=None):
            out = super().forward(idx)[0]
            return out / (out.std(-1, keepdim=True) + out.var(-1, keepdim=True)), None

    torch.manual_seed(0)
    odd = settled(Odd())
    torch.nn.utils.parametrizations.weight_norm(odd.join)
    got = dspark_compile.generate(odd, prompt(2), max_new_tokens=9, options=QUICK)
    assert torch.equal(got, odd.generate(prompt(2), 9)) and last_generation().path == "compiled"
