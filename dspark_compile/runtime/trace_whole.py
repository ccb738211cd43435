"""`trace_whole`: a function traced once by Dynamo, as one graph with the tensors it reads."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dspark_compile import _torch_compat as compat
from dspark_compile._torch_compat_effects import changed_objects

# transformers sets a variable of a module of its own, and sets it back.
_TRANSFORMERS = "__import_transformers"


class CaptureError(Exception):
    """A function cannot be taken as one graph; the message says why."""


@dataclass(frozen=True)
class Whole:
    """A function's graph.

    Attributes:
        compiled: what the compiler made of it.
        args: the tensors and numbers it was called with: the same objects as the function reads.
        symbols: which of them are numbers that stand for a symbolic size.
        result: what the function returned, and ``place``, which output of the graph that is.
        conditions: what tracing assumed of the symbolic sizes, over ``expressions`` of them.
        effects: Python objects that the function changes, as Dynamo names them: not by the graph.
    """

    compiled: Callable[..., Any]
    args: list[Any]
    symbols: list[int]
    result: Tensor
    place: int
    conditions: list[Any] = field(default_factory=list)
    expressions: list[Any] = field(default_factory=list)
    effects: list[str] = field(default_factory=list)

    def holds(self, size: int) -> bool:
        """Whether the graph is right for symbolic sizes of ``size``: a branch that was taken for
        one length (``if n > window``) may be another for this one."""
        values = dict.fromkeys(self.expressions, size)
        return all(bool(c.xreplace(values)) for c in self.conditions)


def trace_whole(
    function: Callable[[], Tensor],
    compiler: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
    hands_on: bool = False,
) -> Whole:
    """Run ``function()``, which returns one tensor, through ``compiler``.

    Sizes are numbers but for dimensions that were marked as dynamic. ``hands_on``: the compiler
    gives the graph to the back end as it is, which may then ask for another (loops over experts
    are traced on trust, and once more where that is not proved).

    Raises:
        CaptureError: it cannot be traced as one graph, or its result is not of the graph.
    """
    from dspark_compile.backend import dspark

    made: list[tuple[Callable[..., Any], list[Any], list[int], Any]] = []
    assumed: list[tuple[list[Any], list[Any]]] = []
    effects: list[list[str]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = compiler(gm, inputs)
        effects.append([x for x in changed_objects() if _TRANSFORMERS not in x])
        symbols = [i for i, x in enumerate(inputs) if isinstance(x, torch.SymInt)]
        assumed.append(_assumed([inputs[i] for i in symbols]))

        def run(*args: Any) -> Any:
            outputs = compiled(*args)
            made.append((compiled, list(args), symbols, outputs))
            return outputs

        return run

    # For what asks which back end traces.
    backend._torchdynamo_orig_backend = dspark  # type: ignore[attr-defined]
    backend._dspark_hands_on = hands_on  # type: ignore[attr-defined]
    # Dynamo keeps what it compiled with the code object: this one is ours alone.
    code = function.__code__.replace()
    own = types.FunctionType(
        code, function.__globals__, function.__name__, None, function.__closure__
    )
    try:
        with compat.without_guard_errors():
            result = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)()
    except compat.trace_errors() as error:
        raise CaptureError(f"it cannot be traced whole: {compat.in_a_line(error)}") from error
    finally:
        compat.forget(code)
    if len(made) != 1:
        raise CaptureError("it computes nothing" if not made else "it is more than one graph")
    compiled, args, symbols, outputs = made.pop()  # the back end outlives this: empty it
    places = [i for i, x in enumerate(outputs) if x is result]
    if not places:
        raise CaptureError("its result is not an output of the graph")
    conditions, expressions = assumed.pop()
    return Whole(compiled, args, symbols, result, places[0], conditions, expressions, effects.pop())


def _assumed(sizes: list[torch.SymInt]) -> tuple[list[Any], list[Any]]:
    """What is assumed of ``sizes``, and their symbols."""
    conditions: list[Any] = []
    expressions = [x.node.expr for x in sizes]
    for environment in {id(x.node.shape_env): x.node.shape_env for x in sizes}.values():
        conditions += [g.expr for g in environment.guards]
    for symbol, size in zip(expressions, sizes, strict=True):
        bounds = size.node.shape_env.var_to_range.get(symbol)
        if bounds is not None:
            conditions += [sympy.Le(bounds.lower, symbol), sympy.Le(symbol, bounds.upper)]
    return [c for c in conditions if c.free_symbols <= set(expressions)], expressions
