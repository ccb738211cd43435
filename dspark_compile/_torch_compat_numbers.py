"""The part of `_torch_compat` that knows numbers of experts while loops over them are traced.

In a turn that is for expert e, the tensor that the loop goes to is e (`expert_number`), however it
is viewed and read. Before that: how many experts there are to go through, if a tensor holds those
that are hit (`experts_hit`), and how often each of them was chosen (`tolist`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dspark_compile._torch_compat_trial import active, again, unbacked

_VIEWS = frozenset(
    {
        "squeeze", "flatten", "view", "reshape", "contiguous", "to", "long", "int", "cpu", "detach",
        "clone", "tolist", "unsqueeze",
    }
)  # fmt: skip


def expert_number(variable: Any) -> int | None:
    """The expert's number if ``variable`` is the tensor that a turn is for."""
    node = node_of(variable)
    while node is not None and "dspark_number" not in node.meta:
        node = _viewed(node)
    return None if node is None else node.meta["dspark_number"]


def node_of(variable: Any) -> fx.Node | None:
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


def item(original: Any) -> Any:
    def method(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable

        if not active(tx):
            return original(self, tx, *args, **kwargs)
        number = expert_number(self)
        if number is not None:
            return ConstantVariable.create(number)
        if original.__name__ == "method_item" and tx.output._dspark_allowed:
            return None
        return original(self, tx, *args, **kwargs)

    method.__name__ = original.__name__
    return method


def subscript(original: Any) -> Any:
    def BINARY_SUBSCR(self: Any, inst: Any) -> Any:
        if len(self.stack) > 1 and (inst.opname == "BINARY_SUBSCR" or inst.argrepr == "[]"):
            if active(self):
                self.stack[-1] = _known_key(self.stack[-1].realize())
                held, place = self.stack[-2].realize(), _constant(self.stack[-1])
                if type(place) is int and type(held) is _NumbersArray:
                    item = held.number_at(self, place)
                    if item is not None:
                        self.popn(2)
                        return self.push(item)
        return original(self, inst)

    return BINARY_SUBSCR


def _constant(variable: Any) -> Any:
    """A number of the code's own; None: it is none, or one that looking at would make a guard."""
    from torch._dynamo.variables import ConstantVariable

    return variable.value if isinstance(variable, ConstantVariable) else None


def _known_key(key: Any) -> Any:
    """A subscript with the number in place of the 0-dim tensor that a turn is for."""
    from torch._dynamo.variables import ConstantVariable, TupleVariable

    if isinstance(key, TupleVariable):
        items = [_known_key(item.realize()) for item in key.items]
        same = all(a is b for a, b in zip(items, key.items, strict=True))
        return key if same else TupleVariable(items)
    node, number = node_of(key), expert_number(key)
    if number is None or node.meta["example_value"].dim() > 0:  # type: ignore[union-attr]
        return key
    return ConstantVariable.create(number)


def tolist(original: Any) -> Any:
    def method_tolist(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.variables import ConstantVariable

        if active(tx):
            number = expert_number(self)
            if number is not None and self.as_proxy().node.meta["example_value"].dim() == 0:
                return ConstantVariable.create(number)
            if experts_hit(self) is not None:
                return hit_list()(self)
            self, sure = _counts(self, tx)
            if not sure:  # a list's length and its last item would be others than the code's
                again(tx, "how many counts there are is data")
        return original(self, tx, *args, **kwargs)

    return method_tolist


_HitList: Any = None


def hit_list() -> Any:
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


_NumbersArray: Any = None


def numpy(original: Any) -> Any:
    """``Tensor.numpy`` whose numbers are Python's where the array is gone through, as those of a
    list are: to NumPy's own they are equal, and cut rows as well."""

    def method_numpy(self: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        if not active(tx):
            return original(self, tx, *args, **kwargs)
        numbers, sure = _counts(self, tx)
        array = original(numbers, tx, *args, **kwargs)
        value = numbers.as_proxy().node.meta.get("example_value")
        whole = isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
        if not whole or value.dim() != 1 or not isinstance(value.shape[0], int):
            return array
        listed = numbers_array()(numbers=numbers, sure=sure, **array.__dict__)
        return listed if sure else _more_turns(tx, listed)

    method_numpy.__name__ = original.__name__
    return method_numpy


def numbers_array() -> Any:
    """An array of whole numbers: going through it gives the items of ``tolist``, and so does its
    running sum."""
    global _NumbersArray
    if _NumbersArray is None:
        from torch._dynamo.variables.tensor import NumpyNdarrayVariable

        class NumbersArray(NumpyNdarrayVariable):
            _nonvar_fields = {"numbers", "listed", "sure", *NumpyNdarrayVariable._nonvar_fields}

            def __init__(
                self, numbers: Any, listed: Any = None, sure: bool = True, **kwargs: Any
            ) -> None:
                super().__init__(**kwargs)
                self.numbers, self.listed, self.sure = numbers, listed, sure

            def unpack_var_sequence(self, tx: Any, idxes: Any = None) -> Any:
                if not active(tx):
                    return super().unpack_var_sequence(tx, idxes)
                if self.listed is None:
                    self.listed = self.numbers.call_method(tx, "tolist", [], {})
                items = self.listed.unpack_var_sequence(tx)
                return items if idxes is None else [items[i] for i in idxes]

            def number_at(self, tx: Any, place: int) -> Any:
                """One of the numbers; None where it is not known which."""
                items = self.unpack_var_sequence(tx)
                known = -len(items) <= place < len(items) and (place >= 0 or self.sure)
                return items[place] if known else None

            def call_method(self, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
                if not active(tx):
                    return super().call_method(tx, name, args, kwargs)
                place = _constant(args[0]) if len(args) == 1 and not kwargs else None
                if name == "cumsum" and ((not args and not kwargs) or place == 0):
                    summed = _call(tx, "call_method", "cumsum", self.numbers.as_proxy(), 0)
                    array = summed.call_method(tx, "numpy", [], {})
                    array.sure = self.sure
                    return array if self.sure else _more_turns(tx, array)
                if name == "__getitem__" and type(place) is int:
                    item = self.number_at(tx, place)
                    if item is not None:
                        return item
                if not self.sure and name != "__iter__":
                    again(tx, "how many counts there are is data")
                return super().call_method(tx, name, args, kwargs)

        _NumbersArray = NumbersArray
    return _NumbersArray


_LENGTH_KEPT = ("cpu", "to", "long", "int", "cumsum", "detach")


def _call(tx: Any, kind: str, target: Any, *args: Any) -> Any:
    from torch._dynamo.variables.builder import wrap_fx_proxy

    return wrap_fx_proxy(tx, tx.output.create_proxy(kind, target, args, {}))


def _more_turns(tx: Any, variable: Any) -> Any:
    """``variable``, whose items are more than the code's: loops that go through it are marked, so
    that turns without rows are proved to add nothing (`counts_may_be_fewer`)."""
    tx._dspark_fewer = True
    tx.output.__dict__.setdefault("_dspark_fewer", []).append(variable)
    return variable


def counts_may_be_fewer(tx: Any) -> bool:
    """Whether the frame of ``tx`` holds a list of counts that has fewer items in the code."""
    if getattr(tx, "_dspark_fewer", False):
        return True
    known = getattr(tx.output, "_dspark_fewer", ())
    return any(value is item for value in tx.symbolic_locals.values() for item in known)


def _counts(variable: Any, tx: Any) -> tuple[Any, bool]:
    """``bincount(choice, minlength=E)`` as a tensor of E counts: that long it is where choices
    are below E, and Dynamo does not know that; other variables as they are. Without ``minlength``
    it ends at the last expert that was chosen: then False, and E counts too, the last of them 0.

    That the choices are (``choice + 1`` is not) is proved on the graph, where the counts are
    computed for choices drawn at random.
    """
    from torch._dynamo.variables.builder import wrap_fx_proxy

    node = node_of(variable)
    moves, then = node, []
    while moves is not None and moves.op == "call_method" and moves.target in _LENGTH_KEPT:
        then.append(moves)
        moves = moves.args[0]  # type: ignore[assignment]
    if moves is None or "bincount" not in (moves.target, getattr(moves.target, "__name__", "")):
        return variable, True
    value = node.meta.get("example_value")  # type: ignore[union-attr]
    if len(moves.args) > 2 or moves.kwargs.get("weights") is not None:
        return variable, True
    least = moves.kwargs.get("minlength", moves.args[1] if len(moves.args) == 2 else 0)
    bound = _bound(moves.args[0])
    if not isinstance(value, torch.Tensor) or not unbacked(value.shape[0]):
        return variable, True
    if not isinstance(least, int) or bound is None or (bound > least and least > 0):
        return variable, True
    sure, least = least > 0, least or bound
    choices = variable.as_proxy().tracer.proxy(moves.args[0])

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return tx.output.create_proxy("call_function", function, args, kwargs)

    flat: torch.Tensor = moves.args[0].meta["example_value"]  # type: ignore[union-attr]
    numbers = call(torch.arange, least, device=flat.device)
    same = call(torch.eq, call(torch.unsqueeze, choices, -1), numbers)
    counts = call(torch.sum, same, 0)
    for move in reversed(then):
        args, kwargs = fx.node.map_arg((move.args[1:], move.kwargs), counts.tracer.proxy)
        counts = tx.output.create_proxy("call_method", move.target, (counts, *args), kwargs)
    return wrap_fx_proxy(tx, counts), sure


def experts_hit(variable: Any) -> tuple[fx.Node, int] | None:
    """(the node of the experts that are hit, how many experts there are) of a tensor of them."""
    node = node_of(variable)
    value = None if node is None else node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() == 0 or not unbacked(value.shape[0]):
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
