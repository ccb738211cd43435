"""How good a draft is, on texts that the target wrote: accepted length and calibration.

Both come from one pass over a text, without generating again. At temperature 0 the accepted prefix
of a block ends where the draft's choice is not the target's, and up to there the tokens before are
the text's; so teacher-forced choices give exactly the accepted lengths, and walking from anchor to
anchor gives exactly the rounds of greedy decoding. At temperature 1 the probability of acceptance
is ``1 - ||p_d - p_t||_1 / 2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark_compile.models.draft import DraftModel
from dspark_compile.runtime.speculation.calibration import Calibration, fit
from dspark_compile.training.batches import collate
from dspark_compile.training.options import TrainOptions
from dspark_compile.training.regenerate import Text
from dspark_compile.training.step import Blocks, autocast, block_logits, observe


@dataclass
class Evaluation:
    """Numbers on held-out texts.

    Attributes:
        tau_greedy: committed tokens a round, bonus included, of greedy decoding; None where no
            held-out text was written at temperature 0.
        tau_sampled: the same expected at temperature 1, over the anchors; None without any.
        conditional: c_k at temperature 0: accepted at k, given that it was reached.
        accept_sampled: acceptance probability at each k at temperature 1.
        rounds: greedy rounds walked; anchors: blocks looked at.
        fitted, fitted_sampled: STS of all anchors, to acceptance at temperature 0 and at 1.
        ece_before, ece_after: of the prefix probabilities at temperature 0, by k: fitted to one
            half of the anchors, measured on the other.
        reliability: ``(predicted, happened, count)`` of 15 bins, before and after, over all k.
    """

    tau_greedy: float | None = None
    tau_sampled: float | None = None
    conditional: list[float] = field(default_factory=list)
    accept_sampled: list[float] = field(default_factory=list)
    rounds: int = 0
    anchors: int = 0
    fitted: Calibration | None = None
    fitted_sampled: Calibration | None = None
    ece_before: list[float] = field(default_factory=list)
    ece_after: list[float] = field(default_factory=list)
    reliability: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""

        def short(values: Sequence[float]) -> list[float]:
            return [round(v, 4) for v in values]

        return {
            "tau_greedy": None if self.tau_greedy is None else round(self.tau_greedy, 4),
            "tau_sampled": None if self.tau_sampled is None else round(self.tau_sampled, 4),
            "conditional": short(self.conditional),
            "accept_sampled": short(self.accept_sampled),
            "rounds": self.rounds,
            "anchors": self.anchors,
            "ece_before": short(self.ece_before),
            "ece_after": short(self.ece_after),
            "temperatures": short(self.fitted.temperatures.tolist()) if self.fitted else None,
        }

    @staticmethod
    def told(tau: float | None) -> str:
        """How a tau is printed."""
        return "not measured" if tau is None else f"{tau:.2f}"

    def calibration(self) -> dict[str, Any] | None:
        """What is saved beside the draft; None without a confidence head."""
        if self.fitted is None:
            return None
        data = self.fitted.to_dict()
        if self.fitted_sampled is not None:
            data["sampled"] = self.fitted_sampled.to_dict()
        return data


@torch.no_grad()
def evaluate(
    target: Any,
    draft: DraftModel,
    texts: Sequence[Text],
    options: TrainOptions,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Evaluate on held-out ``texts``, at most ``options.eval_sequences`` of them.

    Greedy numbers come from all texts at every anchor: what counts is the target's own arg-max, not
    how the text was sampled; rounds are walked on the texts written at temperature 0.
    """
    length = draft.config.num_drafted
    logits, accepted, sampled, walked = [], [], [], []
    generator = torch.Generator().manual_seed(options.seed)
    accept = torch.zeros(length)
    counts = torch.zeros(length)
    reached, passed = torch.zeros(length), torch.zeros(length)
    expected, blocks_seen = 0.0, 0
    for text in list(texts)[: options.eval_sequences]:
        if len(text.ids) - text.prompt < length + 2:
            continue
        ids, mine = collate([_tail(text, options.max_length)])
        device = draft.fc.weight.device
        blocks = observe(target, draft, ids.to(device), mine.to(device), ids.shape[1])
        rates, prefix, confidence, whole = _blocks(draft, blocks, dtype, options.loss_elements)
        accept += rates[whole].sum(0)
        counts += int(whole.sum())
        expected += float(rates[whole].cumprod(-1).sum()) + int(whole.sum())
        blocks_seen += int(whole.sum())
        reach = (prefix[whole][:, None] >= torch.arange(length)).float()
        reached += reach.sum(0)
        passed += (prefix[whole][:, None] > torch.arange(length)).float().sum(0)
        if confidence is not None:
            logits.append(confidence[whole])
            accepted.append(prefix[whole])
            passed_by_chance = torch.rand(rates.shape, generator=generator) < rates
            sampled.append(passed_by_chance.long().cumprod(-1).sum(-1)[whole])
        if text.temperature == 0:
            walked += _walk(prefix, blocks.anchors[0].cpu(), whole)
    result = Evaluation(
        tau_greedy=sum(walked) / len(walked) if walked else None,
        tau_sampled=expected / blocks_seen if blocks_seen else None,
        conditional=(passed / reached.clamp(min=1)).tolist(),
        accept_sampled=(accept / counts.clamp(min=1)).tolist(),
        rounds=len(walked),
        anchors=blocks_seen,
    )
    if logits:
        _calibrate(result, torch.cat(logits), torch.cat(accepted))
        result.fitted_sampled = fit(torch.cat(logits), torch.cat(sampled))
    return result


