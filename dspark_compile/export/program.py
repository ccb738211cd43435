"""A captured program: the functional graph that the passes rewrite, and the tensors it holds.

    torch.export -> functional ATen, composite calls kept -> capture, trace -> pipeline

are the steps of ``torch.compile``'s way with another front end: the same capture, trace and
pipeline. Two things differ. Weights are known, so that lowering may fold, stack and transpose
them; and caches are values that go in and come out, so that nothing is written in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile import ops as _dialect  # noqa: F401 - registers the dialect
from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.hf_experts import traced_grouped
from dspark_compile.options import Options
from dspark_compile.passes.base import PassContext
from dspark_compile.passes.capture import capture
from dspark_compile.passes.graph import (
    aten,
    clean_path,
    fake_call,
    known_equal,
    module_path,
    op_name,
    source,
)
from dspark_compile.passes.pipeline import run_pipeline
from dspark_compile.passes.trace import trace

from .errors import ExportError
from .plain_module import Plain
from .subject import Subject

# Passes whose results only a runtime of our own understands.
RUNTIME_ONLY = ("write_in_place", "kv_int8", "qk_rope_append", "fuse_dequantize_weight")


class Program:
    """A graph with its state.

    Attributes:
        module: the graph; its placeholders are ``inputs`` and the keys of ``state``.
        inputs: placeholders of the caller's tensors, in order.
        state: for each other placeholder, the tensor it stands for.
        names: the state's names in the model, by placeholder.
        output_names: one for each output.
        fake_mode: the mode of ``node.meta["val"]``.
        report: what the passes found.
        notes: what this export decided, for its report: ``(dialect op, ONNX op, reason)``.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: list[fx.Node],
        state: dict[fx.Node, Tensor],
        names: dict[fx.Node, str],
        output_names: list[str],
        fake_mode: Any,
        report: GraphReport,
        range_constraints: dict[Any, Any],
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.state = state
        self.names = names
        self.output_names = output_names
        self.fake_mode = fake_mode
        self.report = report
        self.range_constraints = range_constraints
        self.fallbacks: list[tuple[str, str]] = []
        self._scalars: dict[tuple[float, torch.dtype], fx.Node] = {}

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def outputs(self) -> list[fx.Node]:
        """The nodes that the graph returns."""
        return list(next(n for n in self.graph.nodes if n.op == "output").args[0])

    def value(self, node: Any) -> Tensor | None:
        """The tensor a node stands for, where it is part of the state."""
        return self.state.get(node) if isinstance(node, fx.Node) else None

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Nodes made inside are said to come from ``name``."""
        known = set(self.graph.nodes)
        try:
            yield
        finally:
            for node in self.graph.nodes:
                if node not in known:
                    node.meta.setdefault("dspark_pass", name)

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A new placeholder that stands for ``value``; its name is made unique."""
        taken = set(self.names.values())
        unique, n = name, 1
        while unique in taken:
            n += 1
            unique = f"{name}_{n}"
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder("c_" + unique.replace(".", "_"))
        with self.fake_mode:
            node.meta["val"] = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=value.device
            )
        self.state[node], self.names[node] = value.detach(), unique
        return node

    def emit(
        self,
        like: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        origin: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """A call before ``like``, with its fake value and the provenance of ``origin``, by default
        ``like``."""
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        origin = like if origin is None else origin
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "dspark_pass"):
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
        node.meta["dspark_op"] = origin.meta.get("dspark_op") or _dialect_name(origin)
        node.meta["dspark_site"] = origin.meta.get("dspark_site") or origin.name
        node.meta["val"] = fake_call(target, args, kwargs, self.fake_mode)
        return node

    def replace(self, old: fx.Node, new: fx.Node | list[fx.Node | None]) -> None:
        """``new`` takes the place of ``old``; a list takes that of its items, by index."""
        if isinstance(new, fx.Node):
            old.replace_all_uses_with(new)
        else:
            for user in list(old.users):
                item = new[user.args[1]]  # type: ignore[index]
                assert item is not None
                user.replace_all_uses_with(item)
                self.graph.erase_node(user)
        self.graph.erase_node(old)

    def scalar(self, value: float, dtype: torch.dtype) -> fx.Node:
        """A constant of no dimensions, one for each that differs."""
        key = (float(value), dtype)
        if key not in self._scalars or self._scalars[key] not in self.state:
            kind = str(dtype).removeprefix("torch.")
            self._scalars[key] = self.constant(f"scalar_{kind}", torch.tensor(value, dtype=dtype))
        return self._scalars[key]

    def input_with(self, size: Any) -> tuple[fx.Node, int] | None:
        """An input and its dimension that has a given size, None if there is none."""
        for node in self.inputs:
            value = node.meta["val"]
            for dim, n in enumerate(value.shape if isinstance(value, Tensor) else ()):
                if known_equal(n, size):
                    return node, dim
        return None

    def evaluate(self, node: Any) -> Tensor | None:
        """What a node computes from the state alone, None if it depends on an input."""
        if not isinstance(node, fx.Node):
            return None
        if node in self.state:
            return self.state[node]
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            return None
        found = {n: self.evaluate(n) for n in node.all_input_nodes}
        if not found or any(v is None for v in found.values()) or target._schema.is_mutable:
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: found[n])
        with torch.no_grad():
            value = (aten.reshape.default if target is aten.view.default else target)(
                *args, **kwargs
            )
        return value if isinstance(value, Tensor) else None

    def fold(self) -> None:
        """Compute what depends on the state alone, unless that makes it much larger or keeps a
        large tensor twice."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not node.all_input_nodes or node.kwargs.get("device"):
                continue
            target, inputs = node.target, node.all_input_nodes
            if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
                continue
            if not all(n in self.state for n in inputs) or target._schema.is_mutable:
                continue
            made = node.meta["val"]
            if not isinstance(made, Tensor) or not all(isinstance(n, int) for n in made.shape):
                continue
            size = sum(self.state[n].numel() for n in inputs)
            kept = any(len(n.users) > 1 for n in inputs)
            if made.numel() > 2 * size + 65536 or (kept and made.numel() > 65536):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.state[n])
            with torch.no_grad():
                value = target(*args, **kwargs)
            name = self.names[inputs[0]] + "_" + target._schema.name.split("::")[-1]
            self.replace(node, self.constant(name, value.contiguous()))
        self.clean()

    def new_input(self, name: str, value: Tensor, after: fx.Node) -> fx.Node:
        """A placeholder of the caller's behind the input ``after``, shaped as ``value``."""
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta["val"] = value
        self.inputs.insert(self.inputs.index(after) + 1, node)
        return node

    def clean(self) -> None:
        """Without dead nodes and without state that nothing reads."""
        self.graph.eliminate_dead_code()
        for node in list(self.state):
            if not node.users:
                self.graph.erase_node(node)
                del self.state[node], self.names[node]
        self.graph.lint()
        self.module.recompile()

    def provenance(self) -> None:
        """Put what is known of each node where later steps of export keep it."""
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            node.meta["custom"] = {
                "dspark_op": node.meta.get("dspark_op") or _dialect_name(node) or op_name(node),
                "dspark_pass": node.meta.get("dspark_pass", "torch.export"),
                "dspark_source": source(node),
                "dspark_module": _module(node),
                "dspark_site": node.meta.get("dspark_site", node.name),
            }


