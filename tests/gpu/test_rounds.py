"""Rounds on a GPU, captured as CUDA graphs: skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import dspark_compile
from dspark_compile import last_generation
from dspark_compile.runtime import device_graph, device_rounds
from dspark_compile.runtime.generate import free
from tests.test_generate import Listener, prompt, qwen, ragged

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    model = qwen().to("cuda")
    yield model
    free(model)


def on(**given):
    return {k: x.to("cuda") if isinstance(x, torch.Tensor) else x for k, x in given.items()}


def generate(model, **given):
    given = {"do_sample": False, "max_new_tokens": 60} | on(**given)
    ids = given.pop("input_ids")
    return dspark_compile.generate(model, ids, **given)


def test_tokens_are_those_of_eager_code(model):
    for given in ({"input_ids": prompt()}, ragged(3)):
        want = model.generate(**on(**given), do_sample=False, max_new_tokens=60)
        assert torch.equal(generate(model, **given), want)
        report = last_generation()
        assert report.path == "captured", report.notes
        assert report.looks < 60


def test_a_replayed_visit_does_not_synchronise(model):
    generate(model, input_ids=prompt())
    rounds = next(r for idle in dspark_compile.runtime.rounds.POOL._idle[model].values()
                  for r in idle)  # fmt: skip
    rounds.begin()
    rounds.prefill(prompt().to("cuda"), None, None, 2048)
    chooser = rounds.device.chooser
    chooser.begin(dspark_compile.runtime.token_choice.TokenChoice(), [], 0, prompt().to("cuda"), 97)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = device_graph.HostCopy(rounds.device.launch(32))
        assert rounds.device.captured
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.wait().shape == (32, 1)


def test_a_visit_is_launches_of_graphs_alone(model):
    generate(model, input_ids=prompt())
    with torch.profiler.profile() as profile:
        generate(model, input_ids=prompt(), max_new_tokens=200)
    calls = {e.key: e.count for e in profile.key_averages()}
    assert calls.get("cudaGraphLaunch", 0) >= 190
    waits = sum(n for k, n in calls.items() if k.startswith(("cudaStreamSync", "cudaDeviceSync")))
    assert waits < 40  # the prompt's and the end's: none in each round


def test_seeds_reproduce_and_graphs_draw_what_single_launches_draw(model, monkeypatch):
    given = {**ragged(3), "do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95}

    def text(seed):
        torch.manual_seed(seed)
        return generate(model, **given)

    cold, warm, other = text(1), text(1), text(2)
    assert torch.equal(cold, warm) and not torch.equal(cold, other)
    free(model)
    monkeypatch.setattr(device_rounds, "WARM", 10**9)
    assert torch.equal(text(1), cold) and last_generation().path == "compiled"


def test_a_failed_capture_leaves_the_device_as_it_was():
    device = torch.device("cuda")
    generator, x = torch.Generator(device), torch.zeros(4, device=device)

    def asks():
        x.uniform_(generator=generator)
        return x.sum().item()

    before = torch.cuda.current_stream()
    with pytest.raises(device_graph.CannotCapture):
        device_graph.CudaGraph(asks, device, [generator])
    assert torch.cuda.current_stream() == before
    torch.rand(3, device=device)
    graph = device_graph.CudaGraph(lambda: x.add_(1), device)
    x.zero_()
    graph.replay()
    assert x.tolist() == [1.0] * 4
    graph.release()


def test_memory_comes_back(model):
    generate(model, input_ids=prompt())
    free(model)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for seed in range(5):
        generate(model, input_ids=prompt(seed=seed))
        with pytest.raises(RuntimeError, match="enough"):
            generate(model, input_ids=prompt(), streamer=Listener(9))
        free(model)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_a_streamer_and_an_end(model):
    text = model.generate(**on(input_ids=prompt()), do_sample=False, max_new_tokens=60)
    listener, end = Listener(), int(text[0, 40])
    given = {"eos_token_id": end, "pad_token_id": 0}
    want = model.generate(**on(input_ids=prompt()), do_sample=False, max_new_tokens=60, **given)
    got = generate(model, input_ids=prompt(), streamer=listener, **given)
    assert torch.equal(got, want)
    assert torch.cat(listener.heard[1:]).tolist() == got[0, 7:].tolist()
