"""Source text of routers and experts: ``kernels/cpp/moe_router.h`` and ``moe.h`` instantiated.

As in `emit`, what decides the machine code is a constant of the text (dtypes, activation with its
bounds, how weights lie), and sizes and pointers are arguments.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark_compile.codegen.cpp import emit_quantized
from dspark_compile.codegen.cpp.emit import ACTIVATION, CPP_TYPE, SHORT, Source, source
from dspark_compile.ops.formula import fold, is_formula
from dspark_compile.ops.moe import PLAIN_LIMITS

_CPP = {**CPP_TYPE, torch.int64: "int64_t", torch.int32: "int32_t"}
_SHORT = {**SHORT, torch.int64: "i64", torch.int32: "i32"}


@dataclass(frozen=True)
class Experts:
    """What decides an experts kernel.

    Attributes:
        dtype: of x, weights and the result.
        index, share: of the indices and of their weights.
        rows: of a pass over the weights, 1, 2, 4, 8 or 16.
        gated: whether there is a gate.
        turned_up, turned_down: whether weights lie ``[in, out]``.
        weigh_input: whether weights multiply the input.
        norm: of the norm's weight behind the experts; None without one.
        activation, limits: see `ops.moe.gate_and_up`.
    """

    dtype: torch.dtype
    index: torch.dtype
    share: torch.dtype
    rows: int
    gated: bool
    turned_up: bool
    turned_down: bool
    weigh_input: bool
    norm: torch.dtype | None
    activation: str
    limits: tuple[float, ...]

    @property
    def name(self) -> str:
        flags = "".join(
            letter
            for letter, on in (
                ("g", self.gated), ("u", self.turned_up), ("d", self.turned_down),
                ("i", self.weigh_input), ("n", self.norm is not None),
            )
            if on
        )  # fmt: skip
        digest = hashlib.sha256(repr(self.limits).encode()).hexdigest()[:6] if self.limits else ""
        parts = (
            "experts", SHORT[self.dtype], _SHORT[self.share], f"m{self.rows}",
            _named(self.activation),
            flags, digest,
        )  # fmt: skip
        return "_".join(p for p in parts if p)


@dataclass(frozen=True)
class IntExperts:
    """What decides a kernel of experts over quantised weights.

    Attributes:
        weights: bits, dtypes, rows of a pass, 1, 2, 4, 8 or 16.
        index, share: of the indices and of their weights.
        gated: whether there is a gate.
        grouped, down_grouped: whether rows of gate and up, and of down, have several scales.
        weigh_input: whether weights multiply the input.
        activation, limits: see `ops.moe.gate_and_up`.
    """

    weights: emit_quantized.Weights
    index: torch.dtype
    share: torch.dtype
    gated: bool
    grouped: bool
    down_grouped: bool
    weigh_input: bool
    activation: str
    limits: tuple[float, ...]

    @property
    def name(self) -> str:
        flags = (self.gated, self.grouped, self.down_grouped, self.weigh_input)
        letters = "".join(c for c, on in zip("gxdi", flags, strict=True) if on)
        digest = hashlib.sha256(repr(self.limits).encode()).hexdigest()[:6] if self.limits else ""
        parts = (
            "experts", self.weights.name, _SHORT[self.index], _SHORT[self.share],
            _named(self.activation), letters, digest,
        )  # fmt: skip
        return "_".join(p for p in parts if p)


def _bounded(value: str, low: float, high: float) -> str:
    # The value comes second, which NaN comes through.
    if low != -math.inf:
        value = f"max(all({low!r}f), {value})"
    if high != math.inf:
        value = f"min(all({high!r}f), {value})"
    return value


def _named(activation: str) -> str:
    """As a part of a file's name."""
    if not is_formula(activation):
        return activation
    return "formula" + hashlib.sha256(activation.encode()).hexdigest()[:10]


_PRINTED = {
    "max": "max({0}, {1})", "min": "min({0}, {1})", "neg": "zero() - {0}", "abs": "abs({0})",
    "exp": "exp({0})", "square": "{0} * {0}",
    "log": "each({0}, [](float t) {{ return std::log(t); }})",
    "sqrt": "each({0}, [](float t) {{ return std::sqrt(t); }})",
    "erf": "each({0}, [](float t) {{ return std::erf(t); }})",
    "softplus": "each({0}, [](float t) {{ return t > 20.0f ? t : std::log1p(std::exp(t)); }})",
    **{sign: "{0} " + sign + " {1}" for sign in "+-*/"},
}  # fmt: skip


def _formula(formula: str) -> str:
    """The body of a function of g and u that computes a formula, an operation a line."""
    lines: list[str] = []

    def apply(word: str, given: Sequence[str]) -> str:
        text = _PRINTED.get(word) or ACTIVATION[word] + "::of({0})"
        lines.append(f"    const Vec t{len(lines)} = {text.format(*given)};\n")
        return f"t{len(lines) - 1}"

    result = fold(formula, str, lambda x: f"all({x!r}f)", apply)
    return "".join(lines) + f"    return {result};\n"