def _dialect_name(node: fx.Node) -> str:
    target = node.target
    if getattr(target, "namespace", None) == "dspark":
        return target._schema.name  # type: ignore[union-attr]
    return ""


def _module(node: fx.Node) -> str:
    """The module's path in the user's model: without the wrapper's own attribute."""
    return clean_path(module_path(node)).removeprefix("model.")


def captured(
    subject: Subject,
    report: GraphReport,
    disable: tuple[str, ...] = (),
    quantised_experts: bool = False,
) -> Program:
    """``torch.export`` of the subject, made functional.

    Args:
        disable: passes to leave out.
        quantised_experts: loops over experts with quantised weights become one op too.

    Raises:
        ExportError: ``torch.export`` cannot trace the model; its message is passed on.
    """
    dims = _dimensions(subject)
    try:
        with torch.no_grad(), traced_grouped():
            exported = torch.export.export(
                subject.module, tuple(subject.example), dynamic_shapes=(dims,), strict=False
            )
            exported = exported.run_decompositions({})
    except Exception as error:
        text = str(error).strip()
        raise ExportError(
            f"torch.export cannot trace {type(subject.module).__name__}: "
            f"{type(error).__name__}: {text[:2000]}"
        ) from error
    module, signature = exported.graph_module, exported.graph_signature
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and not node.users and "assert" in str(node.target):
            module.graph.erase_node(node)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    kinds = torch.export.graph_signature.InputKind
    written = {
        spec.target: spec.arg.name
        for spec in signature.output_specs
        if spec.kind == torch.export.graph_signature.OutputKind.BUFFER_MUTATION
    }
    _check_dynamic(subject, signature, placeholders)
    tensors: dict[int, Tensor] = {}
    names: dict[int, str] = {}
    user: list[int] = []
    buffers: dict[str, int] = {}
    for i, spec in enumerate(signature.input_specs):
        if spec.kind == kinds.USER_INPUT:
            user.append(i)
        elif spec.kind == kinds.BUFFER and spec.target in written:
            buffers[str(spec.target)] = i
        else:
            store = exported.state_dict if spec.target in exported.state_dict else None
            value = exported.constants[spec.target] if store is None else store[spec.target]  # type: ignore[index]
            tensors[i], names[i] = value.detach(), str(spec.target).removeprefix("model.")
    inputs = [n.meta["val"] for n in placeholders]
    with report.timed("trace"):
        traced, mode = trace(capture(module, report), inputs)
    new = [n for n in traced.graph.nodes if n.op == "placeholder"]
    output_names = list(subject.output_names)
    specs = list(signature.output_specs)
    order = [i for i, s in enumerate(specs) if s.target is None or str(s.target) not in written]
    for name in written:
        order.append(next(i for i, s in enumerate(specs) if str(s.target) == str(name)))
    out = next(n for n in traced.graph.nodes if n.op == "output")
    out.args = (tuple(out.args[0][i] for i in order),)
    for name in written:
        short = str(name).removeprefix("model.")
        user.append(buffers[str(name)])
        subject.input_names.append(f"past.{short}")
        output_names.append(f"present.{short}")
        subject.caches[f"past.{short}"] = f"present.{short}"
        if isinstance(subject, Plain):
            subject.buffers.append(short)
    subject.output_names[:] = output_names
    program = Program(
        traced,
        [new[i] for i in user],
        {new[i]: t for i, t in tensors.items()},
        {new[i]: n for i, n in names.items()},
        output_names,
        mode,
        report,
        dict(exported.range_constraints),
    )
    options = Options(
        inner="eager", kernels="aten", verify=False, disable=(*RUNTIME_ONLY, *disable)
    )
    with report.timed("passes"):
        shared = {"quantised_experts": quantised_experts}
        run_pipeline(traced, PassContext(options, report, mode, inputs, shared=shared))
    program.clean()
    return program


def _dimensions(subject: Subject) -> tuple[dict[int, Any], ...]:
    auto = torch.export.Dim.AUTO
    return tuple(dict.fromkeys(dims, auto) for dims in subject.dynamic)


def _check_dynamic(subject: Subject, signature: Any, placeholders: list[fx.Node]) -> None:
    """Whether every dimension that is to be dynamic is.

    Raises:
        ExportError: the model's code fixes one to the example's size.
    """
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    values = [
        node.meta["val"]
        for node, spec in zip(placeholders, signature.input_specs, strict=True)
        if spec.kind == kind
    ]
    for name, value, dims in zip(subject.input_names, values, subject.dynamic):
        for dim, meaning in dims.items():
            if isinstance(value.shape[dim], int):
                raise ExportError(
                    f"the model's code fixes dimension {dim} ({meaning}) of {name} to "
                    f"{value.shape[dim]}: it uses that size as a Python number"
                )
