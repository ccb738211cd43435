"""Marks of a Python loop over experts whose turns depend on data; no computation.

While Dynamo traces for this back end, a loop over the experts that are hit is traced with a turn
for every expert (`dspark_compile.expert_loops`). These calls say where, and what was assumed.
`passes.raise_moe_loop` proves the assumption and removes them; where it cannot, the function is
traced again without. They are never executed.

    expert_loop_begin       turns 0 … count - 1, of which the code makes those in ``hit``
    expert_loop_skip        the code makes turn ``turn``'s body only if ``condition`` is ``runs``
    expert_loop_skip_empty  the code makes turn ``turn``'s body only if ``rows`` is not 0
    expert_loop_end         what the loop leaves behind
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import has_side_effect

from ._define import _LIBRARY

_SCHEMAS = (
    "expert_loop_begin(int loop, Tensor? hit, int count) -> ()",
    "expert_loop_skip(int loop, int turn, Tensor condition, bool runs) -> ()",
    "expert_loop_skip_empty(int loop, int turn, SymInt rows) -> ()",
    "expert_loop_end(int loop, Tensor[] values) -> ()",
)
MARKS = tuple(schema.split("(", 1)[0] for schema in _SCHEMAS)


def _nothing(*args: Any) -> None:
    """A mark computes nothing."""


for _schema in _SCHEMAS:
    _name = _schema.split("(", 1)[0]
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _nothing, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dspark::{_name}", _nothing, lib=_LIBRARY)
    has_side_effect(getattr(torch.ops.dspark, _name).default)
    has_side_effect(getattr(torch.ops.dspark, _name))
