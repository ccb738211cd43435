"""What is exported: a model behind a flat signature of tensors, and inputs to try it on.

A Hugging Face causal language model becomes

    (input_ids [B, S], attention_mask [B, T], position_ids [B, S], past.0.key, past.0.value, …)
        -> (logits [B, S, V], present.0.key, present.0.value, …)

with ``T`` the number of tokens so far, the new ones included: ``T - S`` rows of every past are
valid. A *growing* cache has ``T - S`` rows in and ``T`` out; a *static* one has a capacity ``N``
in and out, and the new rows are written behind the valid ones. Every layer keeps all of its rows,
sliding-window layers too: their mask leaves out what has slid away.

Any other module is exported with the signature it has; buffers that it writes become inputs
``past.<name>`` and outputs ``present.<name>``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Case:
    """Inputs at one shape, and what the model gives for them, all in the graph's order.

    Attributes:
        name: for messages, such as ``batch 2, 1 new token, 4 cached``.
        inputs: one tensor for each graph input.
        expected: one tensor for each graph output; None is not compared.
        rows: how many rows of a present (dimension 2) are compared, None for all.
        valid: bool ``[B, S]`` of the rows of the logits that count, None for all.
    """

    name: str
    inputs: list[Tensor]
    expected: list[Tensor | None]
    rows: int | None = None
    valid: Tensor | None = None


class Subject(ABC):
    """A module to trace, and what surrounds it.

    Attributes:
        module: takes and gives flat tensors.
        example: tensors to trace it with.
        dynamic: for each example, the dynamic dimensions and their names.
        input_names, output_names: in order.
        caches: for each past input its present output, by name.
    """

    module: nn.Module
    example: list[Tensor]
    dynamic: list[dict[int, str]]
    input_names: list[str]
    output_names: list[str]

    def __init__(self) -> None:
        self.caches: dict[str, str] = {}

    @abstractmethod
    def cases(
        self, shapes: Sequence[tuple[int, int, int]], seed: int, padded: bool = False
    ) -> list[Case]:
        """Fresh inputs with the model's own results, computed eagerly without export's help; with
        ``padded`` also a batch with padding on the left."""
