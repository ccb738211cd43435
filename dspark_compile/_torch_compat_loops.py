"""The part of `_torch_compat` that has Dynamo trace a repeated step once.

Dynamo executes bytecode symbolically; a ``for`` loop is its ``FOR_ITER`` instruction, executed once
for each step. `watch_loops` has a function asked first. If that recognises the loop, its step is
traced as the body of a higher-order operator, the variables that the loop leaves behind are stored,
and the iterator is exhausted. If not, the instruction does what it always does.
"""

from __future__ import annotations

import contextlib
import dis
import operator as operators
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.overrides import TorchFunctionMode

from dspark_compile._torch_compat import graph_module, hands_graphs_to

_original: Callable[..., Any] | None = None


class Differs(Exception):
    """Steps are not the same; the message says in what."""


def watch_loops(asked: Callable[[Loop], bool]) -> None:
    """Have ``asked`` called before each step of a ``for`` loop over a ``range`` that Dynamo traces
    for this back end; whether it took over all steps that are left."""
    global _original
    from torch._dynamo import symbolic_convert
    from torch._dynamo.variables.lists import RangeIteratorVariable

    base = symbolic_convert.InstructionTranslatorBase
    if _original is not None:
        return
    _original = base.FOR_ITER

    def FOR_ITER(self: Any, inst: Any) -> Any:
        iterator = self.stack[-1].realize() if self.stack else None
        if isinstance(iterator, RangeIteratorVariable) and iterator.len > 1:
            try:
                mine = hands_graphs_to(self.output.compiler_fn, "dspark_compile.backend")
            except AttributeError:
                mine = False
            if mine and asked(Loop(self, inst, iterator)):
                self.stack[-1] = _exhausted(iterator)
        assert _original is not None
        return _original(self, inst)

    opcode = dis.opmap["FOR_ITER"]
    todo = [base]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.dispatch_table[opcode] is _original:
            kind.dispatch_table[opcode] = FOR_ITER


