"""The report: data, its views, its three renderings, and the state that says which is written."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_compile.diagnostics import (
    KINDS,
    CompileReport,
    Fallback,
    GraphReport,
    Kernel,
    KVEntry,
    PassRecord,
    Rejection,
    Site,
    state,
)
from dspark_compile.diagnostics.serialize import SCHEMA_VERSION, graph_from_dict, graph_to_dict
from dspark_compile.diagnostics.terminal import human_bytes, render_text


@pytest.fixture
def report(tmp_path) -> CompileReport:
    """Two graphs: one attention raised, two rejected by the same line, some of everything else."""
    kernel = tmp_path / "rms_norm_0.py"
    kernel.write_text("def rms_norm(x): # <kernel source>\n    ...\n")
    report = CompileReport(environment={"torch": "2.13.0"}, options={"kv_cache": "int8"})
    graph = report.add_graph()
    graph.num_nodes_before, graph.num_nodes_after = 100, 60
    graph.add_pass("raise_sdpa", "raise", found=3, rewritten=1, ms=1.5, op_delta={"attention": 1})
    graph.add_pass("add_norm", "optimise", op_delta={})
    graph.add_site("attention", "sdpa", "model.layers.0.self_attn", "attention", impl="aten[cpu]")
    for layer in (1, 2):
        module = f"model.layers.{layer}.self_attn"
        graph.add_site("attention", f"sdpa_{layer}", module, status="rejected", reason="mask")
        graph.reject(
            "raise_sdpa", "attention", f"sdpa_{layer}", module,
            source="model.py:12 in forward: y = sdpa(q, k, v, mask[x])",
            condition="the mask depends on `x`",
            hint="pass a mask that depends on positions only",
        )  # fmt: skip
    graph.add_kv("k", "int8", 1000, 510)
    graph.add_kernel("rms_norm", "model.norm", "triton", str(kernel), predicted_us=1.5)
    graph.note("a note with [brackets]")
    graph.programs["raise"] = "def forward(x):\n    return [x]"
    second = report.add_graph()
    second.add_pass("raise_sdpa", "raise", op_delta={"attention": 2, "sdpa": -2})
    second.add_fallback("graph 1", "gradients are needed")
    report.graph_breaks += ["print was called", "print was called"]
    return report


class TestData:
    def test_kinds_and_statuses_are_checked(self):
        with pytest.raises(ValueError, match=r"unknown kind 'atention'; legal: attention, norm"):
            GraphReport().add_site("atention", "n")
        with pytest.raises(ValueError, match="unknown kind"):
            GraphReport().reject("p", "nope", "n")
        with pytest.raises(ValueError, match=r"unknown status 'ok'; legal: raised, rejected"):
            Site("norm", "n", status="ok")
        with pytest.raises(ValueError, match="unknown kind"):
            CompileReport().sites("nope")

    def test_repeated_rejections_fallbacks_and_notes_are_kept_once(self):
        graph = GraphReport()
        for _ in range(2):
            graph.reject("p", "norm", "n", condition="c")
            graph.add_fallback("w", "r")
            graph.note("x")
        assert len(graph.rejections) == len(graph.fallbacks) == len(graph.notes) == 1

    def test_timed_adds_up(self):
        graph = GraphReport()
        for _ in range(2):
            with graph.timed("raise"):
                pass
        assert set(graph.seconds) == {"raise"}
        assert graph.seconds["raise"] >= 0

    def test_views_run_over_all_graphs(self, report):
        assert [g.index for g in report.graphs] == [0, 1]
        assert len(report.rejections) == 2
        assert report.fallbacks == [Fallback("graph 1", "gradients are needed")]
        assert report.kv_plan == [KVEntry("k", "int8", 1000, 510)]
        assert [k.op for k in report.kernels] == ["rms_norm"]
        assert len(report.sites()) == len(report.sites("attention")) == 3
        assert report.sites("norm") == []

    def test_summary_counts_sites(self, report):
        assert report.summary() == {"attention": {"raised": 1, "rejected": 2}}
        assert CompileReport().summary() == {}

    def test_diff_sums_over_graphs(self, report):
        assert report.diff("raise_sdpa") == {"attention": 3, "sdpa": -2}
        assert report.diff("add_norm") == {}
        with pytest.raises(KeyError, match="no pass named 'nope' ran; ran: add_norm, raise_sdpa"):
            report.diff("nope")

    def test_merge_renumbers_and_leaves_its_parts(self, report):
        other = CompileReport(graph_breaks=["b"], options={"inner": "eager"})
        other.add_graph()
        merged = report.merge(other)
        assert [g.index for g in merged.graphs] == [0, 1, 2]
        assert merged.graph_breaks == [*report.graph_breaks, "b"]
        assert merged.options == {"kv_cache": "int8", "inner": "eager"}
        assert len(report.graphs) == 2
        assert other.graphs[0].index == 0


class TestAssertFused:
    def test_passes(self, report):
        report.assert_fused("attention", n=1)
        fused = CompileReport()
        fused.add_graph().add_site("norm", "n", op="rms_norm")
        fused.assert_fused("norm")

    def test_message_lists_what_was_raised_and_every_rejection(self, report):
        with pytest.raises(AssertionError) as caught:
            report.assert_fused("attention", n=3)
        message = str(caught.value)
        assert "expected 3 of kind 'attention' to be fused; 1 raised, 2 rejected" in message
        assert "raised   model.layers.0.self_attn: attention -> aten[cpu]" in message
        for layer in (1, 2):
            assert f"pass raise_sdpa left model.layers.{layer}.self_attn alone" in message
        assert "model.py:12 in forward: y = sdpa(q, k, v, mask[x])" in message
        assert "the mask depends on `x`" in message
        assert "pass a mask that depends on positions only" in message

    def test_without_n_one_rejection_fails(self, report):
        with pytest.raises(AssertionError, match="expected all sites"):
            report.assert_fused("attention")

    def test_nothing_there_fails(self):
        with pytest.raises(AssertionError, match="nothing was compiled"):
            CompileReport().assert_fused("norm")

    def test_unknown_kind(self, report):
        with pytest.raises(ValueError, match="unknown kind"):
            report.assert_fused("atention")


class TestJson:
    def test_round_trip_by_text_and_by_file(self, report, tmp_path):
        path = tmp_path / "report.json"
        text = report.to_json(path)
        assert json.loads(text)["schema_version"] == SCHEMA_VERSION
        assert CompileReport.from_json(text) == report
        assert CompileReport.from_json(path) == report
        assert CompileReport.from_json(str(path)) == report

    def test_graph_round_trip(self, report):
        data = json.loads(json.dumps(graph_to_dict(report.graphs[0])))
        assert graph_from_dict(data) == report.graphs[0]

    def test_what_json_lacks_becomes_text_or_null(self):
        report = CompileReport(options={"dtype": complex, "disable": ("a", "b"), 3: {2, 1}})
        report.add_graph().add_kernel("op", "site", "impl", predicted_us=float("nan"))
        back = CompileReport.from_json(report.to_json())
        assert back.options["disable"] == ["a", "b"]
        assert back.options["3"] == [1, 2]
        assert "complex" in back.options["dtype"]
        assert back.kernels[0].predicted_us is None

    def test_a_newer_schema_is_refused(self, report):
        data = json.loads(report.to_json())
        data["schema_version"] = SCHEMA_VERSION + 1
        with pytest.raises(ValueError, match="update dspark-compile"):
            CompileReport.from_json(json.dumps(data))

    @pytest.mark.parametrize("text", ["{}", '{"schema_version": 1, "graphs": [3]}', "{nonsense"])
    def test_what_is_no_report_is_refused(self, text):
        with pytest.raises(ValueError):
            CompileReport.from_json(text)

    def test_a_site_with_a_field_missing_is_refused(self):
        text = '{"schema_version": 1, "graphs": [{"sites": [{"kind": "norm"}]}]}'
        with pytest.raises(ValueError, match="not a Site"):
            CompileReport.from_json(text)

    def test_added_fields_are_ignored_and_missing_ones_take_defaults(self):
        text = '{"schema_version": 1, "new": 1, "graphs": [{"index": 0, "newer": 2}]}'
        assert CompileReport.from_json(text) == CompileReport(graphs=[GraphReport()])

    text = st.text(max_size=8)
    counts = st.dictionaries(text, st.integers(-9, 9), max_size=3)
    kinds = st.sampled_from(KINDS)
    graphs = st.builds(
        GraphReport,
        passes=st.lists(
            st.builds(PassRecord, text, text, st.integers(), st.integers(), st.just(0.5), counts),
            max_size=2,
        ),
        rejections=st.lists(st.builds(Rejection, text, kinds, *[text] * 5), max_size=2),
        sites=st.lists(st.builds(Site, kinds, text, text, text), max_size=2),
        kv_plan=st.lists(st.builds(KVEntry, text, text, st.integers(), st.integers()), max_size=2),
        kernels=st.lists(st.builds(Kernel, text, text, text), max_size=2),
        fallbacks=st.lists(st.builds(Fallback, text, text), max_size=2),
        notes=st.lists(text, max_size=2),
        from_cache=st.booleans(),
        ops=counts,
    )

    @given(st.builds(CompileReport, graphs=st.lists(graphs, max_size=2)))
    def test_any_report_survives(self, report):
        assert CompileReport.from_json(report.to_json()) == report


class TestTerminal:
    def test_rejections_are_grouped_by_cause_and_never_left_out(self, report):
        text = render_text(report)
        assert "model.layers.1.self_attn and 1 more: attention left alone by raise_sdpa" in text
        assert "because  the mask depends on `x`" in text
        assert "hint     pass a mask that depends on positions only" in text

    def test_sections(self, report):
        text = render_text(report, width=200)
        assert "dspark: 2 graphs, 2 graph breaks, 100 nodes before, 60 after" in text
        assert "graph 1: gradients are needed" in text
        assert "2× print was called" in text
        assert "510 B (0.51×)" in text
        assert "a note with [brackets]" in text
        assert "aten[cpu]" in text
        assert "raise_sdpa" in text
        assert "add_norm" not in text  # found nothing
        assert "def forward" not in text

    def test_verbose_adds_sites_passes_and_programs(self, report):
        text = render_text(report, verbose=True, width=200)
        assert "add_norm" in text
        assert "Graph 0: program, raise" in text
        assert "return [x]" in text

    def test_empty(self, capsys):
        CompileReport().print()
        assert "no graph was compiled" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("n", "text"),
        [(0, "0 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 40, "5120.0 GiB")],
    )
    def test_human_bytes(self, n, text):
        assert human_bytes(n) == text


class TestHtml:
    def test_one_offline_file_with_everything(self, report, tmp_path):
        path = tmp_path / "report.html"
        report.to_html(path)
        html = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|<script|<link|src=", html)
        for r in report.rejections:
            assert r.module in html
        assert "mask[x]" in html
        assert "gradients are needed" in html
        assert "&lt;kernel source&gt;" in html
        assert "return [x]" in html

    def test_text_is_escaped(self, tmp_path):
        report = CompileReport(graph_breaks=["<b>&"])
        report.to_html(tmp_path / "r.html")
        assert "&lt;b&gt;&amp;" in (tmp_path / "r.html").read_text(encoding="utf-8")


class TestState:
    @pytest.fixture(autouse=True)
    def _clear(self):
        state.clear()
        yield
        state.clear()

    def test_nothing_compiled_is_an_error_that_says_what_to_do(self):
        with pytest.raises(RuntimeError, match="call the compiled model once"):
            state.last_report()

    def test_one_report_a_group(self):
        a, b = state.start_report("a"), state.start_report("b")
        assert a is not b
        assert state.last_report() is b
        assert state.start_report("a") is a
        assert state.last_report() is state.current_report() is a
        assert state.start_report() is not state.start_report()

    def test_old_groups_are_forgotten(self):
        first = state.start_report(0)
        for key in range(1, state.MAX_GROUPS + 1):
            state.start_report(key)
        assert state.start_report(0) is not first

    def test_recording_redirects_this_thread_only(self):
        seen = []
        with state.recording() as report:
            assert state.start_report("a") is report
            assert state.current_report() is report
            thread = threading.Thread(target=lambda: seen.append(state.start_report("a")))
            thread.start()
            thread.join()
        assert seen[0] is not report
        assert state.last_report() is report

    def test_threads_share_a_group(self):
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(state.start_report("k"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(r) for r in found}) == 1


def test_reading_a_report_needs_no_torch():
    code = (
        "import sys, dspark_compile.diagnostics as d\n"
        "d.CompileReport.from_json(d.CompileReport().to_json())\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_are_frozen(report):
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.rejections[0].hint = "x"
