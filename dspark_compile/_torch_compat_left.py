"""The part of `_torch_compat` that says what a traced loop over experts leaves behind.

All of it must be tensors, or tensors appended to lists that are only concatenated: a counter of
turns, an attribute, a dictionary would tell how many turns there were, which is another number in
the code than in the trace. The end mark (`ops.expert_loop`) names the tensors; whether they are
what the code computes is proved on the graph.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dspark_compile._torch_compat_numbers import node_of
from dspark_compile._torch_compat_trial import again

_JOINS = ("cat", "concat", "concatenate")
_SILENT = ("CACHE", "NOP", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "TO_BOOL", "NOT_TAKEN")
_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in dir(operator)
    if name.startswith("i") and not name.startswith("__") and hasattr(operator, f"__{name}__")
    and name not in ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")
) | {operator.setitem}  # fmt: skip


@dataclasses.dataclass
class Turns:
    """A ``for`` loop under way in one frame.

    Attributes:
        inst: its ``FOR_ITER``.
        iterator: Dynamo's variable.
        last: the node in front of the loop.
        before: local name → (variable, its items if it is a container).
        effects: `effects_of` when it began.
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


def locals_of(tx: Any) -> dict[str, tuple[Any, Any]]:
    found = {}
    for name, value in tx.symbolic_locals.items():
        value = value.realize() if hasattr(value, "is_realized") and value.is_realized() else value
        items: Any = vars(value).get("items")
        items = items.values() if isinstance(items, dict) else items
        plain = isinstance(items, (list, tuple, type({}.values())))
        held = tuple(map(id, items)) if plain else None
        found[name] = (value, held)
    return found


def effects_of(tx: Any) -> Any:
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


def end(tx: Any, turns: Turns) -> None:
    """Mark what a loop leaves behind.

    Raises:
        RestartAnalysis: that is more than tensors; the function is traced as it is written.
    """
    if turns.number is None:
        return
    live = _read_later(tx, turns.inst.target)
    values: dict[fx.Node, None] = {}
    for name, (value, held) in locals_of(tx).items():
        if name not in live or (name in turns.before and _same(turns.before[name], value, held)):
            continue
        old = turns.before.get(name)
        if old is not None and _same_constant(old[0], value):
            continue
        joined = _appended(tx, name, old, value, turns.inst.target)
        if joined is not None:
            values.update(dict.fromkeys(joined))
            continue
        node = node_of(value)
        if node is None or not isinstance(node.meta.get("example_value"), torch.Tensor):
            again(tx, f"{name} changes in a loop over the experts that are hit")
        values[node] = None  # type: ignore[index]
    if effects_of(tx) != turns.effects:
        again(tx, "a loop over the experts that are hit changes an object")
    inside = set(_after(tx.output.graph, turns.last))
    for node in [n for n in tx.output.graph.nodes if n in inside]:
        values.update(dict.fromkeys(n for n in _changed(tx, node) if n not in inside))
    tx.output.graph.call_function(
        torch.ops.dspark.expert_loop_end.default, (turns.number, list(values))
    )


def _read_later(tx: Any, start: Any) -> set[str]:
    """Names that may be read from ``start`` on before they are given another value. Dynamo's own
    analysis takes what every turn of a loop around it sets anew for such a name."""
    from torch._dynamo.bytecode_analysis import livevars_analysis

    first = tx.indexof[start]
    live: dict[int, set[str]] = {}
    before: dict[int, list[int]] = {}
    following = [_following(tx, at) for at in range(len(tx.instructions))]
    for at, places in enumerate(following):
        for place in places:
            before.setdefault(place, []).append(at)
    todo = list(range(len(tx.instructions)))
    while todo:
        at = todo.pop()
        inst = tx.instructions[at]
        after = set().union(*(live.get(place, set()) for place in following[at]))
        names = inst.argval if isinstance(inst.argval, tuple) else (inst.argval,)
        named = {n for n in names if isinstance(n, str)}
        if inst.opname in ("STORE_FAST", "STORE_FAST_STORE_FAST"):
            after -= named
        elif any(part in inst.opname for part in ("FAST", "DEREF", "CLOSURE", "CELL")):
            after |= named
        if live.get(at) != after:
            live[at] = after
            todo += before.get(at, [])
    return live.get(first, set()) & set(livevars_analysis(tx.instructions, start))


