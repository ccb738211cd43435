"""A function's launches as one graph of the device: captured once, launched as a whole.

`CudaGraph` is the only part of the decode loop that needs a GPU. What a round is, when one is
captured and whether it is right (`device_rounds`), and what the host reads and when (`visits`),
is the same code for any class with this interface; tests run it on the CPU with another one.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class CannotCapture(Exception):
    """A function cannot be captured; the message says why. Nothing of it has run."""


class DeviceGraph(Protocol):
    """``function()``, which reads and writes tensors that stay where they are, as one launch.

    Args:
        function: is called once, and what it launches is recorded, not run.
        device: where.
        generators: what it draws from; replaying goes on where they are.

    Raises:
        CannotCapture: it launches what cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
    ) -> None: ...

    @staticmethod
    def stream(device: torch.device) -> Any:
        """What tells the current stream from others: a graph belongs to one."""

    @staticmethod
    def aside(device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Where a function runs once before it is captured."""

    def replay(self) -> None:
        """Launch it on the current stream; the host does not wait."""

    def release(self) -> None:
        """Give its memory back."""


@dataclass
class _Pool:
    """Memory that graphs share. A handle is of no use once all graphs of it are gone."""

    handle: Any
    graphs: int = 0


# One pool for all graphs that are launched on one stream, where they take turns; one stream to
# record on, since a pool's memory belongs to the stream it was recorded on.
_lock = threading.RLock()
_pools: dict[tuple[int, int], _Pool] = {}
_sides: dict[int, Any] = {}


def _leave(key: tuple[int, int], pool: _Pool) -> None:
    with _lock:
        pool.graphs -= 1
        if not pool.graphs and _pools.get(key) is pool:
            del _pools[key]


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _side(device: torch.device) -> Any:
    number = _number(device)
    with _lock:
        if number not in _sides:
            _sides[number] = torch.cuda.Stream(device)
        return _sides[number]


class CudaGraph:
    """`DeviceGraph` of a CUDA or ROCm device."""

    def __init__(
        self,
        function: Callable[[], Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.device = device
        self._graph: Any = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        key = (_number(device), current.cuda_stream)
        collecting = gc.isenabled()
        with _lock, torch.cuda.device(device):  # two captures at a time are more than CUDA takes
            if key not in _pools:
                _pools[key] = _Pool(torch.cuda.graph_pool_handle())
            pool = _pools[key]
            gc.disable()  # what is freed while recording may be a graph
            try:
                for generator in generators:
                    self._graph.register_generator_state(generator)
                with torch.cuda.graph(
                    self._graph, pool=pool.handle, stream=_side(device),
                    capture_error_mode="thread_local",
                ):  # fmt: skip
                    function()
                pool.graphs += 1
                self._left = weakref.finalize(self, _leave, key, pool)
            except Exception as error:
                # A recording that failed leaves its stream current, and may leave generators in it.
                torch.cuda.set_stream(current)
                if _pools.get(key) is pool:  # nor is it known what became of the pool
                    del _pools[key]
                with contextlib.suppress(Exception):
                    self._graph.reset()
                _settle(device)
                line = (str(error).strip().splitlines() or [""])[0]
                raise CannotCapture(f"{type(error).__name__}: {line}") from error
            finally:
                if collecting:
                    gc.enable()

    @staticmethod
    def stream(device: torch.device) -> Any:
        return torch.cuda.current_stream(device).cuda_stream

    @staticmethod
    @contextlib.contextmanager
    def aside(device: torch.device) -> Iterator[None]:
        side, current = _side(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        if self._graph is None:
            return
        torch.cuda.synchronize(self.device)  # it may be running
        self._graph.reset()
        self._graph = None
        self._left()


def _settle(device: torch.device) -> None:
    """Record something that succeeds: the default generator learns that recording is over."""
    with contextlib.suppress(Exception):
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device=device)
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
            x.add_(1)
        graph.reset()


# By device type; others run their rounds launch by launch.
GRAPHS: dict[str, type[DeviceGraph]] = {"cuda": CudaGraph}


def graphs_for(device: torch.device) -> type[DeviceGraph] | None:
    """The class that captures for ``device``, or None."""
    return GRAPHS.get(device.type)


class HostCopy:
    """A copy of a tensor for the host, on its way while the device goes on.

    Args:
        source: on the device; may be overwritten by what is launched later.
    """

    def __init__(self, source: torch.Tensor) -> None:
        if source.device.type != "cuda":
            self._host, self._event = source.to("cpu", copy=True), None
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(source.device))

    def wait(self) -> torch.Tensor:
        """The copy, once it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
