"""Pointwise nodes as C++ expressions of their operands, with ATen's rules for dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile.codegen.cpp.glue_loops import NotGlue
from dspark_compile.passes.graph import aten

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
    aten.relu.default: "({0} < C(0) ? C(0) : {0})",
    aten.round.default: "std::nearbyint({0})",
    aten.floor.default: "std::floor({0})",
    aten.ceil.default: "std::ceil({0})",
    aten.trunc.default: "std::trunc({0})",
    aten.log1p.default: "std::log1p({0})",
    aten.log2.default: "std::log2({0})",
    aten.log10.default: "std::log10({0})",
    aten.exp2.default: "std::exp2({0})",
    aten.expm1.default: "std::expm1({0})",
    aten.tan.default: "std::tan({0})",
    aten.asin.default: "std::asin({0})",
    aten.acos.default: "std::acos({0})",
    aten.atan.default: "std::atan({0})",
    aten.sinh.default: "std::sinh({0})",
    aten.cosh.default: "std::cosh({0})",
    aten.asinh.default: "std::asinh({0})",
    aten.acosh.default: "std::acosh({0})",
    aten.atanh.default: "std::atanh({0})",
    aten.erf.default: "std::erf({0})",
    aten.erfc.default: "std::erfc({0})",
    aten.erfinv.default: "C(inverse_erf({0}))",
    aten.sign.default: "C(({0} > C(0)) - ({0} < C(0)))",
    aten.sgn.default: "C(({0} > C(0)) - ({0} < C(0)))",
    aten.square.default: "{0} * {0}",
    aten.isnan.default: "({0} != {0})",
    aten.isinf.default: "({0} - {0} != {0} - {0} && {0} == {0})",
    aten.hardsigmoid.default: "std::fmin(std::fmax({0} + C(3), C(0)), C(6)) / C(6)",
    aten.hardswish.default: "{0} * std::fmin(std::fmax({0} + C(3), C(0)), C(6)) / C(6)",
    aten.mish.default: "{0} * std::tanh(std::log1p(std::exp({0})))",
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
    aten.atan2.default: "std::atan2({0}, {1})",
    aten.hypot.default: "std::hypot({0}, {1})",
    aten.clamp_min.default: "({0} < {1} ? {1} : {0})",
    aten.clamp_max.default: "({0} > {1} ? {1} : {0})",
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
COMPARISONS = frozenset(
    k for k in _BINARY if str(k).split(".")[1] in ("eq", "ne", "lt", "le", "gt", "ge")
)
_LOGICAL = {aten.bitwise_and.Tensor: "&", aten.bitwise_or.Tensor: "|"}
# What else than tensors an op takes: names and what stands for them where they are left out.
_WITH_NUMBERS: dict[Any, tuple[tuple[str, ...], tuple[float, ...], str]] = {
    aten.softplus.default: (
        ("beta", "threshold"), (1.0, 20.0),
        "({0} * <beta> > <threshold> ? {0} : std::log1p(std::exp({0} * <beta>)) / <beta>)",
    ),
    aten.leaky_relu.default: (
        ("negative_slope",), (0.01,), "({0} > C(0) ? {0} : {0} * <negative_slope>)",
    ),
    aten.elu.default: (
        ("alpha", "scale", "input_scale"), (1.0, 1.0, 1.0),
        "({0} <= C(0) ? std::expm1({0} * <input_scale>) * (<alpha> * <scale>) : {0} * <scale>)",
    ),
    aten.celu.default: (
        ("alpha",), (1.0,), "({0} > C(0) ? {0} : std::expm1({0} / <alpha>) * <alpha>)",
    ),
    aten.hardtanh.default: (
        ("min_val", "max_val"), (-1.0, 1.0),
        "({0} < <min_val> ? <min_val> : ({0} > <max_val> ? <max_val> : {0}))",
    ),
}  # fmt: skip
_LERPS = (aten.lerp.Tensor, aten.lerp.Scalar)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


def by_mask(target: Any, args: list[Any]) -> bool:
    """Whether it is ``x[mask] = number``, which is a choice of each element's."""
    if target is not aten.index_put.default:
        return False
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])


