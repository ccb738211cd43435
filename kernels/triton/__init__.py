"""Triton kernels with their launchers, as opaque ops in the namespace ``dspark_triton``.

Every op has the schema of the dialect op of the same name, so that lowering is a change of
target. `supports` says whether, and if not why not:

    reason = supports("rms_norm", x, weight, 1e-6)      # None, or "weight is [8, 128]"

It takes the op's own arguments, real or fake. Importing this package needs torch but not
Triton; a kernel's module, and Triton with it, load at the first call.

    ================================  ===================================================
    ``rms_norm`` ``layer_norm``       `norm`; with ``add_`` in front, behind a residual
    ``rope``                          `rope`
    ``linear`` ``merged_linear``      `linear`: at most 16 rows
    ``gated_mlp`` ``mlp``             `mlp`, and ``gated_mlp_merged``: at most 16 rows
    ``moe_experts`` ``moe_router``    `moe`, `router`: any number of tokens
    ``grouped_linear``                `grouped`: any number of rows
    ``cache_append_``                 `cache`, and ``cache_append_int8_``
    ``qk_norm_rope_append_``          `qk_norm_rope_append`, and ``…_int8_``: in place
    ``attention``                     `attention`, and ``attention_int8``
    ================================  ===================================================
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from typing import Any

import torch

from dspark_compile.ops import OPS as DIALECT

__all__ = ["OPS", "available", "overload", "supports"]

# Op name -> module of this package that has a launcher of that name and ``supports_<name>``.
OPS: dict[str, str] = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "layer_norm": "norm",
    "add_layer_norm": "norm",
    "rope": "rope",
    "linear": "linear",
    "merged_linear": "linear",
    "gated_mlp": "mlp",
    "gated_mlp_merged": "mlp",
    "mlp": "mlp",
    "moe_experts": "moe",
    "moe_router": "router",
    "grouped_linear": "grouped",
    "cache_append_": "cache",
    "cache_append_int8_": "cache",
    "qk_norm_rope_append_": "qk_norm_rope_append",
    "qk_norm_rope_append_int8_": "qk_norm_rope_append",
    "attention": "attention",
    "attention_int8": "attention",
}

_LIBRARY = torch.library.Library("dspark_triton", "FRAGMENT")


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def overload(name: str) -> torch._ops.OpOverload:
    """``torch.ops.dspark_triton.<name>.default``."""
    return getattr(torch.ops.dspark_triton, name).default


def supports(name: str, *args: Any, **kwargs: Any) -> str | None:
    """Why ``dspark_triton::<name>`` cannot take these arguments; None if it can."""
    if name not in OPS:
        return f"no Triton kernel for {name}"
    if not available():
        return "Triton is not installed"
    return _function(name, "supports_")(*args, **kwargs)


def _function(name: str, prefix: str = "") -> Any:
    module = import_module(f"dspark_compile.kernels.triton.{OPS[name]}")
    return getattr(module, prefix + name)


def _schema(name: str) -> str:
    """The dialect's schema; the fused append, functional there, is made in place."""
    if name in DIALECT:
        return DIALECT[name].schema
    schema = DIALECT[name.removesuffix("_")].schema
    arguments = schema.split("(", 1)[1].rsplit(") ->", 1)[0]
    for letter, cache in zip("abcd", ("key_cache", "key_scale", "value_cache", "value_scale")):
        arguments = arguments.replace(f"Tensor {cache},", f"Tensor({letter}!) {cache},")
    return f"{name}({arguments}) -> Tensor"


def _fake(name: str) -> Any:
    if name in DIALECT:
        return lambda *args, **kwargs: DIALECT[name].overload(*args, **kwargs)
    return lambda query, *args, **kwargs: query.new_empty(query.shape)


def _define(name: str) -> None:
    _LIBRARY.define(_schema(name), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(
        name,
        lambda *args, **kwargs: _function(name)(*args, **kwargs),
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake(f"dspark_triton::{name}", _fake(name), lib=_LIBRARY)


for _name in OPS:
    _define(_name)
