"""Rows sorted, counted and put where numbers say: what a mixture of experts does around its
products, printed as loops of the native step (`glue`).

    sort, flip                             stable; NaN is the largest
    sum, mean, amax, amin, any, all, prod  over some dimensions
    var, std, linalg_vector_norm           the same
    cumsum                                 over one
    index_add, index_put, index_copy       rows to the places that a tensor of numbers says
    scatter, scatter_add, gather           elements

Numbers are checked before anything is written, by every thread, so that all leave together. Where
there is much to write, threads share a dimension that no number chooses, or take a row each: what
meets in one place is added by one thread, in the order of the rows, and rounded after each
addition, as in torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.passes.graph import aten

Pointer = Callable[[Tensor], str]
MOST = 8192  # elements of a result that one thread makes alone
LONGEST = 1 << 18  # elements of what one thread sorts, sums up or checks

TYPES = {
    torch.bool: "bool", torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16",
    torch.float16: "half", torch.int64: "int64_t", torch.int32: "int32_t", torch.int16: "int16_t",
    torch.int8: "int8_t", torch.uint8: "uint8_t",
}  # fmt: skip
SORTS = (aten.sort.default, aten.sort.stable)
_REDUCTIONS = {
    aten.sum.default: "sum", aten.sum.dim_IntList: "sum", aten.mean.default: "mean",
    aten.mean.dim: "mean", aten.amax.default: "amax", aten.amin.default: "amin",
    aten.any.default: "any", aten.any.dim: "any", aten.any.dims: "any", aten.all.default: "all",
    aten.all.dim: "all", aten.all.dims: "all", aten.linalg_vector_norm.default: "norm",
    aten.prod.default: "prod", aten.prod.dim_int: "prod", aten.var.correction: "var",
    aten.std.correction: "std",
}  # fmt: skip
_SCATTERS = {
    aten.scatter.src: False, aten.scatter.value: False, aten.scatter_add.default: True,
}  # fmt: skip
PRINTED = (
    *_REDUCTIONS, *_SCATTERS, aten.cumsum.default, aten.flip.default, aten.gather.default,
    aten.index_add.default, aten.index_copy.default, aten.index_put.default,
)  # fmt: skip


class NotPrinted(Exception):
    """A node that cannot be printed; the message says why."""


def printed(node: fx.Node, args: list[Any], out: Any, pointer: Pointer) -> list[str]:
    """The statements of a node of `PRINTED` or `SORTS` with these arguments into ``out``.

    Raises:
        NotPrinted: it has none.
    """
    given, target = _Given(node, args), node.target
    if target in SORTS:
        return _sort(given, out, pointer)
    if target in _REDUCTIONS:
        return _reduced(_REDUCTIONS[target], given, out, pointer)
    if target is aten.cumsum.default:
        return _cumsum(given, out, pointer)
    if target is aten.flip.default:
        return _flip(given, out, pointer)
    if target is aten.gather.default:
        return _gather(given, out, pointer)
    if target in _SCATTERS:
        return _scatter(given, out, pointer, adds=_SCATTERS[target])
    return _put(given, out, pointer)


class _Given:
    """A call's arguments by position or name."""

    def __init__(self, node: fx.Node, args: list[Any]):
        self.node, self.args, self.kwargs = node, args, dict(node.kwargs)

    def __call__(self, position: int, name: str, default: Any = None) -> Any:
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def op(self) -> str:
        return str(self.node.target).removeprefix("aten.")


def read(name: str, dtype: torch.dtype, at: str) -> str:
    """The text of element ``at`` of a tensor; half types as float."""
    text = f"((const {TYPES[dtype]}*){name})[{at}]"
    return f"to_float({text})" if dtype in (torch.bfloat16, torch.float16) else text


def store(name: str, dtype: torch.dtype, at: str, value: str) -> str:
    """The statement that writes element ``at`` of a tensor."""
    if dtype in (torch.bfloat16, torch.float16):
        return f"from_float((({TYPES[dtype]}*){name})[{at}], float({value}));"
    return f"(({TYPES[dtype]}*){name})[{at}] = {TYPES[dtype]}({value});"


