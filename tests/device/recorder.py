"""A stand-in for a CUDA graph on the CPU: records the ops of a function, and calls them again.

As with a graph, nothing runs while recording as far as anybody can see, a replay writes its results
where the recording had them, and whatever Python computed then is a constant from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_compile.runtime.device_graph import CannotCapture
from dspark_compile.runtime.synchronisation import waits


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
        for a in func._schema.arguments:
            x = given.get(a.name)
            if a.alias_info is not None and a.alias_info.is_write and isinstance(x, Tensor):
                key = x.data_ptr()
                if key not in self.before:
                    self.before[key] = x, x.clone()
        result = func(*args, **kwargs)
        reason = waits(func, args, kwargs, result)
        if reason is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {reason}")
        self.calls.append((func, args, kwargs, result))
        return result


class RecordedGraph:
    """`dspark_compile.runtime.device_graph.DeviceGraph`; ``made`` are all that were recorded."""

    made: list[RecordedGraph] = []

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        states = [g.get_state() for g in generators]
        recorder = _Recorder()
        try:
            with recorder:
                function()
        except RuntimeError as error:
            raise CannotCapture(str(error)) from error
        finally:
            for x, copy in reversed(recorder.before.values()):
                x.copy_(copy)
            for g, state in zip(generators, states, strict=True):
                g.set_state(state)
        self.calls: Any = recorder.calls
        self.replays = 0
        self.made.append(self)

    @staticmethod
    def stream(device: torch.device) -> Any:
        return 0

    @staticmethod
    def aside(device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def replay(self) -> None:
        assert self.calls is not None, "it was released"
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            returns = func._schema.returns
            several = result if isinstance(result, (tuple, list)) else (result,)
            anew = again if isinstance(again, (tuple, list)) else (again,)
            for old, new, r in zip(several, anew, returns * len(several), strict=False):
                if isinstance(old, Tensor) and r.alias_info is None and old is not new:
                    old.copy_(new)

    def release(self) -> None:
        self.calls = None
