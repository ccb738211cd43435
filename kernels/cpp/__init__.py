"""C++ kernels with their launchers, as opaque ops in the namespace ``dspark_cpu``.

Every op has the schema of the dialect op of the same name, so that lowering is a change of
target. `supports` says whether, and if not why not; where it says yes, the kernel has been built:

    reason = supports("linear", x, weight)      # None, or "17 rows, more than 16"

It takes the op's own arguments, real or fake. The templates are the headers in this folder;
`dspark_compile.codegen.cpp` instantiates, compiles and loads them.

    ==============================  =====================================================
    ``linear`` ``merged_linear``    `linear`
    ``mlp`` ``gated_mlp``           `linear`; ``gated_mlp_merged`` too
    ``matmul``                      `batched`
    ``linear_int8`` ``linear_int4`` `quantized`; ``gated_mlp_int8``, ``gated_mlp_int4`` too
    ``moe_router`` ``moe_experts``  `moe`
    ``grouped_linear``              `grouped`
    ``moe_experts_int8``            `moe_quantized`; ``moe_experts_int4`` too
    ``rms_norm`` ``layer_norm``     `norm`; with ``add_`` in front, behind a residual
    ``rope``                        `rope`
    ``cache_append_``               `cache`; ``cache_append_int8_`` too
    ``qk_norm_rope_append_``        `cache`; ``qk_norm_rope_append_int8_`` too
    ``attention``                   `attention`; ``attention_int8``, ``mla_attention`` too
    ==============================  =====================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from dspark_compile.ops import OPS as DIALECT

__all__ = ["OPS", "overload", "supports"]

# Op name -> module of this package that has a launcher of that name and ``supports_<name>``.
OPS: dict[str, str] = {
    "linear": "linear",
    "merged_linear": "linear",
    "mlp": "linear",
    "gated_mlp": "linear",
    "gated_mlp_merged": "linear",
    "matmul": "batched",
    "linear_int8": "quantized",
    "linear_int4": "quantized",
    "gated_mlp_int8": "quantized",
    "gated_mlp_int4": "quantized",
    "moe_router": "moe",
    "moe_experts": "moe",
    "grouped_linear": "grouped",
    "moe_experts_int8": "moe_quantized",
    "moe_experts_int4": "moe_quantized",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "layer_norm": "norm",
    "add_layer_norm": "norm",
    "rope": "rope",
    "cache_append_": "cache",
    "cache_append_int8_": "cache",
    "qk_norm_rope_append_": "cache",
    "qk_norm_rope_append_int8_": "cache",
    "attention": "attention",
    "attention_int8": "attention",
    "mla_attention": "attention",
}

_LIBRARY = torch.library.Library("dspark_cpu", "FRAGMENT")


def overload(name: str) -> torch._ops.OpOverload:
    """``torch.ops.dspark_cpu.<name>.default``."""
    return getattr(torch.ops.dspark_cpu, name).default


def supports(name: str, *args: Any, **kwargs: Any) -> str | None:
    """Why ``dspark_cpu::<name>`` cannot take these arguments; None if it can."""
    if name not in OPS:
        return f"no C++ kernel for {name}"
    return _function(name, "supports_")(*args, **kwargs)


def _function(name: str, prefix: str = "") -> Any:
    module = import_module(f"dspark_compile.kernels.cpp.{OPS[name]}")
    return getattr(module, prefix + name)


def _define(name: str) -> None:
    _LIBRARY.define(DIALECT[name].schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, lambda *args, **kwargs: _function(name)(*args, **kwargs), "CPU")
    torch.library.register_fake(
        f"dspark_cpu::{name}",
        lambda *args, **kwargs: DIALECT[name].overload(*args, **kwargs),
        lib=_LIBRARY,
    )


for _name in OPS:
    _define(_name)
