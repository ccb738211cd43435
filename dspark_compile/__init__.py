"""dspark: a ``torch.compile`` back end for language-model decoding.

``torch.compile(model, backend="dspark")`` needs no import of this package; the names here are for
looking at what it did and for driving it. They load on first use, so that ``import
dspark_compile`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dspark_compile._version import __version__

if TYPE_CHECKING:
    from dspark_compile.diagnostics import CompileReport, last_report
    from dspark_compile.diagnostics.explain import explain
    from dspark_compile.export import export_onnx
    from dspark_compile.models.draft import DraftModel
    from dspark_compile.options import Options
    from dspark_compile.runtime import decompress_cache, reset_cache
    from dspark_compile.runtime.cache import CompressedCache
    from dspark_compile.runtime.decode_cache import DecodeCache
    from dspark_compile.runtime.generate import generate, last_generation

_EXPORTS = {
    "explain": "dspark_compile.diagnostics.explain",
    "export_onnx": "dspark_compile.export",
    "last_report": "dspark_compile.diagnostics",
    "CompileReport": "dspark_compile.diagnostics",
    "Options": "dspark_compile.options",
    "CompressedCache": "dspark_compile.runtime.cache",
    "decompress_cache": "dspark_compile.runtime",
    "reset_cache": "dspark_compile.runtime",
    "DecodeCache": "dspark_compile.runtime.decode_cache",
    "DraftModel": "dspark_compile.models.draft",
    "generate": "dspark_compile.runtime.generate",
    "last_generation": "dspark_compile.runtime.generate",
}

__all__ = [
    "CompileReport",
    "CompressedCache",
    "DecodeCache",
    "DraftModel",
    "Options",
    "__version__",
    "decompress_cache",
    "explain",
    "export_onnx",
    "generate",
    "last_generation",
    "last_report",
    "reset_cache",
]


def __getattr__(name: str) -> Any:
    """Load an exported name on first use (PEP 562).

    Raises:
        AttributeError: ``name`` is not exported.
    """
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
