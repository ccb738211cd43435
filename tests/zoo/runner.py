"""One family through one back end: numerics against eager, graphs and recompiles, sites raised.

Modes: ``prefill`` without a cache; ``static`` and ``dynamic``, three compiled decode steps over a
``StaticCache`` or ``DynamicCache`` that eager mode has filled, as ``generate`` does it; and, not by
default, ``static_prefill``, the prefill into a ``StaticCache``. What eager mode itself cannot do,
such as a ``StaticCache`` in a family that has its own cache, is recorded as unsupported with
eager's message, and is not a failure.

``run_guarded`` runs a family in a forked child. `warm` imports and compiles once in the parent, so
that a child spends its seconds on its own model.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, StaticCache

from . import families
from .gaps import GUARDED_BY_TRACING
from .sites import KINDS, counting

MODES = ("prefill", "static", "dynamic")
ALL_MODES = (*MODES, "static_prefill")
COUNTS = ("graphs", "recompiles", "graph_breaks")
REFERENCE = Path(__file__).parent / "reference.json"
PREFILL = 9
PROMPT = 7
STEPS = 3
CACHE_LENGTH = 32
# Above this eager's cached logits do not continue its uncached ones; worth a note, no failure.
CACHE_DIFFERS = 1e-2

Result = dict[str, Any]


class CacheIgnored(Exception):
    """The model took the cache argument and left the cache empty."""


Call = Callable[..., Any]


def run_family(
    family: str,
    backend: str = "dspark",
    options: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    modes: tuple[str, ...] = MODES,
    fullgraph: bool = False,
) -> Result:
    """The results of one family, by mode; the exceptions of a mode are part of its result."""
    start = time.process_time()
    model = families.build(family, dtype)
    exact = families.build(family, dtype).float() if dtype != torch.float32 else None
    result: Result = {
        "family": family,
        "attention": model.config._attn_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
        "modes": {},
    }
    prefill = None
    for mode in modes:
        entry = run_mode(model, family, mode, backend, options, prefill, fullgraph)
        got, reference = entry.pop("_got", None), entry.pop("_reference", None)
        if mode == "prefill":
            prefill = reference
        if exact is not None and got is not None:
            with torch.no_grad():
                want = drive(exact, exact, family, mode)
            entry["error"] = relative_error(got, want)
            entry["eager_error"] = relative_error(reference, want)
        result["modes"][mode] = entry
    result["seconds"] = round(time.process_time() - start, 1)
    return result


def run_mode(
    model: torch.nn.Module,
    family: str,
    mode: str,
    backend: str,
    options: dict[str, Any] | None,
    prefill: torch.Tensor | None,
    fullgraph: bool = False,
) -> Result:
    try:
        reference, calls = counted_drive(model, model, family, mode)
    except Exception as error:
        return {"status": "unsupported", "reason": f"eager: {describe(error)}"}
    if not torch.isfinite(reference).all():
        return {"status": "unsupported", "reason": "eager: logits are not finite"}
    note = None
    if mode != "prefill" and prefill is not None:
        length = min(PREFILL, reference.shape[1], prefill.shape[1])
        difference = relative_error(reference[:, :length], prefill[:, :length])
        if difference > CACHE_DIFFERS:
            note = f"eager: cached logits differ from uncached ones by {difference:.1e}"

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    entry: Result = {"_reference": reference}
    if note:
        entry["note"] = note
    if fullgraph:
        entry["fullgraph"] = True
    compiled = torch.compile(
        model, backend=backend, fullgraph=fullgraph, **({"options": options} if options else {})
    )
    expected: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    index = 0

    def call(**kwargs: Any) -> Any:
        nonlocal index
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        output = compiled(**kwargs)
        if torch._dynamo.utils.counters["stats"]["unique_graphs"] > before:
            expected.update(calls[index])
        index += 1
        return output

    with recording() as report, torch.no_grad():
        try:
            got = drive(model, call, family, mode)
        except Exception as error:
            entry.update(status="error", reason=describe(error))
        else:
            entry["status"] = "ran"
            entry["_got"] = got
            entry["error"] = relative_error(got, reference)
    stats = torch._dynamo.utils.counters["stats"]
    metrics = torch._dynamo.utils.get_compilation_metrics()
    entry["graphs"] = stats["unique_graphs"]
    entry["recompiles"] = sum(1 for m in metrics if m.recompile_reason)
    counted = torch._dynamo.utils.counters["graph_break"]
    # Dynamo does not count those at a size that is data, where such sizes are allowed.
    breaks = list(counted) or (report.graph_breaks if report is not None else [])
    entry["graph_breaks"] = sum(counted.values()) or len(breaks)
    if breaks:
        entry["break_reasons"] = [str(reason)[:200] for reason in breaks[:3]]
    entry["expected"] = dict(expected)
    if report is not None:
        entry.update(site_summary(report))
        if breaks:
            # Layers share graphs, and what runs between graphs no back end sees: of what it saw,
            # only the rejections tell what was missed.
            found = Counter(entry["raised"]) + Counter(site_misses(entry))
            entry["expected"] = {k: min(n, found[k]) for k, n in expected.items()}
    return entry


def counted_drive(
    model: torch.nn.Module, target: Call, family: str, mode: str
) -> tuple[torch.Tensor, list[dict[str, int]]]:
    """``drive`` through ``target``, with the sites that each call ran eagerly."""
    calls: list[dict[str, int]] = []
    with torch.no_grad(), counting(model) as counts:

        def counted(**kwargs: Any) -> Any:
            before = Counter(counts)
            output = target(**kwargs)
            found = {k: counts[k] - before[k] for k in KINDS}
            found["attention"] = found["attention"] or counts["softmax"] - before["softmax"]
            calls.append(found)
            return output

        return drive(model, counted, family, mode), calls


def drive(model: torch.nn.Module, call: Call, family: str, mode: str) -> torch.Tensor:
    """Run one mode through ``call`` (the model or its compiled form); all positions' logits."""
    ids = families.tokens(family, PREFILL if mode == "prefill" else PROMPT + STEPS)
    if mode == "prefill":
        return call(input_ids=ids, use_cache=False).logits
    argument = families.CACHE_ARGUMENT.get(family, "past_key_values")
    if mode == "dynamic":
        cache = DynamicCache(config=model.config)
    else:
        cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        # A static cache allocates at its first use; keep that out of what is compiled.
        with torch.no_grad():
            model(input_ids=ids[:, :2], use_cache=True, **{argument: cache})
        cache.reset()
    fill = call if mode == "static_prefill" else model
    logits = [fill(input_ids=ids[:, :PROMPT], use_cache=True, **{argument: cache}).logits]
    if mode == "dynamic":  # or else the first step is compiled for its one length alone
        for layer in cache.layers:
            for name in ("keys", "values"):
                stored = getattr(layer, name, None)
                if isinstance(stored, torch.Tensor) and stored.dim() == 4:
                    torch._dynamo.maybe_mark_dynamic(stored, 2)
    for position in range(PROMPT, PROMPT + (0 if mode == "static_prefill" else STEPS)):
        token = ids[:, position : position + 1]
        logits.append(call(input_ids=token, use_cache=True, **{argument: cache}).logits)
    if not any(touched(layer) for layer in cache.layers):
        raise CacheIgnored(f"{type(model).__name__}.forward does not use {argument}")
    return torch.cat([part.clone() for part in logits], dim=1)


