"""ONNX exports of tiny models of transformers' families: errors against eager mode, nodes.

Each family is built as for the zoo (`tests/zoo/families.py`) and exported to ``gqa`` and
``portable``; `export_onnx` itself compares the graph with the model at prompts, steps and chunks,
batched ones behind a past on ``portable``. What is in the result file already is kept.

    python -m benchmarks.onnx_zoo [FAMILY ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import RESULTS

FAMILIES = (
    "llama", "qwen3", "gemma2", "gpt_oss", "mixtral", "deepseek_v3", "mistral", "qwen3_moe",
    "gptj", "phi3", "gpt2", "olmo2", "bloom", "qwen2", "stablelm", "granite", "falcon", "phi",
    "gpt_neox", "gemma3_text", "cohere", "glm4", "smollm3", "nemotron", "starcoder2", "opt",
)  # fmt: skip


def run(family: str, target: str) -> dict[str, Any]:
    """One export: its largest error, nodes, and what fell back; or the failure."""
    from dspark_compile.export import ExportError, export_onnx
    from tests.zoo import families

    model = families.build(family)
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export_onnx(model, Path(folder) / "model.onnx", target=target)
        except ExportError as error:
            return {"failure": str(error)[:500]}
    return {
        "error": report.error,
        "cases": len(report.checks),
        "nodes": report.num_nodes,
        "cache": report.options["cache"],
        "ops": {k: n for k, n in report.nodes.items() if "::" in k or k == "Attention"},
        "fallbacks": sorted({f"{w.split(' at ')[0]}: {reason}" for w, reason in report.fallbacks}),
    }


def main() -> None:
    """Run what is not in the result file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_zoo.json")
    args = parser.parse_args()
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for family in args.families:
        for target in ("gqa", "portable"):
            if done.get(family, {}).get(target, {"failure": ""}).get("failure") is None:
                continue
            try:
                found = run(family, target)
            except Exception as error:
                found = {"failure": f"{type(error).__name__}: {error}"[:500]}
            done.setdefault(family, {})[target] = found
            print(family, target, found.get("error"), found.get("failure"), flush=True)
            args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
