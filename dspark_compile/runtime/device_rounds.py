"""`DeviceRounds`: the rounds of a batch bucket on a device, each one launch of a captured graph.

A round is a step of the compiled program, the choice of tokens from its logits, and a line in the
history of this visit. All it reads and writes lies on the device and stays where it is:

    round    tokens, positions, cache  ->  logits [R, V]  ->  tokens [R, 1], history[at], at + 1

The first rounds of a choice are run launch by launch, as rounds of the text: one warms up what is
built at its first use, one is watched for ops that make the host wait. Then a round is captured,
and what it computes is compared with the same round run launch by launch, before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .device_choice import DeviceChooser
from .device_graph import CannotCapture, DeviceGraph, graphs_for
from .synchronisation import Watch

if TYPE_CHECKING:
    from .rounds import Rounds

log = logging.getLogger(__name__)

MOST = 64  # rounds of a visit
KEPT = 4  # graphs of one bucket, for that many kinds of choice
WARM = 2  # rounds run launch by launch before one is captured


class DeviceRounds:
    """Rounds of a `Rounds` that has a program.

    Attributes:
        chooser: what chooses tokens.
        captured: whether the last round was one launch.
        reason: why it was not; None if nothing speaks against it.
    """

    def __init__(self, rounds: Rounds) -> None:
        self._rounds = rounds
        self.device = rounds.tokens.device
        self.chooser = DeviceChooser(rounds.tokens, rounds.done)
        self._history = rounds.tokens.new_zeros(MOST, rounds.rows)
        self._at = rounds.tokens.new_zeros(1)
        self._logits: Tensor | None = None
        self._graphs: dict[Any, tuple[DeviceGraph, Tensor]] = {}
        self._reasons: dict[Any, str] = {}
        self._warm: dict[Any, int] = {}
        self._valid_for: Any = None
        self.captured = False
        self.reason: str | None = None

    # ------------------------------------------------------------------------------- rounds

    def launch(self, count: int) -> Tensor:
        """``count`` rounds, at most `MOST`; their tokens ``[count, R]``, overwritten by the next
        launch. The host does not wait, but where a round is captured."""
        self._at.zero_()
        for _ in range(count):
            self._run(self.chooser.kind, self._round)
            self._rounds.length += 1
        return self._history[:count]

    def step(self) -> Tensor:
        """A step alone; its logits ``[R, V]``, overwritten by the next."""
        self._run(None, self._step)
        assert self._logits is not None
        return self._logits

    def _step(self) -> None:
        program = self._rounds.program
        assert program is not None
        self._logits = program()

    def _round(self) -> None:
        self._step()
        assert self._logits is not None
        self.chooser(self._logits)
        self._history.index_copy_(0, self._at, self.chooser.all_tokens.T)
        self._at.add_(1)

    # ------------------------------------------------------------------------------ capturing

    def _run(self, kind: Any, body: Callable[[], None]) -> None:
        """Once, by a graph if there is one; and make one when it is time."""
        graphs = graphs_for(self.device)
        key = (kind, None if graphs is None else graphs.stream(self.device))
        program = self._rounds.program
        assert program is not None
        now = (program, program.version)
        if self._valid_for != now:  # other tensors: what is captured reads the old ones
            self.release()
            self._valid_for = now
        found = self._graphs.get(key)
        if found is not None:
            graph, self._logits = found
            graph.replay()
        elif key in self._reasons or graphs is None:
            self.reason = self._reasons.get(key) or (
                f"a device of type {self.device.type} has no graphs here"
            )
            body()
        else:
            self._approach(key, body, graphs)
        self.captured = key in self._graphs
        if self.captured:
            self.reason = None

    def _approach(self, key: Any, body: Callable[[], None], graphs: type[DeviceGraph]) -> None:
        """A round on the way to a graph: a warm one, a watched one, the one that is compared."""
        done = self._warm.get(key, 0)
        self._warm[key] = done + 1
        if done < WARM:
            watch = Watch()
            with graphs.aside(self.device):
                if done < WARM - 1:
                    body()
                    return
                with watch:
                    body()
            reason = watch.found or self._on_host()
            if reason is not None:
                self._refuse(key, reason)
            return
        try:
            graph = graphs(body, self.device, [self.chooser.generator])
        except CannotCapture as error:
            self.chooser.renew_generator()
            self._refuse(key, str(error))
            body()
            return
        captured = self._logits
        assert captured is not None
        before = self._state(self._rounds.length)
        body()
        assert self._logits is not None
        expected = self._logits.float().clone()
        after = self._state(self._rounds.length + 1)
        self._restore(before)
        graph.replay()
        difference = (captured.float() - expected).norm() / expected.norm()
        if not float(difference) <= _allowed(self._logits.dtype):
            graph.release()
            self._restore(after)
            self._refuse(key, f"a captured round's logits differ by {float(difference):.1e}")
            return
        while len(self._graphs) >= KEPT:
            self._graphs.pop(next(iter(self._graphs)))[0].release()
        self._graphs[key] = graph, captured
        self._logits = captured

    def _refuse(self, key: Any, reason: str) -> None:
        self._reasons[key] = self.reason = f"rounds are not captured: {reason}"
        log.info("%s", self.reason)

    def _on_host(self) -> str | None:
        if self.device.type == "cpu":
            return None
        program = self._rounds.program
        assert program is not None
        if any(x.device.type == "cpu" for x in program.tensors()):
            return "the step reads tensors on the CPU"
        return None

    def _state(self, length: int) -> Any:
        """What a round changes, copied; ``length`` tokens are held."""
        rounds, chooser = self._rounds, self.chooser
        rounds.cache.set_length(length)
        tensors = [rounds.tokens, rounds.done, rounds.positions, self._at, self._history]
        if chooser.seen is not None:
            tensors.append(chooser.seen)
        return (
            [(x, x.clone()) for x in tensors], rounds.cache.snapshot(),
            chooser.generator.get_state(),
        )  # fmt: skip

    def _restore(self, state: Any) -> None:
        tensors, held, generator = state
        for x, copy in tensors:
            x.copy_(copy)
        self._rounds.cache.restore(held)
        self.chooser.generator.set_state(generator)

    def release(self) -> None:
        """Give all graphs' memory back."""
        self._logits = None
        for graph, _ in self._graphs.values():
            graph.release()
        self._graphs.clear()
        self._reasons.clear()
        self._warm.clear()


def _allowed(dtype: torch.dtype) -> float:
    from .rounds import COARSE, TOLERANCE

    return TOLERANCE.get(dtype, COARSE)
