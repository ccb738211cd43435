"""Families of transformers through the back end: exact, no more graphs than Dynamo needs, sites
raised.

The default run takes ten that differ in everything that matters (norm, RoPE, attention, MLP,
cache); ``-m exhaustive`` takes the rest. The sweep with its table is ``benchmarks/zoo.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from . import families, runner
from .gaps import KNOWN_GAPS

QUICK = (
    "llama",
    "qwen3",
    "gemma2",
    "glm",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "cohere",
    "falcon",
    "deepseek_v3",
)
TOLERANCE = 1e-5
RAISED = 0.95
TIMEOUT = 300
OPTIONS = {"inner": "eager"}


def parameters() -> list[Any]:
    return [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.exhaustive)
        for family in families.tested()
    ]


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    runner.warm(options=OPTIONS)


@functools.lru_cache(maxsize=1)
def results(family: str) -> dict[str, Any]:
    return runner.run_guarded(family, TIMEOUT, options=OPTIONS)


@pytest.mark.parametrize("family", parameters())
def test_family(family: str) -> None:
    result = results(family)
    assert "failure" not in result, result["failure"]
    problems: list[str] = []
    for mode, entry in result["modes"].items():
        if entry["status"] == "error":
            problems.append(f"{mode}: {entry['reason']}")
        elif entry["status"] == "ran":
            if not entry["error"] <= TOLERANCE:
                problems.append(f"{mode}: logits differ by {entry['error']:.1e}")
            problems += [f"{mode}: compiled unchanged, {why}" for why in entry["fallbacks"]]
    assert not problems, "\n".join(problems)
    assert result["modes"]["prefill"]["status"] == "ran", result["modes"]["prefill"]["reason"]

    for mode, entry in result["modes"].items():
        if entry["status"] == "ran":
            base = runner.reference_counts(family, mode, entry, torch.float32)
            for name, most in zip(runner.COUNTS, base, strict=True):
                if entry[name] > most:
                    problems.append(f"{mode}: {entry[name]} {name}, Dynamo alone {most}")
    assert not problems, "\n".join(problems)

    for kind, (have, want) in runner.site_counts(result).items():
        enough = have >= RAISED * want
        known = KNOWN_GAPS.get((family, kind))
        if known is None and not enough:
            reasons = rejection_lines(result, kind)
            problems.append("\n".join([f"{kind}: {have} of {want} sites raised", *reasons]))
        elif known is not None and enough:
            problems.append(f"{kind}: all raised, yet listed in KNOWN_GAPS: {known}")
    assert not problems, "\n".join(problems)


def rejection_lines(result: dict[str, Any], kind: str) -> list[str]:
    found = {
        f"  {r['condition']} at {r['source']}": None
        for entry in result["modes"].values()
        for r in entry.get("rejections", [])
        if r["kind"] == kind
    }
    return list(found)[:5]


def test_every_model_type_is_accounted_for() -> None:
    known = {*families.tested(), *families.EXCLUDED, *families.aliases()}
    assert known == set(families.all_families())


@pytest.mark.parametrize("family", QUICK)
def test_building_is_repeatable_and_dense_in_parameters(family: str) -> None:
    first, second = families.build(family), families.build(family)
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name
        assert a.numel() == 1 or a.float().std() > 0, f"{name} is constant"
