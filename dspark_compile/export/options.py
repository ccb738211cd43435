"""What an export may be asked for, and what is refused before it starts.

Every combination that some runtime cannot run is an `ExportError` here, with what to choose
instead: nothing of it is found out after minutes of tracing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ExportError

TARGETS = ("portable", "gqa", "local", "genai")
OPSETS = (23, 24)
DTYPES = {
    "model": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# (batch, new tokens, tokens in the cache): a prompt, a step, and what lies between.
_SHAPES = ((1, 5, 0), (2, 3, 0), (1, 1, 7), (2, 1, 4), (1, 3, 6))
_BATCHED_CHUNK = (2, 3, 5)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_onnx`; immutable, checked when made.

    Attributes:
        target: ``portable`` (standard ONNX ops only), ``gqa`` (ONNX Runtime's contrib ops),
            ``local`` (as portable, each dialect op one model-local function) or ``genai`` (a
            folder for onnxruntime-genai around a ``gqa`` graph).
        opset: 23 or 24; 0 takes 24, or 23 for ``gqa`` and ``genai``.
        kv_cache: ``model``: in the graph's dtype; ``int8``: a scale for each token and head
            (``portable``, ``local``), or calibrated static scales (``gqa``, ``genai``); ``int4``:
            calibrated static scales (``gqa``, ``genai``).
        dtype: what weights and arithmetic are cast to; ``model`` keeps the model's.
        cache: ``static``: past and present have the same shape, a capacity, and may share memory;
            ``growing``: present is past with the new rows behind it; ``auto``: static with opset
            24, else growing. ``gqa`` graphs serve both.
        provider: ``cpu`` or ``cuda``: the execution provider whose limits are checked.
        max_length: rows of precomputed RoPE tables, and the context length written into a genai
            folder; 0 takes the model's own limit.
        external_data: weights beside the model file in ``<name>.data``; None: where they exceed
            1 GiB.
        shapes: ``(batch, new tokens, cached tokens)`` triples at which the graph is compared with
            the model; empty takes a set that covers prompts, steps and chunks.
        verify: compare before success is reported.
        overwrite: replace what is at the path.
    """

    target: str = "portable"
    opset: int = 0
    kv_cache: str = "model"
    dtype: str = "model"
    cache: str = "auto"
    provider: str = "cpu"
    max_length: int = 0
    external_data: bool | None = None
    shapes: tuple[tuple[int, int, int], ...] = ()
    verify: bool = True
    overwrite: bool = True

    def __post_init__(self) -> None:
        _choice("target", self.target, TARGETS)
        _choice("kv_cache", self.kv_cache, ("model", "int8", "int4"))
        _choice("dtype", self.dtype, tuple(DTYPES))
        _choice("cache", self.cache, ("auto", "static", "growing"))
        _choice("provider", self.provider, ("cpu", "cuda"))
        for name in ("verify", "overwrite"):
            if not isinstance(getattr(self, name), bool):
                raise ExportError(f"{name}={getattr(self, name)!r} is not True or False")
        if self.external_data not in (None, True, False):
            raise ExportError(
                f"external_data={self.external_data!r} is not True, False or None (decide by size)"
            )
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int):
            raise ExportError(f"max_length={self.max_length!r} is not a number of tokens")
        if self.max_length < 0:
            raise ExportError(f"max_length={self.max_length} is negative; 0 takes the model's own")
        self._check_opset()
        self._check_cache()
        self._check_provider()
        object.__setattr__(self, "shapes", self._checked_shapes())

    @property
    def contrib(self) -> bool:
        """Whether ONNX Runtime's contrib ops are used."""
        return self.target in ("gqa", "genai")

    @property
    def static(self) -> bool:
        """Whether past and present have one capacity, written by TensorScatter."""
        return self.cache == "static"

    def _check_opset(self) -> None:
        if self.opset == 0 and not isinstance(self.opset, bool):
            default = 23 if self.contrib or self.cache == "growing" else 24
            object.__setattr__(self, "opset", default)
        if self.opset not in OPSETS or isinstance(self.opset, bool):
            raise ExportError(
                f"opset={self.opset!r} is not supported: Attention, RMSNormalization and "
                "RotaryEmbedding are in 23 and later, and ONNX Runtime's Attention ends at 24; "
                "choose 23 or 24"
            )

    def _check_cache(self) -> None:
        if self.contrib:
            if self.cache == "static":
                raise ExportError(
                    f"cache='static' does not go with target={self.target!r}: "
                    "GroupQueryAttention's past and present may share memory as they are; leave "
                    "cache at 'auto'"
                )
            object.__setattr__(self, "cache", "growing")
            return
        if self.cache == "auto":
            object.__setattr__(self, "cache", "static" if self.opset >= 24 else "growing")
        if self.cache == "static" and self.opset < 24:
            raise ExportError(
                f"cache='static' with opset={self.opset}: TensorScatter is in opset 24; choose "
                "opset=24, or cache='growing'"
            )
        if self.kv_cache == "int4":
            raise ExportError(
                f"kv_cache='int4' with target={self.target!r}: standard ONNX ops have no 4-bit "
                "cache; choose kv_cache='int8', or target='gqa'"
            )

    def _check_provider(self) -> None:
        if self.provider == "cpu":
            if self.dtype == "bfloat16":
                raise ExportError(
                    "dtype='bfloat16' with provider='cpu': ONNX Runtime's CPU provider has no "
                    "bfloat16 kernels; choose dtype='float32' or 'float16', or provider='cuda'"
                )
        elif self.contrib and self.dtype == "float32":
            raise ExportError(
                f"dtype='float32' with provider='cuda' and target={self.target!r}: "
                "GroupQueryAttention has no float32 kernel on CUDA; choose dtype='float16' or "
                "'bfloat16', or target='portable'"
            )

    def check_model_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The graph's dtype for a model of ``dtype``.

        Raises:
            ExportError: the provider lacks it.
        """
        chosen = DTYPES[self.dtype] or dtype
        names = {value: name for name, value in DTYPES.items() if value is not None}
        if chosen not in names:
            raise ExportError(
                f"dtype='model' with a model of {dtype}: choose dtype='float32' or 'float16'"
            )
        dataclasses.replace(self, dtype=names[chosen])
        return chosen

    def _checked_shapes(self) -> tuple[tuple[int, int, int], ...]:
        if not self.shapes:
            return _SHAPES if self.contrib else (*_SHAPES, _BATCHED_CHUNK)
        checked = []
        for shape in self.shapes:
            good = isinstance(shape, Sequence) and len(shape) == 3
            if not good or not all(type(n) is int for n in shape):
                raise ExportError(
                    f"shapes holds {shape!r}; each is (batch, new tokens, cached tokens), such "
                    "as (2, 1, 16)"
                )
            batch, rows, past = shape
            if batch < 1 or rows < 1 or past < 0:
                raise ExportError(
                    f"shapes holds {shape!r}: batch and new tokens are at least 1, cached tokens "
                    "at least 0"
                )
            if self.contrib and batch > 1 and rows > 1 and past > 0:
                raise ExportError(
                    f"shapes holds {shape!r}: GroupQueryAttention takes several new tokens behind "
                    "a past for batch 1 only; choose target='portable', or batch 1"
                )
            checked.append((batch, rows, past))
        return tuple(checked)

    @classmethod
    def parse(cls, options: dict[str, Any]) -> ExportOptions:
        """Options from keyword arguments.

        Raises:
            ExportError: for an unknown name or an illegal value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise ExportError(
                    f"unknown option {name!r}{meant}; the options are {', '.join(names)}"
                )
        values = dict(options)
        if isinstance(values.get("shapes"), list):
            values["shapes"] = tuple(
                tuple(s) if isinstance(s, list) else s for s in values["shapes"]
            )
        return cls(**values)


