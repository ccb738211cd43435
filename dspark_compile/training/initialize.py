"""The first weights of a draft: small and random, the target's own where they fit, or a draft's.

The draft's output goes through the target's lm_head, so the target's final norm is the right scale
for it, and its last layers already write into that space. Context enters through ``fc``, which
starts as the identity on the last tap: then the first draft layer sees keys and values much like
those of the target's layer behind that tap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftError
from dspark_compile.runtime.speculation.taps import decoder_layers
from dspark_compile.training.options import TrainError


def initialize(draft: DraftModel, target: Any = None) -> list[str]:
    """Set all weights; ``target`` gives copies of its last layers and final norm, None does not.

    Returns:
        What was copied.
    """
    config = draft.config
    shrink = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, module in draft.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("o_proj", "down_proj")):
                with torch.no_grad():
                    module.weight.mul_(shrink)
    if draft.markov_head is not None:
        # The head has no say at first, and learns at once: only one of the factors is zero.
        nn.init.normal_(draft.markov_head.markov_w1.weight, std=config.markov_rank**-0.5)
        nn.init.zeros_(draft.markov_head.markov_w2.weight)
    if draft.confidence_head is not None:
        nn.init.zeros_(draft.confidence_head.proj.weight)
    return [] if target is None else _copy(draft, target)


@torch.no_grad()
def go_on_from(draft: DraftModel, source: str) -> None:
    """Set all weights to those of the draft at ``source``, a folder or Hub id.

    The block size and the number of anchors may differ; the taps, layers and heads may not.

    Raises:
        TrainError: there is no draft, it reads other taps, or a weight has another shape; names
            what differs.
    """
    try:
        theirs = DraftModel.from_pretrained(source)
    except (DraftError, OSError) as error:
        raise TrainError(
            f"init={source!r}: give target, random, or a draft to go on from; {error}"
        ) from error
    if theirs.config.target_layer_ids != draft.config.target_layer_ids:
        raise TrainError(
            f"init={source!r} reads the layers {tuple(theirs.config.target_layer_ids)} of its "
            f"target, this draft {tuple(draft.config.target_layer_ids)}; give the same taps"
        )
    have, want = theirs.state_dict(), draft.state_dict()
    for name in sorted(have.keys() | want.keys()):
        a, b = (tuple(d[name].shape) if name in d else None for d in (have, want))
        if a != b:
            raise TrainError(
                f"init={source!r}: {name} has the shape {a} there and {b} here; give the same "
                "layers, intermediate_size, markov_rank and heads"
            )
    draft.load_state_dict({n: t.to(want[n].dtype) for n, t in have.items()})


@torch.no_grad()
def _copy(draft: DraftModel, target: Any) -> list[str]:
    copied = []
    layers = list(decoder_layers(target))
    own = list(draft.layers)
    for mine, theirs in zip(own, layers[-len(own) :]):
        if _same(mine, theirs):
            mine.load_state_dict(theirs.state_dict(), strict=True)
            copied.append("layer")
        elif _same(mine.self_attn, getattr(theirs, "self_attn", nn.Identity())):
            # An MLP of another size: attention is worth having by itself.
            mine.self_attn.load_state_dict(theirs.self_attn.state_dict())
            copied.append("attention")
    base = getattr(target, "get_decoder", lambda: None)() or target
    norm = getattr(base, "norm", None)
    if norm is not None and _same(draft.norm, norm):
        draft.norm.load_state_dict(norm.state_dict())
        copied.append("norm")
    width = draft.config.target_hidden_size
    if width == draft.config.hidden_size:
        draft.fc.weight[:, -width:] += torch.eye(width)
        copied.append("fc")
        first = getattr(layers[-1], "input_layernorm", None)
        alike = copied[0] in ("layer", "attention")
        if alike and first is not None and _same(draft.hidden_norm, first):
            draft.hidden_norm.load_state_dict(first.state_dict())
            copied.append("hidden_norm")
    return copied


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether the parameters have equal names and shapes, floating ones all."""
    a, b = mine.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and b[n].is_floating_point() for n in a
    )
