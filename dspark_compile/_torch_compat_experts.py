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

import dis
import functools
import operator
import sys
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from dspark_compile._torch_compat_left import Turns, effects_of, end, locals_of
from dspark_compile._torch_compat_numbers import (
    counts_may_be_fewer,
    experts_hit,
    hit_list,
    item,
    node_of,
    numpy,
    subscript,
    tolist,
)
from dspark_compile._torch_compat_trial import (
    active,
    has_data_sizes,
    output_graph,
    refuse,
    run_wrapper,
    said,
    sizes_allowed,
    trial,
    unbacked,
)

__all__ = ["has_data_sizes", "refuse", "said", "sizes_allowed", "watch_experts"]

MOST = 1024  # turns


def watch_experts() -> None:
    """Begin to look at loops that are traced for this back end."""
    from torch._dynamo import symbolic_convert
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.variables.tensor import TensorVariable

    if getattr(OutputGraph.__init__, "_dspark", False) or sys.version_info >= (3, 15):
        return
    _wrap(OutputGraph, "__init__", output_graph)
    _wrap(TensorVariable, "method_item", item)
    _wrap(TensorVariable, "method_tolist", tolist)
    _wrap(TensorVariable, "method_numpy", numpy)
    for name in ("nb_index_impl", "nb_int_impl"):
        if hasattr(TensorVariable, name):
            _wrap(TensorVariable, name, item)
    _wrap(symbolic_convert.InstructionTranslator, "run", run_wrapper)
    base = symbolic_convert.InstructionTranslatorBase
    jumps = [n for n in dis.opmap if "POP_JUMP" in n and n.endswith(("IF_TRUE", "IF_FALSE"))]
    name_of_subscript = "BINARY_SUBSCR" if "BINARY_SUBSCR" in dis.opmap else "BINARY_OP"
    wrappers = {"GET_ITER": _get_iter, "FOR_ITER": _for_iter, name_of_subscript: subscript}
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


# -- turns ----------------------------------------------------------------------------------------


def _get_iter(original: Any) -> Any:
    def GET_ITER(self: Any, inst: Any) -> Any:
        if self.stack and active(self) and self.output.current_tracer.parent is None:
            value = self.stack[-1].realize()
            listed = isinstance(value, hit_list())
            found = experts_hit(value.tensor if listed else value)
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
    from torch._dynamo.variables.lists import ListIteratorVariable, ListVariable

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
            item: Any = ConstantVariable.create(number)
            for _ in example.shape[1:]:  # a list of rows, of one number each
                item = ListVariable([item], mutation_type=ValueMutationNew())
            items.append(item)
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
        if not self.stack or not active(self) or self.output.current_tracer.parent is not None:
            return original(self, inst)
        iterator = self.stack[-1].realize()
        under_way: list[Turns] = self.__dict__.setdefault("_dspark_turns", [])
        while under_way and not (under_way[-1].inst is inst and under_way[-1].iterator is iterator):
            if not any(t.iterator is iterator for t in under_way):
                break
            under_way.pop()  # it was left before its last turn: it gets no end
        if not under_way or under_way[-1].iterator is not iterator:
            number = getattr(iterator, "dspark_loop", None)
            fewer = counts_may_be_fewer(self)
            if number is None and not fewer and not _may_skip(self, inst):
                return original(self, inst)
            under_way.append(_begun(self, inst, iterator, number))
            if number is None and fewer:
                _mark_begin(self, under_way[-1])
        pointer = self.instruction_pointer
        result = original(self, inst)
        if self.instruction_pointer == pointer:
            under_way[-1].turn += 1
        else:
            end(self, under_way.pop())
        return result

    return FOR_ITER


def _begun(tx: Any, inst: Any, iterator: Any, number: int | None) -> Turns:
    graph = tx.output.graph
    last = next(iter(reversed(graph.nodes)), graph._root)
    return Turns(inst, iterator, last, locals_of(tx), effects_of(tx), number)


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


# -- branches -------------------------------------------------------------------------------------


def _jump(original: Any) -> Any:
    def jump(self: Any, inst: Any) -> Any:
        under_way = self.__dict__.get("_dspark_turns")
        if not under_way or not active(self):
            return original(self, inst)
        value = self.stack[-1].realize()
        turns: Turns = under_way[-1]
        jumps = _skips(self, inst.target, turns.inst)
        falls = _skips(self, self.instructions[self.instruction_pointer], turns.inst)
        if jumps == falls:  # neither leads straight to the next turn
            return original(self, inst)
        runs = inst.opname.endswith("TRUE") != jumps  # the condition's value for the other branch
        mark = _mark(value, runs)
        if mark is None:
            return original(self, inst)
        if turns.number is None:
            _mark_begin(self, turns)
        name, *rest = mark
        self.output.graph.call_function(
            getattr(torch.ops.dspark, name).default, (turns.number, turns.turn, *rest)
        )
        self.stack.pop()
        if falls:
            self.jump(inst)
        return None

    return jump


def _mark_begin(tx: Any, turns: Turns) -> None:
    """Mark the beginning of a loop through what the code goes through, all of it."""
    turns.number = trial().loops
    trial().loops += 1
    with tx.output.graph.inserting_after(turns.last):
        tx.output.graph.call_function(
            torch.ops.dspark.expert_loop_begin.default, (turns.number, None, 0)
        )


def _mark(value: Any, runs: bool) -> tuple[Any, ...] | None:
    """The mark that the branch was taken for ``value`` being ``runs``; None: it is known."""
    node = node_of(value)
    example = None if node is None else node.meta.get("example_value")
    if isinstance(example, torch.Tensor):
        return ("expert_loop_skip", node, runs) if example.numel() == 1 else None
    known = getattr(value, "sym_num", None)
    if node is None or not unbacked(known):
        return None
    expression = known.node.expr  # type: ignore[union-attr]
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        size = _difference(node, runs)
        return None if size is None else ("expert_loop_skip_empty", size)
    asked = expression.lhs - expression.rhs if isinstance(expression, sympy.Rel) else expression
    if not asked.is_polynomial(symbols[0]) or sympy.degree(asked, symbols[0]) != 1:
        return None
    truths = [bool(expression.subs(symbols[0], n)) for n in (0, 1, 2, 1 << 40)]
    if truths != [not runs, runs, runs, runs]:
        return None
    size = _size_of(node, symbols[0])
    return None if size is None else ("expert_loop_skip_empty", size)


def _difference(node: fx.Node, runs: bool) -> fx.Node | None:
    """``end - start`` of a branch that is taken where two bounds differ."""
    if node.target is not (operator.ne if runs else operator.eq) or len(node.args) != 2:
        return None
    start, end = node.args
    values = [x.meta.get("example_value") if isinstance(x, fx.Node) else x for x in (start, end)]
    if any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in values):
        return None
    with node.graph.inserting_after(node):
        size = node.graph.call_function(operator.sub, (end, start))
    size.meta["example_value"] = values[1] - values[0]
    return size


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
