"""A cache for a model that has none: `insert_cache` makes an incremental decoder of a module that
maps token ids ``[B, S]`` to logits ``[B, S, V]``.

The module is traced with a symbolic S, raised, rewritten by `dspark_compile.passes.incremental`,
and compared with the original on random tokens before it is used.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from dspark_compile import _torch_compat as compat
from dspark_compile.passes.base import UserError
from dspark_compile.passes.incremental import (
    CacheSpec,
    Incremental,
    NotIncremental,
    make_incremental,
)

from .errors import KVCacheError
from .room import bucket
from .rounds import NotRounds, Rounds, pool_key
from .trace_whole import CaptureError, Whole, trace_whole

log = logging.getLogger(__name__)

TRACED = 11  # tokens of the prompt it is traced with
# Numbers of a table whose values are looked at, and compared at every call: 4096 by 4096 positions.
LARGEST_TABLE = 1 << 24
# Of lengths that were told apart from that of the trace, so many are tried, up to this one.
MOST_LENGTHS, FURTHEST_LENGTH = 12, 64
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
COARSE = 0.05


class InsertedCache:
    """The caches that a rewritten graph asked for, with room for the same number of tokens, and
    for ``front`` rows in front of these."""

    def __init__(
        self,
        specs: list[CacheSpec],
        device: torch.device,
        limit: int | None = None,
        front: int = 0,
    ):
        self.specs, self.device, self.limit, self.front = specs, device, limit, front
        self.room = self.known = 0
        self.held: list[Tensor] = []
        self.length = torch.zeros((), dtype=torch.long, device=device)

    def tensors(self) -> Iterator[tuple[InsertedCache, int, Tensor]]:
        """Every cache, with its number."""
        for i, x in enumerate(self.held):
            yield self, i, x

    def growing(self) -> list[tuple[Tensor, int]]:
        """Every cache, with the dimension that grows."""
        return [(x, spec.dimension) for x, spec in zip(self.held, self.specs, strict=True)]

    def reserve(self, tokens: int) -> bool:
        """Have room for ``tokens``; whether tensors were replaced.

        Raises:
            KVCacheError: there is not enough memory; everything is as it was.
        """
        if tokens <= self.room:
            return False
        room = bucket(tokens)
        if self.limit is not None:  # tables of so many rows are compared with the caches'
            room = min(room, self.limit)
        try:
            new = [
                torch.zeros(
                    [room + self.front if n is None else n for n in spec.shape],
                    dtype=spec.dtype, device=self.device,
                )
                for spec in self.specs
            ]  # fmt: skip
        except (RuntimeError, MemoryError) as error:
            raise KVCacheError(
                f"no memory for a cache of {room} tokens ({error}); ask for fewer new tokens or a "
                "smaller batch"
            ) from error
        held = self.known + self.front
        for x, old, spec in zip(new, self.held, self.specs, strict=bool(self.held)):
            x.narrow(spec.dimension, 0, held).copy_(old.narrow(spec.dimension, 0, held))
        self.held, self.room = new, room
        return True

    @property
    def size(self) -> int:
        """Rows of every cache."""
        return self.room + self.front

    @property
    def layers(self) -> list[InsertedCache]:
        """What a length is set of: all its tensors have one."""
        return [self]

    @property
    def cumulative_length(self) -> Tensor:
        """The length, int64, by the name that layers of other caches have for it."""
        return self.length

    def set_length(self, tokens: int) -> None:
        """``tokens`` are held from now on."""
        self.known = tokens
        self.length.fill_(tokens)

    def snapshot(self) -> int:
        """What `restore` needs to go back to now."""
        return self.known

    def restore(self, snapshot: int) -> None:
        """Hold what was held at `snapshot`."""
        self.set_length(snapshot)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(x.nbytes for x in self.held)


class InsertedRounds(Rounds):
    """`Rounds` of a function of tokens alone, over caches inserted by the compiler.

    Args:
        model: what ``function`` belongs to; held weakly.
        function: token ids ``[B, S]`` to logits ``[B, S, V]``.
        rows: B.
        options: of the back end, for the step.

    Raises:
        NotIncremental: it cannot be decoded token by token; the node and the reason.
    """

    every = False  # whether logits of every new token are wanted, where the last one's would do

    def __init__(
        self,
        model: torch.nn.Module,
        function: Callable[[Tensor], Tensor],
        rows: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        device = next((x.device for x in (*model.parameters(), *model.buffers())), None)
        self._start(model, rows, False, "model", options, device or torch.device("cpu"))
        self.key = pool_key(rows, "inserted", "model", self.options)
        self.vocabulary = _vocabulary(function, rows, self.tokens.device)
        self.some = min(9, self.vocabulary)
        # Of a generator of its own: what the caller has seeded is the caller's.
        generator = torch.Generator().manual_seed(1)
        first = int(self.some > 1)
        ids = torch.randint(first, self.some, (rows, TRACED), generator=generator)
        ids = ids.to(self.tokens.device)
        try:
            with _refusing():
                made, self._args, self._at, tables, others = _derive(function, ids, self.every)
        except NotIncremental as error:
            if not model.training:
                raise
            raise NotIncremental(
                f"{error} (the model is in training mode: call its eval())"
            ) from error
        self._run, self.limit, self.only_last = made.module, made.limit, made.last
        self._tables = [(x, x.clone()) for x in tables]
        self._fronts = made.fronts
        front = max(made.fronts, default=0)
        self.cache = InsertedCache(made.caches, self.tokens.device, self.limit, front)
        with _refusing():
            self._check(function, others)

    def _check(self, function: Callable[[Tensor], Tensor], others: list[int]) -> None:
        """Against the original, on other tokens, in pieces of several lengths; and on prompts of
        ``others``, lengths for which the original may do something else (``if n < window``)."""
        generator = torch.Generator().manual_seed(0)
        most = 9 if self.limit is None else min(9, self.limit)
        first = int(self.some > 1)
        shape = (self.rows, max(most, *others, 0))
        ids = torch.randint(first, self.some, shape, generator=generator)
        ids = ids.to(self.tokens.device)
        self.reserve(shape[1] + 1)
        for size in others:
            self.begin()
            try:
                want = function(ids[:, :size])
            except Exception:  # it takes no text of this length (a pad by -2 of one token, say)
                continue
            got = self._forward({"input_ids": ids[:, :size]})
            want = want if want.dim() == 3 else want[:, None]
            self._compare(got[:, -want.shape[1] :], want, f"{size} random tokens")
        self.begin()
        ids = ids[:, :most]
        at, pieces = 0, []
        ends: list[int] = []
        for size in (4, 1, 1, 2, 1):
            piece = ids[:, at : at + size]
            if piece.shape[1]:
                pieces.append(self._forward({"input_ids": piece}).float())
                end = at + piece.shape[1]
                ends += range(at + 1, end + 1) if self.every else [end]
            at += size
        whole = [function(ids[:, :n]) for n in ends] if self.only_last else [function(ids)]
        want = torch.cat([x if x.dim() == 3 else x[:, None] for x in whole], 1)
        self._compare(torch.cat(pieces, 1), want, "random tokens")
        self.begin()

    def _compare(self, got: Tensor, want: Tensor, on: str) -> None:
        difference = (got.float() - want.float()).norm() / want.float().norm()
        allowed = TOLERANCE.get(self.dtype, COARSE)
        if not difference <= allowed:
            raise NotIncremental(
                f"with a cache its logits differ by {float(difference):.1e} on {on}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's first parameter."""
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    def begin(self) -> None:
        self.length = 0
        self.cache.set_length(0)
        self.done.zero_()

    def fits(self) -> bool:
        return super().fits() and all(torch.equal(x, then) for x, then in self._tables)

    def _read(self) -> list[Tensor]:
        return [*super()._read(), *(x for x in self._args if isinstance(x, Tensor))]

    def adopt(self, cache: Any) -> None:
        raise KVCacheError("the compiler inserted this cache: it cannot be exchanged")

    def expect(self, tokens: int) -> None:
        self.reserve(tokens if self.limit is None else min(tokens, self.limit))

    def reserve(self, tokens: int) -> None:
        if self.limit is not None and tokens > self.limit + 1:
            raise ValueError(
                f"the model has tables for {self.limit} positions, and {tokens - 1} are asked for: "
                "ask for fewer tokens"
            )
        if self.limit is not None:
            tokens = min(tokens, self.limit)
        before = {i: x for _, i, x in self.cache.tensors()}
        if not self.cache.reserve(tokens):
            return
        replaced = {id(before[i]): x for _, i, x in self.cache.tensors() if i in before}
        self._grow_mask()  # for whoever keeps caches on the same slots
        self._replace(replaced)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        chunk: int,
    ) -> Tensor:
        count = input_ids.shape[1]
        self.reserve(self.length + count + 1)
        logits = None
        for at in range(0, count, chunk):
            logits = self._forward({"input_ids": input_ids[:, at : at + chunk]})
        assert logits is not None
        self.length += count
        self.positions.fill_(self.length)
        return logits[:, -1]

    def _forward(self, given: dict[str, Any]) -> Tensor:
        ids = given["input_ids"]
        if not self.cache.known:
            for count in self._fronts:  # rows in front of the first token's
                self.cache.length.fill_(-count)
                self._call(ids.new_zeros(len(ids), count))
            self.cache.set_length(0)
        logits = self._call(ids)
        self.cache.set_length(self.cache.known + ids.shape[1])
        return logits

    def _call(self, ids: Tensor) -> Tensor:
        args = list(self._args)
        args[self._at] = ids
        return self._run(*args, self.cache.length, *self.cache.held)[0]

    def _eager_step(self) -> Tensor:
        return self._forward({"input_ids": self.tokens})[:, -1]

    def _step(self) -> tuple[Callable[[], Tensor], list[tuple[Tensor, int]]]:
        run, at, args = self._run, self._at, list(self._args)
        args[at] = self.tokens
        length, held = self.cache.length, self.cache.held

        def step() -> Tensor:
            logits = run(*args, length, *held)[0]
            length.add_(1)
            return logits[:, -1]

        return step, self.cache.growing()


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Inside, whatever is raised is why no cache can be inserted: of code that nobody has tried
    before, what it raises is not known."""
    try:
        yield
    except (
        NotIncremental, NotRounds, UserError, KVCacheError, MemoryError, torch.OutOfMemoryError,
    ):  # fmt: skip
        raise
    except Exception as error:
        log.info("no cache can be inserted", exc_info=True)
        raise NotIncremental(compat.in_a_line(error)) from error


@contextlib.contextmanager
def _layers_as_written() -> Iterator[None]:
    """Inside, torch's own attention layers take no way that reads sizes as numbers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _vocabulary(function: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> int:
    """How many tokens ``function`` gives logits for.

    Raises:
        NotIncremental: what ``function`` gives is no logits.
    """
    ids = torch.zeros(rows, TRACED, dtype=torch.long, device=device)
    try:
        logits = function(ids)
    except Exception as error:
        raise NotIncremental(
            f"it does not run on {TRACED} tokens: {type(error).__name__}: {error}"
        ) from error
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3) or shape[0] != rows:
        raise NotIncremental(
            f"for tokens [{rows}, {TRACED}] it gives {shape}, and logits are [B, S, vocabulary], "
            "or [B, vocabulary] of the last token"
        )
    return int(shape[-1])


