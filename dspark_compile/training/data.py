"""Prompts from the user's files.

=================  =============================================================================
``*.jsonl``        one object a line: ``prompt`` (text), ``messages`` or ``conversations`` (a chat,
                   cut before its last answer, written with the tokenizer's template), or ``text``
``*.json``         a list of such objects, or of texts
any other file     UTF-8 text, from which windows of random lengths are cut
=================  =============================================================================

A folder stands for all files in it. A prompt or chat is used whole; text gives a window for every
few hundred tokens. What follows a prompt in the file is not used: the target writes that itself.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BINARY = {".safetensors", ".pt", ".bin", ".npz", ".png", ".jpg", ".gz", ".zip", ".whl", ".so"}


def read(path: Path) -> Iterator[tuple[str, Any]]:
    """``("text", str)`` or ``("prompt", str)`` or ``("chat", messages)`` items of a file or folder.

    Raises:
        ValueError: there is nothing to read, or a line is not one of the forms above.
    """
    if not path.exists():
        raise ValueError(f"--data {str(path)!r} does not exist; give a file or a folder of text")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if p.suffix not in _BINARY and not p.name.startswith(".")]
    found = False
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            if not path.is_dir():
                raise ValueError(f"--data {str(file)!r} is not UTF-8 text") from None
            continue
        for item in _items(file, text):
            found = True
            yield item
    if not found:
        raise ValueError(f"--data {str(path)!r} holds no text, no prompts and no chats")


def _items(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    if file.suffix == ".jsonl":
        entries = [
            (f"{file}:{i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
        for where, line in entries:
            try:
                yield _item(where, json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None
    elif file.suffix == ".json":
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from None
        if not isinstance(data, list):
            raise ValueError(f"{file} holds no list of prompts, chats or texts")
        for i, entry in enumerate(data):
            yield ("text", entry) if isinstance(entry, str) else _item(f"{file}[{i}]", entry)
    elif text.strip():
        yield "text", text


def _item(where: str, entry: Any) -> tuple[str, Any]:
    if isinstance(entry, dict):
        for name in ("messages", "conversations"):
            if isinstance(entry.get(name), list) and entry[name]:
                return "chat", [_message(where, m) for m in entry[name]]
        for name in ("prompt", "text"):
            if isinstance(entry.get(name), str) and entry[name]:
                return name, entry[name]
    raise ValueError(f"{where} has none of: prompt, messages, conversations, text")


def _message(where: str, message: Any) -> dict[str, str]:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    content = message.get("content", message.get("value")) if isinstance(message, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{where} has a message without role and content")
    return {"role": {"human": "user", "gpt": "assistant"}.get(role, role), "content": content}


def prompts(path: Path, tokenizer: Any, *, longest: int, count: int, seed: int) -> list[list[int]]:
    """At most ``count`` prompts as token ids, each of at most ``longest`` tokens, in random order.

    Windows of text are 16 tokens to ``longest``, short ones as likely as long ones on a logarithmic
    scale: a draft has to work early in a context and late.

    Raises:
        ValueError: see `read`; or a chat needs a template that the tokenizer lacks.
    """
    rng = random.Random(seed)
    whole: list[list[int]] = []
    streams: list[list[int]] = []
    for kind, item in read(path):
        if kind == "text":
            streams.append(_encode(tokenizer, item))
            continue
        if kind == "chat":
            item = _chat(tokenizer, item)
        ids = _encode(tokenizer, item, special=kind == "prompt")
        if ids:
            whole.append(ids[-longest:])
    rng.shuffle(whole)
    chosen = whole[:count]
    chosen += _windows(streams, longest, count - len(chosen), rng)
    rng.shuffle(chosen)
    if not chosen:
        raise ValueError(f"--data {str(path)!r} has no text of 17 tokens or more")
    return chosen


def _chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the data has chats, but the target's tokenizer has no chat template; give prompts or "
            "plain text"
        )
    last = max((i for i, m in enumerate(messages) if m["role"] != "assistant"), default=-1)
    return tokenizer.apply_chat_template(
        messages[: last + 1], tokenize=False, add_generation_prompt=True
    )


def _encode(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _windows(
    streams: list[list[int]], longest: int, count: int, rng: random.Random
) -> list[list[int]]:
    """Windows from texts in proportion to their lengths."""
    streams = [s for s in streams if len(s) > 16]
    if count <= 0 or not streams:
        return []
    least, most = math.log(16), math.log(max(longest, 17))
    windows = []
    for stream in rng.choices(streams, weights=[len(s) for s in streams], k=count):
        size = min(int(math.exp(rng.uniform(least, most))), len(stream) - 1)
        start = rng.randrange(len(stream) - size)
        windows.append(stream[start : start + size])
    return windows
