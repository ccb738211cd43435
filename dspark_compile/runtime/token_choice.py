"""How a decode loop chooses tokens: what Hugging Face's logits processors say, as one kernel.

Repetition penalty, temperature, top-k, top-p and min-p, in this order, are known (`TokenChoice`);
others are called as they are by the decode loop, which costs a few torch ops a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark_compile.ops.token import draw, drawable, filtered_probabilities, penalised


@dataclass(frozen=True)
class TokenChoice:
    """One way to choose.

    Attributes:
        sample: draw from the distribution; otherwise arg-max.
        temperature, top_k, top_p, min_p: what shapes the distribution; 1, 0, 1, 0 are off.
        penalty: repetition penalty of tokens that came before; 1 is off.
        ignored: how many of a row's first tokens the penalty does not count: a number, or one for
            each row.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalty: float = 1.0
    ignored: int | tuple[int, ...] = 0

    def seen(self, prompt: Tensor, vocabulary: int) -> Tensor | None:
        """Bool ``[B, V]``: tokens of ``prompt [B, L]`` that the penalty hits; None: it is off."""
        if self.penalty == 1:
            return None
        ignored = torch.tensor(self.ignored, device=prompt.device).reshape(-1, 1)
        skipped = torch.arange(prompt.shape[1], device=prompt.device) < ignored
        # One more column takes what is not to be counted.
        counted = torch.where(skipped | (prompt >= vocabulary), vocabulary, prompt)
        seen = torch.zeros(
            prompt.shape[0], vocabulary + 1, dtype=torch.bool, device=prompt.device
        ).scatter_(1, counted, True)
        return seen[:, :vocabulary].contiguous()


_ORDER = (
    "RepetitionPenaltyLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
)


def parse(processors: Sequence[Any], sample: bool) -> tuple[TokenChoice | None, str | None]:
    """``(choice, None)`` for Hugging Face processors that are known, else ``(None, reason)``."""
    values: dict[str, Any] = {"sample": sample}
    last = -1
    for processor in processors:
        name = type(processor).__name__
        if name not in _ORDER or not type(processor).__module__.startswith("transformers."):
            return None, f"{name} is called in Python at every step"
        if _ORDER.index(name) <= last:
            return None, f"{name} comes behind {_ORDER[last]}: they are called in Python"
        last = _ORDER.index(name)
        if name == "RepetitionPenaltyLogitsProcessor":
            ignored = getattr(processor, "prompt_ignore_length", None)
            if isinstance(ignored, Tensor):
                ignored = tuple(ignored.flatten().tolist())
            values["ignored"] = ignored or 0
            values["penalty"] = processor.penalty
            continue
        # TopK keeps min_tokens_to_keep inside of its top_k.
        if getattr(processor, "filter_value", -torch.inf) != -torch.inf or (
            getattr(processor, "min_tokens_to_keep", 1) > 1
        ):
            return None, f"{name} with unusual settings is called in Python at every step"
        key = name.removesuffix("LogitsWarper")
        attribute = {"Temperature": "temperature", "TopK": "top_k", "TopP": "top_p"}.get(
            key, "min_p"
        )
        values[attribute] = getattr(processor, attribute)
    return TokenChoice(**values), None


@dataclass
class Chooser:
    """Chooses tokens for ``rows`` sequences, on the device of their logits.

    Attributes:
        tokens: int64 ``[R, 1]``: the tokens chosen last, in place.
        done: bool ``[R]``.
        choice: how.
        eos: tokens that end a row; then it gets ``pad``.
        seen: bool ``[R, V]``: tokens that came before; None without a penalty.
    """

    tokens: Tensor
    done: Tensor
    choice: TokenChoice
    eos: list[int]
    pad: int
    seen: Tensor | None = None
    _native: Any | None = field(default=None, repr=False)
    _for: tuple[int, ...] = field(default=(), repr=False)
    _drawn: Tensor | None = field(default=None, repr=False)
    _next: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        rows = self.tokens.shape[0]
        self.uniform = torch.zeros(rows, device=self.tokens.device) if self.choice.sample else None

    def draw(self) -> None:
        """Fresh uniform numbers, 64 steps of them at a time: the generator is slow for few."""
        if self.uniform is None:
            return
        if self._drawn is None or self._next == len(self._drawn):
            self._drawn, self._next = self._fresh(64, self.uniform), 0
        self.uniform.copy_(self._drawn[self._next])
        self._next += 1

    def draw_many(self, count: int) -> Tensor | None:
        """Uniform numbers ``[count, R]``, those that `draw` would give one after the other: how
        many steps are taken alone does not change a text. None: nothing is random."""
        if self.uniform is None:
            return None
        held = self._fresh(0, self.uniform) if self._drawn is None else self._drawn[self._next :]
        if len(held) < count:
            held = torch.cat((held, self._fresh(count - len(held), self.uniform)))
        self._drawn, self._next = held, count
        return held[:count]

    @staticmethod
    def _fresh(count: int, like: Tensor) -> Tensor:
        return torch.rand(count, *like.shape, device=like.device)

    def __call__(self, logits: Tensor) -> int | None:
        """Choose from ``logits [R, V]``; how many rows are not done, on a CPU."""
        self.draw()
        if logits.device.type == "cpu":
            native = self.native(logits)
            if native is not None:
                return native()
        self._plain(logits)
        return int((~self.done).sum()) if logits.device.type == "cpu" else None

    def native(self, logits: Tensor) -> Any | None:
        """The kernel for logits that stay where they are (`NativeChooser`), or None."""
        from dspark_compile.codegen.cpp import build
        from dspark_compile.kernels.cpp.choose import NativeChooser

        key = (logits.data_ptr(), *logits.shape, *logits.stride())
        if key != self._for:
            self._for, self._native = key, None
            if logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and (
                logits.stride(-1) == 1
            ):
                how = self.choice
                with contextlib.suppress(build.BuildError):  # no compiler: torch does it
                    self._native = NativeChooser(
                        logits, self.tokens, self.done, uniform=self.uniform, seen=self.seen,
                        eos=self.eos, pad=self.pad, temperature=how.temperature, top_k=how.top_k,
                        top_p=how.top_p, min_p=how.min_p, penalty=how.penalty,
                    )  # fmt: skip
        return self._native

    def _plain(self, logits: Tensor) -> None:
        """The same in torch ops, without a synchronisation."""
        how = self.choice
        z = penalised(logits, self.seen, how.penalty)
        if self.uniform is None:
            chosen = z.argmax(-1)
        else:
            p = filtered_probabilities(z, how.temperature, how.top_k, how.top_p, how.min_p)
            chosen = draw(drawable(p, self.done), self.uniform)
        chosen = torch.where(self.done, self.pad, chosen)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        for token in self.eos:
            self.done |= chosen == token
        self.tokens.copy_(chosen[:, None])
