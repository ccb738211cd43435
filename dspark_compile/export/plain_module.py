"""Any module with the signature it has; the buffers that it writes go in and out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import ExportError
from .subclass_weights import without_subclasses
from .subject import Case, Subject


class Plain(Subject):
    """Any module that takes tensors and gives tensors, in lists, tuples and dicts if it likes.

    Args:
        model: in eval mode.
        args: example inputs.
        dynamic_shapes: for each input, a dict of dynamic dimensions and their names, or None.
        others: more inputs to compare on, at other sizes or values.

    Raises:
        ExportError: an argument is no tensor, or the description of dimensions does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        dynamic_shapes: Sequence[dict[int, str] | None] | None = None,
        others: Sequence[Sequence[Tensor]] = (),
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        for i, value in enumerate(args):
            if not isinstance(value, Tensor):
                raise ExportError(
                    f"args[{i}] is a {type(value).__name__}, not a tensor; wrap the model in a "
                    "module that takes tensors only"
                )
        self.model = model
        self.example = list(args)
        self.others = [list(o) for o in others]
        self.dynamic = [dict(d or {}) for d in (dynamic_shapes or [{}] * len(args))]
        if len(self.dynamic) != len(args):
            raise ExportError(
                f"dynamic_shapes describes {len(self.dynamic)} inputs, args has {len(args)}"
            )
        for i, (value, dims) in enumerate(zip(self.example, self.dynamic, strict=True)):
            for dim in dims:
                if not isinstance(dim, int) or not 0 <= dim < value.dim():
                    raise ExportError(
                        f"dynamic_shapes[{i}] names dimension {dim!r} of a tensor of "
                        f"{value.dim()} dimensions"
                    )
        self.input_names = self._names(input_names)
        self.given_outputs = list(output_names or [])
        with torch.no_grad(), _buffers_kept(model):
            result = model(*self.example)
        results = tree_leaves(result)
        if not all(isinstance(r, Tensor) for r in results):
            raise ExportError(
                f"{type(model).__name__} returns {[type(r).__name__ for r in results]}, not "
                "tensors; wrap it in a module that returns tensors only"
            )
        self.output_names = self.given_outputs or [
            "logits" if i == 0 else f"output_{i}" for i in range(len(results))
        ]
        if len(self.output_names) != len(results):
            raise ExportError(
                f"output_names has {len(self.output_names)} names for {len(results)} outputs"
            )
        self.module = _Listed(without_subclasses(model))
        self.buffers: list[str] = []  # set after capture: the buffers that are written

    def _names(self, given: Sequence[str] | None) -> list[str]:
        if given is None:
            parameters = list(inspect.signature(self.model.forward).parameters)
            given = parameters[: len(self.example)]
        if len(given) != len(self.example) or len(set(given)) != len(given):
            raise ExportError(
                f"input_names={list(given)!r} does not name {len(self.example)} inputs, each once"
            )
        return list(given)

    def cases(
        self, shapes: Sequence[tuple[int, int, int]], seed: int, padded: bool = False
    ) -> list[Case]:
        """The example inputs and the others, with buffers in their present state."""
        made = []
        for i, inputs in enumerate([self.example, *self.others]):
            with torch.no_grad(), _buffers_kept(self.model):
                before = [self._buffer(name).clone() for name in self.buffers]
                result = self.model(*inputs)
                after = [self._buffer(name).clone() for name in self.buffers]
            results = tree_leaves(result)
            shapes_text = ", ".join(str(tuple(x.shape)) for x in inputs)
            made.append(Case(f"inputs {i}: {shapes_text}", [*inputs, *before], [*results, *after]))
        return made

    def _buffer(self, name: str) -> Tensor:
        return self.model.get_buffer(name)


class _Listed(nn.Module):
    """A module's result as a flat tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(self.model(*args)))


class _buffers_kept:
    """Buffers are put back as they were."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.saved = [(b, b.clone()) for b in self.model.buffers()]

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for buffer, value in self.saved:
                buffer.copy_(value)