def _gate(spec: Experts | IntExperts) -> str:
    """The struct that computes act(gate) * up."""
    if is_formula(spec.activation):
        return (
            "struct Gate {\n  static Vec of(Vec g, [[maybe_unused]] Vec u) {\n"
            f"{_formula(spec.activation)}  }}\n}};\n\n"
        )
    slope, low, high, up_low, up_high, offset = spec.limits or PLAIN_LIMITS
    act = ACTIVATION[spec.activation]
    inner = _bounded("g", low, high)
    value = f"{act}::of({inner})"
    if slope != 1.0:
        value = f"{act}::of({inner} * all({slope!r}f)) * all({1.0 / slope!r}f)"
    if spec.gated:
        up = _bounded("u", up_low, up_high)
        value += f" * ({up} + all({offset!r}f))" if offset else f" * {up}"
    return (
        "struct Gate {\n  static Vec of(Vec g, [[maybe_unused]] Vec u) {\n"
        f"    return {value};\n  }}\n}};\n\n"
    )


_STACKS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@functools.lru_cache(maxsize=1024)
def experts(spec: Experts) -> Source:
    """``y = sum of weight * expert(x)``; see ``kernels/cpp/moe.h``.

    Of each of the six stacks the parameters are a pointer, an array of pointers or null, and the
    elements from one expert to the next.
    """
    t = CPP_TYPE[spec.dtype]
    flags = ", ".join(str(f).lower() for f in (spec.turned_up, spec.turned_down, spec.weigh_input))
    norm = "Nothing" if spec.norm is None else CPP_TYPE[spec.norm]
    kind = (
        f"Experts<{t}, {_CPP[spec.index]}, {_CPP[spec.share]}, {spec.rows},"
        f" {2 if spec.gated else 1}, {flags}, {norm}, Gate>"
    )
    stacks = ", ".join(
        f"{{(const {t}*){n}, (const {t}* const*){n}_list, {n}_step}}" for n in _STACKS
    )
    pointer = "float" if spec.norm is None else norm
    normed = f"(const {pointer if spec.norm else 'Nothing'}*)norm"
    run = f"""
const {kind} all_experts{{
    (const {t}*)x, (const {_CPP[spec.index]}*)indices, (const {_CPP[spec.share]}*)weights,
    {stacks},
    {{up_ld, up_gap}}, {{down_ld, down_gap}}, {normed}, float(eps), ({t}*)y, (Load*)load,
    {{tokens, k, count, K, I, N, ldx}}}};
all_experts.run(team, memory);
"""
    parameters = [
        *("p x", "i ldx", "p indices", "p weights"),
        *(p for n in _STACKS for p in (f"p {n}", f"p {n}_list", f"i {n}_step")),
        *("i up_ld", "i up_gap", "i down_ld", "i down_gap", "p norm", "f eps", "p y", "i load"),
        *("i tokens", "i k", "i count", "i K", "i I", "i N"),
    ]
    about = (
        f"Experts: {SHORT[spec.dtype]}, {spec.activation}, gated: {spec.gated},"
        f" up to {spec.rows} rows a pass"
    )
    need = f"{kind}::bytes({{tokens, k, count, K, I, N, ldx}}, threads)"
    return source(spec.name, about, "moe.h", parameters, run, need=need, before=_gate(spec))


@functools.lru_cache(maxsize=1024)
def int_experts(spec: IntExperts) -> Source:
    """`experts` over quantised weights; see ``kernels/cpp/moe_int.h``.

    Of each weight the parameters are those of three stacks, its numbers, scales and zero points,
    and behind the first the bytes from row to row of the numbers.
    """
    w, t = spec.weights, CPP_TYPE[spec.weights.dtype]
    flags = ", ".join(str(f).lower() for f in (spec.grouped, spec.down_grouped, spec.weigh_input))
    kind = (
        f"IntExperts<Int{w.bits}, {t}, {_CPP[spec.index]}, {_CPP[spec.share]}, {w.rows},"
        f" {2 if spec.gated else 1}, {flags}, {w.weight}, Gate>"
    )
    zero = "Centred" if w.zero is None else CPP_TYPE[w.zero]
    kinds = {"": "uint8_t", "_scale": CPP_TYPE[w.scale], "_zero": zero}

    def stack(label: str, of: str) -> str:
        return f"{{(const {of}*){label}, (const {of}* const*){label}_list, {label}_step}}"

    weights = ", ".join(
        f"{{{stack(n, 'uint8_t')}, {n}_ld, {stack(n + '_scale', kinds['_scale'])},"
        f" {stack(n + '_zero', zero)}}}"
        for n in _STACKS[:3]
    )
    biases = ", ".join(stack(n, t) for n in _STACKS[3:])
    run = f"""
const {kind} all_experts{{
    (const {t}*)x, (const {_CPP[spec.index]}*)indices, (const {_CPP[spec.share]}*)weights,
    {weights},
    {biases},
    G, H, ({t}*)y, (Load*)load, {{tokens, k, count, K, I, N, ldx}}}};
all_experts.run(team, memory);
"""
    parameters = ["p x", "i ldx", "p indices", "p weights"]
    for n in _STACKS[:3]:
        for part in kinds:
            parameters += [f"p {n}{part}", f"p {n}{part}_list", f"i {n}{part}_step"]
        parameters.append(f"i {n}_ld")
    for n in _STACKS[3:]:
        parameters += [f"p {n}", f"p {n}_list", f"i {n}_step"]
    parameters += ["i G", "i H", "p y", "i load"]
    parameters += [f"i {n}" for n in ("tokens", "k", "count", "K", "I", "N")]
    about = f"Experts: {w.name}, {spec.activation}, gated: {spec.gated}"
    need = f"{kind}::bytes({{tokens, k, count, K, I, N, ldx}}, G, H, threads)"
    return source(spec.name, about, "moe_int.h", parameters, run, need=need, before=_gate(spec))


