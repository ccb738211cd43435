"""What ops mean that compute element by element or make numbers from nothing.

Comparisons, logic, arithmetic, selection, casts, factories and triangles: one element of the
result is a function of the same element of each operand, and of its own index.
"""

from __future__ import annotations

from typing import Any

import torch
from sympy import Expr
from torch import fx
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes

from dspark_compile.passes.graph import argument
from dspark_compile.passes.mask_formulas import FALSE, TRUE, Magnitude, Unknown, conj, disj, negate
from dspark_compile.passes.mask_numbers import LIMIT, WIDE, Number, Real, Value, choose, merge
from dspark_compile.passes.mask_values import Handler, Interpreter, handles, recorded, size_expr


def _binary(run: Interpreter, op: str, a: Value, b: Value, dtype: torch.dtype) -> Value:
    assert isinstance(a, tuple) and isinstance(b, tuple)
    return merge((conj(ca, cb), run.arithmetic(op, x, y, dtype)) for ca, x in a for cb, y in b)


def _compare(op: str) -> Handler:
    def handler(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        args = [recorded(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
        _, dtype = elementwise_dtypes(
            *args, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT
        )
        if dtype == torch.bool:
            x, y = (run.formula(a, node, index) for a in node.args[:2])
            if op in ("eq", "ne"):
                same = disj(conj(x, y), conj(negate(x), negate(y)))
                return same if op == "eq" else negate(same)
            dtype = torch.int64
        a, b = (run.operand(x, node, index, dtype) for x in node.args[:2])
        assert isinstance(a, tuple) and isinstance(b, tuple)
        return disj(*(conj(ca, cb, run.compare(op, x, y)) for ca, x in a for cb, y in b))

    return handler


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    handles(_name)(_compare(_name))


def _logical(op: str, always: bool) -> Handler:
    def handler(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        if not always and recorded(node).dtype != torch.bool:
            raise Unknown("operates on the bits of integers")
        parts = [run.formula(a, node, index) for a in node.args]
        if op == "not":
            return negate(parts[0])
        a, b = parts
        if op == "xor":
            return disj(conj(a, negate(b)), conj(negate(a), b))
        return conj(a, b) if op == "and" else disj(a, b)

    return handler


for _name in ("and", "or", "xor", "not"):
    handles(f"logical_{_name}")(_logical(_name, True))
    handles(f"bitwise_{_name}", f"__{_name}__")(_logical(_name, False))


def _arithmetic(op: str, boolean: str | None = None) -> Handler:
    def handler(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
        dtype = recorded(node).dtype
        a, b = argument(node, 0, "self"), argument(node, 1, "other")
        name = str(node.target)
        if dtype == torch.bool:
            if boolean is None:
                raise Unknown("computes with bool values")
            p, r = run.formula(a, node, index), run.formula(b, node, index)
            return conj(p, r) if boolean == "and" else disj(p, r)
        mode = op
        if "aten.rsub" in name:
            a, b = b, a
        if "aten.div" in name:
            mode = {"floor": "floor", "trunc": "trunc"}.get(node.kwargs.get("rounding_mode"), "")
            if not mode or dtype not in WIDE:
                raise Unknown("divides with fractions")
        x, y = (run.operand(v, node, index, dtype, precise=True) for v in (a, b))
        alpha = argument(node, 2, "alpha", 1) if op in ("add", "sub") else 1
        if alpha != 1:
            y = _binary(run, "mul", y, run.literal(alpha, dtype), dtype)
        return _binary(run, mode, x, y, dtype)

    return handler


handles("add")(_arithmetic("add", "or"))
handles("sub", "rsub")(_arithmetic("sub"))
handles("mul")(_arithmetic("mul", "and"))
handles("floor_divide", "div")(_arithmetic("floor"))
handles("remainder")(_arithmetic("mod"))
handles("minimum")(_arithmetic("min", "and"))
handles("maximum")(_arithmetic("max", "or"))


@handles("min", "max")
def _extreme(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if not str(node.target).endswith(".other"):
        raise Unknown("reduces over a dimension")
    low = "aten.min" in str(node.target)
    meaning = _arithmetic("min", "and") if low else _arithmetic("max", "or")
    return meaning(run, node, index)


@handles("neg", "abs")
def _unary(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = recorded(node).dtype
    value = run.operand(node.args[0], node, index, dtype)
    assert isinstance(value, tuple)

    def apply(n: Number) -> Number:
        absolute = "abs" in str(node.target)
        if isinstance(n, Real):
            if n.part != 0 and (absolute or n.const):
                raise Unknown("negates a rounded float")
            return Real(abs(n.const) if absolute else -n.const, -n.part, n.limit)
        if dtype not in WIDE:
            raise Unknown(f"computes in {dtype}")
        if not absolute:
            return -n
        low, high = run.bounds(n)
        return n if low >= 0 else -n if high <= 0 else Magnitude(n)

    return merge((c, apply(n)) for c, n in value)


@handles("clamp", "clamp_min", "clamp_max", "clip")
def _clamp(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype, name = recorded(node).dtype, str(node.target)
    value = run.operand(node.args[0], node, index, dtype)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if "clamp_max" in name:
        low, high = None, argument(node, 1, "max")
    for bound, op in ((low, "max"), (high, "min")):
        if bound is not None:
            value = _binary(run, op, value, run.operand(bound, node, index, dtype), dtype)
    return value


@handles("where")
def _where(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    if len(node.args) < 3:
        raise Unknown("lists positions")
    dtype = recorded(node).dtype
    condition = run.formula(node.args[0], node, index)
    if condition in (TRUE, FALSE):
        return run.operand(node.args[1 if condition == TRUE else 2], node, index, dtype)
    yes, no = (run.operand(a, node, index, dtype) for a in node.args[1:3])
    return choose(condition, yes, no)


@handles("masked_fill")
def _masked_fill(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = recorded(node).dtype
    condition = run.formula(node.args[1], node, index)
    fill = run.operand(node.args[2], node, index, dtype)
    if condition == TRUE:
        return fill
    return choose(condition, fill, run.operand(node.args[0], node, index, dtype))


@handles(
    "_to_copy", "to", "clone", "detach", "alias", "contiguous", "lift", "lift_fresh",
    "lift_fresh_copy", "prims.convert_element_type", "expand", "expand_as", "prims.device_put",
)  # fmt: skip
def _same_value(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    source = node.args[0]
    if "lift" in str(node.target) and isinstance(source, fx.Node) and source.op == "get_attr":
        # A number written in the model's code; nothing else is lifted.
        constant = getattr(node.graph.owning_module, str(source.target), None)
        if isinstance(constant, torch.Tensor) and constant.numel() == 1:
            if type(constant) is torch.Tensor:
                return run.literal(constant.item(), constant.dtype)
    return run.operand(source, node, index, recorded(node).dtype)


@handles("copy", "fill")
def _overwrite(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.operand(node.args[1], node, index, recorded(node).dtype)


@handles("full", "full_like", "new_full", "scalar_tensor")
def _full(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    place = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
    packet = str(node.target).split(".")[1]
    name = "s" if packet == "scalar_tensor" else "fill_value"
    return run.literal(argument(node, place[packet], name), recorded(node).dtype)


@handles("ones", "ones_like", "new_ones")
def _ones(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.literal(1, recorded(node).dtype)


@handles("zeros", "zeros_like", "new_zeros")
def _zeros(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.literal(0, recorded(node).dtype)


@handles("arange", "prims.iota")
def _arange(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    start: Any = 0
    step: Any = 1
    if "iota" in str(node.target):
        start, step = node.kwargs["start"], node.kwargs["step"]
    elif str(node.target).endswith((".start", ".start_step")):
        start, step = node.args[0], argument(node, 2, "step", 1)
    if isinstance(start, float) or isinstance(step, float):
        raise Unknown("counts in fractions")
    expr = size_expr(start) + size_expr(step) * index[0]
    dtype = recorded(node).dtype
    if dtype in LIMIT and not run.exact(Real(0.0, expr, LIMIT[dtype])):
        raise Unknown("counts in floats that may be rounded")
    return run.cast(((TRUE, expr),), dtype)


@handles("eye")
def _eye(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    return run.cast(run.eq(index[0] - index[1]), recorded(node).dtype)


@handles("tril", "triu")
def _triangle(run: Interpreter, node: fx.Node, index: tuple[Expr, ...]) -> Value:
    dtype = recorded(node).dtype
    diagonal = size_expr(argument(node, 1, "diagonal", 0))
    gap = index[-1] - index[-2] - diagonal
    kept = run.le(gap if "tril" in str(node.target) else -gap)
    if kept == FALSE:
        return run.literal(0, dtype)
    value = run.operand(node.args[0], node, index, dtype)
    return value if kept == TRUE else choose(kept, value, run.literal(0, dtype))
