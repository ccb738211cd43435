"""The sequential stage of a draft: Markov heads and the confidence head.

With ``e = W1[x_{k-1}]`` and the block's hidden row ``h_k``, a head's bias on the logits of position
k is (DSpark, arXiv 2607.05147, section on the semi-autoregressive draft):

* vanilla ``W2 e``
* gated ``W2 (sigmoid(gate_proj [h_k ; e]) * e)``
* rnn ``(g, c, o) = joint_proj [s ; e ; h_k]``, ``s <- sigmoid(g) s + (1 - sigmoid(g)) tanh(c)``,
  ``W2 tanh(o)``, ``s = 0`` at the anchor

The confidence is ``sigmoid(w [h_k ; e] + b)`` in float32: how likely the token at k is accepted,
given that all before it were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_compile.models.draft_config import DraftConfig


class MarkovHead(nn.Module):
    """Low-rank bias on a position's logits from the token before it."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank, width = config.markov_rank, config.hidden_size
        self.rank, self.kind = rank, config.markov_head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def embed(self, previous: Tensor) -> Tensor:
        """e: ``[..., r]`` of token ids ``[...]`` (the target's ids)."""
        return self.markov_w1(previous)

    def start(self, like: Tensor) -> Tensor:
        """The state before the first position ``[B, r]``; only the rnn head uses it."""
        return like.new_zeros(like.shape[0], self.rank)

    def code(self, e: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What W2 is applied to ``[B, r]``, and the next state, of one position.

        Args:
            e: ``[B, r]``. hidden: ``[B, d]``. state: ``[B, r]``.
        """
        if self.kind == "vanilla":
            return e, state
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, e), dim=-1))) * e, state
        joint = self.joint_proj(torch.cat((state, e, hidden), dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        state = gate * state + (1 - gate) * torch.tanh(candidate)
        return torch.tanh(output), state

    def step(self, e: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The bias on the logits ``[B, draft vocabulary]`` of one position, and the next state."""
        code, state = self.code(e, hidden, state)
        return self.markov_w2(code), state

    def block(self, e: Tensor, hidden: Tensor) -> Tensor:
        """Biases ``[B, K, draft vocabulary]`` of whole blocks, previous tokens known.

        Args:
            e: ``[B, K, r]`` embeddings of the previous tokens. hidden: ``[B, K, d]``.
        """
        if self.kind != "rnn":
            code, _ = self.code(e, hidden, e)
            return self.markov_w2(code)
        state, codes = self.start(e[:, 0]), []
        for k in range(e.shape[1]):
            code, state = self.code(e[:, k], hidden[:, k], state)
            codes.append(code)
        return self.markov_w2(torch.stack(codes, dim=1))


class ConfidenceHead(nn.Module):
    """A logit from a position's hidden row and, if trained so, the token before it."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head_with_markov
        self.proj = nn.Linear(config.confidence_width, 1)

    def forward(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        """Logits ``[...]`` float32 of ``hidden [..., d]`` and ``e [..., r]``.

        The product itself is float32 too: near 0 and 1, bfloat16 has too few steps to calibrate.
        """
        if self.with_markov:
            assert e is not None
            hidden = torch.cat((hidden, e.to(hidden.dtype)), dim=-1)
        weight, bias = self.proj.weight.float(), self.proj.bias.float()
        return nn.functional.linear(hidden.float(), weight, bias).squeeze(-1)
