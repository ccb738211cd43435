"""The training text, written by the target itself: on-policy text matters most.

Prompts are continued in batches of about equal length, a part of them greedily and the rest at the
temperatures given. The result is kept in chunks on disk, so that a killed run goes on with the next
chunk; nothing but token ids is stored, no hidden states.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As many sequences as a native decode step takes on a CPU.
NATIVE_ROWS = 16


@dataclass
class Text:
    """A prompt and what the target wrote after it."""

    ids: Tensor  # [S] int64
    prompt: int  # how many of them are the prompt
    temperature: float


def regenerate(
    target: Any,
    prompts: Sequence[list[int]],
    folder: Path,
    *,
    new_tokens: int,
    temperatures: Sequence[float],
    batch: int,
    pad: int,
    eos: Sequence[int],
    seed: int,
    native: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Text]:
    """Continue every prompt; read back what an earlier run has already written.

    Args:
        target: a causal language model of transformers, in eval mode.
        folder: where the chunks lie; one a batch.
        temperatures: taken in turn, batch by batch; 0 is greedy.
        native: decode with compiled rounds on a CPU, which takes some seconds to compile.
        progress: called with the number of prompts done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # About equal lengths share a batch, so that little of it is padding; batches in random order,
    # so that a part of them is a fair sample.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    shuffle = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences: list[Text] = []
    done = 0
    for number, which in enumerate(shuffle):
        path = folder / f"text-{number:05d}.safetensors"
        temperature = temperatures[number % len(temperatures)]
        chosen = [prompts[i] for i in batches[which]]
        if not path.is_file():
            torch.manual_seed(seed * 100_003 + number)
            written = continue_(target, chosen, new_tokens, temperature, pad, eos, native)
            _save(path, written)
        sequences += _load(path, temperature)
        done += len(chosen)
        progress(done)
    return sequences


@torch.no_grad()
def continue_(
    target: Any,
    prompts: Sequence[list[int]],
    new_tokens: int,
    temperature: float,
    pad: int,
    eos: Sequence[int],
    native: bool = False,
) -> list[tuple[Tensor, int]]:
    """Each prompt with its continuation, and the prompt's length."""
    device = target.get_input_embeddings().weight.device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        # The plain distribution: whatever the model's defaults are, the draft learns p itself.
        sampling |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    write = target.generate
    if native and device.type == "cpu" and len(prompts) <= NATIVE_ROWS:
        from dspark_compile.runtime.generate import generate

        write = functools.partial(generate, target)
    out = write(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        **sampling,
    ).cpu()
    stops = torch.tensor(sorted(eos), dtype=torch.long)
    result = []
    for row, prompt in enumerate(prompts):
        text = out[row, longest - len(prompt) :]
        ended = torch.isin(text[len(prompt) :], stops).nonzero()
        if len(ended):
            text = text[: len(prompt) + int(ended[0]) + 1]
        result.append((text.clone(), len(prompt)))
    return result


def _save(path: Path, texts: Sequence[tuple[Tensor, int]]) -> None:
    from safetensors.torch import save_file

    tensors = {
        "tokens": torch.cat([ids for ids, _ in texts]).to(torch.int32),
        "lengths": torch.tensor([len(ids) for ids, _ in texts]),
        "prompts": torch.tensor([prompt for _, prompt in texts]),
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def _load(path: Path, temperature: float) -> list[Text]:
    from safetensors.torch import load_file

    tensors = load_file(path)
    texts = tensors["tokens"].long().split(tensors["lengths"].tolist())
    return [
        Text(ids, prompt, temperature) for ids, prompt in zip(texts, tensors["prompts"].tolist())
    ]
