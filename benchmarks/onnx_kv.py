"""ONNX graphs with quantised caches: how far the logits move.

The shipped model and tiny random ones, each exported with an exact cache, with ``kv_cache="int8"``
(``gqa``: static scales; ``portable``: a scale for each token and head) and with ``"int4"``
(``gqa``). Every graph runs windows of text that the scales were not taken from, in ONNX Runtime.
The error is ``||a - b|| / ||b||`` over all logits of a window, b those of the exact graph.

    python -m benchmarks.onnx_kv [--windows 12] [--tokens 384] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._common import RESULTS

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "models" / "demo"
GRAPHS = (("gqa", "int8"), ("portable", "int8"), ("gqa", "int4"))


def texts() -> tuple[str, list[str]]:
    """What scales are taken from, and what is measured on: other files."""
    sample = "".join(
        (ROOT / "dspark_compile" / f).read_text()[:6000] for f in ("backend.py", "cli.py")
    )
    held = (DEMO / "heldout.txt").read_text()
    others = [held[i : i + 4000] for i in range(0, len(held) - 4000, max(1, len(held) // 8))]
    others += [(ROOT / f).read_text()[:4000] for f in ("README.md", "docs/onnx.md", "LICENSE")]
    return sample, others


def models() -> list[tuple[str, Any, torch.Tensor, list[torch.Tensor]]]:
    """``(name, model, calibration ids, windows [1, N])``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.export import tiny

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    sample, others = texts()
    made = []
    demo = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(sample)["input_ids"]])
    windows = [torch.tensor([tokenizer(t)["input_ids"]]) for t in others]
    made.append(("demo", demo, ids[:, :2048], windows))
    generator = torch.Generator().manual_seed(0)
    for name in ("llama", "qwen3"):
        model = getattr(tiny, name)()
        random = [torch.randint(3, 96, (1, 120), generator=generator) for _ in range(12)]
        made.append((f"random {name}", model, torch.randint(3, 96, (16, 128)), random))
    return made


def logits(path: Path, ids: torch.Tensor) -> np.ndarray:
    """Logits ``[N, V]`` of a prompt ``[1, N]``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = ids.shape[1]
    feed: dict[str, Any] = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count)[None],
    }
    kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
    static = "TensorScatter" in _ops(path)
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (1, value.shape[1], count if static else 0, value.shape[3])
            feed[value.name] = np.zeros(shape, kinds[value.type])
    return session.run(["logits"], feed)[0][0]


def _ops(path: Path) -> set[str]:
    import onnx

    return {n.op_type for n in onnx.load(str(path), load_external_data=False).graph.node}


def measure(
    name: str, model: Any, ids: torch.Tensor, windows: list[torch.Tensor], folder: Path
) -> dict[str, Any]:
    """Errors of every graph of one model."""
    from dspark_compile.export import export_onnx

    exact = folder / "exact.onnx"
    export_onnx(model, exact, target="gqa")
    wanted = [logits(exact, w) for w in windows]
    found: dict[str, Any] = {"model": name, "calibration_tokens": ids.numel(), "graphs": {}}
    for target, kv_cache in GRAPHS:
        path = folder / "quantised.onnx"
        calibration = {"calibration": ids} if target == "gqa" else {}
        export_onnx(model, path, target=target, kv_cache=kv_cache, **calibration)
        errors = [
            float(np.linalg.norm(logits(path, w) - b) / np.linalg.norm(b))
            for w, b in zip(windows, wanted, strict=True)
        ]
        found["graphs"][f"{target} {kv_cache}"] = {
            "mean": round(statistics.mean(errors), 5),
            "largest": round(max(errors), 5),
        }
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_kv.json")
    args = parser.parse_args()
    found = []
    for name, model, ids, windows in models():
        kept = [w[:, : args.tokens] for w in windows[: args.windows]]
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(name, model, ids, kept, Path(folder)))
        print(json.dumps(found[-1]), flush=True)
    import onnxruntime

    result = {
        "torch": torch.__version__, "onnxruntime": onnxruntime.__version__,
        "tokens": args.tokens, "models": found,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
