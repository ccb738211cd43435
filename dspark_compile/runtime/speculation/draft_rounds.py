"""`DraftRounds`: a DSpark draft as two compiled programs beside the target's.

    append()     tapped states of verified tokens become context: keys and values of every layer
    propose()    the block [anchor, MASK, ...] in one pass: hidden rows and base logits

The draft's caches lie on the same slots as the target's, with the same mask: what the target crops,
the draft forgets. A block's own rows are written behind the context and overwritten by what is
appended next. Shapes as in `dspark_compile.models.draft`; N slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftError
from dspark_compile.runtime.captured import Captured
from dspark_compile.runtime.kept_rounds import KeptProgram
from dspark_compile.runtime.rounds import COARSE, TOLERANCE
from dspark_compile.runtime.speculation.rounds import Verifying
from dspark_compile.runtime.trace_whole import CaptureError


class DraftRounds:
    """A draft on the slots of ``rounds``.

    Args:
        draft: bound to the target.
        rounds: the target's.

    Attributes:
        ids [R, B]: the block: an anchor and mask tokens.
        pending [R, K + 1, m * width]: tapped states that `append` reads, of a round of the target's
            K drafted tokens; ``context_slot [1]`` and ``context_positions [R, 1]`` say where they
            go.
        hidden [R, D, d]: what the last `propose` gave, after the final norm.

    Raises:
        DraftError: the draft slides a window over the context of several rows, whose slots have
            holes.
    """

    def __init__(self, draft: DraftModel, rounds: Verifying) -> None:
        config, rows = draft.config, rounds.rows
        if rows > 1 and config.sliding_window is not None:
            raise DraftError(
                f"sliding_window={config.sliding_window}: a draft with a window speculates for one "
                "request at a time"
            )
        self.draft, self.rounds = draft, rounds
        weight = draft.fc.weight
        device, dtype = weight.device, weight.dtype
        self.count = config.num_drafted
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.ids = torch.full(
            (rows, config.block_size), config.mask_token_id, dtype=torch.long, device=device
        )
        width = len(config.target_layer_ids) * config.target_hidden_size
        like = rounds.model.get_input_embeddings().weight.dtype
        self.pending = torch.zeros(rows, rounds.count + 1, width, dtype=like, device=device)
        self.context_slot = torch.zeros(1, dtype=torch.long, device=device)
        self.context_positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.hidden = torch.zeros(rows, self.count, config.hidden_size, dtype=dtype, device=device)
        self.programs: dict[str, Captured | None] = {}
        self.reasons: dict[str, str] = {}
        self._output: tuple[Tensor, Tensor | None] | None = None
        rounds.growers.append(self.grow)
        self.grow({})

    # ----------------------------------------------------------------------------- its room

    @property
    def slack(self) -> int:
        """Slots behind the context that a round writes to."""
        return max(self.draft.config.block_size, self.pending.shape[1])

    def caches(self) -> list[Tensor]:
        """All keys and values, ``[R, G, N, D]``."""
        return [*self.keys, *self.values]

    def grow(self, replaced: dict[int, Tensor]) -> None:
        """As much room as the target has; ``replaced`` are the tensors that took others' place."""
        room, old = self.rounds.cache.room, self.keys[0].shape[2]
        if room != old:
            for tensors in (self.keys, self.values):
                for i, x in enumerate(tensors):
                    new = x.new_zeros(*x.shape[:2], room, x.shape[3])
                    new[:, :, :old] = x
                    replaced[id(x)] = tensors[i] = new
        for program in self.programs.values():
            if program is not None:
                program.replace(replaced, room)

    # ----------------------------------------------------------------------------- a prompt

    @torch.no_grad()
    def follow(self, states: Tensor, start: int, positions: Tensor) -> None:
        """A prompt's tapped states ``[b, n, m * width]`` at slots from ``start`` on, eagerly."""
        rows, count = states.shape[:2]
        context = self.draft.context(states)
        angles = self.draft.rotary(positions)
        for i, layer in enumerate(self.draft._layers()):
            key, value = layer.self_attn.key_value(context, angles)
            self.keys[i][:rows, :, start : start + count] = key
            self.values[i][:rows, :, start : start + count] = value

    # ----------------------------------------------------------------------------- programs

    def append(self) -> None:
        """Put ``pending`` into the context."""
        self._run("append", self._append)

    def propose(self) -> Tensor:
        """Base logits ``[R, D, V]`` (in the dtype of the weights, or float32 where they are
        soft-capped); `hidden` has the rows they come from. Valid until the next call."""
        return self._run("propose", self._propose)

    def ensure(self) -> bool:
        """Compile both; whether both are one native call. What the context holds stays: they write
        behind it only."""
        self.context_slot.copy_(self.rounds.slot)
        self.propose()
        self.append()
        return all(p is not None and p.native for p in self.programs.values())

    def _run(self, name: str, make: Callable[[], Callable[[], Tensor]]) -> Tensor:
        if name not in self.programs:
            self.programs[name] = self._compile(name, make())
        program = self.programs[name]
        return program() if program is not None else make()()

    def _compile(self, name: str, function: Callable[[], Tensor]) -> Captured | None:
        growing = [(x, 2) for x in self.caches()]
        if self.rounds.masked:
            growing.append((self.rounds.mask, 1))
        kept = self._kept(name, growing)
        program = kept.load()
        if program is not None and self._agree(program, function):
            return program
        try:
            program = Captured(function, growing, self.rounds.options)
        except CaptureError as error:
            self.reasons[name] = str(error)
            return None
        kept.save(program)
        return program

    def _kept(self, name: str, growing: Sequence[tuple[Tensor, int]]) -> KeptProgram:
        """The place of a program among what earlier processes left."""
        rounds = self.rounds

        def names() -> Iterator[tuple[str, Tensor]]:
            for part in ("ids", "pending", "context_slot", "context_positions", "hidden"):
                yield part, getattr(self, part)
            for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
                yield f"keys {i}", key
                yield f"values {i}", value
            yield "slot", rounds.slot
            yield "positions", rounds.positions
            if rounds.masked:
                yield "mask", rounds.mask
            weight, bias = self._head()
            yield "head", weight
            if bias is not None:
                yield "head's bias", bias
            if (borrowed := self.draft.borrowed.embedding) is not None:
                for part, x in (*borrowed.named_parameters(), *borrowed.named_buffers()):
                    yield f"embedding {part}", x

        about = ("draft", name, rounds.rows, rounds.masked)
        return KeptProgram(self.draft, about, names, growing, rounds.cache.room, rounds.options)

    def _agree(self, program: Captured, function: Callable[[], Tensor]) -> bool:
        """Whether ``program``, which was found, does what ``function`` does, on states that are not
        all zero. What is written behind the context is of no meaning."""
        held = self.pending.clone()
        self.pending.normal_()
        try:
            mine, eager = self._outcome(program), self._outcome(function)
        finally:
            self.pending.copy_(held)
        for got, want in zip(mine, eager, strict=True):
            allowed = TOLERANCE.get(want.dtype, COARSE) * want.float().norm()
            if not (got.float() - want.float()).norm() <= allowed:
                return False
        return True

    def _outcome(self, run: Callable[[], Tensor]) -> list[Tensor]:
        """All that ``run`` gives and writes."""
        first = min(int(self.context_slot), int(self.rounds.slot))
        with torch.no_grad():
            result = run().clone()
        written = [x[:, :, first : first + 2 * self.slack].clone() for x in self.caches()]
        return [result, self.hidden.clone(), *written]

    def _append(self) -> Callable[[], Tensor]:
        draft, keys, values, pending = self.draft, self.keys, self.values, self.pending
        slot, first, count = self.context_slot, self.context_positions, pending.shape[1]
        put = torch.ops.dspark.cache_append_

        def append() -> Tensor:
            steps = torch.arange(count, device=pending.device)
            slots = slot + steps
            context = draft.context(pending)
            angles = draft.rotary(first + steps)
            for i, layer in enumerate(draft._layers()):
                key, value = layer.self_attn.key_value(context, angles)
                # Nothing here reads the caches, so no pass would see that these are appends.
                put(keys[i], key, slots)
                put(values[i], value, slots)
            return context

        return append

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer in the draft's own dtype: a target in float32 lends a draft in bfloat16
        a copy of half the size, since the draft's share of a round is mostly reading it."""
        if self._output is not None:
            return self._output
        head = self.draft.lm_head or self.draft.borrowed.head
        if head is None:
            raise DraftError("this draft has no lm_head of its own: call bind(model)")
        dtype, bias = self.draft.fc.weight.dtype, getattr(head, "bias", None)
        weight = head.weight.detach().to(dtype)
        self._output = weight, None if bias is None else bias.detach().to(dtype)
        return self._output

    def _propose(self) -> Callable[[], Tensor]:
        draft, keys, values, hidden, ids = (
            self.draft, self.keys, self.values, self.hidden, self.ids,
        )  # fmt: skip
        slot, positions = self.rounds.slot, self.rounds.positions
        mask = self.rounds.mask if self.rounds.masked else None
        config = draft.config
        size, (weight, bias) = config.block_size, self._head()

        def propose() -> Tensor:
            steps = torch.arange(size, device=ids.device)
            slots = slot + steps
            angles = draft.rotary(positions + steps)
            x = draft.embed(ids).to(draft.fc.weight.dtype)
            at = torch.arange(keys[0].shape[2], device=ids.device)
            allowed = (at < slot + size)[None, None, None]
            if mask is not None:
                allowed = allowed & (mask > 0)[:, None, None]
            full = allowed.expand(ids.shape[0], 1, size, at.shape[0])
            near = full
            if config.sliding_window is not None:
                query = slots[:, None]
                inside = query - at < config.sliding_window
                if not config.sliding_window_non_causal:
                    inside = inside & ((at <= query) | (at < slot))
                near = full & inside[None, None]
            for i, layer in enumerate(draft._layers()):
                query_, key, value = layer.start(x, angles)
                keys[i].index_copy_(2, slots, key)
                values[i].index_copy_(2, slots, value)
                x = layer.finish(x, query_, keys[i], values[i], near if layer.sliding else full)
            rows = draft._predicting(draft.norm(x))
            hidden.copy_(rows)
            logits = F.linear(rows, weight, bias)
            cap = config.final_logit_softcapping
            return logits if cap is None else torch.tanh(logits.float() / cap) * cap

        return propose
