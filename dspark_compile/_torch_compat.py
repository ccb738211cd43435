"""The only module that touches private parts of torch.

Everything here was checked on torch 2.11 to 2.13; a moved API is mended here.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx


def tracing_fake_mode() -> Any:
    """The fake mode of the compilation under way, or a fresh one."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    context = torch._guards.TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def fake_inputs(inputs: Sequence[Any]) -> tuple[list[Any], Any]:
    """``inputs`` as fake tensors (the symbols Dynamo chose are kept), and their mode."""
    from torch._subclasses.fake_tensor import FakeTensor

    mode = next((x.fake_mode for x in inputs if isinstance(x, FakeTensor)), None)
    mode = mode or tracing_fake_mode()
    context = torch._guards.TracingContext.try_get()
    known = context.tensor_to_context if context is not None else {}

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        symbolic = known.get(x) if context is not None else None
        if symbolic is not None:
            return mode.from_tensor(
                x,
                static_shapes=False,
                symbolic_context=symbolic,
                source=symbolic.tensor_source,
                trace=False,
            )
        return mode.from_tensor(x, static_shapes=context is None)

    with mode:
        return [convert(x) for x in inputs], mode


def assumptions(*, given: bool = False) -> str:
    """What is assumed of the symbolic sizes of the compilation under way, as text; "" outside.

    ``given``: only of sizes that inputs have. Sizes that are data come and go with what reads them:
    nothing can be assumed of a program's inputs by them.
    """
    context = torch._guards.TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    env = None if mode is None else mode.shape_env
    if env is None:
        return ""

    def counts(*expressions: Any) -> bool:
        from torch.utils._sympy.symbol import SymT, symbol_is_type

        symbols = {s for x in expressions for s in getattr(x, "free_symbols", ())}
        data = [symbol_is_type(s, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)) for s in symbols]
        return not given or not data or not all(data)

    known = (
        [str(g.expr) for g in env.guards if counts(g.expr)],
        sorted(str(x) for x in env.replacements.items() if counts(*x)),
        sorted(str(x) for x in env.var_to_range.items() if counts(x[0])),
        sorted(str(x) for x in env.divisible if counts(x)),
        sorted(str(x) for x in env.deferred_runtime_asserts if counts(x)),
    )
    return repr(known)


def custom_op_function(target: Any) -> Callable[..., Any] | None:
    """The Python function that ``torch.library.custom_op`` made the operator ``target`` of; None
    where it is none of these, or has kernels of its own for some devices."""
    from torch._library.custom_ops import OPDEFS

    packet = getattr(target, "overloadpacket", target)
    definition = OPDEFS.get(getattr(packet, "_qualified_op_name", ""))
    if definition is None:
        return None
    devices = set(getattr(definition, "_backend_fns", {}))
    return definition._init_fn if devices <= {None} else None


@contextlib.contextmanager
def outside_of_tracing() -> Iterator[None]:
    """Inside, real tensors are computed with and graphs compiled as if nothing were traced."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch._guards.tracing(None):
        yield


def ignore_fresh_symbols(mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Unbacked symbols made while tracing belong to nobody: the graph is traced again."""
    if mode.shape_env is None:
        return contextlib.nullcontext()
    return mode.shape_env.ignore_fresh_unbacked_symbols()


_active: ContextVar[frozenset[Any]] = ContextVar("dspark_active_decompositions")


