"""Reference models in plain PyTorch, and the small trained model that the demo runs.

Import as ``dspark_compile.models``.
"""
