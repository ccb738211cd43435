"""Trace: from a captured graph to functional ATen with dialect ops kept whole.

The result has one placeholder for each input, in order, no mutation except ``copy_`` of a
final value into an input, and on every node the fake value, the user's source line and
the module it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from dspark_compile._torch_compat import (
    fake_inputs,
    functionalize_by_mode,
    ignore_fresh_symbols,
)


def trace(module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Any]:
    """``(functional graph module, fake mode)`` of ``module`` on ``inputs``.

    Raises whatever tracing raises; the caller falls back.
    """
    fakes, mode = fake_inputs(inputs)

    def run(*args: Any) -> Any:
        return fx.Interpreter(module).run(*args)

    ways = [torch.func.functionalize(run, remove="mutations"), functionalize_by_mode(run)]
    if _has_inner_transforms(module):
        del ways[0]
    with (
        torch.no_grad(),
        mode,
        ignore_fresh_symbols(mode),
        fx_traceback.preserve_node_meta(),
    ):
        try:
            traced = make_fx(ways[0])(*fakes)
        except RuntimeError as error:
            # Some in-place ops take no symbolic sizes there: ``torch.full((n, n), x).triu_()``.
            if len(ways) == 1 or "concrete integers" not in str(error):
                raise
            traced = make_fx(ways[1])(*fakes)

    old = [n for n in module.graph.nodes if n.op == "placeholder"]
    new = [n for n in traced.graph.nodes if n.op == "placeholder"]
    for source, node, fake in zip(old, new, fakes, strict=True):
        for key in ("tensor_dict", "grapharg", "dspark_bits"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        if hasattr(source, "_dynamo_source"):
            node._dynamo_source = source._dynamo_source
        node.meta.setdefault("val", fake)
        node.meta["dspark_name"] = source.name
    traced.meta.update(module.meta)
    # Tells AOTAutograd which placeholders are parameters at a fixed address.
    tensors = [*traced.named_parameters(), *traced.named_buffers()]
    if hasattr(module, "_param_name_to_source") and not tensors:
        traced._param_name_to_source = module._param_name_to_source
    return traced, mode


def _has_inner_transforms(module: fx.GraphModule) -> bool:
    """Whether the graph holds ``vmap`` or higher-order calls, which ``torch.func`` cannot
    functionalise from outside."""
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or "vmap_increment" in getattr(node.target, "__name__", "")
        for node in module.graph.nodes
    )
