"""Runs the compiled step of a loop in user code.

What is carried lives in buffers of the loop's own: a step reads them, and what it makes is copied
there behind it. What every step makes is copied to its place in a tensor of ``count`` rows. Where
the step is a native program, the copies are part of one native loop
(`dspark_compile.codegen.cpp.loop`). On a GPU a step of a long loop is one launch of a captured
graph, where it can be captured. Elsewhere a step is one call of the compiled graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .device_graph import CannotCapture, graphs_for
from .synchronisation import Watch

log = logging.getLogger(__name__)

LEAST = 16  # steps of a loop that is worth a capture

# Where a value comes from: a result of the step, something carried, another input, a constant.
RESULT, CARRIED, OTHER, CONSTANT = "result", "carried", "other", "constant"
Origin = tuple[str, Any]


@dataclass(frozen=True)
class LoopPlan:
    """What a loop does beside its step.

    Attributes:
        carried: where each new value comes from; as many as are carried.
        last: what is read of the last step.
        made: what each step adds to tensors of ``count`` rows.
        count: steps; None: until ``go`` is false.
        go: after every step, whether there is another one: a bool tensor of the step's.
        integers: which of the carried values come and go as Python numbers.
        device: of those as tensors.
    """

    carried: list[Origin]
    last: list[Origin]
    made: list[Origin]
    count: int | None
    go: Origin | None = None
    integers: frozenset[int] = frozenset()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class _Steps:
    """One run of a loop, step by step.

    Attributes:
        last: what is read of the last step.
        history: what the steps add to tensors of ``count`` rows.
    """

    def __init__(self, loop: UserLoop, buffers: list[Tensor], others: list[Any]) -> None:
        self.loop, self.buffers, self.others = loop, buffers, others
        self.last: list[Any] = []
        self.history: list[Tensor] = []
        self._own = {x.untyped_storage().data_ptr() for x in buffers}
        plan = loop.plan
        # What is made of what is carried is that of before the step.
        read = {o[1] for o in (*plan.made, *plan.last) if o[0] == CARRIED}
        self._kept = [i in read for i in range(len(buffers))]

    def one(self, step: int | Tensor, final: bool) -> bool:
        """Step number ``step``, an int or, where it must be data, an int64 ``[1]``; whether another
        one may follow."""
        plan, buffers, others = self.loop.plan, self.buffers, self.others
        value = self.loop._value
        before = [x.clone() if kept else x for x, kept in zip(buffers, self._kept, strict=True)]
        results = self.loop.step(*buffers, *others)
        made = [value(o, results, before, others) for o in plan.made]
        if made and not self.history:
            assert plan.count is not None
            self.history = [x.new_empty((plan.count, *x.shape)) for x in made]
        for rows, x in zip(self.history, made, strict=True):
            if isinstance(step, Tensor):
                rows.index_copy_(0, step, x.unsqueeze(0))
            else:
                rows[step].copy_(x)
        if final:
            last = [value(o, results, before, others) for o in plan.last]
            self.last = [_apart(x, self._own) for x in last]
        new = [value(o, results, buffers, others) for o in plan.carried]
        new = [_apart(x, self._own) if x is not b else x for x, b in zip(new, buffers, strict=True)]
        for buffer, x in zip(buffers, new, strict=True):
            if x is not buffer:
                buffer.copy_(x) if isinstance(x, Tensor) else buffer.fill_(x)
        return plan.go is None or bool(value(plan.go, results, buffers, others))


class UserLoop:
    """A loop: ``(carried, others) -> [*carried, *last, *made]``.

    Args:
        step: compiled; takes carried and other values, returns its results.
        plan: what to do with them.
        first: whether there is a first step, for a loop with a condition.

    Attributes:
        launches: steps of the last run that were launches of a captured graph.
        reason: why there were none on a device that has graphs.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        plan: LoopPlan,
        first: Callable[..., Any] | None = None,
    ) -> None:
        self.step, self.plan, self.first = step, plan, first
        self.launches = 0
        self.reason: str | None = None

    def __call__(self, carried: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """Run all steps."""
        plan = self.plan
        buffers = [_buffer(x, plan.device) for x in carried]
        others = list(others)
        if self.first is not None and not bool(self.first(*buffers, *others)):
            return self._finish(buffers, [], [])
        made = self._native(buffers, others)
        if made is None:
            self.launches, self.reason = 0, None
            made = self._plain(buffers, others)
        return self._finish(buffers, *made)

    def _finish(self, buffers: list[Tensor], last: list[Any], made: list[Any]) -> list[Any]:
        carried: list[Any] = [
            int(x) if i in self.plan.integers else x for i, x in enumerate(buffers)
        ]
        return [*carried, *last, *made]

    @property
    def how(self) -> str:
        """In words, how steps are run."""
        if self.native:
            return "a native loop"
        long = self.plan.count is not None and self.plan.count >= LEAST and self.plan.go is None
        if long and graphs_for(self.plan.device) is not None:
            return "one launch a step, if it can be captured"
        return "one compiled call a step"

    @property
    def native(self) -> bool:
        """Whether a step is one native call, and the loop too."""
        return hasattr(self.step, "bind")

    def _native(self, buffers: list[Tensor], others: list[Any]) -> Any:
        """(last, made), or None: there is no native program."""
        bind = getattr(self.step, "bind", None)
        if bind is None:
            return None
        from dspark_compile.codegen.cpp.loop import repeat
        from dspark_compile.codegen.cpp.program import BoundProgram

        bound = bind([*buffers, *others])
        if not isinstance(bound, BoundProgram):
            return None
        plan = self.plan
        wanted = [*plan.carried, *plan.last, *plan.made]
        values = [self._value(o, bound.results, buffers, others) for o in wanted]
        if not all(isinstance(x, Tensor) and x.is_contiguous() for x in values):
            return None
        for x, buffer in zip(values, buffers, strict=False):
            if x.dtype != buffer.dtype or x.shape != buffer.shape:
                return None
        if plan.go is not None and (
            plan.go[0] != RESULT or bound.results[plan.go[1]].dtype != torch.bool
        ):
            return None
        return repeat(bound, plan, buffers, others)

    def _plain(self, buffers: list[Tensor], others: list[Any]) -> Any:
        steps, count = _Steps(self, buffers, others), self.plan.count
        k = self._launched(steps)
        while count is None or k < count:
            go = steps.one(k, count is None or k + 1 == count)
            k += 1
            if not go:
                break
        return steps.last, steps.history

    def _launched(self, steps: _Steps) -> int:
        """Run all steps but the last as launches of one graph, if the device has graphs and the
        loop is long; how many steps were run, with `reason` where there might have been more."""
        plan, count = self.plan, self.plan.count
        graphs = graphs_for(plan.device)
        if graphs is None or count is None or plan.go is not None or count < LEAST:
            return 0
        inputs = [x for x in (*steps.buffers, *steps.others) if isinstance(x, Tensor)]
        if any(x.device.type != plan.device.type for x in inputs):
            self.reason = "it reads tensors on the CPU"
            return 0
        watch = Watch()
        with graphs.aside(plan.device):
            steps.one(0, False)
            with watch:
                steps.one(1, False)
        self.reason = watch.found
        if watch.found is not None:
            log.info("a loop's step is not captured: %s", self.reason)
            return 2
        at = torch.full((1,), 2, dtype=torch.int64, device=plan.device)

        def step() -> None:
            steps.one(at, False)
            at.add_(1)

        try:
            graph = graphs(step, plan.device, [_default_generator(plan.device)])
        except CannotCapture as error:
            self.reason = str(error)
            log.info("a loop's step is not captured: %s", self.reason)
            return 2
        try:
            for _ in range(2, count - 1):
                graph.replay()
        finally:
            graph.release()
        self.launches = count - 3
        return count - 1

    @staticmethod
    def _value(
        origin: Origin, results: Sequence[Any], carried: Sequence[Any], others: Sequence[Any]
    ) -> Any:
        kind, which = origin
        if kind == CONSTANT:
            return which
        return {RESULT: results, CARRIED: carried, OTHER: others}[kind][which]


def _buffer(x: Any, device: torch.device) -> Tensor:
    """A copy that may be written to."""
    if not isinstance(x, Tensor):
        return torch.tensor(int(x), dtype=torch.int64, device=device)
    return x.detach().clone(memory_format=torch.contiguous_format)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _apart(x: Any, own: set[int]) -> Any:
    """``x``, copied if it lies in memory that the loop writes to."""
    if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in own:
        return x.clone()
    return x
