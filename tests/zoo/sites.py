"""How many attention, norm, RoPE, MLP and experts sites a model runs, counted in eager mode without
the compiler.

Norms, MLPs and modules of stacked experts are counted by forward hooks on modules, by class name;
attention by wrapping ``scaled_dot_product_attention`` and the modeling files' own
``eager_attention_forward``; RoPE by wrapping their ``apply_rotary…`` functions. Counting calls and
not modules counts shared layers as often as they run.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

KINDS = ("attention", "norm", "rope", "mlp", "experts")

_NORM = re.compile(r"Norm(Gated|1P|PerHead)?$")
_NOT_NORM = re.compile(r"GroupNorm|BatchNorm|SpatialNorm|WeightNorm|ScaleNorm")
_MLP = re.compile(r"(MLP|Mlp|FeedForward|FFN|DenseReluDense)\d*$")
_ROUTED = re.compile(r"Expert|Router|Gate$|MoE|Moe|TopK")
_ROPE = re.compile(r"^_?apply_.*(rotary|rope)", re.IGNORECASE)
_EXPERTS = re.compile(r"(?<!Parallel)Experts$")
_EXPERT_PATH = re.compile(r"(^|\.)experts(\.|$)")


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Within the block, calls of ``model`` in eager mode add to the counter, by kind. In compiled
    code, what runs between the graphs is counted."""
    counts: Counter[str] = Counter()
    hooks = []
    for path, module in model.named_modules():
        kind = _module_kind(path, module)
        if kind:
            hooks.append(module.register_forward_hook(_counter_hook(counts, kind)))
    with ExitStack() as stack:
        try:
            for patch in _patches(model, counts):
                stack.enter_context(patch)
            yield counts
        finally:
            for hook in hooks:
                hook.remove()
            if not counts["attention"]:
                counts["attention"] = counts["softmax"]
            del counts["softmax"]


def _counter_hook(counts: Counter[str], kind: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            counts[kind] += 1

    return hook


def _module_kind(path: str, module: nn.Module) -> str | None:
    name = type(module).__name__
    children = [type(child).__name__ for child in module.modules() if child is not module]
    if _NORM.search(name) and not _NOT_NORM.search(name):
        leaf = not any(_NORM.search(child) for child in children)
        return "norm" if leaf and not any("Attention" in child for child in children) else None
    if _EXPERTS.search(name):
        return "experts"
    if _EXPERT_PATH.search(path):
        return None
    if _MLP.search(name) or name == "MLP":
        inner = any(_MLP.search(child) for child in children)
        return None if inner or any(_ROUTED.search(child) for child in children) else "mlp"
    if any(_MLP.search(child) for child in children):
        return None
    direct = {child for child, _ in module.named_children()}
    if path.endswith(".ffn") and isinstance(module, nn.Sequential):
        return "mlp"
    if {"fc1", "fc2"} <= direct:  # decoder layers that hold their MLP inline
        return "mlp"
    if name.endswith("Intermediate"):  # BERT: the MLP is an Intermediate and an Output module
        return "mlp"
    return None


def _patches(model: nn.Module, counts: Counter[str]) -> Iterator[Any]:
    depth = {"attention": 0, "rope": 0}

    def outermost(kind: str, function: Any, amount: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            depth[kind] += 1
            try:
                result = function(*args, **kwargs)
            finally:
                depth[kind] -= 1
            if depth[kind] == 0:
                counts[kind] += amount(result)
            return result

        return wrapped

    def once(result: Any) -> int:
        return 1

    def tensors(result: Any) -> int:
        parts = result if isinstance(result, tuple) else (result,)
        return sum(isinstance(part, torch.Tensor) for part in parts)

    functional = torch.nn.functional
    sdpa = functional.scaled_dot_product_attention
    yield mock.patch.object(
        functional, "scaled_dot_product_attention", outermost("attention", sdpa, once)
    )

    softmax = torch.softmax

    def counted_softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and depth["attention"] == 0 and x.ndim >= 3:
            counts["softmax"] += 1
        dim = kwargs.pop("dim", args[0] if args else -1)
        dtype = kwargs.get("dtype")
        return softmax(x, dim, dtype=dtype)

    yield mock.patch.object(functional, "softmax", counted_softmax)
    yield mock.patch.object(torch, "softmax", counted_softmax)

    names = {type(module).__module__ for module in model.modules()}
    for name in sorted(names):
        if not name.startswith("transformers.models."):
            continue
        file = sys.modules[name]
        for attribute, value in list(vars(file).items()):
            if not callable(value) or isinstance(value, type):
                continue
            if attribute.endswith("eager_attention_forward"):
                yield mock.patch.object(file, attribute, outermost("attention", value, once))
            elif _ROPE.match(attribute):
                yield mock.patch.object(file, attribute, outermost("rope", value, tensors))
        for cls in [v for v in vars(file).values() if isinstance(v, type)]:
            for attribute, value in list(vars(cls).items()):
                if _ROPE.match(attribute) and isinstance(value, staticmethod):
                    wrapped = staticmethod(outermost("rope", value.__func__, tensors))
                    yield mock.patch.object(cls, attribute, wrapped)
