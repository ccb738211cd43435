"""The host's part of a decode loop on a device: it launches rounds ahead and looks now and then.

While the device runs the rounds of one visit, the tokens of the one before are on their way to the
host, which so learns a visit late that a text has ended. The rounds launched since then are run for
nothing, and their tokens are dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .device_graph import HostCopy

VISIT = 0.05  # seconds of rounds between two looks: an interrupt waits about twice that long
FIRST = 4  # rounds of the first visit, whose time is not known yet


class Visits:
    """Rounds until every sequence has ended.

    Args:
        launch: launches n rounds, without waiting; returns their tokens ``[n, B]``, which the next
            launch may overwrite.
        eos: tokens that end a sequence.
        most: rounds of a visit.
        lag: visits that may be launched while one is unread; 0: each is read before the next.
        listener: gets the tokens ``[B]`` of every round, on the host, in order.

    Attributes:
        looks: how often the host has waited for tokens.
    """

    def __init__(
        self,
        launch: Callable[[int], Tensor],
        eos: Sequence[int],
        most: int,
        lag: int = 1,
        listener: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.launch, self.most, self.lag, self.listener = launch, most, lag, listener
        self.eos = torch.tensor(list(eos), dtype=torch.long)
        self.looks = 0
        self._seconds = 0.0  # of a round

    def run(self, limit: int, done: Tensor) -> int:
        """At most ``limit`` rounds; how many there were until all rows had ended.

        ``done``: bool ``[B]`` on the host, which rows had ended before.
        """
        ended = done.clone()
        launched = read = 0
        unread: deque[HostCopy] = deque()
        sizes: deque[int] = deque()
        clock = time.perf_counter
        before = clock()
        while not bool(ended.all()):
            if launched < limit:
                count = min(self._count(), limit - launched)
                unread.append(HostCopy(self.launch(count)))
                sizes.append(count)
                launched += count
                if len(unread) <= self.lag and launched < limit:
                    continue
            if not unread:
                break
            tokens, count = unread.popleft().wait(), sizes.popleft()
            self.looks += 1
            now = clock()
            self._seconds, before = (now - before) / count, now
            for row in tokens:
                read += 1
                if self.listener is not None:
                    self.listener(row)
                ended |= torch.isin(row, self.eos)
                if bool(ended.all()):
                    break
        for copy in unread:  # what they copy from may be freed behind this
            copy.wait()
        return read

    def _count(self) -> int:
        if not self._seconds:
            return min(FIRST, self.most)
        return max(1, min(self.most, int(VISIT / self._seconds)))
