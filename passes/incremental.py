"""From a graph over whole sequences to one over the tokens that are new: a cache is inserted.

The graph maps tokens ``[B, S]`` to logits ``[B, S, V]`` and remembers nothing. The new one takes
the M tokens at positions p … p+M-1 and gives their logits. It is made backwards from the logits:
each value is asked for with a *mode* for every dimension that carries the sequence,

    NEW   rows p … p+M-1 of it
    ALL   rows 0 … N-1, N being the room of the caches; rows from p+M on hold anything

and each op says which modes of its operands that takes. Ops that treat the rows alike pass modes
on. A value that depends on tokens and is wanted ALL (keys, values) gets a **cache**: its NEW rows
are written to it at p. One that does not (positions, tables, biases) is computed for N rows, or for
the new ones where the op allows. Attention takes queries NEW and keys ALL, its predicate with
``q + p`` for ``q``.

What this asks for is proved or refused (`NotIncremental`, with the node):

- no row may see a later one: the mask of each attention must imply ``k <= q`` (`causal`);
- no op may mix rows of the sequence in another way, or read its length.

Sizes are those that the graph was traced with, S its one symbol; B is a number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import Tensor, fx

# The rules register themselves.
from dspark_compile.passes import incremental_dialect, incremental_ops, incremental_views  # noqa: F401
from dspark_compile.passes.incremental_core import CacheSpec, Maker, NotIncremental

__all__ = ["CacheSpec", "Incremental", "NotIncremental", "make_incremental"]


@dataclass
class Incremental:
    """The new graph: call it with the old one's arguments, the new tokens in place of the tokens,
    then the position p (an int64 tensor without dimensions) and the caches, written in place.

    Attributes:
        module: gives the logits ``[B, M, V]``, or ``[B, 1, V]`` where ``last``.
        caches: in the order of the arguments.
        limit: positions that its tables have; None where there is no such limit.
        last: whether the logits are those of the last token alone.
    """

    module: fx.GraphModule
    caches: list[CacheSpec]
    limit: int | None
    last: bool = False


def make_incremental(
    module: fx.GraphModule,
    tokens: fx.Node,
    output: int,
    symbol: sympy.Symbol,
    values: Mapping[fx.Node, Tensor],
) -> Incremental:
    """See the module's docstring.

    Args:
        module: raised graph, functional, fake values in ``meta["val"]``.
        tokens: its placeholder of tokens ``[B, S]``.
        output: which of its outputs are the logits.
        symbol: S.
        values: tensors of the graph's inputs, from which masks are computed.

    Raises:
        NotIncremental: it is no causal function of its tokens, or this cannot be proved.
    """
    maker = Maker(module, tokens, symbol, values)
    return Incremental(maker.make(output), maker.caches, maker.limit, maker.last)
