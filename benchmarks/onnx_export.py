"""ONNX graphs: nodes, and decode speed in ONNX Runtime on the CPU.

Three graphs of one model, decoded in turns in one process: ours (``target="gqa"``), that of
onnxruntime-genai's own builder, and a plain ``torch.onnx.export`` of the model with its cache as
inputs and outputs. A step is one token behind ``--context`` tokens; past and present of ours and of
the builder's share a buffer, which is what both are made for; the plain graph gives presents that
are fed back.

    python -m benchmarks.onnx_export [--shapes small] [--context 256 1024] [--out FILE]
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._common import RESULTS

SHAPES: dict[str, dict[str, Any]] = {
    # 9 and 118 million parameters: one lies in a large cache, the other is read from memory.
    "tiny": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6},
    "small": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8},
}
STYLES = ("llama", "qwen3")


def build(style: str, shape: str) -> Any:
    """A random model: 16 query heads and 8 key heads of 64, a vocabulary of 8192."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[style]
    torch.manual_seed(0)
    heads = SHAPES[shape]["hidden_size"] // 64
    values = {
        **SHAPES[shape], "vocab_size": 8192, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "head_dim": 64, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return model(config(**values)).eval()


def built(source: Path, folder: Path) -> Path:
    """The graph of onnxruntime-genai's builder for a saved model."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(source)]
    command += ["-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "model.onnx"


def plain(model: Any, path: Path) -> Path:
    """``torch.onnx.export`` of the model as it is, with a growing cache."""
    from dspark_compile.export.causal_lm import CausalLM

    subject = CausalLM(model, static=False)
    auto = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(dims, auto) for dims in subject.dynamic)
    made = torch.onnx.export(
        subject.module, tuple(subject.example), dynamo=True, dynamic_shapes=(shapes,),
        input_names=subject.input_names, output_names=subject.output_names, verbose=False,
    )  # fmt: skip
    assert made is not None
    made.save(str(path))
    return path


def op_counts(path: Path) -> dict[str, int]:
    """Nodes by op, constants not counted."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node
    return dict(collections.Counter(n.op_type for n in nodes if n.op_type != "Constant"))


class Decoder:
    """One graph, ready for steps of one token behind ``context`` tokens."""

    def __init__(self, path: Path, config: Any, context: int, shared: bool) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            str(path), settings, providers=["CPUExecutionProvider"]
        )
        self.names = {i.name for i in self.session.get_inputs()}
        self.layers, self.context, self.shared = config.num_hidden_layers, context, shared
        rows = 2048 if shared else context
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        generator = np.random.default_rng(0)
        self.caches = {}
        for i in range(self.layers):
            for kind in ("key", "value"):
                array = np.zeros(shape, np.float32)
                array[:, :, :context] = generator.standard_normal(
                    (*shape[:2], context, shape[3]), np.float32
                )
                self.caches[f"{i}.{kind}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def step(self, token: int) -> np.ndarray:
        """Logits ``[1, 1, V]`` of one token; the cache stays at ``context``."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([[token]]))
        binding.bind_cpu_input("attention_mask", np.ones((1, self.context + 1), np.int64))
        if "position_ids" in self.names:
            binding.bind_cpu_input("position_ids", np.array([[self.context]]))
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            if self.shared:
                binding.bind_ortvalue_output(f"present.{name}", cache)
            else:
                binding.bind_output(f"present.{name}", "cpu")
        binding.bind_output("logits", "cpu")
        self.session.run_with_iobinding(binding)
        names = [o for o in binding.get_outputs() if o.shape()[-1] == 8192]
        return names[0].numpy()


def prepare(style: str, shape: str, folder: Path) -> dict[str, Path]:
    """The three graphs of one model in ``folder``; what is there already stays."""
    from dspark_compile.export import export_onnx

    folder.mkdir(parents=True, exist_ok=True)
    model = build(style, shape)
    if not (folder / "source").exists():
        model.save_pretrained(folder / "source")
        _tokenizer(folder / "source")
    paths = {
        "ours": folder / "ours.onnx",
        "builder": folder / "built" / "model.onnx",
        "plain": folder / "plain.onnx",
    }
    if not paths["ours"].exists():
        export_onnx(model, paths["ours"], target="gqa")
    if not paths["builder"].exists():
        built(folder / "source", folder / "built")
    if not paths["plain"].exists():
        plain(model, paths["plain"])
    return paths


def measure(
    style: str, shape: str, context: int, rounds: int, steps: int, folder: Path
) -> dict[str, Any]:
    """Counts, agreement and speed of the three graphs of one model."""
    from transformers import AutoConfig

    paths = prepare(style, shape, folder)
    config = AutoConfig.from_pretrained(folder / "source")
    counts = {key: op_counts(path) for key, path in paths.items()}
    decoders = {
        key: Decoder(path, config, context, shared=key != "plain") for key, path in paths.items()
    }
    logits = {key: decoder.step(7) for key, decoder in decoders.items()}
    seconds: dict[str, list[float]] = {key: [] for key in decoders}
    order = list(decoders)
    for turn in range(rounds):
        for key in order[turn % 3 :] + order[: turn % 3]:
            decoders[key].step(5)
            start = time.perf_counter()
            for token in range(steps):
                decoders[key].step(token)
            seconds[key].append((time.perf_counter() - start) / steps)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    scale = float(np.abs(logits["builder"]).max())
    return {
        "style": style,
        "shape": shape,
        "layers": config.num_hidden_layers,
        "context": context,
        "nodes": {key: sum(c.values()) for key, c in counts.items()},
        "ops": counts,
        "tokens_per_second": {key: round(1 / t, 1) for key, t in median.items()},
        "ours_over_builder": round(_ratio(seconds["builder"], seconds["ours"]), 3),
        "ours_over_plain": round(_ratio(seconds["plain"], seconds["ours"]), 3),
        "difference_of_logits": {
            key: float(np.abs(logits[key] - logits["builder"]).max()) / scale
            for key in ("ours", "plain")
        },
    }


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of how much longer theirs takes."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _tokenizer(folder: Path) -> None:
    """Some tokenizer: the builder wants one beside the model."""
    demo = Path(__file__).parent.parent / "models" / "demo"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo / name).read_bytes())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, help="Where the graphs are kept between runs.")
    parser.add_argument("--prepare", action="store_true", help="Make the graphs, measure nothing.")
    parser.add_argument("--out", type=Path, default=RESULTS / "onnx_export.json")
    args = parser.parse_args()
    import onnxruntime

    cases = [(shape, style) for shape in args.shapes for style in args.styles]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if args.prepare:
            for shape, style in cases:
                prepare(style, shape, work / shape / style)
            return
        found = [
            measure(style, shape, context, args.rounds, args.steps, work / shape / style)
            for shape, style in cases
            for context in args.context
        ]
    for item in found:
        print(json.dumps({k: v for k, v in item.items() if k != "ops"}))
    result = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "threads": torch.get_num_threads(),
        "models": found,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