def _choice(name: str, value: Any, legal: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in legal:
        close = difflib.get_close_matches(str(value), legal, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise ExportError(f"{name}={value!r} is not one of {', '.join(map(repr, legal))}{meant}")


def check_path(path: Any, options: ExportOptions) -> Path:
    """Where the result goes: a file ``*.onnx``, or a folder for ``genai``.

    Raises:
        ExportError: the path cannot be written to, or is of the wrong kind.
    """
    try:
        target = Path(path)
    except TypeError:
        raise ExportError(f"path={path!r} is not a path") from None
    if "\0" in str(target):
        raise ExportError(f"path={str(path)!r} holds a null character")
    if options.target == "genai":
        if target.exists() and not target.is_dir():
            raise ExportError(
                f"path={str(path)!r} is a file; target='genai' writes a folder: give its name"
            )
    elif target.suffix != ".onnx" or target.is_dir():
        raise ExportError(
            f"path={str(path)!r} does not name a .onnx file; give for instance "
            f"{str(target / 'model.onnx')!r}"
        )
    parent = target.parent
    if not parent.is_dir():
        raise ExportError(f"path={str(path)!r}: the folder {str(parent)!r} does not exist; make it")
    if target.exists() and not options.overwrite:
        raise ExportError(
            f"path={str(path)!r} exists and overwrite=False; give another path, or overwrite=True"
        )
    return target
