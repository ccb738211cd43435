"""What training a draft can be told, with defaults that depend on the target's size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


class TrainError(ValueError):
    """An option of `train_draft` that is not legal; names it, its value and what helps."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train_draft`. 0 and None mean: by the target's size, see `resolve`.

    Attributes:
        layers: decoder layers of the draft.
        intermediate_size: of the draft's MLPs; 0 takes the target's.
        block_size: gamma, tokens drafted at once.
        taps: layers of the target to read; None spreads them evenly.
        markov_rank: r of the Markov head; None by the target's width, 0 for none (DFlash).
        markov_head: "vanilla", "gated" or "rnn".
        draft_vocab_size: tokens that the draft can propose, those that occur most in what the
            target wrote; 0 all. The others' rows of the lm_head and of W2 are left out when all is
            learned, which makes large vocabularies cheap to draft from.
        confidence: whether there is a confidence head.
        init: "target" starts layers and norms as copies of the target's last ones where those are
            of the same kind and shape, and ``fc`` as the identity on the last tap; "random" not.
            Anything else is the folder or Hub id of a draft of the same shapes to go on from, for
            instance to fit it to a fine-tuned target, or to give it another block size.
        mask_token_id: fills block rows; None finds an unused id, or takes the padding token.
        prompts: how many prompts the target continues.
        prompt_tokens: the longest prompt that is cut from text.
        new_tokens: what the target writes for each.
        temperatures: at which it writes, batch by batch.
        text_batch: prompts that the target continues at once.
        given_share: share of training sequences that are the files' own text instead.
        max_length: tokens of a training sequence; longer ones are cut.
        held_out: share of the prompts kept for evaluation.
        steps: optimizer steps.
        minutes: stop after so much training; the learning rate then follows the time.
        batch: sequences a step.
        anchors: blocks a sequence.
        optimizer: "adamw" as published, or "muon" for the layers' matrices (and AdamW for the
            rest), which gets further in few steps.
        lr: peak learning rate; cosine to zero after 4 % warm-up.
        dtype: of the arithmetic, "float32" or "bfloat16" (weights stay float32); None takes
            bfloat16 where the hardware multiplies it.
        device: None takes a GPU if there is one.
        compile: whether the draft and the target's layers are compiled with Inductor; None does
            so on a GPU. On a CPU the matrix products dominate, and compiling takes minutes.
        loss_elements: logits held at once; larger batches are cut in pieces of that.
        checkpoint_seconds: between checkpoints.
        eval_sequences: held-out sequences that are evaluated.
        seed: of everything random.
    """

    layers: int = 0
    intermediate_size: int = 0
    block_size: int = 7
    taps: tuple[int, ...] | None = None
    markov_rank: int | None = None
    markov_head: str = "vanilla"
    draft_vocab_size: int = 0
    confidence: bool = True
    init: str = "target"
    mask_token_id: int | None = None
    prompts: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    temperatures: tuple[float, ...] = (1.0, 0.0)
    text_batch: int = 0
    given_share: float = 0.0
    max_length: int = 0
    held_out: float = 0.02
    steps: int = 0
    minutes: float | None = None
    batch: int = 8
    anchors: int = 0
    optimizer: str = "adamw"
    lr: float = 0.0
    dtype: str | None = None
    device: str | None = None
    compile: bool | None = None
    loss_elements: int = 2**26
    checkpoint_seconds: float = 120.0
    eval_sequences: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "batch", "eval_sequences", "loss_elements"):
            if getattr(self, name) < 1:
                raise TrainError(f"{name}={getattr(self, name)}: give 1 or more")
        for name in (
            *("layers", "intermediate_size", "draft_vocab_size", "text_batch", "prompts"),
            "prompt_tokens",
            *("new_tokens", "max_length", "steps", "anchors", "lr", "checkpoint_seconds"),
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise TrainError(f"{name}={getattr(self, name)}: positive, or 0 to choose")
        if self.markov_rank is not None and self.markov_rank < 0:
            raise TrainError(f"markov_rank={self.markov_rank}: give 0 (none) or more")
        if self.markov_head not in ("vanilla", "gated", "rnn"):
            raise TrainError(f"markov_head={self.markov_head!r}: give vanilla, gated or rnn")
        if not self.init:
            raise TrainError("init='': give target, random, or a draft to go on from")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainError(f"optimizer={self.optimizer!r}: give adamw or muon")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise TrainError(f"temperatures={self.temperatures}: give one or more, none negative")
        if not 0 <= self.given_share <= 1:
            raise TrainError(f"given_share={self.given_share}: give a share from 0 to 1")
        if not 0 < self.held_out < 1:
            raise TrainError(f"held_out={self.held_out}: give a share between 0 and 1")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise TrainError(f"minutes={self.minutes}: give a positive number, or none")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise TrainError(f"dtype={self.dtype!r}: give float32 or bfloat16")

    def resolve(self, parameters: int, width: int, layers: int) -> TrainOptions:
        """With defaults filled in for a target of so many parameters, width and layers.

        Below 100 million parameters a draft has to be tiny to be cheap, and learns fast; from
        1 billion on the published recipe holds (5 layers, rank 256, 512 anchors, 6e-4).
        """
        tiny, small = parameters < 100e6, parameters < 1e9
        values: dict[str, Any] = {
            "layers": 2 if small else 5,
            "text_batch": 16 if self.device in (None, "cpu") and tiny else 64,
            "prompts": 2000 if tiny else 20_000 if small else 100_000,
            "prompt_tokens": 384 if tiny else 1024,
            "new_tokens": 256 if tiny else 512,
            "max_length": 768 if tiny else 2048 if small else 4096,
            "steps": 3000 if tiny else 10_000 if small else 30_000,
            "anchors": 96 if tiny else 128 if small else 512,
            "lr": 1e-3 if tiny else 6e-4,
        }
        chosen = {n: v for n, v in values.items() if not getattr(self, n)}
        if self.markov_rank is None:
            chosen["markov_rank"] = min(256, max(32, width // 10 // 32 * 32))
        if self.taps is None:
            from dspark_compile.models.draft_config import default_taps

            chosen["taps"] = default_taps(layers, 3 if tiny else 5)
        return dataclasses.replace(self, **chosen)
