"""The dialect: canonical ``dspark::`` ops, one file per family.

Importing this package registers every op. ``OPS`` maps names to their `OpSpec`.
"""

from . import (
    attention,
    cache,
    expert_loop,
    linear,
    mlp,
    moe,
    moe_quantized,
    norm,
    quantized,
    rope,
    token,
)
from ._define import OPS, OpSpec, is_dialect

__all__ = [
    "OPS",
    "OpSpec",
    "attention",
    "cache",
    "expert_loop",
    "is_dialect",
    "linear",
    "mlp",
    "moe",
    "moe_quantized",
    "norm",
    "quantized",
    "rope",
    "token",
]
