"""Rounds as one native call (``kernels/cpp/speculate.h``), where every program of them is native.

Python sees the state between visits only: it gives random numbers, makes room, and reads the text.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Any

import torch
from torch import Tensor

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp.program import AHEAD_BYTES
from dspark_compile.kernels.cpp import speculate as native
from dspark_compile.runtime.captured import Captured
from dspark_compile.runtime.speculation import accept, ngram
from dspark_compile.runtime.speculation import state as states
from dspark_compile.runtime.speculation.compiled_proposers import (
    DraftProposals,
    ModelProposals,
)
from dspark_compile.runtime.speculation.lookup_proposals import NgramProposals, drafting_part
from dspark_compile.runtime.speculation.rounds import HOLES
from dspark_compile.runtime.speculation.state import FIRST_GUESS, SOURCES, State, Visit

# Visits between two looks at the measured prices.
REFRESH = 8


def constants() -> tuple[tuple[str, float], ...]:
    """What rounds decide by, which `torch_engine` has too, under the names that C++ has for it."""
    return (
        ("kLearned", states.SHARE), ("kHiccup", states.HICCUP), ("kForgotten", states.FORGOTTEN),
        ("kAhead", states.AHEAD), ("kMargin", states.MARGIN),
        ("kResidualMass", accept.RESIDUAL_MASS),
    )  # fmt: skip


def why_not(state: State) -> str | None:
    """Why the rounds of ``state`` are not one native call; None if they are."""
    if state.text.device.type != "cpu":
        return "it is not on a CPU"
    if state.batch > native.MOST_REQUESTS:
        return f"more than {native.MOST_REQUESTS} requests"
    programs: list[Captured | None] = [state.rounds.programs.get(w) for w in state.widths]
    proposer = drafting_part(state.proposer)
    if isinstance(proposer, DraftProposals):
        programs += proposer.programs.programs.values()
    elif isinstance(proposer, ModelProposals):
        programs += [proposer.own.programs.get(w) for w in proposer.widths]
    if not all(p is not None and p.native and p.result is not None for p in programs):
        return "not every program is one native call"
    if any(x.dtype != torch.int64 for x in _held(state.rounds)):
        return "cache lengths are not int64"
    return None


def _held(rounds: Any) -> list[Tensor]:
    return [layer.cumulative_length for layer in rounds.cache.layers]


def _address(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.is_contiguous(), "a view would be written at the wrong place"
    return x.data_ptr()


class NativeEngine:
    """Runs rounds over a `State` natively.

    Raises:
        build.BuildError: the kernel cannot be built.
    """

    native = True

    def __init__(self, state: State) -> None:
        self.state = state
        self.seconds = {"draft": 0.0, "verify": 0.0, "other": 0.0, "sequence": 0.0}
        self._kept: list[Any] = []
        self._programs: list[Any] = []
        self._s = native.Speculation()
        self._dtypes = [torch.float32, torch.float32, torch.float32]
        batch, count = state.batch, state.rounds.count
        self._sources = 4 + 5 * count + count + 1 + 4
        self._counters = self._hold((ctypes.c_double * (self._sources + 4 * len(SOURCES)))())
        prices = state.prices
        if not prices.conditional:
            prices.conditional = [FIRST_GUESS] * count
        self._conditional = self._doubles(prices.conditional)
        self._matched = self._doubles([x for row in prices.trust(count) for x in row])
        self._drafted = self._doubles(prices.drafted)
        self._draft_seconds = self._doubles([state.prices.draft])
        self._widths = self._hold(torch.tensor(state.widths))
        self._verify_seconds = self._doubles([state.prices.verify[w] for w in state.widths])
        first = state.prices.first
        self._first_seconds = self._doubles([first[w] for w in state.widths])
        self._table = self._doubles(state.prices.table(count))
        self._visits = 0
        self._uniform: Tensor | None = None
        self._used = 0
        self._target()
        self._requests()
        self._proposer()
        self._working(batch, count)
        self._function = native.function(*self._dtypes, SOURCES, constants())

    def again(self) -> NativeEngine:
        """After tensors of the state were replaced."""
        self.finish()
        state = self.state
        if any(w not in state.rounds.programs for w in state.widths):  # the room was assumed
            for width in state.widths:
                state.rounds.ensure(width)
        if isinstance(drafting_part(state.proposer), ModelProposals) and max(state.widths) > 1:
            state.proposer.ensure()
        new = NativeEngine(state)
        new.seconds, new._uniform, new._used = self.seconds, self._uniform, self._used
        return new

    def _hold(self, x: Any) -> Any:
        self._kept.append(x)
        return x

    def _doubles(self, values: list[float]) -> Any:
        return self._hold((ctypes.c_double * len(values))(*values))

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        return self._hold(torch.zeros(shape, dtype=dtype)).data_ptr()

    def _pointers(self, tensors: list[Tensor]) -> int:
        array = self._hold((ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors)))
        return ctypes.addressof(array)

    def _numbers(self, values: list[int]) -> int:
        return ctypes.addressof(self._hold((ctypes.c_int64 * len(values))(*values)))

    def _stages(self, program: Captured) -> Any:
        bound = program.bound
        self._programs.append(bound)
        return native.BoundStages(*bound.addresses())

    # ------------------------------------------------------------------------ filling it in

    def _target(self) -> None:
        s, state = self._s, self.state
        rounds = state.rounds
        programs = [rounds.programs[w] for w in state.widths]
        logits = [self._hold(p.result) for p in programs if p is not None]
        stages = [self._stages(p) for p in programs if p is not None]
        array = self._hold((native.BoundStages * len(stages))(*stages))
        s.verify, s.widths = ctypes.addressof(array), self._widths.data_ptr()
        s.width_count = len(stages)
        s.logits = self._pointers(logits)
        s.logits_rows = self._numbers([x.stride(1) for x in logits])
        s.logits_requests = self._numbers([x.stride(0) for x in logits])
        s.rows, s.batch, s.count = rounds.rows, state.batch, rounds.count
        s.vocabulary = logits[0].shape[-1]
        self._dtypes[0] = logits[0].dtype
        s.threads, s.ahead = torch.get_num_threads(), AHEAD_BYTES
        s.block, s.positions = _address(rounds.block), _address(rounds.positions)
        s.slot, s.filled = _address(rounds.slot), _address(rounds.filled)
        held = _held(rounds)
        s.held, s.held_count = self._pointers(held), len(held)
        s.mask = _address(rounds.mask) if rounds.masked else None
        s.room, s.slack, s.holes = rounds.cache.room, state.slack, HOLES
        if rounds.taps:
            s.states = self._pointers([rounds.states[w] for w in state.widths])
            states = rounds.states[1]
            s.state_bytes = states.shape[-1] * states.element_size()

    def _requests(self) -> None:
        s, state, how = self._s, self.state, self.state.choice
        s.text, s.text_room = _address(state.text), state.text.shape[1]
        s.lengths, s.prompts = _address(state.lengths), _address(state.prompts)
        s.done, s.limit = _address(state.done), state.limit
        s.seen = _address(state.seen)
        s.eos, s.eos_count = self._numbers(list(state.eos) or [0]), len(state.eos)
        s.how = native.Choice(how.temperature, how.top_k, how.top_p, how.min_p, how.penalty)
        s.greedy, s.fixed = int(state.greedy), int(state.fixed)
        s.table = ctypes.addressof(self._table)
        s.verify_seconds = ctypes.addressof(self._verify_seconds)
        s.first_seconds = ctypes.addressof(self._first_seconds)
        s.draft_seconds = ctypes.addressof(self._draft_seconds)
        s.conditional = ctypes.addressof(self._conditional)
        s.counters = ctypes.addressof(self._counters)

    def _proposer(self) -> None:
        s, proposer = self._s, self.state.proposer
        if isinstance(proposer, NgramProposals):
            s.looks_up, s.shortest, s.longest = 1, proposer.minimum, ngram.LONGEST
        own = drafting_part(proposer)
        s.drafts = getattr(own, "count", 0)
        if isinstance(own, DraftProposals):
            s.kind = 1
            self._draft(own)
        elif isinstance(own, ModelProposals):
            s.kind = 2
            self._model(own)

    def _draft(self, proposer: DraftProposals) -> None:
        s, programs, draft = self._s, proposer.programs, proposer.draft
        propose, append = programs.programs["propose"], programs.programs["append"]
        assert propose is not None and append is not None
        s.propose, s.append = self._stages(propose), self._stages(append)
        s.draft_ids, s.draft_block = _address(programs.ids), programs.ids.shape[1]
        s.pending, s.behind = _address(programs.pending), proposer.behind
        s.context_slot = _address(programs.context_slot)
        s.context_positions = _address(programs.context_positions)
        config, base, batch = draft.config, propose.result, self.state.batch
        assert base is not None
        self._hold(base)
        q = s.sequence
        head = config.markov_head_type if config.markov_rank else "none"
        q.head = native.HEADS.index(head)
        q.rank, q.width, q.vocabulary = config.markov_rank, config.hidden_size, base.shape[-1]
        q.base, q.base_row, q.base_request = base.data_ptr(), base.stride(1), base.stride(0)
        q.hidden = _address(programs.hidden)
        weight = draft.fc.weight
        self._dtypes[1:] = [base.dtype, weight.dtype]
        markov = draft.markov_head
        if markov is not None:
            q.pairs = int(native.takes_pairs(weight.dtype, config.markov_rank))
            panels = proposer.panels(bool(q.pairs))
            q.w1, q.w2 = _address(markov.markov_w1.weight), _address(panels)
            gate: Any = getattr(markov, "gate_proj", None) or getattr(markov, "joint_proj", None)
            if gate is not None:
                q.gate, q.gate_bias = _address(gate.weight), _address(gate.bias)
        if draft.confidence_head is not None:
            proj = draft.confidence_head.proj
            q.confidence = _address(self._hold(proj.weight.detach().float()[0].contiguous()))
            q.confidence_bias = float(proj.bias)
            q.confidence_reads = config.markov_rank if draft.confidence_head.with_markov else 0
            temperatures = self.state.calibration.temperatures.float().contiguous()
            q.temperatures = _address(self._hold(temperatures))
            s.confidences = self._zeros(batch, config.num_drafted)
            if self.state.online is not None:
                ring = self.state.online.ring
                s.recorded_logits, s.recorded_accepted, s.recorded_verified, s.recorded = (
                    _address(self._hold(x)) for x in ring
                )
                s.ring = len(ring[0])
        if draft.d2t is not None:
            q.vocabulary_map = _address(self._hold(draft.d2t.long().contiguous()))
        threads = s.threads
        q.codes = self._zeros(batch, max(q.rank, 1))
        q.memory = self._zeros(batch, max(q.rank, 1))
        q.next_memory = self._zeros(batch, max(q.rank, 1))
        q.largest = self._zeros(2, threads, batch)
        q.places = self._zeros(2, threads, batch, dtype=torch.long)
        q.sums = self._zeros(threads, batch, dtype=torch.double)

    def _model(self, proposer: ModelProposals) -> None:
        s, own = self._s, proposer.own
        two, one, more = own.programs[2], own.programs[1], own.programs[proposer.width]
        assert two is not None and one is not None and more is not None
        s.more, s.two, s.one = self._stages(more), self._stages(two), self._stages(one)
        s.behind, s.model_width = proposer.behind, proposer.width
        for name, program in (("two", two), ("one", one)):
            logits = self._hold(program.result)
            setattr(s, f"{name}_logits", logits[:, -1].data_ptr())
            setattr(s, f"model_requests_{name}", logits.stride(0))
            self._dtypes[1] = logits.dtype
        s.model_block, s.model_places = _address(own.block), _address(own.places)
        held = _held(own)
        s.model_held, s.model_held_count = self._pointers(held), len(held)
        s.model_mask = _address(own.mask) if own.masked else None

    def _working(self, batch: int, count: int) -> None:
        s, state, wide = self._s, self.state, self._s.vocabulary
        s.survival = self._zeros(batch, count, dtype=torch.double)
        s.found = self._zeros(batch, dtype=torch.long)
        s.matched = ctypes.addressof(self._matched)
        s.match = self._zeros(batch, dtype=torch.long)
        s.looked = self._zeros(batch, count, dtype=torch.long)
        s.point = self._zeros(batch, dtype=torch.uint8)
        s.drafted = ctypes.addressof(self._drafted)
        s.verified = self._zeros(batch, dtype=torch.long)
        s.choice = self._zeros(batch, count + 1, dtype=torch.long)
        s.drafted_ids = self._zeros(batch, count, dtype=torch.long)
        s.draft_totals = self._zeros(batch, count, dtype=torch.double)
        s.target_totals = self._zeros(batch, count + 1, dtype=torch.double)
        if s.kind:
            s.draft_weights = self._zeros(batch, count, wide)
        if not state.greedy or state.seen is not None:
            s.target_weights = self._zeros(batch, count + 1, wide)

    # ------------------------------------------------------------------------------ running

    def visit(self, count: int, drafting: bool | str) -> Visit:
        """Up to ``count`` rounds; fewer where all requests end, or room has to be made.

        ``drafting``: whether anything is proposed; ``"lookup"``: not by the draft; ``"look"``:
        whatever the draft proposes is verified, at any price.
        """
        state, s = self.state, self._s
        batch, most = state.batch, state.rounds.count
        if drafting and not state.fixed and self._visits % REFRESH == 0:
            self._table[:] = state.prices.table(most)
        self._visits += 1
        if not state.greedy:
            self._draw(count, batch, 2 * most + 1)
        if s.model_mask:
            drafting_part(state.proposer).own.mask.copy_(state.rounds.mask)  # type: ignore[union-attr]
        before = self._counters[self._sources :]
        made = ctypes.c_int64()
        how = native.PROPOSALS.index(drafting if state.proposer is not None else False)
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for bound in self._programs:
                stack.enter_context(bound.lock)
                bound._enter()
            status = self._function(ctypes.byref(s), count, how, ctypes.byref(made))
        seconds = time.perf_counter() - began
        if status:
            from dspark_compile.kernels.cpp._launch import raise_for

            raise_for(status, "speculative round")
        self._used += made.value
        self._after()
        visit = Visit(seconds=seconds)
        sums = [b - a for a, b in zip(before, self._counters[self._sources :], strict=True)]
        for at, source in enumerate(SOURCES):
            rounds, requests, committed, spent = sums[4 * at : 4 * at + 4]
            visit.add(source, round(committed), round(requests), spent, round(rounds))
        return visit

    def _draw(self, count: int, batch: int, numbers: int) -> None:
        """Random numbers for ``count`` rounds; those that a visit leaves are for the next."""
        left = None if self._uniform is None else self._uniform[self._used :]
        held = 0 if left is None else len(left)
        if held < count:
            more = torch.rand(count - held, batch, numbers)
            left = more if left is None or not held else torch.cat((left, more))
        assert left is not None
        self._uniform, self._used = left.contiguous(), 0
        self._s.uniform = self._uniform.data_ptr()

    def _after(self) -> None:
        """Python's view of what has changed."""
        state = self.state
        rounds, prices = state.rounds, state.prices
        rounds.length = int(rounds.slot)
        for layer in rounds.cache.layers:
            layer.known = rounds.length
        own = drafting_part(state.proposer)
        if own is not None and self._s.kind:
            own.behind = self._s.behind
        prices.conditional, prices.drafted = list(self._conditional), list(self._drafted)
        count = rounds.count
        prices.matched = [
            self._matched[at : at + count] for at in range(0, len(self._matched), count)
        ]
        prices.draft = self._draft_seconds[0]
        prices.verify.update(zip(state.widths, self._verify_seconds, strict=True))

    def finish(self) -> None:
        """Put the telemetry where it is read."""
        count, c = self.state.rounds.count, self.state.counters
        new = torch.tensor(list(self._counters), dtype=torch.float32)
        ctypes.memset(self._counters, 0, ctypes.sizeof(self._counters))
        c.rounds += new[0]
        c.committed += new[1]
        c.drafted += new[2]
        rest = new[4:]
        parts = rest[: 5 * count].view(5, count)
        for name, part in zip(("reached", "passed", "predicted", "survived", "predictions"), parts):
            getattr(c, name).add_(part)
        c.lengths += rest[5 * count : 6 * count + 1]
        rest = rest[6 * count + 1 :]
        names = ("draft", "verify", "other", "sequence")
        for name, spent in zip(names, rest[:4].tolist(), strict=True):
            self.seconds[name] += spent


def engine_for(state: State, otherwise: Any) -> tuple[Any, str | None]:
    """The native engine, or ``otherwise(state)`` with the reason."""
    reason = why_not(state)
    if reason is None:
        try:
            return NativeEngine(state), None
        except (build.BuildError, KeyError) as error:
            reason = str(error)
    return otherwise(state), reason