class _SelectBySymbol(TorchFunctionMode):
    """``x[:, n]`` and ``x[:, n] = y`` ask a symbolic number for its value, where ``x.select(1, n)``
    would not: while Dynamo computes shapes, the one is done as the other."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from dspark_compile.loops.indexing import assign, select

        if function in (Tensor.__getitem__, Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(p, torch.SymInt) for p in parts):
                return (select if len(args) == 2 else assign)(*args)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _selecting_by_symbols() -> Iterator[None]:
    """`_SelectBySymbol` around the calls that Dynamo computes the shapes of and that take a
    symbolic number themselves; around all of them it costs a tenth of tracing a step."""
    from torch._dynamo import utils

    original = utils.run_node

    def run_node(tracer: Any, node: Any, args: Any, kwargs: Any, module: Any) -> Any:
        if not _has_symbol(args):
            return original(tracer, node, args, kwargs, module)
        with _SelectBySymbol():
            return original(tracer, node, args, kwargs, module)

    utils.run_node = run_node
    try:
        yield
    finally:
        utils.run_node = original


def _has_symbol(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_has_symbol(x) for x in value)
    return isinstance(value, torch.SymInt)


def _exhausted(iterator: Any) -> Any:
    from torch._dynamo.variables.base import ValueMutationNew

    return type(iterator)(
        iterator.start, iterator.stop, iterator.step, 0, mutation_type=ValueMutationNew()
    )


def compilation_state(name: str, make: Callable[[], Any]) -> Any:
    """An object of the compilation of one function, the same however often Dynamo starts again."""
    context = torch._guards.CompileContext.try_get()
    if context is None:
        return make()
    if not hasattr(context, name):
        setattr(context, name, make())
    return getattr(context, name)


@dataclass(frozen=True)
class Loop:
    """A ``for`` loop over a range that Dynamo is about to make a step of."""

    tx: Any
    inst: Any
    iterator: Any

    @property
    def code(self) -> types.CodeType:
        """Of the function."""
        return self.tx.f_code

    @property
    def globals(self) -> dict[str, Any]:
        """Of the function."""
        return self.tx.f_globals

    @property
    def line(self) -> int:
        """Of the iterable."""
        positions = getattr(self.inst, "positions", None)
        return getattr(positions, "lineno", None) or self.tx.lineno

    @property
    def column(self) -> int | None:
        """Of the iterable; None: not known."""
        return getattr(getattr(self.inst, "positions", None), "col_offset", None)

    @property
    def key(self) -> tuple[Any, ...]:
        """Of this step of this loop, however often a compilation traces it again."""
        depth, tx = 0, self.tx
        while (tx := getattr(tx, "parent", None)) is not None:
            depth += 1
        return self.code, self.inst.offset, depth, self.iterator.len

    @property
    def start(self) -> int:
        """The loop's number in the next step."""
        return int(self.iterator.start)

    @property
    def stride(self) -> int:
        """From number to number."""
        return int(self.iterator.step)

    @property
    def count(self) -> int:
        """Steps that are left."""
        return int(self.iterator.len)

    def get(self, name: str) -> Any:
        """The variable ``name``; None: it has no value."""
        from torch._dynamo.exc import Unsupported

        value = self.tx.symbolic_locals.get(name)
        if value is not None and name in self.tx.cell_and_freevars():
            try:
                value = self.tx.output.side_effects.load_cell(value)
            except (Unsupported, AssertionError):
                return None
        if value is None or type(value).__name__ in ("DeletedVariable", "NullVariable"):
            return None
        return value.realize()

    def kind(self, name: str) -> str | None:
        """``"tensor"``, ``"number"``, ``"list"`` or ``"other"``; None: it has no value."""
        value = self.get(name)
        if value is None:
            return None
        if value.is_tensor() if hasattr(value, "is_tensor") else _is_tensor(value):
            return "tensor"
        if value.is_python_constant():
            return "number" if type(value.as_python_constant()) is int else _of_constant(value)
        if type(value).__name__ == "SymNodeVariable" and value.python_type() is int:
            return "number"
        return "list" if type(value).__name__ == "ListVariable" else "other"

    def store(self, name: str, value: Any) -> None:
        """Set the variable ``name``."""
        if name in self.tx.cell_and_freevars():
            self.tx.output.side_effects.store_cell(self.tx.symbolic_locals[name], value)
        else:
            self.tx.symbolic_locals[name] = value

    def constant(self, value: int) -> Any:
        """A Python number, as a variable."""
        from torch._dynamo.variables import ConstantVariable

        return ConstantVariable.create(value)

    def run(
        self,
        function: types.FunctionType,
        arguments: list[Any],
        operator: Any,
    ) -> tuple[list[Any], torch.fx.GraphModule]:
        """Trace ``function(repeat, *arguments)``; the variables that it returns, and the step.

        Raises:
            Differs: steps are not the same, or Dynamo cannot trace one; the message says why.
        """
        from torch._dynamo import exc
        from torch._dynamo.variables import UserFunctionVariable

        repeat = _repeat(self.tx, operator, self.count)
        try:
            with _selecting_by_symbols():
                made = self.tx.inline_user_function_return(
                    UserFunctionVariable(function), [repeat, *arguments], {}
                )
        except (exc.RestartAnalysis, Differs):
            raise
        except Exception as error:
            raise Differs(_first_line(error)) from error
        return list(made.items), repeat.step

    def restart(self) -> None:
        """Trace the function again from its beginning.

        Raises:
            Exception: Dynamo's own, always.
        """
        from torch._dynamo.exc import UnspecializeRestartAnalysis

        raise UnspecializeRestartAnalysis(restart_reason="a loop is not one step repeated")


def _is_tensor(value: Any) -> bool:
    return type(value).__name__ == "TensorVariable"


def _of_constant(value: Any) -> str:
    return "list" if isinstance(value.as_python_constant(), list) else "other"


def _first_line(error: BaseException) -> str:
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((x for x in text if x.startswith("Explanation:")), text[0] if text else "")
    return f"{type(error).__name__}: {said.removeprefix('Explanation:').strip()}"


