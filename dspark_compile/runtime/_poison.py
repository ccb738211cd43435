"""Make a tensor's memory inaccessible: every read or write of it is an error with a message.

`StorageImpl` in c10 carries a flag and a message for this (CUDA graph trees use it for the
outputs of a graph that has run again): once set, every access to the data pointer, const or
mutable, from any kernel or from Python, throws. GPU builds of torch expose the setter; CPU
builds do not, so there it is reached through five lines of C++ over a header that every torch
wheel ships, built once per torch version with the compiler that Inductor needs as well.

What does not work (tried on torch 2.13; the winner on 2.11 as well, over a hundred accesses):

* ``torch._C._set_throw_on_mutable_data_ptr`` and an empty storage: reads do not ask for the
  mutable pointer, so ``x + 1``, ``x.clone()``, ``x.sum()``, ``torch.cat`` and ``print`` read
  address 0 and the process dies.
* ``storage.resize_(0)`` alone: nothing in it checks the pointer at all.
* Changing ``tensor.__class__`` to a subclass with a raising ``__torch_function__`` (by reasoning,
  not tried): sound in Python only (C++ callers do not ask), and Dynamo guards on the exact
  class, so that every graph compiled for the cache recompiles once for the released one.
* The flag on a storage of size 0: sound, but taking a view fails first, with a message about
  storage sizes; Dynamo traces views of the cache in the next graph and fails as well. Hence the
  null storage that keeps the nominal size: metadata and views work as before, and guards see no
  change.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .errors import KVCacheError

_SOURCE = """
#include <c10/core/StorageImpl.h>
#include <string>
extern "C" int dspark_poison_storage(void* storage, const char* message) {
  try {
    static_cast<c10::StorageImpl*>(storage)
        ->release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
    return 0;
  } catch (...) {
    return 1;
  }
}
"""

_lock = threading.Lock()
_setter: Callable[[int, str], None] | None = None
_problem: str | None = None


def _cache_dir() -> Path:
    """A private folder: what lies in it is loaded as code."""
    for base in (
        os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
        os.environ.get("XDG_CACHE_HOME"),
        os.path.join(os.path.expanduser("~"), ".cache"),
    ):
        if not base:
            continue
        folder = Path(base) / "dspark" / "runtime"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix="dspark-"))


def _build() -> ctypes.CDLL:
    """The helper library, from the cache or built.

    Raises:
        KVCacheError: there is no C++ compiler, or it failed.
    """
    command = shlex.split(os.environ.get("CXX", "")) or next(
        ([found] for name in ("g++", "clang++", "c++") if (found := shutil.which(name))), []
    )
    if not command:
        raise KVCacheError(
            "no C++ compiler was found (set CXX, or install g++ or clang++; Inductor needs one too)"
        )
    root = Path(torch.__file__).parent
    abi = int(getattr(torch._C, "_GLIBCXX_USE_CXX11_ABI", True))
    flags = [
        *("-O1", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-I{root / 'include'}", f"-L{root / 'lib'}"),
    ]
    identity = (_SOURCE, torch.__version__, torch.version.git_version, command, flags, sys.platform)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:24]
    folder = _cache_dir()
    library = folder / f"poison-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source, built = Path(scratch) / "poison.cpp", Path(scratch) / "poison.so"
            source.write_text(_SOURCE)
            errors = []
            for standard in ("c++20", "c++17"):
                line = [
                    *command,
                    *flags,
                    f"-std={standard}",
                    str(source),
                    "-o",
                    str(built),
                    "-lc10",
                ]
                done = subprocess.run(line, capture_output=True, text=True)
                if done.returncode == 0:
                    os.replace(built, library)
                    break
                errors.append(done.stderr.strip()[-500:])
            else:
                raise KVCacheError(f"{command[0]} could not build the helper: {errors[-1]}")
    return ctypes.CDLL(str(library))


def _find_setter() -> Callable[[int, str], None]:
    native = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
    if native is not None:
        return native
    function = _build().dspark_poison_storage
    function.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    function.restype = ctypes.c_int

    def call(storage: int, message: str) -> None:
        if function(storage, message.encode()):
            raise KVCacheError("the storage could not be marked as inaccessible")

    return call


def unavailable() -> str | None:
    """Why memory cannot be made inaccessible here, or None if it can. Builds the helper on the
    first call, and tries it on a tensor that still has its data, so that a setter without effect
    shows up as a reason and not as a crash."""
    global _setter, _problem
    with _lock:
        if _setter is not None or _problem is not None:
            return _problem
        try:
            setter = _find_setter()
            with torch.inference_mode(False), torch.no_grad():
                probe = torch.ones(4)
                setter(probe.untyped_storage()._cdata, "probe")
                for access in (probe.clone, probe.zero_, probe.data_ptr):
                    try:
                        access()
                    except RuntimeError as error:
                        if "probe" in str(error):
                            continue
                    raise KVCacheError("this torch does not honour inaccessible storages")
                torch._C._construct_storage_from_data_pointer(0, torch.device("cpu"), 16)
            _setter = setter
        except Exception as error:
            _problem = str(error) or type(error).__name__
        return _problem


def _not_shared() -> bool:
    return False


def release_and_poison(tensor: Tensor, message: str) -> None:
    """Free the memory of ``tensor`` and make any later access to it raise ``message``.

    Shape, strides, dtype, device, identity and Dynamo guards stay as they are. The old storage
    is emptied and marked as well, so that an alias that escaped the caller's checks cannot read
    stale data either.

    Raises:
        KVCacheError: it cannot be done here (see `unavailable`).
    """
    problem = unavailable()
    if problem is not None or _setter is None:
        raise KVCacheError(problem or "unavailable")
    old = tensor.untyped_storage()
    null = torch._C._construct_storage_from_data_pointer(0, tensor.device, old.nbytes())
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        poisoned = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        poisoned.set_(null, tensor.storage_offset(), tensor.shape, tensor.stride())
        _setter(null._cdata, message)
        # torch's own die here: one asks for the pointer outside its exception handlers, one for
        # an allocator. Every other method was tried. (Views share this storage object.)
        null.is_shared = _not_shared  # type: ignore[method-assign]
        null.new = partial(torch.UntypedStorage, 0, device=tensor.device)  # type: ignore[method-assign]
        # One step, from readable to unreadable: another thread never sees the null pointer.
        tensor.data = poisoned
    old.resize_(0)
    _setter(old._cdata, message)
