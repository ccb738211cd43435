"""What stands between the kernels of a decode step: small pointwise work, printed as plain loops.

Positions, cos and sin, an embedding's rows, scaled residuals, a mask's pieces: ATen nodes of known
sizes. Neighbours go into one function that one thread runs while the others wait; a large one is
shared out over the team. Arithmetic is ATen's: in float for half types, rounded once per node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp import emit, scatter
from dspark_compile.codegen.cpp.glue_convolution import convolution
from dspark_compile.codegen.cpp.glue_copies import (
    cat,
    embedding,
    in_place_of,
    index,
    pad,
    repeat,
    roll,
)
from dspark_compile.codegen.cpp.glue_loops import SMALL, NotGlue, loops
from dspark_compile.codegen.cpp.glue_pointwise import (
    COMPARISONS,
    FILLS,
    by_mask,
    compute_type,
    constant,
    expression,
    masked_put,
)
from dspark_compile.codegen.cpp.scatter import read as _read
from dspark_compile.codegen.cpp.scatter import store as _store
from dspark_compile.passes.graph import aten

LARGE = 1 << 22  # above, the inner compiler's vectorised loops are wanted

_TYPES = scatter.TYPES
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
_MAKERS = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default,
    *_CONSTANTS, *_EMPTY,
)  # fmt: skip


@dataclass
class Glue:
    """Neighbouring nodes as one function.

    Attributes:
        lines: its statements.
        tensors: what its pointers ``p0``, ``p1`` ... get.
        sizes: symbols that its numbers ``size0``, ``size1`` ... get.
        outs: those of them that are written.
        elements: of the largest result.
    """

    lines: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    sizes: list[torch.SymInt] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    elements: int = 0

    def pointer(self, x: Tensor | torch.SymInt) -> str:
        """The name under which a tensor's first element is read, or a symbol's value."""
        if isinstance(x, torch.SymInt):
            self.sizes.append(x)
            return f"size{len(self.sizes) - 1}"
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
        parameters += [f"i size{i}" for i in range(len(self.sizes))]
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
            if target is not aten.index_select.default or x is not tensors[0]:
                raise NotGlue(f"{target} of a dynamic size, {list(x.shape)}")
    if outs[0].numel() > LARGE:
        raise NotGlue(f"{target} of {outs[0].numel()} elements")
    if target in scatter.SORTS or (target in scatter.PRINTED and not by_mask(target, args)):
        try:
            return scatter.printed(node, args, out, pointer)
        except scatter.NotPrinted as error:
            raise NotGlue(str(error)) from None
    if target is aten.embedding.default:
        return embedding(args, out, pointer)
    if target is aten.cat.default:
        return cat(args, out, pointer)
    if target in (aten.slice_scatter.default, aten.select_scatter.default):
        return in_place_of(node, args, out, pointer)
    if target is aten.stack.default:
        axis = (args[1] if len(args) > 1 else 0) % out.dim()
        return cat([[x.unsqueeze(axis) for x in args[0]], axis], out, pointer)
    if target is aten.convolution.default:
        return convolution(args, out, pointer)
    if target is aten.constant_pad_nd.default:
        return pad(args, out, pointer)
    if target is aten.repeat.default:
        return repeat(args, out, pointer)
    if target is aten.roll.default:
        return roll(args, out, pointer)
    if target is aten.index.Tensor:
        return index(args, out, pointer)
    if target is aten.index_select.default:
        given = [*[None] * (args[1] % tensors[0].dim()), args[2]]
        return index([args[0], given], out, pointer, from_end=False)
    if target in _MAKERS:
        return _made(node, args, out, pointer)
    if target is aten.argmax.default:
        return _argmax(args, node.kwargs, out, pointer)
    if target is aten.index_put.default:
        args = masked_put(args, node.kwargs)
    elif target in FILLS:
        args = [args[1], args[2], args[0]]
    compute, text = expression(node, args, out)
    if target in COMPARISONS and len(tensors) == 1 and isinstance(args[1], float):
        # As ATen does: the number takes the tensor's dtype first.
        args[1] = torch.tensor(args[1], dtype=torch.result_type(tensors[0], args[1])).item()
    operands = [x for x in args if isinstance(x, Tensor)]
    views = [x.expand(out.shape) if x.shape != out.shape else x for x in operands]
    reads = [f"C({_read(pointer(x), x.dtype, '{' + str(i) + '}')})" for i, x in enumerate(operands)]
    names = iter(reads)
    spelt = [next(names) if isinstance(x, Tensor) else constant(x, compute) for x in args]
    # Every operand once, in a variable; then the expression over the variables.
    lines = [f"using C = {compute};"]
    variables, body = [], []
    for i, value in enumerate(spelt):
        variables.append(f"x{i}")
        body.append(f"const C x{i} = {value};")
    body.append(_store(pointer(out), out.dtype, "{out}", text.format(*variables)))
    return lines + loops(out, views, body)


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
        number = _CONSTANTS[node.target]
        compute = "double" if out.dtype.is_floating_point else "int64_t"
        value = constant(args[0] if number is None else number, compute)
        value = value.replace("C(", f"{compute}(")
    elif node.target is aten.linspace.default:  # from both ends, as ATen does
        (first, end, count), compute = args[:3], "double" if kind == "double" else "float"
        if not out.dtype.is_floating_point:
            raise NotGlue(f"{node.target} of {out.dtype}")
        apart = f"(({end} - {compute}({first})) / {max(count - 1, 1)})"
        low, high = f"{first} + {apart} * i", f"{end} - {apart} * ({count - 1} - i)"
        value = f"(i < {count // 2} ? {low} : {high})" if count > 1 else f"{compute}({first})"
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
    compute = compute_type([x])
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
