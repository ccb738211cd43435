"""The source text of a kernel: a template of ``kernels/cpp`` instantiated at an entry point.

What decides the machine code is a constant of the text — dtypes, rows, activation, head sizes, the
printed mask predicate — and what does not (sizes of weights, strides, pointers) is an argument, so
that layers of one kind share one library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.codegen.cpp.predicate import Printed

CPP_TYPE = {
    None: "None",
    torch.bool: "bool",
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "half",
    torch.int8: "int8_t",
}
SHORT = {
    torch.bool: "bool",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "i8",
}
ACTIVATION = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid_",
    "tanh": "tanh_",
    "identity": "identity",
}

_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}
_NAMES = {"p": "const void*", "i": "int64_t", "f": "double"}


@dataclass(frozen=True)
class Source:
    """A kernel's text and how it is called.

    Attributes:
        name: the entry point's, and the file's.
        text: the whole C++ file.
        parameters: ``"p"`` (pointer), ``"i"`` (integer) or ``"f"`` (double) and a name, each.
    """

    name: str
    text: str
    parameters: tuple[tuple[str, str], ...]


def source(
    name: str, about: str, header: str, parameters: Sequence[str], body: str, before: str = ""
) -> Source:
    """A file with one entry point; ``parameters`` are spelt ``"p x"``, ``"i N"``, ``"f eps"``.

    The entry returns 0, or 1 if memory ran out, or 2 for a position outside of a cache.
    """
    pairs = tuple((p.split()[0], p.split()[1]) for p in parameters)
    arguments = ", ".join(f"{_NAMES[kind]} {label}" for kind, label in pairs)
    indented = "\n".join(f"  {line}" if line else "" for line in body.strip().splitlines())
    text = (
        f"// {about}\n"
        f'#include "{header}"\n\nusing namespace dspark;\n\n{before}'
        f'extern "C" __attribute__((visibility("default"))) int {name}(\n    {arguments}) {{\n'
        f"{indented}\n  return 0;\n}}\n"
    )
    return Source(name, text, pairs)


@functools.lru_cache(maxsize=4096)
def kernel(text: Source, level: str) -> Callable[..., int]:
    """The entry point of a source, built for ``level`` if need be.

    Raises:
        build.BuildError: see `build.load`.
    """
    function = getattr(build.load(text.name, text.text, level), text.name)
    function.argtypes = [_C_TYPES[kind] for kind, _ in text.parameters]
    function.restype = ctypes.c_int
    return function


def why_not_built(text: Source) -> str | None:
    """None once the kernel is built for this machine, else why it cannot be."""
    try:
        kernel(text, isa_levels.detect())
    except (build.BuildError, ValueError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Prologue:
    """A norm of the input, in front of a product.

    Attributes:
        weight: the weight's dtype.
        centre: layer norm, else RMS norm.
        first: round to the input's dtype before the weight.
    """

    weight: torch.dtype
    centre: bool = False
    first: bool = True

    @property
    def suffix(self) -> str:
        kind = "layer" if self.centre else "rms"
        return f"_{kind}{'first' if self.first else ''}_{SHORT[self.weight]}"


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _before(prologue: Prologue | None) -> tuple[str, list[str], str]:
    """The template argument, parameters and construction of what comes before a product."""
    if prologue is None:
        return "Plain", [], "const Plain before{};"
    weight = CPP_TYPE[prologue.weight]
    kind = f"Normed<{weight}, {_boolean(prologue.centre)}, {_boolean(prologue.first)}>"
    make = (
        f"const {kind} before{{{{(const {weight}*)norm_weight, (const {weight}*)norm_bias, "
        "float(eps), float(offset)}};"
    )
    return kind, ["p norm_weight", "p norm_bias", "f eps", "f offset"], make


@functools.lru_cache(maxsize=1024)
def linear(
    dtype: torch.dtype, rows: int, activation: str = "identity", prologue: Prologue | None = None
) -> Source:
    """``act(norm(x) W^T + bias) + residual``, in parts; see ``kernels/cpp/linear.h``."""
    t = CPP_TYPE[dtype]
    kind, more, make = _before(prologue)
    suffix = "" if activation == "identity" else f"_{activation}"
    name = f"linear_{SHORT[dtype]}_m{rows}{suffix}{prologue.suffix if prologue else ''}"
    body = f"""