@functools.cache
def _register_decompositions() -> None:
    """Put the dialect's ATen forms into Inductor's own table.

    A table of our own, passed to ``compile_fx``, would become part of Inductor's cache key
    and cannot be pickled, so nothing would ever be cached. Each entry asks whether the
    compilation under way wants it and otherwise leaves the op whole.
    """
    from torch._inductor import decomposition

    from dspark_compile.codegen.aten import FORMS
    from dspark_compile.ops import OPS

    def entry(overload: Any, form: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(form)
        def decompose(*args: Any, **kwargs: Any) -> Any:
            if overload not in _active.get(frozenset()):
                return NotImplemented
            return form(*args, **kwargs)

        return decompose

    table = {
        OPS[name].overload: entry(OPS[name].overload, form)
        for name, form in FORMS.items()
        if not OPS[name].mutates
    }
    decomposition.decompositions.update(table)
    decomposition.fast_random_decomps().update(table)


def mode_config(mode: str | None) -> dict[str, Any]:
    """Inductor's config for a ``torch.compile`` mode.

    Raises:
        RuntimeError: torch's own, for an unknown mode.
    """
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


@functools.cache
def _salt_pass() -> type:
    """A custom pass that changes nothing but Inductor's cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Salt(CustomGraphPass):  # type: ignore[misc]
        def __init__(self, salt: str) -> None:
            self.salt = salt

        def __call__(self, graph: fx.Graph) -> None:
            return None

        def uuid(self) -> Any:
            return f"dspark:{self.salt}"

        def __reduce__(self) -> Any:
            return _make_salt, (self.salt,)

    return Salt


def _make_salt(salt: str) -> Any:
    return _salt_pass()(salt)


def _in_one_chunk(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


# CPython keeps the frames of calls in chunks of 16 KB, mapped when a call crosses a boundary and
# unmapped when it returns. Tracing goes up and down hundreds of calls deep: for a model of eight
# layers that was 40,000 page faults and a fifth of the time. A frame that needs much room gets a
# chunk of twice as much, and all calls inside of it have their frames in the rest, which is not
# touched before it is used.
_ROOM = 1 << 20  # bytes
with contextlib.suppress(AttributeError, TypeError, ValueError):  # another Python
    _in_one_chunk.__code__ = _in_one_chunk.__code__.replace(co_stacksize=_ROOM // 8 + 1024)


def compiling(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` as is good for what compiles: without a look for garbage
    (`collecting`), and with the frames of its calls in one piece of memory."""
    with collecting(False):
        return _in_one_chunk(function, args, kwargs)


_paused = False  # whether `collecting` keeps Python from looking for garbage


@contextlib.contextmanager
def collecting(on: bool) -> Iterator[None]:
    """Around a part of compiling: whether Python looks for garbage inside. Graphs are many small
    objects, all of them alive, and to look through those of a whole process again and again takes
    longer than a short compilation. Inside of such a part, another one may turn it ``on`` again.

    Nothing changes where somebody else has turned it off.
    """
    global _paused
    if on is not _paused or not (on or gc.isenabled()):
        yield
        return
    _paused = not on
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        _paused = on
        (gc.disable if on else gc.enable)()


def graph_module(root: Any, graph: fx.Graph) -> fx.GraphModule:
    """A module of ``graph``, an input of further steps of the compiler: the Python code that
    `fx.GraphModule` writes and compiles at once is made when somebody reads or calls it."""
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)


def inductor(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    config: dict[str, Any] | None = None,
    decompositions: Collection[Any] | None = None,
    salt: str = "",
) -> Callable[..., Any]:
    """``compile_fx``, decomposing the dialect ops named in ``decompositions``.

    The decompositions are not part of Inductor's cache keys, so whatever decides them
    goes into ``salt``.
    """
    from torch._inductor.compile_fx import compile_fx

    patches = dict(config or {})
    if decompositions:
        _register_decompositions()
        patches["post_grad_custom_pre_pass"] = _salt_pass()(salt)
    token = _active.set(frozenset(decompositions or ()))
    try:
        with collecting(True):  # of its garbage there may be much
            return compile_fx(module, list(inputs), config_patches=patches or None)
    finally:
        _active.reset(token)


@functools.cache
def source_hash() -> str:
    """A hash of the sources that decompositions come from: part of Inductor's cache keys.

    Everything else that this package does to a graph shows in the graph itself.
    """
    import hashlib
    from pathlib import Path

    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in (*sorted((root / "ops").glob("*.py")), root / "codegen" / "aten.py"):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def grad_needed(inputs: Sequence[Any]) -> bool:
    """Whether autograd would record this graph."""
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
    )


def is_subclass(x: object) -> bool:
    """Whether a tensor is a traceable wrapper subclass (torchao, DTensor …)."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return isinstance(x, torch.Tensor) and is_traceable_wrapper_subclass(x)


def compile_call() -> object | None:
    """The object that stands for the ``torch.compile`` call under way: all graphs of one
    call, graph breaks and recompiles included, meet the same one. None outside of one."""
    import sys

    frame = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return None
        owner = frame.f_locals.get("self")
        if type(owner).__name__ == "_TorchCompileWrapper":
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _inside(function: Any) -> list[Any]:
    """A back end and what it wraps, outermost first."""
    found = [function]
    for _ in range(8):
        inner = next(
            (
                getattr(function, name)
                for name in (
                    "_torchdynamo_orig_backend",
                    "_torchdynamo_orig_callable",
                    "compiler_fn",
                )
                if getattr(function, name, None) is not None
            ),
            None,
        )
        if inner is None:
            break
        function = inner
        found.append(function)
    return found


def traced_backend() -> str | None:
    """The name of the back-end function that Dynamo is tracing for; None while it does not."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        function: Any = InstructionTranslator.current_tx().output.compiler_fn
    except (AttributeError, LookupError):
        return None
    return getattr(_inside(function)[-1], "__name__", None)


def hands_graphs_to(function: Any, module: str, handed_on: bool = False) -> bool:
    """Whether a back end is a function of ``module``, in wrappers of torch only; with ``handed_on``
    also in those that say of themselves (``_dspark_hands_on``) that they hand graphs on as they
    are, while they are traced."""
    *outer, last = _inside(function)
    if getattr(last, "__module__", None) != module:
        return False
    return all(
        (m := getattr(f, "__module__", None) or "") == module
        or m.split(".")[0] == "torch"
        or (handed_on and getattr(f, "_dspark_hands_on", False))
        for f in outer
    )