@dataclass
class _Nest:
    """Loops ``i0``, ``i1`` … over some sizes, one of which the team may share."""

    sizes: Sequence[int]
    shared: int | None = None
    prefix: str = "i"

    def at(self, strides: Sequence[int]) -> str:
        """Where an element lies of which these are the strides; 0 for loops that do not count."""
        terms = [
            f"{self.prefix}{i} * {s}" for i, s in enumerate(strides) if s and self.sizes[i] != 1
        ]
        return " + ".join(terms) or "0"

    def around(self, body: Sequence[str]) -> list[str]:
        """The loops with ``body`` inside."""
        if 0 in self.sizes:
            return []
        lines = ["{"]
        if self.shared is not None:
            lines.append(f"const auto [begin, end] = team.share({self.sizes[self.shared]}, 16);")
        for i, size in enumerate(self.sizes):
            v = f"{self.prefix}{i}"
            if i == self.shared:
                lines.append(f"for (int64_t {v} = begin; {v} < end; ++{v})")
            elif size != 1:
                lines.append(f"for (int64_t {v} = 0; {v} < {size}; ++{v})")
        return [*lines, "{", *body, "}", "}"]


def _shared(out: Tensor, free: Sequence[int]) -> int | None:
    """The dimension of ``out`` that the team shares: of ``free``, the largest; None where one
    thread does it.

    Raises:
        NotPrinted: there is much to do and none to share.
    """
    if out.numel() <= MOST:
        return None
    best = max(free, key=lambda a: out.shape[a], default=None)
    if best is None or out.shape[best] < 32:
        raise NotPrinted(f"{out.numel()} elements, none of whose dimensions can be shared out")
    return best


def _longest(out: Tensor) -> int | None:
    """The dimension of ``out`` that the team shares where no number chooses any."""
    return max(range(out.dim()), key=lambda a: out.shape[a]) if out.numel() > MOST else None


def _no_longer(what: str, count: int) -> None:
    if count > LONGEST:
        raise NotPrinted(f"{what} of {count} elements, more than {LONGEST}")


def _small(what: str, count: int) -> None:
    if count > MOST:
        raise NotPrinted(f"{what} of {count} elements, more than {MOST}")


def _axis(what: str, x: Tensor, dim: int) -> int:
    if x.dim() == 0:
        raise NotPrinted(f"{what} of one number")
    return dim % x.dim()


def _by_row(sizes: Sequence[int], whole: Tensor, axis: int, body: Sequence[str]) -> list[str]:
    """``body`` for each row along ``axis`` of ``whole``, of which the loops go over ``sizes``;
    where there is much to do, the team takes them in turns."""
    nest = _Nest([1 if a == axis else n for a, n in enumerate(sizes)])
    if whole.numel() > MOST:
        strides, step = [0] * whole.dim(), 1
        for a in reversed(range(whole.dim())):
            if a != axis:
                strides[a], step = step, step * whole.shape[a]
        body = [f"if (({nest.at(strides)}) % team.threads == team.thread) {{", *body, "}"]
    return nest.around(body)


def _numbers(index: Any) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise NotPrinted("an index that is no tensor of whole numbers")
    if index.numel() > LONGEST:
        raise NotPrinted(f"an index of {index.numel()} numbers, more than {LONGEST}")
    return index


def _checked(index: Tensor, size: int, from_end: bool, pointer: Pointer) -> list[str]:
    """Every number of ``index`` is one of a dimension of ``size``."""
    nest = _Nest(index.shape, prefix="c")
    least = -size if from_end else 0
    return nest.around(
        [
            f"const int64_t row = {read(pointer(index), index.dtype, nest.at(index.stride()))};",
            f"if (row < {least}LL || row >= {size}LL) return 3;",
        ]
    )


# -- sorting --------------------------------------------------------------------------------------


def _sort(given: _Given, out: Any, pointer: Pointer) -> list[str]:
    x, (values, indices) = given.args[0], out
    axis = _axis("a sort", x, given(1, "dim", -1))
    _no_longer("a sort", x.shape[axis])
    places = _Nest([1 if a == axis else n for a, n in enumerate(x.shape)])
    px, pv, pi = pointer(x), pointer(values), pointer(indices)
    kind, descending = TYPES[x.dtype], str(bool(given(2, "descending", False))).lower()
    call = (
        f"sort_row((const {kind}*){px} + {places.at(x.stride())}, {x.stride(axis)},"
        f" {x.shape[axis]}, {descending},"
        f" ({kind}*){pv} + {places.at(values.stride())}, {values.stride(axis)},"
        f" (int64_t*){pi} + {places.at(indices.stride())}, {indices.stride(axis)});"
    )
    return _by_row(x.shape, x, axis, [call])


