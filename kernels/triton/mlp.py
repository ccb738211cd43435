"""Feed-forward blocks of at most 16 rows: two products of `linear`, the first with the activation.

    gated_mlp:  hidden = act(gate(x)) * up(x), both weights read in one pass;  down(hidden)
    mlp:        hidden = act(up(x));                                           down(hidden)

The intermediate ``[..., I]`` is written and read once, in x's dtype. Reference:
`dspark_compile.ops.mlp`.
"""

from __future__ import annotations

from torch import Tensor

from dspark_compile.kernels.triton.linear import plan, reason
from dspark_compile.ops.mlp import ACTIVATIONS


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
    (hidden,) = plan(
        x, gate, gate_bias,
        up=up, up_bias=up_bias, activation=activation, compute_fp32=compute_fp32,
    ).run()  # fmt: skip
    return plan(hidden, down, down_bias).run()[0]


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
    gate, up = gate_up.chunk(2)
    gate_bias, up_bias = (None, None) if gate_up_bias is None else gate_up_bias.chunk(2)
    return gated_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, activation, compute_fp32)


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
    (hidden,) = plan(x, up, up_bias, activation=activation, compute_fp32=compute_fp32).run()
    return plan(hidden, down, down_bias).run()[0]


def _activation_reason(name: str) -> str | None:
    return None if name in ACTIVATIONS else f"activation {name!r} is unknown"


def supports_gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    return _activation_reason(activation) or reason(
        x, gate=gate, up=up, down=down,
        gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias,
    )  # fmt: skip


def supports_gated_mlp_merged(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    return _activation_reason(activation) or reason(
        x, gate_up=gate_up, down=down, gate_up_bias=gate_up_bias, down_bias=down_bias
    )


def supports_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    compute_fp32: bool = False,
) -> str | None:
    return _activation_reason(activation) or reason(
        x, up=up, down=down, up_bias=up_bias, down_bias=down_bias
    )