def touched(layer: Any) -> bool:
    """Whether anything was stored in a cache layer; True where it does not say."""
    return bool(getattr(layer, "is_initialized", True))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    scale = want.double().abs().max().item()
    return (got.double() - want.double()).abs().max().item() / max(scale, 1e-30)


def describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/_dynamo/" not in f.filename]
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}{where}"


def recording() -> Any:
    try:
        from dspark_compile.diagnostics import recording as record
    except ImportError:
        return contextlib.nullcontext()
    return record()


def site_summary(report: Any) -> Result:
    """Sites by kind and the rejections, in plain data."""
    raised = Counter(s.kind for s in report.sites() if s.status == "raised")
    rejected = Counter(s.kind for s in report.sites() if s.status == "rejected")
    rejections = [
        {
            "kind": r.kind,
            "pass": r.pass_name,
            "condition": r.condition,
            "source": r.source[-200:],
            "module": r.module,
            "node": r.node,
        }
        for r in report.rejections
    ]
    # A graph that was handed on unchanged is a failure; an op that a kernel does not take, for
    # its sizes or dtype, runs as ATen.
    whole = {f.reason[:300] for f in report.fallbacks if f.where == "graph"}
    single = {f"{f.where}: {f.reason}"[:300] for f in report.fallbacks if f.where != "graph"}
    return {
        "raised": dict(raised),
        "rejected": dict(rejected),
        "rejections": rejections,
        "fallbacks": sorted(whole),
        "plain_ops": sorted(single),
    }


