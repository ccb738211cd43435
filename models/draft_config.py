"""What a draft is: its sizes, its heads, the layers of the target that it reads.

`DraftConfig` is the DeepSpec layout's ``config.json`` as a checked dataclass. `parse_config` reads
that layout and what other writers make of it:

=============  ================================================================================
DeepSpec       ``architectures: [Qwen3DSparkModel | Gemma4DSparkModel]``, fields at the top
SpecForge      ``DSparkDraftModel`` / ``DFlashDraftModel``, taps and heads under
               ``dflash_config``
speculators    ``speculators_model_type``, the layers' own fields under
               ``transformer_layer_config``, ``draft_vocab_size`` with ``d2t``/``t2d``
=============  ================================================================================

DSpark: "Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation",
arXiv 2607.05147. A draft of ``markov_rank`` 0 is DFlash's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("qwen3", "gemma4", "generic")
MARKOV_HEADS = ("vanilla", "gated", "rnn")
LAYER_TYPES = ("full_attention", "sliding_attention")
ARCHITECTURES = {
    "qwen3": "Qwen3DSparkModel",
    "gemma4": "Gemma4DSparkModel",
    "generic": "DSparkModel",
}


class DraftError(ValueError):
    """A draft checkpoint, or a draft beside a target, that does not fit; says what differs."""


@dataclass(frozen=True)
class DraftConfig:
    """Sizes and switches of a draft model.

    Attributes:
        vocab_size: the target's vocabulary: rows of the embedding and of the Markov head's W1.
        hidden_size: width of the draft's residual stream, the target's for published drafts.
        block_size: rows of a block, gamma; as trained, never changed afterwards.
        mask_token_id: fills the rows behind the anchor.
        target_layer_ids: taps; i is the output of the target's layer i (0-based), -1 its embedding.
        num_target_layers: layers of the target that the taps belong to.
        family: how a decoder layer is built: "qwen3", "gemma4", or "generic" (pre-norm, RMSNorm,
            rotary, gated MLP, with the switches below).
        markov_rank: r of the Markov head; 0 for none.
        sample_from_anchor: row k predicts the token after its position, so the anchor's row counts
            (DSpark). False: row k > 0 predicts the token at its position (DFlash as published).
        draft_vocab_size: rows of the draft's lm_head; less than ``vocab_size`` needs ``d2t``.
        target_hidden_size: width of one tap.
        sliding_window_non_causal: sliding layers see their whole block, like the others.
        attention_k_eq_v: values are the keys before norm and rotation (Gemma4's global layers).
        attention_scale: of the scores; None means head_dim ** -0.5.
        embed_scale: factor on embedded rows (Gemma).
        extra: fields of the file that have no meaning here; written back by ``save_pretrained``.

    Raises:
        DraftError: a value is out of range; the message names it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    family: str = "qwen3"
    block_size: int = 7
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = True
    sample_from_anchor: bool = True
    draft_vocab_size: int = 0
    target_hidden_size: int = 0
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    max_position_embeddings: int = 32768
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    sliding_window_non_causal: bool = True
    attention_k_eq_v: bool = False
    attention_scale: float | None = None
    embed_scale: float = 1.0
    final_logit_softcapping: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fill: dict[str, Any] = {
            "draft_vocab_size": self.draft_vocab_size or self.vocab_size,
            "target_hidden_size": self.target_hidden_size or self.hidden_size,
            "layer_types": tuple(self.layer_types) or ("full_attention",) * self.num_hidden_layers,
            "target_layer_ids": tuple(int(i) for i in self.target_layer_ids),
        }
        if "sliding_attention" not in fill["layer_types"]:
            # A draft's file often carries its target's: no layer of this one has a window.
            fill["sliding_window"] = None
        for name, value in fill.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
            *("num_attention_heads", "num_key_value_heads", "num_target_layers"),
        ):
            if getattr(self, name) < 1:
                raise DraftError(f"{name}={getattr(self, name)}: must be at least 1")
        least = 1 if self.sample_from_anchor else 2
        if self.block_size < least:
            raise DraftError(f"block_size={self.block_size}: must be at least {least}")
        _one_of("family", self.family, FAMILIES)
        _one_of("markov_head_type", self.markov_head_type, MARKOV_HEADS)
        for kind in self.layer_types:
            _one_of("layer_types", kind, LAYER_TYPES)
        if len(self.layer_types) != self.num_hidden_layers:
            raise DraftError(
                f"layer_types has {len(self.layer_types)} entries for "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if "sliding_attention" in self.layer_types and not (self.sliding_window or 0) > 0:
            raise DraftError(
                f"sliding_window={self.sliding_window}: sliding_attention layers need one above 0"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise DraftError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.markov_rank < 0:
            raise DraftError(f"markov_rank={self.markov_rank}: 0 (no Markov head) or more")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise DraftError(
                f"mask_token_id={self.mask_token_id} is outside of the vocabulary of "
                f"{self.vocab_size}"
            )
        if self.draft_vocab_size > self.vocab_size:
            raise DraftError(
                f"draft_vocab_size={self.draft_vocab_size} is more than "
                f"vocab_size={self.vocab_size}"
            )
        check_taps(self.target_layer_ids, self.num_target_layers)

    @property
    def num_drafted(self) -> int:
        """Tokens that a block proposes: gamma, or one less where the anchor's row has no say."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def confidence_width(self) -> int:
        """Inputs of the confidence head."""
        markov = self.markov_rank if self.confidence_head_with_markov else 0
        return self.hidden_size + markov

    def to_dict(self) -> dict[str, Any]:
        """``config.json`` in the DeepSpec layout; fields at their default are left out."""
        data: dict[str, Any] = dict(self.extra)
        data["architectures"] = [ARCHITECTURES[self.family]]
        always = {
            *("markov_rank", "enable_confidence_head", "block_size", "hidden_act", "rms_norm_eps"),
            *("rope_parameters", "max_position_embeddings", "attention_bias", "layer_types"),
        }
        if self.sliding_window is not None:
            # Writers differ in what they mean by leaving it out.
            always.add("sliding_window_non_causal")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in ("family", "extra"):
                continue
            if f.name == "draft_vocab_size" and value == self.vocab_size:
                continue
            if f.name == "target_hidden_size" and value == self.hidden_size:
                continue
            default = f.default is not dataclasses.MISSING and value == f.default
            if default and f.name not in always:
                continue
            data[f.name] = list(value) if isinstance(value, tuple) else value
        if self.markov_rank:
            data["markov_head_type"] = self.markov_head_type
        if self.enable_confidence_head:
            data["confidence_head_with_markov"] = self.confidence_head_with_markov
        if self.family == "gemma4":
            data["hidden_activation"] = data.pop("hidden_act")
            data["global_head_dim"] = self.head_dim
            data["num_global_key_value_heads"] = self.num_key_value_heads
            data.pop("embed_scale", None), data.pop("attention_scale", None)
        data["tie_word_embeddings"] = False
        return data


def check_taps(ids: tuple[int, ...], layers: int) -> None:
    """Taps are increasing, at least one, and none is the target's last layer.

    Raises:
        DraftError: they are not.
    """
    if not ids:
        raise DraftError("target_layer_ids is empty; a draft reads at least one layer")
    if list(ids) != sorted(set(ids)):
        raise DraftError(f"target_layer_ids={list(ids)} must increase")
    if ids[0] < -1 or ids[-1] >= max(layers - 1, 0):
        raise DraftError(
            f"target_layer_ids={list(ids)}: with {layers} target layers they lie in "
            f"-1 (the embedding) to {layers - 2}; the last layer is not allowed"
        )


def default_taps(layers: int, count: int = 5) -> tuple[int, ...]:
    """Taps spread evenly from layer 1 to the third last one, as published drafts have them.

    Small targets get what fits, ending one layer later: the last layers know most.
    """
    if layers < 2:
        return (-1,)
    first, last = (1, layers - 3) if layers >= 12 else (min(1, layers - 2), layers - 2)
    count = min(count, last - first + 1)
    if count == 1:
        return (last,)
    step = (last - first) / (count - 1)
    return tuple(round(first + i * step) for i in range(count))


def parse_config(data: Mapping[str, Any]) -> DraftConfig:
    """A `DraftConfig` from a ``config.json`` of any of the writers above.

    Raises:
        DraftError: it is not a draft's configuration, or a field is missing or out of range.
    """
    flat = dict(data)
    if flat.get("quantization_config"):
        raise DraftError(
            "quantization_config: drafts are read in bfloat16, float16 or float32; take the "
            "checkpoint that this one was quantised from"
        )
    names = flat.get("architectures") or [""]
    architecture = names if isinstance(names, str) else str(names[0])
    speculators = "transformer_layer_config" in flat or "speculators_model_type" in flat
    if speculators:
        flat = _from_speculators(flat)
    nested = _nested(flat)
    for name in _NESTED:
        if flat.get(name) is None and nested.get(name) is not None:
            flat[name] = nested[name]
    modes = {nested.get("attention_mode") or "gqa", *(nested.get("attention_modes") or ())}
    if modes - {"gqa", "mha"}:
        raise DraftError(
            f"dflash_config has attention modes {sorted(modes)}; this reads gqa and mha drafts"
        )
    projector = nested.get("projector_type") or flat.get("projector_type") or "dflash"
    if projector not in ("dflash", "dspark"):
        raise DraftError(
            f"projector_type={projector!r}: only dflash and dspark are read, no Domino or DFlash-2 "
            "correction heads"
        )
    family = _family(architecture, flat)
    published = architecture.startswith(("DFlash", "Qwen3DFlash")) and projector == "dflash"
    if flat.get("sample_from_anchor") is None:
        # DFlash as published predicts in place; DeepSpec trains its DFlash like DSpark.
        flat["sample_from_anchor"] = bool(nested.get("shift_label", not published))
    if not speculators and architecture not in ARCHITECTURES.values():
        _causality(flat, nested)
        if flat.get("enable_confidence_head") is None:
            # SpecForge: the head is there if it had a share in the loss.
            flat["enable_confidence_head"] = bool(nested.get("confidence_head_alpha"))
        if nested.get("markov_rank") and flat.get("confidence_head_with_markov") is None:
            flat["confidence_head_with_markov"] = False
        layers, count = flat.get("num_target_layers"), flat.get("num_hidden_layers")
        whole = isinstance(layers, int) and isinstance(count, int)
        if flat.get("target_layer_ids") is None and whole:
            flat["target_layer_ids"] = _published_taps(layers, count)  # type: ignore[arg-type]
    missing = [n for n in _NEEDED if flat.get(n) is None]
    if missing:
        raise DraftError(
            f"no {', '.join(missing)} in config.json (architectures: {architecture or 'none'}), "
            "without which it is no DSpark or DFlash draft"
        )
    _check_kinds(flat)
    return DraftConfig(**_fields(flat, family))


# What every file says.
_NEEDED = (
    *("target_layer_ids", "mask_token_id", "block_size", "hidden_size", "vocab_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads"),
)
# What SpecForge and others keep under ``dflash_config``.
_NESTED = (
    *("target_layer_ids", "mask_token_id", "block_size", "sample_from_anchor", "markov_rank"),
    *("markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
)


def _nested(flat: dict[str, Any]) -> Mapping[str, Any]:
    """Take the fields under ``dflash_config`` (or ``dspark_config``) out of a file."""
    found: dict[str, Any] = {}
    for name in ("dflash_config", "dspark_config"):
        part = flat.pop(name, None) or {}
        if not isinstance(part, Mapping):
            raise DraftError(f"{name}={part!r}: must be an object")
        found |= part
    if found.get("use_swa"):
        raise DraftError(
            "dflash_config has use_swa: windows are read from layer_types and sliding_window only"
        )
    return found


def _causality(flat: dict[str, Any], nested: Mapping[str, Any]) -> None:
    """Whether rows of a block see those behind them: SGLang's and vLLM's reading, which is that
    ``is_causal`` (or ``causal``) is of all layers, and without it sliding layers are causal."""
    said = [flat.pop("is_causal", None), nested.get("is_causal"), nested.get("causal")]
    causal = next((x for x in said if x is not None), None)
    kinds = flat.get("layer_types") or ["full_attention"]
    if causal and "full_attention" in kinds:
        raise DraftError(
            f"is_causal={causal!r}: layers of full attention see their whole block here; blocks "
            "that are causal are read in sliding layers only"
        )
    flat.setdefault("sliding_window_non_causal", causal is not None and not causal)


def _published_taps(layers: int, count: int) -> list[int]:
    """What DFlash's writers mean where a file has no taps: one a draft layer, evenly."""
    if count < 2:
        return [layers // 2]
    return [round(1 + i * (layers - 4) / (count - 1)) for i in range(count)]


_KINDS: dict[str, tuple[str, Any]] = {
    "int": ("a whole number", lambda x: _is_whole(x)),
    "float": ("a number", lambda x: _is_whole(x) or isinstance(x, float)),
    "bool": ("true or false", lambda x: isinstance(x, bool)),
    "str": ("text", lambda x: isinstance(x, str)),
    "tuple[int, ...]": (
        "a list of whole numbers", lambda x: isinstance(x, (list, tuple)) and all(map(_is_whole, x))
    ),
    "tuple[str, ...]": (
        "a list of texts",
        lambda x: isinstance(x, (list, tuple)) and all(isinstance(y, str) for y in x),
    ),
    "dict[str, Any]": ("an object", lambda x: isinstance(x, Mapping)),
}  # fmt: skip


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _check_kinds(flat: Mapping[str, Any]) -> None:
    """DraftError where a field of a file is of another kind than `DraftConfig`'s."""
    for f in dataclasses.fields(DraftConfig):
        value = flat.get(f.name)
        if f.name in ("family", "extra") or value is None:
            continue
        words, fits = _KINDS[str(f.type).removesuffix(" | None")]
        if not fits(value):
            raise DraftError(f"{f.name}={value!r}: must be {words}")
    theta = _rope(flat)["rope_theta"]
    if not isinstance(theta, (int, float)) or not theta > 0:
        raise DraftError(f"rope_theta={theta!r}: must be a number above 0")
    if not flat["target_layer_ids"]:
        check_taps((), 0)


def _family(architecture: str, data: Mapping[str, Any]) -> str:
    for family, name in ARCHITECTURES.items():
        if architecture == name:
            return family
    kind = str(data.get("model_type", ""))
    if "Gemma4" in architecture or kind.startswith("gemma4"):
        return "gemma4"
    known = (
        *("DSparkDraftModel", "DFlashDraftModel", "DSparkSpeculator", "DFlashSpeculator"),
        *("Qwen3DFlashModel", "Qwen3DFlashDraftModel"),
    )
    if architecture in known or (not architecture and "target_layer_ids" in data):
        # These writers build Qwen3 layers for whatever target.
        return "qwen3"
    raise DraftError(
        f"architectures={architecture!r} is no draft's; known are "
        f"{', '.join((*ARCHITECTURES.values(), *known))}"
    )


def _fields(flat: dict[str, Any], family: str) -> dict[str, Any]:
    """Keyword arguments of `DraftConfig` from a flat file, names of the families resolved."""
    heads = flat["num_attention_heads"]
    values: dict[str, Any] = {
        f.name: flat[f.name]
        for f in dataclasses.fields(DraftConfig)
        if f.name not in ("family", "extra") and flat.get(f.name) is not None
    }
    values["family"] = family
    values.setdefault("num_key_value_heads", heads)
    if flat.get("model_type") == "qwen3":
        values.setdefault("head_dim", 128)  # whatever the width, as Qwen3's own files mean it
    values.setdefault("head_dim", values["hidden_size"] // max(heads, 1))
    ids = values["target_layer_ids"]
    values.setdefault("num_target_layers", max(ids) + 2)
    values["rope_parameters"] = _rope(flat)
    if not values.get("markov_rank"):
        values["confidence_head_with_markov"] = False
    if family == "gemma4":
        values["hidden_act"] = flat.get("hidden_activation", "gelu_pytorch_tanh")
        # Newer transformers write the global layers' sizes layer by layer; a draft's are all alike.
        layers = flat.get("per_layer_config")
        first = layers.get("0") if isinstance(layers, Mapping) else None
        first = first if isinstance(first, Mapping) else {}
        width = flat.get("global_head_dim") or first.get("head_dim")
        values["head_dim"] = width or values["head_dim"]
        keys = flat.get("num_global_key_value_heads") or first.get("num_key_value_heads")
        if flat.get("attention_k_eq_v") and keys:
            values["num_key_value_heads"] = keys
        values["attention_scale"] = 1.0
        values["embed_scale"] = float(values["hidden_size"]) ** 0.5
    known = {f.name for f in dataclasses.fields(DraftConfig)} | {
        *("rope_theta", "rope_scaling", "architectures", "tie_word_embeddings", "dtype"),
        "torch_dtype",
        *("hidden_activation", "global_head_dim", "num_global_key_value_heads"),
        "per_layer_config",
    }
    values["extra"] = {k: v for k, v in flat.items() if k not in known}
    return values


def _rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, from wherever the version of transformers put them."""
    rope = dict(flat.get("rope_parameters") or {})
    if isinstance(rope.get("full_attention"), Mapping):
        rope = dict(rope["full_attention"])
    scaling = dict(flat.get("rope_scaling") or {})
    for name, value in scaling.items():
        rope.setdefault({"type": "rope_type"}.get(name, name), value)
    rope.setdefault("rope_theta", flat.get("rope_theta") or 10000.0)
    rope.setdefault("rope_type", "default")
    if flat.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", flat["partial_rotary_factor"])
    return rope


def _from_speculators(data: dict[str, Any]) -> dict[str, Any]:
    """The flat form of a speculators file."""
    kind = data.get("speculators_model_type", "")
    if kind not in ("dspark", "dflash"):
        raise DraftError(f"speculators_model_type={kind!r}: this reads dspark and dflash")
    layer = dict(data.get("transformer_layer_config") or {})
    flat = {k: v for k, v in layer.items() if k != "architectures"}
    flat |= {k: v for k, v in data.items() if k != "transformer_layer_config"}
    taps = data.get("aux_hidden_state_layer_ids")
    if taps is not None:
        # These count hidden states: 0 is the embedding, i + 1 the output of layer i.
        flat["target_layer_ids"] = [int(i) - 1 for i in taps]
    flat.setdefault("sample_from_anchor", kind == "dspark")
    flat.setdefault("sliding_window_non_causal", False)
    flat.setdefault("markov_rank", 256 if kind == "dspark" else 0)
    flat.setdefault("enable_confidence_head", kind == "dspark")
    flat["architectures"] = ["DSparkSpeculator"]
    return flat


def _one_of(name: str, value: Any, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise DraftError(f"{name}={value!r}: must be one of {', '.join(legal)}")
