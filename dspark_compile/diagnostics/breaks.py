"""Graph breaks in the report: at which line of user code, why, and what to write in its place.

    model.py:41 in mix: for e, size in enumerate(counts.cpu().numpy()): <why>; <what to write>

Dynamo says why in its own words. What it does not know is what this back end traces whole: loops
over experts whose turns depend on data ([moe.md](../../docs/moe.md)). So a break at a number that
is data gets a remedy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from dspark_compile.diagnostics import state

# What Dynamo says where Python asks for a number, a size or a truth that is data.
_DATA = re.compile(
    r"data[- ]dependent|Tensor\.item|\.tolist|Dynamic shape operator|Dynamic slicing|numpy|"
    r"unbacked|generic_jump|nonzero|local_scalar_dense|Could not (guard|extract)",
    re.IGNORECASE,
)
_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")
_WHOLE = (
    "in a loop over experts, rows sorted by expert and cut by the items of "
    "`torch.bincount(choice.flatten(), minlength=E).tolist()` are traced whole, and a turn for "
    "each expert with `token, slot = torch.where(choice == e)`"
)
_TURNS = (
    "a loop over experts is traced whole where each turn adds one expert's rows to the result, or "
    "appends them to a list that is only joined"
)
# (what the line of code or Dynamo's reason says, what to write); the first that fits.
_REMEDIES: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"numpy", re.IGNORECASE),
        "arrays of NumPy are followed only where a loop goes through one: write `.tolist()` in "
        "place of `.cpu().numpy()`",
    ),
    (
        re.compile(r"\.item\(|\bint\(|\bfloat\(|\bbool\(|Tensor\.item"),
        "a single number is read from a tensor: compare tensors, or read all numbers as one list "
        "with `.tolist()`",
    ),
    (
        re.compile(r"nonzero|argwhere|unique|masked_select"),
        "how many there are is data",
    ),
    (
        re.compile(r"branch|jump|\bif\b|\bwhile\b", re.IGNORECASE),
        "which way the code goes is data: compute both and choose with `torch.where`, or, to skip "
        "an expert without tokens, let the branch lead straight to the next turn (`continue`)",
    ),
)


def note(
    owner: Any, stack: Sequence[Any], reason: str, written: str, unrolled: str = ""
) -> Callable[[], None]:
    """Write a break into the report of the ``torch.compile`` call ``owner``, once for a line and
    reason; gives back what takes it out again. See `describe` for the rest."""
    report = state.current_report() if owner is None else state.start_report(id(owner))
    if owner is not None:
        report.owner = owner  # keeps the id from being used again
    text = describe(stack, reason, written, unrolled)
    if text in report.graph_breaks:
        return lambda: None
    report.graph_breaks.append(text)
    return lambda: report.graph_breaks.remove(text)


def describe(stack: Sequence[Any], reason: str, written: str = "", unrolled: str = "") -> str:
    """One line: where a graph broke, why, and what to write in its place where that is known.

    Args:
        stack: the user's frames (`traceback.FrameSummary`), innermost last; may be empty.
        reason: in Dynamo's words; its first lines are kept.
        written: why loops over experts there are traced as they are written, if that is known.
        unrolled: why a loop of decode steps there is none, if that is known.
    """
    where, code = "", ""
    if stack:
        frame = stack[-1]
        code = (frame.line or "").strip()
        name = _RESUMED.sub(r"\1", frame.name)
        where = f"{os.path.basename(frame.filename)}:{frame.lineno} in {name}: {code}: "
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else "no reason given"
    explained = next((t[12:].strip() for t in lines if t.startswith("Explanation:")), "")
    if explained:
        said += f" ({explained.rstrip('.')})"
    advice = remedy(reason, code)
    if advice and unrolled:
        advice = unrolled
    elif advice and written:
        advice = f"it is traced as it is written, because {written}; {_TURNS}"
    return f"{where}{said}{advice and f'; {advice}'}"


def remedy(reason: str, code: str = "") -> str:
    """What to write in place of ``code``, at which a graph broke; empty if that is not known.

    Only breaks at numbers, sizes and truths that are data have a remedy.
    """
    if not _DATA.search(reason):
        return ""
    text = f"{code}\n{reason}"
    found = next((advice for pattern, advice in _REMEDIES if pattern.search(text)), "")
    return f"{found}; {_WHOLE}" if found else _WHOLE