def site_misses(entry: Result) -> Counter[str]:
    """Rejections of sites by kind."""
    own = [r for r in entry["rejections"] if r["pass"] == f"raise_{r['kind']}"]
    return Counter(r["kind"] for r in own)


def site_counts(result: Result) -> dict[str, tuple[int, int]]:
    """By kind: sites raised and sites expected, over the modes that ran.

    More may be raised than were expected: an MLP or a norm that is no module of its own. Then
    only rejections tell of a miss.
    """
    counts = {}
    for kind in KINDS:
        have = want = 0
        for entry in result.get("modes", {}).values():
            if entry["status"] != "ran":
                continue
            expected, raised = entry["expected"].get(kind, 0), entry["raised"].get(kind, 0)
            if raised > expected:
                raised = max(0, expected - site_misses(entry)[kind])
            have += raised
            want += expected
        counts[kind] = (have, want)
    return counts


def versions() -> str:
    return f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"


@functools.cache
def kept_counts() -> dict[str, Any]:
    """Counts of Dynamo alone, by family and mode, for these versions of torch and transformers."""
    return json.loads(REFERENCE.read_text()).get(versions(), {}) if REFERENCE.exists() else {}


def keep_counts() -> None:
    """Write the counts of Dynamo alone that this process has found."""
    known = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    if known.get(versions(), {}) != kept_counts():
        text = json.dumps({**known, versions(): kept_counts()}, sort_keys=True)
        REFERENCE.write_text(text.replace("}, ", "},\n") + "\n")


def reference_counts(family: str, mode: str, entry: Result, dtype: Any) -> list[int]:
    """Graphs, recompiles and breaks of Dynamo alone; those of ``entry`` if there are no fewer.

    Of AOTAutograd where tracing itself is known to add guards.
    """
    mine = [entry[name] for name in COUNTS]
    if mine == [1, 0, 0]:
        return mine
    kept = kept_counts().get(family, {}).get(mode)
    if kept is None:
        backend = "aot_eager" if family in GUARDED_BY_TRACING else "eager"
        result = run_guarded(family, 300, backend=backend, modes=(mode,), dtype=dtype)
        other = result.get("modes", {}).get(mode, {})
        if other.get("status") != "ran":
            return mine
        kept = [other[name] for name in COUNTS]
        kept_counts().setdefault(family, {})[mode] = kept
    return kept


def warm(backend: str = "dspark", options: dict[str, Any] | None = None) -> None:
    """Do once what every child would do again: imports, first-use tables. Few objects are left
    for a child's garbage collector to look at (and to copy)."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    run_family("llama", backend, options, modes=("prefill",))
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


def run_guarded(
    family: str, timeout: float, function: Callable[..., Result] | None = None, **kwargs: Any
) -> Result:
    """``run_family`` in a forked child: a crash or a hang is a result, not the run's end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            os.setsid()
            signal.alarm(int(timeout) + 1)
            gc.disable()
            warnings.filterwarnings("ignore")
            logging.disable(logging.ERROR)
            try:
                result = (function or run_family)(family, **kwargs)
            except BaseException as error:
                result = {"family": family, "failure": describe(error)}
            with os.fdopen(write, "w") as pipe:
                json.dump(result, pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, code = os.waitpid(pid, 0)
    if text and code == 0:
        return json.loads(text)
    cause = (
        f"no result in {timeout:.0f} s"
        if os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGALRM
        else f"the process died (status {code})"
    )
    return {"family": family, "failure": cause}