def _derive(
    function: Callable[[Tensor], Tensor], ids: Tensor, every: bool = False
) -> tuple[Incremental, list[Any], int, list[Tensor], list[int]]:
    """(the new graph, the old one's arguments, where the tokens stand among them, tables of masks
    whose values the new graph holds for, lengths that the trace is not known to hold for)."""
    from dspark_compile.diagnostics.report import GraphReport
    from dspark_compile.options import Options
    from dspark_compile.passes.base import PassContext
    from dspark_compile.passes.capture import capture
    from dspark_compile.passes.pipeline import RAISE
    from dspark_compile.passes.prove_masks import ProveMasks
    from dspark_compile.passes.subclasses import desugar, naming
    from dspark_compile.passes.trace import trace

    graphs: list[tuple[fx.GraphModule, PassContext, Callable[[list[Any]], list[Any]]]] = []

    def compiler(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        report = GraphReport(0)
        with naming(inputs):
            plain, flat, wrap = desugar(gm, inputs)
            traced, mode = trace(capture(plain, report), flat)
        ctx = PassContext(Options(), report, mode, list(flat))
        for kind in RAISE:
            kind().run(traced.graph, ctx)
        traced.graph.eliminate_dead_code()
        graphs.append((traced, ctx, wrap.given))  # type: ignore[attr-defined]
        return gm.forward

    torch._dynamo.mark_dynamic(ids, 1)
    try:
        with _layers_as_written():
            whole = trace_whole(lambda: function(ids), compiler)
    except CaptureError as error:
        raise NotIncremental(str(error)) from error
    traced, ctx, given = graphs[-1]
    args = given(whole.args)
    at = [i for i, x in enumerate(args) if x is ids]
    if not at:
        raise NotIncremental("its logits are not a result of its tokens")
    inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
    tokens = inputs[at[0]]
    size = tokens.meta["val"].shape[1]
    if not isinstance(size, torch.SymInt):
        raise NotIncremental("it was traced for one length only")
    values = {n: x for n, x in zip(inputs, args, strict=True) if isinstance(x, Tensor)}
    tables = {n: x for n, x in values.items() if n is not tokens and _table(x)}
    ctx.shared["mask_constants"] = tables
    ProveMasks().run(traced.graph, ctx)
    traced.graph.eliminate_dead_code()
    used = [tables[n] for n in ctx.shared.get("used_constants", ())]
    made = make_incremental(traced, tokens, whole.place, size.node.expr, values, every, True)
    # As written, the model takes no sequence that is longer than its table of a mask.
    limits = [made.limit, _longest(whole), *(min(x.shape[-2:]) for x in used)]
    made.limit = min((n for n in limits if n is not None), default=None)
    upto = FURTHEST_LENGTH if made.limit is None else min(FURTHEST_LENGTH, made.limit)
    others = [n for n in range(1, upto + 1) if not whole.holds(n)]
    return made, args, at[0], used, others[:MOST_LENGTHS]


def _table(x: Tensor) -> bool:
    """Whether ``x`` may be a mask that a module holds (`ProveMasks` sees whether it is one)."""
    return x.dim() >= 2 and not isinstance(x, torch.nn.Parameter) and x.numel() <= LARGEST_TABLE


def _longest(whole: Whole) -> int | None:
    """The longest sequence that the trace holds for (``assert t <= block_size``); None: any. That a
    length is not a certain one is about layouts: a table as long as that is no longer a part."""
    conditions = [c for c in whole.conditions if not isinstance(c, sympy.Ne)]

    def holds(size: int) -> bool:
        values = dict.fromkeys(whole.expressions, size)
        return all(bool(c.xreplace(values)) for c in conditions)

    low, high = TRACED, 1 << 24
    if holds(high) or not holds(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
