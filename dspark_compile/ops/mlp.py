"""Feed-forward blocks.

    gated_mlp:  down(act(gate(x)) * up(x))
    mlp:        down(act(up(x)))

Weights are ``[out, in]``. `ACTIVATIONS` names the activations both take. With
``compute_fp32`` what lies between the products is computed in float32 and cast back once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _out(x: Tensor, down: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], down.shape[0]))


@define(
    "gated_mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? down_bias, str activation, bool compute_fp32=False) -> Tensor",
    family="mlp",
    fake=lambda x, gate, up, down, gate_bias, up_bias, down_bias, activation, compute_fp32=False: (
        _out(x, down)
    ),
)
def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``: ``x [..., K]``, gate and up ``[I, K]``, down ``[N, I]``."""
    gated, other = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
    if compute_fp32:
        gated, other = gated.float(), other.float()
    hidden = _activation(activation)(gated) * other
    return F.linear(hidden.to(x.dtype), down, down_bias).contiguous()


@define(
    "gated_mlp_merged(Tensor x, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, bool compute_fp32=False) -> Tensor",
    family="mlp",
    fake=lambda x, gate_up, down, gate_up_bias, down_bias, activation, compute_fp32=False: _out(
        x, down
    ),
)
def gated_mlp_merged(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """`gated_mlp` with the gate's rows above the up's in one ``gate_up [2 I, K]``."""
    both = F.linear(x, gate_up, gate_up_bias)
    gate, up = (both.float() if compute_fp32 else both).chunk(2, dim=-1)
    hidden = _activation(activation)(gate) * up
    return F.linear(hidden.to(x.dtype), down, down_bias).contiguous()


@define(
    "mlp(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "str activation, bool compute_fp32=False) -> Tensor",
    family="mlp",
    fake=lambda x, up, down, up_bias, down_bias, activation, compute_fp32=False: _out(x, down),
)
def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> Tensor:
    """``down(act(up(x)))`` for ``x [..., K]``, up ``[I, K]``, down ``[N, I]``."""
    hidden = F.linear(x, up, up_bias)
    hidden = _activation(activation)(hidden.float() if compute_fp32 else hidden)
    return F.linear(hidden.to(x.dtype), down, down_bias).contiguous()
