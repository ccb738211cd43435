"""Experts over int8 and int4 weights on the CPU: the kernels alone, against bfloat16 ones.

Layers of Qwen3-MoE's shape (hidden 1024, 64 experts, top-8, width 512), read one after the other so
that none lies in cache; every step has other random choices. Forms take turns in one run with a
probe that only reads memory. ``dequantised`` is what runs where no kernel takes a site: all experts
of a layer to bfloat16, then the bfloat16 kernel.

    python -m benchmarks.moe_quantized
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks._common import interleaved, write
from dspark_compile.codegen.cpp import emit, isa
from dspark_compile.codegen.machine import _probes
from dspark_compile.kernels import cpp
from dspark_compile.kernels.cpp import moe, moe_quantized
from dspark_compile.kernels.cpp._launch import _plain_value
from dspark_compile.ops.quantized import pack_int4

HIDDEN, INNER, EXPERTS, TOP_K, GROUP = 1024, 512, 64, 8, 32
SHAPES = ((2 * INNER, HIDDEN), (HIDDEN, INNER))  # gate and up, down
PROBE_BYTES = 512 * 2**20


def numbers(rows: int, columns: int, top: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers ``[E, N, K]`` and scales ``[E, N, G]``."""
    q = torch.randint(-top, top + 1, (EXPERTS, rows, columns), dtype=torch.int8)
    scale = (torch.rand(EXPERTS, rows, groups) + 0.5) / (20 * top)
    return q, scale.bfloat16()


def halves(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of one stack."""
    return both[:, :INNER], both[:, INNER:]


class Layer:
    """The weights of one layer in every form: lists of arguments behind choices and weights."""

    def __init__(self) -> None:
        (bq, bs), (dq, ds) = (numbers(*shape, 127, 1) for shape in SHAPES)
        self.int8 = [
            *([t] for t in (*halves(bq), dq)), *([t] for t in (*halves(bs), ds)), *[[]] * 6,
        ]  # fmt: skip
        dense = [(q.bfloat16() * s) for q, s in ((bq, bs), (dq, ds))]
        self.bf16 = [*([t] for t in (*halves(dense[0]), dense[1])), *[[]] * 3]
        self.stacks = ((bq, bs), (dq, ds))
        (bq, bs), (dq, ds) = (numbers(*s, 7, s[1] // GROUP) for s in SHAPES)
        parts = (*zip(halves(bq), halves(bs), strict=True), (dq, ds))
        self.int4 = [
            *([pack_int4(m.contiguous()) for m in q] for q, _ in parts),
            *([m.contiguous() for m in s] for _, s in parts),
            *[[]] * 6,
        ]

    def dequantised(self) -> list[Any]:
        dense = [(q.bfloat16() * s) for q, s in self.stacks]
        return [*([t] for t in (*halves(dense[0]), dense[1])), *[[]] * 3]


def prepared(op: str, operands: list[torch.Tensor], weights: list[Any]) -> Any:
    """A call of the kernel alone, as a native program makes it."""
    args = [*operands, *weights, "silu"]
    out = torch.empty_like(operands[0])
    if op == "moe_experts":
        call = moe.experts_call(operands[0], out, *args[1:])
    else:
        call = moe_quantized.experts_call(int(op[-1]), args, out)
    function = emit.kernel(call.source, isa.detect())
    values = [_plain_value(v) for v in call.values]
    threads = torch.get_num_threads()
    return lambda: (function(*values, threads), call, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,8,512")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    layers = [Layer() for _ in range(args.layers)]
    probe, buffer = _probes().read, torch.ones(PROBE_BYTES // 4)
    results = {}
    for tokens in map(int, args.tokens.split(",")):
        rounds = args.rounds if tokens < 64 else 3
        hit: list[int] = []

        def choices(tokens: int = tokens, hit: list[int] = hit) -> list[torch.Tensor]:
            index = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
            hit.append(len(index.unique()))
            x = torch.randn(tokens, HIDDEN).bfloat16()
            return [x, index, torch.full((tokens, TOP_K), 1 / TOP_K).bfloat16()]

        def step(op: str, form: str, choices: Any = choices) -> Any:
            operands = choices()
            calls = [prepared(op, operands, getattr(layer, form)) for layer in layers]

            def run() -> None:
                for call in calls:
                    for old, new in zip(operands, choices(), strict=True):
                        old.copy_(new)
                    call()

            return run

        def dequantised(choices: Any = choices) -> None:
            for layer in layers:
                torch.ops.dspark_cpu.moe_experts(*choices(), *layer.dequantised(), "silu")

        for form, op in (("bf16", "moe_experts"), ("int8", "moe_experts_int8"),
                         ("int4", "moe_experts_int4")):  # fmt: skip
            reason = cpp.supports(op, *choices(), *getattr(layers[0], form), "silu")
            assert reason is None, reason
        runs = {
            "probe": lambda: probe(buffer, torch.get_num_threads()),
            "bf16": step("moe_experts", "bf16"),
            "int8": step("moe_experts_int8", "int8"),
            "int4": step("moe_experts_int4", "int4"),
        }
        if tokens != 8:
            runs["dequantised"] = dequantised
        interleaved(runs, 1)
        hit.clear()
        timed = interleaved(runs, rounds)
        bandwidth = PROBE_BYTES / timed["probe"]["median_s"]
        experts = sum(hit) / len(hit)
        one = 3 * HIDDEN * INNER
        sizes = {"bf16": 2 * one, "int8": one + 4 * INNER + 2 * HIDDEN,
                 "int4": one / 2 + one / GROUP * 2}  # fmt: skip
        row: dict[str, Any] = {"read_GBps": bandwidth / 1e9, "experts_hit": experts}
        for name, times in timed.items():
            if name == "probe":
                continue
            row[name] = {
                "ms": times["median_s"] * 1e3 / len(layers),
                "of_bf16": timed["bf16"]["median_s"] / times["median_s"],
            }
            if name in sizes:
                read = sizes[name] * experts * len(layers) / times["median_s"]
                row[name]["of_read_bandwidth"] = read / bandwidth
        results[str(tokens)] = row
        print(tokens, row)
    write("moe_quantized", {"shape": [HIDDEN, INNER, EXPERTS, TOP_K], "tokens": results})


if __name__ == "__main__":
    main()
