"""From a dspark op at one graph site to the source text of its kernel.

Import as ``dspark_compile.codegen``.
"""
