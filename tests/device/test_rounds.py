"""Rounds of a device, captured: run on the CPU over a stand-in for CUDA graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import dspark_compile
from dspark_compile import DecodeCache, last_generation
from dspark_compile.runtime import device_graph, device_rounds, room
from dspark_compile.runtime.generate import free
from dspark_compile.runtime.rounds import POOL, Rounds
from dspark_compile.runtime.synchronisation import Watch
from tests.device.recorder import RecordedGraph
from tests.test_generate import QUICK, Listener, _stingy, prompt, qwen, ragged


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    monkeypatch.setitem(device_graph.GRAPHS, "cpu", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "made", [])
    yield
    for idle in POOL._idle.values():  # the compiled step stays, what was captured goes
        for rounds in (r for several in idle.values() for r in several):
            rounds.device = None


@pytest.fixture(scope="module")
def model():
    return qwen()


def generate(model, **given):
    given = {"do_sample": False, "max_new_tokens": 40} | given
    ids = given.pop("input_ids") if "input_ids" in given else prompt()
    return dspark_compile.generate(model, ids, options=QUICK, **given)


def check(model, **given):
    """Ours equals theirs, in captured rounds; the report."""
    theirs = {"do_sample": False, "max_new_tokens": 40} | given
    streamer = theirs.pop("streamer", None)
    ids = theirs.pop("input_ids") if "input_ids" in theirs else prompt()
    want = model.generate(ids, **theirs)
    got = generate(model, **{"streamer": streamer, **given})
    assert torch.equal(got, want)
    report = last_generation()
    assert report.path == "captured", report.notes
    return report


def test_one_prompt_and_a_ragged_batch(model):
    report = check(model, max_new_tokens=200)
    assert not report.notes and report.new_tokens == 200
    # Rounds are launched ahead: the host looks at many of them at a time.
    assert report.looks < 100
    assert check(model, **ragged(3)).notes == []


def test_one_capture_serves_any_length_and_any_numbers(model):
    for length, new in ((1, 20), (7, 60), (40, 12)):
        check(model, input_ids=prompt(1, length), max_new_tokens=new)
    assert len(RecordedGraph.made) == 1
    for temperature, top_p in ((0.7, 0.9), (1.3, 0.8), (0.2, 0.5)):
        generate(model, do_sample=True, temperature=temperature, top_p=top_p, top_k=20)
        assert last_generation().path == "captured", last_generation().notes
    assert len(RecordedGraph.made) == 2
    check(model, repetition_penalty=1.7)
    check(model, repetition_penalty=1.2, input_ids=prompt(seed=4))
    assert len(RecordedGraph.made) == 3


def test_growth_captures_anew_and_keeps_what_is_held(model, monkeypatch):
    free(model)  # another test may have left a cache that is large enough
    monkeypatch.setattr(room, "SMALLEST", 16)
    monkeypatch.setattr(Rounds, "reserve", _stingy(Rounds.reserve))
    check(model, **ragged(4, 11), max_new_tokens=150)
    assert 1 < len(RecordedGraph.made) <= 3  # rooms of 128 and 256
    assert all(g.calls is None for g in RecordedGraph.made[:-1])


def test_a_round_never_makes_the_host_wait(model, monkeypatch):
    seen = []
    original = device_rounds.DeviceRounds._round

    def watched(self):
        with Watch(refuse=True):
            original(self)
        seen.append(1)

    monkeypatch.setattr(device_rounds.DeviceRounds, "_round", watched)
    given = {"do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    generate(model, **ragged(3), eos_token_id=[3, 5], pad_token_id=0, **given)
    generate(model)
    assert len(seen) > 4


def test_stops_at_eos_row_by_row(model):
    text = model.generate(**ragged(), do_sample=False, max_new_tokens=60)
    eos = [int(text[0, 12]), int(text[1, 40]), int(text[2, 30])]
    check(model, **ragged(), eos_token_id=eos, pad_token_id=0, max_new_tokens=60)
    for end in (int(text[0, 9]), int(text[0, 12])):  # the first new token, or one of the first
        given = {"eos_token_id": end, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 60}
        assert torch.equal(generate(model, **given), model.generate(prompt(), **given))


def test_a_streamer_hears_every_token_and_may_raise(model):
    listener = Listener()
    check(model, streamer=listener)
    want = model.generate(prompt(), do_sample=False, max_new_tokens=40)
    assert listener.ended and len(set(want[0, 7:].tolist())) > 1
    assert torch.cat(listener.heard[1:]).tolist() == want[0, 7:].tolist()
    idle = sum(len(x) for x in POOL._idle[model].values())
    with pytest.raises(RuntimeError, match="enough"):
        generate(model, streamer=Listener(20))
    assert sum(len(x) for x in POOL._idle[model].values()) == idle - 1
    assert RecordedGraph.made[-1].calls is None  # its memory went back
    check(model)


def test_the_cache_that_comes_back_ends_with_the_text(model):
    text = model.generate(prompt(), do_sample=False, max_new_tokens=60)
    given = {"return_dict_in_generate": True, "eos_token_id": int(text[0, 45]), "pad_token_id": 0}
    got = generate(model, max_new_tokens=60, **given)
    assert last_generation().path == "captured"
    assert got.past_key_values.known == got.sequences.shape[1] - 1 < 66
    longer = torch.cat((got.sequences, prompt(1, 4, seed=8)), dim=1)
    want = model.generate(longer, do_sample=False, max_new_tokens=20)
    again = generate(
        model, input_ids=longer, max_new_tokens=20, past_key_values=got.past_key_values
    )
    assert torch.equal(again, want)


def test_seeds_reproduce_and_capturing_draws_nothing_of_its_own(model, monkeypatch):
    given = {"do_sample": True, "temperature": 1.3, "top_k": 50, "max_new_tokens": 60}

    def text(seed):
        torch.manual_seed(seed)
        return generate(model, **ragged(), **given)

    cold, warm, other = text(1), text(1), text(2)
    assert torch.equal(cold, warm) and not torch.equal(cold, other)
    free()
    monkeypatch.setattr(device_rounds, "WARM", 10**9)  # launch by launch
    assert torch.equal(text(1), cold)
    assert last_generation().path == "compiled"


@pytest.mark.slow
def test_sampling_follows_the_distribution(model):
    ids = prompt().expand(256, -1)
    given = {"do_sample": True, "max_new_tokens": 8, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
    ours, theirs = torch.zeros(97), torch.zeros(97)
    for _ in range(12):
        ours += torch.bincount(generate(model, input_ids=ids, **given)[:, -1], minlength=97)
        theirs += torch.bincount(model.generate(ids, **given)[:, -1], minlength=97)
    assert last_generation().path == "captured"
    both = (ours + theirs).clamp(min=1)
    # Two draws of one distribution: chi-square with as many degrees as tokens, at 5 sigma.
    assert ((ours - theirs) ** 2 / both).sum() < 96 + 5 * (2 * 96) ** 0.5


def test_processors_of_the_caller_leave_the_step_captured(model):
    class Even(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 1::2] = -torch.inf
            return scores

    report = check(model, **ragged(), logits_processor=LogitsProcessorList([Even()]))
    assert report.notes == ["Even is called in Python at every step"] and report.looks is None


def test_states(monkeypatch):
    from tests.zoo import families

    mamba = families.build("mamba2").eval()
    ids = families.tokens("mamba2", 9, 1)
    check(mamba, input_ids=ids, pad_token_id=0)
    text = mamba.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0)
    given = {"eos_token_id": int(text[0, 30]), "pad_token_id": 0, "return_dict_in_generate": True}
    got = generate(mamba, input_ids=ids, **given)
    longer = torch.cat((got.sequences, ids[:, :3]), dim=1)
    again = generate(
        mamba, input_ids=longer, cache_params=got.past_key_values, max_new_tokens=9, pad_token_id=0
    )
    want = mamba.generate(longer, do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(again, want)


# --------------------------------------------------------------------- what cannot be captured


def falls_back(model, says: str):
    want = model.generate(**ragged(), do_sample=False, max_new_tokens=30)
    got = generate(model, **ragged(), max_new_tokens=30)
    report = last_generation()
    assert torch.equal(got, want)
    assert report.path == "compiled" and says in report.notes[0], report.notes
    assert report.looks < 30  # the host still does not look at every step


def test_a_step_that_makes_the_host_wait(model, monkeypatch):
    original = device_rounds.DeviceRounds._step

    def asks(self):
        original(self)
        self._logits = self._logits + self._logits.sum().item() * 0

    monkeypatch.setattr(device_rounds.DeviceRounds, "_step", asks)
    falls_back(model, "rounds are not captured: aten::_local_scalar_dense reads a result")
    assert not RecordedGraph.made


def test_a_capture_that_fails(model, monkeypatch):
    def fails(self, *args):
        raise device_graph.CannotCapture("RuntimeError: operation not permitted")

    monkeypatch.setattr(RecordedGraph, "__init__", fails)
    falls_back(model, "rounds are not captured: RuntimeError: operation not permitted")


def test_a_captured_round_that_is_wrong(model, monkeypatch):
    original = device_rounds.DeviceRounds._step
    count = iter(range(10**6))

    def drifts(self):
        original(self)  # a number that Python changes is a constant of a recording
        self._logits = self._logits + torch.arange(97.0) * next(count)

    with monkeypatch.context() as patched:
        patched.setattr(device_rounds.DeviceRounds, "_step", drifts)
        generate(model)
        assert "a captured round's logits differ by" in last_generation().notes[0]
        assert RecordedGraph.made[-1].calls is None


def test_a_device_without_graphs(model, monkeypatch):
    monkeypatch.setattr(device_rounds, "graphs_for", lambda device: None)
    falls_back(model, "a device of type cpu has no graphs here")


def test_no_more_than_a_few_graphs_are_kept(model):
    for ends in range(6):
        check(model, eos_token_id=[200 + i for i in range(ends)] or None, pad_token_id=0)
    alive = [g for g in RecordedGraph.made if g.calls is not None]
    assert len(RecordedGraph.made) == 6 and len(alive) == device_rounds.KEPT
    free(model)
    assert all(g.calls is None for g in RecordedGraph.made)


def test_a_module_without_a_cache():
    from dspark_compile.models.alibi import Alibi

    own = Alibi.tiny().eval()
    ids = torch.randint(1, 50, (2, 9))
    got = dspark_compile.generate(own, ids, max_new_tokens=30, options=QUICK)
    assert last_generation().path == "captured", last_generation().notes
    with torch.no_grad():
        for _ in range(30):
            ids = torch.cat((ids, own(ids)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, ids)


def test_a_cache_of_the_callers(model):
    cache = DecodeCache(model.config, rows=1)
    got = generate(model, past_key_values=cache)
    assert cache.known == got.shape[1] - 1
    gc.collect()
    check(model)


@torch.no_grad()
def test_modules_without_a_cache():
    """One whose cache is inserted is captured; one that has none is run on the whole text."""
    from tests.test_insert_cache import greedy
    from tests.test_module_speculation import Follows, Mean, sharpen, small

    module, ids = small(), prompt() % 90
    assert torch.equal(generate(module, input_ids=ids), greedy(module, ids, 40))
    assert last_generation().path == "captured", last_generation().notes
    follows, ids = Follows().eval(), (torch.arange(30) % 17)[None]
    got = generate(follows, input_ids=ids, draft="ngram", schedule="fixed")
    assert torch.equal(got[0], torch.arange(70) % 17)
    assert last_generation().speculation.tau > 4
    module = sharpen(Mean())
    ids = prompt() % 90
    got = generate(module, input_ids=ids, max_new_tokens=5)
    for at in range(ids.shape[1], ids.shape[1] + 5):
        want = module(got[:, :at])["logits"][0, -1].argmax()
        assert got[0, at] == want
    assert last_generation().path == "recomputed"
