"""Emitted C++ as a loaded library: compile once, keep, share between processes.

A library is named after its kernel and a hash of all that decides its bytes: the source, the
headers it includes, compiler and version, flags, torch and dspark. Source and binary lie
side by side in ``$DSPARK_CACHE_DIR/cpp`` (``~/.cache/dspark/cpp``), so that a user can read what
runs. Both are written under a temporary name and renamed, behind a lock: no process sees half a
file, and of several that want one kernel one compiles. Loading a library runs its code, so a
folder or file that somebody else could have written is refused (`UnsafeCacheError`).

OpenMP comes from torch's own runtime, so kernels run on torch's threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_compile import _torch_compat as compat
from dspark_compile._version import __version__
from dspark_compile.codegen.cpp import isa as isa_levels

_BASE_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"),
)


class BuildError(RuntimeError):
    """A kernel could not be built."""


class NoCompilerError(BuildError):
    """There is no C++ compiler."""


class UnsafeCacheError(BuildError):
    """The cache could have been written by another user."""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler.

    Attributes:
        compiler: its path.
        version: the first line of ``--version``.
        openmp: torch's OpenMP runtime, "" for the system's where torch brings none, or None
            where the two do not go together: kernels then use one thread.
    """

    compiler: str
    version: str
    openmp: str | None


def toolchain() -> Toolchain:
    """The compiler in use.

    Raises:
        NoCompilerError: none is installed, or it does not run.
    """
    path = compat.cxx_compiler()
    if path is None:
        named = os.environ.get("CXX")
        what = f"CXX={named!r} is not a program" if named else "no C++ compiler"
        raise NoCompilerError(f"{what}: install g++ or clang++, or set CXX")
    return _toolchain(path)


@functools.lru_cache(maxsize=8)
def _toolchain(path: str) -> Toolchain:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoCompilerError(f"{path} does not run: {error}") from error
    lines = done.stdout.splitlines()
    version = lines[0] if lines else "unknown"
    openmp = compat.openmp_library()
    clang = "clang" in version
    if openmp is None:
        openmp = None if clang else ""
    elif clang == ("libgomp" in Path(openmp).name):
        # Clang's OpenMP calls another runtime than GCC's; two runtimes are two pools.
        openmp = None
    return Toolchain(path, version, openmp)


def headers() -> Path:
    """The folder of hand-written templates."""
    from dspark_compile.kernels import cpp

    return Path(cpp.__file__).parent.resolve()


def _headers_hash(source: str) -> str:
    """A hash of the headers that ``source`` includes, and of those that they include."""
    digest, seen, queue = hashlib.sha256(), set(), _included(source)
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            text = _header(name)
            digest.update(f"{name}\0{text}\0".encode())
            queue = sorted({*queue, *_included(text)})
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _header(name: str) -> str:
    return (headers() / name).read_text(encoding="utf-8")


def _included(text: str) -> list[str]:
    return sorted(set(re.findall(r'^#include "([^"]+)"', text, re.MULTILINE)))


def cache_directory() -> Path:
    """Where sources and libraries go."""
    root = os.environ.get("DSPARK_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "dspark") / "cpp"


def library_path(name: str, source: str, level: str) -> Path:
    """The file that ``source`` compiles to."""
    tools = toolchain()
    parts = (
        *(source, _headers_hash(source), tools.compiler, tools.version, str(tools.openmp)),
        *(*_BASE_FLAGS, *isa_levels.flags(level), torch.__version__, __version__),
    )
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    return cache_directory() / f"{name}_{level}_{digest}.so"


_LOADED: dict[Path, ctypes.CDLL] = {}
_LOADING = threading.Lock()


def load(name: str, source: str, level: str) -> ctypes.CDLL:
    """The library of ``source``, compiled for ``level`` unless it is in the cache.

    Raises:
        BuildError: it does not compile or load, there is no compiler, or the cache is unsafe.
    """
    path = library_path(name, source, level)
    library = _LOADED.get(path)
    if library is not None:
        return library
    own_directory(path.parent)
    if not path.exists():
        try:
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(path, source, level)
        except OSError as error:  # read-only, or full
            raise BuildError(
                f"cannot write to the cache folder {path.parent}: {error.strerror}; "
                "set DSPARK_CACHE_DIR"
            ) from error
    check_owner(path)
    with _LOADING:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(
                f"cannot load {path}: {error}; remove it to have it built again"
            ) from error
        return _LOADED.setdefault(path, library)


def own_directory(path: Path) -> None:
    """Make ``path``, for this user alone, or check that nobody else could have written to it.

    Raises:
        UnsafeCacheError: somebody could have.
        BuildError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot make the cache folder {path}: {error.strerror}; set DSPARK_CACHE_DIR"
        ) from error
    check_owner(path)


def check_owner(path: Path) -> None:
    """Raises `UnsafeCacheError` if another user owns ``path`` or may write to it."""
    if not hasattr(os, "getuid"):
        return
    info = path.stat()
    if info.st_uid not in (os.getuid(), 0):
        raise UnsafeCacheError(f"{path} belongs to another user; set DSPARK_CACHE_DIR elsewhere")
    if stat.S_IMODE(info.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeCacheError(f"{path} can be written by others; chmod go-w it or remove it")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock between processes; it goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:
        # Without it two processes may both compile; renaming is still atomic.
        yield
        return
    handle = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
        path.unlink(missing_ok=True)


def _compile(path: Path, source: str, level: str) -> None:
    tools = toolchain()
    text = path.with_suffix(".cpp")
    write(text, source)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".o")
    os.close(handle)
    linked = temporary + ".so"
    flags = [*_BASE_FLAGS, *isa_levels.flags(level), f"-I{headers()}"]
    openmp = [] if tools.openmp is None else ["-fopenmp"]
    runtime = openmp
    if tools.openmp:
        # The file itself, not -fopenmp, which would link the system's runtime.
        runtime = [tools.openmp, f"-Wl,-rpath,{Path(tools.openmp).parent}"]
    try:
        _run([tools.compiler, *flags, *openmp, "-c", str(text), "-o", temporary], text)
        _run([tools.compiler, "-shared", temporary, *runtime, "-lm", "-o", linked], text)
        os.chmod(linked, 0o700)
        os.replace(linked, path)
    finally:
        for leftover in (temporary, linked):
            Path(leftover).unlink(missing_ok=True)


def _run(command: list[str], source: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed on {source}: {error}") from error
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if "error" in x] or done.stderr.splitlines()
        raise BuildError(f"{source} does not compile: " + " | ".join(lines[:3]))


def write(path: Path, text: str) -> None:
    """Write a file under another name and rename it: nobody sees half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
