"""The package: symlinked top folders, the entry points, the import ban, what is in the wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TOP_FOLDERS = ("passes", "codegen", "kernels", "models")


@pytest.mark.parametrize("name", TOP_FOLDERS)
def test_top_folders_are_real_and_reached_through_relative_symlinks(name):
    link = ROOT / "dspark_compile" / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    module = importlib.import_module(f"dspark_compile.{name}")
    assert module.__name__ == f"dspark_compile.{name}"


def test_kernels_has_no_version():
    # transformers takes a package called kernels for its own, by its version.
    assert not hasattr(importlib.import_module("dspark_compile.kernels"), "__version__")


def test_backend_is_found_without_an_import():
    assert "dspark" in torch._dynamo.list_backends(exclude_tags=())
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="dspark")
    assert entry.value == "dspark_compile.backend:dspark"


def test_import_is_cheap_and_names_load_on_use():
    code = (
        "import sys, dspark_compile as d\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(d.__all__) <= set(dir(d))\n"
        "d.CompileReport\n"
        "try: d.nope\n"
        "except AttributeError as e: assert 'nope' in str(e)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exports_are_what_they_say():
    import dspark_compile

    assert callable(dspark_compile.explain)
    assert callable(dspark_compile.last_report)
    assert dspark_compile.Options.__name__ == "Options"
    assert dspark_compile.__version__ == importlib.metadata.version("dspark-compile")
    assert pickle.loads(pickle.dumps(dspark_compile.CompileReport())).graphs == []


@pytest.mark.parametrize("name", TOP_FOLDERS)
def test_lint_bans_top_level_imports(name):
    ruff = shutil.which(
        "ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if ruff is None:
        pytest.skip("ruff is not installed")
    command = [ruff, "check", "--no-cache", "--select", "TID251", "--stdin-filename", "x.py", "-"]

    def check(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, input=code, text=True, capture_output=True, cwd=ROOT)

    for banned in (f"import {name}", f"from {name} import x", f"import {name}.y"):
        done = check(banned + "\n")
        assert done.returncode == 1, done.stdout
        assert f"dspark_compile.{name}" in done.stdout
    assert check(f"from dspark_compile.{name} import x\n").returncode == 0


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the source, so that no build folder is left behind."""
    source, out = tmp_path_factory.mktemp("source") / "repo", tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), "."], cwd=source, check=True)
    (built,) = out.glob("dspark_compile-*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_real_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        infos = {i.filename: i for i in archive.infolist()}
    assert {name.split("/")[0].split("-")[0] for name in infos} == {"dspark_compile"}
    expected = {"dspark_compile/py.typed", "dspark_compile/diagnostics/report.html.j2"}
    for folder in TOP_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            if (path.parent / "__init__.py").is_file():
                expected.add(f"dspark_compile/{path.relative_to(ROOT).as_posix()}")
    data = [*(ROOT / "kernels/cpp").rglob("*.[hc]*"), *(ROOT / "models/demo").rglob("*.*")]
    expected |= {f"dspark_compile/{p.relative_to(ROOT).as_posix()}" for p in data if p.is_file()}
    assert expected <= set(infos)
    symlinks = [n for n, i in infos.items() if (i.external_attr >> 16) & 0o170000 == 0o120000]
    assert symlinks == []


@pytest.mark.slow
def test_a_normal_install_imports_from_elsewhere_and_from_the_root(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target]
    subprocess.run([*command, wheel], check=True)
    names = ", ".join(f"dspark_compile.{n}" for n in TOP_FOLDERS)
    code = f"import {names}; print(dspark_compile.passes.__file__)"
    script = tmp_path / "where.py"
    script.write_text(code)
    for cwd in (tmp_path, ROOT):
        done = subprocess.run(
            [sys.executable, script], cwd=cwd, text=True, capture_output=True, check=True,
            env={**os.environ, "PYTHONPATH": str(target)},
        )  # fmt: skip
        assert Path(done.stdout.strip()).is_relative_to(target)
