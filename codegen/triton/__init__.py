"""Printing what a site knows into Triton kernels.

`predicate` prints masks, `attention` puts one into the attention kernel, `source` keeps the
resulting files.
"""
