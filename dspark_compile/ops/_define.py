"""How a dialect op is declared: one schema, one plain-torch meaning, one fake.

Every op of the dialect is opaque to Dynamo, AOTAutograd and Inductor until it is
lowered. Its *reference* is the definition of its meaning and the oracle of the tests;
it is also what runs when the op is executed eagerly. Its *fake* computes shapes, dtypes
and strides; where none is given the reference itself runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_LIBRARY = torch.library.Library("dspark", "FRAGMENT")


@dataclass(frozen=True)
class OpSpec:
    """One op of the dialect.

    Attributes:
        name: without the namespace, e.g. ``"rms_norm"``.
        schema: the full schema string.
        family: ``norm``, ``rope``, ``attention``, ``mlp``, ``linear``, ``cache``, ``token``.
        reference: the plain-torch meaning.
        mutates: whether an argument is written in place.
    """

    name: str
    schema: str
    family: str
    reference: Callable[..., Any]
    mutates: bool

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.dspark, self.name).default


OPS: dict[str, OpSpec] = {}


def define(
    schema: str, *, family: str, fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare ``dspark::<schema>`` with the decorated function as its reference."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dspark::{name}", fake or reference, lib=_LIBRARY)
        OPS[name] = OpSpec(name, schema, family, reference, "!" in schema)
        return reference

    return register


def is_dialect(target: object) -> bool:
    """Whether an FX node target is a dialect op."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "dspark"
