"""Reading and writing draft checkpoints: safetensors and ``config.json``, nothing that runs code.

The names on disk are the DeepSpec layout's. What other writers call differently is renamed in
`rename`; every tensor of a file must be used and every parameter found, or it is an error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dspark_compile.models.checkpoint_file import align
from dspark_compile.models.draft_config import DraftError, parse_config

if TYPE_CHECKING:
    from dspark_compile.models.draft import DraftModel

CALIBRATION = "calibration.json"
_PREFIXES = ("module.", "draft_model.", "model.", "logit_head.")
_NAMES = {"context_proj.weight": "fc.weight", "hidden_states_norm.weight": "hidden_norm.weight"}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Copies of the target's tensors, and constants, that some writers keep in the file.
_IGNORED = ("verifier_lm_head.", "verifier_norm.", "rotary_emb.", "mask_token_id")


def load(
    cls: type[DraftModel],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    **hub: Any,
) -> DraftModel:
    """See `DraftModel.from_pretrained`."""
    folder = _folder(path, hub)
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise DraftError(f"{str(folder)!r} has no config.json: not a draft's folder") from None
    except ValueError as error:
        raise DraftError(f"{str(folder / 'config.json')!r} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise DraftError(f"{str(folder / 'config.json')!r} holds no fields: it is no JSON object")
    config = parse_config(data)
    tensors = {rename(name): t for name, t in _read(folder).items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(_IGNORED)}
    whole = config.draft_vocab_size == config.vocab_size
    if data.get("tie_word_embeddings") and whole and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    draft = cls(config)
    draft.declared = frozenset(data)
    draft.set_vocabulary(_vocabulary(tensors, config.vocab_size))
    for name, rows in (
        ("embed_tokens", config.vocab_size),
        ("lm_head", config.draft_vocab_size),
    ):
        if f"{name}.weight" in tensors:
            setattr(draft, name, _vocabulary_module(name, rows, config.hidden_size))
    if config.draft_vocab_size < config.vocab_size and draft.d2t is None:
        raise DraftError(
            f"draft_vocab_size={config.draft_vocab_size} is less than the vocabulary of "
            f"{config.vocab_size}, and the checkpoint has no d2t"
        )
    _fill(draft, tensors, folder, dtype)
    calibration = folder / CALIBRATION
    if calibration.is_file():
        try:
            draft.calibration = json.loads(calibration.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DraftError(
                f"{str(calibration)!r} is not JSON ({error}); without it the draft's confidences "
                "are taken as they are"
            ) from None
        if not isinstance(draft.calibration, dict):
            raise DraftError(f"{str(calibration)!r} holds no fields: it is no JSON object")
    return draft.to(device=device).eval()


def save(draft: DraftModel, path: str | os.PathLike[str], *, own_vocabulary: bool = False) -> None:
    """See `DraftModel.save_pretrained`."""
    from safetensors.torch import save_file

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        n: t.detach().cpu().contiguous() for n, t in draft.state_dict().items() if n != "d2t"
    }
    if draft.d2t is not None:
        # As EAGLE writes it: offsets from the draft's id to the target's.
        tensors["d2t"] = draft.d2t.cpu() - torch.arange(len(draft.d2t))
    if own_vocabulary:
        dtype = draft.fc.weight.dtype
        for name, module in (
            ("embed_tokens.weight", draft.borrowed.embedding),
            ("lm_head.weight", draft.borrowed.head),
        ):
            if name not in tensors and module is not None:
                tensors[name] = module.weight.detach().to("cpu", dtype).clone()
    data = draft.config.to_dict() | {"dtype": str(draft.fc.weight.dtype).removeprefix("torch.")}
    _write(folder / "config.json", json.dumps(data, indent=2, sort_keys=True) + "\n")
    temporary = folder / f".model-{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.chmod(temporary, 0o644)
    align(temporary)
    os.replace(temporary, folder / "model.safetensors")
    if draft.calibration is not None:
        _write(folder / CALIBRATION, json.dumps(draft.calibration, indent=1) + "\n")


def rename(name: str) -> str:
    """A tensor's name in the DeepSpec layout."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _NAMES.get(name, name)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _folder(path: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The folder itself, or where a checkpoint of the Hub was downloaded to."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DraftError(
            f"{name!r} is neither a folder nor an id on the Hugging Face Hub (owner/name)"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DraftError(
            "loading from the Hub needs huggingface_hub; pip install 'dspark-compile[hf]'"
        ) from error
    try:
        found = snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **hub)
    except Exception as error:
        raise DraftError(
            f"{name!r} is no folder here and was not got from the Hugging Face Hub: {error}"
        ) from error
    return Path(found)


