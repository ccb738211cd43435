"""`Rounds`: a model's decode step as one program over state that stays where it is.

Tokens, positions, lengths, the padding mask and the cache lie on the device and are written in
place by the step itself; the step is compiled once (`captured`) for a batch bucket, and everything
that differs between calls (prompt lengths, cache room, which rows are done) is data.

    prefill(ids)      eager, in chunks: the cache and the logits of the last token
    step(token)       one program: logits [R, V] of the next token
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .captured import Captured
from .device_graph import graphs_for
from .device_rounds import DeviceRounds
from .errors import KVCacheError
from .kept_rounds import kept_rounds
from .model_state import has_hooks, model_state
from .token_choice import Chooser
from .trace_whole import CaptureError

if TYPE_CHECKING:
    from .decode_cache import DecodeCache

# How far the compiled step's logits may lie from eager ones, as a part of their norm.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE = 0.1


# Where `speculation.taps.Taps` keeps what its own hooks find while a program is traced.
TAPS = "._found"


class NotRounds(Exception):
    """A model does not hold one position for each token, so rounds cannot drive it."""


@contextlib.contextmanager
def written_anywhere() -> Iterator[None]:
    """Inside, what is made may be written to by any later call: what inference mode makes may not
    be outside of it, and steps, caches and tokens are kept from call to call."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def batch_bucket(rows: int) -> int:
    """The power of two that holds ``rows``."""
    return 1 << (rows - 1).bit_length()


