"""How a graph's own inputs come of the caller's, as a compilation changed them; as JSON, and back.

the caller's            weight: Int8Tensor, cache
tensors inside of them  weight.qdata, weight.scale, cache              `take_apart`
left out, added         weight.scale, pack_int4(weight.qdata), ...     `with_inputs`
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dspark_compile.passes.base import PassContext
from dspark_compile.passes.kv_int8 import CompressedInput
from dspark_compile.passes.subclasses import take_apart
from dspark_compile.reuse.layout import CannotKeep
from dspark_compile.runtime.kv_storage import why_not
from dspark_compile.runtime.packed_int4 import PackedInt4


def with_inputs(
    run: Callable[..., Any], kept: Sequence[int], extra: Sequence[Any]
) -> Callable[..., Any]:
    """``run`` on inputs ``kept`` of those that are given and on the values of ``extra``, the
    recipes of what passes added."""
    if not extra:
        return run

    def given(args: Sequence[Any]) -> list[Any]:
        return [*(args[i] for i in kept), *(item.value(args) for item in extra)]

    def call(*args: Any) -> Any:
        return run(*given(args))

    if hasattr(run, "bind"):
        call.bind = lambda args: run.bind(given(args))  # type: ignore[attr-defined]
    return call


@dataclass(frozen=True)
class Inputs:
    """What became of a graph's inputs.

    Attributes:
        paths: of `take_apart`; None where no input is a tensor of tensors.
        kept: inputs that the graph still has. extra: recipes of those that passes added.
    """

    paths: Sequence[tuple[int, Sequence[str]]] | None = None
    kept: Sequence[int] = ()
    extra: Sequence[Any] = field(default_factory=list)

    @classmethod
    def of(cls, ctx: PassContext, wrap: Any, count: int) -> Inputs:
        """Of a compilation: ``wrap`` is `desugar`'s, ``count`` how many inputs there were then.

        Inputs are dropped where others took their place; where none are added, all are left.
        """
        kept = [i for i in range(count) if i not in ctx.dropped_inputs]
        return cls(wrap.paths, kept, ctx.extra_inputs)

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run`` of the graph's inputs as a function of the caller's."""
        return take_apart(self.paths)(with_inputs(run, self.kept, self.extra))

    def fit(self, given: Sequence[Any]) -> bool:
        """Whether every recipe can be followed on the caller's ``given``: a cache that cannot be
        compressed stays exact, which is another graph."""
        for item in self.extra:
            if isinstance(item, CompressedInput):
                at, path = (item.index, ()) if self.paths is None else self.paths[item.index]
                x = functools.reduce(getattr, path, given[at])
                if type(x) in (torch.Tensor, torch.nn.Parameter) and why_not(x):
                    return False
        return True

    def to_data(self) -> dict[str, Any]:
        """As lists, strings and numbers.

        Raises:
            CannotKeep: an input comes about in a way that has no form there.
        """
        return {
            "paths": None if self.paths is None else [[i, list(path)] for i, path in self.paths],
            "kept": list(self.kept),
            "extra": [_recipe(item) for item in self.extra],
        }

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Inputs:
        """The inverse of `to_data`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        paths = data["paths"]
        return cls(
            None if paths is None else [(int(i), tuple(path)) for i, path in paths],
            [int(i) for i in data["kept"]],
            [_made(*item) for item in data["extra"]],
        )


def _recipe(item: Any) -> list[Any]:
    if type(item) is PackedInt4:
        return ["int4", item.index]
    if type(item) is CompressedInput:
        return ["int8 cache", item.index, item.part]
    raise CannotKeep("passes changed what goes into the graph")


def _made(kind: str, index: int, part: str = "") -> Any:
    fake = torch.empty(0)  # nothing is traced with it
    if kind == "int4":
        return PackedInt4(int(index), fake)
    if kind == "int8 cache" and part in ("data", "scale"):
        return CompressedInput(int(index), part, fake)
    raise ValueError(f"no input is {kind} {part}")
