"""The source text of a kernel: a template of ``kernels/cpp`` instantiated at an entry point.

What decides the machine code is a constant of the text — dtypes, rows, activation, head sizes, the
printed mask predicate — and what does not (sizes of weights, strides, pointers) is an argument, so
that layers of one kind share one library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
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
        parameters: ``"p"`` (pointer), ``"i"`` (integer) or ``"f"`` (double) and a name, each; the
            entry takes the number of threads behind them.
    """

    name: str
    text: str
    parameters: tuple[tuple[str, str], ...]


def source(
    name: str,
    about: str,
    header: str,
    parameters: Sequence[str],
    run: str,
    *,
    need: str = "",
    before: str = "",
) -> Source:
    """A kernel that can be called alone, or be a stage of a native program.

    Args:
        name: the entry point's.
        about: one line, for the reader of the file.
        header: the template's file.
        parameters: spelt ``"p x"``, ``"i N"``, ``"f eps"``.
        run: statements for each thread of ``team``, with ``memory`` to work in. They return 2 if
            a position lies outside of a cache, before anything is written.
        need: an expression for the bytes of ``memory`` that ``threads`` threads want together.
        before: declarations in front.

    Three functions come of it: ``<name>(parameters..., threads)``, one parallel region, which
    returns 0, 1 (no memory) or what ``run`` returns; ``<name>_stage(team, parameters, memory)``
    and ``<name>_need(parameters, threads)``, which take the parameters as an array of 8 bytes
    each (``kernels/cpp/program.h``).
    """
    pairs = tuple((p.split()[0], p.split()[1]) for p in parameters)
    arguments = "".join(f"{_NAMES[kind]} {label}, " for kind, label in pairs)
    members = "".join(f"  {_NAMES[kind]} {label};\n" for kind, label in pairs)
    labels = ", ".join(label for _, label in pairs)
    unpack = f"  [[maybe_unused]] const auto& [{labels}] = arguments;\n" if pairs else ""
    indented = "\n".join(f"  {line}" if line else "" for line in run.strip().splitlines())
    visible = 'extern "C" __attribute__((visibility("default")))'
    memory = (
        "  char* memory = (char*)scratch().get(need(arguments, int(threads)));\n"
        "  if (memory == nullptr) return 1;\n"
        if need
        else "  char* memory = nullptr;\n"
    )
    text = (
        f"// {about}\n"
        f'#include "{header}"\n\nusing namespace dspark;\n\n{before}'
        f"struct Arguments {{\n{members}}};\n\n"
        "static size_t need([[maybe_unused]] const Arguments& arguments,"
        f" [[maybe_unused]] int threads) {{\n{unpack}  return {need or 0};\n}}\n\n"
        "static int run([[maybe_unused]] Team team, [[maybe_unused]] const Arguments& arguments,\n"
        f"               [[maybe_unused]] char* memory) {{\n{unpack}{indented}\n  return 0;\n}}\n\n"
        f"{visible} int {name}(\n    {arguments}int64_t threads) {{\n"
        f"  const Arguments arguments{{{labels}}};\n{memory}"
        "  int status = 0;\n"
        "  parallel(int(threads), [&](Team team) {\n"
        "    const int mine = run(team, arguments, memory);\n"
        "    if (team.thread == 0) status = mine;\n"
        "  });\n"
        "  return status;\n}\n\n"
        f"{visible} int {name}_stage(\n"
        "    const Team* team, const void* arguments, char* memory) {\n"
        "  return run(*team, *(const Arguments*)arguments, memory);\n}\n\n"
        f"{visible} size_t {name}_need(const void* arguments, int64_t threads) {{\n"
        "  return need(*(const Arguments*)arguments, int(threads));\n}\n"
    )
    return Source(name, text, pairs)


@functools.lru_cache(maxsize=4096)
def kernel(text: Source, level: str) -> Callable[..., int]:
    """The entry point of a source, built for ``level`` if need be.

    Raises:
        build.BuildError: see `build.load`.
    """
    function = getattr(build.load(text.name, text.text, level), text.name)
    function.argtypes = [*(_C_TYPES[kind] for kind, _ in text.parameters), ctypes.c_int64]
    function.restype = ctypes.c_int
    return function


