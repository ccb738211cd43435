"""Subclasses: wrapper tensors among a graph's inputs are replaced by the tensors inside of them.

    placeholder weight: Int8Tensor
        -> placeholders weight_qdata, weight_scale, weight_zero_point: plain tensors
           weight = rebuild(weight_qdata, weight_scale, weight_zero_point)

Tracing runs ``rebuild`` and then the subclass's own rules, so the traced graph holds the ATen calls
on the inner tensors (dequantise, product, scale) that the passes know, and no subclass. The
compiled callable takes the caller's inputs apart in the same way on every call.

Anything that ``torch.compile`` accepts as a traceable wrapper subclass can be taken apart; what
remains refused is named by `CannotDesugar`: tensors of distributed or ragged layout, dynamic
sizes, and graphs that return a subclass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from dspark_compile import _torch_compat as compat


class CannotDesugar(Exception):
    """A graph with tensor subclasses must be handed on unchanged; the message says why."""


class Rebuild:
    """Makes a subclass of its inner tensors: what a graph calls in place of its placeholder.

    Attributes:
        paths: how to get each inner tensor from the subclass, in order: attribute names.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        self.type = type(tensor)
        self.context = context
        self.size, self.stride = tensor.size(), tensor.stride()
        self.names = list(names)
        inner = [getattr(tensor, name) for name in names]
        self.nested = [Rebuild(t) if compat.is_subclass(t) else None for t in inner]
        self.paths: list[tuple[str, ...]] = []
        for name, nested in zip(self.names, self.nested, strict=True):
            below = [()] if nested is None else nested.paths
            self.paths += [(name, *path) for path in below]
        self.__name__ = f"rebuild_{self.type.__name__}"

    def __call__(self, *flat: torch.Tensor) -> torch.Tensor:
        rest = list(flat)
        inner: dict[str, Any] = {}
        for name, nested in zip(self.names, self.nested, strict=True):
            if nested is None:
                inner[name] = rest.pop(0)
            else:
                count = len(nested.paths)
                inner[name] = nested(*rest[:count])
                del rest[:count]
        return self.type.__tensor_unflatten__(  # type: ignore[attr-defined]
            inner, self.context, self.size, self.stride
        )

    @property
    def bits(self) -> int:
        """How many bits the values of the inner integers need, as far as the subclass says: torchao
        keeps int4 in int8."""
        context = self.context if isinstance(self.context, dict) else {}
        name = str(context.get("target_dtype", "")).removeprefix("torch.")
        return int(name[3:]) if name[:3] == "int" and name[3:].isdigit() else 8


def plain(value: Any) -> Any:
    """``value``, which the graph returns.

    Raises:
        CannotDesugar: it is a subclass.
    """
    if compat.is_subclass(value):
        raise CannotDesugar(f"the graph returns a {type(value).__name__}")
    return value


def desugar(
    module: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[fx.GraphModule, list[Any], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """``(module, inputs, wrap)`` without subclasses among the inputs.

    ``wrap`` makes a callable on the new inputs one on the old; where each of the new ones comes
    from is ``wrap.paths``, for `take_apart`. Where there is no subclass, everything is returned as
    it was. The inner tensors among the new inputs are fake.

    Raises:
        CannotDesugar: see the module's docstring.
    """
    found = [i for i, x in enumerate(inputs) if compat.is_subclass(x)]
    if not found:
        return module, list(inputs), take_apart(None)
    for i in found:
        _check(inputs[i])
    fakes, _ = compat.fake_inputs(inputs)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    flat: list[Any] = []
    paths: list[tuple[int, tuple[str, ...]]] = []
    late: list[tuple[fx.Node, Rebuild, list[fx.Node]]] = []
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for i, (old, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if i not in found:
            values[old] = graph.node_copy(old)
            if hasattr(old, "_dynamo_source"):
                values[old]._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
            flat.append(value)
            paths.append((i, ()))
            continue
        rebuild = Rebuild(fakes[i])
        inner = [_placeholder(graph, old, path, rebuild) for path in rebuild.paths]
        late.append((old, rebuild, inner))
        flat += [_follow(fakes[i], path) for path in rebuild.paths]
        paths += [(i, path) for path in rebuild.paths]
    for old, rebuild, inner in late:
        node = graph.call_function(rebuild, tuple(inner))
        node.meta.update({k: v for k, v in old.meta.items() if k not in ("grapharg", "val")})
        values[old] = node
    for old in module.graph.nodes:
        if old.op == "output":
            checked = fx.node.map_arg(
                old.args[0], lambda n: graph.call_function(plain, (values[n],))
            )
            graph.output(checked)
        elif old.op != "placeholder":
            values[old] = graph.node_copy(old, values.__getitem__)
    made = fx.GraphModule(module, graph)
    made.meta.update(module.meta)
    return made, flat, take_apart(paths)


@contextlib.contextmanager
def naming(inputs: Sequence[Any]) -> Iterator[None]:
    """Failures to trace a graph with subclasses among its ``inputs`` name them: their own rules
    are what tracing runs.

    Raises:
        CannotDesugar: tracing failed, and there are subclasses.
    """
    names = sorted({type(x).__name__ for x in inputs if compat.is_subclass(x)})
    try:
        yield
    except CannotDesugar:
        raise
    except Exception as error:
        if not names:
            raise
        text = (str(error).strip().splitlines() or [""])[0]
        what = f"an input is a {' and a '.join(names)}, which could not be traced"
        raise CannotDesugar(f"{what}: {type(error).__name__}: {text}") from error


def take_apart(
    paths: Sequence[tuple[int, Sequence[str]]] | None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What makes a callable on inner tensors one on subclasses: tensor n is found in the caller's
    input ``paths[n][0]`` by the attribute names ``paths[n][1]``. None: as it is. ``wrap.given``
    takes a list of inputs apart."""

    def given(args: Sequence[Any]) -> list[Any]:
        if paths is None:
            return list(args)
        return [_follow(args[i], path) if path else args[i] for i, path in paths]

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        if paths is None:
            return run

        def call(*args: Any) -> Any:
            return run(*given(args))

        if hasattr(run, "bind"):
            call.bind = lambda args: run.bind(given(args))  # type: ignore[attr-defined]
        return call

    wrap.paths, wrap.given = paths, given  # type: ignore[attr-defined]
    return wrap


def _follow(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        value = getattr(value, name)
    return value


def _placeholder(graph: fx.Graph, old: fx.Node, path: tuple[str, ...], rebuild: Rebuild) -> fx.Node:
    """The placeholder of an inner tensor, static where its owner is a parameter."""
    node = graph.placeholder("_".join((old.name, *path)))
    static = (old.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    if static is not None:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": static}
    for key in ("stack_trace", "nn_module_stack"):
        if key in old.meta:
            node.meta[key] = old.meta[key]
    node.meta["dspark_bits"] = rebuild.bits
    if hasattr(old, "_dynamo_source"):
        node._dynamo_source = None  # type: ignore[attr-defined]
    return node


def _check(tensor: torch.Tensor) -> None:
    name = type(tensor).__name__
    if type(tensor).__module__.startswith("torch.distributed"):
        raise CannotDesugar(f"an input is a {name}: distributed tensors are not rewritten")
    if tensor.is_nested:
        raise CannotDesugar(f"an input is a {name}: nested tensors are not rewritten")
    if not all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride())):
        raise CannotDesugar(f"an input is a {name} of dynamic size")
