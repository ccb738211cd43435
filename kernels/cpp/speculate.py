"""Rounds of speculative decoding as one native call (``speculate.h``): its structures and function.

`dspark_compile.runtime.speculation.native_engine` fills them in.

What both this code and Python's has to know (names of an enumeration, a share, a bound) is Python's
alone: it is written in front of the C++ (`function`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence as Sequence_
from typing import Any

import torch

from dspark_compile.codegen.cpp import build
from dspark_compile.codegen.cpp import isa as isa_levels
from dspark_compile.kernels.cpp.choose import TYPE_NAMES

# As many requests as one call keeps track of.
MOST_REQUESTS = 64
# Tokens of a panel of a Markov head's W2.
PANEL = 64
# What a visit proposes, in the order of their numbers (`speculate` in speculate.h).
PROPOSALS: tuple[bool | str, ...] = (False, True, "lookup", "look")
# Kinds of Markov heads, in the order of their numbers.
HEADS = ("none", "vanilla", "gated", "rnn")

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double

_SOURCE = """// Rounds of speculation: logits {target}, the draft's {base}, its weights {draft}.
#include <cstdint>

namespace dspark {{
{known}
}}  // namespace dspark

#include "speculate.h"

static_assert(sizeof(dspark::BoundStages) == {stages} && sizeof(dspark::Choice) == {choice} &&
                  sizeof(dspark::Sequence) == {sequence} && sizeof(dspark::Speculation) == {state},
              "a structure of speculate.py is not that of the headers");

extern "C" __attribute__((visibility("default"))) int dspark_speculate(
    dspark::Speculation* s, int64_t count, int64_t drafting, int64_t* made) {{
  using namespace dspark;
  return speculate<{target}, {base}, {draft}>(*s, count, drafting, made);
}}
"""


class BoundStages(ctypes.Structure):
    """A bound native program."""

    _fields_ = (
        ("block", _P), ("patches", _P), ("patch_count", _I), ("bases", _P), ("stages", _I),
        ("memory", _P),
    )  # fmt: skip


class Choice(ctypes.Structure):
    """How tokens are chosen."""

    _fields_ = (
        ("temperature", _D), ("top_k", _I), ("top_p", _D), ("min_p", _D), ("penalty", _D),
    )  # fmt: skip


class Sequence(ctypes.Structure):
    """The sequential stage of a draft (``draft.h``)."""

    _fields_ = (
        ("head", _I), ("rank", _I), ("width", _I), ("vocabulary", _I),
        ("base", _P), ("base_row", _I), ("base_request", _I), ("hidden", _P), ("w1", _P),
        ("w2", _P), ("gate", _P), ("gate_bias", _P), ("confidence", _P), ("confidence_bias", _D),
        ("confidence_reads", _I), ("temperatures", _P), ("vocabulary_map", _P), ("codes", _P),
        ("memory", _P), ("next_memory", _P), ("largest", _P), ("places", _P), ("sums", _P),
        ("pairs", _I),
    )  # fmt: skip


class Speculation(ctypes.Structure):
    """State of the rounds (``speculation.h``)."""

    _fields_ = (
        ("kind", _I), ("rows", _I), ("batch", _I), ("count", _I), ("vocabulary", _I),
        ("threads", _I), ("ahead", _I),
        ("verify", _P), ("widths", _P), ("width_count", _I), ("logits", _P), ("logits_rows", _P),
        ("logits_requests", _P), ("block", _P), ("positions", _P), ("slot", _P), ("held", _P),
        ("held_count", _I), ("mask", _P), ("room", _I), ("slack", _I), ("holes", _D),
        ("filled", _P), ("text", _P), ("text_room", _I), ("lengths", _P), ("prompts", _P),
        ("done", _P),
        ("limit", _I), ("seen", _P), ("eos", _P), ("eos_count", _I), ("how", Choice),
        ("greedy", _I), ("uniform", _P),
        ("fixed", _I), ("table", _P), ("verify_seconds", _P), ("first_seconds", _P),
        ("draft_seconds", _P), ("conditional", _P),
        ("propose", BoundStages), ("append", BoundStages), ("draft_ids", _P), ("draft_block", _I),
        ("states", _P), ("state_bytes", _I), ("drafts", _I), ("pending", _P), ("context_slot", _P),
        ("context_positions", _P), ("behind", _I), ("sequence", Sequence),
        ("looks_up", _I), ("shortest", _I), ("longest", _I), ("matched", _P), ("match", _P),
        ("looked", _P), ("point", _P), ("drafted", _P),
        ("more", BoundStages), ("two", BoundStages), ("one", BoundStages), ("two_logits", _P),
        ("one_logits", _P), ("model_requests_two", _I), ("model_requests_one", _I),
        ("model_width", _I), ("model_block", _P), ("model_places", _P), ("model_held", _P),
        ("model_held_count", _I), ("model_mask", _P),
        ("counters", _P),
        ("survival", _P), ("found", _P), ("verified", _P), ("choice", _P), ("draft_weights", _P),
        ("draft_totals", _P), ("target_weights", _P), ("target_totals", _P), ("drafted_ids", _P),
        ("confidences", _P), ("recorded_logits", _P), ("recorded_accepted", _P),
        ("recorded_verified", _P), ("recorded", _P), ("ring", _I),
    )  # fmt: skip


def takes_pairs(dtype: torch.dtype, rank: int) -> bool:
    """Whether a Markov head's W2 of this dtype and rank is read in pairs, as dpbf16ps wants it."""
    return (
        dtype == torch.bfloat16 and rank % 2 == 0 and isa_levels.detect() in ("amx", "avx512_bf16")
    )


@functools.cache
def function(
    target: torch.dtype,
    base: torch.dtype,
    draft: torch.dtype,
    sources: tuple[str, ...],
    constants: tuple[tuple[str, float], ...],
) -> Any:
    """``f(Speculation*, rounds, drafting, made*) -> status`` for these dtypes of the target's
    logits, the draft's logits and its weights.

    Args:
        sources: what a round verifies comes from, in the order of their numbers.
        constants: that rounds decide by, as ``(name in C++, value)``.

    Raises:
        build.BuildError: it cannot be built.
        KeyError: there is no kernel for a dtype.
    """
    known = [
        _enumeration("Source", sources),
        _enumeration("Head", HEADS),
        f"constexpr int64_t kMostRequests = {MOST_REQUESTS}, kPanel = {PANEL};",
        *(f"constexpr double {name} = {value!r};" for name, value in constants),
    ]
    source = _SOURCE.format(
        target=TYPE_NAMES[target], base=TYPE_NAMES[base], draft=TYPE_NAMES[draft],
        known="\n".join(known), stages=ctypes.sizeof(BoundStages), choice=ctypes.sizeof(Choice),
        sequence=ctypes.sizeof(Sequence), state=ctypes.sizeof(Speculation),
    )  # fmt: skip
    made = build.load("speculate", source, isa_levels.detect()).dspark_speculate
    made.argtypes = [_P, _I, _I, _P]
    made.restype = ctypes.c_int
    return made


def _enumeration(kind: str, names: Sequence_[str]) -> str:
    """``enum Kind : int64_t { kFirst, kSecond, ... };``"""
    return f"enum {kind} : int64_t {{ {', '.join(f'k{n.capitalize()}' for n in names)} }};"
