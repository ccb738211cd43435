"""`InsertedSpeculativeRounds`: verification by a module whose cache the compiler inserted.

One graph takes any number of new tokens, so a program of width M is that graph on the first M
columns of the block. Its position is where the caches end; what is rejected is overwritten by the
next program, as with any other cache.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dspark_compile.runtime.inserted import InsertedRounds
from dspark_compile.runtime.rounds import NotRounds
from dspark_compile.runtime.speculation.rounds import Verifying

log = logging.getLogger(__name__)

ONE_LENGTH = (
    "rows of a batch go on at their own pace, and caches that the compiler inserts have one length"
)


class InsertedSpeculativeRounds(Verifying, InsertedRounds):
    """`Verifying` rounds of a function of tokens alone.

    Args:
        model, function, rows, options: as `InsertedRounds` has them; ``rows`` must be 1.
        count: K, drafted tokens of a round, at most.

    Raises:
        NotRounds: rows of a batch would have caches of different lengths, and these have one.
        NotIncremental: no cache can be inserted; the node and the reason.
    """

    every = True

    def __init__(
        self,
        model: torch.nn.Module,
        function: Callable[[Tensor], Tensor],
        rows: int,
        options: Mapping[str, Any] | None = None,
        *,
        count: int,
    ) -> None:
        if rows > 1:
            raise NotRounds(ONE_LENGTH)
        self.count = count
        super().__init__(model, function, rows, options)
        if self.only_last:
            log.info("logits of every token are computed: the module gives those of the last")

    def _check(self, function: Callable[[Tensor], Tensor], others: list[int]) -> None:
        try:
            super()._check(function, others)
        except RuntimeError as error:
            if not self.only_last:
                raise
            # What follows the last token's row was written for one row.
            raise NotRounds(f"it gives the logits of the last token alone: {error}") from error

    def _start(self, *args: Any) -> None:
        super()._start(*args)
        self._start_block(self.count)

    def _eager(self, width: int) -> Tensor:
        return self._call(self.block[:, :width])

    def _growing(self) -> list[tuple[Tensor, int]]:
        return self.cache.growing()

    @contextlib.contextmanager
    def _traced(self, width: int) -> Iterator[Callable[[], Tensor]]:
        run, at, given, block = self._run, self._at, self._args, self.block
        length, held = self.cache.length, self.cache.held

        def step() -> Tensor:
            args = list(given)
            args[at] = block[:, :width]
            return run(*args, length, *held)[0]

        yield step
