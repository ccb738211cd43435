"""Draft checkpoints: the DeepSpec layout key for key, other writers' spellings, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import dspark_compile
from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftConfig, DraftError, parse_config

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

V, D, R = 40, 16, 4


def layer_keys(i, gemma=False, values=True):
    names = [
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    if values:
        names.append("self_attn.v_proj")
    if gemma:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    keys = {f"layers.{i}.{n}.weight" for n in names}
    return keys | ({f"layers.{i}.layer_scalar"} if gemma else set())


DEEPSPEC = {
    "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "block_size": 7,
    "num_hidden_layers": 2, "mask_token_id": 39, "target_layer_ids": [1, 3],
    "num_target_layers": 6, "enable_confidence_head": True, "confidence_head_with_markov": True,
    "markov_rank": R, "markov_head_type": "vanilla", "num_anchors": 512,
    "layer_types": ["full_attention"] * 2, "tie_word_embeddings": False, "vocab_size": V,
    "hidden_size": D, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu",
    "attention_bias": False, "max_position_embeddings": 4096, "initializer_range": 0.02,
}  # fmt: skip


def tensors(config: DraftConfig, own=True) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, random, in the DeepSpec layout."""
    draft = DraftModel(config)
    found = {n: torch.randn_like(t) for n, t in draft.state_dict().items()}
    if own:
        found["embed_tokens.weight"] = torch.randn(config.vocab_size, config.hidden_size)
        found["lm_head.weight"] = torch.randn(config.draft_vocab_size, config.hidden_size)
    return found


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(
        {n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors"
    )
    return folder


def target(layers=6, width=D, vocab=V, **changes):
    config = transformers.Qwen3Config(
        vocab_size=vocab, hidden_size=width, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        **changes,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def run(draft):
    cache = draft.new_cache(1, 16)
    taps = torch.linspace(-1, 1, 4 * 2 * D).view(1, 4, 2 * D)
    with torch.no_grad():
        draft.append(cache, taps.to(draft.fc.weight.dtype), 4)
        return draft.propose(torch.tensor([5]), cache)[1]


def test_deepspec_layout_key_for_key(tmp_path):
    config = parse_config(DEEPSPEC)
    weights = tensors(config)
    assert set(weights) == (
        layer_keys(0) | layer_keys(1)
        | {"embed_tokens.weight", "lm_head.weight", "fc.weight", "hidden_norm.weight",
           "norm.weight", "markov_head.markov_w1.weight", "markov_head.markov_w2.weight",
           "confidence_head.proj.weight", "confidence_head.proj.bias"}
    )  # fmt: skip
    assert weights["fc.weight"].shape == (D, 2 * D)
    assert weights["markov_head.markov_w1.weight"].shape == (V, R)
    assert weights["markov_head.markov_w2.weight"].shape == (V, R)
    assert weights["confidence_head.proj.weight"].shape == (1, D + R)
    draft = DraftModel.from_pretrained(write(tmp_path / "a", DEEPSPEC, weights))
    assert draft.config.rope_parameters["rope_theta"] == 1000000
    assert draft.config.block_size == draft.config.num_drafted == 7
    for name, tensor in draft.state_dict().items():
        torch.testing.assert_close(tensor, weights[name])
    draft.save_pretrained(tmp_path / "b")
    again = safetensors.load_file(tmp_path / "b" / "model.safetensors")
    assert set(again) == set(weights)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3DSparkModel"]
    assert saved["num_anchors"] == 512  # unknown fields survive
    for name in ("markov_rank", "markov_head_type", "block_size", "target_layer_ids",
                 "mask_token_id", "num_target_layers", "enable_confidence_head",
                 "confidence_head_with_markov", "layer_types", "tie_word_embeddings"):  # fmt: skip
        assert saved[name] == DEEPSPEC[name], name
    other = DraftModel.from_pretrained(tmp_path / "b")
    torch.testing.assert_close(run(draft), run(other))


@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_deepspec_other_heads(tmp_path, head):
    data = DEEPSPEC | {"markov_head_type": head}
    weights = tensors(parse_config(data))
    name = {"gated": "gate_proj", "rnn": "joint_proj"}[head]
    shape = {"gated": (R, D + R), "rnn": (3 * R, 2 * R + D)}[head]
    assert weights[f"markov_head.{name}.weight"].shape == shape
    assert weights[f"markov_head.{name}.bias"].shape == shape[:1]
    draft = DraftModel.from_pretrained(write(tmp_path, data, weights))
    assert run(draft).isfinite().all()


def test_gemma4_layout(tmp_path):
    data = DEEPSPEC | {
        "architectures": ["Gemma4DSparkModel"], "model_type": "gemma4_text", "mask_token_id": 4,
        "hidden_activation": "gelu_pytorch_tanh", "global_head_dim": 12, "head_dim": 8,
        "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    data.pop("hidden_act")
    config = parse_config(data)
    assert (config.head_dim, config.num_key_value_heads, config.attention_scale) == (12, 1, 1.0)
    assert config.embed_scale == 4.0 and config.rope_parameters["rope_type"] == "proportional"
    weights = tensors(config)
    assert layer_keys(0, gemma=True, values=False) <= set(weights)
    assert "layers.0.self_attn.v_proj.weight" not in weights
    draft = DraftModel.from_pretrained(write(tmp_path / "a", data, weights))
    draft.save_pretrained(tmp_path / "b")
    again = DraftModel.from_pretrained(tmp_path / "b")
    assert again.config == draft.config or again.config.to_dict() == draft.config.to_dict()
    torch.testing.assert_close(run(draft), run(again))


def test_shared_vocabulary_and_calibration(tmp_path):
    config = parse_config(DEEPSPEC)
    draft = DraftModel.from_pretrained(write(tmp_path / "a", DEEPSPEC, tensors(config, own=False)))
    with pytest.raises(DraftError, match="bind"):
        run(draft)
    model = target()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    draft.bind(model)
    logits = run(draft)
    own = {n for n, _ in draft.named_parameters()}
    assert not any("embed" in n or "lm_head" in n for n in own)
    draft.to(torch.float64)  # the target's tensors are borrowed, not owned
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype
               for n, t in model.state_dict().items())  # fmt: skip
    draft.to(torch.float32)
    draft.calibration = {"temperatures": [1.5] * 7}
    draft.save_pretrained(tmp_path / "small")
    draft.save_pretrained(tmp_path / "whole", own_vocabulary=True)
    small = DraftModel.from_pretrained(tmp_path / "small", target=model)
    whole = DraftModel.from_pretrained(tmp_path / "whole")
    assert small.calibration == {"temperatures": [1.5] * 7}
    torch.testing.assert_close(run(small), logits)
    torch.testing.assert_close(run(whole), logits)
    assert small.embed_tokens is None and whole.embed_tokens is not None


@torch.no_grad()
def test_specforge_spelling(tmp_path):
    data = {k: v for k, v in DEEPSPEC.items() if k not in ("target_layer_ids", "mask_token_id")}
    data |= {
        "architectures": ["DSparkDraftModel"], "model_type": "dspark",
        "dflash_config": {"target_layer_ids": [1, 3], "mask_token_id": 39},
    }  # fmt: skip
    weights = tensors(parse_config(DEEPSPEC), own=False)
    odd = {f"model.{n}": t for n, t in weights.items()}
    draft = DraftModel.from_pretrained(write(tmp_path / "a", data, odd), target=target())
    assert draft.config.sample_from_anchor and draft.config.target_layer_ids == (1, 3)
    odd = {{"fc.weight": "context_proj.weight"}.get(n, n): t for n, t in weights.items()}
    assert DraftModel.from_pretrained(write(tmp_path / "b", data, odd)).fc.weight.equal(
        weights["fc.weight"]
    )


def test_dflash(tmp_path):
    data = {k: v for k, v in DEEPSPEC.items() if "markov" not in k and "confidence" not in k}
    data["architectures"] = ["DFlashDraftModel"]
    config = parse_config(data)
    assert config.markov_rank == 0 and not config.enable_confidence_head
    assert not config.sample_from_anchor and config.num_drafted == 6
    draft = DraftModel.from_pretrained(write(tmp_path, data, tensors(config)))
    assert run(draft).shape == (1, 6, V)
    # DeepSpec trains its own DFlash like DSpark: the anchor's row predicts.
    deepspec = parse_config(data | {"architectures": ["Qwen3DSparkModel"], "markov_rank": 0})
    assert deepspec.sample_from_anchor and deepspec.num_drafted == 7


@pytest.mark.parametrize("offsets", [True, False])
def test_speculators_spelling_and_a_draft_vocabulary(tmp_path, offsets):
    layer = {
        k: DEEPSPEC[k]
        for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
                  "rope_theta", "model_type", "layer_types")
    }  # fmt: skip
    data = {
        "architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark",
        "speculators_config": {"algorithm": "dspark"}, "transformer_layer_config": layer,
        "draft_vocab_size": 9, "block_size": 5, "mask_token_id": 39, "markov_rank": R,
        "aux_hidden_state_layer_ids": [2, 4], "sample_from_anchor": True,
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    config = parse_config(data)
    assert config.target_layer_ids == (1, 3) and config.draft_vocab_size == 9
    ids = torch.tensor([0, 2, 3, 7, 11, 12, 20, 33, 39])
    weights = tensors(config)
    weights.pop("embed_tokens.weight")
    weights["d2t"] = ids - torch.arange(9) if offsets else ids
    weights["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, ids, True)
    weights["verifier_norm.weight"] = torch.ones(D)
    assert weights["markov_head.markov_w1.weight"].shape == (V, R)
    assert weights["markov_head.markov_w2.weight"].shape == (9, R)
    draft = DraftModel.from_pretrained(write(tmp_path / "a", data, weights), target=target())
    assert draft.d2t.tolist() == ids.tolist()
    logits = run(draft)
    assert logits.shape == (1, 5, V) and logits.isfinite().sum() == 5 * 9
    draft.save_pretrained(tmp_path / "b")
    again = DraftModel.from_pretrained(tmp_path / "b", target=target())
    assert again.d2t.equal(draft.d2t)
    weights["d2t"] = torch.arange(9) * 5
    with pytest.raises(DraftError, match="d2t"):
        DraftModel.from_pretrained(write(tmp_path / "c", data, weights))
    del weights["d2t"], weights["t2d"]
    with pytest.raises(DraftError, match="no d2t"):
        DraftModel.from_pretrained(write(tmp_path / "d", data, weights))


def test_what_does_not_fit_a_target_is_said(tmp_path):
    folder = write(tmp_path, DEEPSPEC, tensors(parse_config(DEEPSPEC), own=False))
    for changes, words in (
        ({"vocab": 48}, "vocabulary: draft 40, target 48"),
        ({"width": 24}, "width of a tap: draft 16, target 24"),
        ({"layers": 8}, "layers: draft made for 6, target has 8"),
    ):
        with pytest.raises(DraftError, match=words):
            DraftModel.from_pretrained(folder, target=target(**changes))
    with pytest.raises(DraftError, match="get_input_embeddings"):
        DraftModel.from_pretrained(folder, target=torch.nn.Linear(2, 2))


def test_another_tokenizer_is_refused(tmp_path):
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {w: i for i, w in enumerate(self.words)}

    from dspark_compile.models.draft_bind import tokenizer_digest

    data = DEEPSPEC | {"target_tokenizer_sha256": tokenizer_digest(Words("a", "b"))}
    folder = write(tmp_path, data, tensors(parse_config(data), own=False))
    DraftModel.from_pretrained(folder, target=target(), tokenizer=Words("a", "b"))
    with pytest.raises(DraftError, match="tokenizer"):
        DraftModel.from_pretrained(folder, target=target(), tokenizer=Words("b", "a"))


def test_broken_checkpoints(tmp_path):
    weights = tensors(parse_config(DEEPSPEC))

    def load(name, config=DEEPSPEC, drop=(), **more):
        kept = {n: t for n, t in weights.items() if n not in drop} | more
        return DraftModel.from_pretrained(write(tmp_path / name, config, kept))

    with pytest.raises(DraftError, match=r"missing norm\.weight"):
        load("a", drop=["norm.weight"])
    with pytest.raises(DraftError, match=r"unknown odd\.weight"):
        load("b", **{"odd.weight": torch.ones(1)})
    with pytest.raises(DraftError, match=r"fc\.weight is \[16, 48\], config.json makes it"):
        load("c", **{"fc.weight": torch.ones(16, 48)})
    with pytest.raises(DraftError, match="target_layer_ids"):
        load("d", {k: v for k, v in DEEPSPEC.items() if k != "target_layer_ids"})
    with pytest.raises(DraftError, match="LlamaForCausalLM"):
        load("e", DEEPSPEC | {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(DraftError, match="dtype"):
        DraftModel.from_pretrained(write(tmp_path / "g", DEEPSPEC, weights), dtype="int8")
    pickled = tmp_path / "f"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(DEEPSPEC))
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(DraftError, match=r"pytorch_model\.bin may run code"):
        DraftModel.from_pretrained(pickled)
    with pytest.raises(DraftError, match="neither a folder nor an id"):
        DraftModel.from_pretrained(tmp_path / "nowhere")
    (pickled / "config.json").write_text("{")
    with pytest.raises(DraftError, match="not JSON"):
        DraftModel.from_pretrained(pickled)


def test_sharded_and_bfloat16(tmp_path):
    weights = tensors(parse_config(DEEPSPEC))
    (tmp_path / "config.json").write_text(json.dumps(DEEPSPEC))
    names = sorted(weights)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, keys in parts.items():
        safetensors.save_file({n: weights[n].bfloat16() for n in keys}, tmp_path / file)
    index = {"weight_map": {n: f for f, keys in parts.items() for n in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    draft = DraftModel.from_pretrained(tmp_path)
    assert draft.fc.weight.dtype == torch.bfloat16
    assert run(draft).dtype == torch.float32
    assert DraftModel.from_pretrained(tmp_path, dtype="float32").fc.weight.dtype == torch.float32


def test_the_package_exports_it():
    assert dspark_compile.DraftModel is DraftModel


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("block_size", "7", "block_size='7': must be a whole number"),
        ("block_size", True, "block_size=True: must be a whole number"),
        ("target_layer_ids", "1,3", "target_layer_ids='1,3': must be a list of whole numbers"),
        ("target_layer_ids", [1, "3"], "a list of whole numbers"),
        ("target_layer_ids", [], "target_layer_ids is empty"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps='1e-6': must be a number"),
        ("enable_confidence_head", 1, "enable_confidence_head=1: must be true or false"),
        ("layer_types", "full_attention", "a list of texts"),
        ("rope_theta", -1, "rope_theta=-1: must be a number above 0"),
        ("rope_parameters", {"rope_theta": "many"}, "rope_theta='many'"),
    ],
)
def test_fields_of_another_kind(field, value, words):
    with pytest.raises(DraftError, match=words):
        parse_config(DEEPSPEC | {field: value})


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path, text):
    folder = write(tmp_path / "a", DEEPSPEC, tensors(parse_config(DEEPSPEC)))
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DraftError, match="no weight_map"):
        DraftModel.from_pretrained(folder)


def test_what_is_no_configuration_and_no_dtype(tmp_path):
    weights = tensors(parse_config(DEEPSPEC))
    folder = write(tmp_path / "a", DEEPSPEC, weights)
    with pytest.raises(DraftError, match="dtype='half-way'"):
        DraftModel.from_pretrained(folder, dtype="half-way")
    (folder / "config.json").write_text("3")
    with pytest.raises(DraftError, match="no JSON object"):
        DraftModel.from_pretrained(folder)
    whole = weights | {"fc.weight": torch.ones(D, 2 * D, dtype=torch.int8)}
    with pytest.raises(DraftError, match=r"fc\.weight \(torch\.int8\)"):
        DraftModel.from_pretrained(write(tmp_path / "b", DEEPSPEC, whole))


HEADS = {
    "mask_token_id": 39, "target_layer_ids": [1, 3], "projector_type": "dspark", "markov_rank": R,
    "markov_head_type": "vanilla", "confidence_head_alpha": 1.0, "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}  # fmt: skip


def specforge(heads=HEADS, **changes):
    """A file as SpecForge's templates have it: what is a draft's own in ``dflash_config``."""
    known = {"num_anchors", *HEADS}
    data = {k: v for k, v in DEEPSPEC.items() if k not in known}
    return data | {"architectures": ["DSparkDraftModel"], "dflash_config": dict(heads)} | changes


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_specforge_heads_under_dflash_config(tmp_path, head):
    """The projector is named dspark, and all about the heads is nested too."""
    weights = tensors(parse_config(DEEPSPEC | {"markov_head_type": head}), own=False)
    # Early checkpoints have the heads in a container.
    early = {f"logit_head.{n}" if "_head." in n else n: t for n, t in weights.items()}
    data = specforge(HEADS | {"markov_head_type": head}, rope_scaling=None, sliding_window=None)
    draft = DraftModel.from_pretrained(write(tmp_path / "a", data, early), target=target())
    config = draft.config
    assert (config.markov_rank, config.markov_head_type) == (R, head)
    assert config.enable_confidence_head and config.confidence_head_with_markov
    assert config.sample_from_anchor and config.num_drafted == 7
    own = DEEPSPEC | {"markov_head_type": head}
    same = DraftModel.from_pretrained(write(tmp_path / "b", own, weights), target=target())
    same.borrowed = draft.borrowed
    assert run(draft).equal(run(same))


def test_specforge_defaults():
    """What its templates leave out: the confidence head's share in the loss, one tap a layer."""
    left_out = ("target_layer_ids", "enable_confidence_head")
    less = {k: v for k, v in HEADS.items() if k not in left_out}
    config = parse_config(specforge(less))
    assert config.enable_confidence_head and config.target_layer_ids == (1, 3)
    config = parse_config(specforge(less | {"confidence_head_alpha": 0.0}))
    assert not config.enable_confidence_head
    dflash = {"mask_token_id": 39, "target_layer_ids": [1, 3]}
    config = parse_config(specforge(dflash, architectures=["DFlashDraftModel"]))
    assert config.markov_rank == 0 and not config.sample_from_anchor
    shifted = dflash | {"shift_label": True}
    assert parse_config(specforge(shifted, architectures=["DFlashDraftModel"])).sample_from_anchor
    # The heads say what it is, whatever the class is called.
    assert parse_config(specforge(architectures=["DFlashDraftModel"])).sample_from_anchor


def test_which_blocks_are_causal(tmp_path):
    """As SGLang and vLLM read these files: a sliding layer's block is, unless the file says no."""
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}
    assert not parse_config(specforge(**sliding)).sliding_window_non_causal
    assert parse_config(specforge(is_causal=False, **sliding)).sliding_window_non_causal
    config = parse_config(specforge(HEADS | {"causal": False}, **sliding))
    assert config.sliding_window_non_causal
    for said in ({"is_causal": True}, {"heads": HEADS | {"causal": True}}):
        assert not parse_config(specforge(**said, **sliding)).sliding_window_non_causal
        with pytest.raises(DraftError, match="is_causal=True"):
            parse_config(specforge(**said))
    with pytest.raises(DraftError, match="use_swa"):
        parse_config(specforge(HEADS | {"use_swa": True}))
    # Both survive being saved.
    for said in (True, False):
        data = DEEPSPEC | sliding | {"sliding_window_non_causal": said}
        draft = DraftModel(parse_config(data))
        draft.save_pretrained(tmp_path)
        again = DraftModel.from_pretrained(tmp_path).config
        assert again.sliding_window_non_causal is said and again.sliding_window == 4


def test_a_window_that_no_layer_has():
    """Files copied from a target's (Gemma4) name its window beside layers of full attention."""
    assert parse_config(DEEPSPEC | {"sliding_window": 512}).sliding_window is None


def test_gemma4_sizes_layer_by_layer():
    """Where transformers writes the sizes of global layers, by its version."""
    gemma = DEEPSPEC | {"architectures": ["Gemma4DSparkModel"], "attention_k_eq_v": True}
    old = gemma | {"global_head_dim": 16, "num_global_key_value_heads": 1}
    sizes = {"head_dim": 16, "num_key_value_heads": 1}
    new = gemma | {"per_layer_config": {"0": sizes, "1": sizes}}
    for data in (old, new):
        config = parse_config(data)
        assert (config.head_dim, config.num_key_value_heads) == (16, 1)
        assert parse_config(config.to_dict()) == config


def test_tied_vocabulary(tmp_path):
    weights = tensors(parse_config(DEEPSPEC))
    del weights["lm_head.weight"]
    tied = write(tmp_path / "a", DEEPSPEC | {"tie_word_embeddings": True}, weights)
    draft = DraftModel.from_pretrained(tied, target=target())
    assert draft.lm_head.weight.equal(weights["embed_tokens.weight"])


def test_more_that_is_refused(tmp_path):
    weights = tensors(parse_config(DEEPSPEC))
    for name in ("num_attention_heads", "intermediate_size", "num_hidden_layers", "mask_token_id"):
        with pytest.raises(DraftError, match=f"no {name} in config.json"):
            parse_config({k: v for k, v in DEEPSPEC.items() if k != name})
    with pytest.raises(DraftError, match="low_freq_factor and high_freq_factor"):
        DraftModel(parse_config(DEEPSPEC | {"rope_scaling": {"type": "llama3", "factor": 8.0}}))
    with pytest.raises(DraftError, match="quantization_config"):
        parse_config(DEEPSPEC | {"quantization_config": {"quant_method": "fp8"}})
    low = {n: t.to(torch.float8_e4m3fn) for n, t in weights.items()}
    with pytest.raises(DraftError, match=r"torch\.float8_e4m3fn"):
        DraftModel.from_pretrained(write(tmp_path / "a", DEEPSPEC, low))
    folder = write(tmp_path / "b", DEEPSPEC, weights)
    with pytest.raises(DraftError, match="dtype='float8_e4m3fn'"):
        DraftModel.from_pretrained(folder, dtype="float8_e4m3fn")
    for text, words in (("{", "is not JSON"), ("[1]", "no JSON object")):
        (folder / "calibration.json").write_text(text)
        with pytest.raises(DraftError, match=words):
            DraftModel.from_pretrained(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    index = {"weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DraftError, match=r"names pytorch_model\.bin"):
        DraftModel.from_pretrained(folder)
    cut = DEEPSPEC | {"draft_vocab_size": 9}
    short = tensors(parse_config(cut)) | {"d2t": torch.arange(9), "t2d": torch.ones(9)}
    with pytest.raises(DraftError, match="t2d has 9 entries"):
        DraftModel.from_pretrained(write(tmp_path / "c", cut, short))