# -- sums -----------------------------------------------------------------------------------------


def _reduced(kind: str, given: _Given, out: Tensor, pointer: Pointer) -> list[str]:
    x = given.args[0]
    axes = given(2 if kind == "norm" else 1, "dim")
    if given.node.target in (aten.sum.default, aten.mean.default, aten.prod.default):
        axes = None
    if axes is None or axes == []:
        axes = list(range(x.dim()))
    axes = sorted({a % x.dim() for a in ([axes] if isinstance(axes, int) else axes)})
    over = 1
    for a in axes:
        over *= x.shape[a]
    kept = [a for a in range(x.dim()) if a not in axes]
    keeps = out.dim() == x.dim()
    if over == 0 and kind in ("mean", "amax", "amin"):
        raise NotPrinted(f"{given.op} over nothing")
    _no_longer(given.op, x.numel())
    floating = x.dtype.is_floating_point or out.dtype.is_floating_point
    compute = "double" if floating else "int64_t"
    sizes = [x.shape[a] for a in kept]
    share = max(range(len(sizes)), key=sizes.__getitem__) if out.numel() > MOST else None
    outer = _Nest(sizes, share)
    inner = _Nest([x.shape[a] for a in axes], prefix="j")
    places = [out.stride(a if keeps else i) for i, a in enumerate(kept)]
    at = f"{outer.at([x.stride(a) for a in kept])} + {inner.at([x.stride(a) for a in axes])}"
    value = f"const {compute} value = {compute}({read(pointer(x), x.dtype, at)});"
    if kind == "norm":
        order = float(given(1, "ord", 2))
        kind = {1.0: "norm1", 2.0: "norm2", math.inf: "norminf"}.get(order, "")
        if not kind:
            raise NotPrinted(f"a norm of order {order:g}")
    if kind in ("var", "std"):
        return outer.around(
            _variance(inner, value, given, over, kind == "std", lambda y: store(
                pointer(out), out.dtype, outer.at(places), y
            ))
        )  # fmt: skip
    step, start, end = {
        "prod": ("total *= value;", "1", "total"),
        "norm1": ("total += std::abs(value);", "0", "total"),
        "norm2": ("total += value * value;", "0", "std::sqrt(total)"),
        "norminf": (
            "total = value != value || std::abs(value) > total ? std::abs(value) : total;",
            "0",
            "total",
        ),
        "sum": ("total += value;", "0", "total"),
        "mean": ("total += value;", "0", f"total / {over}"),
        "amax": ("if (first || value != value || value > total) total = value;", "0", "total"),
        "amin": ("if (first || value != value || value < total) total = value;", "0", "total"),
        "any": ("total = total != 0 || value != 0;", "0", "total"),
        "all": ("total = total != 0 && value != 0;", "1", "total"),
    }[kind]
    if kind in ("amax", "amin"):  # a NaN stays
        step = f"if (total == total || first) {{ {step} }} first = false;"
    body = [
        f"{compute} total = {start};",
        *(["bool first = true;"] if kind in ("amax", "amin") else []),
        *inner.around([value, step]),
        store(pointer(out), out.dtype, outer.at(places), end),
    ]
    return outer.around(body)


def _variance(
    inner: _Nest, value: str, given: _Given, over: int, root: bool, put: Callable[[str], str]
) -> list[str]:
    """In two turns: the mean, then squares of what lies beside it."""
    correction = given(2, "correction")
    left = over - (1 if correction is None else correction)
    if left <= 0:
        raise NotPrinted(f"{given.op} of {over} numbers")
    found = f"squares / {left}"
    return [
        "double total = 0, squares = 0;",
        *inner.around([value, "total += value;"]),
        f"const double mean = total / {over};",
        *inner.around([value, "squares += (value - mean) * (value - mean);"]),
        put(f"std::sqrt({found})" if root else found),
    ]


