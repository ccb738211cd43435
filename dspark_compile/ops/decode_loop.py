"""``decode_loop``: a step that is repeated, as one node of a graph.

    decode_loop(step, carried, others, count) -> (carried, last, made)

``step(*carried, *others) -> (carried, last, made)`` is a graph of its own; it may write to tensors
among ``others`` in place. Shapes and dtypes of what is carried stay the same. ``last`` is that of
the last step; ``made`` is a tuple for each list of the user's, with a tuple of tensors, which come
back stacked: ``[count, ...]``.

It is a higher-order operator: Dynamo's graphs hold it (`dspark_compile.loops.hook` puts it there),
and the back end takes it apart (`dspark_compile.loops.split`) before anything else sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree


class DecodeLoop(HigherOrderOperator):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__("dspark_decode_loop")

    def __call__(
        self, step: Callable[..., Any], carried: Any, others: Sequence[Any], count: int
    ) -> Any:
        return super().__call__(step, carried, others, count)  # type: ignore[no-untyped-call]


decode_loop = DecodeLoop()


@decode_loop.py_impl(DispatchKey.CompositeExplicitAutograd)
def reference(
    step: Callable[..., Any], carried: Sequence[Any], others: Sequence[Any], count: int
) -> Any:
    """What it means, in plain Python.

    Raises:
        ValueError: ``count`` is less than one.
    """
    if count < 1:
        raise ValueError(f"decode_loop: count is {count}; a loop without a step is no loop")
    history: list[Any] = []
    last: Any = ()
    for _ in range(count):
        carried, last, made = step(*carried, *others)
        history.append(pytree.tree_map_only(Tensor, torch.clone, made))
    return carried, last, pytree.tree_map(lambda *xs: torch.stack(xs), *history)
