"""List the benchmarks and how to run one."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path


def main() -> None:
    """Print every benchmark module's first line."""
    print("Run one with: python -m benchmarks.NAME  (see its --help)\n")
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("_"):
            continue
        doc = importlib.import_module(f"benchmarks.{module.name}").__doc__ or ""
        print(f"  {module.name:16} {doc.strip().splitlines()[0]}")


if __name__ == "__main__":
    main()
