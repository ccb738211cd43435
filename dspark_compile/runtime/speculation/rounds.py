"""`SpeculativeRounds`: the target's verification as compiled programs over state in place.

    block [R, K + 1]    the anchor and K drafted tokens: what a program of width M verifies is
                        its first M columns
    positions [R, 1]    of the anchors
    slot [1]            where the anchors go in the cache

A program of width M appends M tokens to the cache, and gives logits ``[R, M, V]`` and the tapped
hidden states of those tokens, which are outputs of its own graph. Then a commit moves ``slot`` and
``positions`` on, and the next program overwrites what was rejected: that is the crop.

Rows of a batch advance together: ``slot`` moves by the most that any row commits, and what the
others did not fill becomes a hole, hidden by the mask. `compact` closes the holes when the longest
row has a quarter of them. So programs are the same for ragged requests, and none is compiled anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dspark_compile.runtime.captured import Captured
from dspark_compile.runtime.kept_rounds import KeptProgram, kept_rounds
from dspark_compile.runtime.rounds import NotRounds, Rounds
from dspark_compile.runtime.speculation.taps import Taps
from dspark_compile.runtime.trace_whole import CaptureError

# The part of the cache that may be holes.
HOLES = 0.25
# A position that no text has.
FAR = 1 << 40

Follow = Callable[[Tensor, int, Tensor], None]


class Verifying(Rounds):
    """What rounds that verify up to ``count`` drafted tokens of each sequence have in common.

    Attributes:
        places: positions of the block's tokens ``[R, K + 1]``.
        last: the position ``[1, 1]`` of the last token that is any use (`reach`): tokens drafted
            beyond the end of a text stand there, because a model may have no table for more.
        states: by width M, tapped states ``[R, M, m * width]`` of the tokens verified last.
        programs: by width; None where the model is run eagerly.
        reasons: why a width has no program.
    """

    taps: tuple[int, ...] = ()

    def _start_block(self, count: int) -> None:
        """Make room for ``count`` drafted tokens of each row."""
        rows, device = self.rows, self.tokens.device
        self.count = count
        self.speculator: Any = None  # what they belong to, in the pool
        self.block = torch.zeros(rows, count + 1, dtype=torch.long, device=device)
        self.places = torch.zeros_like(self.block)
        self.last = torch.full((1, 1), FAR, dtype=torch.long, device=device)
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.states: dict[int, Tensor] = {}
        self.programs: dict[int, Captured | None] = {}
        self.reasons: dict[int, str] = {}
        # Tokens of each row in the cache, and rows that still want tokens.
        self.filled = torch.zeros(rows, dtype=torch.long, device=device)
        self.live = torch.zeros(rows, dtype=torch.bool, device=device)
        # Called with the tapped states of prompt tokens, their first slot and their positions.
        self.follow: Follow | None = None
        # Called when there is more room, with the tensors that replace others, by their ``id``.
        self.growers: list[Callable[[dict[int, Tensor]], None]] = []

    # ------------------------------------------------------------------------------- a prompt

    def begin(self) -> None:
        super().begin()
        self.filled.zero_()
        self.live.zero_()
        self.slot.zero_()

    def set_length(self, tokens: int) -> None:
        super().set_length(tokens)
        self.slot.fill_(tokens)

    def prefill(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = super().prefill(*args, **kwargs)
        self.slot.fill_(self.length)
        return logits

    def reach(self, batch: int, new: int) -> None:
        """Behind a prompt: each of ``batch`` rows gets ``new`` tokens, at most."""
        # The last token of a text is never read.
        self.last.fill_(int(self.positions[:batch].max()) + max(new, 2) - 2)

    # ------------------------------------------------------------------------------- programs

    def reserve(self, tokens: int) -> None:
        """Room for ``tokens``, for every program, and for whoever keeps caches on these slots."""
        old = {id(x): (layer, name) for layer, name, x in self.cache.tensors()}
        mask = self.mask
        super().reserve(tokens)
        if self.mask is mask:
            return
        new = {(layer, name): x for layer, name, x in self.cache.tensors()}
        replaced = {key: new[where] for key, where in old.items() if where in new}
        replaced[id(mask)] = self.mask
        for width, program in list(self.programs.items()):
            if program is None:
                continue
            size = getattr(self.cache, "size", self.cache.room)
            if program.holds(size):
                program.replace(replaced, size)
            else:  # what tracing assumed of the room: compiled anew when it is wanted
                del self.programs[width]
        for grow in self.growers:
            grow(replaced)

    def ensure(self, width: int) -> Captured | None:
        """The program that verifies ``width`` tokens of each row; None: eagerly, with a reason.

        It is compiled by running it, and compared with an eager run; the cache is as it was.
        """
        if width not in self.programs:
            self.programs[width] = self._compile_width(width)
        return self.programs[width]

    def verify(self, width: int) -> Tensor:
        """Logits ``[R, width, V]`` behind the first ``width`` tokens of the block; valid until the
        next call. The cache has gained ``width`` tokens: `commit` says what stays."""
        program = self.ensure(width)
        return program() if program is not None else self._eager(width)

    def _eager(self, width: int) -> Tensor:
        """`verify` without a program."""
        raise NotImplementedError

    def _keep(self, width: int, states: Tensor) -> None:
        if width not in self.states:
            self.states[width] = states.clone()
        else:
            self.states[width].copy_(states)

    def _compile_width(self, width: int) -> Captured | None:
        cache, length = self.cache, self.length
        expected = self._eager(width).clone()
        wanted = self.states[width].clone() if self.taps else None
        cache.set_length(length)
        kept = self._kept(width)
        program = None if kept is None else kept.load()
        cache.set_length(length)
        if program is not None and self._difference(program, width, expected, wanted) is None:
            return program

        def again() -> None:
            cache.set_length(length)

        try:
            with self._traced(width) as step:
                program = self._captured_step(step, self._growing(), again)
        except CaptureError as error:
            self.reasons[width] = str(error)
            return None
        finally:
            cache.set_length(length)
        reason = self._left_out(program) or self._difference(program, width, expected, wanted)
        if reason is not None:
            self.reasons[width] = reason
            return None
        if kept is not None and program.room is None:
            kept.save(program)
        return program

    def _growing(self) -> list[tuple[Tensor, int]]:
        """What the cache's room is a size of."""
        raise NotImplementedError

    def _traced(self, width: int) -> contextlib.AbstractContextManager[Callable[[], Tensor]]:
        """What verifies ``width`` tokens as a function of nothing, to be traced inside."""
        raise NotImplementedError

    def _kept(self, width: int) -> KeptProgram | None:
        """The place of a width's program among what earlier processes left; None: it has none."""
        return None

    def _difference(
        self, program: Captured, width: int, expected: Tensor, wanted: Tensor | None
    ) -> str | None:
        """How the first run of ``program`` differs from an eager one; None: not by much."""
        pairs = [(program.first, expected)]
        if wanted is not None:
            pairs.append((self.states[width], wanted))
        for got, want in pairs:
            difference = (got.float() - want.float()).norm() / want.float().norm()
            if not difference <= self._allowed(want.dtype):
                return f"it differs from an eager step by {float(difference):.1e}"
        return None

    def _read(self) -> list[Tensor]:
        mine = [x for p in self.programs.values() if p is not None for x in p.tensors()]
        return [*super()._read(), *mine]

    # ------------------------------------------------------------------------------- a commit

    def commit(self, counts: Tensor, live: Tensor) -> int:
        """Row r keeps ``counts[r]`` of the tokens appended last; how far the slots moved.

        ``live``: rows that still want tokens ``[B]``.
        """
        batch = len(counts)
        most = int(counts.max())
        start, self.length = self.length, self.length + most
        if self.rows > 1 and most:
            taken = torch.zeros(self.rows, dtype=torch.long, device=counts.device)
            taken[:batch] = counts
            steps = torch.arange(most, device=counts.device)
            self.mask[:, start : start + most] = (steps < taken[:, None]).long()
        self.filled[:batch] += counts
        self.live[:batch] = live
        self.positions[:batch] += counts[:, None]
        self.set_length(self.length)
        return most

    def compact(self, more: Sequence[Tensor] = ()) -> bool:
        """Close the holes if they are many; whether anything moved.

        Tokens keep their order and their positions; they move to the right end of what is held, so
        that all rows still end at the same slot. ``more``: other caches ``[R, H, N, D]`` on the
        same slots.
        """
        held = self.length
        most = int(torch.where(self.live, self.filled, 0).max())
        if self.rows == 1 or held - most <= HOLES * held:
            return False
        kept = self.mask[:, :held] > 0
        # Stable: what is kept goes behind what is not, in its order.
        order = kept.long().argsort(dim=1, stable=True)[:, held - most :]
        for tensor in [x for _, _, x in self.cache.tensors()] + list(more):
            index = order.view(self.rows, 1, most, *[1] * (tensor.dim() - 3))
            moved = tensor[:, :, :held].gather(
                2, index.expand(-1, tensor.shape[1], -1, *tensor.shape[3:])
            )
            tensor[:, :, :most] = moved
        self.filled.clamp_(max=most)
        steps = torch.arange(most, device=kept.device)
        self.mask[:, :most] = (steps >= most - self.filled[:, None]).long()
        self.mask[:, most:] = 1
        self.set_length(most)
        return True


