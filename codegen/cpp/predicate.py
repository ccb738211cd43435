"""A mask predicate printed as a C++ struct: the test, and bounds on the keys it can allow.

The analysis (constant folding, bounds on ``k``) is the Triton printer's; the spelling is C++'s.
Booleans are ``bool`` and numbers ``int64_t``, and the helpers of ``predicate.h`` keep Python's
meaning of ``~ & | // %`` for both. The struct has a member for each tensor, stride, size and
integer that the text uses; `Printed.pointers` and `Printed.values` give them in order.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_compile.codegen.triton import predicate as analysis
from dspark_compile.ops.predicate import parse

_LOADS = {
    torch.bool: "bool",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}
_COMPARE = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_CALLS = {
    ast.FloorDiv: "floor_divide",
    ast.Mod: "floor_modulo",
    ast.BitAnd: "both",
    ast.BitOr: "either",
    ast.BitXor: "differ",
}


@dataclass(frozen=True, eq=False)  # one object a predicate: compared and hashed by identity
class Printed:
    """A predicate as C++.

    Attributes:
        text: the struct's definition, named ``Mask``.
        code: the analysis, which knows the members and checks tensors against them.
    """

    text: str
    code: analysis.MaskCode

    def tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that are read, in the members' order."""
        named = [p for p in self.code.parameters if p.endswith("_ptr")]
        return [tensors[int(p[1:].split("_")[0])] for p in named]

    def values(self, tensors: Sequence[Tensor], ints: Sequence[int]) -> list[int]:
        """Strides, sizes and integers, in the members' order."""
        arguments = self.code.arguments(tensors, ints)
        return [arguments[p] for p in self.code.parameters if not p.endswith("_ptr")]


class _Printer(analysis._Printer):
    def show(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            value = analysis._value(node)
            return str(value).lower() if isinstance(value, bool) else f"int64_t({value})"
        if isinstance(node, ast.BinOp):
            left, right = self.show(node.left), self.show(node.right)
            if type(node.op) in _CALLS:
                return f"{_CALLS[type(node.op)]}({left}, {right})"
            return f"({left} {_ARITHMETIC[type(node.op)]} {right})"
        if isinstance(node, ast.Compare):
            left, right = self.show(node.left), self.show(node.comparators[0])
            return f"({left} {_COMPARE[type(node.ops[0])]} {right})"
        if isinstance(node, ast.UnaryOp):
            operand = self.show(node.operand)
            return f"invert({operand})" if isinstance(node.op, ast.Invert) else f"(-{operand})"
        return super().show(node)

    def call(self, node: ast.Call) -> str:
        name = node.func.id  # type: ignore[attr-defined]
        values = [self.show(a) for a in node.args]
        if name == "abs":
            return f"absolute({values[0]})"
        result = values[0]
        for value in values[1:]:
            result = f"{'smaller' if name == 'min' else 'larger'}({result}, {value})"
        return result

    def load(self, tensor: int, indices: list[ast.expr]) -> str:
        if self.ranks.setdefault(tensor, len(indices)) != len(indices):
            raise ValueError(f"t{tensor} takes {self.ranks[tensor]} and {len(indices)} indices")
        pointer = self.parameter(f"t{tensor}_ptr")
        if not indices:
            return f"load_index({pointer}, 0, true)"
        offsets, guards = [], []
        for axis, index in enumerate(indices):
            stride = self.parameter(f"t{tensor}_stride_{axis}")
            text = self.show(index)
            plain = isinstance(index, ast.Name) and index.id in "bhqk"
            if not plain and not (isinstance(index, ast.Constant) and analysis._value(index) >= 0):
                # As in Python, a negative index counts from the end.
                size = self.parameter(f"t{tensor}_size_{axis}")
                text = f"wrap_index({text}, {size})"
                guards.append(f"inside({text}, {size})")
            offsets.append(f"{text} * {stride}")
        return f"load_index({pointer}, {' + '.join(offsets)}, {' && '.join(guards) or 'true'})"


@functools.lru_cache(maxsize=1024)
def print_predicate(text: str, dtypes: tuple[torch.dtype, ...] = ()) -> Printed:
    """The struct ``Mask`` of a predicate whose tensors have these dtypes.

    Raises:
        ValueError: it cannot be printed.
    """
    printer = _Printer()
    tree = analysis._fold(parse(text)) if text else ast.Constant(True)
    allowed = f"truth({printer.show(tree)})"
    bounds = analysis._Bounds(exact=True)
    if isinstance(tree, ast.Constant):
        if not tree.value:
            bounds = analysis._Bounds(upper=ast.Constant(0), exact=True)
    else:
        bounds = analysis._bounds(tree)
    upper = printer.show(analysis._fold(bounds.upper)) if bounds.upper else "keys"
    lower = printer.show(analysis._fold(bounds.lower)) if bounds.lower else "0"
    for tensor in printer.ranks:
        if tensor < len(dtypes) and dtypes[tensor] not in _LOADS:
            raise ValueError(f"mask tensor t{tensor} is {str(dtypes[tensor])[6:]}")

    def kind(name: str) -> str:
        if not name.endswith("_ptr"):
            return "int64_t "
        number = int(name[1:].split("_")[0])
        return f"const {_LOADS[dtypes[number]] if number < len(dtypes) else 'int64_t'}* "

    pointers = [p for p in printer.parameters if p.endswith("_ptr")]
    values = [p for p in printer.parameters if not p.endswith("_ptr")]
    make = [f"{p} = ({kind(p).strip()})pointers[{i}];" for i, p in enumerate(pointers)]
    make += [f"{p} = values[{i}];" for i, p in enumerate(values)]
    heads = any(analysis._names(tree, name) for name in ("h",))
    unused = "[[maybe_unused]] int64_t"
    lines = [
        f"// {text or 'everything is allowed'}",
        "struct Mask {",
        # Whether lower <= k < upper says it all, and whether the head matters.
        f"  static constexpr bool EXACT = {'true' if bounds.exact else 'false'};",
        f"  static constexpr bool HEADS = {'true' if heads else 'false'};",
        *(f"  {kind(p)}{p};" for p in printer.parameters),
        "  Mask([[maybe_unused]] const void* const* pointers,",
        "       [[maybe_unused]] const int64_t* values) {",
        *(f"    {line}" for line in make),
        "  }",
        f"  bool allowed({unused} b, {unused} h, {unused} q, {unused} k) const {{",
        f"    return {allowed};",
        "  }",
        f"  int64_t upper({unused} b, {unused} h, {unused} q, {unused} keys) const {{",
        f"    return {upper};",
        "  }",
        f"  int64_t lower({unused} b, {unused} h, {unused} q) const {{",
        f"    return {lower};",
        "  }",
        "};",
        "",
    ]
    code = analysis.MaskCode(
        text,
        tuple(printer.parameters),
        tuple(values),
        allowed,
        upper,
        lower,
        bounds.exact,
        dict(printer.ranks),
    )
    return Printed("\n".join(lines), code)
