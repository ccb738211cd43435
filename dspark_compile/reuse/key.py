"""A hash of all that the compilation of one graph depends on.

    the graph      every node: op, target, arguments, the source line and module it came from
    its inputs     dtype, shape, strides, device, which of them share memory
    options        all of them, and every ``DSPARK_`` variable
    versions       torch, Triton, transformers, Python, the C++ compiler, the CPU and its
                   instruction sets, threads
    this package   every source file of it

A graph has no key (`NoKey`) where something in it is known only to this process: a function that is
not of torch, an object as an argument, a large constant; or where a file of this package is newer
than the code that runs.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import inspect
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from dspark_compile import _torch_compat as compat
from dspark_compile.diagnostics.environment import environment
from dspark_compile.options import Options
from dspark_compile.passes.pipeline import pipeline

_STARTED = time.time()
_NAMESPACES = ("aten", "prims", "dspark")
_PACKAGES = ("transformers",)  # whose version `environment` has, and whose operators passes know
_MODULES = ("torch", "_operator", "operator", "math", "builtins", "dspark_compile")
_WORDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_MOST_NUMBERS = 65536  # of a constant
_IGNORED = ("DSPARK_CACHE_DIR",)


class NoKey(Exception):
    """A graph's compilation depends on what has no name outside of this process."""


def graph_key(
    gm: fx.GraphModule, inputs: Sequence[Any], options: Options, assumed: str = ""
) -> str:
    """The key of ``gm``, as Dynamo traced it, on ``inputs``; ``assumed`` says what is known of
    symbolic sizes.

    Raises:
        NoKey: it has none; the message says why.
    """
    digest = hashlib.sha256()
    for part in (assumed, *surroundings(options), *_inputs(gm, inputs), *_nodes(gm)):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:40]


def surroundings(options: Options) -> Iterator[str]:
    """What every compilation of this process depends on."""
    yield _package()
    yield repr(sorted(options.to_dict().items()))
    yield repr(sorted(environment().items(), key=lambda item: item[0]))
    yield repr(
        sorted(
            (k, v) for k, v in os.environ.items() if k.startswith("DSPARK_") and k not in _IGNORED
        )
    )
    yield repr([f"{p.__module__}.{p.__qualname__}" for p in pipeline()])
    yield repr(
        (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    )


@functools.cache
def _package() -> str:
    """A hash of the files of this package."""
    digest, root = hashlib.sha256(), Path(__file__).parent.parent
    files = []
    for directory, _, names in os.walk(root, followlinks=True):
        files += [Path(directory) / n for n in names if n.endswith((".py", ".h"))]
    for path in sorted(files):
        info = path.stat()
        if max(info.st_mtime, info.st_ctime) >= _STARTED:
            raise NoKey(f"{path} changed after it may have been imported")
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[str]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    memory: dict[int, int] = {}
    for i, (node, given) in enumerate(zip(placeholders, inputs, strict=True)):
        value = node.meta.get("example_value", node.meta.get("val", given))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            yield f"{node.name} {type(value).__name__} {value.node.expr}"
            continue
        if isinstance(value, (int, float, bool, str, type(None))):
            yield f"{node.name} {value!r}"
            continue
        if not isinstance(value, Tensor) or not isinstance(given, Tensor):
            raise NoKey(f"an input is a {type(given).__name__}")
        inside = ""
        if compat.is_subclass(given):
            inside = inner(given)
        elif type(given) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor):
            raise NoKey(f"an input is a {type(given).__name__}")
        if value.layout is not torch.strided:
            raise NoKey(f"an input's layout is {value.layout}")
        shared = [memory.setdefault(x, i) for x in storages(given)]
        static = node.meta.get("tensor_dict") or {}
        source = getattr(getattr(node, "_dynamo_source", None), "name", None)
        source = source() if callable(source) else source  # a method before torch 2.12
        yield repr(
            (
                node.name, str(value.dtype), str(value.device), list(map(str, value.shape)),
                list(map(str, value.stride())), str(given.storage_offset()), shared,
                value.requires_grad, value.is_conj(), value.is_neg(), given.is_inference(),
                isinstance(given, torch.nn.Parameter),
                str(static.get("_dynamo_static_input_type")),
                node.meta.get("dspark_bits"), source, inside,
            )
        )  # fmt: skip