@dataclass(frozen=True)
class StageEntry:
    """A kernel as a stage of a native program.

    Attributes:
        address: of ``<name>_stage``.
        wants: ``<name>_need``.
    """

    address: int
    wants: Callable[..., int]

    def need(self, block: ctypes.Array[ctypes.c_int64], stage: int, threads: int) -> int:
        """Bytes of scratch memory that stage number ``stage`` of a program's block wants."""
        return self.wants(block[4 * stage + 1], threads)


@functools.lru_cache(maxsize=4096)
def stage(text: Source, level: str) -> StageEntry:
    """The stage of a source, built for ``level`` if need be.

    Raises:
        build.BuildError: see `build.load`.
    """
    library = build.load(text.name, text.text, level)
    run = getattr(library, f"{text.name}_stage")
    wants = getattr(library, f"{text.name}_need")
    wants.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    wants.restype = ctypes.c_size_t
    address = ctypes.cast(run, ctypes.c_void_p).value
    assert address is not None
    return StageEntry(address, wants)


def build_all(sources: Iterable[Source], level: str) -> None:
    """Build several kernels, as many at a time as there are cores.

    Raises:
        build.BuildError: see `build.load`.
    """
    distinct = {source.name + source.text: source for source in sources}.values()
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda s: build.load(s.name, s.text, level), distinct):
            pass


_DEFERRED: ContextVar[list[Source] | None] = ContextVar("dspark_build_deferred", default=None)


@contextlib.contextmanager
def deferred(wanted: list[Source] | None = None) -> Iterator[None]:
    """Inside, `why_not_built` only asks whether there is a compiler: what is wanted may be
    another kernel than the one asked about. Those asked about are appended to ``wanted``."""
    token = _DEFERRED.set([] if wanted is None else wanted)
    try:
        yield
    finally:
        _DEFERRED.reset(token)


def why_not_built(text: Source) -> str | None:
    """None once the kernel is built for this machine, else why it cannot be."""
    try:
        wanted = _DEFERRED.get()
        if wanted is not None:
            build.toolchain()
            isa_levels.detect()
            wanted.append(text)
        else:
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
    """``act(norm(x) W^T + bias) + residual``, W and y in parts; see ``kernels/cpp/linear.h``.

    ``parts`` is an array of ``Part``: weight, its row stride, bias, result, rows; 8 bytes each.
    """
    t = CPP_TYPE[dtype]
    kind, more, make = _before(prologue)
    suffix = "" if activation == "identity" else f"_{activation}"
    name = f"linear_{SHORT[dtype]}_m{rows}{suffix}{prologue.suffix if prologue else ''}"
    run = f"""
{make}
linear<{t}, {rows}, {ACTIVATION[activation]}, {kind}>(
    team, (const {t}*)x, ldx, (const Part<{t}>*)parts, int(count), (const {t}*)residual, N, K,
    before, memory);
"""
    parameters = ["p x", "i ldx", "p parts", "i count", "p residual", "i N", "i K", *more]
    about = f"y[M, N] = x[M, K] W[N, K]^T: {SHORT[dtype]}, M = {rows}, {activation}, before: {kind}"
    need = f"linear_bytes<{t}, {rows}>(K, threads)"
    return source(name, about, "linear.h", parameters, run, need=need)


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
    run = f"""
{make}
mlp<{t}, {rows}, {ACTIVATION[activation]}, {2 if gated else 1}, {kind}>(
    team, (const {t}*)x, ldx, (const {t}*)gate, (const {t}*)up, ldu, (const {t}*)down, ldd,
    (const {t}*)gate_bias, (const {t}*)up_bias, (const {t}*)down_bias, (const {t}*)residual,
    ({t}*)y, N, I, K, before, memory);
"""
    parameters = [
        *("p x", "i ldx", "p gate", "p up", "i ldu", "p down", "i ldd"),
        *("p gate_bias", "p up_bias", "p down_bias", "p residual", "p y"),
        *("i N", "i I", "i K", *more),
    ]
    about = f"A feed-forward block: {SHORT[dtype]}, M = {rows}, {activation}, gated: {gated}"
    need = f"mlp_bytes<{t}, {rows}>(K, I, threads)"
    return source(name, about, "linear.h", parameters, run, need=need)


