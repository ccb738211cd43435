"""The draft model against a plain reading of the algorithm, and against itself."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_cache import ContextCache
from dspark_compile.models.draft_config import DraftConfig, DraftError, default_taps
from tests.speculation.straight import Straight

VOCAB, WIDTH = 31, 24


def make(seed=0, **changes) -> DraftModel:
    """A small draft with random weights everywhere and its own vocabulary matrices."""
    values = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 36,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "mask_token_id": 30, "target_layer_ids": (0, 2), "num_target_layers": 5, "block_size": 5,
        "markov_rank": 6, "enable_confidence_head": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    } | changes  # fmt: skip
    draft = DraftModel(DraftConfig(**values))
    torch.manual_seed(seed)
    draft.embed_tokens = torch.nn.Embedding(VOCAB, WIDTH)
    draft.lm_head = torch.nn.Linear(WIDTH, draft.config.draft_vocab_size, bias=False)
    with torch.no_grad():
        for tensor in (
            *draft.parameters(),
            *(b for n, b in draft.named_buffers() if "scalar" in n),
        ):
            tensor.normal_(std=0.4)
            if tensor.ndim == 1:
                tensor.add_(1)
    return draft.eval()


def straight(draft: DraftModel) -> Straight:
    return Straight(
        draft.state_dict(), draft.config, draft.embed_tokens.weight.detach(),
        draft.lm_head.weight.detach(),
    )  # fmt: skip


GEMMA = {
    "family": "gemma4", "attention_scale": 1.0, "embed_scale": WIDTH**0.5,
    "hidden_act": "gelu_pytorch_tanh", "attention_k_eq_v": True, "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "rope_type": "proportional", "rope_theta": 1e3, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
GENERIC = {
    "family": "generic", "qk_norm": False, "attention_bias": True, "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh", "markov_head_type": "gated",
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5},
}  # fmt: skip
CASES = {
    "vanilla": {},
    "gated": {"markov_head_type": "gated"},
    "rnn": {"markov_head_type": "rnn"},
    "dflash": {"markov_rank": 0, "confidence_head_with_markov": False, "sample_from_anchor": False},
    "no confidence": {"enable_confidence_head": False},
    "confidence without markov": {"confidence_head_with_markov": False},
    "gemma4": GEMMA,
    "gemma4, rnn": GEMMA | {"attention_k_eq_v": False, "markov_head_type": "rnn"},
    "generic": GENERIC,
    "sliding": {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 4},
    "sliding, causal block": {
        "layer_types": ("full_attention", "sliding_attention"),
        "sliding_window": 3, "sliding_window_non_causal": False,
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "block"),
    [(case, 7) for case in CASES]
    + [(head, block) for head in ("vanilla", "gated", "rnn") for block in (4, 16)]
    + [
        pytest.param(case, block, marks=pytest.mark.slow)
        for case in list(CASES)[3:]
        for block in (4, 5, 10, 16)
    ],
)
def test_agrees_with_a_plain_reading(case, block):
    draft = make(block_size=block, **CASES[case])
    plain = straight(draft)
    lengths = [6, 1, 3]
    taps = torch.randn(3, max(lengths), 2 * WIDTH)
    anchors = torch.tensor([4, 9, 30])
    cache = draft.new_cache(3, 8 + block)
    draft.append(cache, taps, torch.tensor(lengths))
    tokens, logits, confidence = draft.propose(anchors, cache)
    hidden = draft.block(anchors, cache)
    assert cache.lengths.tolist() == lengths  # the block was cropped
    for row, length in enumerate(lengths):
        rows = plain.hidden(list(taps[row, :length].double()), int(anchors[row]), length)
        want, want_logits, want_confidence = plain.sequence(
            rows, int(anchors[row]), lambda u: int(u.argmax())
        )
        assert tokens[row].tolist() == want
        torch.testing.assert_close(hidden[row].double(), torch.stack(rows), atol=1e-5, rtol=1e-5)
        # Each stage to 1e-5: the logits of these rows, whose own rounding the head may multiply.
        _, given, _ = plain.sequence(
            list(hidden[row].double()), int(anchors[row]), lambda u: int(u.argmax())
        )
        torch.testing.assert_close(logits[row].double(), given, atol=1e-5, rtol=1e-5)
        close = 1e-5 * max(1.0, want_logits.abs().max().item())
        torch.testing.assert_close(logits[row].double(), want_logits, atol=close, rtol=1e-5)
        if confidence is None:
            assert want_confidence is None
        else:
            torch.testing.assert_close(
                confidence[row].double(), want_confidence, atol=1e-5, rtol=1e-5
            )
            assert confidence.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_context_grows_as_tokens_are_committed(case):
    draft = make(**CASES[case])
    taps = torch.randn(2, 9, 2 * WIDTH)
    once = draft.new_cache(2, 32)
    draft.append(once, taps, torch.tensor([9, 6]))
    piecewise = draft.new_cache(2, 32)
    draft.append(piecewise, taps[:, :4], torch.tensor([3, 4]))  # the fourth of row 0 is cropped
    anchor = torch.tensor([1, 2])
    draft.propose(anchor, piecewise)
    rest = torch.stack([taps[0, 3:8], torch.cat((taps[1, 4:6], taps[1, :3]))])
    draft.append(piecewise, rest, torch.tensor([5, 2]))
    draft.append(piecewise, taps[:, 8:], torch.tensor([1, 0]))
    assert piecewise.lengths.tolist() == [9, 6]
    for one, other in zip(draft.propose(anchor, once), draft.propose(anchor, piecewise)):
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_training_pass_equals_inference(case):
    """Many blocks at once see what single blocks see."""
    draft = make(**CASES[case])
    ids = torch.randint(0, 30, (2, 11))
    taps = torch.randn(2, 11, 2 * WIDTH)
    anchors = torch.tensor([[1, 4, 9], [0, 3, 10]])
    hidden = draft.blocks(ids, draft.context(taps), anchors)
    for row in range(2):
        for a, position in enumerate(anchors[row].tolist()):
            cache = draft.new_cache(1, 24)
            draft.append(cache, taps[row : row + 1], position)
            alone = draft.block(ids[row, position][None], cache)
            torch.testing.assert_close(hidden[row, a], alone[0], atol=1e-5, rtol=1e-5)
    previous = torch.randint(0, 30, hidden.shape[1:3])
    forced, confidence = draft.forced(hidden[0], previous)
    plain = straight(draft)
    for a in range(3):
        given = iter(previous[a, 1:].tolist() + [0])
        _, logits, confidences = plain.sequence(
            list(hidden[0, a].double()), int(previous[a, 0]), lambda u, given=given: next(given)
        )
        torch.testing.assert_close(forced[a].double(), logits, atol=1e-5, rtol=1e-5)
        if confidence is not None:
            torch.testing.assert_close(confidence[a].double(), confidences, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("case", ["vanilla", "gemma4", "sliding, causal block"])
def test_both_ways_of_attending_in_training(case):
    """A mask of all blocks by all blocks (GPUs), and blocks by themselves (CPUs)."""
    from dspark_compile.models.draft import _joined

    draft = make(**CASES[case])
    batch, blocks, rows, length = 2, 3, 5, 7
    attention = draft.layers[0].self_attn
    x, context = torch.randn(batch, blocks * rows, WIDTH), torch.randn(batch, length, WIDTH)
    at = torch.arange(blocks * rows).expand(batch, -1)
    query, own = attention.query(x, draft.rotary(at)), attention.key_value(x, draft.rotary(at))
    seen = attention.key_value(context, draft.rotary(at[:, :length]))
    before = torch.rand(batch, blocks * rows, length) > 0.5
    same = (torch.rand(batch, blocks, rows, rows) > 0.5) | torch.eye(rows, dtype=torch.bool)
    joined = [torch.cat(pair, dim=2) for pair in zip(seen, own)]
    torch.testing.assert_close(
        attention.attend_blocks(query, seen, own, before, same),
        attention.attend(query, *joined, _joined(before, same)[:, None]),
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_a_draft_vocabulary_is_spread_over_the_targets():
    draft = make(draft_vocab_size=7)
    ids = torch.tensor([3, 30, 5, 0, 11, 12, 29])
    draft.set_vocabulary(ids)
    cache = draft.new_cache(1, 16)
    draft.append(cache, torch.randn(1, 3, 2 * WIDTH), 3)
    tokens, logits, _ = draft.propose(torch.tensor([2]), cache)
    assert logits.shape == (1, 5, VOCAB)
    assert set(tokens[0].tolist()) <= set(ids.tolist())
    assert logits[0, :, [3, 30, 0]].isfinite().all()
    assert (logits[0, :, [1, 2, 4]] == -torch.inf).all()
    with pytest.raises(DraftError, match="7"):
        draft.set_vocabulary(ids[:6])
    with pytest.raises(DraftError, match="distinct"):
        draft.set_vocabulary(torch.tensor([3, 3, 5, 0, 11, 12, 29]))


def test_rounding_the_weights_leaves_the_angles():
    draft = make().to(torch.bfloat16)
    assert draft.rotary.inverse.dtype == torch.float32
    torch.testing.assert_close(draft.rotary.inverse, make().rotary.inverse)


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "default", "rope_theta": 1e6},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotation_is_transformers(rope):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    config = transformers.Qwen3Config(
        hidden_size=WIDTH, num_attention_heads=4, head_dim=16, rope_parameters=dict(rope),
        max_position_embeddings=256,
    )  # fmt: skip
    theirs = Qwen3RotaryEmbedding(config)
    draft = make(head_dim=16, rope_parameters=rope, max_position_embeddings=256)
    positions = torch.arange(0, 200, 7)[None]
    for own, other in zip(draft.rotary(positions), theirs(torch.zeros(1), positions)):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)


def test_configuration_errors_name_the_value():
    for changes, words in (
        ({"markov_head_type": "lstm"}, "markov_head_type='lstm'"),
        ({"target_layer_ids": (0, 4)}, "last layer is not allowed"),
        ({"target_layer_ids": (2, 1)}, "must increase"),
        ({"target_layer_ids": ()}, "empty"),
        ({"mask_token_id": VOCAB}, f"mask_token_id={VOCAB}"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 1, "sample_from_anchor": False}, "block_size=1"),
        ({"layer_types": ("sliding_attention",) * 2}, "sliding_window=None"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
        ({"draft_vocab_size": VOCAB + 1}, "draft_vocab_size"),
    ):
        with pytest.raises(DraftError, match=words):
            make(**changes)


def test_default_taps():
    assert default_taps(36) == (1, 9, 17, 25, 33)  # Qwen3-4B and 8B, as published
    assert default_taps(40) == (1, 10, 19, 28, 37)  # 14B
    assert default_taps(6, 3)[-1] == 4
    assert default_taps(2) == (0,)
    assert default_taps(1) == (-1,)


def test_cache_room():
    draft = make()
    cache = draft.new_cache(2, 8)
    draft.append(cache, torch.randn(2, 3, 2 * WIDTH), torch.tensor([3, 2]))
    before = [k[:, :, :2].clone() for k in cache.keys]
    cache.reserve(20)
    assert cache.capacity >= 20
    for old, new in zip(before, cache.keys):
        torch.testing.assert_close(old, new[:, :, :2])
    cache.crop(torch.tensor([1, 5]))
    assert cache.lengths.tolist() == [1, 2]
    cache.select(torch.tensor([1]))
    assert cache.lengths.tolist() == [2] and cache.keys[0].shape[0] == 1
    cache.reset()
    assert cache.lengths.tolist() == [0]
    with pytest.raises(DraftError, match="capacity=3"):
        ContextCache(draft.config, 1, 3)


@torch.no_grad()
def test_no_length_reaches_the_host():
    """The block and the append are one graph each, without a break: nothing depends on a value."""
    draft = make(markov_head_type="rnn")
    cache = draft.new_cache(2, 16)

    def one_round(taps, counts, anchor):
        draft.append(cache, taps, counts)
        return draft.propose(anchor, cache)

    inputs = (torch.randn(2, 4, 2 * WIDTH), torch.tensor([4, 2]), torch.tensor([1, 2]))
    want = one_round(*inputs)
    cache.reset()
    got = torch.compile(one_round, backend="eager", fullgraph=True)(*inputs)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)
