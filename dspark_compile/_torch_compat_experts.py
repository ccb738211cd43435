"""The part of `_torch_compat` that has Dynamo trace loops over experts whose turns depend on data.

    for e in hit.nonzero():                      turns: one for every expert
        token, slot = torch.where(mask[e])
        if token.numel() == 0: continue          branch: the one that does something

Which experts are hit, and how many tokens each has, is data: Dynamo breaks the graph at
``nonzero``, at the loop, or at the branch. Here sizes that depend on data are allowed, the loop
gets a turn for every expert there is, and a branch that would skip a turn is not taken; marks in
the graph (`ops.expert_loop`) say so. Whether that computes the same is proved later, on the graph
(`passes.raise_moe_loop`). Where it is not, `refuse` is called, and the function is traced again as
if nothing of this existed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import logging
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from dspark_compile._torch_compat import hands_graphs_to
from dspark_compile._torch_compat_loops import compilation_state

log = logging.getLogger("dspark_compile")
_refused: set[tuple[str, str]] = set()  # functions whose resumed parts are not tried either
MOST = 1024  # turns
_VIEWS = frozenset(
    {
        "squeeze", "flatten", "view", "reshape", "contiguous", "to", "long", "int", "cpu", "detach",
        "clone", "tolist", "unsqueeze",
    }
)  # fmt: skip
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and not name.startswith("__") and hasattr(operator, f"__{name}__")
    and name not in ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")
) | {operator.setitem}  # fmt: skip


@dataclasses.dataclass
class Trial:
    """What is tried in the compilation of one function.

    Attributes:
        refused: why the function is traced as it is written; None: it is not.
        said: the same, for the report; once.
        loops: how many loops were marked so far.
    """

    refused: str | None = None
    said: str | None = None
    loops: int = 0


@dataclasses.dataclass
class _Turns:
    """A ``for`` loop under way in one frame.

    Attributes:
        inst: its ``FOR_ITER``.
        iterator: Dynamo's variable.
        last: the node in front of the loop.
        before: local name → (variable, its items if it is a container).
        effects: `_effects` when it began.
        number: of the loop, once it is marked.
        turn: counts from 0.
    """

    inst: Any
    iterator: Any
    last: fx.Node
    before: dict[str, tuple[Any, Any]]
    effects: Any
    number: int | None = None
    turn: int = -1


def trial() -> Trial:
    """Of the compilation under way, however often it is traced again."""
    return compilation_state("dspark_experts", Trial)


def refuse(reason: str) -> None:
    """The function will be traced as it is written; Dynamo must be made to trace again."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    state = trial()
    state.refused = state.said = reason
    with contextlib.suppress(AttributeError, LookupError):
        code = InstructionTranslator.current_tx().f_code
        _refused.add((code.co_filename, code.co_name))
    if reason:
        log.info("traced as it is written: %s", reason)


def said() -> list[str]:
    """Why loops over experts of the function under way are traced as they are written."""
    reason = trial().said
    return [reason] if reason else []


