"""`generate` at its limits: long prompts in pieces, growing caches, interrupts, no memory."""

from __future__ import annotations

import signal

import pytest
import torch

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.runtime import decode_layers, room
from dspark_compile.runtime.errors import KVCacheError
from dspark_compile.runtime.generate import free
from dspark_compile.runtime.rounds import POOL, Rounds
from tests.test_generate import QUICK, Listener, _stingy, check, prompt, qwen, ragged


@pytest.fixture(scope="module")
def model():
    model = qwen()
    yield model
    free(model)


def test_one_graph_for_any_prompt(model, monkeypatch):
    """Prompts of 1 to 2000 tokens, any number of steps: one compilation, one graph."""
    from dspark_compile.runtime import captured

    made = []
    original = captured.trace_whole

    def counted(function, compiler, **given):
        def one(gm, inputs):
            made.append(gm)
            return compiler(gm, inputs)

        return original(function, one, **given)

    monkeypatch.setattr(captured, "trace_whole", counted)
    for length, new in ((1, 3), (2000, 4), (137, 60), (600, 2), (2, 300)):
        assert check(model, input_ids=prompt(1, length), max_new_tokens=new).path == "compiled"
    assert len(made) == 1


def test_a_long_prompt_is_run_in_pieces(model):
    """No more than a piece's tokens are computed at a time, and logits of one."""
    seen = []

    def watch(module, args, kwargs, output):
        if not torch.compiler.is_compiling():
            seen.append((kwargs["input_ids"].shape[1], output.logits.shape[1]))

    handle = model.register_forward_hook(watch, with_kwargs=True)
    try:
        ids = prompt(1, 333)
        dspark_compile.generate(
            model, ids, do_sample=False, max_new_tokens=2, prefill_chunk_size=100, options=QUICK
        )
    finally:
        handle.remove()
    assert [n for n, _ in seen[:4]] == [100, 100, 100, 33]
    assert all(logits == 1 for _, logits in seen)


@pytest.mark.slow
def test_growth_copies_what_is_held_once(model, monkeypatch):
    """Rooms are powers of two, and over a whole text fewer tokens are copied than it has twice."""
    monkeypatch.setattr(room, "SMALLEST", 8)
    monkeypatch.setattr(Rounds, "reserve", _stingy(Rounds.reserve))
    free(model)
    rooms, copied = [], []
    original = decode_layers.DecodeLayer.reserve

    def counted(self, tokens):
        before = self.max_cache_len
        original(self, tokens)
        if self.max_cache_len != before and self.is_initialized:
            rooms.append(self.max_cache_len)
            copied.append(self.known)

    monkeypatch.setattr(decode_layers.DecodeLayer, "reserve", counted)
    check(model, input_ids=prompt(1, 11), max_new_tokens=240)
    layers = model.config.num_hidden_layers
    assert rooms[::layers] == sorted(set(rooms)) and len(rooms) == layers * len(set(rooms))
    assert all(n & (n - 1) == 0 for n in rooms) and max(rooms) == 256
    assert sum(copied) <= layers * 2 * 251
    free(model)


class Interrupts(Listener):
    def put(self, value):
        super().put(value)
        if len(self.heard) == 5:
            raise KeyboardInterrupt


def test_cancelled_from_a_streamer(model):
    check(model, **ragged())
    with pytest.raises(KeyboardInterrupt):
        dspark_compile.generate(
            model, prompt(), max_new_tokens=50, do_sample=False, streamer=Interrupts(),
            options=QUICK,
        )  # fmt: skip
    check(model, **ragged())


def test_control_c_in_a_native_loop():
    """A signal reaches a loop that never returns to Python by itself."""
    model = qwen()
    given = {"do_sample": False, "options": {"kernels": "cpp"}}
    ids = prompt()
    dspark_compile.generate(model, ids, max_new_tokens=4, **given)
    assert last_generation().path == "native", last_generation().notes
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                dspark_compile.generate(model, ids, max_new_tokens=3000, **given)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    want = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert torch.equal(dspark_compile.generate(model, ids, max_new_tokens=12, **given), want)
    free(model)


def test_no_memory_in_the_middle_of_a_text(model, monkeypatch):
    """Growth fails while decoding: a clear error, nothing is kept, the next call works."""
    monkeypatch.setattr(room, "SMALLEST", 16)
    free(model)
    original = decode_layers.DecodeLayer._allocate

    def small(self, tokens):
        if tokens > 128:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        original(self, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(Rounds, "reserve", _stingy(Rounds.reserve))
        patched.setattr(decode_layers.DecodeLayer, "_allocate", small)
        listener = Listener()
        with pytest.raises(KVCacheError, match=r"no memory for a cache of 256 tokens"):
            dspark_compile.generate(
                model, prompt(), max_new_tokens=300, do_sample=False, streamer=listener,
                options=QUICK,
            )  # fmt: skip
        assert len(listener.heard) > 100  # it was in the middle
        assert not any(POOL._idle.get(model, {}).values())
    check(model, input_ids=prompt())


def test_a_length_that_was_asked_for_stays_behind_an_update():
    """Inkling asks where its queries stand, appends keys, and uses the answer then."""
    from dspark_compile.runtime.decode_layers import DecodeLayer

    layer = DecodeLayer()
    first = torch.randn(1, 2, 5, 8)
    layer.update(first, first)

    def step(new):
        length = layer.get_seq_length()
        layer.update(new, new)
        return length + 0, layer.get_seq_length() + 0

    got = torch.compile(step, backend="eager", fullgraph=True)(torch.randn(1, 2, 1, 8))
    assert [int(n) for n in got] == [5, 6]