def masked_put(args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The operands of ``where`` for ``x[mask] = number``."""
    x, given, value = args[:3]
    mask = given[0]
    accumulates = kwargs.get("accumulate", False) or (len(args) > 3 and args[3])
    if len(given) != 1 or accumulates or not isinstance(mask, Tensor):
        raise NotGlue("an index_put that is not by one mask")
    if mask.dtype != torch.bool or mask.shape != x.shape or value.numel() != 1:
        raise NotGlue("an index_put that is not one number by a mask of the same shape")
    return [mask, value, x]


def constant(value: Any, compute: str) -> str:
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


def compute_type(operands: Sequence[Any], out: torch.dtype | None = None) -> str:
    """The type that ATen computes in: double, float or int64_t."""
    dtypes = [x.dtype for x in operands if isinstance(x, Tensor)]
    if out is not None:
        dtypes.append(out)
    if torch.float64 in dtypes:
        return "double"
    floating = any(d.is_floating_point for d in dtypes)
    floating = floating or any(isinstance(x, float) for x in operands)
    return "float" if floating else "int64_t"


def expression(node: fx.Node, args: list[Any], out: Tensor) -> tuple[str, str]:
    """(type to compute in, expression over {0}, {1} …)."""
    target, kwargs = node.target, node.kwargs
    if target in (aten._to_copy.default, aten.clone.default):
        extra = {k for k, v in kwargs.items() if v is not None} - {
            "dtype", "device", "layout", "memory_format", "pin_memory", "non_blocking",
        }  # fmt: skip
        if extra:
            raise NotGlue(f"{target} with {sorted(extra)}")
        return compute_type(args[:1]), "{0}"
    if target in (aten.copy_.default, aten.copy.default, aten.fill.Tensor, aten.fill.Scalar):
        return compute_type(args[1:2]), "{1}"
    if target in _UNARY and len(args) == 1:
        compute = compute_type(args, out.dtype if out.dtype != torch.bool else None)
        whole = target in _ROUNDED and compute == "int64_t"
        return compute, "{0}" if whole else _UNARY[target]
    if target is aten.pow.Scalar:
        return compute_type(args[1:], out.dtype), _BINARY[target]
    if target in _BINARY:
        alpha = kwargs.get("alpha", 1)
        text = _BINARY[target]
        if set(kwargs) - {"alpha"}:
            raise NotGlue(f"{target} with {sorted(kwargs)}")
        if alpha != 1:
            text = text.replace("{1}", f"{constant(alpha, '')} * {{1}}")
        return compute_type(args[:2], out.dtype if out.dtype != torch.bool else None), text
    if target in _DIVISIONS:
        return _division(node, args, out)
    if target in _LOGICAL:
        return "int64_t", f"{{0}} {_LOGICAL[target]} {{1}}"
    if target is aten.bitwise_not.default:
        return "int64_t", "!{0}" if out.dtype == torch.bool else "~{0}"
    if target in (aten.where.self, aten.index_put.default, *FILLS):
        return compute_type(args[1:3], out.dtype), "{0} != C(0) ? {1} : {2}"
    if target is aten.gelu.default:
        if kwargs.get("approximate", "none") == "tanh":
            inner = "C(0.7978845608028654) * ({0} + C(0.044715) * {0} * {0} * {0})"
            return compute_type(args), f"C(0.5) * {{0}} * (C(1) + std::tanh({inner}))"
        return compute_type(args), "C(0.5) * {0} * (C(1) + std::erf({0} * C(0.7071067811865476)))"
    if target in _WITH_NUMBERS:
        names, defaults, text = _WITH_NUMBERS[target]
        numbers = [kwargs.get(n, args[i + 1] if len(args) > i + 1 else defaults[i])
                   for i, n in enumerate(names)]  # fmt: skip
        if not all(isinstance(x, (int, float)) for x in numbers):
            raise NotGlue(f"{target} of a dynamic value")
        for name, number in zip(names, numbers, strict=True):
            text = text.replace(f"<{name}>", constant(float(number), ""))
        return compute_type(args[:1], out.dtype), text
    if target in _LERPS:
        near = "{0} + {2} * ({1} - {0})"
        far = "{1} - ({1} - {0}) * (C(1) - {2})"
        return compute_type(args, out.dtype), f"(std::abs({{2}}) < C(0.5) ? {near} : {far})"
    if target is aten.addcmul.default:
        times = constant(kwargs.get("value", 1), "")
        return compute_type(args, out.dtype), f"{{0}} + {times} * {{1}} * {{2}}"
    if target is aten.clamp.default:
        text = "{0}"
        if len(args) > 1 and args[1] is not None:
            text = "({0} < {1} ? {1} : {0})"
        if len(args) > 2 and args[2] is not None:
            text = f"({text} > {{2}} ? {{2}} : {text})"
        return compute_type(args, out.dtype), text
    raise NotGlue(f"{target} is not among the printed ones")


def _division(node: fx.Node, args: list[Any], out: Tensor) -> tuple[str, str]:
    """(type to compute in, expression) of a division that is rounded, or of what it leaves."""
    target, function = node.target, _DIVISIONS[node.target]
    mode = node.kwargs.get("rounding_mode", args[2] if len(args) > 2 else None)
    if target is aten.div.Tensor_mode:
        if mode is None:
            return compute_type(args[:2], out.dtype), "{0} / {1}"
        function = {"trunc": "trunc_div", "floor": "floor_div"}[mode]
    compute = compute_type(args[:2], out.dtype)
    if compute == "int64_t" and (not isinstance(args[1], int) or args[1] == 0):
        raise NotGlue(f"{target} of whole numbers by what may be 0")
    return compute, f"{function}({{0}}, {{1}})" if function != "fmod" else "rest({0}, {1})"
