"""Hand-written building blocks that the emitters compose.

Import as ``dspark_compile.kernels``. This module stays empty and carries no version on purpose:
transformers probes for a package called ``kernels``.
"""
