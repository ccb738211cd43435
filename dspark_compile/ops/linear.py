"""Matrix products: linear, merged linears that share an input, and the opaque matmul.

``linear`` and ``matmul`` exist so that capture keeps a product as one node; what no pass
consumed is lowered back to ATen unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define


@define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    family="linear",
    fake=lambda x, weight, bias=None: x.new_empty(
        (*x.shape[:-1], *weight.shape[:-1]), dtype=torch.result_type(x, weight)
    ),
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., K] @ weight[N, K]^T + bias[N]``."""
    return F.linear(x, weight, bias).contiguous()


@define(
    "merged_linear(Tensor x, Tensor weight, Tensor? bias, SymInt[] sizes) -> Tensor[]",
    family="linear",
    fake=lambda x, weight, bias, sizes: [x.new_empty((*x.shape[:-1], n)) for n in sizes],
)
def merged_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Tensor]:
    """Several linears on one input as one product.

    ``weight [sum(sizes), K]`` is the stacked weights, ``bias`` the stacked biases; the
    result has one contiguous ``[..., n]`` tensor for each ``n`` of ``sizes``.
    """
    return [part.contiguous() for part in F.linear(x, weight, bias).split(list(sizes), dim=-1)]


@define(
    "matmul(Tensor a, Tensor b) -> Tensor",
    family="linear",
    fake=lambda a, b: torch.matmul(a, b).contiguous(),
)
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul``, kept whole."""
    return torch.matmul(a, b).contiguous()
