"""Benchmarks: each module is a command, writes one JSON under ``benchmarks/results/`` with
the full conditions, and compares in one interleaved run. ``python -m benchmarks`` lists them."""
