"""`generate` of models with recurrent states: linear attention, state spaces, convolutions."""

from __future__ import annotations

import pytest
import torch

import dspark_compile
from dspark_compile import DecodeCache, last_generation
from dspark_compile.runtime.captured import Captured
from dspark_compile.runtime.decode_cache import rigid
from dspark_compile.runtime.errors import KVCacheError
from dspark_compile.runtime.generate import free
from dspark_compile.runtime.rounds import Rounds
from tests.zoo import families

QUICK = {"inner": "eager"}
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def models():
    made: dict[str, torch.nn.Module] = {}

    def build(family: str) -> torch.nn.Module:
        if family not in made:
            made[family] = families.build(family).eval()
        return made[family]

    yield build
    for model in made.values():
        free(model)


def prompt(rows: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


def ragged(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = prompt(rows)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = ids[row, : 2 * row] = 0
    return {"inputs": ids, "attention_mask": mask}


def check(model, *, own=None, **given):
    given = GREEDY | given
    want = model.generate(**given)
    got = dspark_compile.generate(model, given.pop("inputs"), options=QUICK, **(own or {}), **given)
    assert torch.equal(got, want)
    return last_generation()


def test_windows_that_are_the_caches(models):
    # The model has no mask for its window of 8: a cache that drops nothing would show more.
    report = check(models("moshi"), inputs=prompt())
    assert report.path == "transformers" and "no mask" in report.notes[-1]


# One with states alone, one with layers of both kinds, one with both in one layer, convolutions.
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("falcon_h1", "lfm2")]
KINDS = ["mamba", "qwen3_next", *SLOW]


@pytest.mark.parametrize("family", KINDS)
def test_greedy_text_is_equal(models, family):
    model = models(family)
    for seed, length in ((0, 9), (1, 14), (2, 1)):  # states are emptied between requests
        report = check(model, inputs=prompt(length=length, seed=seed))
        assert report.path == "compiled" and not report.notes
    for _ in range(2):
        report = check(model, **ragged())
        assert report.path == "compiled" and not report.notes


@pytest.mark.slow
def test_one_compilation_and_room_that_grows(models, monkeypatch):
    model, made = models("qwen3_next"), []
    begin = Captured.__init__
    monkeypatch.setattr(
        Captured, "__init__", lambda self, *a, **k: (made.append(1), begin(self, *a, **k))[1]
    )
    free(model)
    for length, new in ((3, 5), (200, 80), (9, 300)):
        check(model, inputs=prompt(length=length), max_new_tokens=new)
    assert len(made) == 1


def test_prefill_chunks_do_not_cut_a_state(models):
    # A state space model does not go on from a state with several tokens.
    model = models("mamba")
    want = model.generate(prompt(), **GREEDY)
    got = dspark_compile.generate(model, prompt(), options=QUICK, prefill_chunk_size=4, **GREEDY)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", SLOW[0]])
def test_going_on_behind_a_cache(models, family):
    model, name = models(family), "cache_params" if family == "mamba" else "past_key_values"
    whole = model.generate(prompt(), **GREEDY)
    cache = DecodeCache(model.config, rows=1)
    first = dspark_compile.generate(
        model, prompt(), options=QUICK, **{**GREEDY, "max_new_tokens": 5, name: cache}
    )
    assert cache.known == 13 and torch.equal(first, whole[:, :14])
    rest = dspark_compile.generate(
        model, whole[:, :17], options=QUICK, **{**GREEDY, "max_new_tokens": 4, name: cache}
    )
    assert torch.equal(rest, whole)


class Enough(Exception):
    pass


class Impatient:
    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, value) -> None:
        self.left -= 1
        if self.left < 0:
            raise Enough

    def end(self) -> None:
        pass


def test_an_exception_leaves_the_callers_states_as_they_were(models):
    model = models("qwen3_next")
    whole = model.generate(prompt(), **GREEDY)
    cache = DecodeCache(model.config, rows=1)
    given = GREEDY | {"past_key_values": cache}
    dspark_compile.generate(model, prompt(), options=QUICK, **given | {"max_new_tokens": 5})
    with pytest.raises(Enough):
        dspark_compile.generate(model, whole[:, :14], options=QUICK, streamer=Impatient(3), **given)
    assert cache.known == 13
    again = dspark_compile.generate(
        model, whole[:, :14], options=QUICK, **given | {"max_new_tokens": 7}
    )
    assert torch.equal(again, whole)


