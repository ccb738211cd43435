"""A folder for onnxruntime-genai: the model, ``genai_config.json``, and the tokenizer's files.

genai binds past and present of a layer to one buffer where every attention of the graph is
GroupQueryAttention, and feeds presents back as pasts where one is not. Its generator needs caches
of one shape in all layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import ExportError
from .options import ExportOptions
from .program import Program
from .subject import Subject

# Model types whose decoders genai runs as any other; the type of a model that is not here is
# written as llama, whose inputs, outputs and caches are the ones of this export.
TYPES = frozenset(
    {
        "ernie4_5", "gemma", "gemma2", "granite", "internlm2", "llama", "mistral", "nemotron",
        "olmo", "phi", "phimoe", "qwen2", "qwen3", "smollm3",
    }
)  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def genai_config(subject: Any, options: ExportOptions, rows: int, shared: bool) -> dict[str, Any]:
    """What ``genai_config.json`` holds.

    Args:
        rows: the context length.
        shared: whether past and present of a layer may be one buffer.

    Raises:
        ExportError: layers have caches of different shapes.
    """
    config = subject.config
    start = 2 + subject.takes_positions
    caches = subject.example[start:]
    shapes = {(t.shape[1], t.shape[3]) for t in caches}
    if len(shapes) != 1:
        raise ExportError(
            f"target='genai': onnxruntime-genai wants one shape of cache, this model has "
            f"{sorted(shapes)} (heads, features); choose target='gqa' and drive the graph yourself"
        )
    heads, size = shapes.pop()
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if subject.takes_positions:
        inputs["position_ids"] = "position_ids"
    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    generation = getattr(subject.model, "generation_config", None)

    def token(name: str) -> Any:
        found = getattr(generation, name, None)
        return getattr(config, name, None) if found is None else found

    eos = token("eos_token_id")
    first_eos = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    pad = token("pad_token_id")
    provider_options: list[Any] = [{"cuda": {}}] if options.provider == "cuda" else []
    kind = str(getattr(config, "model_type", "llama"))
    return {
        "model": {
            "bos_token_id": _first(token("bos_token_id")),
            "context_length": rows,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "provider_options": provider_options,
                },
                "filename": "model.onnx",
                "head_size": int(size),
                "hidden_size": int(config.hidden_size),
                "inputs": {**inputs, **names},
                "outputs": outputs,
                "num_attention_heads": int(config.num_attention_heads),
                "num_hidden_layers": len(subject.layers),
                "num_key_value_heads": int(heads),
            },
            "eos_token_id": 0 if eos is None else eos,
            "pad_token_id": int(first_eos or 0) if pad is None else pad,
            "type": kind if kind in TYPES else "llama",
            "vocab_size": subject.vocabulary,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": bool(getattr(generation, "do_sample", False)),
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": rows,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shared,
            "repetition_penalty": _number(generation, "repetition_penalty", 1.0),
            "temperature": _number(generation, "temperature", 1.0),
            "top_k": int(_number(generation, "top_k", 50)),
            "top_p": _number(generation, "top_p", 1.0),
        },
    }


def write_folder(
    folder: Path,
    subject: Subject,
    options: ExportOptions,
    program: Program,
    rows: int,
    tokenizer: Any,
) -> list[tuple[str, str]]:
    """Write what is beside ``model.onnx``; the notes for the report.

    Raises:
        ExportError: genai cannot run such a model, or does not open the folder.
    """
    notes: list[tuple[str, str]] = []
    apart = [w for w, reason in program.fallbacks if "not GroupQueryAttention" in reason]
    if apart:
        notes.append(
            (
                "genai",
                f"{len(apart)} attentions are not GroupQueryAttention: no shared cache buffer",
            )
        )
    config = genai_config(subject, options, rows, shared=not apart)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=4) + "\n", "utf-8")
    source = _tokenizer_folder(subject, tokenizer)
    if source is None and tokenizer is None:
        notes.append(("genai", "no tokenizer files: the model names no folder; give tokenizer="))
    elif tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    elif source is not None:
        for name in TOKENIZER_FILES:
            file = source / name
            if file.is_file():
                (folder / name).write_bytes(file.read_bytes())
    if options.verify and options.provider == "cpu":
        notes += _opened(folder)
    return notes


def _tokenizer_folder(subject: Any, tokenizer: Any) -> Path | None:
    if isinstance(tokenizer, (str, Path)):
        folder = Path(tokenizer)
        if not folder.is_dir():
            raise ExportError(f"tokenizer={str(tokenizer)!r} is not a folder")
        return folder
    name = getattr(subject.model.config, "_name_or_path", "") or ""
    folder = Path(name)
    return folder if name and folder.is_dir() else None


def _opened(folder: Path) -> list[tuple[str, str]]:
    """Open the folder with onnxruntime-genai where that is installed."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        return [("genai", "onnxruntime-genai is not installed: the folder was not opened with it")]
    try:
        model = og.Model(str(folder))
    except Exception as error:
        raise ExportError(f"onnxruntime-genai cannot open the folder: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        return []
    try:
        og.Tokenizer(model)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0][:120]
        return [
            (
                "genai",
                f"onnxruntime-genai's own tokenizer cannot read this tokenizer.json ({text}); "
                "give its generator ids from the model's tokenizer",
            )
        ]
    return []


def _first(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return 0 if value is None else value


def _number(generation: Any, name: str, default: float) -> float:
    value = getattr(generation, name, None)
    return float(default if value is None else value)
