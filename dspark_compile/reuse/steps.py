"""A graph that became one native call, kept for the next process.

Tracing a model's Python is Dynamo's and happens anew in every process. What this package then does
to the graph (functional tracing, passes, planning) is a function of what `key.graph_key` hashes,
and what comes of it is a layout and a report: both are kept, and a graph whose key is found becomes
its native call at once. Kernels are found as always, by their source.

Kept is what has no part outside of the layout but recipes for inputs (`inputs`: the tensors inside
of a quantised weight, int4 weights packed, an int8 cache): no merged weights, and no assumption
about a symbolic size beyond those Dynamo made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dspark_compile import _torch_compat as compat
from dspark_compile import _torch_compat_experts as expert_turns
from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp.program import NativeProgram
from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.diagnostics.serialize import graph_from_dict, graph_to_dict
from dspark_compile.options import Options
from dspark_compile.passes import expert_loops
from dspark_compile.passes.base import PassContext
from dspark_compile.passes.native_step import assemble, report_kernels
from dspark_compile.reuse import files, layout
from dspark_compile.reuse.inputs import Inputs
from dspark_compile.reuse.key import NoKey, graph_key

_LISTS = ("passes", "rejections", "sites", "kv_plan", "kernels", "fallbacks")
FOUND = "kept from an earlier process: its passes and their times are those of then"


class KeptStep:
    """The place of one graph among what is kept.

    Args:
        gm: as Dynamo traced it.
        inputs: of the graph.
        options: of the back end.
        report: of the graph; what it says already is not kept.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], options: Options, report: GraphReport
    ) -> None:
        self.report, self.began, self._inputs = report, time.perf_counter(), inputs
        self.key: str | None = None
        self.reason = _refusal(gm, inputs, options)
        self._notes = len(report.notes)
        if self.reason is not None:
            return
        self._assumed = compat.assumptions(given=True)
        try:
            self.key = graph_key(gm, inputs, options, compat.assumptions())
        except (NoKey, OSError) as error:
            self.reason = str(error)

    @classmethod
    def of_key(cls, key: str, inputs: Sequence[Any], report: GraphReport) -> KeptStep:
        """What is kept under ``key``, of a graph of ``inputs`` that nobody traced."""
        self = cls.__new__(cls)
        self.report, self.began, self.key = report, time.perf_counter(), key
        self._inputs = inputs
        self.reason, self._notes = None, len(report.notes)
        return self

    def load(self) -> Callable[..., Any] | None:
        """The native call, and its report filled in; None where none is kept."""
        if self.key is None:
            return None
        try:
            data = files.read(self.key)
            if data is None:
                return None
            native = NativeProgram(layout.from_data(data["layout"]))
            made = Inputs.from_data(data["inputs"])
            if not made.fit(self._inputs):
                return None
            run = made.around(assemble(native, [(kind, value) for kind, value in data["form"]]))
            then = graph_from_dict(data["report"])
        except build.UnsafeCacheError as error:
            self.report.note(f"kept steps are not read: {error}")
            self.key = None
            return None
        except (build.BuildError, KeyError, TypeError, ValueError):
            return None  # as if there were none; it is written anew
        report = self.report
        for name in _LISTS:
            getattr(report, name).extend(getattr(then, name))
        report_kernels(native, report)
        for note in [*then.notes, FOUND]:
            report.note(note)
        report.ops.update(then.ops)
        report.num_nodes_after, report.from_cache = then.num_nodes_after, True
        report.seconds["reuse"] = time.perf_counter() - self.began
        run.kept = self.key  # type: ignore[attr-defined]
        return run

    def save(
        self,
        native: Callable[..., Any],
        run: Callable[..., Any],
        ctx: PassContext,
        inputs: Inputs,
    ) -> None:
        """Keep ``native``, what `assemble` made, which is ``run`` behind ``inputs``; where it
        cannot be, the report says why."""
        if self.key is None:
            if self.reason:
                self.report.note(f"not kept for the next process: {self.reason}")
            return
        try:
            if compat.assumptions(given=True) != self._assumed:
                raise layout.CannotKeep("passes assumed something of a symbolic size")
            files.write(self.key, self._data(native, inputs))
            run.kept = self.key  # type: ignore[attr-defined]
        except (layout.CannotKeep, build.BuildError, OSError) as error:
            self.report.note(f"not kept for the next process: {error}")

    def _data(self, run: Callable[..., Any], inputs: Inputs) -> dict[str, Any]:
        form = run.form  # type: ignore[attr-defined]
        if not all(v is None or isinstance(v, (bool, int, float)) for _, v in form):
            raise layout.CannotKeep("an output of the graph is no number")
        then = graph_to_dict(self.report)
        then["notes"] = then["notes"][self._notes :]
        # These are made again: their paths are those of the process that reads.
        then["kernels"] = [k for k in then["kernels"] if k["impl"] != "native"]
        native: NativeProgram = run.native  # type: ignore[attr-defined]
        return {
            "layout": layout.to_data(native.layout), "form": form, "inputs": inputs.to_data(),
            "report": then,
        }  # fmt: skip


def _refusal(gm: fx.GraphModule, inputs: Sequence[Any], options: Options) -> str | None:
    """Why nothing is kept; "" where the options say so."""
    if options.reuse == "off" or options.verify or options.keep_programs:
        return ""
    if options.kernels not in ("auto", "cpp") or options.inner == "eager":
        return ""
    if not all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor)):
        return ""
    if options.merge_linears:
        return "merge_linears moves the weights"
    sizes = expert_turns.sizes_allowed() and expert_turns.has_data_sizes(gm.graph) is not None
    if sizes or expert_loops.left(gm.graph) is not None:
        return "it was traced on trust of a loop over experts"
    return None
