"""Which implementation of a site is the fastest on this CPU: measured where no model can say.

The order of `registry.implementations` is the cost model's: kernels that read their weights once
are ahead of anything else for a few rows. Beyond `SURE_ROWS` arithmetic and packing count too and
the vendor's library may win. There the candidates are run on operands of the site's shapes, in
turns and out of cache, and the first stays unless another is faster by more than `MARGIN`.

``Options(tune=...)`` bounds the time: ``"auto"`` spends at most `SECONDS` of a process on it and
never builds or compiles anything for it alone; ``"full"`` takes a minute and times what Inductor
makes of an ATen form instead of the form itself; ``"off"`` measures nothing. What has been measured
is kept in ``$DSPARK_CACHE_DIR/tune`` by CPU, threads and versions, and serves every later process,
unless that is ``"off"`` too. The report gives the times beside the site.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from dspark_compile import _torch_compat as compat
from dspark_compile._version import __version__
from dspark_compile.codegen import cost, machine
from dspark_compile.codegen.cpp import build, emit, isa
from dspark_compile.codegen.registry import Implementation
from dspark_compile.passes.graph import dialect_name

log = logging.getLogger("dspark_compile")

VERSION = 1
SECONDS = {"off": 0.0, "auto": 1.0, "full": 60.0}
SURE_ROWS = 4  # a product of so few rows is as fast as its weights are read
SHORT = 50e-6  # what is predicted to take less is not worth a measurement
MARGIN = 1.05
ROUNDS = 5
COLD_BYTES = 128 * 2**20  # operands are taken in turns from this many bytes
MOST_BYTES = 512 * 2**20  # larger ones would cost more to make than to guess

# Ops whose time does not depend on what is in their operands, and which of them Inductor would
# fuse: those are not compared with an ATen form that runs as it is.
_PRODUCTS = frozenset(
    {
        "linear", "merged_linear", "mlp", "gated_mlp", "gated_mlp_merged", "linear_int8",
        "linear_int4", "gated_mlp_int8", "gated_mlp_int4", "attention", "attention_int8",
        "mla_attention",
    }
)  # fmt: skip
_FUSED = frozenset({"rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "rope"})

_spent = 0.0
_settled: dict[tuple[Path, str], dict[str, float]] = {}


class _CannotMeasure(Exception):
    """The site cannot be run on operands made for it; the message says why."""


def arrange(
    node: fx.Node, candidates: Sequence[Implementation], tune: str, *, eager: bool
) -> tuple[list[Implementation], str]:
    """``candidates``, the fastest of those that support ``node`` in front, and what was measured.

    Args:
        node: a dialect op of a graph, with fake tensors in its metadata.
        candidates: in the cost model's order.
        tune: the option, see the module's docstring.
        eager: ATen forms run as they are; otherwise Inductor compiles them.

    The text is empty where nothing is known of the site; candidates then keep their order.
    """
    order = list(candidates)
    fused = dialect_name(node) in _FUSED and not eager and tune != "full"
    if tune == "off" or fused or not unsure(node):
        return order, ""
    fit = [c for c in order if c.name != "reference" and c.supports(node) is None]
    if len(fit) < 2:
        return order, ""
    key, path = _key(node, fit, eager), table_path()
    times = _settled.get((path, key)) or read_table(path).get(key)
    if times is None or set(times) != {c.name for c in fit}:
        try:
            times = _measure(node, fit, tune, eager)
        except _CannotMeasure as reason:
            log.debug("%s is not measured: %s", node.name, reason)
            return order, ""
        if times is None:
            return order, ""
        _keep(path, key, times)
    _settled[path, key] = times
    best = min(fit, key=lambda c: times[c.name])
    if times[best.name] * MARGIN > times[fit[0].name]:
        best = fit[0]
    said = ", ".join(f"{c.name} {times[c.name] * 1e3:.3g} ms" for c in fit)
    return [best, *(c for c in order if c is not best)], f"measured: {said}"


def unsure(node: fx.Node) -> bool:
    """Whether the cost model leaves open what is fastest for a node on the CPU."""
    name = dialect_name(node)
    values = [item.meta.get("val") for item in node.all_input_nodes]
    if name not in _PRODUCTS | _FUSED or not values:
        return False
    for value in values:
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            return False
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return False
        if value.dtype in (torch.int32, torch.int64):  # positions: what they are matters
            return False
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    rows = x.shape[2] if name.startswith("attention") else x.numel() // max(x.shape[-1], 1)
    if rows <= SURE_ROWS:
        return False
    try:
        return cost.of_node(node).seconds(machine.describe()) >= SHORT
    except (KeyError, ValueError):
        return False  # no cost is known for it: nothing says that a measurement is worth its time


# -- the table


def table_path() -> Path:
    """The file of measured times of this CPU, its threads and these versions."""
    from dspark_compile.diagnostics.environment import cpu_isa, cpu_name

    parts = (cpu_name(), *cpu_isa(), torch.get_num_threads(), torch.__version__, __version__)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return build.cache_directory().parent / "tune" / f"cpu_{digest}.json"


def read_table(path: Path) -> dict[str, dict[str, float]]:
    """Seconds by implementation for each key; empty without a readable file of this version."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return {}


