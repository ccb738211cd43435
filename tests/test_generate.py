"""`dspark_compile.generate` gives what Hugging Face's generate gives, whatever happens."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import dspark_compile
from dspark_compile import DecodeCache, last_generation
from dspark_compile.options import OptionsError
from dspark_compile.runtime import decode_cache, room
from dspark_compile.runtime.errors import KVCacheError
from dspark_compile.runtime.generate import free
from dspark_compile.runtime.rounds import POOL, Rounds

QUICK = {"inner": "eager"}


def qwen(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**(sizes | changes))).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.3 if p.dim() > 1 else 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    model = qwen()
    yield model
    free(model)


def prompt(rows: int = 1, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def ragged(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    ids, mask = prompt(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        ids[row, : 2 * row] = 0
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(model, *, own=None, **given):
    """Ours equals theirs; the report."""
    given = {"do_sample": False, "max_new_tokens": 12} | given
    ids = given.pop("input_ids")
    want = model.generate(ids, **given)
    got = dspark_compile.generate(model, ids, options=QUICK, **(own or {}), **given)
    assert torch.equal(got, want)
    return last_generation()


def test_one_prompt(model):
    report = check(model, input_ids=prompt())
    assert report.path == "compiled" and not report.notes
    assert (report.prompt_tokens, report.new_tokens) == (7, 12)


def test_as_custom_generate(model):
    want = model.generate(prompt(), do_sample=False, max_new_tokens=8)
    got = model.generate(
        prompt(), do_sample=False, max_new_tokens=8, custom_generate=dspark_compile.generate,
        options=QUICK,
    )  # fmt: skip
    assert torch.equal(got, want) and last_generation().path == "compiled"


def test_ragged_batch_padded_to_a_bucket(model):
    assert check(model, **ragged()).path == "compiled"
    assert check(model, input_ids=prompt(3)).path == "compiled"  # nothing is padded


def test_one_compilation_for_any_length(model, monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 16)
    free(model)
    from dspark_compile.runtime import captured

    made = []
    original = captured.Captured.__init__
    monkeypatch.setattr(
        captured.Captured,
        "__init__",
        lambda self, *a, **k: made.append(1) or original(self, *a, **k),
    )
    monkeypatch.setattr(Rounds, "reserve", _stingy(Rounds.reserve))
    for length, new in ((1, 3), (7, 60), (40, 5), (3, 200), (64, 64)):
        assert check(model, input_ids=prompt(1, length), max_new_tokens=new).path == "compiled"
    assert len(made) == 1
    free(model)


def _stingy(reserve):
    """Room for what is needed now and no more, so that the cache grows while it decodes."""

    def only(self, tokens):
        reserve(self, min(tokens, self.length + 80))

    return only


def test_growth_keeps_what_is_held(model, monkeypatch):
    monkeypatch.setattr(room, "SMALLEST", 8)
    monkeypatch.setattr(Rounds, "reserve", _stingy(Rounds.reserve))
    free(model)
    report = check(model, **ragged(4, 11), max_new_tokens=150)
    assert report.path == "compiled" and report.new_tokens == 150
    free(model)


def test_native_step(monkeypatch):
    """The whole way on the CPU: one native call a token, C++ choice."""
    model = qwen()
    want = model.generate(prompt(), do_sample=False, max_new_tokens=40)
    got = dspark_compile.generate(
        model, prompt(), do_sample=False, max_new_tokens=40, options={"kernels": "cpp"}
    )
    assert last_generation().path == "native", last_generation().notes
    assert torch.equal(got, want)


def test_stops_at_eos_row_by_row(model):
    free_run = model.generate(**ragged(), do_sample=False, max_new_tokens=20)
    eos = [int(free_run[0, 12]), int(free_run[1, 15])]
    report = check(model, **ragged(), eos_token_id=eos, pad_token_id=0, max_new_tokens=20)
    assert report.path == "compiled"
    check(model, input_ids=prompt(), eos_token_id=int(free_run[0, 12]), pad_token_id=0)
    first = int(model.generate(prompt(), do_sample=False, max_new_tokens=1)[0, -1])
    check(model, input_ids=prompt(), eos_token_id=first, pad_token_id=0)


def test_sliding_windows_and_soft_caps():
    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=6,
            pad_token_id=0,
            eos_token_id=None,
        )
    ).eval()
    for p in gemma.parameters():
        p.data.normal_(0, 0.2)
    assert check(gemma, **ragged(), max_new_tokens=30).path == "compiled"


def test_chunked_prefill(model):
    check(model, input_ids=prompt(1, 50), prefill_chunk_size=16)
    check(model, **ragged(3, 21), prefill_chunk_size=4)


def test_repetition_penalty(model):
    report = check(model, **ragged(), repetition_penalty=1.7, max_new_tokens=30)
    assert not report.notes


def test_processors_of_the_caller(model):
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores - input_ids[:, -1:] % 3

    report = check(model, **ragged(), logits_processor=LogitsProcessorList([Even()]))
    assert report.notes == ["Even is called in Python at every step"]
    report = check(model, input_ids=prompt(), min_new_tokens=5, eos_token_id=3, pad_token_id=0)
    assert "MinLengthLogitsProcessor" in report.notes[0]


def test_criteria_of_the_caller(model):
    class Seven(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 7 == 0

    criteria = StoppingCriteriaList([Seven()])
    report = check(model, **ragged(), stopping_criteria=criteria, max_new_tokens=40)
    assert report.notes == ["Seven is asked in Python at every step"]
    check(
        model, **ragged(), stopping_criteria=criteria, eos_token_id=5, pad_token_id=0,
        max_new_tokens=40,
    )  # fmt: skip


class Listener:
    def __init__(self, fail_at: int = 10**9):
        self.heard: list[torch.Tensor] = []
        self.ended, self.fail_at = False, fail_at

    def put(self, value):
        self.heard.append(value)
        if len(self.heard) > self.fail_at:
            raise RuntimeError("enough")

    def end(self):
        self.ended = True


@pytest.mark.parametrize("custom", [False, True])
def test_streamer(model, custom):
    listener = Listener()
    given = {"do_sample": False, "max_new_tokens": 40, "streamer": listener, "options": QUICK}
    if custom:
        out = model.generate(prompt(), custom_generate=dspark_compile.generate, **given)
    else:
        out = dspark_compile.generate(model, prompt(), **given)
    assert listener.ended and torch.equal(listener.heard[0], prompt())
    assert len(set(out[0, 7:].tolist())) > 1
    assert torch.cat(listener.heard[1:]).tolist() == out[0, 7:].tolist()


def test_an_exception_leaves_nothing_behind(model):
    check(model, input_ids=prompt())
    idle = sum(len(x) for x in POOL._idle[model].values())
    with pytest.raises(RuntimeError, match="enough"):
        dspark_compile.generate(
            model, prompt(), max_new_tokens=9, do_sample=False, streamer=Listener(4), options=QUICK
        )
    assert sum(len(x) for x in POOL._idle[model].values()) == idle - 1
    check(model, input_ids=prompt(seed=3))


def test_no_memory_is_a_clear_error_and_the_next_call_works(model, monkeypatch):
    free(model)

    def fails(self, room):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(decode_cache.DecodeLayer, "reserve", fails)
        with pytest.raises(KVCacheError, match=r"no memory for a cache of .* kv_cache='int8'"):
            dspark_compile.generate(model, prompt(), max_new_tokens=5, options=QUICK)
    check(model, input_ids=prompt())


def test_inside_of_a_callback(model):
    """Two calls at once on one model have a state each."""
    results = []

    class Asks(Listener):
        def put(self, value):
            super().put(value)
            if len(self.heard) == 4:
                results.append(
                    dspark_compile.generate(
                        model, prompt(seed=5), max_new_tokens=6, do_sample=False, options=QUICK
                    )
                )

    check_ids = prompt(seed=4)
    want = model.generate(check_ids, max_new_tokens=9, do_sample=False)
    got = dspark_compile.generate(
        model, check_ids, max_new_tokens=9, do_sample=False, streamer=Asks(), options=QUICK
    )
    assert torch.equal(got, want)
    inner = model.generate(prompt(seed=5), max_new_tokens=6, do_sample=False)
    assert torch.equal(results[0], inner)


def test_other_weights_are_seen(model):
    own = qwen()
    check(own, input_ids=prompt())
    with torch.no_grad():
        own.model.layers[0].mlp.up_proj.weight.mul_(-1.5)  # in place
    own.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.randn(48, 32))
    own.lm_head.weight.data = torch.randn(97, 32)
    assert check(own, input_ids=prompt()).path == "compiled"


def test_the_model_can_go():
    own = qwen()
    check(own, input_ids=prompt())
    gone = weakref.ref(own)
    weight = weakref.ref(own.lm_head.weight)
    del own
    gc.collect()
    assert gone() is None and weight() is None


def test_sampling_reproduces_and_follows_the_distribution(model):
    ids = prompt().expand(256, -1)
    given = {"do_sample": True, "max_new_tokens": 1, "temperature": 1.3, "top_k": 20, "top_p": 0.9}

    def ours(seed):
        torch.manual_seed(seed)
        return dspark_compile.generate(model, ids, options=QUICK, **given)[:, -1]

    assert torch.equal(ours(1), ours(1)) and not torch.equal(ours(1), ours(2))
    counts = sum(torch.bincount(ours(s), minlength=97) for s in range(20)).float()
    theirs = torch.zeros(97)
    for _ in range(20):
        theirs += torch.bincount(model.generate(ids, **given)[:, -1], minlength=97)
    assert (counts - theirs).abs().sum() / counts.sum() < 0.1
    assert not last_generation().notes


def test_scores_and_cache_in_a_dict(model):
    given = {
        "do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True, "repetition_penalty": 1.2,
    }  # fmt: skip
    want = model.generate(prompt(), **given)
    got = dspark_compile.generate(model, prompt(), options=QUICK, **given)
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip((*got.scores, *got.logits), (*want.scores, *want.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    # The conversation goes on over the cache that came back.
    longer = torch.cat((got.sequences, prompt(1, 4, seed=8)), dim=1)
    want = model.generate(longer, do_sample=False, max_new_tokens=6)
    again = dspark_compile.generate(
        model, longer, do_sample=False, max_new_tokens=6, options=QUICK,
        past_key_values=got.past_key_values,
    )  # fmt: skip
    assert torch.equal(again, want) and last_generation().path == "compiled"
    assert got.past_key_values.known == longer.shape[1] + 5


def test_a_decode_cache_works_in_eager_mode(model):
    cache = DecodeCache(model.config)
    got = model.generate(prompt(), do_sample=False, max_new_tokens=9, past_key_values=cache)
    assert torch.equal(got, model.generate(prompt(), do_sample=False, max_new_tokens=9))


def test_int8_cache(model):
    exact = model.generate(prompt(1, 30), do_sample=False, max_new_tokens=20)
    got = dspark_compile.generate(
        model, prompt(1, 30), do_sample=False, max_new_tokens=20, kv_cache="int8", options=QUICK
    )
    assert last_generation().path == "compiled", last_generation().notes
    eager = model.generate(
        prompt(1, 30), do_sample=False, max_new_tokens=20,
        past_key_values=DecodeCache(model.config, scheme="int8"),
    )  # fmt: skip
    assert torch.equal(got, eager)
    assert (got == exact).float().mean() > 0.6  # a random model's near-ties fall either way


@pytest.mark.parametrize(
    "given, says",
    [
        ({"num_beams": 2}, "beam_search"),
        ({"use_cache": False, "return_dict_in_generate": True}, "use_cache is off"),
        ({"past_key_values": "static"}, "StaticCache"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
    ],
)
def test_the_rest_goes_to_transformers(model, given, says):
    given = dict(given)
    ids = prompt(1, 12)
    if given.get("past_key_values") == "static":
        both = []
        for _ in range(2):
            cache = StaticCache(config=model.config, max_cache_len=64)
            with torch.no_grad():
                model(ids[:, :5], past_key_values=cache)
            both.append(cache)
        given["past_key_values"] = both[0]
    want = model.generate(ids, max_new_tokens=5, do_sample=False, **given)
    if "past_key_values" in given:
        given["past_key_values"] = both[1]
    got = dspark_compile.generate(model, ids, max_new_tokens=5, do_sample=False, **given)
    if not isinstance(got, torch.Tensor):
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want)
    report = last_generation()
    assert report.path == "transformers" and says in report.notes[0]


def test_a_step_that_cannot_be_traced_is_taken_eagerly():
    own = qwen()
    forward = own.model.layers[0].mlp.forward

    def breaks(x):
        torch._dynamo.graph_break()
        return forward(x)

    own.model.layers[0].mlp.forward = breaks
    report = check(own, input_ids=prompt())
    assert report.path == "eager" and "cannot be traced whole" in report.notes[0]


def test_positions_that_are_no_tokens():
    """CPM-Ant puts a prompt of its own in front: its cache holds more than the tokens."""
    from tests.zoo import families

    report = check(
        families.build("cpmant").eval(), input_ids=families.tokens("cpmant", 9, 1), pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    assert report.path == "transformers" and "positions for 9 tokens" in report.notes[0]


def test_a_wrong_step_is_found_out(monkeypatch):
    from dspark_compile.runtime import rounds

    class Wrong(rounds.Captured):
        def __init__(self, *given):
            super().__init__(*given)
            self.first = self.first + torch.randn_like(self.first)

    monkeypatch.setattr(rounds, "Captured", Wrong)
    report = check(qwen(), input_ids=prompt())
    assert report.path == "eager" and "differ from eager ones" in report.notes[0]


@pytest.mark.parametrize(
    "given, error, says",
    [
        ({"kv_cache": "int2"}, ValueError, "kv_cache='int2' is unknown; choose"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"nonsense": 3}, ValueError, "nonsense"),
    ],
)
def test_bad_arguments(model, given, error, says):
    with pytest.raises(error, match=says):
        dspark_compile.generate(model, prompt(), **given)


def test_bad_tokens_and_masks(model):
    for ids, error, says in (
        (prompt().float(), ValueError, "torch.float32: give token ids"),
        (prompt().bool(), ValueError, "torch.bool: give token ids"),
        ([[1, 2]], ValueError, "input_ids are list: give a tensor"),
        (prompt()[0], ValueError, "give a tensor of token ids, int64"),
        (prompt() + 9000, IndexError, "which is no token: the model knows 0 to"),
        (prompt() - 9000, IndexError, "hold -"),
    ):
        with pytest.raises(error, match=says):
            dspark_compile.generate(model, ids, max_new_tokens=3)
    mask = torch.ones(1, prompt().shape[1] + 1, dtype=torch.long)
    mask[:, 0] = 0
    with pytest.raises(ValueError, match=r"attention_mask is \[1, .* and input_ids are"):
        dspark_compile.generate(model, prompt(), attention_mask=mask, max_new_tokens=3)
    with pytest.raises(ValueError, match="logits_processor is a function: give a list"):
        dspark_compile.generate(model, prompt(), lambda i, s: s, max_new_tokens=3)
    with pytest.raises(OptionsError, match="unknown option 'nope'"):
        dspark_compile.generate(model, prompt(), max_new_tokens=3, options={"nope": 1})
    got = dspark_compile.generate(model, prompt().int(), max_new_tokens=3)
    assert got.dtype == torch.int64
    assert torch.equal(got, model.generate(prompt(), max_new_tokens=3))


@pytest.mark.parametrize("custom", [True, False])
def test_an_assistant_is_named_where_it_is_left_out(model, custom):
    given = {"max_new_tokens": 5, "assistant_model": model}
    if custom:
        out = model.generate(prompt(), custom_generate=dspark_compile.generate, **given)
    else:
        out = dspark_compile.generate(model, prompt(), **given)
    assert "assistant_model is not used: give it as draft=" in last_generation().notes
    assert torch.equal(out, model.generate(prompt(), max_new_tokens=5))


def test_more_tokens_than_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=24)
    small = GPT2LMHeadModel(config).eval()
    ids = prompt() % 90
    room = 24 - ids.shape[1]
    with pytest.raises(IndexError, match="the model has 24 positions: ask for fewer"):
        dspark_compile.generate(small, ids, max_new_tokens=room + 20)
    got = dspark_compile.generate(small, ids, max_new_tokens=room + 1)
    assert torch.equal(got, small.generate(ids, max_new_tokens=room + 1))


def test_no_module():
    with pytest.raises(ValueError, match=r"model is a str: give a torch\.nn\.Module"):
        dspark_compile.generate("gpt2", prompt(), max_new_tokens=3)