def _read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise DraftError(
            "drafts are read with safetensors; pip install 'dspark-compile[hf]'"
        ) from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in found.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DraftError(
                f"{str(index)!r} has no weight_map of tensors to files: {error!r}"
            ) from error
        files = [folder / Path(name).name for name in names]
        other = [file.name for file in files if file.suffix != ".safetensors"]
        if other:
            raise DraftError(
                f"{str(index)!r} names {other[0]}, which is no safetensors; convert it first"
            )
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        hint = (
            f"; {pickles[0]} may run code when read, so convert it to safetensors first"
            if pickles
            else ""
        )
        raise DraftError(f"{str(folder)!r} has no safetensors{hint}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except Exception as error:
            raise DraftError(f"{str(file)!r} cannot be read: {error}") from error
    return tensors


def _vocabulary_module(name: str, rows: int, width: int) -> nn.Module:
    if name == "embed_tokens":
        return nn.Embedding(rows, width)
    return nn.Linear(width, rows, bias=False)


def _vocabulary(tensors: dict[str, Tensor], size: int) -> Tensor | None:
    """The draft's vocabulary as target ids, from ``d2t`` and ``t2d``; None where it is whole.

    ``d2t`` holds offsets (EAGLE, speculators) or, with some writers, the ids themselves; ``t2d``
    marks the tokens that are in. Where both readings are legal ``t2d`` decides.

    Raises:
        DraftError: neither reading fits.
    """
    d2t, t2d = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if d2t is None:
        return None if t2d is None else t2d.bool().nonzero().flatten()
    d2t = d2t.to(torch.long).flatten()
    readings = [d2t + torch.arange(len(d2t)), d2t]
    legal = [
        ids
        for ids in readings
        if len(ids.unique()) == len(ids) and ids.min() >= 0 and ids.max() < size
    ]
    if t2d is not None:
        inside = t2d.bool().flatten()
        if len(inside) != size:
            raise DraftError(f"t2d has {len(inside)} entries for a vocabulary of {size}")
        legal = [ids for ids in legal if int(inside.sum()) == len(ids) and bool(inside[ids].all())]
    if not legal:
        raise DraftError(
            "d2t maps the draft's vocabulary neither by offsets nor by ids to distinct tokens of "
            f"the target's {size}" + (" that t2d marks" if t2d is not None else "")
        )
    return legal[0]


def _fill(
    draft: DraftModel, tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | str | None
) -> None:
    """Load every parameter; complain about what is missing, left over or of another shape."""
    wanted = draft.state_dict()
    missing = [n for n in wanted if n not in tensors and not n.endswith("layer_scalar")]
    extra = [n for n in tensors if n not in wanted]
    shapes = [
        f"{n} is {list(tensors[n].shape)}, config.json makes it {list(t.shape)}"
        for n, t in wanted.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if extra:
        parts.append(f"unknown {_some(extra)}")
    if shapes:
        parts.append(f"of another shape: {_some(shapes, '; ')}")
    if parts:
        raise DraftError(f"the tensors in {str(folder)!r} do not fit: " + ", ".join(parts))
    odd = [f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype not in _DTYPES]
    if odd:
        raise DraftError(
            f"the tensors in {str(folder)!r} are not all bfloat16, float16, float32 or float64: "
            f"{_some(odd)}"
        )
    asked = dtype
    if dtype in (None, "auto"):
        dtype = tensors["fc.weight"].dtype
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    if dtype not in _DTYPES:
        raise DraftError(
            f"dtype={asked!r}: bfloat16, float16, float32 or float64 (or the name), or 'auto'"
        )
    draft.to(dtype)
    draft.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=False)


def _some(names: list[str], joint: str = ", ") -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return joint.join(names[:4]) + more
