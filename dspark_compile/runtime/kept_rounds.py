"""Programs of decode loops that an earlier process traced, found without tracing the model again:
decode steps, and what verifies drafted tokens.

`reuse.steps` keeps a graph's native call under a hash of the graph, and to have the graph Dynamo
must trace the model: seconds for a model of 28 layers. Here a program is found by the model itself
(`reuse.model_key`): its code, attributes and configuration, and the shapes of its parameters. What
is kept beside it is where its inputs are found: which parameter, buffer or tensor of the cache each
is.

Who finds a program compares it with an eager run before it is used, as one that was traced is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor

from dspark_compile import _torch_compat as compat
from dspark_compile.codegen.cpp.build import BuildError
from dspark_compile.diagnostics import state
from dspark_compile.diagnostics.environment import environment
from dspark_compile.options import Options
from dspark_compile.reuse import files
from dspark_compile.reuse.key import NoKey, inner, storages, surroundings
from dspark_compile.reuse.layout import CannotKeep, polynomial, terms
from dspark_compile.reuse.model_key import model_key
from dspark_compile.reuse.steps import KeptStep

from .captured import Captured
from .trace_whole import Whole

if TYPE_CHECKING:
    from .rounds import Rounds

log = logging.getLogger(__name__)

_RELATIONS = {
    c.__name__: c
    for c in (
        sympy.Eq, sympy.Ne, sympy.StrictLessThan, sympy.LessThan, sympy.StrictGreaterThan,
        sympy.GreaterThan,
    )
}  # fmt: skip


class KeptProgram:
    """The place of a `Captured` among what is kept.

    Args:
        model: whose code the program runs.
        about: what else it depends on, in words and numbers.
        names: gives every tensor that it may read or write, by a name that it has in every process.
            The model's parameters and buffers need none.
        growing: tensors and a dimension of each that the program takes of any size.
        room: that size now.
        options: of the back end.
    """

    def __init__(
        self,
        model: Any,
        about: Sequence[Any],
        names: Callable[[], Iterable[tuple[str, Tensor]]],
        growing: Sequence[tuple[Tensor, int]],
        room: int,
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._given, self._room = model, names, room
        self._growing = {id(x): dimension for x, dimension in growing}
        self._options = Options.parse(options)
        self._key: str | None = None
        if (
            self._options.reuse == "off" or self._options.verify or self._options.keep_programs
            or any(x.device.type != "cpu" for _, x in names())
        ):  # fmt: skip
            return
        try:
            self._key = self._hash(about)
        except (NoKey, OSError) as error:
            log.info("the program is not kept by its model: %s", error)

    def _hash(self, about: Sequence[Any]) -> str:
        from dspark_compile import backend  # as it is when a model is traced

        backend.hf_experts.install()
        digest = hashlib.sha256()
        for part in surroundings(self._options):
            digest.update(part.encode() + b"\0")
        # Programs alike but for a shape have places of their own, or they would take turns in one.
        shapes = [(name, str(x.dtype), self._shape(x)) for name, x in self._given()]
        digest.update(repr((model_key(self._model), *about, shapes)).encode())
        return digest.hexdigest()[:40]

    def _shape(self, x: Tensor) -> list[int]:
        """``x.shape``, -1 where it may be any."""
        shape, dimension = list(x.shape), self._growing.get(id(x))
        if dimension is not None:
            shape[dimension] = -1
        return shape

    # ------------------------------------------------------------------------------- finding

    def load(self) -> Captured | None:
        """The program, run once; None where there is none that fits."""
        if self._key is None:
            return None
        try:
            data = files.read(self._key)
            if data is None:
                return None
            named = dict(self._names())
            args = [named[x["name"]] if isinstance(x, dict) else x for x in data["args"]]
            for i in data["symbols"]:
                args[i] = self._room
            if [x for x in data["args"] if isinstance(x, dict)] != self._described(args):
                return None
            size = sympy.Symbol("size", integer=True)
            whole = Whole(
                compiled=lambda *_: None, args=args, symbols=list(data["symbols"]),
                result=torch.empty(0), place=int(data["place"]),
                conditions=[
                    _RELATIONS[name](polynomial(left, {0: size}), polynomial(right, {0: size}))
                    for name, left, right in data["conditions"]
                ],
                expressions=[size],
            )  # fmt: skip
            if not whole.holds(self._room):
                return None
            return self._program(whole, data["step"])
        except (BuildError, KeyError, IndexError, TypeError, ValueError) as error:
            log.info("a kept program is left out: %s", error)
            return None

    def _program(self, whole: Whole, step: str) -> Captured | None:
        group = state.start_report()
        group.options = self._options.to_dict()
        group.environment = environment()
        run = KeptStep.of_key(step, whole.args, group.add_graph()).load()
        if run is None:
            return None
        return Captured.again(replace(whole, compiled=run))

    # ------------------------------------------------------------------------------- keeping

    def save(self, program: Captured) -> None:
        """Keep ``program``, which was traced and agreed with eager code."""
        step = getattr(program.whole.compiled, "kept", None)
        if self._key is None or step is None:
            return
        whole = program.whole
        try:
            described = iter(self._described(whole.args))
            args: list[Any] = []
            for i, x in enumerate(whole.args):
                if isinstance(x, Tensor):
                    args.append(next(described))
                elif i in whole.symbols or isinstance(x, (bool, int, float)):
                    args.append(None if i in whole.symbols else x)
                else:
                    raise CannotKeep(f"an input is a {type(x).__name__}")
            inputs = dict.fromkeys(whole.expressions, 0)
            files.write(
                self._key,
                {
                    "step": step, "args": args, "symbols": whole.symbols, "place": whole.place,
                    "conditions": [c for x in whole.conditions for c in _condition(x, inputs)],
                },
            )  # fmt: skip
        except (CannotKeep, BuildError, OSError) as error:
            log.info("the program is not kept by its model: %s", error)

    def _names(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that the program may read, by a name that it has in every process."""
        yield from self._given()
        for name, x in self._model.named_parameters(remove_duplicate=False):
            yield f"parameter {name}", x
        for name, x in self._model.named_buffers(remove_duplicate=False):
            yield f"buffer {name}", x

    def _described(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        """What the tensors among ``args`` must be like for the step to be right."""
        names: dict[int, str] = {}
        for name, x in self._names():
            names.setdefault(id(x), name)
        memory: dict[int, int] = {}
        found = []
        for x in args:
            if not isinstance(x, Tensor):
                continue
            if id(x) not in names:
                raise CannotKeep(f"a tensor {list(x.shape)} is not of the model nor of its cache")
            dimension = self._growing.get(id(x))
            if dimension is not None and not x.is_contiguous():
                raise CannotKeep("a cache is not contiguous")
            found.append(
                {
                    "name": names[id(x)], "type": type(x).__qualname__, "dtype": str(x.dtype),
                    "device": str(x.device), "shape": self._shape(x), "offset": x.storage_offset(),
                    "stride": None if dimension is not None else list(x.stride()),
                    "memory": [memory.setdefault(at, len(memory)) for at in storages(x)],
                    "inner": inner(x) if compat.is_subclass(x) else None,
                }
            )  # fmt: skip
        return found


def kept_rounds(
    rounds: Rounds,
    growing: Sequence[tuple[Tensor, int]],
    what: Sequence[Any] = ("step",),
    more: Mapping[str, Tensor] | None = None,
) -> KeptProgram:
    """The place of ``what`` of ``rounds``, which is prefilled, so that its cache is allocated.

    ``growing``: as `KeptProgram` has it. ``more``: tensors that it reads or writes beside those of
    any rounds.
    """

    def names() -> Iterator[tuple[str, Tensor]]:
        yield "tokens", rounds.tokens
        yield "positions", rounds.positions
        if any(x is rounds.mask for x, _ in growing):  # others' programs do not read it
            yield "mask", rounds.mask
        for i, (layer, name, x) in enumerate(rounds.cache.tensors()):
            yield f"cache {i} {type(layer).__qualname__} {name}", x
        for key, x in rounds.cache.fixed():
            yield f"fixed {key!r}", x
        yield from (more or {}).items()

    about = (
        "rounds", *what, rounds.rows, rounds.masked, rounds.scheme,
        type(rounds.cache).__qualname__,
        [(type(x).__qualname__, x.is_sliding if hasattr(x, "is_sliding") else None)
         for x in rounds.cache.layers],
    )  # fmt: skip
    return KeptProgram(rounds.model, about, names, growing, rounds.cache.room, rounds.options)


def _condition(condition: Any, inputs: dict[Any, int]) -> list[list[Any]]:
    """A relation between polynomials of the size as plain data; [] where it always holds."""
    if condition == sympy.true:
        return []
    name = type(condition).__name__
    if name not in _RELATIONS:
        raise CannotKeep(f"tracing assumed {condition}")
    sides = (condition.lhs, condition.rhs)
    if any(x.is_number and not x.is_Integer for x in sides):
        # Below infinity is every size.
        if name == "LessThan" and str(condition.rhs) in ("int_oo", "oo"):
            return []
        raise CannotKeep(f"tracing assumed {condition}")
    return [[name, terms(condition.lhs, inputs), terms(condition.rhs, inputs)]]
