"""What a dialect op costs, as sympy expressions over its sizes: bytes, operations, time.

    symbols     c = cost("linear", T((M, K)), T((N, K)))      M, K, N sympy symbols
    a graph     c = of_node(node)                             fake tensors, symbols kept
    time        c.seconds(machine, {M: 1})                    hypot(bytes / bandwidth, flops / rate)
                                                              + launch

A formula counts what a good kernel has to move: each operand once and each result once, a cache
only where it is read or written (`keys` keys of it, if the mask is known to allow no more). What
stays in registers or cache between the parts of one op is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from dspark_compile.codegen.machine import Machine
from dspark_compile.ops import OPS
from dspark_compile.passes.graph import dialect_name

Size = Any  # int or sympy.Expr


@dataclass(frozen=True)
class T:
    """A tensor's sizes, ints or sympy expressions, and its dtype."""

    shape: tuple[Size, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def numel(self) -> sympy.Expr:
        return sympy.Mul(*(sympy.sympify(n) for n in self.shape))

    @property
    def bytes(self) -> sympy.Expr:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, floating-point operations in `dtype`, and beside those what goes
    through vector units, in operations of float32."""

    read: sympy.Expr
    write: sympy.Expr
    flops: sympy.Expr
    dtype: torch.dtype
    vector: sympy.Expr = sympy.S.Zero

    @property
    def bytes(self) -> sympy.Expr:
        return self.read + self.write

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(self.read + other.read, self.write + other.write, self.flops + other.flops),
            self.dtype,
            self.vector + other.vector,
        )

    def subs(self, sizes: Mapping[Any, Any]) -> Cost:
        """With symbols (or their names) replaced."""
        read, write, flops, vector = (
            e.subs(sizes) for e in (self.read, self.write, self.flops, self.vector)
        )
        return Cost(read, write, flops, self.dtype, vector)

    def seconds(
        self, machine: Machine, sizes: Mapping[Any, Any] | None = None, *, resident: bool = False
    ) -> float:
        """The predicted time, and `expression` with numbers put in.

        Raises:
            ValueError: a symbol has no value.
        """
        value = self.expression(machine, resident=resident).subs(sizes or {})
        if value.free_symbols:
            raise ValueError(f"no value for {sorted(str(s) for s in value.free_symbols)}")
        return float(value)

    def expression(self, machine: Machine, *, resident: bool = False) -> sympy.Expr:
        """Time over symbolic sizes; ``resident`` says that the operands lie in cache."""
        move = self.bytes / sympy.Float(machine.cached)
        if not resident:
            move = self.bytes * sympy.Float(machine.factor("memory") / machine.bandwidth)
        compute = self.computing(machine)
        # Neither hides behind the other altogether: cores that compute ask for less.
        return sympy.sqrt(move**2 + compute**2) + sympy.Float(machine.launch + machine.region)

    def computing(self, machine: Machine) -> sympy.Expr:
        """The time of the operations alone."""
        vector = sympy.Float(machine.factor("score") / machine.rate(torch.float32))
        product = sympy.Float(machine.factor("compute") / machine.rate(self.dtype))
        return self.flops * product + self.vector * vector

    def bound(self, machine: Machine, sizes: Mapping[Any, Any] | None = None) -> str:
        """What the time goes to: ``"memory"`` or ``"compute"``."""
        c = self.subs(sizes or {})
        memory = float(c.bytes) * machine.factor("memory") / machine.bandwidth
        return "memory" if memory >= float(c.computing(machine)) else "compute"


def tensor(x: Any) -> T:
    """A `T` from a real or fake tensor; the symbols of its sizes become sympy's."""
    if isinstance(x, T):
        return x
    return T(tuple(_size(n) for n in x.shape), x.dtype)


def _size(n: Any) -> Size:
    return n.node.expr if isinstance(n, torch.SymInt) else n


_FORMULAS: dict[str, Callable[..., Cost]] = {}


def _formula(*names: str) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    def register(function: Callable[..., Cost]) -> Callable[..., Cost]:
        for name in names:
            _FORMULAS[name] = function
        return function

    return register


def cost(name: str, *args: Any, **kwargs: Any) -> Cost:
    """The cost of dialect op ``name`` on arguments in its schema's order.

    Tensors are `T`, or real or fake tensors. ``keys=`` is how many keys attention has to read.

    Raises:
        KeyError: there is no formula for the op.
    """

    def convert(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return tensor(x)
        if isinstance(x, (list, tuple)):
            return [convert(i) for i in x]
        return _size(x)

    formula = _FORMULAS[name]
    allowed = {k: v for k, v in kwargs.items() if k == "keys"}
    return formula(*(convert(a) for a in _named(name, args, kwargs)), **allowed)


def _named(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """All of the op's arguments in order, defaults filled in."""
    schema = OPS[name].overload._schema.arguments
    values = list(args)
    for argument in schema[len(args) :]:
        if argument.name in kwargs:
            values.append(kwargs[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
        else:
            values.append(None)
    return values


def of_node(node: fx.Node, **kwargs: Any) -> Cost:
    """The cost of a dialect node of a graph, from the fake tensors in its metadata."""
    args, named = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    name = dialect_name(node)
    return cost(name, *args, **named, **kwargs)


def _bytes(*tensors: T | None) -> sympy.Expr:
    return sympy.Add(*(t.bytes for t in tensors if t is not None))


def _like(x: T, dtype: torch.dtype | None = None) -> T:
    return T(x.shape, dtype or x.dtype)


def _rows(x: T) -> sympy.Expr:
    return sympy.Mul(*(sympy.sympify(n) for n in x.shape[:-1]))


def _product(x: T, n: Size, k: Size) -> sympy.Expr:
    return 2 * _rows(x) * n * k


# -- products


@_formula("linear")
def _linear(x: T, weight: T, bias: T | None) -> Cost:
    n, k = weight.shape
    out = T((*x.shape[:-1], n), x.dtype)
    return Cost(_bytes(x, weight, bias), out.bytes, _product(x, n, k), x.dtype)


@_formula("merged_linear")
def _merged(x: T, weight: T, bias: T | None, sizes: Sequence[Size]) -> Cost:
    return _linear(x, weight, bias)


@_formula("matmul")
def _matmul(a: T, b: T) -> Cost:
    rows = a.shape[-2] if len(a.shape) > 1 else 1
    columns = b.shape[-1] if len(b.shape) > 1 else 1
    longer = a if len(a.shape) >= len(b.shape) else b
    batch = sympy.Mul(*(sympy.sympify(n) for n in longer.shape[:-2]))
    out = batch * rows * columns
    return Cost(_bytes(a, b), out * a.dtype.itemsize, 2 * out * sympy.sympify(a.shape[-1]), a.dtype)


@_formula("gated_mlp")
def _gated_mlp(x: T, gate: T, up: T, down: T, *rest: Any) -> Cost:
    (inner, k), n = up.shape, down.shape[0]
    biases = [b for b in rest[:3] if b is not None]
    flops = 2 * _product(x, inner, k) + _product(x, n, inner) + 8 * _rows(x) * inner
    out = T((*x.shape[:-1], n), x.dtype)
    return Cost(_bytes(x, gate, up, down, *biases), out.bytes, flops, x.dtype)


@_formula("gated_mlp_merged")
def _gated_mlp_merged(x: T, gate_up: T, down: T, *rest: Any) -> Cost:
    half = T((sympy.sympify(gate_up.shape[0]) / 2, gate_up.shape[1]), gate_up.dtype)
    biases = [b for b in rest[:2] if b is not None]
    return _gated_mlp(x, half, half, down, *biases, *([None] * (3 - len(biases))))


@_formula("mlp")
def _mlp(x: T, up: T, down: T, *rest: Any) -> Cost:
    (inner, k), n = up.shape, down.shape[0]
    biases = [b for b in rest[:2] if b is not None]
    flops = _product(x, inner, k) + _product(x, n, inner) + 8 * _rows(x) * inner
    out = T((*x.shape[:-1], n), x.dtype)
    return Cost(_bytes(x, up, down, *biases), out.bytes, flops, x.dtype)


# -- products with quantised weights: the result's features are the scale's rows, K is x's


@_formula("dequantize_weight")
def _dequantize_weight(weight: T, scale: T, zero_point: T | None, dtype: torch.dtype) -> Cost:
    read = _bytes(weight, scale, zero_point)
    return Cost(read, _like(weight, dtype).bytes, weight.numel, torch.float32)


@_formula("linear_int8", "linear_int4")
def _linear_int(x: T, weight: T, scale: T, zero_point: T | None, bias: T | None) -> Cost:
    n = scale.shape[0]
    out = T((*x.shape[:-1], n), x.dtype)
    read = _bytes(x, weight, scale, zero_point, bias)
    return Cost(read, out.bytes, _product(x, n, x.shape[-1]), x.dtype)


@_formula("gated_mlp_int8", "gated_mlp_int4")
def _gated_mlp_int(x: T, gate: Sequence[T], up: Sequence[T], down: Sequence[T], *rest: Any) -> Cost:
    inner, n, k = up[1].shape[0], down[1].shape[0], x.shape[-1]
    biases = [b for b in rest[:3] if b is not None]
    flops = 2 * _product(x, inner, k) + _product(x, n, inner) + 8 * _rows(x) * inner
    out = T((*x.shape[:-1], n), x.dtype)
    return Cost(_bytes(x, *gate, *up, *down, *biases), out.bytes, flops, x.dtype)


# -- norms and RoPE: float32 arithmetic beside the matrix units


@_formula("rms_norm")
def _rms_norm(x: T, weight: T | None, *rest: Any) -> Cost:
    return Cost(_bytes(x, weight), _like(x, rest[-1]).bytes, 5 * x.numel, torch.float32)


@_formula("layer_norm")
def _layer_norm(x: T, weight: T | None, bias: T | None, *rest: Any) -> Cost:
    return Cost(_bytes(x, weight, bias), _like(x, rest[-1]).bytes, 8 * x.numel, torch.float32)


@_formula("add_rms_norm")
def _add_rms_norm(x: T, residual: T, weight: T | None, *rest: Any) -> Cost:
    write = _like(x, rest[-1]).bytes + x.bytes
    return Cost(_bytes(x, residual, weight), write, 6 * x.numel, torch.float32)


@_formula("add_layer_norm")
def _add_layer_norm(x: T, residual: T, weight: T | None, bias: T | None, *rest: Any) -> Cost:
    write = _like(x, rest[-1]).bytes + x.bytes
    return Cost(_bytes(x, residual, weight, bias), write, 9 * x.numel, torch.float32)


@_formula("rope")
def _rope(x: T, cos: T, sin: T, *rest: Any) -> Cost:
    return Cost(_bytes(x, cos, sin), _like(x, rest[-1]).bytes, 3 * x.numel, torch.float32)


# -- attention


# What a score costs besides its products: a maximum, an exponential and a sum, and what is moved
# between matrix and vector units. Measured.
_SOFTMAX = 64


def _attend(
    query: T, key: T, value: T, scales: Sequence[T], mask: Sequence[Any], keys: Size | None
) -> Cost:
    batch, heads, rows, features = query.shape
    count = sympy.sympify(key.shape[2])
    read = count if keys is None else sympy.sympify(keys)
    cache = _bytes(key, value, *scales) * read / count
    bias, sinks = mask[0], mask[1]
    out = T((batch, heads, rows, value.shape[3]), query.dtype)
    pairs = sympy.sympify(batch) * heads * rows * read
    flops = pairs * (2 * features + 2 * value.shape[3])
    read = query.bytes + cache + _bytes(bias, sinks)
    return Cost(read, out.bytes, flops, query.dtype, pairs * _SOFTMAX)


@_formula("attention")
def _attention(query: T, key: T, value: T, *mask: Any, keys: Size | None = None) -> Cost:
    return _attend(query, key, value, (), mask, keys)


@_formula("attention_int8")
def _attention_int8(
    query: T, key: T, ks: T, value: T, vs: T, *mask: Any, keys: Size | None = None
) -> Cost:
    return _attend(query, key, value, (ks, vs), mask, keys)


@_formula("mla_attention")
def _mla(
    query: T, query_rope: T, latent: T, key_rope: T, *mask: Any, keys: Size | None = None
) -> Cost:
    batch, count, rank = latent.shape
    rope = key_rope.shape[-1]
    whole = T((*query.shape[:-1], query.shape[-1] + rope), query.dtype)
    # The latent is read once, as key and value both.
    key = T((batch, 1, count, rank + rope), latent.dtype)
    c = _attend(whole, key, T((batch, 1, count, 0), latent.dtype), (), mask, keys)
    read = sympy.sympify(count if keys is None else keys)
    pairs = _rows(query) * read
    out = T((*query.shape[:-1], rank), query.dtype)
    return Cost(c.read, out.bytes, c.flops + 2 * pairs * rank, c.dtype, c.vector)


# -- caches


@_formula("cache_append", "cache_extend")
def _append(cache: T, new: T, *rest: Any) -> Cost:
    return Cost(_bytes(cache, new), _bytes(cache, _like(new, cache.dtype)), sympy.S(0), new.dtype)


@_formula("cache_append_")
def _append_in_place(cache: T, new: T, positions: T) -> Cost:
    return Cost(_bytes(new, positions), _like(new, cache.dtype).bytes, sympy.S(0), new.dtype)


def _quantized(x: T, scale: torch.dtype) -> sympy.Expr:
    return x.numel + _rows(x) * scale.itemsize


@_formula("quantize_kv")
def _quantize(x: T, scale_dtype: torch.dtype) -> Cost:
    return Cost(x.bytes, _quantized(x, scale_dtype), 4 * x.numel, torch.float32)


@_formula("dequantize_kv")
def _dequantize(x: T, scale: T, dtype: torch.dtype) -> Cost:
    return Cost(_bytes(x, scale), _like(x, dtype).bytes, x.numel, torch.float32)


@_formula("cache_append_int8")
def _append_int8(cache: T, scale: T, new: T, positions: T) -> Cost:
    write = _bytes(cache, scale) + _quantized(new, scale.dtype)
    return Cost(_bytes(cache, scale, new), write, 4 * new.numel, torch.float32)


@_formula("cache_append_int8_")
def _append_int8_in_place(cache: T, scale: T, new: T, positions: T) -> Cost:
    return Cost(_bytes(new, positions), _quantized(new, scale.dtype), 4 * new.numel, torch.float32)


def _prepare(query: T, key: T, value: T, *rest: Any) -> Cost:
    """What lies between QKV and attention, without what the cache takes."""
    read = _bytes(query, key, value, *(t for t in rest[:4] if t is not None))
    return Cost(read, query.bytes, 9 * (query.numel + key.numel), torch.float32)


@_formula("qk_norm_rope_append_", "qk_norm_rope_append")
def _prepare_exact(query: T, key: T, value: T, *rest: Any) -> Cost:
    caches = rest[4:6]
    c = _prepare(query, key, value, *rest)
    write = _like(key, caches[0].dtype).bytes + _like(value, caches[1].dtype).bytes
    return Cost(c.read, c.write + write, c.flops, c.dtype)


@_formula("qk_norm_rope_append_int8_", "qk_norm_rope_append_int8")
def _prepare_int8(query: T, key: T, value: T, *rest: Any) -> Cost:
    c = _prepare(query, key, value, *rest)
    write = _quantized(key, rest[5].dtype) + _quantized(value, rest[7].dtype)
    flops = c.flops + 4 * (key.numel + value.numel)
    return Cost(c.read, c.write + write, flops, c.dtype)


# -- tokens


@_formula("greedy_token")
def _greedy(logits: T) -> Cost:
    return Cost(logits.bytes, _rows(logits) * 8, logits.numel, torch.float32)


@_formula("sample_token")
def _sample(logits: T, uniform: T, *rest: Any) -> Cost:
    # A softmax, a running sum and a comparison; filters sort, which is counted by its passes.
    vocabulary = sympy.sympify(logits.shape[-1])
    passes = 3 if not rest or (not rest[1] and rest[2] >= 1.0) else 3 + sympy.log(vocabulary, 2)
    return Cost(logits.bytes * passes, _rows(logits) * 8, 8 * logits.numel * passes, torch.float32)


def splits(units: int, keys: int, threads: int, block: int = 64) -> int:
    """Into how many pieces an attention over ``keys`` is cut so that threads finish together."""
    if units >= threads and units % threads == 0:
        return 1
    return max(1, min(math.ceil(keys / block), math.ceil(4 * threads / max(units, 1))))


# -- mixtures of experts: read are the experts that tokens are sent to, each once


def experts_hit(experts: Size, k: Size, tokens: Size) -> sympy.Expr:
    """How many of ``experts`` are hit by ``tokens`` with k choices each that know nothing of each
    other: ``E (1 - (1 - k / E)^T)``."""
    e = sympy.sympify(experts)
    return e * (1 - (1 - sympy.sympify(k) / e) ** sympy.sympify(tokens))


@_formula("moe_router")
def _moe_router(
    x: T, weight: T, bias: T | None, correction: T | None, top_k: int, *rest: Any
) -> Cost:
    rows, experts = _rows(x), weight.shape[0]
    written = rows * (experts * rest[2].itemsize + top_k * (rest[3].itemsize + 8))
    flops = _product(x, experts, weight.shape[1]) + 16 * rows * experts
    return Cost(_bytes(x, weight, bias, correction), written, flops, weight.dtype)


@_formula("moe_experts")
def _moe_experts(x: T, indices: T, weights: T, gate: Any, up: Any, down: Any, *rest: Any) -> Cost:
    stacks = [[tensor(t) for t in stack] for stack in (gate, up, down, *rest[:3])]
    inner, k = stacks[1][0].shape[-2:]
    n = stacks[2][0].shape[-2]
    whole = stacks[2][0]
    experts = whole.shape[0] if len(whole.shape) == 3 else len(stacks[2])
    total = sympy.Add(*(t.bytes for stack in stacks for t in stack))
    tokens, choices = _rows(x), indices.shape[-1]
    read = total * experts_hit(experts, choices, tokens) / experts
    matrices = 1 + len(stacks[0][:1])
    flops = choices * (_product(x, inner, k) * matrices + 2 * tokens * n * inner)
    written = tokens * n * x.dtype.itemsize
    return Cost(read + _bytes(x, indices, weights), written, flops, x.dtype)


@_formula("moe_experts_int8", "moe_experts_int4")
def _moe_experts_int(x: T, indices: T, weights: T, *rest: Any) -> Cost:
    lists = [[tensor(t) for t in stack] for stack in rest[:12]]
    stacked = len(lists[5]) == 1 and len(lists[5][0].shape) == 3
    experts = lists[5][0].shape[0] if stacked else len(lists[5])
    inner, n = (lists[i][0].shape[1 if stacked else 0] for i in (4, 5))
    total = sympy.Add(*(t.bytes for stack in lists for t in stack))
    tokens, choices = _rows(x), indices.shape[-1]
    read = total * experts_hit(experts, choices, tokens) / experts
    up = _product(x, inner, x.shape[-1]) * (1 + len(lists[0][:1]))
    flops = choices * (up + 2 * tokens * n * inner)
    return Cost(read + _bytes(x, indices, weights), tokens * n * x.dtype.itemsize, flops, x.dtype)


@_formula("grouped_linear")
def _grouped_linear(rows: T, ends: T, weight: Any, bias: Any) -> Cost:
    stacks = [[tensor(t) for t in stack] for stack in (weight, bias)]
    out, k = stacks[0][0].shape[-2:]
    experts, count = ends.shape[0], _rows(rows)
    total = sympy.Add(*(t.bytes for stack in stacks for t in stack))
    read = total * experts_hit(experts, 1, count) / experts
    written = count * out * rows.dtype.itemsize
    return Cost(read + _bytes(rows, ends), written, _product(rows, out, k), rows.dtype)