def sizes_allowed() -> bool:
    """Whether the graph at hand may hold sizes that depend on data only because of this module."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, LookupError):
        return False
    return getattr(output, "_dspark_allowed", False)


def has_data_sizes(graph: fx.Graph) -> fx.Node | None:
    """A node of a Dynamo or ATen graph with a size that depends on data; None: there is none."""
    for node in graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        for x in value if isinstance(value, (tuple, list)) else (value,):
            sizes = x.shape if isinstance(x, torch.Tensor) else (x,)
            if any(_unbacked(n) for n in sizes):
                return node
    return None


def _unbacked(x: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return isinstance(x, (torch.SymInt, torch.SymBool, torch.SymFloat)) and bool(
        free_unbacked_symbols(x)
    )


def watch_experts() -> None:
    """Begin to look at loops that are traced for this back end."""
    from torch._dynamo import symbolic_convert
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.tensor import TensorVariable

    if getattr(OutputGraph.__init__, "_dspark", False) or sys.version_info >= (3, 15):
        return
    _wrap(OutputGraph, "__init__", _output_graph)
    _wrap(TensorVariable, "method_item", _item)
    _wrap(TensorVariable, "method_tolist", _tolist)
    for name in ("nb_index_impl", "nb_int_impl"):
        if hasattr(TensorVariable, name):
            _wrap(TensorVariable, name, _item)
    _wrap(symbolic_convert.InstructionTranslator, "run", _run)
    base = symbolic_convert.InstructionTranslatorBase
    jumps = [n for n in dis.opmap if "POP_JUMP" in n and n.endswith(("IF_TRUE", "IF_FALSE"))]
    subscript = "BINARY_SUBSCR" if "BINARY_SUBSCR" in dis.opmap else "BINARY_OP"
    wrappers = {"GET_ITER": _get_iter, "FOR_ITER": _for_iter, subscript: _subscript}
    for name in (*wrappers, *jumps):
        wrap = wrappers.get(name, _jump)
        opcode, todo = dis.opmap[name], [base]
        new = wrap(base.dispatch_table[opcode])
        while todo:
            kind = todo.pop()
            todo += kind.__subclasses__()
            kind.dispatch_table[opcode] = new


def _wrap(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    new = wrap(getattr(owner, name))
    new._dspark = True
    setattr(owner, name, new)


def _active(tx: Any) -> bool:
    return getattr(tx.output, "_dspark_watched", False) and trial().refused is None


def _output_graph(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._dspark_watched = self._dspark_allowed = False
        if getattr(self, "export", False) or trial().refused is not None:
            return
        try:
            self._dspark_watched = hands_graphs_to(self.compiler_fn, "dspark_compile.backend")
        except AttributeError:
            return
        code = self.tracing_context.traced_code[-1]
        if code.co_name.startswith("torch_dynamo_resume_in_") and any(
            code.co_filename == file and f"_in_{name}_at_" in code.co_name
            for file, name in _refused
        ):
            self._dspark_watched = False
            return
        env = self.fake_mode.shape_env
        wanted = {"allow_scalar_outputs": True, "allow_dynamic_output_shape_ops": True}
        if self._dspark_watched and any(not getattr(env, name) for name in wanted):
            self._dspark_allowed = True
            env.settings = dataclasses.replace(env.settings, **wanted)

    return __init__


def _run(original: Any) -> Any:
    """What would not have failed, or broken a graph elsewhere, without us is done without us."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import RestartAnalysis

        try:
            return original(self, *args, **kwargs)
        except RestartAnalysis:
            raise
        except Exception as error:
            tried = getattr(self.output, "_dspark_allowed", False) or trial().loops
            if not tried or trial().refused is not None:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            _again(self, reason if trial().loops else "")

    return run


# -- numbers that are known -----------------------------------------------------------------------


def _number(variable: Any) -> int | None:
    """The expert's number if ``variable`` is the tensor that a turn is for."""
    node = _node(variable)
    while node is not None and "dspark_number" not in node.meta:
        node = _viewed(node)
    return None if node is None else node.meta["dspark_number"]


def _node(variable: Any) -> fx.Node | None:
    proxy = getattr(variable, "proxy", None)
    return getattr(proxy, "node", None)


def _viewed(node: fx.Node) -> fx.Node | None:
    """What ``node`` is another view of, its elements in the same order."""
    if node.op == "call_method" and node.target in _VIEWS:
        return node.args[0]  # type: ignore[return-value]
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        value, whole = node.meta.get("example_value"), node.args[0].meta.get("example_value")
        if not isinstance(value, torch.Tensor) or not isinstance(whole, torch.Tensor):
            return None
        one = "dspark_number" in node.args[0].meta or (whole.dim() < 2 and whole.numel() == 1)
        fits = all(p == 0 for p in parts if isinstance(p, int)) and all(
            isinstance(p, int) or p == slice(None) or p is None for p in parts
        )
        keeps = one or (value.dim() == whole.dim() - 1 and not isinstance(parts[0], int))
        return node.args[0] if fits and keeps else None
    return None


