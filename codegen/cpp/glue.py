"""What stands between the kernels of a decode step: small pointwise work, printed as plain loops.

Positions, cos and sin, an embedding's rows, scaled residuals, a mask's pieces: ATen nodes of known
sizes. Neighbours go into one function that one thread runs while the others wait; a large one is
shared out over the team. Arithmetic is ATen's: in float for half types, rounded once per node.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp import emit, scatter
from dspark_compile.codegen.cpp.scatter import read as _read
from dspark_compile.codegen.cpp.scatter import store as _store
from dspark_compile.passes.graph import aten

SMALL = scatter.MOST  # elements that one thread does alone
LARGE = 1 << 22  # above, the inner compiler's vectorised loops are wanted
LARGEST_INDEX = 4096  # numbers, each of which every thread checks

_TYPES = scatter.TYPES

_UNARY: dict[Any, str] = {
    aten.neg.default: "-{0}",
    aten.abs.default: "std::abs({0})",
    aten.cos.default: "std::cos({0})",
    aten.sin.default: "std::sin({0})",
    aten.exp.default: "std::exp({0})",
    aten.log.default: "std::log({0})",
    aten.sqrt.default: "std::sqrt({0})",
    aten.rsqrt.default: "C(1) / std::sqrt({0})",
    aten.reciprocal.default: "C(1) / {0}",
    aten.tanh.default: "std::tanh({0})",
    aten.sigmoid.default: "C(1) / (C(1) + std::exp(-{0}))",
    aten.silu.default: "{0} / (C(1) + std::exp(-{0}))",
    aten.relu.default: "({0} > C(0) ? {0} : C(0))",
    aten.round.default: "std::nearbyint({0})",
    aten.floor.default: "std::floor({0})",
    aten.ceil.default: "std::ceil({0})",
    aten.trunc.default: "std::trunc({0})",
    aten.logical_not.default: "!({0})",
    aten._to_copy.default: "{0}",
    aten.clone.default: "{0}",
    aten.copy.default: "{1}",
    aten.copy_.default: "{1}",
    aten.fill.Tensor: "{1}",
    aten.fill.Scalar: "{1}",
}
_ROUNDED = (aten.round.default, aten.floor.default, aten.ceil.default, aten.trunc.default)
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.maximum.default: "({0} != {0} || {0} > {1} ? {0} : {1})",
    aten.minimum.default: "({0} != {0} || {0} < {1} ? {0} : {1})",
    aten.pow.Tensor_Scalar: "std::pow({0}, {1})",
    aten.pow.Tensor_Tensor: "std::pow({0}, {1})",
    aten.pow.Scalar: "std::pow({0}, {1})",
    aten.logical_and.default: "({0} && {1})",
    aten.logical_or.default: "({0} || {1})",
    aten.bitwise_right_shift.Tensor_Scalar: "{0} >> {1}",
    aten.__rshift__.Scalar: "{0} >> {1}",
}
# Whole numbers; others in `glue.h`. By nothing but a number that is not 0: there torch raises.
_DIVISIONS: dict[Any, str] = {
    aten.div.Tensor_mode: "", aten.floor_divide.default: "floor_div", aten.remainder.Scalar: "mod",
    aten.remainder.Tensor: "mod", aten.fmod.Scalar: "fmod", aten.fmod.Tensor: "fmod",
}  # fmt: skip
for _name, _sign in {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
}.items():  # fmt: skip
    for _overload in ("Tensor", "Scalar"):
        _BINARY[getattr(getattr(aten, _name), _overload)] = f"{{0}} {_sign} {{1}}"
_COMPARISONS = frozenset(
    k for k in _BINARY if str(k).split(".")[1] in ("eq", "ne", "lt", "le", "gt", "ge")
)
_LOGICAL = {aten.bitwise_and.Tensor: "&", aten.bitwise_or.Tensor: "|"}
_CONSTANTS = {
    aten.zeros.default: 0, aten.ones.default: 1, aten.full.default: None,
    aten.scalar_tensor.default: None, aten.zeros_like.default: 0, aten.ones_like.default: 1,
    aten.full_like.default: None, aten.new_zeros.default: 0, aten.new_ones.default: 1,
    aten.new_full.default: None,
}  # fmt: skip
# What somebody else fills.
_EMPTY = (
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default,
    aten.empty_permuted.default,
)  # fmt: skip
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_MAKERS = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, *_CONSTANTS, *_EMPTY,
)  # fmt: skip


class NotGlue(Exception):
    """A node that cannot be printed; the message says why."""


@dataclass
class Glue:
    """Neighbouring nodes as one function.

    Attributes:
        lines: its statements.
        tensors: what its pointers ``p0``, ``p1`` ... get.
        outs: those of them that are written.
        elements: of the largest result.
    """

    lines: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    elements: int = 0

    def pointer(self, x: Tensor) -> str:
        """The name under which a tensor's first element is read."""
        for i, known in enumerate(self.tensors):
            if known is x:
                return f"p{i}"
        self.tensors.append(x)
        return f"p{len(self.tensors) - 1}"

    def source(self) -> emit.Source:
        """The kernel."""
        alone = "if (team.thread != 0) return 0;\n" if self.elements <= SMALL else ""
        run = alone + "\n".join(self.lines)
        digest = hashlib.sha256(run.encode()).hexdigest()[:12]
        parameters = [f"p p{i}" for i in range(len(self.tensors))]
        return emit.source(
            f"glue_{digest}", "What stands between kernels.", "glue.h", parameters, run
        )

    def add(self, node: fx.Node, values: Callable[[Any], Any], out: Any) -> None:
        """Print ``node``, whose arguments ``values`` gives, into ``out``, a tensor or several.

        Raises:
            NotGlue: it cannot be printed; nothing has been added then.
        """
        lines = _print(node, values, out, self.pointer)
        self.lines += ["{", f"  // {node.name}", *(f"  {line}" for line in lines), "}"]
        outs = [out] if isinstance(out, Tensor) else list(out)
        self.outs += outs
        self.elements = max(self.elements, *(x.numel() for x in outs))


