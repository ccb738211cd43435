"""The speculative decode loop: `generate` with a draft."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dspark_compile.kernels.cpp.linear import most_rows
from dspark_compile.models.draft import DraftModel
from dspark_compile.ops.token import draw, drawable, penalised
from dspark_compile.runtime.decode_loop import FIRST_ROOM, VISIT, GenerationReport, Plan
from dspark_compile.runtime.rounds import POOL, NotRounds, batch_bucket, pool_key
from dspark_compile.runtime.speculation.accept import distribution
from dspark_compile.runtime.speculation.calibration import Calibration, OnlineCalibration
from dspark_compile.runtime.speculation.compiled_proposers import (
    DraftProposals,
    ModelProposals,
    verifying_rounds,
)
from dspark_compile.runtime.speculation.lookup_proposals import NgramProposals, drafting_part
from dspark_compile.runtime.speculation.native_engine import engine_for
from dspark_compile.runtime.speculation.options import parts
from dspark_compile.runtime.speculation.park import BATCH_BURDEN, ParkPolicy
from dspark_compile.runtime.speculation.rounds import Verifying
from dspark_compile.runtime.speculation.state import Prices, State, Visit, widths_for
from dspark_compile.runtime.speculation.telemetry import Counters, SpeculationStats
from dspark_compile.runtime.speculation.torch_engine import TorchEngine

log = logging.getLogger(__name__)

# Why a model has no speculation for some key: found out once, by compiling. With the draft that the
# key names by its id, which another one may get when it is gone.
REFUSED: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Any, str]]] = weakref.WeakKeyDictionary()
# Drafted tokens of a round where the draft leaves it open.
NGRAM_TOKENS = 15
MODEL_TOKENS = 5
# Rounds of a visit while nothing is known of how long one takes.
FIRST_VISIT = 4


class Speculator:
    """What stays between calls for one model, draft and batch bucket: programs, prices, policy.

    Raises:
        NotRounds: the model cannot be driven in rounds of several tokens.
        NotIncremental: no cache can be inserted into a module that is not of Hugging Face.
        DraftError: the draft does not fit the target, or the batch.
    """

    def __init__(
        self,
        model: Any,
        draft: Any,
        rows: int,
        masked: bool | str,
        scheme: str,
        options: Mapping[str, Any],
        count: int | None,
    ) -> None:
        looks_up, own = parts(draft)
        taps = tuple(own.config.target_layer_ids) if isinstance(own, DraftModel) else ()
        count = drafted_tokens(draft, count, rows)
        rounds = verifying_rounds(model, rows, masked, scheme, options, count=count, taps=taps)
        rounds.key = speculator_key(rows, masked, scheme, options, draft, count)
        rounds.speculator = self
        self.rounds = rounds
        self.proposer: Any = None
        if isinstance(own, DraftModel):
            self.proposer = DraftProposals(own, rounds)
        elif own is not None:
            drafted = min(MODEL_TOKENS, count) if looks_up else count
            self.proposer = ModelProposals(own, drafted, rounds)
        if looks_up:
            self.proposer = NgramProposals(count, rounds, inner=self.proposer)
        self.draft = draft
        self.note: str | None = None  # for the next call's report
        self.prices = Prices()
        sure = isinstance(own, DraftModel) and own.confidence_head is not None
        self.policy = ParkPolicy(
            burden=BATCH_BURDEN if rows > 1 else 1.0, guesses=own is not None and not sure
        )
        self.sure = sure
        self._refining: dict[bool, tuple[Any, OnlineCalibration]] = {}

    def refining(
        self, own: Any, start: Calibration, sampled: bool, device: torch.device
    ) -> OnlineCalibration | None:
        """What refines the calibration of the draft's confidences from call to call, for sampled
        text and for greedy text each; None where it has none. ``own`` is the draft's
        ``calibration``: another one is begun with afresh, at ``start``."""
        if not self.sure:
            return None
        known = self._refining.get(sampled)
        if known is None or known[0] is not own:
            # What a call under inference mode makes is written to by calls outside of it.
            with torch.inference_mode(False):
                start = replace(start, temperatures=start.temperatures.to(device))
                known = self._refining[sampled] = own, OnlineCalibration(start)
        return known[1]


def drafted_tokens(draft: Any, asked: int | None, rows: int) -> int:
    """Drafted tokens of a round of ``rows`` requests."""
    looks_up, own = parts(draft)
    if not isinstance(own, DraftModel):
        return asked or (NGRAM_TOKENS if looks_up else MODEL_TOKENS)
    count, weight = own.config.num_drafted, own.fc.weight
    if not looks_up:
        return count
    most = asked or NGRAM_TOKENS
    if weight.device.type == "cpu":  # the draft's context is appended by as many rows
        most = min(most, most_rows(weight.dtype) // rows - 1)
    return max(count, most)


def speculator_key(
    rows: int,
    masked: bool | str,
    scheme: str,
    options: Mapping[str, Any],
    draft: Any,
    count: int | None,
) -> Any:
    """What `Speculator`s must have in common to stand in for each other."""
    looks_up, own = parts(draft)
    count = drafted_tokens(draft, count, rows)
    return (*pool_key(rows, masked, scheme, options), "draft", looks_up, id(own), count)


def take(
    model: Any,
    draft: Any,
    batch: int,
    masked: bool | str,
    scheme: str,
    options: Mapping[str, Any],
    count: int | None,
    fixed: bool = False,
) -> Speculator:
    """An idle one, or a new one.

    Raises:
        NotRounds: it has been found out that there is none for this batch, or that its draft does
            not pay and rests (never if ``fixed``).
    """
    rows = batch_bucket(batch)
    masked = masked or rows > 1
    key = speculator_key(rows, masked, scheme, options, draft, count)
    of, reason = REFUSED.get(model, {}).get(key, (None, ""))
    own = parts(draft)[1]
    if reason and (own is None or of() is own):
        raise NotRounds(reason)
    while (idle := POOL.idle(model, key)) is not None:
        speculator: Speculator = idle.speculator  # type: ignore[attr-defined]
        if not speculator.proposer.fits():
            continue
        policy = speculator.policy
        if not fixed and policy.rests():
            POOL.give(idle)
            reason = (
                f"parked: drafting takes {1e6 * policy.price:.0f} us a token here, plain decoding "
                f"{1e6 * policy.plain_price:.0f}; schedule='fixed' drafts all the same"
            )
            if own is None or own is draft:
                raise NotRounds(reason)
            count = speculator.rounds.count
            speculator = take(model, "ngram", batch, masked, scheme, options, count)
            speculator.note = f"look-ups without the draft: {reason}"
        return speculator
    return Speculator(model, draft, rows, masked, scheme, options, count)


def refusal(model: Any, draft: Any, plan: Plan, batch: int) -> str | None:
    """Why a call is decoded without speculation; None if nothing speaks against it."""
    own = parts(draft)[1]
    if isinstance(own, DraftModel) and model.device.type == "cpu":
        config, rows = own.config, batch_bucket(batch)
        block = max(config.block_size, config.num_drafted + 1)
        for what, width, dtype in (
            ("blocks of", block, own.fc.weight.dtype), ("verifying", 2, model.dtype)
        ):  # fmt: skip
            if rows > 1 and rows * width > (most := most_rows(dtype)):
                return (
                    f"a batch of {batch} needs {rows * width} rows a step for {what} {width} tokens"
                    f" each, and the CPU's kernels take {most} of {str(dtype)[6:]}"
                )
    if plan.called is not None or plan.keep_scores or plan.keep_logits:
        return "logits processors called in Python, or scores kept, want one token at a time"
    if plan.cache is not None:
        return "a cache of the caller's has no context of the draft's beside it"
    if plan.keep_cache and batch > 1:
        return "return_dict_in_generate hands a cache over, and that of a batch has holes"
    if plan.streamer is not None and batch > 1:
        return "a streamer gets a token of every row at a time, and rows go on at their own pace"
    if plan.asked and batch > 1:
        return "stopping criteria called in Python want rows of one length"
    if batch > 1:
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        if window is not None and plan.max_length > window:
            return f"rows of a batch have holes in a cache that a window of {window} slides over"
    return None


class SpeculativeLoop:
    """One call of `generate` with a draft.

    Args:
        speculator: programs; given back to the pool, or dropped where something is raised.
        prompt: int64 ``[B, L]``. plan: what is asked for. report: filled in.
        fixed: verify every drafted token, and never park.
    """

    def __init__(
        self,
        speculator: Speculator,
        prompt: Tensor,
        plan: Plan,
        report: GenerationReport,
        fixed: bool = False,
    ) -> None:
        self.speculator, self.plan, self.report, self.fixed = speculator, plan, report, fixed
        self.rounds, self.proposer = speculator.rounds, speculator.proposer
        self.prompt = prompt.to(self.rounds.tokens.device)
        self.shown = self.asked = 0
        self.cache: Any = None
        self.reason: str | None = None
        self.before = speculator.policy.parked_rounds, speculator.policy.probes
        # Look-ups are never parked, alone or where a draft beside them is: they cost nothing where
        # nothing matches, and each round knows what they are worth to the request that has most
        # to go.
        drafting = drafting_part(self.proposer)
        self.parks = not fixed and drafting is not None
        self.hybrid = drafting not in (None, self.proposer)
        self.looked_up = 0
        self.drafted, self.others, self.inside = Visit(), 0, 0.0
        self.verifying = 0.0  # seconds of rounds that left holes which are still open
        if speculator.note is not None:
            report.notes.append(speculator.note)
            speculator.note = None
        report.prompt_tokens = prompt.shape[1]

    def run(self) -> Tensor:
        """Decode; int64 ``[B, L + new]``."""
        rounds = self.rounds
        rounds.begin()
        self.proposer.begin()
        sequences = self._run()
        rounds.set_length(rounds.length)
        if self.plan.keep_cache:  # programs and the draft's context stay on their own
            self.cache = rounds.copied_cache(min(rounds.length, sequences.shape[1] - 1))
        POOL.give(rounds)
        return sequences

    def _run(self) -> Tensor:
        plan, report, clock = self.plan, self.report, time.perf_counter
        began = clock()
        state = self._prefill()
        report.spend("prefill", clock() - began)
        began = clock()
        engine = self._engine(state)
        report.spend("compile", clock() - began)
        began = clock()
        # What ends by itself may have gone past where a criterion ends it.
        while not self._stopped(state) and not state.finished():
            if not state.has_room():
                start = clock()
                closed = state.make_room()
                engine = engine.again()
                if closed:
                    state.prices.closed(clock() - start, self.verifying)
                    self.verifying = 0.0
            self._visit(state, engine)
        seconds = clock() - began
        report.spend("decode", seconds)
        if self.parks and self.rounds.rows > 1 and self.inside:
            most = int((state.lengths - state.prompts).max()) - 1  # the first is the prompt's
            drafted = self.drafted
            tau = drafted.committed / max(drafted.requests, 1)
            policy = self.speculator.policy
            policy.took(drafted.rounds, tau, most - self.others, seconds / self.inside)
        if plan.streamer is not None:
            self._stream(state)
            plan.streamer.end()
        return self._finish(state, engine)

    # ------------------------------------------------------------------------------- a prompt

    def _prefill(self) -> State:
        plan, rounds, prompt = self.plan, self.rounds, self.prompt
        batch, length = prompt.shape
        mask, positions = plan.attention_mask, plan.position_ids
        if mask is None and rounds.masked:
            mask = torch.ones_like(prompt)
        if mask is not None and positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        limit = plan.max_length - length
        slack = rounds.count + 1 + self.proposer.slack
        rounds.reserve(min(plan.max_length, length + FIRST_ROOM) + slack)
        logits = rounds.prefill(prompt, mask, positions, plan.chunk)
        rounds.reach(batch, limit)
        self.proposer.prefill(prompt, mask, positions, plan.chunk)
        kept = torch.ones_like(prompt) if mask is None else mask.to(prompt.device)
        lengths = kept.sum(1)
        room = length + min(limit, FIRST_ROOM) + rounds.count + 2
        text = prompt.new_zeros(batch, room)
        text[:, :length] = prompt.gather(1, (1 - kept).argsort(dim=1, stable=True))
        seen = plan.choice.seen(prompt, logits.shape[-1])
        count, drafting = rounds.count, drafting_part(self.proposer)
        own = getattr(getattr(drafting, "draft", None), "calibration", None)
        drafted = getattr(drafting, "count", count)
        calibration = Calibration.from_dict(own, drafted, sampled=plan.choice.sample)
        online = self.speculator.refining(own, calibration, plan.choice.sample, prompt.device)
        if online is not None:
            calibration = online.calibration
        state = State(
            rounds, self.proposer, plan.choice, plan.eos, limit, text, lengths.clone(),
            lengths.clone(), torch.zeros(batch, dtype=torch.bool, device=prompt.device), seen,
            Counters(count, prompt.device), self.speculator.prices, calibration, self.fixed, online,
        )  # fmt: skip
        rounds.filled[:batch] = lengths
        rounds.live[:batch] = True
        if limit > 0:
            self._first(state, logits)
        else:
            state.done.fill_(True)
        return state

    def _first(self, state: State, logits: Tensor) -> None:
        """Choose the first anchors."""
        choice = state.choice
        if state.greedy:
            chosen = penalised(logits, state.seen, choice.penalty).argmax(-1)
        else:
            uniform = torch.rand(state.batch, device=logits.device)
            chosen = draw(drawable(distribution(logits, choice, state.seen)), uniform)
        state.text.scatter_(1, state.lengths[:, None], chosen[:, None])
        state.lengths += 1
        self.rounds.block[: state.batch, 0] = chosen
        if state.seen is not None:
            state.seen.scatter_(1, chosen[:, None], True)
        for token in state.eos:
            state.done |= chosen == token
        state.done |= state.limit <= 1

    # ----------------------------------------------------------------------------- the rounds

    def _engine(self, state: State) -> Any:
        """Programs for every width, their prices, and what drives them."""
        rounds, prices = self.rounds, state.prices
        state.widths = [1]
        if state.finished():
            return TorchEngine(state)
        on_cpu = state.text.device.type == "cpu"
        program = rounds.ensure(1)
        native = on_cpu and program is not None and program.native
        limit = most_rows(rounds.dtype) if native else None
        counts = {rounds.count}
        if self.hybrid:
            counts.add(drafting_part(self.proposer).count)
        found = [widths_for(rounds.rows, count, limit) for count in counts]
        widths = sorted({1, *(max(w) for w in found)} if self.fixed else set().union(*found))
        state.widths = []
        for width in widths:
            program = rounds.ensure(width)
            if native and (program is None or not program.native):
                break  # other kernels of the model take fewer rows
            state.widths.append(width)
            if width not in prices.verify:
                prices.verify[width] = _seconds(lambda w=width: rounds.verify(w), rounds)  # type: ignore[misc]
                prices.first[width] = prices.verify[width]
        if max(state.widths) > 1:
            self.proposer.ensure()
        engine, self.reason = engine_for(state, TorchEngine)
        if on_cpu and rounds.rows > 1 and not engine.native:
            # Rounds driven from Python would make a batch slower than its plain steps are.
            reason = f"a batch of {state.batch} rows: {self.reason}"
            draft = self.speculator.draft
            REFUSED.setdefault(rounds.model, {})[rounds.key] = (
                weakref.ref(parts(draft)[1]) if parts(draft)[1] is not None else None, reason
            )  # fmt: skip
            raise NotRounds(reason)
        return engine

    def _visit(self, state: State, engine: Any) -> None:
        policy, plan = self.speculator.policy, self.plan
        drafting = max(state.widths) > 1 and (not self.parks or policy.drafts())
        single = plan.asked or plan.streamer is not None
        seconds = state.prices.verify[1] if not drafting else sum(
            (state.prices.draft, max(state.prices.verify.values()))
        )  # fmt: skip
        count = 1 if single else max(1, min(int(VISIT / seconds), 512))
        if self.parks:
            count = min(count, policy.most(FIRST_VISIT))
        how: bool | str = drafting
        if drafting and self.parks and policy.looks:
            how = "look"
        elif not drafting and self.hybrid and max(state.widths) > 1:
            how = "lookup"
        visit = engine.visit(count, how)
        if self.hybrid and "lookup" in visit.parts:
            self.looked_up += visit.parts["lookup"].rounds
        self.verifying += sum(p.seconds for name, p in visit.parts.items() if name != "plain")
        if self.parks:
            self._judge(visit, drafting, max(state.widths) > 1)
        self.report.spend("decode", 0.0, visit.committed)
        if plan.streamer is not None:
            self._stopped(state)  # what a criterion cuts off is not shown
            self._stream(state)

    def _judge(self, visit: Visit, drafting: bool, speculates: bool) -> None:
        """What a visit says of whether drafting pays."""
        policy, drafted, plain = self.speculator.policy, Visit(), Visit()
        if self.hybrid:
            drafted = visit.parts.get("draft", drafted)
            plain = visit.parts.get("plain", plain)
        elif drafting:
            drafted = visit
        elif speculates:
            plain = visit
        if drafted.rounds:
            tau = drafted.committed / max(drafted.requests, 1)
            policy.drafted(drafted.seconds / drafted.rounds, max(tau, 1e-3), drafted.rounds)
            self.drafted.add("draft", drafted.committed, drafted.requests, 0.0, drafted.rounds)
        if plain.rounds:
            policy.plain(plain.seconds / plain.rounds, plain.rounds)
        self.inside += visit.seconds
        # Of the request that goes on longest: one token a plain step, and what look-ups gave.
        self.others += plain.rounds
        if (looked := visit.parts.get("lookup")) is not None and self.hybrid:
            self.others += round(looked.rounds * looked.committed / max(looked.requests, 1))

    def _stream(self, state: State) -> None:
        """Hand over what is new of one request."""
        start, end = int(state.prompts[0]), int(state.lengths[0])
        for token in state.text[0, start + self.shown : end].tolist():
            self.plan.streamer.put(torch.tensor([token]))
        self.shown = end - start

    def _stopped(self, state: State) -> bool:
        """Ask the criteria about every new token of one request."""
        asked = self.plan.asked
        if not asked:
            return False
        first = max(self.asked, int(state.prompts[0]) + 1)
        last = int(state.lengths[0])
        for end in range(first, last + 1):
            text = torch.cat((self.prompt, state.text[:, state.prompts[0] : end]), dim=1)
            if any(bool(criterion(text, None).all()) for criterion in asked):
                state.lengths[0] = end
                state.done.fill_(True)
                return True
        self.asked = last + 1
        return False

    # -------------------------------------------------------------------------------- the end

    def _finish(self, state: State, engine: Any) -> Tensor:
        report, policy = self.report, self.speculator.policy
        if self.parks:
            policy.ended()
        new = state.lengths - state.prompts
        most = int(new.max()) if state.limit > 0 else 0
        tail = self.prompt.new_full((state.batch, most), self.plan.pad)
        for row in range(state.batch):
            count = int(new[row])
            start = int(state.prompts[row])
            tail[row, :count] = state.text[row, start : start + count]
        programs = [self.rounds.programs.get(w) for w in state.widths]
        if engine.native:
            report.path = "native"
        elif all(p is not None for p in programs):
            report.path = "compiled"
        if self.reason is not None:
            report.notes.append(f"rounds are driven from Python: {self.reason}")
        for width, reason in self.rounds.reasons.items():
            report.notes.append(f"verifying {width} tokens is not compiled: {reason}")
        engine.finish()
        if state.online is not None and state.online.refine():
            values = [round(t, 3) for t in state.online.calibration.temperatures.tolist()]
            log.info("confidences calibrated anew, temperatures %s", values)
        report.new_tokens = most
        report.cache_bytes = self.rounds.cache.nbytes
        report.speculation = SpeculationStats.read(
            state.counters, proposer=self.proposer.name, seconds=dict(engine.seconds),
            parked_rounds=policy.parked_rounds - self.before[0],
            probes=policy.probes - self.before[1], lookup_rounds=self.looked_up,
        )  # fmt: skip
        if max(state.widths) == 1 and most > 1:
            report.notes.append(
                f"a batch of {state.batch} leaves no row for drafted tokens in a step: it is "
                "decoded plainly"
            )
        report.notes += report.speculation.notes
        return torch.cat((self.prompt, tail), dim=1)


def _seconds(run: Any, rounds: Verifying) -> float:
    """The shortest of some runs; what they append is taken back."""
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if rounds.tokens.device.type != "cpu":
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - start)
        rounds.cache.set_length(rounds.length)
    return min(found)
