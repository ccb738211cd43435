"""Small helpers over FX graphs: reading nodes, making nodes, naming where they came from."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten

# Nodes that change neither values nor shape; matchers look through them.
TRANSPARENT: frozenset[Any] = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.clone.default,
        aten.contiguous.default,
    }
)
VIEWS: frozenset[Any] = frozenset(
    {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
)


def is_op(node: object, *targets: Any) -> bool:
    """Whether ``node`` is a call of one of ``targets`` (overloads or packets)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    target = node.target
    return target in targets or getattr(target, "overloadpacket", None) in targets


def is_dialect_op(node: object, *names: str) -> bool:
    """Whether ``node`` is one of the named dialect ops (any, if no name is given)."""
    name = dialect_name(node)
    return bool(name) and (not names or name in names)


def dialect_name(node: object) -> str:
    """``"rms_norm"`` for a call of ``dspark::rms_norm``; ``""`` for what calls no dialect op."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    target: Any = node.target
    if getattr(target, "namespace", None) != "dspark":
        return ""
    return target._schema.name.split("::")[1]


def val(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta["val"]


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The (maybe symbolic) shape of a tensor node."""
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    return node.meta["val"].dtype


def is_tensor(node: object) -> bool:
    """Whether a node holds a single tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def peel(node: Any, targets: Iterable[Any] = TRANSPARENT) -> Any:
    """Follow first arguments through ``targets``."""
    targets = frozenset(targets)
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets:
        node = node.args[0]
    return node


def peel_casts(node: Any) -> Any:
    """Follow first arguments through transparent nodes and dtype casts."""
    return peel(node, TRANSPARENT | {aten._to_copy.default})


_WIDTH = {torch.bfloat16: 1, torch.float16: 1, torch.float32: 2, torch.float64: 3}


def is_upcast(node: object) -> bool:
    """Whether a node casts to a type that holds every value of the one it casts from."""
    if not is_op(node, aten._to_copy.default) or not is_tensor(node.args[0]):  # type: ignore[attr-defined]
        return False
    below, here = node.args[0].meta["val"], node.meta["val"]  # type: ignore[attr-defined]
    wider = _WIDTH.get(here.dtype, 0) > _WIDTH.get(below.dtype, 9)
    return below.device == here.device and (wider or below.dtype == here.dtype)


def peel_upcasts(node: Any) -> Any:
    """Follow first arguments through transparent nodes and casts that lose nothing."""
    while True:
        below = peel(node)
        if not is_upcast(below):
            return below
        node = below.args[0]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A positional-or-keyword argument of a call."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are provably equal, without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def known_equal(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def module_path(node: fx.Node) -> str:
    """The dotted module a node came from, ``""`` if unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return clean_path(list(stack.values())[-1][0])


def clean_path(path: str) -> str:
    """``L['self'].model.layers['0']`` as ``model.layers.0``."""
    for noise in ("L['self'].", "L['self']", "L['model'].", "_modules"):
        path = path.replace(noise, "")
    return path.replace("['", ".").replace("']", "").replace("..", ".").strip(".")


def module_class(node: fx.Node) -> str:
    """The class name of the innermost module a node came from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    cls = list(stack.values())[-1][1]
    return cls.__name__ if isinstance(cls, type) else str(cls).rsplit(".", 1)[-1]


def module_classes(node: fx.Node) -> list[str]:
    """The class names of the modules a node came from, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    classes = [cls for _, cls in stack.values()]
    return [c.__name__ if isinstance(c, type) else str(c).rsplit(".", 1)[-1] for c in classes]


def source(node: fx.Node) -> str:
    """``file.py:12 in forward: code`` of the user line a node came from."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    lines = [line for line in lines if not set(line) <= {"^", "~", " "}]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("File "):
            parts = lines[i].split('"')
            file = parts[1].rsplit("/", 1)[-1] if len(parts) > 1 else "?"
            rest = parts[2].lstrip(", ") if len(parts) > 2 else ""
            rest = rest.replace("line ", "", 1).replace(", in ", " in ")
            code = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{file}:{rest}: {code}"
    return ""


def emit(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    like: fx.Node,
    fake_mode: Any,
) -> fx.Node:
    """Insert a call at the graph's insertion point with its fake value computed and the
    provenance (stack trace, module) of ``like``."""
    node = graph.call_function(target, args, kwargs or {})
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    node.meta["val"] = fake_call(target, args, kwargs or {}, fake_mode)
    return node


def view_sizes(wanted: Sequence[Any], like: fx.Node, make: Callable[..., fx.Node]) -> list[Any]:
    """``wanted`` as a view takes it: one symbol is what is left over, others are sizes of ``like``,
    or of what it is a view of.

    Raises:
        AssertionError: a symbol is no size of these.
    """
    sources = [like]
    while is_op(sources[-1], *VIEWS, aten._to_copy.default):
        sources.append(sources[-1].args[0])  # type: ignore[arg-type]
    found: list[Any] = []
    for size in wanted:
        if isinstance(size, int):
            found.append(size)
        elif -1 not in found:
            found.append(-1)
        else:
            places = (
                (n, d) for n in sources for d, m in enumerate(shape(n)) if known_equal(m, size)
            )
            place = next(places, None)
            if place is None:
                raise AssertionError(f"a view has the size {size}, which {like.name} has not")
            found.append(make(aten.sym_size.int, *place))
    return found


def fake_call(target: Any, args: Any, kwargs: Any, fake_mode: Any) -> Any:
    """Run ``target`` on the fake values of its node arguments.

    Between normalise and lower a ``view`` means ``reshape``: layouts may have changed.
    """
    if target is aten.view.default:
        target = aten.reshape.default
    a, k = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode, torch.no_grad():
        return target(*a, **k)


def emit_getitem(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """``node[index]`` with value and provenance."""
    item = graph.call_function(operator.getitem, (node, index))
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in node.meta:
            item.meta[key] = node.meta[key]
    item.meta["val"] = node.meta["val"][index]
    return item


def op_name(node: fx.Node) -> str:
    """A short printable name of a call's target."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))


def op_counts(graph: fx.Graph) -> Counter[str]:
    """Calls by target name."""
    return Counter(op_name(n) for n in graph.nodes if n.op == "call_function")


def users_of(node: fx.Node, *targets: Any) -> list[fx.Node]:
    """The users of ``node`` that call one of ``targets``."""
    return [u for u in node.users if is_op(u, *targets)]


def is_fake(value: object) -> bool:
    """Whether a value is a fake tensor."""
    return isinstance(value, FakeTensor)


def order(graph: fx.Graph) -> dict[fx.Node, int]:
    """The position of every node."""
    return {node: i for i, node in enumerate(graph.nodes)}


def readers(node: fx.Node) -> set[fx.Node]:
    """Every node that reads the storage of ``node``: its users, and those of its views."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        for user in todo.pop().users:
            if user not in found:
                found.add(user)
                if _is_view(user):
                    todo.append(user)
    return found


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem or is_op(node, aten.reshape.default):
        return True
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in target._schema.returns)
