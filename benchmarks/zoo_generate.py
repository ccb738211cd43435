"""Greedy `generate` of every family of the zoo against Hugging Face's, token for token, float32.

Each family is built tiny with random parameters (as `benchmarks/zoo.py` has it) and continues one
prompt, and four of different lengths padded on the left. Written after every family; a sweep goes
on where it was stopped. No times: this is about being right.

    python -m benchmarks.zoo_generate
    python -m benchmarks.zoo_generate --families llama,qwen3 --kernels cpp --inner inductor
    python -m benchmarks.zoo_generate --steps 1000 --positions 2048 --kernels cpp --inner auto \\
        --families llama,gpt2,bloom --name zoo_generate_1000

Where two texts differ, the file has the place, and how far apart the two tokens' logits are in a
float64 copy of the model: only a gap of the size of float32's rounding is a tie.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from torch import Tensor

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
        if not equal:
            result[name]["differs"] = difference(model, got, want, given.get("attention_mask"))
    free()
    return result


def difference(model: Any, got: Tensor, want: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Where two texts ``[B, L]`` part, and the gap of the two tokens' float64 logits there."""
    if got.shape != want.shape:
        return {"shapes": [list(got.shape), list(want.shape)]}
    row, at = (int(i) for i in (got != want).nonzero()[0])
    prefix = want[row : row + 1, :at]
    given: dict[str, Any] = {"input_ids": prefix}
    if mask is not None:
        given["attention_mask"] = torch.nn.functional.pad(
            mask[row : row + 1], (0, at - mask.shape[1]), value=1
        )
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(**given).logits[0, -1]
    a, b = int(got[row, at]), int(want[row, at])
    return {
        "row": row, "at": at, "tokens": [a, b], "gap": float(logits[b] - logits[a]),
        "largest_logit": float(logits.abs().max()),
    }  # fmt: skip


def main() -> None:
    """Sweep, and write ``zoo_generate.json``."""
    from tests.zoo import families

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="all")
    parser.add_argument("--kernels", default="aten")
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--steps", type=int, default=24, help="new tokens")
    parser.add_argument(
        "--positions", type=int, default=0, help="that models are built for; 0: as the zoo has them"
    )
    parser.add_argument("--name", default="zoo_generate")
    parser.add_argument("--restart", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"{args.name}.json"
    options = {"kernels": args.kernels, "inner": args.inner}
    if args.positions:
        sizes = [k for k, v in families.GENERIC.items() if v == families.MAX_POSITIONS]
        families.GENERIC.update(dict.fromkeys(sizes, args.positions))
    names = families.tested() if args.families == "all" else args.families.split(",")
    rows: dict[str, Any] = {}
    if path.exists() and not args.restart:
        rows = json.loads(path.read_text())["families"]
    for family in names:
        if family in rows and args.families == "all":
            continue
        try:
            rows[family] = run_family(family, options, args.steps)
        except Exception as error:  # the sweep goes on
            rows[family] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        print(family, rows[family], flush=True)
        payload = {"options": options, "new_tokens": args.steps, "families": rows}
        path.write_text(json.dumps({"conditions": conditions(), **payload}, indent=1) + "\n")
    cases = [c for row in rows.values() for c in row.values() if isinstance(c, dict)]
    paths = [c["path"] for c in cases]
    print({p: paths.count(p) for p in sorted(set(paths))})
    print(
        "equal", sum(c.get("equal", False) for c in cases), "of", len(paths) - paths.count("none")
    )


if __name__ == "__main__":
    main()
