"""Model-local functions: every dialect op one node, its ONNX form the function's body.

The nodes that came from one dialect op are moved into a function of the domain ``dspark``. Sites
with the same body share a function; another body of the same op is ``<op>_2`` and so on. Small
constants move inside, weights stay inputs. A runtime that knows no such domain inlines the bodies;
a viewer shows one box for each op.
"""

from __future__ import annotations

from typing import Any

DOMAIN = "dspark"


def outline(model: Any, optional: frozenset[str]) -> None:
    """Move the nodes of each dialect op of an ``onnx_ir`` model into a function, in place.

    Args:
        optional: ops whose outputs behind the first may be left out.
    """
    import onnx_ir as ir

    groups: dict[str, list[Any]] = {}
    for node in model.graph:
        if node.metadata_props.get("dspark.op", "").startswith("dspark::"):
            groups.setdefault(node.metadata_props.get("dspark.site", ""), []).append(node)
    known: dict[str, Any] = {}
    taken: dict[str, int] = {}
    for nodes in groups.values():
        for part in _convex(model.graph, nodes):
            name = part[-1].metadata_props["dspark.op"].removeprefix("dspark::")
            _outline(model, part, name, known, taken, optional)
    model.graph.sort()
    model.graph.opset_imports[DOMAIN] = 1
    assert isinstance(model, ir.Model)


def _convex(graph: Any, nodes: list[Any]) -> list[list[Any]]:
    """The nodes as one group if nothing lies between them, else each on its own: a node outside
    that is fed by the group and feeds it would be a cycle."""
    inside = set(nodes)
    order = {node: i for i, node in enumerate(graph)}
    last = max(order[n] for n in nodes)
    todo = [u.node for n in nodes for o in n.outputs for u in o.uses() if u.node not in inside]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node in seen or order.get(node, last + 1) > last:
            continue
        seen.add(node)
        for output in node.outputs:
            for use in output.uses():
                if use.node in inside:
                    return [[n] for n in nodes]
                todo.append(use.node)
    return [nodes]


def _outline(
    model: Any,
    nodes: list[Any],
    name: str,
    known: dict[str, Any],
    taken: dict[str, int],
    optional: frozenset[str],
) -> None:
    import onnx_ir as ir

    inside = set(nodes)
    inputs: list[Any] = []
    constants: list[Any] = []
    for node in nodes:
        for value in node.inputs:
            if value is None or value.producer() in inside or value in inputs + constants:
                continue
            (constants if _small(value) else inputs).append(value)
    outputs = [
        o
        for n in nodes
        for o in n.outputs
        if o.is_graph_output() or any(u.node not in inside for u in o.uses())
    ]
    mapping: dict[Any, Any] = {}
    body: list[Any] = []
    for i, value in enumerate(inputs):
        mapping[value] = ir.Value(name=f"x{i}")
    for i, value in enumerate(constants):
        tensor = value.const_value
        made = ir.node("Constant", [], {"value": ir.tensor(tensor.numpy(), name=f"c{i}")})
        made.outputs[0].name = f"c{i}"
        mapping[value] = made.outputs[0]
        body.append(made)
    for i, node in enumerate(nodes):
        made = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else mapping[v] for v in node.inputs],
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            overload=node.overload,
        )
        for j, (old, new) in enumerate(zip(node.outputs, made.outputs, strict=True)):
            read = old.uses() or old.is_graph_output()
            new.name = "" if j and not read and node.op_type in optional else f"y{i}_{j}"
            mapping[old] = new
        body.append(made)
    results = [mapping[o] for o in outputs]
    text = _canonical(body, [mapping[v] for v in inputs], results)
    function = known.get(f"{name}:{text}")
    if function is None:
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}_{taken[name]}"
        graph = ir.Graph(
            [mapping[v] for v in inputs],
            results,
            nodes=body,
            opset_imports=dict(model.graph.opset_imports),
        )
        function = ir.Function(DOMAIN, unique, graph=graph, attributes=[])
        model.functions[function.identifier()] = function
        known[f"{name}:{text}"] = function
    call = ir.Node(DOMAIN, function.name, inputs, [], num_outputs=len(outputs))
    call.metadata_props.update(nodes[-1].metadata_props)
    graph = model.graph
    graph.insert_after(nodes[-1], call)
    for old, new in zip(outputs, call.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = None
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(list(reversed(nodes)), safe=True)


def _small(value: Any) -> bool:
    """Whether a value is a constant that belongs to an op's form rather than to the model."""
    return (
        value.is_initializer()
        and value.const_value is not None
        and value.const_value.size <= 16
        and (value.name or "").startswith(("val_", "scalar_"))
    )


def _canonical(body: list[Any], inputs: list[Any], outputs: list[Any]) -> str:
    """A body as text, the same for the same body."""
    names = {value: f"x{i}" for i, value in enumerate(inputs)}
    lines = []
    for i, node in enumerate(body):
        for j, value in enumerate(node.outputs):
            names[value] = f"y{i}.{j}" if value.name else ""
        attributes = sorted((a.name, _attribute(a)) for a in node.attributes.values())
        read = [names.get(v, "") if v is not None else "" for v in node.inputs]
        lines.append(f"{node.domain}::{node.op_type}{read}{attributes}{len(node.outputs)}")
    return ";".join(lines) + "->" + ",".join(names[o] for o in outputs)


def _attribute(attribute: Any) -> str:
    value = attribute.value
    if hasattr(value, "numpy"):
        array = value.numpy()
        return f"{array.dtype}{array.shape}{array.tolist()}"
    return repr(value)
