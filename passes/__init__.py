"""Graph rewrites, one a file; ``pipeline.py`` is the ordered list.

Import as ``dspark_compile.passes``.
"""