def _item(original: Any) -> Any:
    def method(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable

        if not _active(tx):
            return original(self, tx, *args, **kwargs)
        number = _number(self)
        if number is not None:
            return ConstantVariable.create(number)
        if original.__name__ == "method_item" and tx.output._dspark_allowed:
            return None
        return original(self, tx, *args, **kwargs)

    method.__name__ = original.__name__
    return method


def _subscript(original: Any) -> Any:
    def BINARY_SUBSCR(self: Any, inst: Any) -> Any:
        if len(self.stack) > 1 and (inst.opname == "BINARY_SUBSCR" or inst.argrepr == "[]"):
            if _active(self):
                self.stack[-1] = _known_key(self.stack[-1].realize())
        return original(self, inst)

    return BINARY_SUBSCR


def _known_key(key: Any) -> Any:
    """A subscript with the number in place of the 0-dim tensor that a turn is for."""
    from torch._dynamo.variables import ConstantVariable, TupleVariable

    if isinstance(key, TupleVariable):
        items = [_known_key(item.realize()) for item in key.items]
        same = all(a is b for a, b in zip(items, key.items, strict=True))
        return key if same else TupleVariable(items)
    node, number = _node(key), _number(key)
    if number is None or node.meta["example_value"].dim() > 0:  # type: ignore[union-attr]
        return key
    return ConstantVariable.create(number)


def _tolist(original: Any) -> Any:
    def method_tolist(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable

        if _active(tx):
            number = _number(self)
            if number is not None and self.as_proxy().node.meta["example_value"].dim() == 0:
                return ConstantVariable.create(number)
            if _hits(self) is not None:
                return _hit_list()(self)
        return original(self, tx, *args, **kwargs)

    return method_tolist


_HitList: Any = None


def _hit_list() -> Any:
    """A list of the experts that are hit: nothing can be done with it but to go through it."""
    global _HitList
    if _HitList is None:
        from torch._dynamo.variables.base import VariableTracker

        class ExpertsHit(VariableTracker):
            def __init__(self, tensor: Any, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                self.tensor = tensor

        _HitList = ExpertsHit
    return _HitList


# -- turns ----------------------------------------------------------------------------------------


def _hits(variable: Any) -> tuple[fx.Node, int] | None:
    """(the node of the experts that are hit, how many experts there are) of a tensor of them."""
    node = _node(variable)
    value = None if node is None else node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not _unbacked(value.shape[0]):
        return None
    while node is not None and node.op != "placeholder":
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            inner = node.args[0]
            name = getattr(inner.target, "__name__", inner.target)
            if name in ("where", "nonzero", "unique") and isinstance(node.args[1], int):
                node = inner
        if name in ("nonzero", "argwhere", "where", "nonzero_static"):
            condition: Any = node.args[0] if node.args else None
            example = condition.meta.get("example_value") if condition is not None else None
            if not isinstance(example, torch.Tensor) or example.dim() != 1 or len(node.args) > 1:
                return None
            size = example.shape[0]
            bound = _bound(condition)
            if not isinstance(size, int):
                return None if bound is None else (node, bound)
            return node, size if bound is None else min(size, bound)
        if name in ("unique", "_unique2", "unique_consecutive"):
            bound = _bound(node.args[0])
            return None if bound is None else (node, bound)
        node = _viewed(node)
    return None


def _bound(node: Any) -> int | None:
    """Below what the chosen experts are of which ``node`` is computed: the experts' number."""
    seen: set[fx.Node] = set()
    bounds: set[int] = set()
    todo = [node]
    while todo:
        item = todo.pop()
        if not isinstance(item, fx.Node) or item in seen:
            continue
        seen.add(item)
        target: Any = getattr(item.target, "__name__", item.target)
        if item.target is operator.getitem and item.args[1] == 1:
            inner = item.args[0]
            of = getattr(inner.target, "__name__", inner.target)  # type: ignore[union-attr]
            if of in ("topk", "max", "sort"):
                target, item = of, inner
        if target in ("topk", "max", "sort", "argmax", "argsort"):
            value = item.args[0].meta.get("example_value")  # type: ignore[union-attr]
            position = 2 if target == "topk" else 1
            dim = item.kwargs.get("dim", item.args[position] if len(item.args) > position else -1)
            if isinstance(value, torch.Tensor) and isinstance(dim, int):
                size = value.shape[dim]
                if isinstance(size, int):
                    bounds.add(size)
            continue
        todo += item.all_input_nodes
    return bounds.pop() if len(bounds) == 1 else None


def _get_iter(original: Any) -> Any:
    def GET_ITER(self: Any, inst: Any) -> Any:
        if self.stack and _active(self) and self.output.current_tracer.parent is None:
            value = self.stack[-1].realize()
            listed = isinstance(value, _hit_list())
            found = _hits(value.tensor if listed else value)
            if found is not None and found[1] <= MOST:
                self.stack[-1] = _iterator(self, value.tensor if listed else value, found, listed)
                return None
        return original(self, inst)

    return GET_ITER


def _iterator(tx: Any, hit: Any, found: tuple[fx.Node, int], listed: bool) -> Any:
    """Dynamo's iterator with an item for every expert."""
    from torch._dynamo.variables import ConstantVariable
    from torch._dynamo.variables.base import ValueMutationNew
    from torch._dynamo.variables.builder import wrap_fx_proxy
    from torch._dynamo.variables.lists import ListIteratorVariable

    _, count = found
    example = hit.as_proxy().node.meta["example_value"]
    loop = trial().loops
    trial().loops += 1
    tx.output.create_proxy(
        "call_function",
        torch.ops.dspark.expert_loop_begin.default,
        (loop, hit.as_proxy(), count),
        {},
    )
    items: list[Any] = []
    for number in range(count):
        if listed:
            items.append(ConstantVariable.create(number))
            continue
        proxy = tx.output.create_proxy(
            "call_function",
            torch.full,
            (tuple(int(n) for n in example.shape[1:]), number),
            {"dtype": example.dtype, "device": example.device},
        )
        proxy.node.meta["dspark_number"] = number
        items.append(wrap_fx_proxy(tx, proxy))
    iterator = ListIteratorVariable(items, mutation_type=ValueMutationNew())
    iterator.dspark_loop = loop
    return iterator


def _for_iter(original: Any) -> Any:
    def FOR_ITER(self: Any, inst: Any) -> Any:
        if not self.stack or not _active(self) or self.output.current_tracer.parent is not None:
            return original(self, inst)
        iterator = self.stack[-1].realize()
        under_way: list[_Turns] = self.__dict__.setdefault("_dspark_turns", [])
        while under_way and not (under_way[-1].inst is inst and under_way[-1].iterator is iterator):
            if not any(t.iterator is iterator for t in under_way):
                break
            under_way.pop()  # it was left before its last turn: it gets no end
        if not under_way or under_way[-1].iterator is not iterator:
            number = getattr(iterator, "dspark_loop", None)
            if number is None and not _may_skip(self, inst):
                return original(self, inst)
            under_way.append(_begun(self, inst, iterator, number))
        pointer = self.instruction_pointer
        result = original(self, inst)
        if self.instruction_pointer == pointer:
            under_way[-1].turn += 1
        else:
            _ended(self, under_way.pop())
        return result

    return FOR_ITER


def _begun(tx: Any, inst: Any, iterator: Any, number: int | None) -> _Turns:
    graph = tx.output.graph
    last = next(iter(reversed(graph.nodes)), graph._root)
    return _Turns(inst, iterator, last, _locals(tx), _effects(tx), number)


@functools.lru_cache(maxsize=4096)
def _skips_known(code: Any, offset: int) -> dict[str, bool]:
    return {}


def _may_skip(tx: Any, inst: Any) -> bool:
    """Whether a branch in the body of a loop leads straight to its next turn."""
    known = _skips_known(tx.f_code, inst.offset)
    if "answer" not in known:
        first, behind = tx.indexof[inst] + 1, tx.indexof[inst.target]
        known["answer"] = any(
            "POP_JUMP" in item.opname
            and _skips(tx, item.target, inst) != _skips(tx, tx.instructions[at + 1], inst)
            for at, item in enumerate(tx.instructions[first:behind], first)
        )
    return known["answer"]


def _locals(tx: Any) -> dict[str, tuple[Any, Any]]:
    found = {}
    for name, value in tx.symbolic_locals.items():
        value = value.realize() if hasattr(value, "is_realized") and value.is_realized() else value
        items: Any = vars(value).get("items")
        items = items.values() if isinstance(items, dict) else items
        plain = isinstance(items, (list, tuple, type({}.values())))
        held = tuple(map(id, items)) if plain else None
        found[name] = (value, held)
    return found


def _effects(tx: Any) -> Any:
    effects = tx.output.side_effects
    changed = tuple(
        sorted(
            key
            for key, value in effects.id_to_variable.items()
            if getattr(getattr(value, "mutation_type", None), "is_modified", False)
        )
    )
    stored = [
        (id(owner), name, id(value))
        for owner, names in effects.store_attr_mutations.items()
        for name, value in names.items()
    ]
    return changed, tuple(stored)


def _ended(tx: Any, turns: _Turns) -> None:
    """Mark what a loop leaves behind.

    Raises:
        RestartAnalysis: that is more than tensors; the function is traced as it is written.
    """
    if turns.number is None:
        return
    from torch._dynamo.bytecode_analysis import livevars_analysis

    live = livevars_analysis(tx.instructions, turns.inst.target)
    values: dict[fx.Node, None] = {}
    for name, (value, held) in _locals(tx).items():
        if name not in live or (name in turns.before and turns.before[name] == (value, held)):
            continue
        old = turns.before.get(name)
        if old is not None and _same_constant(old[0], value):
            continue
        node = _node(value)
        if node is None or not isinstance(node.meta.get("example_value"), torch.Tensor):
            _again(tx, f"{name} changes in a loop over the experts that are hit")
        values[node] = None  # type: ignore[index]
    if _effects(tx) != turns.effects:
        _again(tx, "a loop over the experts that are hit changes an object")
    inside = set(_after(tx.output.graph, turns.last))
    for node in [n for n in tx.output.graph.nodes if n in inside]:
        values.update(dict.fromkeys(n for n in _changed(tx, node) if n not in inside))
    tx.output.graph.call_function(
        torch.ops.dspark.expert_loop_end.default, (turns.number, list(values))
    )


def _same_constant(a: Any, b: Any) -> bool:
    if not (a.is_python_constant() and b.is_python_constant()):
        return False
    try:
        return bool(a.as_python_constant() == b.as_python_constant())
    except Exception:
        return False


def _after(graph: fx.Graph, last: fx.Node) -> Iterator[fx.Node]:
    nodes = [graph._root, *graph.nodes]
    return iter(nodes[nodes.index(last) + 1 :])


def _changed(tx: Any, node: fx.Node) -> list[fx.Node]:
    """Tensors that a node writes to, and what they may be views of."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    written: list[Any] = []
    if node.op == "call_method":
        written = [node.args[0]] if name.endswith("_") and not name.endswith("__") else []
    elif node.op == "call_function":
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            _again(tx, f"a loop over the experts that are hit calls {name}")
        schema = getattr(node.target, "_schema", None)
        if node.target in _IN_PLACE or (name.endswith("_") and not name.startswith("_")):
            written = [node.args[0]]
        elif schema is not None and schema.is_mutable:
            written = list(node.all_input_nodes)
        if "out" in node.kwargs:
            written.append(node.kwargs["out"])
    found = []
    while written:
        item = written.pop()
        if isinstance(item, fx.Node) and isinstance(item.meta.get("example_value"), torch.Tensor):
            found.append(item)
            if item.op in ("call_method", "call_function") and item.args:
                written.append(item.args[0])
    return found


def _again(tx: Any, reason: str) -> None:
    """Trace the function again, as it is written.

    Raises:
        RestartAnalysis: Dynamo's own, always.
    """
    from torch._dynamo.exc import UnspecializeRestartAnalysis

    refuse(reason)
    tx.speculation_log.clear()
    raise UnspecializeRestartAnalysis(restart_reason=reason)


# -- branches -------------------------------------------------------------------------------------


def _jump(original: Any) -> Any:
    def jump(self: Any, inst: Any) -> Any:
        under_way = self.__dict__.get("_dspark_turns")
        if not under_way or not _active(self):
            return original(self, inst)
        value = self.stack[-1].realize()
        turns: _Turns = under_way[-1]
        jumps = _skips(self, inst.target, turns.inst)
        falls = _skips(self, self.instructions[self.instruction_pointer], turns.inst)
        if jumps == falls:  # neither leads straight to the next turn
            return original(self, inst)
        runs = inst.opname.endswith("TRUE") != jumps  # the condition's value for the other branch
        mark = _mark(value, runs)
        if mark is None:
            return original(self, inst)
        if turns.number is None:
            turns.number = trial().loops
            trial().loops += 1
            with self.output.graph.inserting_after(turns.last):
                self.output.graph.call_function(
                    torch.ops.dspark.expert_loop_begin.default, (turns.number, None, 0)
                )
        name, *rest = mark
        self.output.graph.call_function(
            getattr(torch.ops.dspark, name).default, (turns.number, turns.turn, *rest)
        )
        self.stack.pop()
        if falls:
            self.jump(inst)
        return None

    return jump


def _mark(value: Any, runs: bool) -> tuple[Any, ...] | None:
    """The mark that the branch was taken for ``value`` being ``runs``; None: it is known."""
    node = _node(value)
    example = None if node is None else node.meta.get("example_value")
    if isinstance(example, torch.Tensor):
        return ("expert_loop_skip", node, runs) if example.numel() == 1 else None
    known = getattr(value, "sym_num", None)
    if node is None or not _unbacked(known):
        return None
    expression = known.node.expr  # type: ignore[union-attr]
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    asked = expression.lhs - expression.rhs if isinstance(expression, sympy.Rel) else expression
    if not asked.is_polynomial(symbols[0]) or sympy.degree(asked, symbols[0]) != 1:
        return None
    truths = [bool(expression.subs(symbols[0], n)) for n in (0, 1, 2, 1 << 40)]
    if truths != [not runs, runs, runs, runs]:
        return None
    size = _size_of(node, symbols[0])
    return None if size is None else ("expert_loop_skip_empty", size)


def _size_of(node: fx.Node, symbol: Any) -> fx.Node | None:
    """The node in front of ``node`` whose value is ``symbol``."""
    seen, todo = set(), [node]
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        value = item.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return item
        todo += item.all_input_nodes
    return None


def _skips(tx: Any, inst: Any, head: Any) -> bool:
    """Whether an instruction leads to the next turn with nothing in between."""
    for _ in range(16):
        if inst is head:
            return True
        if inst is None:
            return False
        if inst.opname in ("NOP", "CACHE", "NOT_TAKEN", "EXTENDED_ARG"):
            inst = tx.instructions[tx.indexof[inst] + 1]
        elif inst.opname.startswith("JUMP_"):
            if "IF" in inst.opname:
                return False
            inst = inst.target
        else:
            return False
    return False
