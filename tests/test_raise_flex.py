"""flex_attention becomes ``dspark.attention``, its mask proved where it can be."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def compiled(function, *args, dynamic=None):
    run = torch.compile(function, backend="dspark", options=OPTIONS, dynamic=dynamic)
    with torch.no_grad():
        result = run(*args)
    return result, last_report().graphs[-1]


def raised(function, *args, n=1, tol=1e-5, dynamic=None):
    with torch.no_grad():
        want = function(*args)
    got, graph = compiled(function, *args, dynamic=dynamic)
    assert graph.ops.get("attention", 0) == n, (graph.ops, graph.rejections)
    assert len([s for s in graph.sites if s.kind == "attention"]) == n
    assert "higher_order" not in graph.programs["lowered"]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), atol=tol, rtol=tol)
    return graph


def rejected(function, *args, reason):
    with torch.no_grad():
        want = function(*args)
    got, graph = compiled(function, *args)
    assert "attention" not in graph.ops
    reasons = [r.condition for r in graph.rejections if r.kind == "attention"]
    assert any(reason in r for r in reasons), reasons
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return graph


def qkv(b=2, h=4, m=6, n=6, d=16, kv=None, dtype=torch.float32):
    kv = h if kv is None else kv
    q = torch.randn(b, h, m, d, dtype=dtype)
    return q, torch.randn(b, kv, n, d, dtype=dtype), torch.randn(b, kv, n, d, dtype=dtype)


def blocks(mask_mod, b=None, h=None, m=6, n=6):
    return create_block_mask(mask_mod, b, h, m, n, device="cpu")


def causal(b, h, q, k):
    return q >= k


def test_plain():
    raised(lambda q, k, v: flex_attention(q, k, v), *qkv())


def test_scale_and_groups():
    graph = raised(lambda q, k, v: flex_attention(q, k, v, scale=0.5, enable_gqa=True), *qkv(kv=2))
    assert "scale: 0.5" in graph.programs["lowered"]


def test_keys_shared_over_the_batch():
    q, _, _ = qkv()
    _, k, v = qkv(b=1)
    mask = blocks(causal, b=2)
    raised(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), q, k, v)


def test_causal_is_proved():
    mask = blocks(causal)
    graph = raised(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())
    assert "mask: k <= q" in graph.programs["lowered"]


def test_sliding_and_documents():
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]])

    def window(b, h, i, j):
        return i - j < 3

    def same(b, h, i, j):
        return document[b, i] == document[b, j]

    mask = blocks(and_masks(causal, window, same), b=2)
    graph = raised(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())
    assert any("causal" in note for note in graph.notes), graph.notes


def test_lengths_and_a_masked_row():
    lengths = torch.tensor([4, 0])
    mask = blocks(lambda b, h, i, j: (j < lengths[b]) & (j <= i), b=2)
    raised(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())


def test_head_dependent_mask():
    windows = torch.tensor([1, 2, 3, 6])
    mask = blocks(lambda b, h, i, j: (i - j).abs() < windows[h], h=4)
    raised(lambda q, k, v: flex_attention(q, k, v, block_mask=mask), *qkv())


def test_softcap():
    graph = raised(
        lambda q, k, v: flex_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)
        ),
        *qkv(),
    )
    assert "softcap: 3.0" in graph.programs["lowered"]


def test_alibi():
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    mask = blocks(causal)

    def f(q, k, v, slopes):
        def alibi(score, b, h, i, j):
            return score + slopes[h] * (j - i)

        return flex_attention(q, k, v, score_mod=alibi, block_mask=mask)

    raised(f, *qkv(), slopes)


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, i, j, t: s,
        lambda s, b, h, i, j, t: s * 0.5,
        lambda s, b, h, i, j, t: s + (j - i),
        lambda s, b, h, i, j, t: s - t[h, i, j],
        lambda s, b, h, i, j, t: s + t[h][i][j],
        lambda s, b, h, i, j, t: torch.tanh(s / 2) * 2 + t[h, i, j] + t[0, i, j],
        lambda s, b, h, i, j, t: torch.where(i >= j, s, -float("inf")),
        lambda s, b, h, i, j, t: torch.where(i >= j, s + t[h, i, j], -1e9),
        lambda s, b, h, i, j, t: torch.where((i - j).abs() > 2, float("-inf"), s),
    ],
)
def test_score_mods(mod):
    def f(q, k, v, t):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: mod(s, b, h, i, j, t))

    raised(f, *qkv(), torch.randn(4, 6, 6))


def test_score_mod_and_mask_mod():
    mask = blocks(causal)

    def f(q, k, v, t):
        mod = lambda s, b, h, i, j: s + t[h, i, j]  # noqa: E731
        return flex_attention(q, k, v, score_mod=mod, block_mask=mask)

    raised(f, *qkv(), torch.randn(4, 6, 6))


def test_low_precision():
    mask = blocks(causal)
    raised(
        lambda q, k, v: flex_attention(q, k, v, block_mask=mask),
        *qkv(dtype=torch.bfloat16),
        tol=2e-2,
    )


def test_several_calls_with_one_mask():
    mask = blocks(causal)

    def f(q, k, v):
        return flex_attention(flex_attention(q, k, v, block_mask=mask), k, v, block_mask=mask)

    raised(f, *qkv(), n=2)


def test_block_mask_from_inside():
    raised(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks(causal)), *qkv())


@pytest.mark.parametrize(
    "mod, reason",
    [
        (lambda s, b, h, i, j: s * s, "more than once|computes"),
        (lambda s, b, h, i, j: torch.exp(s), "exp"),
        (lambda s, b, h, i, j: torch.tanh(s + (j - i)), "after the bias"),
        (lambda s, b, h, i, j: torch.where(s > 0, s, -float("inf")), "more than once|depends"),
        (lambda s, b, h, i, j: torch.where(i > j, s, 0.0), "something else than -inf"),
    ],
)
def test_other_score_mods_are_left_alone(mod, reason):
    def f(q, k, v):
        return flex_attention(q, k, v, score_mod=mod)

    with torch.no_grad():
        want = f(*(args := qkv()))
    got, graph = compiled(f, *args)
    assert "attention" not in graph.ops
    conditions = [r.condition for r in graph.rejections if r.kind == "attention"]
    assert any(part in c for c in conditions for part in reason.split("|")), conditions
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_used_log_sum_exp():
    def f(q, k, v):
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out * lse.unsqueeze(-1)

    rejected(f, *qkv(), reason="log-sum-exp")


def test_unused_log_sum_exp():
    raised(lambda q, k, v: flex_attention(q, k, v, return_lse=True)[0], *qkv())


def test_a_block_mask_without_a_mask_mod():
    num = torch.ones(1, 1, 1, dtype=torch.int32)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32)

    def f(q, k, v, num, index):
        mask = BlockMask.from_kv_blocks(num, index, BLOCK_SIZE=128, seq_lengths=(6, 6))
        return flex_attention(q, k, v, block_mask=mask)

    _, graph = compiled(f, *qkv(), num, index)
    assert any("no mask_mod" in r.condition for r in graph.rejections), graph.rejections


def test_dynamic_shapes():
    def f(q, k, v):
        mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=mask)

    raised(f, *qkv(), dynamic=True)


def test_other_higher_order_calls_are_no_crash():
    def f(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    options = {**OPTIONS, "fallback": "inductor"}
    run = torch.compile(f, backend="dspark", options=options)
    x = torch.randn(4)
    with torch.no_grad():
        torch.testing.assert_close(run(x), f(x))


def test_vmap_in_the_users_code():
    def f(q, k, v):
        attend = torch.vmap(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v)
        return attend(q, k, v)

    with torch.no_grad():
        args = qkv()
        got, _ = compiled(f, *args)
        torch.testing.assert_close(got, f(*args), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_hugging_face(family):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, vocab_size=64, pad_token_id=0,
        **({"sliding_window": 4} if family != "llama" else {}),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="flex_attention"
    ).eval()
    ids = torch.randint(3, 64, (2, 7))
    run = torch.compile(model, backend="dspark", options=OPTIONS)
    # HF warns inside of the traced code; Dynamo would break the graph there.
    ignored = torch._dynamo.config.ignore_logging_functions | {warnings.warn}
    with torch.no_grad(), torch._dynamo.config.patch(ignore_logging_functions=ignored):
        got = run(ids, use_cache=False).logits
        model.set_attn_implementation("eager")
        want = model(ids, use_cache=False).logits
    graph = last_report().graphs[-1]
    assert graph.ops["attention"] == 2, graph.rejections
    assert any("causal" in note for note in graph.notes)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
