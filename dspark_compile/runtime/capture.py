"""`Captured`: a function compiled once by Dynamo and driven directly from then on.

Dynamo's guards ask at every call whether the graph still holds: 2-3 ms for a model of 28 layers.
A decode loop owns everything its step reads, and knows that it holds. So the step is traced once,
with its tensors in place; what the back end makes is then called on the graph's own inputs, which
are the same tensor objects every time. On the CPU that is one native call and nothing else.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_compile import _torch_compat as compat


class CaptureError(Exception):
    """A function cannot be driven directly; the message says why."""


class Captured:
    """``function()``, which takes no arguments and returns one tensor, as a compiled program.

    Args:
        function: reads and writes tensors that it closes over, in place; traced once, whole.
        growing: tensors and a dimension of each whose size is a symbol; all of one size.
        options: of the back end.

    Raises:
        CaptureError: the function cannot be traced whole, or a growing size was specialised.
    """

    def __init__(
        self,
        function: Callable[[], Tensor],
        growing: Iterable[tuple[Tensor, int]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from dspark_compile.backend import dspark

        made: list[tuple[Callable[..., Any], list[Any], Any]] = []
        symbols: list[list[int]] = []

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            compiled = dspark(gm, inputs, options=dict(options or {}))
            symbols.append([i for i, x in enumerate(inputs) if isinstance(x, torch.SymInt)])

            def run(*args: Any) -> Any:
                outputs = compiled(*args)
                made.append((compiled, list(args), outputs))
                return outputs

            return run

        # For what asks which back end traces.
        backend._torchdynamo_orig_backend = dspark  # type: ignore[attr-defined]

        sizes = {x.shape[dimension] for x, dimension in growing}
        for x, dimension in growing:
            torch._dynamo.mark_dynamic(x, dimension)
        # Dynamo keeps what it compiled with the code object: this one is ours alone.
        code = function.__code__.replace()
        own = types.FunctionType(
            code, function.__globals__, function.__name__, None, function.__closure__
        )
        try:
            # dynamic=False: sizes are numbers but for those that are marked.
            first = torch.compile(own, backend=backend, fullgraph=True, dynamic=False)()
        except compat.trace_errors() as error:
            raise CaptureError(f"it cannot be traced whole: {_first_line(error)}") from error
        finally:
            compat.forget(code)
        if len(made) != 1:
            raise CaptureError("it computes nothing" if not made else "it is more than one graph")
        self._compiled, self._args, outputs = made.pop()  # the back end outlives this: empty it
        places = [i for i, x in enumerate(outputs) if x is first]
        if not places:
            raise CaptureError("its result is not an output of the graph")
        self.first, self._place = first, places[0]
        self._symbols = symbols[0]
        if any(self._args[i] not in sizes for i in self._symbols):
            raise CaptureError("a size that is not the cache's is a symbol")
        self._call: Callable[[], Any] | None = None

    def replace(self, tensors: Mapping[int, Tensor], size: int) -> None:
        """Other tensors, by the ``id`` of those they replace, and the new size of what grew."""
        self._args = [tensors.get(id(x), x) if isinstance(x, Tensor) else x for x in self._args]
        for i in self._symbols:
            self._args[i] = size
        self._call = None

    def __call__(self) -> Tensor:
        """Run once. The result may be the same tensor each time, overwritten."""
        return self._bound()()[self._place]

    def _bound(self) -> Callable[[], Any]:
        if self._call is None:
            bind = getattr(self._compiled, "bind", None)
            if bind is not None:
                self._call = bind(self._args)
            else:
                compiled, args = self._compiled, self._args
                self._call = lambda: compiled(*args)
        return self._call

    @property
    def result(self) -> Tensor | None:
        """What every call writes its result to; None where each makes a new tensor."""
        results = getattr(self._bound(), "results", None)
        return None if results is None else results[self._place]

    def stage_seconds(self) -> list[float]:
        """Run once; the seconds of each stage of the native program."""
        return self._bound().stage_seconds()  # type: ignore[attr-defined]

    def rounds(self, chooser: Any, tokens: Tensor, count: int) -> Tensor:
        """Up to ``count`` calls, each followed by ``chooser`` over `result`, without Python in
        between: `dspark_compile.codegen.cpp.program.BoundProgram.rounds`."""
        return self._bound().rounds(chooser, tokens, count)  # type: ignore[attr-defined]

    @property
    def native(self) -> bool:
        """Whether a call is one native call."""
        return hasattr(self._compiled, "bind")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
