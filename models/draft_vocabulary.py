"""A smaller output vocabulary for a draft: fewer rows of its lm_head and of the Markov head's W2.

The lm_head is a good part of what a draft reads, and a token that it cannot propose costs no more
than one that it proposes wrongly: the target still writes every token. What most of the text
consists of is enough (EAGLE-3, FR-Spec). The rows kept are named by ``d2t``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftError


def frequent_tokens(texts: Iterable[Tensor], vocabulary: int, count: int) -> Tensor:
    """The ``count`` tokens that occur most in ``texts`` (ids ``[S]`` each), ascending."""
    seen = torch.zeros(vocabulary, dtype=torch.long)
    for text in texts:
        seen += torch.bincount(text.flatten().cpu(), minlength=vocabulary)
    order = seen.argsort(descending=True, stable=True)
    return order[:count].sort().values


@torch.no_grad()
def cut_vocabulary(draft: DraftModel, ids: Tensor) -> DraftModel:
    """A copy of ``draft`` that proposes only the tokens ``ids`` (of the target's vocabulary).

    It is not bound to a target yet; its calibration is the draft's.

    Raises:
        DraftError: an id is none that the draft proposes, or occurs twice.
    """
    ids = ids.detach().cpu().to(torch.long).flatten()
    known = torch.arange(draft.config.vocab_size) if draft.d2t is None else draft.d2t.cpu()
    place = torch.full((draft.config.vocab_size,), -1)
    place[known] = torch.arange(len(known))
    inside = (ids >= 0) & (ids < len(place))
    rows = place[ids[inside]]
    if not bool(inside.all()) or not len(ids) or int(rows.min()) < 0:
        lacking = ids[~inside].tolist() or ids[inside][rows < 0].tolist()
        raise DraftError(
            f"the draft's vocabulary cannot be cut to {len(ids)} tokens: it does not propose "
            f"{lacking[:5] or 'any of them'}; give ids out of those it does"
        )
    cut = DraftModel(dataclasses.replace(draft.config, draft_vocab_size=len(ids)))
    state = draft.state_dict()
    for name in ("markov_head.markov_w2.weight", "lm_head.weight"):
        if name in state:
            state[name] = state[name][rows.to(state[name].device)]
    if draft.embed_tokens is not None:
        cut.embed_tokens = torch.nn.Embedding(*draft.embed_tokens.weight.shape)
    if draft.lm_head is not None:
        cut.lm_head = torch.nn.Linear(draft.config.hidden_size, len(ids), bias=False)
    cut.to(draft.fc.weight.dtype).to(draft.fc.weight.device).load_state_dict(state)
    cut.set_vocabulary(ids)
    cut.calibration, cut.declared = draft.calibration, draft.declared
    return cut.train(draft.training)