@functools.lru_cache(maxsize=256)
def batched(dtype: torch.dtype, rows: int, turned: bool) -> Source:
    """A matrix for each of a batch; see ``kernels/cpp/batched.h``. ``turned``: it lies by rows
    ``[K, N]``, else by columns."""
    t = CPP_TYPE[dtype]
    kind = f"Batched<{t}, {rows}, {_boolean(turned)}>"
    run = f"""
const {kind} all{{(const {t}*)x, x_b, x_m, (const {t}*)w, w_b, ldw, ({t}*)y, y_b, y_m,
    batch, K, N, (const {t}*)bias}};
all.run(team, memory);
"""
    parameters = [
        *("p x", "i x_b", "i x_m", "p w", "i w_b", "i ldw", "p y", "i y_b", "i y_m"),
        *("i batch", "i K", "i N", "p bias"),
    ]
    name = f"bmm_{SHORT[dtype]}_m{rows}{'_turned' if turned else ''}"
    need = f"{kind}::bytes(K, threads)"
    about = f"y[b] = x[b] W[b]: {SHORT[dtype]}, {rows} rows"
    return source(name, about, "batched.h", parameters, run, need=need)


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
    run = f"""
const Rows rows{{{{a, b, c}}, {{xa, xb, xc}}, {{ra, rb, rc}}}};
const Norm<{wt}> norm{{(const {wt}*)weight, (const {wt}*)bias, float(eps), float(offset)}};
norms<{t}, {wt}, {ot}, {flags}>(team, (const {t}*)x, (const {t}*)residual, ({t}*)total, ({ot}*)y,
    D, rows, norm);
"""
    parameters = [
        *("p x", "p residual", "p total", "p y", "p weight", "p bias", "i D", "i a", "i b", "i c"),
        *("i xa", "i xb", "i xc", "i ra", "i rb", "i rc", "f eps", "f offset"),
    ]
    about = f"{what}: {SHORT[dtype]}, weight {SHORT[weight]}, result {SHORT[out]}"
    return source(name, about, "norm.h", parameters, run)


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
        rest: of latent attention, those of ``features`` that lie behind the value's.
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
    rest: int = 0


# The integers that ``Shape`` in attention.h takes, in order.
ATTENTION_SHAPE = 25


@functools.lru_cache(maxsize=1024)
def attention(spec: Attention, mask: Printed) -> Source:
    """Decode attention; see ``kernels/cpp/attention.h``."""
    types = ", ".join(
        CPP_TYPE[d] for d in (spec.query, spec.cache, spec.scales, spec.bias, spec.sinks)
    )
    sizes = f"{spec.group}, {spec.rows}, {spec.features}, {spec.value_features}"
    flags = f"{_boolean(spec.softcap)}, {_boolean(spec.adds)}"
    if spec.rest:
        flags += f", {spec.rest}"
    name = (
        f"{'mla_' if spec.rest else ''}attention_{SHORT[spec.query]}_{SHORT[spec.cache]}"
        f"_g{spec.group}_m{spec.rows}_d{spec.features}"
        + (f"_{SHORT[spec.bias]}bias" if spec.bias else "")
    )
    shape = ", ".join(f"n[{i}]" for i in range(ATTENTION_SHAPE))
    config = f"Config<{types}, {sizes}, {flags}>"
    run = f"""
using C = {config};
const int64_t* n = (const int64_t*)shape;
const Shape sizes{{{shape}}};
const Tensors<C> tensors{{
    (const C::Q*)q, (const C::Q*)qr, (const C::K*)k, (const C::K*)v, (const C::S*)ks,
    (const C::S*)vs, (const C::B*)bias, (const C::Sink*)sinks, (C::Q*)out, float(scale),
    float(softcap), float(mask_value), mask_value <= -3.0e4}};
const Mask mask((const void* const*)pointers, (const int64_t*)values);
Attention<C, Mask>(tensors, sizes, mask).run(team, memory);
"""
    parameters = [
        *("p q", "p qr", "p k", "p v", "p ks", "p vs", "p bias", "p sinks", "p out", "p shape"),
        *("p pointers", "p values", "f scale", "f softcap", "f mask_value"),
    ]
    about = (
        f"Decode attention: {spec.rows} rows, {spec.group} query heads a key head, {spec.features}"
        f" features, query {SHORT[spec.query]}, cache {SHORT[spec.cache]}"
    )
    need = f"attention_bytes<{config}>(threads)"
    before = mask.text + "\n"
    return source(name, about, "attention.h", parameters, run, need=need, before=before)


