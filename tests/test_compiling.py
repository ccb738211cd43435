"""What surrounds a compilation: garbage collection, frames, modules without code."""

import gc
import resource

import pytest
import torch
from torch import fx

from dspark_compile import _torch_compat as compat


def test_no_garbage_is_collected_while_it_is_traced_and_it_is_afterwards():
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x):
            return torch.relu(x) + 1

    def backend_sees(gm):
        seen.append(gc.isenabled())
        return original(gm)

    from dspark_compile import backend

    original, backend.has_loops = backend.has_loops, backend_sees
    try:
        compiled = torch.compile(Watched(), backend="dspark", options={"inner": "eager"})
        with torch.no_grad():
            compiled(torch.ones(3))
    finally:
        backend.has_loops = original
    assert seen == [False]
    assert gc.isenabled()


def test_collecting_nests():
    with compat.collecting(False):
        assert not gc.isenabled()
        with compat.collecting(False):
            assert not gc.isenabled()
        assert not gc.isenabled()
        with compat.collecting(True):
            assert gc.isenabled()
            with compat.collecting(False):
                assert not gc.isenabled()
            assert gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_collecting_that_somebody_else_has_turned_off_stays_off():
    gc.disable()
    try:
        with compat.collecting(False), compat.collecting(True):
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_turns_collecting_on_again():
    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        compat.compiling(fails)
    assert gc.isenabled()


def _up_and_down(depth: int) -> int:
    if depth:
        return _up_and_down(depth - 1)
    for _ in range(50):
        _leaf(30)
    return 0


def _leaf(depth: int) -> int:
    return _leaf(depth - 1) if depth else 0


def _faults(call) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_calls_go_up_and_down_in_memory_that_stays_mapped():
    """Whatever the depth, also where a chunk of frames ends just there."""
    depths = range(100, 300, 10)

    def all_depths():
        for depth in depths:
            _up_and_down(depth)

    assert compat.compiling(lambda: 7) == 7
    plain = _faults(all_depths)
    together = min(_faults(lambda: compat.compiling(all_depths)) for _ in range(3))
    if plain < 200:
        pytest.skip("this Python keeps frames otherwise")
    assert together < plain / 4


def test_a_module_has_its_code_when_it_is_wanted():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.neg, (x,)),))
    made = compat.graph_module(torch.nn.Module(), graph)
    assert "torch.neg" in made.code
    assert made(torch.ones(2))[0].tolist() == [-1, -1]
    again = compat.graph_module(made, graph)
    assert fx.Interpreter(again).run(torch.ones(1))[0].tolist() == [-1]
    assert again.forward(torch.ones(1))[0].tolist() == [-1]
