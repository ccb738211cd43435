"""Greedy `generate` of every family of the zoo against Hugging Face's, token for token, float32.

Each family is built tiny with random parameters (as `benchmarks/zoo.py` has it) and continues one
prompt, and four of different lengths padded on the left. Written after every family; a sweep goes
on where it was stopped. No times: this is about being right.

    python -m benchmarks.zoo_generate
    python -m benchmarks.zoo_generate --families llama,qwen3 --kernels cpp --inner inductor
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

import dspark_compile
from benchmarks._common import RESULTS, conditions
from dspark_compile.runtime.generate import free


def run_family(family: str, options: dict[str, Any], new: int) -> dict[str, Any]:
    """``{"one": ..., "ragged": ...}``: the path, whether the tokens are equal, and notes."""
    from tests.zoo import families

    torch._dynamo.reset()
    model = families.build(family).eval()
    ids = families.tokens(family, 9, 4)
    mask = torch.ones_like(ids)
    ragged = ids.clone()
    for row, padding in ((1, 3), (3, 5)):
        mask[row, :padding] = 0
        ragged[row, :padding] = 0
    greedy = {
        "max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    cases = {
        "one": {"inputs": ids[:1]},
        "ragged": {"inputs": ragged, "attention_mask": mask},
    }
    result: dict[str, Any] = {}
    for name, given in cases.items():
        given = {**given, **greedy}
        try:
            want = model.generate(**given)
        except Exception as error:  # a family may not be able to generate at all
            result[name] = {"path": "none", "notes": [f"transformers: {type(error).__name__}"]}
            continue
        inputs = given.pop("inputs")
        got, report = dspark_compile.generate(
            model, inputs, return_stats=True, options=options, **given
        )
        equal = got.shape == want.shape and torch.equal(got, want)
        result[name] = {"path": report.path, "equal": equal, "notes": report.notes}
    free()
    return result


def main() -> None:
    """Sweep, and write ``zoo_generate.json``."""
    from tests.zoo import families

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="all")
    parser.add_argument("--kernels", default="aten")
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--name", default="zoo_generate")
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    options = {"kernels": args.kernels, "inner": args.inner}
    names = families.tested() if args.families == "all" else args.families.split(",")
    rows: dict[str, Any] = {}
    if path.exists() and not args.restart:
        rows = json.loads(path.read_text())["families"]
    for family in names:
        if family in rows and args.families == "all":
            continue
        try:
            rows[family] = run_family(family, options, args.new)
        except Exception as error:  # the sweep goes on
            rows[family] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(family, rows[family], flush=True)
        payload = {"options": options, "new_tokens": args.new, "families": rows}
        path.write_text(json.dumps({"conditions": conditions(), **payload}, indent=1) + "\n")
    cases = [c for row in rows.values() for c in row.values() if isinstance(c, dict)]
    paths = [c["path"] for c in cases]
    print({p: paths.count(p) for p in sorted(set(paths))})
    print(
        "equal", sum(c.get("equal", False) for c in cases), "of", len(paths) - paths.count("none")
    )


if __name__ == "__main__":
    main()
