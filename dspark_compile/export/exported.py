"""From a program back to an ``ExportedProgram``, which ``torch.onnx.export`` translates."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from .program import Program


def exported_program(program: Program) -> ExportedProgram:
    """The program as ``torch.export`` would have given it: weights first, then inputs."""
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature

    graph = program.graph
    state = [n for n in graph.nodes if n.op == "placeholder" and n in program.state]
    # The signature goes in the order of placeholders.
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for node in [*state, *program.inputs]:
        first.prepend(node)
    renamed = {node: f"p_{i}" for i, node in enumerate(state)}
    for node in [*state, *program.inputs]:
        name = renamed.get(node, node.name)
        node.target = node.name = name
        node._rename(name)
        node.target = node.name
    inputs = [
        InputSpec(InputKind.BUFFER, TensorArgument(node.name), program.names[node], True)
        for node in state
    ]
    inputs += [
        InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in program.inputs
    ]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None)
        for node in program.outputs
    ]
    flat = tuple(program.inputs)
    in_spec = pytree.tree_structure(((*range(len(flat)),), {}))
    out_spec = pytree.tree_structure((*range(len(outputs)),))
    # Names in it would have to survive every later rewriting; only the structure is asked for.
    call = ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec)
    program.module.recompile()
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict={program.names[n]: program.state[n] for n in state},
        range_constraints=program.range_constraints,
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
        example_inputs=None,
        constants={},
    )
