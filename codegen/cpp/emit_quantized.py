"""Source text of the kernels over quantised weights: ``kernels/cpp/linear_int.h`` instantiated.

As in `emit`, what decides the machine code is a constant of the text (bits, dtypes, rows, whether
rows are cut into groups), and sizes and pointers are arguments.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dspark_compile.codegen.cpp.emit import ACTIVATION, CPP_TYPE, SHORT, Source, source


@dataclass(frozen=True)
class Weights:
    """What decides a kernel besides the activation.

    Attributes:
        bits: 8 or 4.
        dtype: of the activations and biases.
        scale: of the scales.
        zero: of the zero points; None without any.
        rows: of the activations.
    """

    bits: int
    dtype: torch.dtype
    scale: torch.dtype
    zero: torch.dtype | None
    rows: int

    @property
    def name(self) -> str:
        zero = "" if self.zero is None else f"_{SHORT[self.zero]}zero"
        return f"int{self.bits}_{SHORT[self.dtype]}_{SHORT[self.scale]}{zero}_m{self.rows}"

    @property
    def arguments(self) -> str:
        """The first template arguments of every function in the header."""
        return f"Int{self.bits}, {CPP_TYPE[self.dtype]}, {self.rows}"

    @property
    def weight(self) -> str:
        zero = "Centred" if self.zero is None else CPP_TYPE[self.zero]
        return f"Quantized<{CPP_TYPE[self.scale]}, {zero}>"

    def make(self, label: str) -> str:
        """The construction of the weight whose parameters begin with ``label``."""
        return (
            f"const W {label}{{(const uint8_t*){label}_q, {label}_ld, "
            f"(decltype(W::scale)){label}_scale, (decltype(W::zero)){label}_zero}};"
        )


def _parameters(label: str) -> tuple[str, ...]:
    return f"p {label}_q", f"i {label}_ld", f"p {label}_scale", f"p {label}_zero"


def _flag(value: bool) -> str:
    return "true" if value else "false"


@functools.lru_cache(maxsize=1024)
def linear(weights: Weights, grouped: bool, activation: str = "identity") -> Source:
    """``act(x W^T + bias)``."""
    t = CPP_TYPE[weights.dtype]
    suffix = "" if activation == "identity" else f"_{activation}"
    name = f"linear_{weights.name}{'_grouped' if grouped else ''}{suffix}"
    run = f"""
using W = {weights.weight};
{weights.make("w")}
linear_int<{weights.arguments}, {_flag(grouped)}, {ACTIVATION[activation]}>(
    team, (const {t}*)x, ldx, w, (const {t}*)bias, ({t}*)y, N, K, G, memory);
"""
    parameters = ["p x", "i ldx", *_parameters("w"), "p bias", "p y", "i N", "i K", "i G"]
    about = f"y[M, N] = x[M, K] W[N, K]^T: {weights.name}, {activation}, groups: {grouped}"
    need = f"linear_int_bytes<{weights.arguments}, {_flag(grouped)}>(K, G, threads)"
    return source(name, about, "linear_int.h", parameters, run, need=need)


@functools.lru_cache(maxsize=1024)
def gated_mlp(weights: Weights, grouped: bool, down_grouped: bool, activation: str) -> Source:
    """``(act(x G^T + bg) * (x U^T + bu)) D^T + bd``."""
    t = CPP_TYPE[weights.dtype]
    groups = f"{'_grouped' if grouped else ''}{'_downgrouped' if down_grouped else ''}"
    name = f"gated_mlp_{weights.name}{groups}_{activation}"
    flags = f"{_flag(grouped)}, {_flag(down_grouped)}"
    run = f"""
using W = {weights.weight};
{weights.make("gate")}
{weights.make("up")}
{weights.make("down")}
gated_mlp_int<{weights.arguments}, {flags}, {ACTIVATION[activation]}>(
    team, (const {t}*)x, ldx, gate, up, down, (const {t}*)gate_bias, (const {t}*)up_bias,
    (const {t}*)down_bias, ({t}*)y, N, I, K, G, H, memory);
"""
    parameters = [
        *("p x", "i ldx", *_parameters("gate"), *_parameters("up"), *_parameters("down")),
        *("p gate_bias", "p up_bias", "p down_bias", "p y"),
        *("i N", "i I", "i K", "i G", "i H"),
    ]
    about = f"A gated feed-forward block: {weights.name}, {activation}"
    need = f"gated_mlp_int_bytes<{weights.arguments}, {flags}>(K, I, G, H, threads)"
    return source(name, about, "linear_int.h", parameters, run, need=need)