def reason(node: fx.Node) -> str | None:
    """Why ``node`` is not glue; None if it is."""
    out = node.meta.get("val")
    if not isinstance(out, Tensor) and node.target not in scatter.SORTS:
        return f"{node.target} gives no tensor"
    try:
        _print(node, lambda x: x.meta["val"] if isinstance(x, fx.Node) else x, out, lambda x: "p")
    except NotGlue as error:
        return str(error)
    return None


def _print(
    node: fx.Node, values: Callable[[Any], Any], out: Any, pointer: Callable[[Tensor], str]
) -> list[str]:
    target = node.target
    outs = [out] if isinstance(out, Tensor) else list(out)
    args = [
        [values(y) for y in x] if isinstance(x, (list, tuple)) else values(x) for x in node.args
    ]
    tensors = [x for x in args if isinstance(x, Tensor)]
    for x in (*outs, *tensors):
        if x.device.type != "cpu":
            raise NotGlue(f"{target} on {x.device.type}")
        if x.dtype not in _TYPES:
            raise NotGlue(f"{target} of {x.dtype}")
        if not all(isinstance(n, int) for n in (*x.shape, *x.stride())):
            raise NotGlue(f"{target} of a dynamic size, {list(x.shape)}")
    if outs[0].numel() > LARGE:
        raise NotGlue(f"{target} of {outs[0].numel()} elements")
    if target in scatter.SORTS or (target in scatter.PRINTED and not _by_mask(target, args)):
        try:
            return scatter.printed(node, args, out, pointer)
        except scatter.NotPrinted as error:
            raise NotGlue(str(error)) from None
    if target is aten.embedding.default:
        return _embedding(args, out, pointer)
    if target is aten.cat.default:
        return _cat(args, out, pointer)
    if target in (aten.slice_scatter.default, aten.select_scatter.default):
        return _in_place_of(node, args, out, pointer)
    if target is aten.stack.default:
        axis = (args[1] if len(args) > 1 else 0) % out.dim()
        return _cat([[x.unsqueeze(axis) for x in args[0]], axis], out, pointer)
    if target is aten.roll.default:
        return _roll(args, out, pointer)
    if target is aten.index.Tensor:
        return _index(args, out, pointer)
    if target is aten.index_select.default:
        given = [*[None] * (args[1] % tensors[0].dim()), args[2]]
        return _index([args[0], given], out, pointer, from_end=False)
    if target in _MAKERS:
        return _made(node, args, out, pointer)
    if target is aten.argmax.default:
        return _argmax(args, node.kwargs, out, pointer)
    if target is aten.index_put.default:
        args = _masked_put(args, node.kwargs)
    elif target in _FILLS:
        args = [args[1], args[2], args[0]]
    compute, text = _expression(node, args, out)
    if target in _COMPARISONS and len(tensors) == 1 and isinstance(args[1], float):
        # As ATen does: the number takes the tensor's dtype first.
        args[1] = torch.tensor(args[1], dtype=torch.result_type(tensors[0], args[1])).item()
    operands = [x for x in args if isinstance(x, Tensor)]
    views = [x.expand(out.shape) if x.shape != out.shape else x for x in operands]
    reads = [f"C({_read(pointer(x), x.dtype, '{' + str(i) + '}')})" for i, x in enumerate(operands)]
    names = iter(reads)
    spelt = [next(names) if isinstance(x, Tensor) else _constant(x, compute) for x in args]
    # Every operand once, in a variable; then the expression over the variables.
    lines = [f"using C = {compute};"]
    variables, body = [], []
    for i, value in enumerate(spelt):
        variables.append(f"x{i}")
        body.append(f"const C x{i} = {value};")
    body.append(_store(pointer(out), out.dtype, "{out}", text.format(*variables)))
    return lines + _loops(out, views, body)


