"""The text of the demonstration model: the standard library and its documentation, what is held out
of them, the tokenizer, the windows to train on and the prompts to try.
"""

from __future__ import annotations

import ast
import pathlib
import random
import sysconfig
import textwrap

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOT = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 2048

# A line break with the blank lines and the indentation that follow it; a word with the space
# before it; up to three digits; punctuation; the spaces in front of a comment that was lined up.
PATTERN = (
    r"\r?\n[\r\n\t ]*"
    r"| ?[\p{L}\p{M}_]+"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+"
    r"|[^\S\r\n]+(?![^\r\n])"
    r"|[^\S\r\n]+(?=[^\S\r\n])"
    r"|\s+"
)

SKIPPED_FOLDERS = {
    "__pycache__", "encodings", "ensurepip", "idlelib", "lib-dynload", "pydoc_data",
    "site-packages", "test", "tests",
}  # fmt: skip
SKIPPED_FILES = ("_sysconfigdata*", "entities.py", "_casefix.py", "__phello__*", "this.py")
DOC_FOLDERS = ("faq", "howto", "library", "reference", "tutorial", "using")


def stdlib_sources() -> dict[str, str]:
    """Python sources of the running interpreter's standard library, by relative path."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or any(f.startswith("config-") for f in folders):
            continue
        if any(path.match(pattern) for pattern in SKIPPED_FILES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            found[f"Lib/{relative.as_posix()}"] = text.replace("\t", "        ")
    return found


def documentation(folder: str | None) -> dict[str, str]:
    """The reST sources of the documentation under ``folder``; else pydoc's topics."""
    found = {}
    if folder:
        for path in sorted(pathlib.Path(folder).rglob("*.rst.txt")):
            parts = path.parts
            if "_sources" not in parts:
                continue
            relative = parts[parts.index("_sources") + 1 :]
            if relative[0] in DOC_FOLDERS:
                found["Doc/" + "/".join(relative)] = path.read_text(encoding="utf-8")
    if not found:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            return {}
        found = {f"topics/{name}": text for name, text in sorted(topics.items())}
    return found


def split(files: dict[str, str], share: float, seed: int, most: int) -> tuple[list, list]:
    """(training names, held-out names): whole files of 2 kB to ``most`` bytes are held out."""
    names = sorted(files)
    random.Random(seed).shuffle(names)
    target = share * sum(len(t.encode()) for t in files.values())
    held, size = [], 0
    for name in names:
        length = len(files[name].encode())
        if size < target and 2_000 <= length <= most:
            held.append(name)
            size += length
    chosen = set(held)
    return [name for name in sorted(files) if name not in chosen], sorted(held)


def collect(docs: str | None, seed: int) -> dict:
    code, text = stdlib_sources(), documentation(docs)
    code_train, code_held = split(code, 0.03, seed, 60_000)
    text_train, text_held = split(text, 0.03, seed, 60_000)
    every = code | text
    return {
        "code": {n: every[n] for n in code_train},
        "text": {n: every[n] for n in text_train},
        "held_code": {n: every[n] for n in code_held},
        "held_text": {n: every[n] for n in text_held},
    }


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOT,
        eos_token=EOT,
        pad_token=EOT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, files: dict[str, str]) -> list[torch.Tensor]:
    """One tensor for each file: its tokens and the end-of-text token."""
    encoded = []
    for text in files.values():
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        encoded.append(torch.tensor([*ids, tokenizer.eos_token_id]))
    return encoded


def make_prompts(tokenizer, files: dict[str, str], count: int, seed: int) -> list[dict]:
    """Beginnings of functions and classes, cut before a line break after 40 to 200 tokens."""
    rng = random.Random(seed)
    candidates: dict = {}
    for name, text in files.items():
        lines = [line + "\n" for line in text.split("\n")]
        try:
            nodes = list(ast.walk(ast.parse(text)))
        except SyntaxError:
            continue
        for node in nodes:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            body = textwrap.dedent("".join(lines[start : node.end_lineno]))
            body_lines = body.splitlines(keepends=True)
            wanted, prompt, size = rng.randint(40, 160), "", 0
            for used in range(1, len(body_lines) + 1):
                prompt = "".join(body_lines[:used]).rstrip()
                size = len(tokenizer(prompt, verbose=False).input_ids)
                if size >= wanted:
                    break
            rest = body[len(prompt) :]
            if 40 <= size <= 200 and len(tokenizer(rest, verbose=False).input_ids) >= 40:
                entry = {"file": name, "line": start + 1, "name": node.name, "tokens": size}
                entry |= {"prompt": prompt, "reference": rest[:2000]}
                candidates.setdefault(name, []).append(entry)
    chosen: list = []
    names = sorted(candidates)
    rng.shuffle(names)
    while len(chosen) < count and any(candidates.values()):
        for name in names:  # one of each file in turn, so that no file dominates
            if candidates[name] and len(chosen) < count:
                chosen.append(candidates[name].pop(rng.randrange(len(candidates[name]))))
    return chosen


class Windows:
    """An endless, seeded stream of packed windows.

    A pass has all of the code and one third of the documentation, in turn, the files in a new
    order.  The text of a pass is cut in ``LANES`` equal lanes, and windows come from one lane after
    the other, so that the windows of a step come from different files.
    """

    LANES = 32

    def __init__(self, code: list[torch.Tensor], text: list[torch.Tensor], seed: int):
        self.code, self.text, self.seed = code, text, seed
        self.start(0)

    def start(self, epoch: int):
        documents = self.code + self.text[epoch % 3 :: 3]
        random.Random(self.seed * 1000 + epoch).shuffle(documents)
        stream = torch.cat(documents)
        self.epoch, self.lane = epoch, 0
        self.lanes = stream[: len(stream) // self.LANES * self.LANES].view(self.LANES, -1)
        self.positions = [0] * self.LANES

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """``rows`` windows of ``length + 1`` tokens (the last is only a label)."""
        windows = []
        for _ in range(rows):
            position = self.positions[self.lane]
            if position + length + 1 > self.lanes.shape[1]:
                self.start(self.epoch + 1)
                position = 0
            windows.append(self.lanes[self.lane, position : position + length + 1])
            self.positions[self.lane] += length
            self.lane = (self.lane + 1) % self.LANES
        return torch.stack(windows)

    def progress(self) -> float:
        """Passes over the data so far."""
        return self.epoch + sum(self.positions) / self.lanes.numel()

    def state(self) -> dict:
        return {"epoch": self.epoch, "positions": list(self.positions), "lane": self.lane}

    def restore(self, state: dict):
        self.start(state["epoch"])
        self.positions, self.lane = list(state["positions"]), state["lane"]
