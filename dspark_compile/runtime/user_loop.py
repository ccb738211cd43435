"""Runs the compiled step of a loop in user code.

What is carried lives in buffers of the loop's own: a step reads them, and what it makes is copied
there behind it. What every step makes is copied to its place in a tensor of ``count`` rows. Where
the step is a native program, the copies are part of one native loop
(`dspark_compile.codegen.cpp.loop`); elsewhere a step is one call of the compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


class UserLoop:
    """A loop: ``(carried, others) -> [*carried, *last, *made]``.

    Args:
        step: compiled; takes carried and other values, returns its results.
        plan: what to do with them.
        first: whether there is a first step, for a loop with a condition.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        plan: LoopPlan,
        first: Callable[..., Any] | None = None,
    ) -> None:
        self.step, self.plan, self.first = step, plan, first

    def __call__(self, carried: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """Run all steps."""
        plan = self.plan
        buffers = [_buffer(x, plan.device) for x in carried]
        others = list(others)
        if self.first is not None and not bool(self.first(*buffers, *others)):
            return self._finish(buffers, [], [])
        made = self._native(buffers, others)
        if made is None:
            made = self._plain(buffers, others)
        return self._finish(buffers, *made)

    def _finish(self, buffers: list[Tensor], last: list[Any], made: list[Any]) -> list[Any]:
        carried: list[Any] = [
            int(x) if i in self.plan.integers else x for i, x in enumerate(buffers)
        ]
        return [*carried, *last, *made]

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
        plan = self.plan
        history: list[Tensor] = []
        last: list[Any] = []
        own = {x.untyped_storage().data_ptr() for x in buffers}
        step = 0
        while plan.count is None or step < plan.count:
            # What is made of what is carried is that of before the step.
            before = [
                x.clone() if ("carried", i) in plan.made or ("carried", i) in plan.last else x
                for i, x in enumerate(buffers)
            ]
            results = self.step(*buffers, *others)
            made = [self._value(o, results, before, others) for o in plan.made]
            if not step:
                assert plan.count is not None or not made
                history = [x.new_empty((plan.count or 0, *x.shape)) for x in made]
            for rows, x in zip(history, made, strict=True):
                rows[step].copy_(x)
            step += 1
            if step == plan.count or plan.count is None:
                last = [self._value(o, results, before, others) for o in plan.last]
                last = [_apart(x, own) for x in last]
            new = [self._value(o, results, buffers, others) for o in plan.carried]
            new = [_apart(x, own) if x is not b else x for x, b in zip(new, buffers, strict=True)]
            for buffer, x in zip(buffers, new, strict=True):
                if x is not buffer:
                    buffer.copy_(x) if isinstance(x, Tensor) else buffer.fill_(x)
            if plan.go is not None and not bool(self._value(plan.go, results, buffers, others)):
                break
        return last, history

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


def _apart(x: Any, own: set[int]) -> Any:
    """``x``, copied if it lies in memory that the loop writes to."""
    if isinstance(x, Tensor) and x.untyped_storage().data_ptr() in own:
        return x.clone()
    return x
