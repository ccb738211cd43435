"""explain(): it sees every graph, and leaves the caller's state as it was.

The back end here is a stand-in that records a graph and runs it as it is.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from dspark_compile.diagnostics import CompileReport, state
from dspark_compile.diagnostics.environment import compiler_version, environment, package_version
from dspark_compile.diagnostics.explain import explain


@pytest.fixture(autouse=True)
def backend_calls(monkeypatch):
    """The options of every call of the stand-in back end."""
    calls = []

    def dspark(gm, example_inputs, **kwargs):
        calls.append(kwargs)
        graph = state.start_report("group").add_graph()
        graph.num_nodes_before = len(gm.graph.nodes)
        return gm.forward

    module = ModuleType("dspark_compile.backend")
    module.dspark = dspark
    monkeypatch.setitem(sys.modules, "dspark_compile.backend", module)
    yield calls
    state.clear()


class Counting(torch.nn.Module):
    """Adds to a buffer and to an argument, and draws a random number."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(2))

    def forward(self, x, cache):
        self.steps += 1
        cache.add_(x)
        return x + self.steps + cache + torch.rand(2)


def test_report_of_one_graph(backend_calls):
    model = torch.nn.Linear(4, 4)
    report = explain(model, torch.ones(2, 4), options={"inner": "eager"})
    assert isinstance(report, CompileReport)
    assert len(report.graphs) == 1
    assert report.graphs[0].num_nodes_before > 0
    assert report.graph_breaks == []
    assert report.options["inner"] == "eager"
    assert report.environment["torch"] == torch.__version__
    assert backend_calls == [{"options": {"inner": "eager"}}]
    assert state.last_report() is report


def test_graph_breaks_are_those_of_this_call():
    def breaks(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    for _ in range(2):
        report = explain(breaks, torch.ones(2))
        assert len(report.graphs) == 2
        assert len(report.graph_breaks) == 1


def test_every_call_sees_the_graphs_and_the_callers_code_stays_compiled(backend_calls):
    model = torch.nn.Linear(4, 4)
    compiled = torch.compile(model, backend=sys.modules["dspark_compile.backend"].dspark)
    x = torch.ones(2, 4)
    compiled(x)
    before = len(backend_calls)
    for n in range(1, 12):  # more often than Dynamo's limit of recompilations
        assert len(explain(compiled, x).graphs) == 1
        assert len(backend_calls) == before + n
    compiled(x)
    assert len(backend_calls) == before + 11


def test_buffers_arguments_and_random_state_are_as_before():
    model, x, cache = Counting(), torch.ones(2), torch.zeros(2)
    steps, random_state = model.steps, torch.get_rng_state()
    report = explain(model, x, cache=cache)
    assert len(report.graphs) == 1
    assert model.steps is steps
    assert steps.tolist() == cache.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_hugging_face_caches_are_copied():
    cache_utils = pytest.importorskip("transformers.cache_utils")
    cache = cache_utils.DynamicCache()

    def append(x, cache):
        return cache.update(x, x, 0)[0] + 1

    explain(append, torch.ones(1, 1, 3, 2), cache)
    assert cache.get_seq_length() == 0


def test_aliases_among_arguments_and_buffers_stay_aliases():
    model = Counting()
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[1] is m.steps))
    with torch.compiler.set_stance("force_eager"):
        explain(model, torch.ones(2), model.steps)
    assert seen == [True]


def test_arguments_that_cannot_be_copied_are_named():
    x = torch.ones(2, requires_grad=True) * 2  # autograd made it: deepcopy refuses
    report = explain(torch.nn.ReLU(), x)
    assert report.graphs[0].notes == [
        "explain() could not copy a Tensor among the arguments; it may have changed"
    ]


def test_errors_of_the_model_come_through_and_state_is_restored():
    model = Counting()
    steps = model.steps
    with pytest.raises(Exception, match=r"size|shape|broadcast"):
        explain(model, torch.ones(3), torch.zeros(2))
    assert model.steps is steps


def test_options_are_checked_before_anything_runs():
    from dspark_compile.options import OptionsError

    with pytest.raises(OptionsError, match="unknown option 'kv_cash'"):
        explain(torch.nn.ReLU(), torch.ones(2), options={"kv_cash": "int8"})


def test_environment():
    env = environment()
    assert env["torch"] == torch.__version__
    assert env["cpu"]["threads"] == torch.get_num_threads()
    assert isinstance(env["cpu"]["isa"], list)
    assert package_version("no-such-distribution") is None
    assert compiler_version() is None or isinstance(compiler_version(), str)