@functools.lru_cache(maxsize=1024)
def grouped_linear(dtype: torch.dtype, index: torch.dtype, rows: int, turned: bool) -> Source:
    """One matrix an expert over sorted rows; see ``kernels/cpp/grouped.h``.

    Args:
        dtype: of rows, weights and the result.
        index: of the experts' ends.
        rows: of a pass, 1 … 16.
        turned: whether weights lie ``[in, out]``.
    """
    t = CPP_TYPE[dtype]
    kind = f"GroupedLinear<{t}, {_CPP[index]}, {rows}, {str(turned).lower()}>"
    stacks = ", ".join(
        f"{{(const {t}*){n}, (const {t}* const*){n}_list, {n}_step}}" for n in ("w", "bias")
    )
    run = f"""
const {kind} all_rows{{(const {t}*)x, ldx, (const {_CPP[index]}*)ends, {stacks}, ldw, ({t}*)y,
    rows, experts, K, N}};
all_rows.run(team, memory);
"""
    parameters = ["p x", "i ldx", "p ends"]
    for n in ("w", "bias"):
        parameters += [f"p {n}", f"p {n}_list", f"i {n}_step"]
    parameters += ["i ldw", "p y", "i rows", "i experts", "i K", "i N"]
    name = f"grouped_linear_{SHORT[dtype]}_{_SHORT[index]}_m{rows}{'_turned' if turned else ''}"
    need = f"{kind}::bytes(rows, experts, K, threads)"
    return source(name, f"Rows by expert: {kind}", "grouped.h", parameters, run, need=need)


@dataclass(frozen=True)
class Router:
    """What decides a router's kernel: dtypes, and the rows of a pass.

    Attributes:
        x, weight: of the operands; products are in ``weight``.
        logits, weights: of the results.
        bias, correction: of those, None without any.
        rows: 1 … 16.
    """

    x: torch.dtype
    weight: torch.dtype
    logits: torch.dtype
    weights: torch.dtype
    bias: torch.dtype | None
    correction: torch.dtype | None
    rows: int


@functools.lru_cache(maxsize=1024)
def router(spec: Router) -> Source:
    """Logits, weights and indices; see ``kernels/cpp/moe_router.h``."""
    bias, correction = spec.bias or torch.float32, spec.correction or torch.float32
    types = [spec.x, spec.weight, spec.logits, spec.weights, bias, correction]
    xt, wt, lt, st, bt, ct = (CPP_TYPE[d] for d in types)
    kind = f"Router<{xt}, {wt}, {lt}, {st}, {bt}, {ct}, {spec.rows}>"
    sizes = (
        "{tokens, experts, K, k, ldx, Scoring(scoring), Normalise(normalise), groups,"
        " top_groups, top2}"
    )
    run = f"""
const {kind} router{{
    (const {xt}*)x, (const {wt}*)w, ldw, (const {bt}*)bias, (const {ct}*)correction,
    ({lt}*)logits, ({st}*)weights, (int64_t*)indices, float(scale), float(eps), float(fill),
    {sizes}}};
router.run(team, memory);
"""
    parameters = [
        *("p x", "i ldx", "p w", "i ldw", "p bias", "p correction", "p logits", "p weights"),
        *("p indices", "f scale", "f eps", "f fill", "i tokens", "i experts", "i K", "i k"),
        *("i scoring", "i normalise", "i groups", "i top_groups", "i top2"),
    ]
    name = "router_" + "_".join(SHORT[d] for d in types) + f"_m{spec.rows}"
    need = f"{kind}::bytes({sizes}, threads)"
    return source(name, f"A router: {kind}", "moe_router.h", parameters, run, need=need)


def limits_of(limits: Sequence[float]) -> tuple[float, ...]:
    """``limits`` as a key; empty where they are the plain ones."""
    made = tuple(float(x) for x in limits)
    return () if made == PLAIN_LIMITS else made