@functools.lru_cache(maxsize=2)
def probe(what: str) -> Source:
    """``read`` (x, out, n, threads) or ``copy`` (x, y, n, threads); see ``kernels/cpp/probe.h``."""
    run = f"""
probe_{what}(team, (const float*)x, (float*)y, n);
"""
    parameters = ["p x", "p y", "i n"]
    return source(f"probe_{what}", f"Measures: {what}.", "probe.h", parameters, run)


@functools.lru_cache(maxsize=256)
def rope(dtype: torch.dtype, angles: torch.dtype, out: torch.dtype) -> Source:
    """RoPE of rows; see ``kernels/cpp/rope.h``."""
    t, ct, ot = CPP_TYPE[dtype], CPP_TYPE[angles], CPP_TYPE[out]
    run = f"""
const int64_t* n = (const int64_t*)grid;
const Grid rows{{{{n[0], n[1], n[2]}}, {{n[3], n[4], n[5]}}, {{n[6], n[7], n[8]}},
                {{n[9], n[10], n[11]}}}};
const Turn turn{{rotary, features, interleaved != 0}};
ropes<{t}, {ct}, {ot}>(team, (const {t}*)x, (const {ct}*)cos, (const {ct}*)sin, ({ot}*)y, D, rows,
    turn);
"""
    parameters = [
        *("p x", "p cos", "p sin", "p y", "p grid", "i D", "i rotary", "i features"),
        "i interleaved",
    ]
    name = f"rope_{SHORT[dtype]}_{SHORT[angles]}_{SHORT[out]}"
    about = f"RoPE: {SHORT[dtype]}, angles {SHORT[angles]}, result {SHORT[out]}"
    return source(name, about, "rope.h", parameters, run)


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
    run = f"""{_APPEND}
appends<{t}, {kt}, {st}>(team, (const {t}*)fresh, ({kt}*)cache, ({st}*)scale,
    (const int64_t*)positions, a);
"""
    name = f"append_{SHORT[dtype]}_{SHORT[cache]}" + (f"_{SHORT[scale]}" if scale else "")
    parameters = ["p fresh", "p cache", "p scale", "p positions", "p shape"]
    about = f"Append to a cache: {SHORT[dtype]} into {SHORT[cache]}"
    return source(name, about, "rope.h", parameters, run)


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
    run = f"""{_APPEND}
const Norm<{wt}> {norms.format("q", wt, "q")}, {norms.format("k", wt, "k")};
const Turn turn{{rotary, features, interleaved != 0}};
prepare<{t}, {wt}, {ct}, {kt}, {st}, {spec.norm}>(
    team, (const {t}*)q, (const {t}*)k, (const {t}*)v, q_norm, k_norm, (const {ct}*)cos,
    (const {ct}*)sin, ({kt}*)kc, ({st}*)ks, ({kt}*)vc, ({st}*)vs, (const int64_t*)positions,
    ({t}*)out, a, turn);
"""
    parameters = [
        *("p q", "p k", "p v", "p qw", "p kw", "p cos", "p sin", "p kc", "p ks", "p vc", "p vs"),
        *("p positions", "p out", "p shape", "f eps", "f offset", "i rotary", "i features"),
        "i interleaved",
    ]
    name = f"qk_norm_rope_append_{SHORT[spec.dtype]}_{SHORT[spec.cache]}_norm{spec.norm}"
    about = f"Norm, RoPE, append: {SHORT[spec.dtype]} into {SHORT[spec.cache]}"
    return source(name, about, "rope.h", parameters, run)
