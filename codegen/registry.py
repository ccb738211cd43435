"""Which implementations each dialect op has, and which one a site gets.

An `Implementation` says what it supports by device, dtype and shape (a reason when not)
and how the node is changed. Lowering asks them in order of preference and takes the
first that fits; a preferred one that did not fit is reported with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dspark_compile.codegen.aten import FORMS
from dspark_compile.ops import OPS


@dataclass(frozen=True)
class Implementation:
    """One way to run one dialect op.

    Attributes:
        name: ``aten``, ``triton``, ``cpp``, ``reference`` …
        op: the dialect op's name.
        supports: None if the site fits, else the reason why not; gets the node.
        target: what the node calls under this implementation; None leaves the op in the
            graph (the inner compiler decomposes it, or its own kernel runs).
    """

    name: str
    op: str
    supports: Callable[[fx.Node], str | None]
    target: Callable[..., Any] | None


def _always(node: fx.Node) -> str | None:
    return None


def _triton(op: str) -> Implementation | None:
    try:
        from dspark_compile.kernels.triton import registry as triton_registry
    except ImportError:
        return None
    entry = triton_registry.find(op)
    if entry is None:
        return None
    return Implementation("triton", op, entry.supports, entry.target)


def _cpp(op: str) -> Implementation | None:
    from dspark_compile.kernels.cpp import registry as cpp_registry

    entry = cpp_registry.find(op)
    return None if entry is None else Implementation("cpp", op, entry.supports, entry.target)


# What a step of few rows spends its time on: the C++ kernels are made for these.
_READ_BOUND = frozenset(
    {
        "linear", "merged_linear", "mlp", "gated_mlp", "gated_mlp_merged", "linear_int8",
        "linear_int4", "gated_mlp_int8", "gated_mlp_int4", "attention", "attention_int8",
        "mla_attention", "moe_router", "moe_experts", "moe_experts_int8", "moe_experts_int4",
        "grouped_linear",
    }
)  # fmt: skip


def _vector_cpu() -> bool:
    """Whether the C++ kernels are written for this CPU: elsewhere ATen's may be better."""
    from dspark_compile.codegen.cpp import isa

    try:
        return isa.detect() != "portable"
    except ValueError:
        return False


def implementations(
    op: str, kernels: str, device: torch.device, direct: bool = False
) -> list[Implementation]:
    """Candidates for ``op`` in order of preference under ``Options(kernels=...)``; with ``direct``
    no inner compiler would fuse an ATen form."""
    aten = Implementation("aten", op, _always, FORMS[op]) if op in FORMS else None
    reference = Implementation("reference", op, _always, OPS[op].reference)
    triton = None
    if kernels == "triton" or (kernels == "auto" and device.type == "cuda"):
        triton = _triton(op)
    cpp = None
    if device.type == "cpu" and (kernels == "cpp" or (kernels == "auto" and _vector_cpu())):
        cpp = _cpp(op)
    if kernels == "reference":
        return [reference]
    order = (triton, cpp, aten, reference)
    if kernels == "auto" and op not in _READ_BOUND and not direct:
        # Between products of many rows the inner compiler fuses what a kernel would do alone.
        order = (triton, aten, cpp, reference)
    return [item for item in order if item is not None]
