"""Rotary embeddings, in the spellings that people use, become one dialect op."""

from __future__ import annotations

import pytest
import torch
from spellings import call, raised, rejected, run

B, H, S, D = 2, 3, 5, 8


def table(width=D, lead=(1, 1, S), dtype=torch.float32):
    angle = torch.randn(*lead, width)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def paired(lead=(1, 1, S), dtype=torch.float32):
    cos, sin = table(D // 2, lead, dtype)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def rotate_half(x):
    h = x.shape[-1] // 2
    return torch.cat((-x[..., h:], x[..., :h]), dim=-1)


def half_split(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def chunked(x, cos, sin):
    a, b = x.chunk(2, -1)
    return cos * x + sin * torch.cat([-b, a], -1)


def flat(x, cos, sin):
    a, b = torch.split(x, x.shape[-1] // 2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def flat_swapped(x, cos, sin):
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def unbound(x, cos, sin):
    a, b = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).unbind(-2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def pairs(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def repeated(x, cos, sin):
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).reshape(x.shape)
    return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)


def stacked(x, cos, sin):
    y = x.float().reshape(*x.shape[:-1], -1, 2)
    out = torch.stack((y[..., 0] * cos - y[..., 1] * sin, y[..., 1] * cos + y[..., 0] * sin), -1)
    return out.flatten(3).type_as(x)


def complex_(x, cos, sin):
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.complex(cos.float(), sin.float())).flatten(3).type_as(x)


FULL = [half_split, chunked, pairs]
HALF = [flat, flat_swapped, unbound, repeated, stacked, complex_]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("function", FULL + HALF, ids=lambda f: f.__name__)
def test_spellings(function, dtype):
    cos, sin = table(D if function in FULL else D // 2, dtype=dtype)
    graph = raised("rope", "rope", function, torch.randn(B, H, S, D).to(dtype), cos, sin)
    interleaved = function in (pairs, repeated, stacked, complex_)
    assert f"{D}, {interleaved}" in call(graph, "rope", "raise_rope")
    left = graph.programs["after raise_rope"]
    assert not any(op in left for op in ("aten.neg", "aten.cat", "aten.stack", "aten.mul"))


def test_sequence_before_heads():
    cos, sin = table(lead=(S, 1))
    raised("rope", "rope", half_split, torch.randn(B, S, H, D), cos, sin)


def test_tables_inside_the_graph():
    def f(x, position, frequency):
        angle = position[:, None].float() * frequency
        angle = torch.cat((angle, angle), -1)[None, None]
        return half_split(x, angle.cos() * 0.9, angle.sin() * 0.9)

    raised("rope", "rope", f, torch.randn(B, H, S, D), torch.arange(S), torch.rand(D // 2))


def test_shared_halves_are_taken_at_half_width():
    def f(x, cos, sin):
        return half_split(x, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))

    graph = raised("rope", "rope", f, torch.randn(B, H, S, D), *table(D // 2))
    assert "aten.cat" not in graph.programs["after raise_rope"]


def test_sliced_tables():
    def f(x, cos, sin):
        return flat(x, cos[..., : D // 2], sin[..., : D // 2])

    raised("rope", "rope", f, torch.randn(B, H, S, D), *paired())


def test_one_table_for_both():
    """GPT-J keeps sin and cos in one buffer."""

    def f(x, both):
        sin, cos = both.chunk(2, -1)
        return repeated(x, cos, sin)

    raised("rope", "rope", f, torch.randn(B, H, S, D), torch.randn(1, 1, S, D))


@pytest.mark.parametrize("function", [half_split, pairs], ids=lambda f: f.__name__)
def test_partial(function):
    def f(x, cos, sin):
        return torch.cat((function(x[..., :4], cos, sin), x[..., 4:]), -1)

    graph = raised("rope", "rope", f, torch.randn(B, H, S, D), *table(4))
    assert ", 4, " in call(graph, "rope", "raise_rope")
    assert "aten.cat" not in graph.programs["after raise_rope"]


def test_partial_at_the_end_rotates_the_slice():
    def f(x, cos, sin):
        return torch.cat((x[..., :4], half_split(x[..., 4:], cos, sin)), -1)

    graph = raised("rope", "rope", f, torch.randn(B, H, S, D), *table(4))
    assert "aten.cat" in graph.programs["after raise_rope"]


def test_half_split_out_of_pairs():
    """DeepSeek V3: pairs in, halves out."""

    def f(x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    raised("rope", "rope", f, torch.randn(B, 1, S, D), *table(D // 2))

    def g(x, cos, sin):
        y = x.view(B, 1, S, D // 2, 2).transpose(4, 3).reshape(B, 1, S, D)
        return half_split(y, cos, sin)

    torch._dynamo.reset()
    raised("rope", "rope", g, torch.randn(B, 1, S, D), *table())


@pytest.mark.parametrize("rows", [1, S])
def test_two_features_of_one_shared_head(rows):
    """DeepSeek V3's key at its smallest: ``[B, 1, 2]`` to ``[B, 1, 1, 2]`` splits no pairs."""

    def f(x, cos, sin):
        x = x.view(B, 1, rows, 2)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    raised("rope", "rope", f, torch.randn(B, rows, 2), *table(1, lead=(1, 1, rows)))


@pytest.mark.parametrize("function", [stacked, complex_], ids=lambda f: f.__name__)
def test_two_features_in_one_pair(function):
    raised("rope", "rope", function, torch.randn(B, H, S, 2), *table(1))


def test_clockwise_negates_sin():
    """A rotation the other way is a rotation, by the opposite angle."""

    def f(x, cos, sin):
        h = x.shape[-1] // 2
        return x * cos + torch.cat((x[..., h:], -x[..., :h]), -1) * sin

    graph = raised("rope", "rope", f, torch.randn(B, H, S, D), *table())
    assert graph.programs["after raise_rope"].count("aten.neg") == 1

    def g(x, cos, sin):
        return x * cos - rotate_half(x) * sin

    torch._dynamo.reset()
    raised("rope", "rope", g, torch.randn(B, H, S, D), *table())


def test_upcast_and_back():
    def f(q, cos, sin):
        return half_split(q.float(), cos, sin).to(q.dtype)

    graph = raised("rope", "rope", f, torch.randn(B, H, S, D).bfloat16(), *table())
    assert f"{D}, False, True, None" in call(graph, "rope", "raise_rope")


def test_wide_tables_widen_the_result():
    x = torch.randn(B, H, S, D).bfloat16()
    graph = raised("rope", "rope", half_split, x, *table())
    assert "torch.float32" in call(graph, "rope", "raise_rope")


def test_scaled_input_is_rotated_as_it_is():
    def f(x, cos, sin):
        y = x * 0.3
        return torch.cat((half_split(y[..., :4], cos, sin), y[..., 4:]), -1)

    raised("rope", "rope", f, torch.randn(B, H, S, D), *table(4))


def test_query_and_key():
    def f(q, k, cos, sin):
        return half_split(q, cos, sin), half_split(k, cos, sin)

    q, k = torch.randn(B, H, S, D), torch.randn(B, 1, S, D)
    raised("rope", "rope", f, q, k, *table(), n=2)


def test_dynamic_sequence():
    x, (cos, sin) = torch.randn(B, H, S, D), table()
    for tensor in (x, cos, sin):
        torch._dynamo.mark_dynamic(tensor, 2)
    raised("rope", "rope", half_split, x, cos, sin)


# -- never a wrong rotation -------------------------------------------------------------------


def wrong_sign(x, cos, sin):
    h = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., h:], -x[..., :h]), -1) * sin


def no_sign(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos[..., :4] + b * sin[..., :4], b * cos[..., :4] + a * sin[..., :4]), -1)


def halves_not_swapped(x, cos, sin):
    h = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., :h], x[..., h:]), -1) * sin


@pytest.mark.parametrize("function", [wrong_sign, no_sign], ids=lambda f: f.__name__)
def test_wrong_signs_are_not_raised(function):
    _, graph = run(function, torch.randn(B, H, S, D), *table())
    assert not graph.ops.get("rope")


def test_unswapped_halves():
    rejected("rope", "partner", halves_not_swapped, torch.randn(B, H, S, D), *table())


def test_wrong_axis():
    def f(x, cos, sin):
        return x * cos + torch.cat((-x[:, :, 2:], x[:, :, :2]), 2) * sin

    rejected("rope", "dimension 2", f, torch.randn(B, H, 4, D), *table(lead=(1, 1, 4)))


def test_two_tensors():
    def f(x, y, cos, sin):
        return x * cos + rotate_half(y) * sin

    rejected("rope", "share no tensor", f, torch.randn(B, H, S, D), torch.randn(B, H, S, D),
             *table())  # fmt: skip


def test_only_half_of_it():
    def f(x, sin):
        return rotate_half(x) * sin

    rejected("rope", "not combined", f, torch.randn(B, H, S, D), table()[1])


def test_permuted_tables():
    def f(x, cos, sin):
        return half_split(x, cos.flip(-1), sin)

    rejected("rope", "regular order", f, torch.randn(B, H, S, D), *table())
