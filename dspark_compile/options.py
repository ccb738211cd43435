"""Every option of the back end: type, default, check and doc in one place.

``torch.compile(model, backend="dspark", options={"kv_cache": "int8"})`` or the same
through `Options`. An unknown name or an illegal value is an `OptionsError` that lists
the legal ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class OptionsError(ValueError):
    """An option's name or value is not legal."""


def _option(
    default: Any, doc: str, choices: tuple[Any, ...] | None = None, variable: str | None = None
) -> Any:
    metadata = {"doc": doc, "choices": choices}
    if variable is None:
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: os.environ.get(variable, default), metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Options of ``backend="dspark"``; immutable."""

    inner: str = _option(
        "inductor",
        "What compiles the rewritten graph: Inductor, Inductor only "
        "where the cost model says that fusing what is left is worth it, or nothing.",
        ("inductor", "auto", "eager"),
    )
    kernels: str = _option(
        "auto",
        "Which kernels dialect ops become: the best for the device, ATen forms that the "
        "inner compiler fuses, Triton, emitted C++ (CPU only), or the plain-torch reference. "
        "$DSPARK_KERNELS, if set, is the default.",
        ("auto", "aten", "triton", "cpp", "reference"),
        variable="DSPARK_KERNELS",
    )
    tune: str = _option(
        "auto",
        "Measuring what is fastest for a site on the CPU, where the cost model is unsure: not at "
        "all, for at most a second of a process, or for a minute with Inductor among the "
        "candidates. What was measured is kept. $DSPARK_TUNE, if set, is the default.",
        ("off", "auto", "full"),
        variable="DSPARK_TUNE",
    )
    kv_cache: str = _option(
        "model",
        "How a static key/value cache that the caller brings is stored: as the model has "
        "it (exact), or int8 with one scale per token and head.",
        ("model", "int8"),
    )
    reuse: str = _option(
        "on",
        "Whether a graph that becomes one native call is kept for the next process, and taken "
        "from an earlier one. $DSPARK_REUSE, if set, is the default.",
        ("on", "off"),
        variable="DSPARK_REUSE",
    )
    fallback: str = _option(
        "inductor",
        "When a graph cannot be rewritten: compile it unchanged and report it, or raise.",
        ("inductor", "error"),
    )
    verify: bool = _option(False, "Check the graph between passes.", (False, True))
    merge_linears: bool = _option(
        False,
        "Stack the weights of linears that share an input (QKV, gate and up). The modules' "
        "parameters become views of the stacked storage, so memory does not grow.",
        (False, True),
    )
    disable: tuple[str, ...] = _option((), "Names of passes to leave out.")
    keep_programs: bool = _option(
        False, "Keep the printable program of every stage in the report.", (False, True)
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            choices = item.metadata["choices"]
            if choices is not None and (
                value not in choices or isinstance(value, bool) != isinstance(choices[0], bool)
            ):
                legal = ", ".join(repr(c) for c in choices)
                raise OptionsError(f"option {item.name}={value!r} is not one of {legal}")
        if isinstance(self.disable, str) or not all(isinstance(d, str) for d in self.disable):
            raise OptionsError(
                f"option disable={self.disable!r} must be a list of pass names, "
                "such as ['add_norm']"
            )
        object.__setattr__(self, "disable", tuple(self.disable))
        from .passes.pipeline import pass_names

        for name in self.disable:
            if name not in pass_names():
                raise OptionsError(
                    f"option disable names the unknown pass {name!r}; the passes are "
                    f"{', '.join(pass_names())}"
                )

    @classmethod
    def parse(cls, options: Mapping[str, Any] | Options | None) -> Options:
        """Options from what a user wrote.

        Raises:
            OptionsError: for an unknown name or an illegal value.
        """
        if options is None:
            return cls()
        if isinstance(options, Options):
            return options
        if not isinstance(options, Mapping):
            raise OptionsError(
                f"options must be a mapping or dspark_compile.Options, not {type(options).__name__}"
            )
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise OptionsError(
                    f"unknown option {name!r}{meant}; the options are {', '.join(names)}"
                )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for reports and cache keys."""
        return dataclasses.asdict(self)


def describe() -> str:
    """The options as text: name, default, legal values, meaning."""
    lines = []
    for item in dataclasses.fields(Options):
        choices = item.metadata["choices"]
        legal = " | ".join(repr(c) for c in choices) if choices else "list of names"
        lines.append(f"{item.name} = {item.default!r}  ({legal})\n    {item.metadata['doc']}")
    return "\n".join(lines)