class Rounds:
    """Decode steps of one model for up to ``rows`` sequences.

    Args:
        model: Hugging Face causal language model; held weakly.
        rows: of the batch, all of which the step computes.
        masked: whether sequences may be padded on the left.
        scheme: of the cache: ``"model"`` or ``"int8"``.
        options: of the back end.
    """

    without_program = "eager"  # what the report calls steps that are not compiled

    def __init__(
        self,
        model: Any,
        rows: int,
        masked: bool,
        scheme: str = "model",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from .decode_cache import DecodeCache

        self._start(model, rows, masked, scheme, options, model.device)
        self.key = pool_key(rows, masked, scheme, self.options)
        self.cache: Any = DecodeCache(model.config, scheme=scheme, rows=rows)
        accepted = inspect.signature(model.forward).parameters
        # What the model calls its cache: state space models have their own name for it.
        own = "past_key_values" not in accepted and "cache_params" in accepted
        self._named = "cache_params" if own else "past_key_values"
        self._keeps = "logits_to_keep" in accepted
        # Given even where they are no more than the length: code that makes them from the cache's
        # length slices by it, and a length that is data cannot be sliced by.
        self._positioned = "position_ids" in accepted

    def _start(
        self, model: Any, rows: int, masked: bool, scheme: str,
        options: Mapping[str, Any] | None, device: torch.device,
    ) -> None:  # fmt: skip
        self._model = weakref.ref(model)
        self.rows, self.masked, self.scheme = rows, masked, scheme
        self.options = dict(options or {})
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(rows, 0, dtype=torch.long, device=device)
        self.length = 0
        self.program: Captured | None = None
        self.reason: str | None = None  # why there is no program
        self.seconds = 0.0  # of a step in `run`, when it was last measured; 0: never
        self.device: DeviceRounds | None = None
        self._signature = signature(model)
        self._state: list[Any] | None = None
        self._keeps = self._positioned = self._for_one_room = False
        self._named = "past_key_values"

    @property
    def model(self) -> Any:
        """The model.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the model is gone")
        return model

    @property
    def dtype(self) -> torch.dtype:
        """Of the model."""
        return self.model.dtype

    def fits(self) -> bool:
        """Whether the model is still what the program was compiled for."""
        return self._signature == signature(self.model) and (
            self._state is None or self._state == self._model_state()
        )

    def leave(self) -> None:
        """A call ends: what the model is like now is what `fits` asks for. (What its own code
        writes to its modules is no change.)"""
        self._state = self._model_state()

    def _model_state(self) -> list[Any]:
        return model_state(self.model, {id(x) for x in self._read()})

    def _left_out(self, program: Captured) -> str | None:
        """What hooks of the model do that the program does not: one that records, say. None: they
        do nothing else than compute."""
        effects = [x for x in program.whole.effects if TAPS not in x]
        if not effects or not has_hooks(self.model):
            return None
        return f"its hooks change {' and '.join(effects)}"

    def _read(self) -> list[Tensor]:
        """Tensors that the program reads."""
        return [] if self.program is None else self.program.tensors()

    # ----------------------------------------------------------------------------- a prompt

    def begin(self) -> None:
        """Forget the last call's sequences."""
        self.length = 0
        self.cache.set_length(0)
        self.done.zero_()
        self.mask.fill_(1)

    def adopt(self, cache: DecodeCache) -> None:
        """Decode over another cache from now on, after what it holds.

        Raises:
            KVCacheError: it was made for another batch.
        """
        old = self.cache
        if cache.rows not in (0, self.rows):
            raise KVCacheError(
                f"past_key_values has room for {cache.rows} rows, and a batch of this size decodes "
                f"with {self.rows}: make it with DecodeCache(config, rows={self.rows})"
            )
        cache.prepare(old, self.rows)
        replaced = {id(self.mask): (mask := self.mask.new_ones(self.rows, cache.room))}
        fixed = dict(cache.fixed())
        for key, tensor in old.fixed():
            replaced[id(tensor)] = fixed[key]
        for ours, theirs in zip(old.attention, cache.attention, strict=True):
            for name, tensor in ours.tensors().items():
                replaced[id(tensor)] = theirs.tensors()[name]
        self.cache, self.mask, self.length = cache, mask, cache.known
        self._replace(replaced)

    def another_cache(self) -> Any:
        """An empty one of the same kind."""
        from .decode_cache import DecodeCache

        return DecodeCache(self.model.config, scheme=self.scheme, rows=self.rows)

    def copied_cache(self, tokens: int) -> Any:
        """A cache that holds the first ``tokens`` of this one."""
        cache = self.another_cache()
        cache.prepare(self.cache, self.rows)
        cache.reserve(tokens + 1)
        pairs = zip(cache.tensors(), self.cache.tensors(), strict=True)
        for (_, _, mine), (_, _, theirs) in pairs:
            mine[:, :, :tokens].copy_(theirs[:, :, :tokens])
        cache.set_length(tokens)
        return cache

    def expect(self, tokens: int) -> None:
        """Sequences will perhaps reach ``tokens``: room at once, so that a short text never moves
        its cache."""
        self.reserve(tokens)

    def reserve(self, tokens: int) -> None:
        """Have room for sequences of ``tokens``, without another compilation.

        Raises:
            KVCacheError: there is no memory; everything is as it was.
        """
        before = {(layer, name): x for layer, name, x in self.cache.tensors()}
        if not self.cache.reserve(tokens):
            if self.mask.shape[1] < self.cache.room:
                self._grow_mask()
            return
        replaced = {
            id(before[layer, name]): x
            for layer, name, x in self.cache.tensors()
            if (layer, name) in before
        }
        old = self.mask
        self._grow_mask()
        replaced[id(old)] = self.mask
        self._replace(replaced)

    def _replace(self, tensors: dict[int, Tensor]) -> None:
        if self.program is None:
            return
        size = getattr(self.cache, "size", self.cache.room)
        if self.program.holds(size):
            self.program.replace(tensors, size)
        else:  # the model asks whether the cache is longer than something: compiled anew
            self.program = None

    def _grow_mask(self) -> None:
        mask = torch.ones(self.rows, self.cache.room, dtype=torch.long, device=self.mask.device)
        mask[:, : self.mask.shape[1]] = self.mask
        self.mask = mask

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        chunk: int,
    ) -> Tensor:
        """Run ``input_ids [b, L]`` through the model, ``chunk`` tokens at a time; logits ``[b, V]``
        of the last.

        ``attention_mask [b, held + L]`` says what is padding, ``position_ids [b, L]`` where the
        tokens are.

        Recurrent states are made of a whole prompt at once, since not every model goes on from a
        state with several tokens; what comes behind a prompt is taken one token at a time.
        """
        rows, count = input_ids.shape
        start, cache = self.length, self.cache
        self.reserve(start + count + 1)
        if attention_mask is not None:
            self.mask[:rows, : start + count] = attention_mask
        if cache.recurrent:
            chunk = 1 if start else count
            if start and attention_mask is not None and not bool(attention_mask[:, start:].all()):
                raise KVCacheError(
                    "past_key_values holds recurrent states, and there is padding behind what it"
                    " holds: give rows of equal length"
                )
            cache.use_rows(rows)
        new = self.program is None and self.reason is None
        marks = held_by_modules(self.model) if new else {}
        logits = None
        for at in range(0, count, chunk):
            part = slice(at, min(at + chunk, count))
            given: dict[str, Any] = {"input_ids": input_ids[:, part]}
            if attention_mask is not None:
                given["attention_mask"] = attention_mask[:, : start + part.stop]
            if position_ids is not None and self._positioned:
                given["position_ids"] = position_ids[:, part]
            logits = self._forward(given)
        assert logits is not None
        self.length = start + count
        if cache.recurrent:
            cache.use_rows(self.rows)
            if not cache.attention:
                cache.set_length(self.length)
        if cache.known != self.length:
            raise NotRounds(f"it holds {cache.known} positions for {self.length} tokens")
        if new and held_by_modules(self.model) != marks:
            self._check_modules(input_ids, attention_mask, position_ids)
        self.positions.fill_(self.length)
        if position_ids is not None:
            self.positions[:rows] = position_ids[:, -1:] + 1
        return logits[:, -1]

    def _check_modules(
        self, ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """A prompt changed tensors that modules hold: tables that were made once, or states.

        Raises:
            NotRounds: one more token changes them, too.
        """
        rows, cache = len(ids), self.cache
        held, marks = cache.snapshot(), held_by_modules(self.model)
        given: dict[str, Any] = {"input_ids": ids[:, -1:]}
        if attention_mask is not None:
            given["attention_mask"] = self.mask[:rows, : self.length + 1]
        if position_ids is not None and self._positioned:
            given["position_ids"] = position_ids[:, -1:] + 1
        cache.use_rows(rows)
        self._forward(given)
        cache.use_rows(self.rows)
        cache.restore(held)
        if held_by_modules(self.model) != marks:
            raise NotRounds("its modules hold states of their own")

    def _forward(self, given: dict[str, Any]) -> Tensor:
        if self._keeps:
            given["logits_to_keep"] = 1
        return self.model(**{self._named: self.cache}, use_cache=True, **given).logits

    # ------------------------------------------------------------------------------- a step

    def step(self) -> Tensor:
        """The next token's logits ``[R, V]`` after ``tokens``; valid until the next step."""
        self.room_for(1)
        if self.program is not None:
            logits = self.program() if self.device is None else self.device.step()
        elif self.reason is not None:
            logits = self._eager_step()
        else:
            logits = self._compile()
        self.length += 1
        return logits

    def room_for(self, count: int) -> None:
        """Room for ``count`` more steps.

        Raises:
            KVCacheError: there is no memory; everything is as it was.
        """
        if self.length + count > self.cache.room:
            self.cache.set_length(self.length)
            self.reserve(self.length + count)

    def on_device(self) -> DeviceRounds | None:
        """Rounds that the host launches without waiting; None on a CPU, where it runs them."""
        device = self.tokens.device
        if self.device is None and (device.type != "cpu" or graphs_for(device) is not None):
            self.device = DeviceRounds(self)
        return self.device

    def release(self) -> None:
        """Give back what the device holds for captured rounds."""
        if self.device is not None:
            self.device.release()

    def run(self, chooser: Chooser, rows: int, count: int) -> Tensor | None:
        """Up to ``count`` steps and choices of the first ``rows`` sequences without Python in
        between; the tokens chosen ``[taken, rows]``: fewer than ``count`` where all rows are done.
        None: there is no such program; nothing was run."""
        if self.program is None or (logits := self.program.result) is None:
            return None
        native = chooser.native(logits[:rows])
        if native is None:
            return None
        if self.length + count > self.cache.room:
            self.room_for(count)
            return self.run(chooser, rows, count)
        uniform = chooser.draw_many(count)
        native.draw_from(uniform)
        try:
            taken = self.program.rounds(native, self.tokens[:rows], count)
        finally:
            native.draw_from(None)
        self.length += len(taken)
        return taken

    @property
    def _masks_steps(self) -> bool:
        """Whether a step is told of padding: states have none behind the prompt."""
        return self.masked and (not self.cache.recurrent or bool(self.cache.attention))

    def _eager_step(self) -> Tensor:
        given: dict[str, Any] = {"input_ids": self.tokens}
        if self._masks_steps:
            given["attention_mask"] = self.mask[:, : self.length + 1]
        if self._positioned:
            given["position_ids"] = self.positions
        logits = self._forward(given)[:, -1]
        self.positions.add_(1)
        return logits

    def _compile(self, trusted: bool = True) -> Tensor:
        """Compile the step by taking it, and compare it with an eager one. Where what an earlier
        process left is not ``trusted``, it is made anew."""
        cache, positions = self.cache, self.positions
        cache.set_length(self.length)
        step, growing = self._step()
        before, held = positions.clone(), cache.snapshot()
        kept = kept_rounds(self, growing) if type(self) is Rounds else None
        found = kept.load() if kept is not None and trusted else None

        def again() -> None:
            cache.restore(held)
            positions.copy_(before)

        try:
            program = found or self._captured_step(step, growing, again)
            got = program.first.clone()
        except CaptureError as error:
            if not self.masked and self._positioned:
                # A model that makes positions or masks from the length alone may do better with
                # a mask, even one that hides nothing.
                self.masked = True
                again()
                return self._compile()
            program, self.reason = None, str(error)
        again()
        expected = self._eager_step()
        if program is not None and (reason := self._left_out(program)) is not None:
            program, self.reason = None, reason
        if program is not None:
            difference = (got.float() - expected.float()).norm() / expected.float().norm()
            allowed = self._allowed(expected.dtype)
            if not difference <= allowed:
                if found is not None:  # it was of another model after all
                    again()
                    return self._compile(trusted=False)
                self.reason = f"its logits differ from eager ones by {float(difference):.1e}"
                program = None
            elif kept is not None and found is None and program.room is None:
                kept.save(program)
        self.program = program
        return expected

    def _allowed(self, dtype: torch.dtype) -> float:
        """How far results of ``dtype`` may lie from eager ones: logits of a model in half precision
        are no more exact for being cast to float32."""
        if self.scheme != "model" or self.dtype not in TOLERANCE:
            return COARSE
        return TOLERANCE.get(dtype, COARSE)

    def _captured_step(
        self,
        step: Callable[[], Tensor],
        growing: list[tuple[Tensor, int]],
        again: Callable[[], None],
    ) -> Captured:
        """``step``, for any room of the cache. Where that cannot be, or is not one native call for
        it alone, for the room that there is: then more room takes another compilation.

        ``again`` takes back what running the step has changed.
        """
        program, room = None, getattr(self.cache, "size", self.cache.room)
        if not self._for_one_room:
            try:
                program = Captured(step, growing, self.options)
            except CaptureError:
                if not growing or (not self.masked and self._positioned):  # a mask comes first
                    raise
            else:
                if not program.varies or not growing:
                    return program
            again()
        try:
            fixed = Captured(step, growing, self.options, room)
        except CaptureError:
            if program is None:
                raise
            return program
        if program is not None and not fixed.native:
            return program
        self._for_one_room = True
        return fixed

    def _step(self) -> tuple[Callable[[], Tensor], list[tuple[Tensor, int]]]:
        """The step as a function of nothing, and the tensors that grow with their dimension."""
        model, cache, tokens, positions = self.model, self.cache, self.tokens, self.positions
        positioned = self._positioned
        given: dict[str, Any] = {}
        if self._masks_steps:
            given["attention_mask"] = self.mask
        if positioned:
            given["position_ids"] = positions
        given[self._named] = cache

        def step() -> Tensor:
            logits = model(input_ids=tokens, use_cache=True, **given).logits
            if positioned:
                positions.add_(1)
            return logits[:, -1]

        growing = [(x, 2) for _, _, x in cache.tensors()]
        if self._masks_steps:
            growing.append((self.mask, 1))
        return step, growing

    def set_length(self, tokens: int) -> None:
        """``tokens`` are held from now on."""
        self.length = tokens
        self.cache.set_length(tokens)


def signature(model: Any) -> tuple[Any, ...]:
    """What a compiled step depends on and a user may change between calls."""
    tensors = [*model.parameters(), *model.buffers()]
    return (
        model.training,
        getattr(getattr(model, "config", None), "_attn_implementation", None),
        getattr(getattr(model, "config", None), "_experts_implementation", None),
        torch.get_num_threads(),
        *((id(x), x.data_ptr(), x.dtype, x.device) for x in tensors),
    )


def held_by_modules(model: Any) -> dict[tuple[int, str], tuple[int, int]]:
    """Tensors that modules hold beside their parameters, by what tells whether they changed."""
    marks = {}
    for module in model.modules():
        for name, x in (*vars(module).items(), *module._buffers.items()):
            if isinstance(x, Tensor):
                marks[id(module), name] = id(x), 0 if x.is_inference() else x._version
    return marks


def pool_key(rows: int, masked: bool | str, scheme: str, options: Mapping[str, Any]) -> Any:
    """What `Rounds` must have in common to stand in for each other."""
    return rows, masked, scheme, tuple(sorted((k, str(v)) for k, v in options.items()))


class RoundsPool:
    """The idle `Rounds` of each model. A call takes one and gives it back: two calls at a time on
    one model have two."""

    def __init__(self) -> None:
        self._idle: weakref.WeakKeyDictionary[Any, dict[Any, list[Rounds]]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def take(
        self, model: Any, rows: int, masked: bool, scheme: str, options: Mapping[str, Any]
    ) -> Rounds:
        """One that nobody uses."""
        idle = self.idle(model, pool_key(rows, masked, scheme, options))
        return idle or Rounds(model, rows, masked, scheme, options)

    def idle(self, model: Any, key: Any) -> Rounds | None:
        """One that was given back and still fits, or None."""
        with self._lock:
            idle = self._idle.setdefault(model, {}).setdefault(key, [])
            while idle:
                rounds = idle.pop()
                if rounds.fits():
                    rounds.begin()
                    return rounds
        return None

    def give(self, rounds: Rounds) -> None:
        """It is idle again."""
        rounds.leave()
        with self._lock:
            self._idle.setdefault(rounds.model, {}).setdefault(rounds.key, []).append(rounds)

    def drop(self, model: Any | None = None) -> None:
        """Free what is idle, of ``model`` or of all: programs and caches."""
        with self._lock:
            if model is None:
                dropped = list(self._idle.values())
                self._idle.clear()
            else:
                dropped = [self._idle.pop(model, {})]
        for idle in dropped:
            for rounds in (r for several in idle.values() for r in several):
                rounds.release()


POOL = RoundsPool()
