"""Building and caching: no compiler, two processes at once, files that others could write."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from dspark_compile.codegen.cpp import build, emit
from dspark_compile.kernels import cpp

KERNEL = emit.source("seven", "A test.", "parallel.h", ["p out"], "*(int*)out = 7;")
LEVEL = "portable"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_LOADED", {})
    emit.kernel.cache_clear()
    yield tmp_path / "cpp"
    emit.kernel.cache_clear()


def call():
    out = torch.zeros(1, dtype=torch.int32)
    assert emit.kernel(KERNEL, LEVEL)(out.data_ptr(), 1) == 0
    return out.item()


def test_source_and_library_are_kept(cache, monkeypatch):
    assert call() == 7
    (text,), (library,) = cache.glob("*.cpp"), cache.glob("*.so")
    assert text.name.startswith("seven_portable_") and text.stem == library.stem
    assert text.read_text() == KERNEL.text
    assert {p.suffix for p in cache.iterdir()} == {".cpp", ".so"}
    assert cache.stat().st_mode & 0o077 == 0
    stamp = library.stat().st_mtime_ns
    monkeypatch.setattr(build, "_LOADED", {})
    emit.kernel.cache_clear()
    assert call() == 7
    assert library.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("what", ["folder", "library"])
def test_a_cache_that_others_can_write_is_refused(cache, monkeypatch, what):
    assert call() == 7
    (library,) = cache.glob("*.so")
    os.chmod(cache if what == "folder" else library, 0o777)
    monkeypatch.setattr(build, "_LOADED", {})
    emit.kernel.cache_clear()
    with pytest.raises(build.UnsafeCacheError, match="written by others"):
        call()


def test_no_compiler(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = cpp.supports("linear", torch.zeros(1, 8), torch.zeros(4, 8))
    assert "CXX='no-such-compiler' is not a program" in reason
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in cpp.supports("linear", torch.zeros(1, 8), torch.zeros(4, 8))


def test_an_unknown_instruction_set_is_a_reason(monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_ISA", "mmx")
    reason = cpp.supports("linear", torch.zeros(1, 8), torch.zeros(4, 8))
    assert "DSPARK_CPU_ISA='mmx' is not one of" in reason


def test_an_unknown_way_to_read_is_a_reason(monkeypatch):
    monkeypatch.setenv("DSPARK_CPU_READ", "backwards")
    reason = cpp.supports("linear", torch.zeros(1, 8), torch.zeros(4, 8))
    assert "DSPARK_CPU_READ='backwards' is not one of runs, sequence" in reason


def test_what_does_not_compile_says_where(cache):
    broken = emit.source("broken", "A test.", "parallel.h", [], "nonsense;")
    with pytest.raises(build.BuildError, match=r"broken_portable.*nonsense"):
        emit.kernel(broken, LEVEL)
    assert not list(cache.glob("*.so")) and not list(cache.glob("*.o"))


def test_a_folder_that_cannot_be_made(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="set DSPARK_CACHE_DIR"):
        call()


def test_a_folder_that_cannot_be_written(cache, monkeypatch):
    """What another has built there serves; what has not been built is a reason, no crash."""
    assert call() == 7
    monkeypatch.setattr(build, "_LOADED", {})
    emit.kernel.cache_clear()

    def refuse(path, *rest):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(build.os, "open", refuse)
    monkeypatch.setattr(build.tempfile, "mkstemp", refuse)
    assert call() == 7
    other = emit.source("eight", "A test.", "parallel.h", ["p out"], "*(int*)out = 8;")
    with pytest.raises(build.BuildError, match=r"cannot write to the cache.*set DSPARK_CACHE_DIR"):
        emit.kernel(other, LEVEL)


def test_two_processes_compile_once(cache, tmp_path):
    log = tmp_path / "calls"
    wrapper = tmp_path / "cxx"
    wrapper.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec g++ "$@"\n')
    wrapper.chmod(0o755)
    program = (
        "from dspark_compile.codegen.cpp import build\n"
        'text = \'extern "C" __attribute__((visibility("default"))) int f() { return 3; }\'\n'
        f"print(build.load('three', text, {LEVEL!r}).f())"
    )
    environment = {**os.environ, "CXX": str(wrapper)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in processes] == ["3", "3"]
    # --version from each, one compilation and one link.
    compiled = [line for line in log.read_text().splitlines() if "-c " in line]
    assert len(compiled) == 1
