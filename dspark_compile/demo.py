"""``make demo``: the shipped model, compiled, generating from a real prompt.

Eager, Inductor, dspark and dspark with an int8 cache decode the same prompt in turn, in
one interleaved run; the medians are printed beside the cache's bytes, the largest
difference of the logits from eager, whole calls of ``generate``, and the report of what
the compiler did.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self._items = []

    def push(self, item):
        """Put an item on top."""
'''


@dataclass
class Contestant:
    """One way to run a decode step.

    Attributes:
        name: as printed.
        step: ``step(tokens [1, 1], cache) -> logits [1, 1, V]``.
        cache: its own static cache, prefilled with the prompt.
        seconds: time of each decoded token.
        compile_seconds: time of the first call.
        difference: largest difference of its logits from eager's, fed the same tokens.
    """

    name: str
    step: Callable[..., torch.Tensor]
    cache: Any
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0
    difference: float = 0.0
    tokens: list[int] = field(default_factory=list)


def run(new_tokens: int = 96, rounds: int = 6, console: Console | None = None) -> None:
    """Run the demo.

    Args:
        new_tokens: tokens to generate, in all.
        rounds: how many turns each contestant takes; each decodes its share of the tokens.

    Raises:
        FileNotFoundError: the shipped model is missing from the installation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

    from .diagnostics.state import last_report
    from .models import DEMO_PATH

    if not (DEMO_PATH / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{DEMO_PATH} has no model.safetensors: the shipped model is part of the package; "
            "reinstall it, or train one with models/train_demo.py"
        )
    console = console or Console()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_PATH)
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    length = prompt.shape[1]
    capacity = 64 * -(-(length + new_tokens + 2) // 64)
    count = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]dspark demo[/]  {count / 1e6:.1f} M parameters, float32, "
        f"{torch.get_num_threads()} threads, prompt of {length} tokens, cache of {capacity}"
    )

    def contestant(name: str, backend: str | None, **options: Any) -> Contestant:
        def step(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
            return model(tokens, past_key_values=cache).logits

        cache = StaticCache(config=model.config, max_cache_len=capacity)
        first = model(prompt, past_key_values=cache).logits
        if backend is not None:
            kwargs = {"options": options} if options else {}
            step = torch.compile(step, backend=backend, dynamic=False, **kwargs)
        made = Contestant(name, step, cache)
        made.tokens.append(int(first[0, -1].argmax()))
        return made

    reports = {}
    with torch.no_grad():
        field_ = [
            contestant("eager", None),
            contestant("inductor", "inductor"),
            contestant("dspark", "dspark"),
            contestant("dspark, int8 cache", "dspark", kv_cache="int8"),
        ]
        # The first step compiles; all are fed eager's token, so their logits compare.
        token = torch.tensor([[field_[0].tokens[0]]])
        reference = None
        for c in field_:
            with console.status(f"compiling: {c.name}"):
                start = time.perf_counter()
                logits = c.step(token, c.cache)
                c.compile_seconds = time.perf_counter() - start
            if c.name.startswith("dspark"):
                reports[c.name] = last_report()
            reference = logits if reference is None else reference
            c.difference = (logits - reference).abs().max().item()
            c.tokens.append(int(logits[0, -1].argmax()))
        share = new_tokens // rounds
        for _ in range(rounds):
            for c in field_:
                for _ in range(share):
                    start = time.perf_counter()
                    logits = c.step(torch.tensor([[c.tokens[-1]]]), c.cache)
                    c.tokens.append(int(logits[0, -1].argmax()))
                    c.seconds.append(time.perf_counter() - start)

    text = tokenizer.decode(field_[2].tokens)
    console.print(f"[dim]{PROMPT}[/][green]{text}[/]", highlight=False)
    exact = sum(
        layer.keys.numel() * layer.keys.element_size() * 2 for layer in field_[0].cache.layers
    )
    plan = [e for g in reports["dspark, int8 cache"].graphs for e in g.kv_plan]
    small = sum(e.bytes_after for e in plan)
    eager = statistics.median(field_[0].seconds)
    table = Table(title=f"decode, one interleaved run of {rounds} rounds, medians")
    for column in ("", "tokens/s", "vs eager", "cache bytes", "max |Δ logit|", "same text",
                   "compile s"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    for c in field_:
        median = statistics.median(c.seconds)
        table.add_row(
            c.name,
            f"{1 / median:.1f}",
            f"{eager / median:.2f}×",
            f"{small if 'int8' in c.name and small else exact:,}",
            f"{c.difference:.2g}",
            "yes" if c.tokens == field_[0].tokens else "no",
            f"{c.compile_seconds:.1f}",
        )
    console.print(table)
    _generate(model, prompt, new_tokens, rounds, console)
    reports["dspark"].print()


def _generate(
    model: Any, prompt: torch.Tensor, new_tokens: int, rounds: int, console: Console
) -> None:
    """Whole calls: Hugging Face's ``generate`` and ours in turn."""
    from .models import DEMO_DRAFT_PATH
    from .models.draft import DraftModel
    from .runtime.generate import generate, last_generation

    given = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    draft = DraftModel.from_pretrained(DEMO_DRAFT_PATH, target=model)
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "model.generate(...)": lambda: model.generate(prompt, **given),
        "dspark_compile.generate(model, ...)": lambda: generate(model, prompt, **given),
        "dspark_compile.generate(model, ..., draft=draft)": lambda: generate(
            model, prompt, draft=draft, **given
        ),
        'dspark_compile.generate(model, ..., draft="ngram")': lambda: generate(
            model, prompt, draft="ngram", **given
        ),
        'dspark_compile.generate(model, ..., draft=("ngram", draft))': lambda: generate(
            model, prompt, draft=("ngram", draft), **given
        ),
    }
    reports: dict[str, Any] = {}
    texts = {}
    with console.status("compiling: generate"):
        texts = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
            if name.startswith("dspark"):
                reports[name] = last_generation()
    table = Table(title=f"generate, prefill included, medians of {rounds} calls in turn")
    for column in ("", "tokens/s", "", "same text"):
        table.add_column(column, justify="left" if not column else "right")
    first = next(iter(calls))
    base = statistics.median(seconds[first])
    for name in calls:
        median = statistics.median(seconds[name])
        same = torch.equal(texts[name], texts[first])
        table.add_row(
            name, f"{new_tokens / median:.1f}", f"{base / median:.2f}×", "yes" if same else "no"
        )
    console.print(table)
    for name, report in reports.items():
        notes = f" ({'; '.join(report.notes)})" if report.notes else ""
        line = f"{name}: a step is {report.path}{notes}"
        if (stats := report.speculation) is not None:
            survival = ", ".join(f"{s:.2f}" for s in stats.survival[:5])
            line += (
                f"; {stats.tau:.2f} tokens a round over {stats.rounds} rounds, "
                f"{stats.parked_rounds} parked; prefixes of 1, 2, ... stood {survival}"
            )
        console.print(line, highlight=False)
