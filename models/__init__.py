"""Reference models in plain PyTorch, and the small trained model that the demo runs.

Import as ``dspark_compile.models``.
"""

import pathlib

DEMO_PATH = pathlib.Path(__file__).parent / "demo"
DEMO_DRAFT_PATH = pathlib.Path(__file__).parent / "demo_draft"