def _by_mask(target: Any, args: list[Any]) -> bool:
    """Whether it is ``x[mask] = number``, which is a choice of each element's."""
    if target is not aten.index_put.default:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def _masked_put(args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The operands of ``where`` for ``x[mask] = number``."""
    x, given, value = args[:3]
    mask = given[0]
    accumulates = kwargs.get("accumulate", False) or (len(args) > 3 and args[3])
    if len(given) != 1 or accumulates or not isinstance(mask, Tensor):
        raise NotGlue("an index_put that is not by one mask")
    if mask.dtype != torch.bool or mask.shape != x.shape or value.numel() != 1:
        raise NotGlue("an index_put that is not one number by a mask of the same shape")
    return [mask, value, x]


def _constant(value: Any, compute: str) -> str:
    if value is None:
        return "C(0)"
    if isinstance(value, bool):
        return f"C({str(value).lower()})"
    if isinstance(value, int):
        return f"C({value}LL)" if value != -(2**63) else "C(INT64_MIN)"
    if isinstance(value, float):
        if math.isnan(value):
            return "C(NAN)"
        if math.isinf(value):
            return f"C({'-' if value < 0 else ''}INFINITY)"
        return f"C({value!r})"
    if isinstance(value, (torch.dtype, str)):
        return "C(0)"
    raise NotGlue(f"an operand is {value!r}")


def _compute(operands: Sequence[Any], out: torch.dtype | None = None) -> str:
    """The type that ATen computes in: double, float or int64_t."""
    dtypes = [x.dtype for x in operands if isinstance(x, Tensor)]
    if out is not None:
        dtypes.append(out)
    if torch.float64 in dtypes:
        return "double"
    floating = any(d.is_floating_point for d in dtypes)
    floating = floating or any(isinstance(x, float) for x in operands)
    return "float" if floating else "int64_t"


def _expression(node: fx.Node, args: list[Any], out: Tensor) -> tuple[str, str]:
    """(type to compute in, expression over {0}, {1} …)."""
    target, kwargs = node.target, node.kwargs
    if target in (aten._to_copy.default, aten.clone.default):
        extra = {k for k, v in kwargs.items() if v is not None} - {
            "dtype", "device", "layout", "memory_format", "pin_memory", "non_blocking",
        }  # fmt: skip
        if extra:
            raise NotGlue(f"{target} with {sorted(extra)}")
        return _compute(args[:1]), "{0}"
    if target in (aten.copy_.default, aten.copy.default, aten.fill.Tensor, aten.fill.Scalar):
        return _compute(args[1:2]), "{1}"
    if target in _UNARY and len(args) == 1:
        compute = _compute(args, out.dtype if out.dtype != torch.bool else None)
        whole = target in _ROUNDED and compute == "int64_t"
        return compute, "{0}" if whole else _UNARY[target]
    if target is aten.pow.Scalar:
        return _compute(args[1:], out.dtype), _BINARY[target]
    if target in _BINARY:
        alpha = kwargs.get("alpha", 1)
        text = _BINARY[target]
        if set(kwargs) - {"alpha"}:
            raise NotGlue(f"{target} with {sorted(kwargs)}")
        if alpha != 1:
            text = text.replace("{1}", f"{_constant(alpha, '')} * {{1}}")
        return _compute(args[:2], out.dtype if out.dtype != torch.bool else None), text
    if target in _DIVISIONS:
        return _division(node, args, out)
    if target in _LOGICAL:
        if all(x.dtype == torch.bool for x in args if isinstance(x, Tensor)):
            return "int64_t", f"{{0}} {_LOGICAL[target]} {{1}}"
        return "int64_t", f"{{0}} {_LOGICAL[target]} {{1}}"
    if target is aten.bitwise_not.default:
        return "int64_t", "!{0}" if out.dtype == torch.bool else "~{0}"
    if target in (aten.where.self, aten.index_put.default, *_FILLS):
        return _compute(args[1:3], out.dtype), "{0} != C(0) ? {1} : {2}"
    if target is aten.gelu.default:
        if kwargs.get("approximate", "none") == "tanh":
            inner = "C(0.7978845608028654) * ({0} + C(0.044715) * {0} * {0} * {0})"
            return _compute(args), f"C(0.5) * {{0}} * (C(1) + std::tanh({inner}))"
        return _compute(args), "C(0.5) * {0} * (C(1) + std::erf({0} * C(0.7071067811865476)))"
    if target is aten.clamp.default:
        text = "{0}"
        if len(args) > 1 and args[1] is not None:
            text = "({0} < {1} ? {1} : {0})"
        if len(args) > 2 and args[2] is not None:
            text = f"({text} > {{2}} ? {{2}} : {text})"
        return _compute(args, out.dtype), text
    raise NotGlue(f"{target} is not among the printed ones")


def _division(node: fx.Node, args: list[Any], out: Tensor) -> tuple[str, str]:
    """(type to compute in, expression) of a division that is rounded, or of what it leaves."""
    target, function = node.target, _DIVISIONS[node.target]
    mode = node.kwargs.get("rounding_mode", args[2] if len(args) > 2 else None)
    if target is aten.div.Tensor_mode:
        if mode is None:
            return _compute(args[:2], out.dtype), "{0} / {1}"
        function = {"trunc": "trunc_div", "floor": "floor_div"}[mode]
    compute = _compute(args[:2], out.dtype)
    if compute == "int64_t" and (not isinstance(args[1], int) or args[1] == 0):
        raise NotGlue(f"{target} of whole numbers by what may be 0")
    return compute, f"{function}({{0}}, {{1}})" if function != "fmod" else "rest({0}, {1})"


def _loops(
    out: Tensor, views: Sequence[Any], body: Sequence[str], alone: bool = False
) -> list[str]:
    """Loops over ``out``'s shape, dimensions merged where all strides allow; shared out over the
    team if there is much to do, and every thread must not do all of it (``alone``)."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    every = [*views, out]
    for axis, size in enumerate(out.shape):
        if size == 1:
            continue
        now = [x.stride(axis) for x in every]
        if sizes and all(a == b * size for a, b in zip(strides[-1], now)):
            sizes[-1] *= size
            strides[-1] = now
        else:
            sizes.append(size)
            strides.append(now)
    if out.numel() == 0:
        return []
    shared = (
        max(range(len(sizes)), key=sizes.__getitem__) if out.numel() > SMALL and not alone else -1
    )
    lines: list[str] = []
    for i, size in enumerate(sizes):
        indent = "  " * len(lines)
        if i == shared:
            lines = [f"const auto [begin, end] = team.share({size}, 64);", *lines]
            lines.append(f"{indent}for (int64_t i{i} = begin; i{i} < end; ++i{i})")
        else:
            lines.append(f"{indent}for (int64_t i{i} = 0; i{i} < {size}; ++i{i})")

    def at(which: int) -> str:
        terms = [f"i{i} * {s[which]}" for i, s in enumerate(strides) if s[which]]
        return " + ".join(terms) or "0"

    places = {str(i): at(i) for i in range(len(views))}
    indent = "  " * (len(lines) + 1)
    printed = []
    for line in body:
        for key, text in places.items():
            line = line.replace(f"[{{{key}}}]", f"[{text}]")
        printed.append(indent + line.replace("[{out}]", f"[{at(len(views))}]"))
    return [*lines, "{", *printed, "}"]


def _embedding(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    weight, index = args[0], args[1]
    if weight.dtype != out.dtype or not out.is_contiguous() or weight.stride(-1) != 1:
        raise NotGlue("an embedding whose rows are not contiguous")
    if index.numel() > 256:
        raise NotGlue(f"an embedding of {index.numel()} rows")
    w, i, y = pointer(weight), pointer(index), pointer(out)
    kind, features = _TYPES[weight.dtype], weight.shape[1]
    lines = []
    if not all(isinstance(n, int) for n in (*index.shape, *index.stride())):
        raise NotGlue("an embedding of indices at dynamic places")
    places = [
        sum(n * stride for n, stride in zip(at, index.stride(), strict=True))
        for at in itertools.product(*(range(n) for n in index.shape))
    ]
    lines.append("{")
    lines.append(f"static const int64_t places[] = {{{', '.join(map(str, places))}}};")
    lines.append(f"for (int64_t n = 0; n < {len(places)}; ++n) {{")
    lines.append(f"  const int64_t row = ((const {_TYPES[index.dtype]}*){i})[places[n]];")
    lines.append(f"  if (row < 0 || row >= {weight.shape[0]}) return 3;")
    lines.append(
        f"  std::memcpy(({kind}*){y} + n * {features}, (const {kind}*){w} + row *"
        f" {weight.stride(0)}, {features * weight.element_size()});"
    )
    return [*lines, "}", "}"]


@dataclass(frozen=True)
class _Strides:
    """Where a loop over a result's shape reads."""

    of: tuple[int, ...]

    def stride(self, axis: int) -> int:
        return self.of[axis]


def _index(
    args: list[Any], out: Tensor, pointer: Callable[[Tensor], str], from_end: bool = True
) -> list[str]:
    """``x[:, i]``, ``x[i, :, j]``: integer tensors in any places, broadcast with each other.
    Negative ones count from the end, or are outside."""
    x, given = args
    indices = {axis: i for axis, i in enumerate(given) if i is not None}
    for i in indices.values():
        if not isinstance(i, Tensor) or i.dtype not in (torch.int64, torch.int32):
            raise NotGlue("an index that is no tensor of integers")
        if i.numel() > LARGEST_INDEX:
            raise NotGlue(f"an index of {i.numel()} numbers")
    shape = torch.broadcast_shapes(*(i.shape for i in indices.values()))
    axes = sorted(indices)
    together = axes == list(range(axes[0], axes[-1] + 1))
    front = axes[0] if together else 0  # where the indices' dimensions stand in the result
    kept = [x.stride(a) for a in range(x.dim()) if a not in indices]
    kind = _TYPES[x.dtype]
    source = _Strides((*kept[:front], *[0] * len(shape), *kept[front:]))
    checks, views, at = [], [source], []
    body = [f"const {kind}* from = &((const {kind}*){pointer(x)})[{{0}}];"]
    for n, (axis, i) in enumerate(indices.items()):
        size, spread = x.shape[axis], i.expand(shape)
        steps = [0] * out.dim()
        steps[front : front + len(shape)] = spread.stride()
        views.append(_Strides(tuple(steps)))
        read = f"((const {_TYPES[i.dtype]}*){pointer(i)})"
        # Every thread looks at all of them, so that all leave together.
        least = -size if from_end else 0
        looked = [
            f"const int64_t row = {read}[{{0}}];",
            f"if (row < {least}LL || row >= {size}LL) return 3;",
        ]
        checks += ["{", *_loops(i, [i], looked, alone=True), "}"]
        body.append(f"int64_t n{n} = {read}[{{{n + 1}}}];")
        body.append(f"if (n{n} < 0) n{n} += {size};")
        at.append(f"n{n} * {x.stride(axis)}")
    body.append(f"(({kind}*){pointer(out)})[{{out}}] = from[{' + '.join(at)}];")
    return [*checks, *_loops(out, views, body)]


def _cat(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    parts, axis = args[0], args[1] if len(args) > 1 else 0
    pieces, start = [], 0
    for part in parts:
        if not isinstance(part, Tensor) or part.dtype != out.dtype:
            raise NotGlue("a cat of several dtypes")
        if part.dim() != out.dim():
            raise NotGlue("a cat with an empty part")
        if not all(isinstance(n, int) for n in part.shape):
            raise NotGlue("a cat of a dynamic size")
        pieces.append((part, start, 0, part.shape[axis]))
        start += part.shape[axis]
    return _pieces(pieces, axis, out, pointer)


def _in_place_of(
    node: fx.Node, args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]
) -> list[str]:
    """A tensor with some of its slices replaced, which lie side by side."""
    x, part, rest = args[0], args[1], args[3:]
    axis = (args[2] if len(args) > 2 else 0) % out.dim()
    size = out.shape[axis]
    if node.target is aten.select_scatter.default:
        begin, part = rest[0] % size, part.unsqueeze(axis)
    else:
        begin, step = rest[0] if rest else None, rest[2] if len(rest) > 2 else 1
        if step != 1 or not isinstance(begin, (int, type(None))):
            raise NotGlue(f"{node.target} of slices apart")
        begin = min(max((begin or 0) + (size if (begin or 0) < 0 else 0), 0), size)
    if part.dtype != out.dtype or x.dtype != out.dtype:
        raise NotGlue(f"{node.target} of several dtypes")
    count = part.shape[axis]
    pieces = [(x, 0, 0, begin), (part, begin, 0, count)]
    pieces.append((x, begin + count, begin + count, size - begin - count))
    return _pieces(pieces, axis, out, pointer)


def _roll(args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]) -> list[str]:
    x, shifts, axes = [*args, []][:3]
    if len(shifts) != 1 or len(axes) != 1 or not isinstance(shifts[0], int):
        raise NotGlue("a roll of several dimensions")
    size = x.shape[axes[0]]
    shift = shifts[0] % max(size, 1)
    pieces = [(x, shift, 0, size - shift), (x, 0, size - shift, shift)]
    return _pieces(pieces, axes[0], out, pointer)


def _pieces(
    pieces: Sequence[tuple[Tensor, int, int, int]],
    axis: int,
    out: Tensor,
    pointer: Callable[[Tensor], str],
) -> list[str]:
    """Copies of ``size`` slices of a tensor from ``begin`` on to ``start`` in ``out``."""
    lines: list[str] = []
    kind = _TYPES[out.dtype]
    for part, start, begin, size in pieces:
        if size == 0:
            continue
        to, source = out.narrow(axis, start, size), part.narrow(axis, begin, size)
        y = f"((({kind}*){pointer(out)}) + {start * out.stride(axis)})"
        x = f"(((const {kind}*){pointer(part)}) + {begin * part.stride(axis)})"
        lines += ["{", *_loops(to, [source], [f"{y}[{{out}}] = {x}[{{0}}];"]), "}"]
    return lines


def _made(
    node: fx.Node, args: list[Any], out: Tensor, pointer: Callable[[Tensor], str]
) -> list[str]:
    if node.target in _EMPTY:
        return []
    args = [
        x for x in args if not isinstance(x, (list, Tensor))
    ]  # but the size, or what it is like
    if not all(isinstance(x, (int, float, bool)) for x in args):
        raise NotGlue(f"{node.target} of a dynamic value")
    kind = _TYPES[out.dtype]
    if node.target in _CONSTANTS:
        constant = _CONSTANTS[node.target]
        compute = "double" if out.dtype.is_floating_point else "int64_t"
        value = _constant(args[0] if constant is None else constant, compute)
        value = value.replace("C(", f"{compute}(")
    else:
        start, step = 0, 1
        if node.target is not aten.arange.default:
            start, step = args[0], args[2] if len(args) > 2 else 1
        value = f"{start} + i * {step}"
    store = _store(pointer(out), out.dtype, "i", value)
    if not out.is_contiguous():
        raise NotGlue(f"{node.target} with strides")
    return [f"// {kind}", f"for (int64_t i = 0; i < {out.numel()}; ++i) {store}"]


def _argmax(
    args: list[Any], kwargs: dict[str, Any], out: Tensor, pointer: Callable[[Tensor], str]
) -> list[str]:
    x = args[0]
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if axis is None or axis % x.dim() != x.dim() - 1 or not x.is_contiguous():
        raise NotGlue("an argmax over another than the last dimension")
    if not out.is_contiguous():
        raise NotGlue("an argmax with strides")
    n = x.shape[-1]
    read = _read(pointer(x), x.dtype, f"r * {n} + i")
    compute = _compute([x])
    return [
        f"for (int64_t r = 0; r < {out.numel()}; ++r) {{",
        f"  {compute} top = {read.replace('+ i]', '+ 0]')};",
        "  int64_t best = 0;",
        f"  for (int64_t i = 1; i < {n} && top == top; ++i) {{",
        f"    const {compute} value = {read};",
        "    if (value > top || value != value) top = value, best = i;",
        "  }",
        f"  ((int64_t*){pointer(out)})[r] = best;",
        "}",
    ]
