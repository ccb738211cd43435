"""Capture: keep composite calls whole.

Works on Dynamo's graph (torch functions and methods) and on ``torch.export``'s (ATen
overloads) before either is traced to functional ATen. A composite call that tracing would
tear apart — scaled_dot_product_attention, linear, matmul, layer_norm, rms_norm — is
retargeted to a small function here that emits the dialect op, or the original call when
the arguments are outside the op's meaning (the later passes then see the decomposed form).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dspark_compile import ops as _dialect  # noqa: F401 - registers the ops named below
from dspark_compile._torch_compat import graph_module, is_subclass
from dspark_compile.diagnostics.report import GraphReport
from dspark_compile.passes import einsum, raise_flex, torch_layers

_ops = torch.ops.dspark
_SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether every tensor has the same floating dtype that the dialect takes, and is no wrapper
    subclass, whose own rules are to be traced."""
    present = [t for t in tensors if t is not None]
    return all(
        t.dtype == present[0].dtype and t.dtype in _SUPPORTED and not is_subclass(t)
        for t in present
    )


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as ``dspark::attention``.

    ``is_causal`` is torch's: key k is allowed to query q when ``k <= q``, whatever the
    number of keys.
    """
    same_rank = query.dim() == key.dim() == value.dim()
    fits = (
        same_rank
        and query.dim() in (3, 4)
        and dropout_p == 0.0
        and _plain(query, key, value)
        and (attn_mask is None or attn_mask.dim() <= query.dim())
    )
    if fits and query.dim() == 4:
        lead = query.shape[0] == key.shape[0] == value.shape[0]
        heads = key.shape[1] == value.shape[1] and (
            query.shape[1] == key.shape[1] or (enable_gqa and query.shape[1] % key.shape[1] == 0)
        )
        fits = lead and heads
    elif fits:
        fits = query.shape[0] == key.shape[0] == value.shape[0]
    if not fits:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    flat = query.dim() == 3
    if flat:
        # [B, M, D] is one head; a 3-d mask is [B, M, N].
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask.unsqueeze(0)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    out = _ops.attention(
        query,
        key,
        value,
        attn_mask,
        None,
        [],
        [],
        scale=float(scale),
        mask="k <= q" if is_causal else "",
    )
    return out.squeeze(1) if flat else out


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear`` as one node."""
    if weight.dim() != 2 or input.dim() < 1 or not _plain(input, weight, bias):
        return F.linear(input, weight, bias)
    return _ops.linear(input, weight, bias)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """Batched ``matmul`` (the kind attention is written with) as one node."""
    if input.dim() < 3 or other.dim() < 3 or not _plain(input, other):
        return torch.matmul(input, other)
    return _ops.matmul(input, other)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``layer_norm`` over the last dimension; ATen computes it in float32 throughout."""
    if len(normalized_shape) != 1 or input.dtype not in _SUPPORTED:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    return _ops.layer_norm(input, weight, bias, eps, 0.0, True)


def rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``rms_norm`` over the last dimension; the default eps is the input dtype's."""
    if len(normalized_shape) != 1 or input.dtype not in _SUPPORTED:
        return F.rms_norm(input, normalized_shape, weight, eps)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _ops.rms_norm(input, weight, eps, 0.0, True)


def cache_append_(cache: Tensor, new: Tensor, positions: Tensor) -> None:
    """An in-place append of user code, spelt so that functional tracing understands it."""
    cache.copy_(_ops.cache_append(cache, new, positions))


def cache_append_int8_(cache: Tensor, scale: Tensor, new: Tensor, positions: Tensor) -> None:
    """The same for an int8 cache."""
    data, scales = _ops.cache_append_int8(cache, scale, new, positions)
    cache.copy_(data)
    scale.copy_(scales)


_aten = torch.ops.aten
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: sdpa,
    torch._C._nn.scaled_dot_product_attention: sdpa,
    _aten.scaled_dot_product_attention.default: sdpa,
    F.linear: linear,
    torch._C._nn.linear: linear,
    _aten.linear.default: linear,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    operator.matmul: matmul,
    torch.bmm: matmul,
    _aten.matmul.default: matmul,
    _aten.bmm.default: matmul,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    _aten.layer_norm.default: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    _aten.rms_norm.default: rms_norm,
    _ops.cache_append_: cache_append_,
    _ops.cache_append_.default: cache_append_,
    _ops.cache_append_int8_: cache_append_int8_,
    _ops.cache_append_int8_.default: cache_append_int8_,
    **einsum.FUNCTIONS,
}
FUNCTIONS.update(torch_layers.layers(dict(FUNCTIONS)))
METHODS: dict[str, Callable[..., Any]] = {"matmul": matmul, "bmm": matmul, "__matmul__": matmul}


def capture(module: fx.GraphModule, report: GraphReport | None = None) -> fx.GraphModule:
    """A copy of ``module``'s graph with composite calls retargeted; weights are shared.

    Calls that stay as they are although they look like attention go to ``report``.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    for old, new in values.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for node in graph.nodes:
        if node.op == "call_function" and node.target in FUNCTIONS:
            node.target = FUNCTIONS[node.target]
        elif node.op == "call_method" and node.target in METHODS:
            node.op, node.target = "call_function", METHODS[node.target]
            rename = {"tensor": "other", "mat2": "other"}
            node.kwargs = {rename.get(k, k): v for k, v in node.kwargs.items()}
        if node.op == "call_function" and node.target is matmul:
            rename = {"mat2": "other"}
            node.kwargs = {rename.get(k, k): v for k, v in node.kwargs.items()}
    raise_flex.run(graph, module, report)
    captured = graph_module(module, graph)
    captured.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        captured._param_name_to_source = module._param_name_to_source
    return captured