def _cumsum(given: _Given, out: Tensor, pointer: Pointer) -> list[str]:
    x = given.args[0]
    axis = _axis("a cumsum", x, given(1, "dim", 0))
    _no_longer("a cumsum", x.shape[axis])
    floating = x.dtype.is_floating_point or out.dtype.is_floating_point
    compute = "double" if floating else "int64_t"
    places = _Nest([1 if a == axis else n for a, n in enumerate(x.shape)])
    source = read(pointer(x), x.dtype, f"{places.at(x.stride())} + n * {x.stride(axis)}")
    to = f"{places.at(out.stride())} + n * {out.stride(axis)}"
    body = [
        f"{compute} total = 0;",
        f"for (int64_t n = 0; n < {x.shape[axis]}; ++n) {{",
        f"  total += {compute}({source});",
        f"  {store(pointer(out), out.dtype, to, 'total')}",
        "}",
    ]
    return _by_row(x.shape, x, axis, body)


def _flip(given: _Given, out: Tensor, pointer: Pointer) -> list[str]:
    x, kind = given.args[0], TYPES[out.dtype]
    axes = {a % x.dim() for a in given.args[1]}
    nest = _Nest(out.shape, _longest(out))
    last = sum((x.shape[a] - 1) * x.stride(a) for a in axes)
    steps = [-s if a in axes else s for a, s in enumerate(x.stride())]
    source = f"((const {kind}*){pointer(x)})[{last} + {nest.at(steps)}]"
    return nest.around([f"(({kind}*){pointer(out)})[{nest.at(out.stride())}] = {source};"])


# -- places ---------------------------------------------------------------------------------------


def _put(given: _Given, out: Tensor, pointer: Pointer) -> list[str]:
    """``out = x`` with rows of ``values`` added at, or put to, the places that indices say."""
    x, target = given.args[0], given.node.target
    if target is aten.index_put.default:
        places, values = given.args[1], given.args[2]
        indices = {axis: _numbers(i) for axis, i in enumerate(places) if i is not None}
        adds, from_end = bool(given(3, "accumulate", False)), True
    else:
        axis, index, values = given.args[1] % max(x.dim(), 1), given.args[2], given.args[3]
        if index.dim() != 1:
            raise NotPrinted(f"{given.op} by an index of {index.dim()} dimensions")
        indices, from_end = {axis: _numbers(index)}, False
        adds = target is aten.index_add.default
        if given(4, "alpha", 1) != 1:
            raise NotPrinted(f"{given.op} with alpha")
        if list(values.shape) != [
            index.shape[0] if a == axis else n for a, n in enumerate(x.shape)
        ]:
            raise NotPrinted(f"{given.op} of rows of another shape")
    if values.dtype != x.dtype or not indices:
        raise NotPrinted(f"{given.op} of several dtypes")
    # The shape of x[indices], as in `glue_copies.index`: the indices' dimensions stand together,
    # where the first of them does, or in front.
    shape = torch.broadcast_shapes(*(i.shape for i in indices.values()))
    axes = sorted(indices)
    together = axes == list(range(axes[0], axes[-1] + 1))
    front = axes[0] if together else 0
    kept = [a for a in range(x.dim()) if a not in indices]
    order: list[int | None] = [*kept[:front], *[None] * len(shape), *kept[front:]]
    sizes = [*(x.shape[a] for a in kept[:front]), *shape, *(x.shape[a] for a in kept[front:])]
    spread = values.expand(sizes)
    share = _shared(out, kept)
    if share is None:
        _small(given.op, math.prod(sizes))
    nest = _Nest(sizes, None if share is None else order.index(share))
    terms = [nest.at([0 if a is None else out.stride(a) for a in order])]
    body, checks = [], []
    for n, (axis, index) in enumerate(indices.items()):
        checks += _checked(index, x.shape[axis], from_end, pointer)
        steps = [0] * len(sizes)
        steps[front : front + len(shape)] = index.expand(shape).stride()
        body.append(f"int64_t n{n} = {read(pointer(index), index.dtype, nest.at(steps))};")
        if from_end:
            body.append(f"if (n{n} < 0) n{n} += {x.shape[axis]};")
        terms.append(f"n{n} * {out.stride(axis)}")
    body += _written(pointer(out), out.dtype, " + ".join(terms), adds,
                     read(pointer(values), values.dtype, nest.at(spread.stride())))  # fmt: skip
    return [*checks, *_copied(x, out, share, pointer), *nest.around(body)]