def _following(tx: Any, at: int) -> list[int]:
    """Where the code may go from an instruction."""
    inst, found = tx.instructions[at], []
    name = inst.opname
    ends = name.startswith(("RETURN_", "RAISE_", "RERAISE"))
    if not ends and not (name.startswith("JUMP_") and "IF" not in name):
        found += [at + 1] if at + 1 < len(tx.instructions) else []
    for target in (inst.target, getattr(inst.exn_tab_entry, "target", None)):
        if target is not None and target in tx.indexof:
            found.append(tx.indexof[target])
    return found


def _same(old: tuple[Any, Any], value: Any, held: Any) -> bool:
    """Whether a name stands for what it stood for; what nobody had looked at yet may have been
    looked at since."""
    from torch._dynamo.variables.lazy import LazyVariableTracker

    if isinstance(old[0], LazyVariableTracker) and old[0].is_realized():
        return held is None and old[0].realize() is value
    return old == (value, held)


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
            again(tx, f"a loop over the experts that are hit calls {name}")
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


def _appended(tx: Any, name: str, old: Any, value: Any, behind: Any) -> list[fx.Node] | None:
    """The tensors that the loop appended to the list ``name``; None: it did something else with
    it, or the code behind the loop does more with it than to join its items."""
    from torch._dynamo.variables.lists import ListVariable

    if old is None or old[0] is not value or not isinstance(value, ListVariable):
        return None
    known = old[1] or ()
    if tuple(map(id, value.items))[: len(known)] != known or known:
        return None
    nodes = [node_of(item) for item in value.items]
    if any(n is None or not isinstance(n.meta.get("example_value"), torch.Tensor) for n in nodes):
        return None
    same = [n for n, (v, _) in locals_of(tx).items() if v is value]
    return nodes if same == [name] and _only_joined(tx, name, behind) else None  # type: ignore[return-value]


def _only_joined(tx: Any, name: str, behind: Any) -> bool:
    """Whether the code from ``behind`` on only concatenates the list ``name``, or asks whether it
    is empty, as it is in no loop over experts that tokens chose.

    All ways through the code are followed, each as far as the name stands for the list: behind
    ``outs = torch.cat(outs)`` it is another thing's.
    """
    place, todo, seen = tx.indexof, [tx.indexof[behind]], set()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        item = tx.instructions[at]
        for what, named in _locals(item):
            if named != name:
                continue
            if what != "LOAD":
                break
            if not _joined(tx.instructions, at):
                return False
        else:
            todo += _next(tx.instructions, place, at)
    return True


def _locals(item: Any) -> list[tuple[str, str]]:
    """What an instruction does with locals, in order: ``LOAD``, ``STORE`` or ``DELETE``, and of
    which. Newer versions of Python have instructions for two."""
    if not any(part in item.opname for part in ("_FAST", "_DEREF", "_CLOSURE", "_NAME")):
        return []
    kinds = [part for part in item.opname.split("_") if part in ("LOAD", "STORE", "DELETE")]
    names = item.argval if isinstance(item.argval, tuple) else (item.argval,)
    return list(zip(kinds, names, strict=False))


def _next(instructions: list[Any], place: dict[Any, int], at: int) -> list[int]:
    """Where the code may go on behind instruction ``at``."""
    item, following = instructions[at], []
    if item.target is not None:
        following.append(place[item.target])
    handler = getattr(item, "exn_tab_entry", None)
    if handler is not None:
        following.append(place[handler.target])
    leaves = item.opname.startswith(("RETURN_", "RAISE_", "RERAISE"))
    jumps = item.opname.startswith("JUMP_") and "IF" not in item.opname
    if not leaves and not jumps and at + 1 < len(instructions):
        following.append(at + 1)
    return following


def _joined(instructions: list[Any], at: int) -> bool:
    """Whether the list that instruction ``at`` loads is concatenated, or asked whether it is empty,
    and nothing else."""
    if instructions[at].opname not in ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK"):
        return False
    before = [i for i in instructions[:at] if i.opname not in _SILENT]
    after = [i.opname for i in instructions[at + 1 : at + 16] if i.opname not in _SILENT]
    if after and "POP_JUMP" in after[0]:
        return True
    if not before or not before[-1].opname.startswith("LOAD_"):
        return False
    called = before[-1].argval
    called = called[-1] if isinstance(called, tuple) else called
    if called in _JOINS:
        return True
    if called == "len" and after and after[0].startswith("CALL"):
        rest = after[1:]
        while rest and rest[0] in ("LOAD_CONST", "LOAD_SMALL_INT", "COMPARE_OP"):
            rest = rest[1:]
        return bool(rest) and "POP_JUMP" in rest[0]
    return False