@functools.lru_cache(maxsize=4)
def _read(path: Path, _: int) -> dict[str, dict[str, float]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            return {}
        return {
            key: {name: float(t) for name, t in times.items()}
            for key, times in document["sites"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: Path, key: str, times: dict[str, float]) -> None:
    """Add a site to the table. Readers see the old file or the new one, never a part."""
    document = {"version": VERSION, "sites": {**read_table(path), key: times}}
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("measured times are not kept: %s", error)


def _key(node: fx.Node, fit: Sequence[Implementation], eager: bool) -> str:
    """All that decides the times: operands, kernels, how ATen forms are run."""

    def text(x: Any) -> Any:
        if isinstance(x, fx.Node):
            v = x.meta["val"]
            return f"{str(v.dtype)[6:]}{list(v.shape)}/{list(v.stride())}"
        if isinstance(x, (list, tuple)):
            return [text(i) for i in x]
        return repr(x)

    wanted: list[emit.Source] = []
    with emit.deferred(wanted):
        for candidate in fit:
            candidate.supports(node)
    kernels = [build.library_path(s.name, s.text, isa.detect()).stem for s in wanted]
    whole = [text(node.args), {k: text(v) for k, v in node.kwargs.items()}, kernels, eager]
    digest = hashlib.sha256(repr(whole).encode()).hexdigest()[:16]
    return f"{dialect_name(node)} {text(node.args[0])} {digest}"


# -- measuring


def _measure(
    node: fx.Node, fit: Sequence[Implementation], tune: str, eager: bool
) -> dict[str, float] | None:
    """Median seconds of each candidate; None where the budget does not allow it."""
    global _spent
    started = time.perf_counter()
    end = started + SECONDS[tune] - _spent
    copies = _copies(node)
    expected = cost.of_node(node).seconds(machine.describe())
    if started + (copies + 4 * len(fit)) * expected > end:
        return None
    try:
        with compat.outside_of_tracing(), torch.no_grad():
            operands = [_operands(node) for _ in range(copies)]
            compiled = tune == "full" and not eager
            runs = {c.name: _run_of(node, c, operands, compiled) for c in fit}
            for run in runs.values():
                run()
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - start)
                if time.perf_counter() > end:
                    break
    except Exception as error:
        raise _CannotMeasure(f"{type(error).__name__}: {error}") from error
    finally:
        _spent += time.perf_counter() - started
    return {name: statistics.median(t) for name, t in times.items()}


def _copies(node: fx.Node) -> int:
    tensors = [item.meta["val"] for item in node.all_input_nodes]
    nbytes = max(1, sum(t.numel() * t.element_size() for t in tensors))
    if nbytes > MOST_BYTES:
        raise _CannotMeasure(f"its operands take {nbytes / 2**20:.0f} MiB")
    return max(1, min(16, COLD_BYTES // nbytes))


def _operands(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    made = {item: _made(item.meta["val"]) for item in node.all_input_nodes}
    return fx.node.map_arg((node.args, node.kwargs), made.__getitem__)


def _made(value: Tensor) -> Tensor:
    """A real tensor of a fake one's sizes, strides and dtype, its rows alike."""
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if value.dtype == torch.bool:
        return out.fill_(True)
    row = torch.randn(value.shape[-1:] or (1,)) * 0.1
    if not value.dtype.is_floating_point:
        row = torch.randint(0, 127, row.shape)
    return out.copy_(row.to(value.dtype).expand(value.shape))


def _run_of(
    node: fx.Node, candidate: Implementation, operands: Sequence[Any], compiled: bool
) -> Callable[[], Any]:
    """A function that runs the candidate on the next operands, round and round."""
    function: Callable[..., Any] = candidate.target or node.target  # type: ignore[assignment]
    if compiled and candidate.name == "aten":
        function = _compiled(node, operands[0])
    turn = iter(range(1 << 62))

    def run() -> Any:
        args, kwargs = operands[next(turn) % len(operands)]
        return function(*args, **kwargs)

    return run


def _compiled(node: fx.Node, operands: tuple[Any, Any]) -> Callable[..., Any]:
    """What Inductor makes of the op alone."""
    graph = fx.Graph()
    inner = {item: graph.placeholder(item.name) for item in node.all_input_nodes}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), inner.__getitem__)
    result = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    value = node.meta["val"]
    parts = range(len(value)) if isinstance(value, (list, tuple)) else []
    outputs = [graph.call_function(operator.getitem, (result, i)) for i in parts]
    graph.output(tuple(outputs or [result]))

    def given(args: Any, kwargs: Any) -> list[Tensor]:
        flat = dict(zip(_nodes(node), _leaves((args, kwargs)), strict=True))
        return [flat[item] for item in inner]

    salt = f"{compat.source_hash()}:fastest"
    module = fx.GraphModule({}, graph)
    compiled = compat.inductor(module, given(*operands), {}, {node.target}, salt)
    return lambda *args, **kwargs: compiled(*given(args, kwargs))


def _nodes(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n))
    return found


def _leaves(operands: Any) -> list[Tensor]:
    """Tensors in the order in which `_nodes` meets their nodes."""
    if isinstance(operands, Tensor):
        return [operands]
    if isinstance(operands, dict):
        operands = list(operands.values())
    if isinstance(operands, (list, tuple)):
        return [t for item in operands for t in _leaves(item)]
    return []
