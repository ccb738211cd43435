"""A soak of `dspark_compile.generate`: many requests of random lengths on one small model.

No growth of memory, no compilation after the first of each batch bucket, and no wrong token against
transformers on a sample of the requests (every ``--check``-th, greedy, float32). Where an earlier
process has left its steps (``DSPARK_REUSE``, on unless it is set to off), they are found and
nothing is compiled at all: what the second of two runs shows.

    python -m benchmarks.soak --requests 100 --no-write
    python -m benchmarks.soak
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import time

import torch
from transformers import AutoModelForCausalLM

import dspark_compile
from benchmarks._common import write
from dspark_compile.models import DEMO_PATH
from dspark_compile.options import Options
from dspark_compile.runtime import captured


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Run, and write ``soak.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--check", type=int, default=50)
    parser.add_argument("--longest", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(DEMO_PATH, dtype=torch.float32).eval()
    draw, compiled, found = random.Random(args.seed), [], []
    original, again = captured.Captured.__init__, captured.Captured.again

    def counted(self, *given, **kwargs):
        compiled.append(1)
        original(self, *given, **kwargs)

    def kept(whole):
        found.append(1)
        return again(whole)

    captured.Captured.__init__ = counted  # type: ignore[method-assign]
    captured.Captured.again = staticmethod(kept)  # type: ignore[method-assign,assignment]
    memory, wrong, checked, tokens, paths = [], 0, 0, 0, set()
    start = time.perf_counter()
    for request in range(args.requests):
        rows = draw.choice((1, 1, 1, 1, 2, 3, 4))
        length = draw.randint(1, args.longest)
        ids = torch.randint(
            5, 4000, (rows, length), generator=torch.Generator().manual_seed(request)
        )
        mask = torch.ones_like(ids)
        for row in range(1, rows):
            mask[row, : draw.randint(0, length - 1)] = 0
        given = {"max_new_tokens": draw.randint(1, args.new), "do_sample": False}
        if rows > 1:
            given["attention_mask"] = mask
        got = dspark_compile.generate(model, ids, pad_token_id=0, **given)
        report = dspark_compile.last_generation()
        assert report is not None
        paths.add(report.path)
        tokens += rows * report.new_tokens
        if request % args.check == 0:
            checked += 1
            want = model.generate(ids, pad_token_id=0, **given)
            wrong += not torch.equal(got, want)
        if request % 100 == 99:
            gc.collect()
            memory.append(resident())
            print(
                request + 1,
                f"{memory[-1] / 2**20:.0f} MiB, {len(compiled)} compiled, {len(found)} found",
                flush=True,
            )
    seconds = time.perf_counter() - start
    growth = (memory[-1] - memory[len(memory) // 4]) / 2**20
    print(f"{wrong} of {checked} wrong, {growth:+.1f} MiB since a quarter, paths {sorted(paths)}")
    if args.no_write:
        return
    write(
        "soak",
        {
            "arguments": vars(args), "requests": args.requests, "tokens": tokens,
            "seconds": seconds, "compilations": len(compiled), "steps_found": len(found),
            "reuse": Options().reuse, "checked": checked, "wrong": wrong,
            "resident_mib": [m / 2**20 for m in memory], "growth_mib_since_a_quarter": growth,
            "paths": sorted(paths), "load": os.getloadavg()[0],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