def inner(tensor: Tensor) -> str:
    """A tensor of tensors (torchao's quantised weights) as text: its type, and the version of the
    package that has its rules; what it says of itself; the tensors inside, but not their values.

    Raises:
        NoKey: its package has no version, or it says something that has no form in text.
    """
    kind = type(tensor)
    package = kind.__module__.split(".")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise NoKey(f"an input is a {kind.__name__}, of a package without a version") from None
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    found = [f"{kind.__module__}.{kind.__qualname__} {version}", _word(context)]
    found.append(repr((tuple(tensor.shape), tensor.stride(), str(tensor.dtype))))
    for name in names:
        x = getattr(tensor, name)
        if compat.is_subclass(x):
            found.append(f"{name} {inner(x)}")
            continue
        about = (str(x.dtype), str(x.device), tuple(x.shape), x.stride(), x.storage_offset())
        found.append(f"{name} {about!r}")
    return repr(found)


def storages(tensor: Tensor) -> list[int]:
    """What stands for the memory of a tensor, or of those inside of it."""
    if not compat.is_subclass(tensor):
        return [tensor.untyped_storage()._cdata]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [at for name in names for at in storages(getattr(tensor, name))]


def _nodes(gm: fx.GraphModule) -> Iterator[str]:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            raise NoKey("the graph calls a module")
        target = node.target if isinstance(node.target, str) else _function(node.target)
        yield f"{node.op} {node.name} {target}"
        yield _word(node.args)
        yield _word(node.kwargs)
        yield str(node.meta.get("stack_trace"))
        stack = node.meta.get("nn_module_stack") or {}
        yield repr([str(path) for path in stack.values()])
        if node.op == "get_attr":
            yield _constant(gm, str(node.target))


def _function(target: Any) -> str:
    """The name of a function that a graph calls."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(target)
        if name.split(".")[0] not in _NAMESPACES:
            return f"{name} {_meaning(target, name)}"
        return name
    if isinstance(target, torch._ops.HigherOrderOperator):
        raise NoKey(f"the graph calls {target}")
    try:
        name = torch.fx.node._get_qualified_name(target)
    except Exception as error:
        raise NoKey(f"the graph calls {target!r}, which has no name") from error
    if name.split(".")[0] not in _MODULES or "<" in name:
        raise NoKey(f"the graph calls {name}")
    return name


def _meaning(target: Any, name: str) -> str:
    """The code of an operator that a known package defines in Python; its version, which stands for
    what that calls, is a part of every key.

    Raises:
        NoKey: it is another's, or has no such code.
    """
    definition = compat.custom_op_function(target)
    module = getattr(definition, "__module__", "") or ""
    if definition is None or module.split(".")[0] not in _PACKAGES:
        raise NoKey(f"the graph calls {name}, whose meaning this package does not know")
    try:
        return f"{module}\n{inspect.getsource(definition)}"
    except (OSError, TypeError) as error:
        raise NoKey(f"the graph calls {name}, whose code is not to be had") from error


def _word(value: Any) -> str:
    """An argument as text that stands for nothing else."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}:{value.name}"
    if isinstance(value, _WORDS):
        return f"{type(value).__name__}:{value}"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"symbol:{value.node.expr}"
    if isinstance(value, slice):
        return f"slice{_word((value.start, value.stop, value.step))}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({','.join(map(_word, value))})"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_word(k)}={_word(v)}" for k, v in value.items()) + "}"
    raise NoKey(f"an argument is a {type(value).__name__}")


def _constant(gm: fx.GraphModule, name: str) -> str:
    value: Any = gm
    for part in name.split("."):
        value = getattr(value, part)
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise NoKey(f"the graph holds a {type(value).__name__}")
    if value.device.type != "cpu" or value.layout is not torch.strided:
        raise NoKey("the graph holds a tensor of a device")
    if value.numel() > _MOST_NUMBERS:
        raise NoKey(f"the graph holds a tensor of {value.numel()} numbers")
    data = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    about = (str(value.dtype), list(value.shape), list(value.stride()), value.requires_grad)
    return f"{about} {hashlib.sha256(data).hexdigest()}"