def graph_breaks() -> Counter[str]:
    """How often each reason for a graph break came up in this process so far."""
    from torch._dynamo.utils import counters

    return Counter(counters["graph_break"])


def restart_with_constant_floats(gm: fx.GraphModule) -> None:
    """Have Dynamo trace again with the floats of modules (eps, scales, thresholds) as constants.

    Under ``dynamic=True`` they come as 0-dim tensors, and no norm has a known eps any more. Dynamo
    itself takes a module's integers as constants; a changed value recompiles.

    Raises:
        TensorifyScalarRestartAnalysis: Dynamo's own, where there are such floats.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    names = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        scalar = getattr(node.meta.get("example_value"), "item_memo", None)
        if source is None or not isinstance(scalar, torch.SymFloat):
            continue
        in_module = source.guard_source.is_unspecialized_nn_module()
        name = getattr(scalar.node._expr, "name", None)
        if in_module and name and all(user.target == "item" for user in node.users):
            names.add(name)
    asked = {name for name in names if not TensorifyState.should_specialize(name)}
    for name in asked:
        TensorifyState.specialize(name)
    if asked:
        raise TensorifyScalarRestartAnalysis


@functools.cache
def restarts() -> tuple[type[Exception], ...]:
    """What a back end raises to have Dynamo trace again: no failure, to be let through."""
    from torch._dynamo.exc import RestartAnalysis

    return (RestartAnalysis,)


def traced_again() -> Exception:
    """What a back end raises to have Dynamo trace the function once more from its beginning."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import InstructionTranslator

    # Dynamo takes notes of what it tries, in order; the next time the order will be another.
    InstructionTranslator.current_tx().speculation_log.clear()
    return TensorifyScalarRestartAnalysis(restart_reason="a loop is not one step repeated")


def trace_errors() -> tuple[type[Exception], ...]:
    """What Dynamo raises under ``fullgraph=True`` for a function that it cannot trace whole."""
    from torch._dynamo import exc
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return (
        exc.TorchDynamoException, exc.UserError, exc.InternalTorchDynamoError,
        ConstraintViolationError,
    )  # fmt: skip


def in_a_line(error: BaseException) -> str:
    """What one of `trace_errors` says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fixed = next((x for x in lines if "specialized it to be a constant" in x), None)
    if fixed is not None:
        number = fixed.split("constant (", 1)[-1].split(")", 1)[0]
        return f"it reads a length that varies as a number (tracing took it for {number})"
    if lines and lines[0].endswith("raised:"):  # Dynamo's own words on what a back end raised
        return lines[1] if len(lines) > 1 else type(error).__name__
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def without_guard_errors() -> Iterator[None]:
    """Around a trace whose failure is handled: Dynamo does not print its guards' state beside."""
    logger = logging.getLogger("torch._guards")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def not_dynamic(x: torch.Tensor) -> None:
    """Take back what ``torch._dynamo.mark_dynamic`` said of the dimensions of ``x``."""
    for name in ("_dynamo_dynamic_indices", "_dynamo_dynamic_range"):
        getattr(x, name, set()).clear()


def forget(code: Any) -> None:
    """Drop what Dynamo compiled for a code object, and the tensors that this holds."""
    from torch._dynamo.eval_frame import reset_code

    reset_code(code)


def cxx_compiler() -> str | None:
    """The C++ compiler that Inductor would take: ``$CXX``, else g++ (clang++ on macOS).

    `torch._inductor.cpp_builder` decides alike, but takes seconds to import.
    """
    import os
    import shutil
    import sys

    named = os.environ.get("CXX")
    if named:
        return shutil.which(named)
    names = ("clang++", "g++") if sys.platform == "darwin" else ("g++", "clang++", "c++")
    return next((path for name in names if (path := shutil.which(name))), None)


def openmp_library() -> str | None:
    """The OpenMP runtime that torch brings along: what links to it shares torch's threads."""
    from pathlib import Path

    folder = Path(torch.__file__).parent / "lib"
    patterns = ("libgomp*.so*", "libgomp-*.so*", "libomp.dylib", "libiomp5.*")
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return str(found[0]) if found else None


def functionalize_by_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without mutation, as AOTAutograd makes it: under a dispatch mode.

    Unlike ``torch.func.functionalize`` it takes ``vmap`` and higher-order calls inside of
    ``function``. What is written to an argument is copied back at the end.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
    from torch.utils._pytree import tree_map

    def unwrap(x: Any) -> Any:
        if not isinstance(x, FunctionalTensor):
            return x
        torch._sync(x)
        return torch._from_functional_tensor(x.elem)

    def run(*args: Any) -> Any:
        with enable_python_dispatcher(), FunctionalTensorMode():
            wrapped = [
                FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a
                for a in args
            ]
            result = function(*wrapped)
        result = tree_map(unwrap, result)
        for argument, state in zip(args, wrapped, strict=True):
            if isinstance(state, FunctionalTensor):
                final = unwrap(state)
                if torch._functionalize_has_data_mutation(state.elem):
                    argument.copy_(final)
        return result

    return run
