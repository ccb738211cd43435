"""Attention layers of torch's own are raised like any others, and equal what torch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dspark_compile
from dspark_compile.passes.torch_layers import _attend

B, S, E, H = 2, 9, 32, 4
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S)
PADDED = torch.zeros(B, S, dtype=torch.bool)
PADDED[0, -3:] = True


def _graph():
    return dspark_compile.last_report().graphs[-1]


def _compiled(function, *args):
    compiled = torch.compile(function, backend="dspark", options={"inner": "eager"})
    with torch.no_grad():
        want = function(*args)
        torch.testing.assert_close(compiled(*args), want, rtol=1e-4, atol=2e-5)
    return _graph()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "bias"])
def test_multihead_attention(batch_first, mask):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, H, batch_first=batch_first).eval()
    masks = {"none": None, "causal": CAUSAL, "boolean": CAUSAL != 0, "bias": torch.randn(S, S)}
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    given = masks[mask]

    def attend(x):
        if mask == "bias" and batch_first:  # torch's fast way takes a bias for a boolean
            return layer(x, x, x + 0, attn_mask=given, need_weights=False)[0]
        return layer(x, x, x, attn_mask=given, need_weights=False)[0]

    assert _compiled(attend, x).ops["attention"] == 1


def test_multihead_attention_to_something_else_and_with_weights():
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(E, H, batch_first=True, kdim=24, vdim=24, bias=False).eval()
    x, other = torch.randn(B, S, E), torch.randn(B, 5, 24)
    graph = _compiled(lambda x, y: layer(x, y, y, need_weights=False)[0], x, other)
    assert graph.ops["attention"] == 1
    plain = nn.MultiheadAttention(E, H, batch_first=True).eval()
    _compiled(lambda x: plain(x, x, x, attn_mask=CAUSAL), x)  # output and weights


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layers(norm_first, activation):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(
        E, H, 64, activation=activation, norm_first=norm_first, batch_first=True
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(B, S, E)
    for given in (
        {},
        {"mask": CAUSAL, "is_causal": True},
        {"mask": CAUSAL != 0, "is_causal": True},
        {"src_key_padding_mask": PADDED},
        {"mask": CAUSAL != 0, "src_key_padding_mask": PADDED, "is_causal": True},
    ):
        torch._dynamo.reset()
        graph = _compiled(lambda x, given=given: encoder(x, **given), x)
        assert graph.ops["attention"] == 2, (given, graph.ops, graph.rejections)


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_masks_of_every_kind(kind):
    torch.manual_seed(3)
    x = torch.randn(B, S, E)
    weights = [torch.randn(3 * E, E), torch.randn(3 * E), torch.randn(E, E), torch.randn(E)]
    weights = [w / 5 for w in weights]
    mask = {0: CAUSAL != 0, 1: PADDED, 2: (CAUSAL != 0).expand(B, H, S, S) | PADDED[:, None, None]}
    with torch.no_grad():
        want, _ = torch._native_multi_head_attention(
            x, x, x, E, H, *weights, mask[kind], need_weights=False, mask_type=kind
        )
    torch.testing.assert_close(_attend(x, H, *weights, mask[kind], kind), want)
