"""The target's tapped hidden states, from the model as it is: by hooks, not by keeping all states.

Tap i is the output of decoder layer i (0-based), which is ``hidden_states[i + 1]``; -1 is what
enters layer 0. This serves the eager reference loop and training; the compiled rounds make the taps
outputs of the target's own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(target: nn.Module) -> nn.ModuleList:
    """The list of the target's decoder layers.

    It is the module list as long as the configuration's ``num_hidden_layers`` that is nearest to
    the root; without a configuration, the longest.

    Raises:
        ValueError: there is none.
    """
    from dspark_compile.models.draft_bind import text_config

    wanted = getattr(text_config(target), "num_hidden_layers", None)
    base = getattr(target, "get_decoder", lambda: None)() or target
    lists = [
        (name.count("."), name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    fitting = [entry for entry in lists if wanted is None or len(entry[2]) == wanted]
    if not fitting:
        raise ValueError(
            f"{type(target).__name__} has no list of {wanted or 'decoder'} layers to tap; found "
            f"{[(name, len(module)) for _, name, module in lists]}"
        )
    if wanted is None:
        return max(fitting, key=lambda entry: len(entry[2]))[2]
    return min(fitting, key=lambda entry: entry[0])[2]


def crop(cache: Any, length: int) -> None:
    """Cut a transformers cache down to ``length`` tokens.

    By the number of tokens to remove, which all versions take.
    """
    extra = cache.get_seq_length() - length
    if extra > 0:
        cache.crop(-extra)


class Taps:
    """Captures taps while it is entered.

        with Taps(target, draft.config.target_layer_ids) as taps:
            out = target(input_ids=ids)
        taps.states                                    # [B, N, m * width]

    Args:
        target: the model.
        ids: layers, -1 for the embedding.

    Raises:
        ValueError: a layer does not exist.
    """

    def __init__(self, target: nn.Module, ids: Sequence[int]) -> None:
        self.layers = decoder_layers(target)
        self.ids = tuple(ids)
        if not self.ids or max(self.ids) >= len(self.layers) or min(self.ids) < -1:
            raise ValueError(
                f"target_layer_ids={list(self.ids)}: the target has layers 0 to "
                f"{len(self.layers) - 1}, and -1 for its embedding"
            )
        self._found: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for i in self.ids:
            if i == -1:
                handle = self.layers[0].register_forward_pre_hook(self._entering, with_kwargs=True)
            else:
                handle = self.layers[i].register_forward_hook(self._leaving(i))
            self._handles.append(handle)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _entering(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._found[-1] = args[0] if args else kwargs["hidden_states"]

    def _leaving(self, i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._found[i] = output if isinstance(output, Tensor) else output[0]

        return hook

    @property
    def states(self) -> Tensor:
        """The taps of the latest call, concatenated in order of layers.

        Raises:
            RuntimeError: the target has not run, or skipped a tapped layer.
        """
        missing = [i for i in self.ids if i not in self._found]
        if missing:
            raise RuntimeError(f"layers {missing} of the target have not run since")
        return torch.cat([self._found[i] for i in self.ids], dim=-1)

    def take(self) -> Tensor:
        """`states`, which are forgotten then."""
        states = self.states
        self._found.clear()
        return states