@pytest.mark.parametrize("family", ["qwen3_next", SLOW[0]])
def test_int8_keys_and_exact_states(models, family):
    model = models(family)
    got = dspark_compile.generate(
        model, prompt(), options=QUICK, kv_cache="int8", return_dict_in_generate=True, **GREEDY
    )
    assert last_generation().path == "compiled"
    cache = got.past_key_values
    assert {x.dtype for _, name, x in cache.tensors() if name.endswith("data")} == {torch.int8}
    states = [x for layer in cache.recurrent for x in layer.states().values()]
    assert states and {x.dtype for x in states} == {torch.float32}


def test_tokens_cannot_be_taken_back(models):
    model = models("qwen3_next")
    cache = DecodeCache(model.config, rows=1)
    given = GREEDY | {"past_key_values": cache}
    dspark_compile.generate(model, prompt(), options=QUICK, **given)
    assert not cache.is_croppable
    with pytest.raises(KVCacheError, match="cannot go back to 5"):
        cache.set_length(5)
    with pytest.raises(KVCacheError, match="cannot go back"):
        cache.crop(-2)
    cache.set_length(0)
    assert all(not x.any() for layer in cache.recurrent for x in layer.states().values())


def test_no_speculation(models):
    model = models("mamba")
    report = check(model, inputs=prompt(), own={"draft": "ngram"})
    assert "cannot be taken back" in " ".join(report.notes) and report.path == "compiled"
    target = families.build("llama")
    report = check(target, inputs=prompt(), own={"draft": model})
    assert "cannot be taken back" in " ".join(report.notes) and report.path == "compiled"
    assert rigid(target.config) is None


def test_padding_behind_a_state_is_refused(models):
    model = models("qwen3_next")
    cache = DecodeCache(model.config, rows=2)
    given = GREEDY | {"past_key_values": cache, "max_new_tokens": 3}
    text = dspark_compile.generate(model, prompt(2), options=QUICK, **given)
    mask = torch.ones_like(text)
    mask[0, -1] = 0
    with pytest.raises(KVCacheError, match="rows of equal length"):
        dspark_compile.generate(model, text, attention_mask=mask, options=QUICK, **given)
    assert cache.known == 11


def test_the_check_of_a_step_does_not_advance_the_states(models):
    model = models("qwen3_next")
    rounds = Rounds(model, 1, False, "model", QUICK)
    logits = rounds.prefill(prompt(), None, None, 2048)
    rounds.tokens.copy_(logits.argmax(-1, keepdim=True))
    rounds.step()  # traced, run, put back, run eagerly
    held = [x.clone() for layer in rounds.cache.recurrent for x in layer.states().values()]
    plain = Rounds(model, 1, False, "model", QUICK)
    plain.reason = "not asked for"
    plain.prefill(prompt(), None, None, 2048)
    plain.tokens.copy_(rounds.tokens)
    plain.step()
    want = [x for layer in plain.cache.recurrent for x in layer.states().values()]
    assert rounds.program is not None and rounds.cache.known == plain.cache.known
    for got, x in zip(held, want, strict=True):
        torch.testing.assert_close(got, x)


def test_states_that_modules_hold(models):
    report = check(models("recurrent_gemma"), inputs=prompt())
    assert report.path == "transformers" and "modules hold states" in report.notes[-1]


def test_a_program_knows_for_which_sizes_it_holds():
    x = torch.ones(2, 256)

    def function() -> torch.Tensor:
        return x.sum(1) if x.shape[1] < 300 else x.mean(1)

    program = Captured(function, [(x, 1)], QUICK)
    assert program.holds(256) and program.holds(299) and not program.holds(512)


@torch.no_grad()
def test_logits_that_are_cast_to_float32_are_as_exact_as_the_model():
    """Mamba's are: many layers in bfloat16 differ by more than float32's rounding."""
    from dspark_compile.runtime.rounds import COARSE, TOLERANCE

    model = families.build("mamba").eval()
    for dtype, allowed in ((torch.float32, TOLERANCE[torch.float32]), (torch.bfloat16, COARSE)):
        model.to(dtype)
        assert model(prompt()).logits.dtype == torch.float32
        assert Rounds(model, 1, False)._allowed(torch.float32) == allowed
