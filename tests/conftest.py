"""What every test starts from: two threads, a fixed seed, nothing compiled."""

from __future__ import annotations

import os

import pytest
import torch

# What a test looks at must not depend on a measurement.
os.environ.setdefault("DSPARK_TUNE", "off")
# Nor on what another process has left.
os.environ.setdefault("DSPARK_REUSE", "off")
if not torch.cuda.is_available():
    # Most tests are about graphs: they need no compiled kernels, whose building takes seconds each.
    # Those that are about kernels say so in their options.
    os.environ.setdefault("DSPARK_KERNELS", "aten")


def pytest_configure(config: pytest.Config) -> None:
    # Under xdist the workers share the cores.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Each test seeds alike and compiles from nothing."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """An empty folder of kept steps."""
    from dspark_compile.reuse import files, key
    from dspark_compile.runtime.generate import free

    monkeypatch.setattr(files, "folder", lambda: tmp_path / "steps")
    # Sources that are being edited do not matter here.
    monkeypatch.setattr(key, "_STARTED", float("inf"))
    package = key._package
    package.cache_clear()
    yield tmp_path / "steps"
    package.cache_clear()
    free()
