"""Python numbers that a loop counts on with, as tensors.

Dynamo traces the step of a loop with such a number as an unknown integer. The graph that is
compiled must be the same in every step, so the number becomes an int64 tensor without dimensions,
and so does what is computed from it; where it selects rows of a tensor, rows are selected by data::

    torch.tensor([pos])            →  pos.reshape(1)
    torch.arange(pos, pos + 1)     →  torch.arange(1) + pos
    cache[:, :, pos : pos + 1] = k →  cache.index_copy_(2, pos + torch.arange(1), k)
    x[:, pos]                      →  x.index_select(1, pos).squeeze(1)

A number that decides a size makes steps that differ: `NotData`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


class NotData(Exception):
    """A number goes into something that is not computed from data; the message says what."""


# Functions of numbers that mean the same for tensors.
_ARITHMETIC: frozenset[Any] = frozenset(
    {
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg,
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
        operator.iadd, operator.isub, operator.imul,
    }
)  # fmt: skip
# Ops that take a number or a tensor without dimensions alike, in place of an operand.
_OPERANDS = frozenset(
    {"add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "add_", "sub_", "mul_", "fill_"}
)
_IN_PLACE_OPERATORS: frozenset[Any] = frozenset(
    {
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
        operator.ilshift, operator.irshift,
    }
)  # fmt: skip
# What may return a view of its first argument.
_VIEWS = frozenset(
    {
        "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "expand_as",
        "getitem", "narrow", "select", "t", "flatten", "unflatten", "chunk", "split", "unbind",
        "contiguous", "to", "type_as", "detach", "view_as", "movedim", "swapaxes", "diagonal",
        "tensor_split", "unfold", "real", "imag", "float", "int", "long", "half", "bfloat16", "T",
        "mT", "getattr", "split_with_sizes", "reshape_as", "cpu", "cuda",
    }
)  # fmt: skip
_TENSORS: frozenset[Any] = frozenset({torch.tensor, torch.as_tensor, torch._refs.tensor})


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def writes_to_first(node: fx.Node) -> bool:
    """Whether a call in a Dynamo graph writes to its first argument."""
    target, name = node.target, _name(node.target)
    if target is operator.setitem:
        return True
    if target in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__")


def _expression(x: Any) -> Any:
    """Of a size or number, as sympy."""
    if isinstance(x, fx.Node):
        x = x.meta.get("example_value")
    return x.node.expr if isinstance(x, torch.SymInt) else x


def _distance(start: Any, stop: Any) -> int | None:
    """``stop - start`` where it is a constant."""
    difference = _expression(stop) - _expression(start)
    return int(difference) if getattr(difference, "is_number", True) else None


def numbers_to_tensors(module: fx.GraphModule, which: list[int], device: torch.device) -> None:
    """Rewrite ``module``, a Dynamo graph, in place: inputs number ``which`` become tensors.

    Raises:
        NotData: see the module's docstring.
    """
    _Rewriter(module.graph, device).run(which)
    module.graph.lint()
    module.recompile()


def check_numbers(step: fx.GraphModule) -> None:
    """Whether all numbers among the inputs of a step can become tensors.

    Raises:
        NotData: one cannot.
    """
    which = [
        i for i, n in enumerate(n for n in step.graph.nodes if n.op == "placeholder")
        if isinstance(n.meta["example_value"], torch.SymInt) and n.name.startswith("number")
    ]  # fmt: skip
    if not which:
        return
    graph = fx.Graph()
    graph.output(graph.graph_copy(step.graph, {}))
    _Rewriter(graph, torch.device("cpu")).run(which)


class _Rewriter:
    def __init__(self, graph: fx.Graph, device: torch.device) -> None:
        self.graph, self.device = graph, device
        self.numbers: set[fx.Node] = set()

    def run(self, which: list[int]) -> None:
        places = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.numbers = {places[i] for i in which}
        for node in list(self.graph.nodes):
            if node in self.numbers:
                node.type = None
                continue
            if node.op == "output" or not any(x in self.numbers for x in node.all_input_nodes):
                continue
            if node.op not in ("call_function", "call_method"):
                raise NotData(f"a number that is counted on with goes into {node.name}")
            self._node(node)

    def _node(self, node: fx.Node) -> None:
        target, name = node.target, _name(node.target)
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor):
            if target in _ARITHMETIC and isinstance(value, (torch.SymInt, torch.SymBool)):
                self.numbers.add(node)
                return None
        if target is operator.setitem:
            return self._setitem(node)
        if target is operator.getitem:
            return None if self._written(node) else self._getitem(node)
        if target in _TENSORS:
            return self._tensor(node)
        if name == "arange":
            return self._arange(node)
        if name in ("full", "new_full", "full_like"):
            return self._full(node)
        if name in ("select", "narrow") and self._only(node, 2):
            return None if self._written(node) else self._select(node)
        if isinstance(value, Tensor) and (target in _ARITHMETIC or name in _OPERANDS):
            if not self._nested(node):
                return None
        raise NotData(
            f"a number that is counted on with goes into {name}: its steps would be other graphs"
        )

    def _only(self, node: fx.Node, at: int) -> bool:
        """Whether argument ``at`` is the only one with a number in it."""
        return len(node.args) > at and not any(
            x in self.numbers for i, a in enumerate(node.args) if i != at for x in _nodes_in(a)
        )

    def _nested(self, node: fx.Node) -> bool:
        return any(
            x in self.numbers
            for a in (*node.args, *node.kwargs.values())
            if not isinstance(a, fx.Node)
            for x in _nodes_in(a)
        )

    def _call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        if isinstance(target, str):
            return self.graph.call_method(target, args, kwargs)
        return self.graph.call_function(target, args, kwargs)

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _tensor(self, node: fx.Node) -> None:
        data = node.args[0]
        with self.graph.inserting_before(node):
            made = self._stacked(data)
            kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device") and v}
            if set(node.kwargs) - {"dtype", "device", "requires_grad", "pin_memory"}:
                raise NotData(f"it goes into torch.tensor with {sorted(node.kwargs)}")
            if kwargs:
                made = self._call("to", made, **kwargs)
            # A tensor of its own, as torch.tensor makes one.
            self._replace(node, self._call("clone", made))

    def _stacked(self, data: Any) -> fx.Node:
        if isinstance(data, (list, tuple)):
            if len(data) == 1:
                return self._call("unsqueeze", self._stacked(data[0]), 0)
            return self._call(torch.stack, [self._stacked(x) for x in data])
        if isinstance(data, fx.Node):
            if data in self.numbers:
                return data
            raise NotData("torch.tensor mixes numbers with others")
        if not isinstance(data, int) or isinstance(data, bool):
            raise NotData(f"torch.tensor mixes numbers with {data!r}")
        return self._call(torch.full, (), data, dtype=torch.int64, device=self.device)

    def _arange(self, node: fx.Node) -> None:
        args = list(node.args)
        if len(args) == 1:
            args = [0, *args]
        step = args[2] if len(args) > 2 else 1
        if step != 1 or node.kwargs.get("out") is not None or "end" in node.kwargs:
            raise NotData("it goes into an arange with a step")
        size = _distance(args[0], args[1])
        if size is None:
            raise NotData("it decides how long an arange is: its steps would be other graphs")
        kwargs = {k: v for k, v in node.kwargs.items() if k in ("dtype", "device") and v}
        with self.graph.inserting_before(node):
            made = self._call(torch.arange, size, **kwargs)
            start = args[0]
            if isinstance(start, fx.Node) and "device" in kwargs:
                start = self._call("to", start, kwargs["device"])
            self._replace(node, self._call(torch.add, made, start))

    def _full(self, node: fx.Node) -> None:
        # A fill is an operand; a size is not.
        if not self._only(node, 2 if _name(node.target) == "new_full" else 1):
            raise NotData(f"it decides a size, in {_name(node.target)}")
        at = 2 if _name(node.target) == "new_full" else 1
        fill = node.args[at]
        kwargs = dict(node.kwargs)
        if _name(node.target) == "full":
            kwargs.setdefault("dtype", torch.int64)
        args = [0 if i == at else a for i, a in enumerate(node.args)]
        with self.graph.inserting_before(node):
            if node.op == "call_method":
                made = self.graph.call_method(str(node.target), tuple(args), kwargs)
            else:
                made = self.graph.call_function(node.target, tuple(args), kwargs)  # type: ignore[arg-type]
            self._replace(node, self._call("fill_", made, fill))

    def _written(self, node: fx.Node) -> bool:
        """A view that is selected to be written to, and for nothing else."""
        users = list(node.users)
        if len(users) != 1 or not users[0].args or users[0].args[0] is not node:
            return False
        (user,) = users
        if _name(user.target) not in ("copy_", "fill_") or user.users or len(user.args) != 2:
            return False
        x, index = node.args[:2]
        if node.target is not operator.getitem:
            rank = x.meta["example_value"].dim()  # type: ignore[union-attr]
            dim, start = int(index) % rank, node.args[2]  # type: ignore[arg-type]
            if _name(node.target) == "narrow":
                return False
            index = (*[slice(None)] * dim, start)
        with self.graph.inserting_before(user):
            write = self.graph.call_function(operator.setitem, (x, index, user.args[1]))
            self._setitem(write)
        self.graph.erase_node(user)
        self.graph.erase_node(node)
        return True

    def _select(self, node: fx.Node) -> None:
        x, dim, start = node.args[:3]
        self._read_only(node)
        with self.graph.inserting_before(node):
            if _name(node.target) == "narrow":
                size = node.args[3] if len(node.args) > 3 else None
                if not isinstance(size, int):
                    raise NotData("it goes into a narrow of no constant length")
                made = self._call("index_select", x, dim, self._rows(x, start, size))
            else:
                rows = self._rows(x, start, 1)
                made = self._call("squeeze", self._call("index_select", x, dim, rows), dim)
            self._replace(node, made)

    def _rows(self, x: Any, start: Any, size: int) -> fx.Node:
        """Indices ``start …``, int64 ``[size]``, where ``x`` is."""
        device = x.meta["example_value"].device
        place = self._call("to", start, device) if device != self.device else start
        if size == 1:
            return self._call("reshape", place, 1)
        return self._call(torch.add, self._call(torch.arange, size, device=device), place)

    def _read_only(self, node: fx.Node) -> None:
        """What was a view becomes a copy: nobody may write to it."""
        todo, seen = [node], {node}
        while todo:
            view = todo.pop()
            for user in view.users:
                if user.op == "output":
                    continue
                name = _name(user.target)
                first = bool(user.args) and user.args[0] is view
                if (first and writes_to_first(user)) or user.kwargs.get("out") is view:
                    raise NotData("a view that it selects is written to")
                if isinstance(user.target, torch._ops.HigherOrderOperator):
                    raise NotData(f"a view that it selects goes into {name}")
                if first and name in _VIEWS and user not in seen:
                    seen.add(user)
                    todo.append(user)

    # ------------------------------------------------------------------------------- indexing

    def _parts(self, x: fx.Node, index: Any) -> tuple[list[Any], int, Any, int | None]:
        """(index of every dimension, the one with a number, start, size or None for one row).

        Raises:
            NotData: more than one dimension has one, or others are selected by tensors.
        """
        index = index if isinstance(index, (tuple, list)) else (index,)
        rank = x.meta["example_value"].dim()
        parts = list(index)
        if any(p is None or isinstance(p, (bool, list)) for p in parts):
            raise NotData("it is one index among others that are no slices")
        if Ellipsis in [p for p in parts if not isinstance(p, fx.Node)]:
            at = next(i for i, p in enumerate(parts) if p is Ellipsis)
            fill = rank - len(parts) + 1
            parts[at : at + 1] = [slice(None)] * fill
        parts += [slice(None)] * (rank - len(parts))
        found = [d for d, p in enumerate(parts) if any(n in self.numbers for n in _nodes_in(p))]
        if len(found) != 1:
            raise NotData("it selects from two dimensions at once")
        for d, p in enumerate(parts):
            if d != found[0] and not isinstance(p, (slice, int)):
                raise NotData("it is one index among others that are tensors")
        d = found[0]
        part = parts[d]
        if not isinstance(part, slice):
            return parts, d, part, None
        if part.step not in (None, 1) or part.start is None or part.stop is None:
            raise NotData("it decides how long a slice is: its steps would be other graphs")
        size = _distance(part.start, part.stop)
        if size is None or size < 1 or not isinstance(part.start, fx.Node):
            raise NotData("it decides how long a slice is: its steps would be other graphs")
        return parts, d, part.start, size

    def _others(self, x: fx.Node, parts: list[Any], d: int) -> tuple[fx.Node, int]:
        """``x`` with the other dimensions selected, and where dimension ``d`` is then: a view."""
        others = tuple(slice(None) if i == d else p for i, p in enumerate(parts))
        gone = sum(isinstance(p, int) for p in parts[:d])
        if all(p == slice(None) for p in others):
            return x, d
        view = self._call(operator.getitem, x, others)
        view.meta["example_value"] = x.meta["example_value"]  # its device is what is read of it
        return view, d - gone

    def _getitem(self, node: fx.Node) -> None:
        x, index = node.args
        if not isinstance(x, fx.Node) or not isinstance(x.meta.get("example_value"), Tensor):
            raise NotData("it selects from what is no tensor")
        if x in self.numbers:
            raise NotData("it selects from a number")
        parts, d, start, size = self._parts(x, index)
        self._read_only(node)
        with self.graph.inserting_before(node):
            view, at = self._others(x, parts, d)
            made = self._call("index_select", view, at, self._rows(x, start, size or 1))
            if size is None:
                made = self._call("squeeze", made, at)
            self._replace(node, made)

    def _setitem(self, node: fx.Node) -> None:
        x, index, value = node.args
        if not isinstance(x, fx.Node) or not isinstance(x.meta.get("example_value"), Tensor):
            raise NotData("it selects from what is no tensor")
        if not any(n in self.numbers for n in _nodes_in(index)):
            return  # a tensor without dimensions is written where a number was
        parts, d, start, size = self._parts(x, index)
        tensor = x.meta["example_value"]
        with self.graph.inserting_before(node):
            view, at = self._others(x, parts, d)
            shape = [
                (size or 1) if i == d else _length(p, tensor.shape[i])
                for i, p in enumerate(parts)
                if not isinstance(p, int)
            ]
            region = [n for i, n in enumerate(shape) if size is not None or i != at]
            if isinstance(value, fx.Node):
                value = self._call("expand", self._call("to", value, tensor.dtype), region)
            else:
                value = self._call(torch.full, region, value, dtype=tensor.dtype,
                                   device=tensor.device)  # fmt: skip
            if size is None:
                value = self._call("unsqueeze", value, at)
            self._call("index_copy_", view, at, self._rows(x, start, size or 1), value)
        self.graph.erase_node(node)


def _length(part: slice, size: Any) -> Any:
    if part == slice(None):
        return size
    if not isinstance(size, int) or not all(
        isinstance(v, (int, type(None))) for v in (part.start, part.stop, part.step)
    ):
        raise NotData("it is one index among slices of a dynamic size")
    return len(range(*part.indices(size)))


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found
