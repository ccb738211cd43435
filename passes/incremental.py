"""From a graph over whole sequences to one over the tokens that are new: a cache is inserted.

The graph maps tokens ``[B, S]`` to logits ``[B, S, V]`` and remembers nothing. The new one takes
the M tokens at positions p … p+M-1 and gives their logits. It is made backwards from the logits:
each value is asked for with a *mode* for every dimension that carries the sequence,

    NEW   rows p … p+M-1 of it
    Rows  others, each so many rows before or behind these: ``Rows(-1)`` p-1 … p+M-2
    ALL   rows 0 … N-1, N being the room of the caches; rows from p+M on hold anything

and each op says which modes of its operands that takes. Ops that treat the rows alike pass modes
on. A value that depends on tokens and is wanted ALL (keys, values) gets a **cache**: its NEW rows
are written to it at p. So does one whose earlier rows are wanted (token shifts, convolutions):
these are read from it. What does not depend on tokens (positions, tables, biases) is computed for N
rows, or for those in question where the op allows. Attention takes queries NEW and keys ALL, its
predicate with ``q + p`` for ``q``.

A dimension of S + c rows (padded, cut, with a learned prefix) counts its own rows: row i of
``pad(x, (3, 0))`` is row i - 3 of ``x``. A row before the first may hold anything, and whoever asks
for it puts something else in its place.

What this asks for is proved or refused (`NotIncremental`, with the node):

- no row may see a later one: the mask of each attention must imply ``k <= q`` (`causal`), and no
  row of a later token may be asked for;
- no op may mix rows of the sequence in another way, or read its length.

Sizes are those that the graph was traced with, S its one symbol; B is a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

# The rules register themselves.
from dspark_compile.passes import (  # noqa: F401
    incremental_dialect,
    incremental_ops,
    incremental_shifts,
    incremental_views,
)
from dspark_compile.passes.incremental_core import CacheSpec, InFront, Maker, NotIncremental

__all__ = ["CacheSpec", "Incremental", "NotIncremental", "make_incremental"]


@dataclass
class Incremental:
    """The new graph: call it with the old one's arguments, the new tokens in place of the tokens,
    then the position p (an int64 tensor without dimensions) and the caches, written in place.

    Attributes:
        module: gives the logits ``[B, M, V]``, or ``[B, 1, V]`` where ``last`` and not ``every``.
        caches: in the order of the arguments.
        limit: positions that its tables have; None where there is no such limit.
        last: whether the logits of the old graph are those of the last token alone.
        fronts: caches have room for ``max(fronts)`` rows more than for tokens, in front of these.
            They are made by calls without tokens' rows: for each number f of ``fronts``, in this
            order, one for f tokens, whichever, at position -f; before the first token, once.
    """

    module: fx.GraphModule
    caches: list[CacheSpec]
    limit: int | None
    last: bool = False
    fronts: tuple[int, ...] = ()


def make_incremental(
    module: fx.GraphModule,
    tokens: fx.Node,
    output: int,
    symbol: sympy.Symbol,
    values: Mapping[fx.Node, Tensor],
    every: bool = False,
    fronts: bool = False,
) -> Incremental:
    """See the module's docstring.

    Args:
        module: raised graph, functional, fake values in ``meta["val"]``.
        tokens: its placeholder of tokens ``[B, S]``.
        output: which of its outputs are the logits.
        symbol: S.
        values: tensors of the graph's inputs, from which masks are computed.
        every: give the logits of every new token, ``[B, M, V]``, where the graph gives those of the
            last one; B must be 1 where it has lost the dimension.
        fronts: the caller does what `Incremental.fronts` says. Else a prefix of keys and values is
            copied in front of them at every step, and one of hidden states refused.

    Raises:
        NotIncremental: it is no causal function of its tokens, or this cannot be proved.
    """
    maker = Maker(module, tokens, symbol, values, every, False if fronts else None)
    try:
        made = maker.make(output)
    except NotIncremental as first:
        if not fronts:
            raise
        maker = Maker(module, tokens, symbol, values, every, True)
        try:
            made = maker.make(output)
        except NotIncremental as error:
            raise error if maker.fronts or isinstance(first, InFront) else first from None
        if not maker.fronts:  # they are of no help
            raise
    found = tuple(sorted(maker.fronts, reverse=True))
    return Incremental(made, maker.caches, maker.limit, maker.last, found)
