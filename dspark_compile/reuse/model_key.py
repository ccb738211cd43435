"""A hash of all that a model's Python depends on: what stands in for tracing it.

    its modules    type, parameters and buffers (not their values), plain attributes, configurations
    its code       the byte code of every function that its ``forward`` methods can reach by name,
                   torch and the standard library left out (their versions are in `key`)

Code that was replaced while the program runs (a method set on a class, a function in a module) is
hashed as it is then. What it cannot see into (hooks, objects without a ``__dict__``) has no key.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from dspark_compile import _torch_compat as compat
from dspark_compile.reuse.key import NoKey, inner

# Packages whose code their version stands for; this one's sources are hashed as files.
_BY_VERSION = {*sys.stdlib_module_names, "torch", "numpy", "sympy", "dspark_compile"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# transformers keeps hash() of a generation config in it, which is another in every process.
_OF_THIS_PROCESS = ("_original_object_hash",)
_DEPTH = 6  # of objects inside of objects


def model_key(model: nn.Module) -> str:
    """The key of ``model``.

    Raises:
        NoKey: it has none; the message says why.
    """
    walk = _Walk()
    for name, module in model.named_modules(remove_duplicate=False):
        for hooks in _HOOKS:
            if getattr(module, hooks, None):
                raise NoKey(f"{name or 'the model'} has hooks")
        walk.say(name, module.training)
        walk.module(module)
    for name, x in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        walk.say(name, type(x), x.dtype, x.device, tuple(x.shape), x.stride())
        if compat.is_subclass(x):
            walk.say(inner(x))
    walk.code()
    return walk.digest.hexdigest()[:40]


class _Walk:
    """What was said so far, and the code that is reached from it.

    Code is followed by name: a global that a function reads is resolved in its module, and an
    attribute that it reads may be of any class seen so far. That is more than can be called, which
    costs a needless miss at worst.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._functions: set[int] = set()
        self._classes: dict[str, type] = {}
        self._names = {"forward", "__call__", "__init__", "__new__", "__post_init__"}
        self._members: set[tuple[str, str]] = set()
        self._inside: list[int] = []

    def say(self, *words: Any) -> None:
        self.digest.update(repr(words).encode())

    def module(self, module: nn.Module) -> None:
        """A module's type and plain attributes; its children come on their own."""
        self.type(type(module))
        for name, value in sorted(vars(module).items()):
            if name in ("_parameters", "_buffers", "_modules") or isinstance(value, nn.Module):
                continue
            if name.endswith(("_hooks", "_hooks_with_kwargs")):
                continue
            self.say(name)
            self.value(value)

    def type(self, kind: type) -> None:
        """A class, and that its code counts."""
        for base in kind.__mro__:
            name = f"{base.__module__}.{base.__qualname__}"
            self.say(name)
            if base.__module__.split(".")[0] not in _BY_VERSION:
                self._classes.setdefault(name, base)

    def value(self, value: Any, strict: bool = True) -> None:
        """Anything. What cannot be seen into raises, or is left out where not ``strict``."""
        if isinstance(value, _PLAIN):
            self.say(value)
        elif isinstance(value, _NAMED):
            self.say(str(value))
        elif isinstance(value, Tensor):
            self.say(value.dtype, value.device, tuple(value.shape), value.stride())
        elif id(value) in self._inside:
            self.say("again")
        elif len(self._inside) >= _DEPTH:
            if strict:
                raise NoKey(f"a {type(value).__name__} lies too deep in the model")
        else:
            self._inside.append(id(value))
            try:
                self._object(value, strict)
            finally:
                self._inside.pop()

    def _object(self, value: Any, strict: bool) -> None:
        if isinstance(value, (list, tuple)):
            self.say(type(value).__name__, len(value))
            for item in value:
                self.value(item, strict)
        elif isinstance(value, (set, frozenset)):
            plain = all(isinstance(x, _PLAIN) for x in value)
            if strict and not plain:
                raise NoKey("it holds a set of objects")
            self.say("set", sorted(value, key=repr) if plain else len(value))
        elif type(value) in (dict, OrderedDict, types.MappingProxyType):
            self.say(type(value).__name__, len(value))
            for name, item in value.items():
                if name in _OF_THIS_PROCESS:
                    continue
                self.value(name, strict)
                self.value(item, strict)
        elif isinstance(value, types.FunctionType):
            self.function(value)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, strict)
        elif isinstance(value, functools.partial):
            self.value((value.func, value.args, value.keywords), strict)
        elif isinstance(value, type):
            self.type(value)
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            self.say(value.__name__)
        elif not strict and type(value).__module__.split(".")[0] in _BY_VERSION:
            self.say(type(value).__qualname__)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif hasattr(value, "__dict__"):
            self.type(type(value))
            self.value(vars(value), strict)
        elif strict:
            raise NoKey(f"it holds a {type(value).__name__}")

    # ------------------------------------------------------------------------------- code

    def function(self, f: types.FunctionType) -> None:
        """A function's byte code, defaults, what it closes over and the globals that it reads."""
        if id(f) in self._functions or str(f.__module__).split(".")[0] in _BY_VERSION:
            self.say(f.__module__, f.__qualname__)
            return
        self._functions.add(id(f))
        self._code(f.__code__, f.__globals__)
        inside, self._inside = self._inside, []
        self.value((f.__defaults__, f.__kwdefaults__), strict=False)
        for cell in f.__closure__ or ():
            try:
                self.value(cell.cell_contents, strict=False)
            except ValueError:  # empty yet
                self.say("empty")
        self._inside = inside

    def _code(self, code: types.CodeType, names: dict[str, Any]) -> None:
        self.say(code.co_code, code.co_names, code.co_varnames, code.co_flags)
        self._names.update(code.co_names)
        for name in code.co_names:
            if name in names:
                self.say(name)
                self._global(names[name], code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, names)
            elif isinstance(constant, frozenset):
                self.say(sorted(constant, key=repr))
            else:
                self.say(constant)

    def _global(self, value: Any, names: tuple[str, ...]) -> None:
        if not isinstance(value, types.ModuleType):
            self.value(value, strict=False)
        elif value.__name__.split(".")[0] not in _BY_VERSION:
            for name in names:
                found = vars(value).get(name)
                if isinstance(found, (types.FunctionType, type)):
                    self.value(found, strict=False)

    def code(self) -> None:
        """The members of all classes whose names are read somewhere."""
        while True:
            fresh = sorted(
                (label, name)
                for label, kind in self._classes.items()
                for name in self._names & vars(kind).keys()
                if (label, name) not in self._members
            )
            if not fresh:
                return
            for label, name in fresh:
                self._members.add((label, name))
                self.say(label, name)
                self._member(vars(self._classes[label])[name])

    def _member(self, value: Any) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, (property, functools.cached_property)):
            get = value.fget if isinstance(value, property) else value.func
            value = get if isinstance(get, types.FunctionType) else None
        self.value(value, strict=False)
