"""Measured choices on the CPU: when they are made, what is kept, what the report says."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dspark_compile.codegen import fastest
from dspark_compile.codegen.registry import Implementation
from dspark_compile.diagnostics import state
from dspark_compile.options import Options, OptionsError

MACHINE = {
    "name": "test", "threads": 2, "read": {"1": 1e10}, "copy": {"1": 1e10}, "cached": 1e10,
    "cache": 1 << 20, "rates": {"float32": 1e11}, "launch": 1e-6, "region": 1e-6, "busy": False,
}  # fmt: skip


class Clock:
    """Time that only candidates take: nothing else on the machine has a say."""

    now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(fastest, "time", CLOCK)
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DSPARK_MACHINE", json.dumps(MACHINE))
    monkeypatch.setattr(fastest, "_spent", 0.0)
    monkeypatch.setattr(fastest, "_settled", {})


def site(rows=8, n=512, k=512, op="linear", dtype=torch.float32):
    """A graph of one op; its node."""
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(1, rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype)]
        inputs = [graph.placeholder(name) for name in ("x", "weight")]
        for node, value in zip(inputs, values, strict=True):
            node.meta["val"] = value
        node = graph.call_function(getattr(torch.ops.dspark, op).default, tuple(inputs))
        node.meta["val"] = torch.empty(1, rows, n, dtype=dtype)
    return node


class Candidate:
    """An implementation that takes its time, and counts its calls."""

    def __init__(self, name, seconds, why_not=None):
        self.calls, self.seconds = 0, seconds
        self.implementation = Implementation(name, "linear", lambda node: why_not, self)

    def __call__(self, x, weight):
        assert x.shape == (1, 8, 512) and weight.shape == (512, 512) and type(x) is torch.Tensor
        self.calls += 1
        CLOCK.now += self.seconds + 1e-6


def names(result):
    return [c.name for c in result[0]]


def test_the_fastest_comes_first_and_is_kept(monkeypatch):
    slow, quick = Candidate("cpp", 0.004), Candidate("aten", 0.0)
    candidates = [slow.implementation, quick.implementation]
    result = fastest.arrange(site(), candidates, "auto", eager=True)
    assert names(result) == ["aten", "cpp"] and slow.calls and quick.calls
    assert result[1].startswith("measured: cpp ") and ", aten " in result[1]
    # Another process: nothing is settled, the file is there.
    monkeypatch.setattr(fastest, "_settled", {})
    known = slow.calls
    assert fastest.arrange(site(), candidates, "auto", eager=True) == result
    assert slow.calls == known
    # Other sizes, other times.
    assert fastest.arrange(site(rows=4), candidates, "auto", eager=True)[1] == ""
    # Without a budget what is known still serves.
    monkeypatch.setattr(fastest, "_spent", 10.0)
    assert names(fastest.arrange(site(), candidates, "auto", eager=True)) == ["aten", "cpp"]


def test_the_first_stays_unless_another_is_clearly_faster(monkeypatch):
    first, second = Candidate("cpp", 0.0), Candidate("aten", 0.0)
    candidates = [first.implementation, second.implementation]
    monkeypatch.setattr(fastest, "_measure", lambda *a: {"cpp": 1.0, "aten": 0.97})
    assert names(fastest.arrange(site(), candidates, "auto", eager=True)) == ["cpp", "aten"]


def test_nothing_is_measured_without_budget_choice_or_need(monkeypatch):
    slow, quick = Candidate("cpp", 0.004), Candidate("aten", 0.0)
    refused = Candidate("aten", 0.0, "too many rows")
    both = [slow.implementation, quick.implementation]
    assert fastest.arrange(site(), both, "off", eager=True) == (both, "")
    one = [slow.implementation, refused.implementation]
    assert fastest.arrange(site(), one, "auto", eager=True) == (one, "")
    monkeypatch.setattr(fastest, "_spent", fastest.SECONDS["auto"])
    assert fastest.arrange(site(), both, "auto", eager=True) == (both, "")
    assert slow.calls == quick.calls == 0
    assert not fastest.unsure(site(rows=fastest.SURE_ROWS))
    assert not fastest.unsure(site(n=8, k=8))  # too short
    assert fastest.unsure(site())


@pytest.mark.parametrize("content", ["", "[]", '{"version": 0}', '{"version": 1, "sites": 3}'])
def test_an_unreadable_table_is_no_table(content):
    path = fastest.table_path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    slow, quick = Candidate("cpp", 0.004), Candidate("aten", 0.0)
    candidates = [slow.implementation, quick.implementation]
    assert names(fastest.arrange(site(), candidates, "auto", eager=True)) == ["aten", "cpp"]
    assert len(fastest.read_table(path)) == 1


def test_a_candidate_that_fails_leaves_the_order():
    class Broken(Candidate):
        def __call__(self, *args):
            raise RuntimeError("no")

    candidates = [Broken("cpp", 0).implementation, Candidate("aten", 0).implementation]
    assert fastest.arrange(site(), candidates, "auto", eager=True) == (candidates, "")
    assert not fastest.read_table(fastest.table_path())


def test_the_option_is_checked():
    with pytest.raises(OptionsError, match=r"tune='always'.*'off', 'auto', 'full'"):
        Options(tune="always")


@torch.no_grad()
@pytest.mark.parametrize(
    "inner,tune",
    [("eager", "auto"), pytest.param("inductor", "full", marks=pytest.mark.slow)],
)
def test_the_report_gives_the_times(monkeypatch, inner, tune):
    monkeypatch.setattr(fastest, "SHORT", 0.0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).logcumsumexp(-1)  # no stage of a native program
            return x

    options = {"kernels": "auto", "inner": inner, "tune": tune, "fallback": "error"}
    model = Two()
    run = torch.compile(model, backend="dspark", options=options)
    x = torch.randn(8, 256)
    torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
    (said,) = (n for n in state.last_report().graphs[0].notes if "measured" in n)
    assert re.fullmatch(r"2 × linear is (cpp|aten), measured: cpp .* ms, aten .* ms", said)
    assert len(fastest.read_table(fastest.table_path())) == 1  # equal layers are one site
