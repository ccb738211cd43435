"""Sampling in user code as stages of a native program (``kernels/cpp/token.h``).

    softmax over the last dimension, topk          a stage each
    multinomial(p, 1)                              a draw: one uniform number a row
    argmax(p / exponential noise), p a softmax     the same draw: with E_i ~ Exp(1) independent,
                                                   argmax p_i / E_i is i with probability
                                                   p_i / sum p (the exponential race)

The uniform numbers come from torch's generator before a call (`Program.random`), so that a seed
reproduces them. They are not the numbers that eager code draws; the distribution is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp import emit
from dspark_compile.kernels.cpp._launch import FLOATS, Call
from dspark_compile.passes.graph import aten

_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}
_EXPONENTIALS = (aten.exponential.default, aten.exponential_.default)
_EMPTY = (aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default,
          aten.empty_strided.default, aten.empty_permuted.default)  # fmt: skip
_SEEN_THROUGH = (
    aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.select.int,
    aten.squeeze.dim, aten.unsqueeze.default, aten._to_copy.default, aten.alias.default,
)  # fmt: skip
STAGES = (aten._softmax.default, aten.topk.default, aten.multinomial.default)


def race(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(weights, noise, quotient) of ``argmax(weights / noise)`` over the last dimension, where
    nothing else reads noise or quotient and weights are a softmax, none negative; None if ``node``
    is no such race."""
    if node.target is not aten.argmax.default or not isinstance(node.args[0], fx.Node):
        return None
    quotient = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dimensions = quotient.meta["val"].dim()
    if axis is None or axis % dimensions != dimensions - 1:  # type: ignore[operator]
        return None
    if quotient.target is not aten.div.Tensor or len(quotient.users) != 1:
        return None
    weights, noise = quotient.args[:2]
    if not isinstance(noise, fx.Node) or noise.target not in _EXPONENTIALS:
        return None
    if len(noise.users) != 1 or not isinstance(weights, fx.Node) or not _softmaxed(weights):
        return None
    if weights.meta["val"].shape != noise.meta["val"].shape or noise.kwargs.get("generator"):
        return None
    return weights, noise, quotient


def _softmaxed(node: Any) -> bool:
    """Whether ``node`` is a softmax, seen through views and casts."""
    while isinstance(node, fx.Node) and node.target in _SEEN_THROUGH:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target is aten._softmax.default


def part_of_race(node: fx.Node) -> bool:
    """Whether ``node`` is the memory, the noise or the quotient of a `race`."""
    if node.target in _EMPTY:
        return bool(node.users) and all(
            u.target in _EXPONENTIALS and part_of_race(u) for u in node.users
        )
    if node.target in _EXPONENTIALS:
        return len(node.users) == 1 and part_of_race(next(iter(node.users)))
    if node.target is aten.div.Tensor and len(node.users) == 1:
        found = race(next(iter(node.users)))
        return found is not None and found[2] is node
    return False


def reason(node: fx.Node) -> str | None:
    """Why a node of `STAGES`, or the end of a `race`, is no stage; None if it is one."""
    found = race(node)
    x = found[0] if found else node.args[0]
    value = x.meta["val"]  # type: ignore[union-attr]
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        return f"{node.target} of {value.dtype}"
    if value.dim() < 1 or not all(isinstance(n, int) for n in value.shape) or not value.numel():
        return f"{node.target} of a dynamic size, {list(value.shape)}"
    if found:
        return None
    if node.target is aten.multinomial.default:
        count = node.args[1] if len(node.args) > 1 else node.kwargs.get("num_samples")
        if count != 1 or node.kwargs.get("generator") is not None:
            return "multinomial of several tokens, or with a generator"
        return None
    if node.target is aten._softmax.default:
        if node.args[1] % value.dim() != value.dim() - 1:  # type: ignore[operator]
            return "a softmax over another than the last dimension"
        out = node.meta["val"].dtype
        return None if out in FLOATS else f"a softmax into {out}"
    k, axis, largest, _ = _topk_arguments(node)
    if axis % value.dim() != value.dim() - 1 or not largest or not isinstance(k, int):
        return "a topk that is not of the largest over the last dimension"
    return None if 0 < k <= value.shape[-1] else f"a topk of {k}"


def _topk_arguments(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    given = dict(zip(("k", "dim", "largest", "sorted"), node.args[1:], strict=False))
    given |= node.kwargs
    defaults = {"k": 0, "dim": -1, "largest": True, "sorted": True}
    return tuple((defaults | given).values())  # type: ignore[return-value]


def _each_row(name: str, about: str, parameters: list[str], body: str, before: str = "") -> Any:
    run = (
        "for (int64_t r = team.thread; r < rows; r += team.threads) {\n"
        + "\n".join(f"  {line}" for line in body.splitlines())
        + "\n}"
    )
    return emit.source(name, about, "token.h", parameters, run, before=before)


def softmax(x: Tensor, dtype: torch.dtype) -> tuple[Call, Tensor]:
    """The call and its result, of contiguous ``x [..., V]``."""
    out = torch.empty_like(x, dtype=dtype)
    kind, made, size = _TYPES[x.dtype], _TYPES[dtype], x.shape[-1]
    body = (
        f"static thread_local std::vector<float> z;\nz.resize(size_t(V));\n"
        f"softmax_row((const {kind}*)x + r * V, ({made}*)y + r * V, V, z.data());"
    )
    source = _each_row(
        f"softmax_{kind}_{made}", "Softmax of rows.", ["p x", "p y", "i rows", "i V"], body
    )
    return Call(source, (x, out, x.numel() // size, size), x.nbytes, (out,)), out


def topk(x: Tensor, k: int) -> tuple[Call, tuple[Tensor, Tensor]]:
    """The call, and values and indices ``[..., k]``, of contiguous ``x [..., V]``."""
    values = x.new_empty((*x.shape[:-1], k))
    indices = values.new_empty(values.shape, dtype=torch.int64)
    kind, size = _TYPES[x.dtype], x.shape[-1]
    body = (
        f"top_row((const {kind}*)x + r * V, V, k, ({kind}*)values + r * k,"
        " (int64_t*)indices + r * k);"
    )
    source = _each_row(
        f"topk_{kind}", "The largest of rows.",
        ["p x", "p values", "p indices", "i rows", "i V", "i k"], body,
    )  # fmt: skip
    call = Call(
        source, (x, values, indices, x.numel() // size, size, k), x.nbytes, (values, indices)
    )
    return call, (values, indices)


def draw(weights: Tensor, uniform: Tensor, shape: Any, race: bool = False) -> tuple[Call, Tensor]:
    """The call and int64 tokens of ``shape``, of contiguous weights ``[..., V]`` and as many
    uniform numbers as there are rows. What are no weights is an error, but in a ``race``."""
    out = weights.new_empty(shape, dtype=torch.int64)
    kind, size = _TYPES[weights.dtype], weights.shape[-1]
    name = "race" if race else "draw"
    body = (
        f"const int64_t token = {name}_row((const {kind}*)p + r * V, V, ((const float*)u)[r]);\n"
        "if (token < 0) return 4;\n((int64_t*)y)[r] = token;"
    )
    source = _each_row(
        f"{name}_{kind}", "A token of each row of weights.",
        ["p p", "p u", "p y", "i rows", "i V"], body,
    )  # fmt: skip
    return Call(
        source, (weights, uniform, out, weights.numel() // size, size), weights.nbytes, (out,)
    ), out
