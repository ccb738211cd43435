"""Attention of many query rows: torch's flash kernel over blocks of rows, each with its own keys.

``scaled_dot_product_attention`` takes a mask tensor over all rows and all keys of the cache, and
multiplies what it then throws away: half of a prompt's scores, and every row of a static cache that
is not filled yet. The bounds of a proved mask are known when the call comes: rows are taken in
blocks of 256, and each block reads the keys from the first to the last that one of its rows may
attend to.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_compile.codegen.triton import predicate as analysis
from dspark_compile.ops.predicate import evaluate, number, parse

BLOCK_ROWS = 256


class _Shift(ast.NodeTransformer):
    """q and k counted from the first row and key of a block, which are two integers more."""

    def __init__(self, q: str, k: str):
        self.names = {"q": q, "k": k}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.names:
            return node
        return ast.BinOp(ast.Name(node.id), ast.Add(), ast.Name(self.names[node.id]))


@functools.lru_cache(maxsize=1024)
def _bounds(mask: str) -> tuple[ast.expr | None, ast.expr | None]:
    """Expressions of the first key that ``mask`` may allow a row and of the one behind the last."""
    tree = analysis._fold(parse(mask)) if mask else ast.Constant(True)
    if isinstance(tree, ast.Constant):
        return None, None
    bounds = analysis._bounds(tree)
    return bounds.lower, bounds.upper


@functools.lru_cache(maxsize=1024)
def _shifted(mask: str, ints: int) -> str:
    return ast.unparse(_Shift(f"n{ints}", f"n{ints + 1}").visit(ast.parse(mask, mode="eval").body))


def refusal(
    rows: int, mask: str, softcap: float, mask_value: float | None, sinks: Tensor | None
) -> str | None:
    """Why `attention_prefill` is not for such a site; None if it is."""
    if softcap > 0 or sinks is not None or mask_value is not None:
        return f"{rows} query rows with a soft-cap, sinks or an added mask value"
    if mask == "k <= q" or _bounds(mask) == (None, None):
        return f"{rows} query rows, whose mask ATen handles or does not bound the keys"
    return None


def _edges(
    bound: ast.expr | None,
    default: int,
    tensors: Sequence[Tensor],
    ints: Sequence[int],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor:
    """A bound of each row, ``[..., M]`` int64."""
    if bound is None:
        return torch.full((shape[2],), default)
    value = number(bound, tensors, ints, shape, device)
    if not isinstance(value, Tensor):
        return torch.full((shape[2],), int(value))
    value = value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
    return value.expand(*value.shape[:2], shape[2], value.shape[3]).movedim(2, -1).flatten(0, -2)


def attention_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask_tensors: Sequence[Tensor],
    mask_ints: Sequence[int],
    *,
    scale: float,
    mask: str,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """``softmax(mask(scale * q @ k^T + bias)) @ v``: query ``[B, Hq, M, D]``, key and value
    ``[B, Hkv, N, D]``, or int8 with scales ``[B, Hkv, N]``; ``[B, Hq, M, DV]``, whose memory is
    ``[B, M, Hq, DV]``. A row that may attend to no key gives 0."""
    batch, heads, rows, _ = query.shape
    keys, shape = key.shape[2], (batch, heads, rows, key.shape[2])
    first, last = (
        _edges(bound, default, mask_tensors, mask_ints, shape, query.device)
        for bound, default in zip(_bounds(mask), (0, keys), strict=True)
    )
    lower = first.reshape(-1, rows).amin(0).clamp(0, keys).tolist()
    upper = last.reshape(-1, rows).amax(0).clamp(0, keys).tolist()
    if key_scale is not None and value_scale is not None:
        end = max(upper)
        key, value = (
            x[:, :, :end].to(query.dtype) * s[:, :, :end].to(query.dtype).unsqueeze(-1)
            for x, s in ((key, key_scale), (value, value_scale))
        )
    out = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
    text = _shifted(mask, len(mask_ints))
    for at in range(0, rows, BLOCK_ROWS):
        stop = min(rows, at + BLOCK_ROWS)
        low, high = min(lower[at:stop]), max(upper[at:stop])
        if low >= high:
            out[:, :, at:stop] = 0
            continue
        part = (batch, heads, stop - at, high - low)
        allowed = evaluate(text, mask_tensors, [*mask_ints, at, low], part, query.device)
        blocked: Tensor = allowed
        if bias is not None:
            own = bias.expand(batch, heads, rows, keys)[:, :, at:stop, low:high]
            blocked = (
                allowed & own if own.dtype == torch.bool else own.masked_fill(~allowed, -torch.inf)
            )
        if blocked.dtype not in (torch.bool, query.dtype):
            blocked = blocked.to(query.dtype)
        out[:, :, at:stop] = F.scaled_dot_product_attention(
            query[:, :, at:stop], key[:, :, low:high], value[:, :, low:high],
            blocked.expand(-1, -1, stop - at, high - low), scale=scale,
            enable_gqa=heads != key.shape[1],
        )  # fmt: skip
    return out