char* memory = (char*)scratch().get(linear_bytes<{t}, {rows}>(K, int(threads)));
if (memory == nullptr) return 1;
Parts<{t}> parts;
parts.count = int(count);
for (int i = 0; i < parts.count; ++i) parts.y[i] = (({t}* const*)y)[i];
for (int i = 0; i <= parts.count; ++i) parts.start[i] = ((const int64_t*)starts)[i];
{make}
parallel(int(threads), [&](Team team) {{
  linear<{t}, {rows}, {ACTIVATION[activation]}, {kind}>(
      team, (const {t}*)x, ldx, (const {t}*)w, ldw, (const {t}*)bias, (const {t}*)residual, parts,
      N, K, before, memory);
}});
"""
    parameters = [
        *("p x", "i ldx", "p w", "i ldw", "p bias", "p residual", "p y", "p starts", "i count"),
        *("i N", "i K", *more, "i threads"),
    ]
    about = f"y[M, N] = x[M, K] W[N, K]^T: {SHORT[dtype]}, M = {rows}, {activation}, before: {kind}"
    return source(name, about, "linear.h", parameters, body)


@functools.lru_cache(maxsize=1024)
def mlp(
    dtype: torch.dtype,
    rows: int,
    activation: str,
    gated: bool,
    prologue: Prologue | None = None,
) -> Source:
    """``(act(x G^T) * (x U^T)) D^T``, or without the gate; see ``kernels/cpp/linear.h``."""
    t = CPP_TYPE[dtype]
    kind, more, make = _before(prologue)
    gate = "gated_" if gated else ""
    name = f"{gate}mlp_{SHORT[dtype]}_m{rows}_{activation}{prologue.suffix if prologue else ''}"
    body = f"""
char* memory = (char*)scratch().get(mlp_bytes<{t}, {rows}>(K, I, int(threads)));
if (memory == nullptr) return 1;
{make}
parallel(int(threads), [&](Team team) {{
  mlp<{t}, {rows}, {ACTIVATION[activation]}, {2 if gated else 1}, {kind}>(
      team, (const {t}*)x, ldx, (const {t}*)gate, (const {t}*)up, ldu, (const {t}*)down, ldd,
      (const {t}*)gate_bias, (const {t}*)up_bias, (const {t}*)down_bias, (const {t}*)residual,
      ({t}*)y, N, I, K, before, memory);
}});
"""
    parameters = [
        *("p x", "i ldx", "p gate", "p up", "i ldu", "p down", "i ldd"),
        *("p gate_bias", "p up_bias", "p down_bias", "p residual", "p y"),
        *("i N", "i I", "i K", *more, "i threads"),
    ]
    about = f"A feed-forward block: {SHORT[dtype]}, M = {rows}, {activation}, gated: {gated}"
    return source(name, about, "linear.h", parameters, body)


@functools.lru_cache(maxsize=256)
def norm(
    dtype: torch.dtype,
    weight: torch.dtype,
    out: torch.dtype,
    centre: bool,
    first: bool,
    add: bool,
) -> Source:
    """RMS or layer norm of rows, behind a residual addition or not; see ``kernels/cpp/norm.h``."""
    t, wt, ot = CPP_TYPE[dtype], CPP_TYPE[weight], CPP_TYPE[out]
    what = f"{'add_' if add else ''}{'layer' if centre else 'rms'}_norm"
    name = f"{what}_{SHORT[dtype]}_{SHORT[weight]}_{SHORT[out]}{'_first' if first else ''}"
    flags = ", ".join(_boolean(f) for f in (centre, first, add))
    body = f"""
