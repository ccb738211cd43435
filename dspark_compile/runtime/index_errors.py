"""What an index outside of a table means, in words of the caller's arguments."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

# As eager code, a native step and Inductor's kernels say it.
_SAID = re.compile(r"out of (range|bounds)|outside of its table", re.IGNORECASE)


@contextlib.contextmanager
def explained(
    input_ids: Tensor, length: int, vocabulary: int | None, positions: int | None
) -> Iterator[None]:
    """Around a generation: an index that no table has is raised with the argument it comes from.

    Args:
        input_ids: of the prompt, as they came.
        length: of the text at most.
        vocabulary: ids that the model knows; None: that is not known.
        positions: that the model was made for; None: that is not known.

    Raises:
        IndexError: in place of whatever said so.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        reason = _reason(input_ids, length, vocabulary, positions)
        if reason is None or not _SAID.search(str(error)):
            raise
        raise IndexError(reason) from error


def _reason(
    input_ids: Tensor, length: int, vocabulary: int | None, positions: int | None
) -> str | None:
    if not input_ids.numel():
        return None
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "" if vocabulary is None else f": the model knows 0 to {vocabulary - 1}"
        return f"input_ids hold {low if low < 0 else high}, which is no token{known}"
    if positions is not None and length > positions:
        return (
            f"prompt and new tokens are up to {length} together, and the model has {positions} "
            "positions: ask for fewer with max_new_tokens or max_length, or shorten the prompt"
        )
    return None


def known_to(model: Any) -> tuple[int | None, int | None]:
    """(vocabulary, positions) of a Hugging Face model, as far as it says."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (
        getattr(embeddings, "num_embeddings", None),
        getattr(config, "max_position_embeddings", None),
    )