class SpeculativeRounds(Verifying):
    """`Verifying` rounds of a Hugging Face model.

    Args:
        model, rows, masked, scheme, options: as `Rounds` has them.
        count: K, drafted tokens of a round, at most.
        taps: layers whose output the draft wants, -1 for the embedding.
        placed: the block's tokens have positions of their own, `places`, rather than following the
            anchor: holes may lie between them.

    Raises:
        NotRounds: rows of different lengths need positions, and the model takes none.
    """

    def __init__(
        self,
        model: Any,
        rows: int,
        masked: bool,
        scheme: str = "model",
        options: Mapping[str, Any] | None = None,
        *,
        count: int,
        taps: Sequence[int] = (),
        placed: bool = False,
    ) -> None:
        super().__init__(model, rows, masked, scheme, options)
        if rows > 1 and not self._positioned:
            raise NotRounds("it takes no position_ids, which rows of different lengths need")
        self.taps, self.placed = tuple(taps), placed
        self._start_block(count)

    def _forward(self, given: dict[str, Any]) -> Tensor:
        if not self.taps or self.follow is None:
            return super()._forward(given)
        start = self.cache.known
        with Taps(self.model, self.taps) as taps:
            logits = super()._forward(given)
            states = taps.take()
        positions = given.get("position_ids")
        if positions is None:
            steps = torch.arange(start, start + states.shape[1], device=states.device)
            positions = steps.expand(states.shape[0], -1)
        self.follow(states, start, positions)
        return logits

    def _given(self, width: int) -> dict[str, Any]:
        given: dict[str, Any] = {"input_ids": self.block[:, :width]}
        if self._positioned:
            steps = torch.arange(width, device=self.positions.device)
            places = self.places[:, :width] if self.placed else self.positions + steps
            given["position_ids"] = torch.minimum(places, self.last)
        return given

    def _eager(self, width: int) -> Tensor:
        given = self._given(width)
        if self.masked:
            given["attention_mask"] = self.mask[:, : self.length + width]
        model = self.model
        with Taps(model, self.taps) if self.taps else contextlib.nullcontext() as taps:
            logits = model(past_key_values=self.cache, use_cache=True, **given).logits
            if taps is not None:
                self._keep(width, taps.take())
        return logits

    @contextlib.contextmanager
    def _traced(self, width: int) -> Iterator[Callable[[], Tensor]]:
        hooks = Taps(self.model, self.taps) if self.taps else contextlib.nullcontext()
        with hooks as taps:  # there while the step is traced; then they are outputs of its graph
            yield self._program(width, taps)

    def _kept(self, width: int) -> KeptProgram:
        """The place of a width's program among what earlier processes left."""
        more = {"block": self.block, "places": self.places, "last": self.last}
        if self.taps:
            more["states"] = self.states[width]
        what = ("verify", width, self.taps, self._positioned, self.placed)
        return kept_rounds(self, self._growing(), what, more)

    def _growing(self) -> list[tuple[Tensor, int]]:
        growing = [(x, 2) for _, _, x in self.cache.tensors()]
        if self.masked:
            growing.append((self.mask, 1))
        return growing

    def _program(self, width: int, taps: Taps | None) -> Callable[[], Tensor]:
        """The step as a function of nothing."""
        model, cache, block, positions = self.model, self.cache, self.block, self.positions
        positioned, states, last = self._positioned, self.states.get(width), self.last
        places = self.places if self.placed and positioned else None
        given: dict[str, Any] = {"attention_mask": self.mask} if self.masked else {}

        def step() -> Tensor:
            more = dict(given)
            if places is not None:
                more["position_ids"] = torch.minimum(places[:, :width], last)
            elif positioned:
                steps = torch.arange(width, device=positions.device)
                more["position_ids"] = torch.minimum(positions + steps, last)
            ids = block[:, :width]
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits
            if taps is not None:
                states.copy_(taps.states)  # type: ignore[union-attr]
            return logits

        return step