def _repeat(tx: Any, operator: Any, count: int) -> Any:
    """The variable for ``repeat(step, carried) -> (carried, last, made)``."""
    from torch._dynamo.variables.higher_order_ops import TorchHigherOrderOperatorVariable

    global _Repeat
    if _Repeat is None:
        _Repeat = type(
            "DecodeLoopVariable",
            (TorchHigherOrderOperatorVariable,),
            {
                "_HOP_NAME": "dspark::decode_loop",
                "_ALLOW_FALLBACK_TO_EAGER": True,
                "call_function": _call,
                "__module__": __name__,
            },
        )
    variable = _Repeat(operator)
    variable.count, variable.step = count, None
    return variable


_Repeat: Any = None


def _call(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    from torch._dynamo.variables import BuiltinVariable, ConstantVariable
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.higher_order_ops import make_attr, speculate_subgraph

    step, carried = args
    before = list(carried.items)
    env = tx.output.fake_mode.shape_env
    known = len(env.guards)
    with _numbers(tx, before) as (inner, symbols):
        (output, _), graph, lifted = speculate_subgraph(
            tx, step, inner, {}, "dspark::decode_loop", source_target=self.value,
            set_subgraph_inputs="manual",
        )  # fmt: skip
    new, last, made = output.items
    fake = tx.output.fake_mode
    if torch.is_grad_enabled() and any(
        _example(p) is not None and _example(p).requires_grad for p in (*before, *lifted)
    ):
        raise Differs("gradients are needed: run under torch.no_grad() or inference_mode()")
    names = step.get_code().co_varnames
    _no_conditions(env, known, symbols, before, new.items, names, self.count)
    results = [
        _carried(old, item, symbol, name, self.count)
        for old, item, symbol, name in zip(before, new.items, symbols, names, strict=False)
    ]
    with fake, torch.no_grad():
        example = (
            tuple(_fresh(r) for r in results),
            tuple(_fresh(_tensor(x)) for x in last.items),
            tuple(
                tuple(_fresh(_tensor(x), self.count) for x in several.items)
                for several in made.items
            ),
        )
    module = graph_module(dict(tx.output.nn_modules), graph)
    self.step = module
    name = tx.output.install_subgraph("decode_step", module)
    operands = tuple(x.as_proxy() for x in before)
    proxy = tx.output.create_proxy(
        "call_function", self.value,
        args=(make_attr(tx, name), operands, tuple(lifted), self.count), kwargs={},
    )  # fmt: skip
    whole = wrap_fx_proxy(tx=tx, proxy=proxy, example_value=example)
    # Numbers are known: Dynamo goes on with those.
    for i, r in enumerate(results):
        if isinstance(r, int):
            more = [before[i], ConstantVariable.create(r)]
            whole.items[0].items[i] = BuiltinVariable(operators.add).call_function(tx, more, {})
    return whole


@contextlib.contextmanager
def _numbers(tx: Any, before: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """What is carried, Python numbers as symbols that begin as what they are; and the symbols."""
    from torch._dynamo.source import LocalSource
    from torch._dynamo.variables import SymNodeVariable
    from torch._dynamo.variables.higher_order_ops import discard_graph_changes

    env = tx.output.fake_mode.shape_env
    inner: list[Any] = []
    symbols: list[Any] = []
    with discard_graph_changes(tx):
        for x in before:
            symbols.append(None)
            if _is_number(x):
                constant = x.is_python_constant()
                value = int(x.as_python_constant() if constant else x.sym_num.node.hint)
                origin = LocalSource(f"__dspark_number_{len(env.var_to_range)}")
                symbols[-1] = env.create_unspecified_symbol(
                    value, source=origin, dynamic_dim=DimDynamic.DYNAMIC
                )
                number = env.create_symintnode(symbols[-1], hint=value, source=origin)
                proxy = tx.output.current_tracer.create_graph_input("number", int, number)
                inner.append(SymNodeVariable.create(tx, proxy, number))
            else:
                inner.append(x)
    yield inner, symbols


def _is_number(x: Any) -> bool:
    return x.is_python_constant() or type(x).__name__ == "SymNodeVariable"


def _no_conditions(
    env: Any, known: int, symbols: list[Any], before: list[Any], after: list[Any],
    names: Sequence[str], count: int,
) -> None:  # fmt: skip
    """Tracing a step with a number asks `env` what holds of it. All of that must hold in all steps.

    Raises:
        Differs: it does not, or nobody can say.
    """
    mine = {s for s in symbols if s is not None}
    step = sympy.Symbol("step", integer=True, nonnegative=True)
    values, spelt = {}, {}
    for symbol, old, new, name in zip(symbols, before, after, names, strict=False):
        if symbol is None:
            continue
        spelt[symbol] = sympy.Symbol(name)
        change = sympy.nan if new.is_python_constant() else _expression(new) - symbol
        if change.is_Integer:
            constant = old.is_python_constant()
            first = sympy.Integer(old.as_python_constant()) if constant else _expression(old)
            values[symbol] = first + change * step
    kept = env.guards[:known]
    for guard in env.guards[known:]:
        asked = guard.expr.free_symbols & mine
        if not asked:
            kept.append(guard)
        elif not asked <= set(values) or not _always(guard.expr.xreplace(values), step, count, env):
            said = guard.expr.xreplace(spelt)
            raise Differs(f"its steps depend on a number: {said} holds in some of them")
    env.guards[:] = kept


def _expression(variable: Any) -> Any:
    return variable.as_proxy().node.meta["example_value"].node.expr


def _always(condition: Any, step: sympy.Symbol, count: int, env: Any) -> bool:
    """Whether a condition holds for ``step`` = 0 … ``count`` - 1. Where dynamic sizes come in,
    it does for those at hand, and `env` asks again the next time."""
    if isinstance(condition, sympy.And):
        return all(_always(x, step, count, env) for x in condition.args)
    steps = range(count)
    if isinstance(condition, (sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq)):
        difference = sympy.expand(condition.lhs - condition.rhs)
        if difference.is_polynomial(step) and sympy.degree(difference, step) <= 1:
            steps = range(0, count, max(1, count - 1))  # it only rises, or only falls
    return len(steps) <= 4096 and all(_holds(condition.subs(step, k), env) for k in steps)


def _holds(condition: Any, env: Any) -> bool:
    if condition.free_symbols:
        return bool(env.evaluate_expr(condition))
    return bool(condition == True)  # noqa: E712


def _example(x: Any) -> Any:
    if not isinstance(x, torch.fx.Proxy):
        if _is_number(x):
            return None
        x = x.as_proxy()
    value = x.node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _tensor(x: Any) -> Any:
    value = _example(x) if not x.is_python_constant() else None
    if value is None:
        raise Differs("what is read of a step behind the loop is not a tensor")
    return value


def _carried(old: Any, new: Any, symbol: Any, name: str, count: int) -> Any:
    """The example of what is carried out of the loop: a tensor, or by how much a number changed.

    Raises:
        Differs: it is not what it was before.
    """
    if _is_number(old):
        if new.is_python_constant():
            raise Differs(f"{name} is set to {new.as_python_constant()}")
        step = _expression(new) - symbol
        if not step.is_Integer:
            raise Differs(f"{name} does not change by the same amount in every step")
        return count * int(step)
    value, was = _example(new) if not new.is_python_constant() else None, _example(old)
    if value is None:
        raise Differs(f"{name} is a tensor before a step and none after it")
    for what in ("shape", "dtype", "device"):
        a, b = getattr(was, what), getattr(value, what)
        if a != b:
            a, b = (list(a), list(b)) if what == "shape" else (a, b)
            raise Differs(f"the {what} of {name} changes from {a} to {b}")
    return value


def _fresh(x: Any, count: int | None = None) -> Any:
    if isinstance(x, int):
        return x
    return torch.empty(x.shape if count is None else (count, *x.shape), dtype=x.dtype,
                       device=x.device)  # fmt: skip
