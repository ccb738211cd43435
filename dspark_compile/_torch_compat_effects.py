"""The part of `_torch_compat` that sees what traced code does besides computing tensors.

Dynamo replays at every call of a compiled function what it did to Python's objects: attributes it
set, lists it grew. Who calls the graph itself replays nothing, and has to know.
"""

from __future__ import annotations

from typing import Any


def changed_objects() -> list[str]:
    """What the function that is traced now has changed so far of the objects that were there
    before, as it names them; to be asked by a back end that is given its graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables import base

    existing = (base.AttributeMutationExisting, base.ValueMutationExisting)
    try:
        effects: Any = InstructionTranslator.current_tx().output.side_effects
    except AttributeError:  # nothing is being traced
        return []
    found = [
        variable
        for variable in effects.id_to_variable.values()
        if isinstance(variable.mutation_type, existing) and effects.is_modified(variable)
    ]
    return sorted({getattr(v.source, "name", None) or type(v).__name__ for v in found}, key=str)