def _blocks(
    draft: DraftModel, blocks: Blocks, dtype: torch.dtype, elements: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Of one sequence's A blocks, on the CPU: acceptance at T = 1 ``[A, K]``, accepted prefix at
    T = 0 ``[A]``, confidence logits ``[A, K]``, and which blocks lie wholly inside ``[A]``."""
    with autocast(blocks.ids.device, dtype):
        hidden = draft.blocks(blocks.ids, draft.context(blocks.taps), blocks.anchors).flatten(0, 1)
    previous, mask = blocks.previous.flatten(0, 1), blocks.mask.flatten(0, 1)
    count = max(1, elements // (mask.shape[1] * draft.config.vocab_size))
    rates, same, confidences = [], [], []
    for start in range(0, len(mask), count):
        rows = slice(start, start + count)
        with autocast(blocks.ids.device, dtype):
            own, confidence = draft.forced(hidden[rows], previous[rows])
        own = draft.to_target_vocabulary(own)
        theirs = block_logits(blocks, rows).float()
        distance = (torch.softmax(own, -1) - torch.softmax(theirs, -1)).abs().sum(-1)
        rates.append((1 - 0.5 * distance).clamp(0, 1).cpu())
        same.append((own.argmax(-1) == theirs.argmax(-1)).cpu())
        if confidence is not None:
            confidences.append(confidence.float().cpu())
    # The target's own choice, at tokens before that are the text's: exact for greedy texts, and for
    # sampled ones the prefix that greedy verification of this text would accept.
    prefix = torch.cat(same).long().cumprod(-1).sum(-1)
    joined = torch.cat(confidences) if confidences else None
    return torch.cat(rates), prefix, joined, mask.all(-1).cpu()


def _walk(prefix: Tensor, anchors: Tensor, whole: Tensor) -> list[int]:
    """Committed tokens of each round of greedy decoding along a text."""
    place = {a: i for i, a in enumerate(anchors.tolist()) if whole[i]}
    at, rounds = min(place, default=-1), []
    while at in place:
        rounds.append(int(prefix[place[at]]) + 1)
        at += rounds[-1]
    return rounds


def _calibrate(result: Evaluation, logits: Tensor, accepted: Tensor) -> None:
    """Fit on every other anchor, measure on the rest, then keep the fit to all."""
    half = fit(logits[::2], accepted[::2])
    rest_logits, rest = logits[1::2], accepted[1::2]
    from dspark_compile.runtime.speculation.calibration import expected_calibration_error

    everywhere = torch.ones(len(rest), dtype=torch.bool)
    plain = torch.sigmoid(rest_logits).cumprod(-1)
    scaled = half.survival(rest_logits)
    for name, survival in (("before", plain), ("after", scaled)):
        errors = [
            float(expected_calibration_error(survival[:, k], rest > k, everywhere))
            for k in range(logits.shape[1])
        ]
        setattr(result, f"ece_{name}", errors)
        result.reliability[name] = _reliability(survival, rest)
    result.fitted = fit(logits, accepted)


def _reliability(survival: Tensor, accepted: Tensor) -> list[tuple[float, float, int]]:
    happened = (accepted[:, None] > torch.arange(survival.shape[1])).flatten().float()
    predicted = survival.flatten()
    index = (predicted * 15).long().clamp(0, 14)
    rows = []
    for b in range(15):
        inside = index == b
        n = int(inside.sum())
        if n:
            rows.append((float(predicted[inside].mean()), float(happened[inside].mean()), n))
    return rows


def _tail(text: Text, longest: int) -> Text:
    if len(text.ids) <= longest:
        return text
    return Text(text.ids[:longest], min(text.prompt, longest - 2), text.temperature)