def _written(to: str, dtype: torch.dtype, at: str, adds: bool, value: str) -> list[str]:
    if not adds:
        return [store(to, dtype, at, value)]
    if dtype == torch.bool:
        raise NotPrinted("an addition of truths")
    return [
        f"const int64_t to = {at};",
        store(to, dtype, "to", f"{read(to, dtype, 'to')} + {value}"),
    ]


def _copied(x: Tensor, out: Tensor, share: int | None, pointer: Pointer) -> list[str]:
    if x.dtype != out.dtype:
        raise NotPrinted("rows of several dtypes")
    nest = _Nest(out.shape, share)
    kind = TYPES[out.dtype]
    to = f"(({kind}*){pointer(out)})[{nest.at(out.stride())}]"
    source = f"((const {kind}*){pointer(x)})[{nest.at(x.stride())}]"
    return nest.around([f"{to} = {source};"])


def _scatter(given: _Given, out: Tensor, pointer: Pointer, adds: bool) -> list[str]:
    """``out = x`` with ``out[.., index[i], ..] = source[i]``, or added."""
    x, dim, index, source = given.args[:4]
    axis = _axis(given.op, x, dim)
    if given.kwargs.get("reduce") or index.dim() != x.dim() or x.dtype != out.dtype:
        raise NotPrinted(f"{given.op} of this form")
    _numbers(index)
    row = _Nest([n if a == axis else 1 for a, n in enumerate(index.shape)], prefix="n")
    lead = _Nest([1 if a == axis else n for a, n in enumerate(index.shape)])
    kind = TYPES[out.dtype]

    def at(strides: Sequence[int]) -> str:
        return f"{lead.at(strides)} + {row.at(strides)}"

    if isinstance(source, Tensor):
        if source.dtype != out.dtype:
            raise NotPrinted(f"{given.op} of several dtypes")
        value = read(pointer(source), source.dtype, at(source.stride()))
    elif isinstance(source, (bool, int)) or math.isfinite(source):
        value = f"({source!r})" if not isinstance(source, bool) else str(int(source))
    else:
        raise NotPrinted(f"{given.op} of {source!r}")
    number = read(pointer(index), index.dtype, at(index.stride()))
    rest = lead.at([0 if a == axis else s for a, s in enumerate(out.stride())])
    place = f"{rest} + {number} * {out.stride(axis)}"
    whole = _Nest([n if a == axis else 1 for a, n in enumerate(x.shape)], prefix="n")
    every = _Nest([1 if a == axis else n for a, n in enumerate(x.shape)])
    to, source_at = (f"{every.at(t.stride())} + {whole.at(t.stride())}" for t in (out, x))
    copy = f"(({kind}*){pointer(out)})[{to}] = ((const {kind}*){pointer(x)})[{source_at}];"
    return [
        *_checked(index, x.shape[axis], False, pointer),
        *_by_row(x.shape, out, axis, whole.around([copy])),
        *_by_row(
            index.shape, out, axis,
            row.around(_written(pointer(out), out.dtype, place, adds, value)),
        ),
    ]  # fmt: skip


def _gather(given: _Given, out: Tensor, pointer: Pointer) -> list[str]:
    x, dim, index = given.args[:3]
    axis = _axis("a gather", x, dim)
    if index.dim() != x.dim():
        raise NotPrinted("a gather of this form")
    _numbers(index)
    kind = TYPES[x.dtype]
    nest = _Nest(index.shape, _longest(out))
    rest = nest.at([0 if a == axis else s for a, s in enumerate(x.stride())])
    number = read(pointer(index), index.dtype, nest.at(index.stride()))
    source = f"((const {kind}*){pointer(x)})[{rest} + {number} * {x.stride(axis)}]"
    to = f"(({kind}*){pointer(out)})[{nest.at(out.stride())}]"
    return [*_checked(index, x.shape[axis], False, pointer), *nest.around([f"{to} = {source};"])]
