"""`Captured`: a function compiled once by Dynamo and driven directly from then on.

Dynamo's guards ask at every call whether the graph still holds: 2-3 ms for a model of 28 layers.
A decode loop owns everything its step reads, and knows that it holds. So the step is traced once,
with its tensors in place; what the back end makes is then called on the graph's own inputs, which
are the same tensor objects every time. On the CPU that is one native call and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dspark_compile import _torch_compat as compat
from dspark_compile.diagnostics import state

from .trace_whole import CaptureError, Whole, trace_whole


def _random_numbers_kept() -> AbstractContextManager[None]:
    """Inside, random numbers are drawn as if outside nobody saw it: a text sampled behind a seed is
    the same whether its step was compiled before or is compiled on the way."""
    device = torch.accelerator.current_accelerator()
    if device is None or device.type not in ("cuda", "xpu"):
        return torch.random.fork_rng(devices=[])
    at = torch.accelerator.current_device_index()
    return torch.random.fork_rng(devices=[at], device_type=device.type)


class Captured:
    """``function()``, which takes no arguments and returns one tensor, as a compiled program.

    Args:
        function: reads and writes tensors that it closes over, in place; traced once, whole.
        growing: tensors and a dimension of each whose size is a symbol; all of one size.
        options: of the back end.
        room: that size, if the program shall be for it alone.

    Attributes:
        room: as given; None: it holds for any.
        varies: whether sizes that vary are why this is not one native call.

    Raises:
        CaptureError: the function cannot be traced whole, or a growing size was specialised.
    """

    room: int | None = None
    varies = False

    def __init__(
        self,
        function: Callable[[], Tensor],
        growing: Sequence[tuple[Tensor, int]] = (),
        options: Mapping[str, Any] | None = None,
        room: int | None = None,
    ) -> None:
        from dspark_compile.backend import dspark

        sizes = {x.shape[dimension] for x, dimension in growing}
        for x, dimension in growing:
            if room is None:
                torch._dynamo.mark_dynamic(x, dimension)
            else:
                compat.not_dynamic(x)
        with _random_numbers_kept():
            whole = trace_whole(
                function,
                lambda gm, inputs: dspark(gm, inputs, options=dict(options or {})),
                hands_on=True,
            )
        if any(whole.args[i] not in sizes for i in whole.symbols):
            raise CaptureError("a size that is not the cache's is a symbol")
        self.first = whole.result
        self._compiled, self._args = whole.compiled, whole.args
        self._symbols, self._place = whole.symbols, whole.place
        self._call: Callable[[], Any] | None = None
        self.whole, self.room = whole, room
        self.version = 0  # how often tensors were replaced
        report = state.last_report()
        notes = report.graphs[-1].notes if report is not None and report.graphs else []
        self.varies = not self.native and any(
            note.startswith("not one native call") and "dynamic" in note for note in notes
        )

    @classmethod
    def again(cls, whole: Whole) -> Captured:
        """A program that an earlier process traced; run once, as tracing does."""
        self = cls.__new__(cls)
        self._compiled, self._args = whole.compiled, whole.args
        self._symbols, self._place = whole.symbols, whole.place
        self._call, self.whole, self.version = None, whole, 0
        self.first = self()
        return self

    def holds(self, size: int) -> bool:
        """Whether the program is right for growing tensors of ``size``."""
        return self.whole.holds(size) if self.room is None else size == self.room

    def replace(self, tensors: Mapping[int, Tensor], size: int) -> None:
        """Other tensors, by the ``id`` of those they replace, and the new size of what grew."""
        self._args = [tensors.get(id(x), x) if isinstance(x, Tensor) else x for x in self._args]
        for i in self._symbols:
            self._args[i] = size
        self._call = None
        self.version += 1

    def tensors(self) -> list[Tensor]:
        """What it reads and writes, besides what it makes."""
        return [x for x in self._args if isinstance(x, Tensor)]

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
        bound = self._bound()
        results = getattr(bound, "results", None)
        if getattr(bound, "draws", None):  # every call wants other random numbers first
            return None
        return None if results is None else results[self._place]

    def stage_seconds(self) -> list[float]:
        """Run once; the seconds of each stage of the native program."""
        return self._bound().stage_seconds()  # type: ignore[attr-defined]

    @property
    def bound(self) -> Any:
        """The `BoundProgram`, of a native one."""
        return self._bound()

    def rounds(self, chooser: Any, tokens: Tensor, count: int) -> Tensor:
        """Up to ``count`` calls, each followed by ``chooser`` over `result`, without Python in
        between: `dspark_compile.codegen.cpp.program.BoundProgram.rounds`."""
        return self._bound().rounds(chooser, tokens, count)  # type: ignore[attr-defined]

    @property
    def native(self) -> bool:
        """Whether a call is one native call."""
        return hasattr(self._compiled, "bind")