const Rows rows{{{{a, b, c}}, {{xa, xb, xc}}, {{ra, rb, rc}}}};
const Norm<{wt}> norm{{(const {wt}*)weight, (const {wt}*)bias, float(eps), float(offset)}};
parallel(int(threads), [&](Team team) {{
  norms<{t}, {wt}, {ot}, {flags}>(team, (const {t}*)x, (const {t}*)residual, ({t}*)total,
      ({ot}*)y, D, rows, norm);
}});
"""
    parameters = [
        *("p x", "p residual", "p total", "p y", "p weight", "p bias", "i D", "i a", "i b", "i c"),
        *("i xa", "i xb", "i xc", "i ra", "i rb", "i rc", "f eps", "f offset", "i threads"),
    ]
    about = f"{what}: {SHORT[dtype]}, weight {SHORT[weight]}, result {SHORT[out]}"
    return source(name, about, "norm.h", parameters, body)


@dataclass(frozen=True)
class Attention:
    """What decides an attention kernel, besides its mask.

    Attributes:
        query: the query's dtype, and the output's.
        cache: the keys' and values'.
        scales: the int8 cache's scales'; None for an exact cache.
        bias: the bias operand's; None without one.
        sinks: the sinks'; None without any.
        group: query heads for each key head.
        rows: query rows.
        features: of query and key.
        value_features: of value.
        softcap: whether scores are capped.
        adds: whether a forbidden key's score is moved by a finite ``mask_value``.
    """

    query: torch.dtype
    cache: torch.dtype
    scales: torch.dtype | None
    bias: torch.dtype | None
    sinks: torch.dtype | None
    group: int
    rows: int
    features: int
    value_features: int
    softcap: bool
    adds: bool


# The integers that ``Shape`` in attention.h takes, in order.
ATTENTION_SHAPE = 22


@functools.lru_cache(maxsize=1024)
def attention(spec: Attention, mask: Printed) -> Source:
    """Decode attention; see ``kernels/cpp/attention.h``."""
    types = ", ".join(
        CPP_TYPE[d] for d in (spec.query, spec.cache, spec.scales, spec.bias, spec.sinks)
    )
    sizes = f"{spec.group}, {spec.rows}, {spec.features}, {spec.value_features}"
    flags = f"{_boolean(spec.softcap)}, {_boolean(spec.adds)}"
    name = (
        f"attention_{SHORT[spec.query]}_{SHORT[spec.cache]}_g{spec.group}_m{spec.rows}"
        f"_d{spec.features}" + (f"_{SHORT[spec.bias]}bias" if spec.bias else "")
    )
    shape = ", ".join(f"n[{i}]" for i in range(ATTENTION_SHAPE))
    body = f"""
using C = Config<{types}, {sizes}, {flags}>;
const int64_t* n = (const int64_t*)shape;
const Shape sizes{{{shape}}};
const Tensors<C> tensors{{
    (const C::Q*)q, (const C::K*)k, (const C::K*)v, (const C::S*)ks, (const C::S*)vs,
    (const C::B*)bias, (const C::Sink*)sinks, (C::Q*)out, float(scale), float(softcap),
    float(mask_value), mask_value <= -3.0e4}};
const Mask mask((const void* const*)pointers, (const int64_t*)values);
char* memory = (char*)scratch().get(attention_bytes<C>(int(threads)));
if (memory == nullptr) return 1;
parallel(int(threads), [&](Team team) {{
  Attention<C, Mask>(tensors, sizes, mask).run(team, memory);
}});
"""
    parameters = [
        *("p q", "p k", "p v", "p ks", "p vs", "p bias", "p sinks", "p out", "p shape"),
        *("p pointers", "p values", "f scale", "f softcap", "f mask_value", "i threads"),
    ]
    about = (
        f"Decode attention: {spec.rows} rows, {spec.group} query heads a key head, {spec.features}"
        f" features, query {SHORT[spec.query]}, cache {SHORT[spec.cache]}"
    )
    return source(name, about, "attention.h", parameters, body, mask.text + "\n")


@functools.lru_cache(maxsize=2)
def probe(what: str) -> Source:
    """``read`` (x, out, n, threads) or ``copy`` (x, y, n, threads); see ``kernels/cpp/probe.h``."""
    body = f"""
parallel(int(threads), [&](Team team) {{
  probe_{what}(team, (const float*)x, (float*)y, n);
}});
"""
    parameters = ["p x", "p y", "i n", "i threads"]
    return source(f"probe_{what}", f"Measures: {what}.", "probe.h", parameters, body)


@functools.lru_cache(maxsize=256)
def rope(dtype: torch.dtype, angles: torch.dtype, out: torch.dtype) -> Source:
    """RoPE of rows; see ``kernels/cpp/rope.h``."""
    t, ct, ot = CPP_TYPE[dtype], CPP_TYPE[angles], CPP_TYPE[out]
    body = f"""
const int64_t* n = (const int64_t*)grid;
const Grid rows{{{{n[0], n[1], n[2]}}, {{n[3], n[4], n[5]}}, {{n[6], n[7], n[8]}},
                {{n[9], n[10], n[11]}}}};
