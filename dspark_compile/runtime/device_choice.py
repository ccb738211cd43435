"""Token choice on a device: every parameter is a tensor there, so that a round that holds the
choice is the same for every temperature, and nothing is asked by the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_compile.ops.token import draw, filtered_probabilities, penalised

from .token_choice import TokenChoice

# (sampled?, top-k, top-p?, min-p?, penalty?, end tokens, vocabulary): what is not data.
Kind = tuple[bool, int, bool, bool, bool, int, int]


class DeviceChooser:
    """Chooses tokens for up to R sequences.

    Args:
        tokens: int64 ``[R, 1]``, written in place.
        done: bool ``[R]``, written in place.

    Attributes:
        tokens, done: of the sequences of this call, ``[B, 1]`` and ``[B]``.
        all_tokens: ``[R, 1]``.
        generator: what is drawn from; `begin` seeds it from the device's default one.
        kind: what a captured round of this choice depends on, besides data.
        seen: bool ``[R, V]``: what the repetition penalty hits; None without one.
    """

    def __init__(self, tokens: Tensor, done: Tensor) -> None:
        self.all_tokens, self._all_done = tokens, done
        self.tokens, self.done = tokens, done
        device, self._rows = tokens.device, len(tokens)
        self.generator = torch.Generator(device)
        self._numbers = {
            name: torch.ones((), device=device)
            for name in ("temperature", "top_p", "min_p", "penalty")
        }
        self._pad = torch.zeros((), dtype=torch.long, device=device)
        self._uniform = torch.zeros(self._rows, device=device)
        self._ends: dict[int, Tensor] = {}
        self._seen: Tensor | None = None
        self.seen: Tensor | None = None
        self.kind: Kind = (False, 0, False, False, False, 0, 0)

    def begin(
        self, choice: TokenChoice, eos: Sequence[int], pad: int, prompt: Tensor, vocabulary: int
    ) -> None:
        """Another call: ``prompt [B, L]``, B at most R; rows that are not used are done."""
        rows = len(prompt)
        self.tokens, self.done = self.all_tokens[:rows], self._all_done[:rows]
        self._all_done.zero_()
        self._all_done[rows:] = True
        for name, number in self._numbers.items():
            number.fill_(getattr(choice, name))
        self._pad.fill_(pad)
        if eos:
            ends = torch.tensor(list(eos), device=self._pad.device)
            self._ends.setdefault(len(eos), ends).copy_(ends)
        seen = choice.seen(prompt, vocabulary)
        if seen is None:
            self.seen = None
        else:
            if self._seen is None or self._seen.shape[1] != vocabulary:
                self._seen = seen.new_zeros(self._rows, vocabulary)
            self._seen.zero_()
            self._seen[:rows] = seen
            self.seen = self._seen
        self.kind = (
            choice.sample, choice.top_k, choice.top_p < 1, choice.min_p > 0, self.seen is not None,
            len(eos), vocabulary,
        )  # fmt: skip
        if choice.sample:
            seed = torch.empty((), dtype=torch.long, device=self._pad.device).random_()
            self.generator.manual_seed(int(seed))

    def renew_generator(self) -> None:
        """Another generator that goes on where this one is: a failed capture may have left it
        recording."""
        state = self.generator.get_state()
        self.generator = torch.Generator(self.generator.device)
        self.generator.set_state(state)

    def __call__(self, logits: Tensor) -> None:
        """Choose from ``logits [n, V]`` for the first n sequences; the host does not wait."""
        sample, top_k, has_top_p, has_min_p, penalty, ends, _ = self.kind
        n, numbers = len(logits), self._numbers
        tokens, done = self.all_tokens[:n], self._all_done[:n]
        seen = self.seen[:n] if penalty and self.seen is not None else None
        z = penalised(logits, seen, numbers["penalty"])
        if sample:
            p = filtered_probabilities(
                z, numbers["temperature"], top_k, numbers["top_p"] if has_top_p else 1.0,
                numbers["min_p"] if has_min_p else 0.0,
            )  # fmt: skip
            # All rows draw, however many are wanted: the next round's numbers are the same.
            chosen = draw(p, self._uniform.uniform_(generator=self.generator)[:n])
        else:
            chosen = z.argmax(-1)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        chosen = torch.where(done, self._pad, chosen)
        if ends:
            done |= (chosen[:, None] == self._ends[ends]).any(1)
        tokens.copy_(chosen[:, None])