const Turn turn{{rotary, features, interleaved != 0}};
parallel(int(threads), [&](Team team) {{
  ropes<{t}, {ct}, {ot}>(team, (const {t}*)x, (const {ct}*)cos, (const {ct}*)sin, ({ot}*)y, D,
      rows, turn);
}});
"""
    parameters = [
        *("p x", "p cos", "p sin", "p y", "p grid", "i D", "i rotary", "i features"),
        *("i interleaved", "i threads"),
    ]
    name = f"rope_{SHORT[dtype]}_{SHORT[angles]}_{SHORT[out]}"
    about = f"RoPE: {SHORT[dtype]}, angles {SHORT[angles]}, result {SHORT[out]}"
    return source(name, about, "rope.h", parameters, body)


# The integers that ``Append`` in rope.h takes, in order.
APPEND_SHAPE = 32
_APPEND = f"""
const int64_t* n = (const int64_t*)shape;
Append a;
static_assert(sizeof(a) == {APPEND_SHAPE} * sizeof(int64_t), "Append holds integers only");
std::memcpy(&a, n, sizeof(a));
if (!positions_fit((const int64_t*)positions, a.rows, a.keys)) return 2;
"""


@functools.lru_cache(maxsize=256)
def append(dtype: torch.dtype, cache: torch.dtype, scale: torch.dtype | None) -> Source:
    """New rows into a cache, quantised where it is int8; see ``kernels/cpp/rope.h``."""
    t, kt, st = CPP_TYPE[dtype], CPP_TYPE[cache], CPP_TYPE[scale or torch.float32]
    body = f"""{_APPEND}
parallel(int(threads), [&](Team team) {{
  appends<{t}, {kt}, {st}>(team, (const {t}*)fresh, ({kt}*)cache, ({st}*)scale,
      (const int64_t*)positions, a);
}});
"""
    name = f"append_{SHORT[dtype]}_{SHORT[cache]}" + (f"_{SHORT[scale]}" if scale else "")
    parameters = ["p fresh", "p cache", "p scale", "p positions", "p shape", "i threads"]
    about = f"Append to a cache: {SHORT[dtype]} into {SHORT[cache]}"
    return source(name, about, "rope.h", parameters, body)


@dataclass(frozen=True)
class Prepare:
    """What decides the fused norm + RoPE + append.

    Attributes:
        dtype: query's, key's and value's.
        weight: the norm weights'.
        angles: of cos and sin.
        cache: the caches'.
        scale: the int8 caches' scales'; None for exact ones.
        norm: 0 without a norm, 1 to round before the weight, 2 to round after.
    """

    dtype: torch.dtype
    weight: torch.dtype
    angles: torch.dtype
    cache: torch.dtype
    scale: torch.dtype | None
    norm: int


@functools.lru_cache(maxsize=256)
def prepare(spec: Prepare) -> Source:
    """Norm of query and key, RoPE, append; see ``kernels/cpp/rope.h``."""
    t, wt, ct = CPP_TYPE[spec.dtype], CPP_TYPE[spec.weight], CPP_TYPE[spec.angles]
    kt, st = CPP_TYPE[spec.cache], CPP_TYPE[spec.scale or torch.float32]
    norms = "{}_norm{{(const {}*){}w, nullptr, float(eps), float(offset)}}"
    body = f"""{_APPEND}
const Norm<{wt}> {norms.format("q", wt, "q")}, {norms.format("k", wt, "k")};
const Turn turn{{rotary, features, interleaved != 0}};
parallel(int(threads), [&](Team team) {{
  prepare<{t}, {wt}, {ct}, {kt}, {st}, {spec.norm}>(
      team, (const {t}*)q, (const {t}*)k, (const {t}*)v, q_norm, k_norm, (const {ct}*)cos,
      (const {ct}*)sin, ({kt}*)kc, ({st}*)ks, ({kt}*)vc, ({st}*)vs, (const int64_t*)positions,
      ({t}*)out, a, turn);
}});
"""
    parameters = [
        *("p q", "p k", "p v", "p qw", "p kw", "p cos", "p sin", "p kc", "p ks", "p vc", "p vs"),
        *("p positions", "p out", "p shape", "f eps", "f offset", "i rotary", "i features"),
        *("i interleaved", "i threads"),
    ]
    name = f"qk_norm_rope_append_{SHORT[spec.dtype]}_{SHORT[spec.cache]}_norm{spec.norm}"
    about = f"Norm, RoPE, append: {SHORT[spec.dtype]} into {SHORT[spec.cache]}"
    return source(name, about, "rope.h", parameters, body)
