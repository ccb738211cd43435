"""Copies of key and value heads before attention go; what is no such copy stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dspark_compile  # noqa: F401 - registers the back end
from dspark_compile.diagnostics.state import last_report

OPTIONS = {"inner": "eager", "fallback": "error", "verify": True, "keep_programs": True}
B, H, G, M, N, D = 2, 2, 3, 5, 7, 8


def compiled(function, *args):
    """Compile, compare with eager, return the graph's report."""
    run = torch.compile(function, backend="dspark", options=OPTIONS)
    with torch.no_grad():
        want, got = function(*args), run(*args)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    return last_report().graphs[-1]


def copies(graph) -> int:
    """Copies of heads that are left."""
    program = graph.programs["after repeat_kv"]
    return sum(program.count(f"aten.{op}.default") for op in ("expand", "repeat", "index"))


def record(graph):
    return next(p for p in graph.passes if p.name == "repeat_kv")


def qkv(kv=H, heads=H * G, layout="bhsd"):
    q = torch.randn(B, heads, M, D)
    k, v = torch.randn(B, kv, N, D), torch.randn(B, kv, N, D)
    if layout == "bshd":
        k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
    return q, k, v


def repeat_kv(x, times):
    batch, heads, length, dim = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, dim)
    return x.reshape(batch, heads * times, length, dim)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def eagerly(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


@pytest.mark.parametrize("attention", [attend, eagerly])
@pytest.mark.parametrize("dynamic", [False, True])
def test_expanded_groups(attention, dynamic):
    args = qkv()
    if dynamic:
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)
    graph = compiled(lambda q, k, v: attention(q, repeat_kv(k, G), repeat_kv(v, G)), *args)
    assert record(graph).rewritten == 1
    assert copies(graph) == 0


def test_groups_with_a_mask():
    mask = torch.ones(M, N, dtype=torch.bool).tril(2)

    def f(q, k, v, mask):
        k, v = repeat_kv(k, G), repeat_kv(v, G)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graph = compiled(f, *qkv(), mask)
    assert record(graph).rewritten == 1


def test_copied_before_the_transpose():
    """[B, N, H, D]: the copy is along dimension 2, a permutation follows."""

    def repeat(x):
        batch, length, heads, dim = x.shape
        x = x[:, :, :, None, :].expand(batch, length, heads, G, dim)
        return x.reshape(batch, length, heads * G, dim).transpose(1, 2)

    graph = compiled(lambda q, k, v: attend(q, repeat(k), repeat(v)), *qkv(layout="bshd"))
    assert record(graph).rewritten == 1
    assert copies(graph) == 0


@pytest.mark.parametrize(
    "copy",
    [
        lambda x: x.expand(B, H * G, N, D),
        lambda x: x.repeat(1, H * G, 1, 1),
    ],
)
def test_a_single_head(copy):
    graph = compiled(lambda q, k, v: attend(q, copy(k), copy(v)), *qkv(kv=1))
    assert record(graph).rewritten == 1
    assert copies(graph) == 0


def test_repeat_interleave():
    def f(q, k, v):
        return attend(q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1))

    graph = compiled(f, *qkv())
    assert record(graph).rewritten == 1


TILES = {
    "repeat": lambda x: x.repeat(1, G, 1, 1),
    "cat": lambda x: torch.cat([x] * G, 1),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_tiled_heads(tile, dynamic):
    """``repeat`` of several heads gives query head h the head h % H, not h // G."""
    args, mask = qkv(heads=H * G * 2), torch.ones(M, N, dtype=torch.bool).tril(2)
    if dynamic:
        for x in args:
            torch._dynamo.mark_dynamic(x, 2)

    def f(q, k, v):
        k, v = TILES[tile](k), TILES[tile](v)
        return attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    def masked(q, k, v, mask):
        return F.scaled_dot_product_attention(q, TILES[tile](k), TILES[tile](v), attn_mask=mask)

    graph = compiled(lambda q, k, v: attend(q, TILES[tile](k), TILES[tile](v)), *qkv())
    assert record(graph).rewritten == 1
    assert copies(graph) == 0 and "aten.cat" not in graph.programs["after repeat_kv"]
    assert record(compiled(f, *args)).rewritten >= 1
    if not dynamic:
        assert record(compiled(masked, *qkv(), mask)).rewritten == 1


def test_tiled_heads_that_a_mask_tells_apart_stay():
    mask = torch.randn(1, H * G, M, N)

    def f(q, k, v, mask):
        k, v = (TILES["repeat"](x) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    graph = compiled(f, *qkv(), mask)
    assert record(graph).rewritten == 0
    assert copies(graph) == 2
    assert any("repeated as a whole" in r.condition for r in graph.rejections)


def test_heads_repeated_in_two_ways_stay():
    def f(q, k, v):
        return attend(q, TILES["repeat"](k), v.repeat_interleave(G, 1))

    assert record(compiled(f, *qkv())).rewritten == 0


def test_groups_tiled_by_a_view_stay():
    """The same with the new dimension before the heads."""

    def tile(x):
        x = x[:, None].expand(B, G, H, N, D)
        return x.reshape(B, G * H, N, D)

    graph = compiled(lambda q, k, v: attend(q, tile(k), tile(v)), *qkv())
    assert record(graph).rewritten == 0
    assert copies(graph) == 2


def test_only_one_of_the_two():
    q, k, _ = qkv()
    v = torch.randn(B, H * G, N, D)
    graph = compiled(lambda q, k, v: attend(q, repeat_kv(k, G), v), q, k, v)
    assert record(graph).rewritten == 0
    conditions = [r.condition for r in graph.rejections if r.pass_name == "repeat_kv"]
    assert conditions == ["only the key heads are repeated"]


def test_different_factors():
    q, k, _ = qkv()
    v = torch.randn(B, 1, N, D)

    def f(q, k, v):
        return attend(q, repeat_kv(k, G), v.expand(B, H * G, N, D))

    graph = compiled(f, q, k, v)
    conditions = [r.condition for r in graph.rejections if r.pass_name == "repeat_kv"]
    assert conditions == ["key and value heads are repeated by different factors"]


def test_an_unknown_number_of_heads():
    args = qkv()
    for x in args:
        torch._dynamo.mark_dynamic(x, 1)
    graph = compiled(lambda q, k, v: attend(q, repeat_kv(k, G), repeat_kv(v, G)), *args)
    assert record(graph).rewritten == 0


def test_batch_copies_are_none_of_its_business():
    q, k, v = qkv(kv=H * G)
    graph = compiled(
        lambda q, k, v: attend(q, k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)), q, k[:1], v[:1]
    )
    assert record(graph).rewritten == 0


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


@pytest.mark.parametrize("dynamic", [False, True])
def test_rotated_after_the_copy(dynamic):
    """Falcon: key heads are copied, norms and RoPE see all of them; the values are only copied."""

    def f(q, qkv, cos, sin, weight):
        parts = qkv.view(B, qkv.shape[1], H, 2, D)
        k, v = (
            part.expand(B, qkv.shape[1], H, G, D).flatten(2, 3).transpose(1, 2)
            for part in (parts[:, :, :, :1], parts[:, :, :, [-1]])
        )
        return attend(q, rotate(rms(k, weight), cos, sin), v)

    args = [torch.randn(B, H * G, M, D), torch.randn(B, N, H * 2 * D)]
    args += [torch.randn(1, 1, N, D) for _ in range(2)]
    if dynamic:
        for x, dim in zip(args, (2, 1, 2, 2), strict=True):
            torch._dynamo.mark_dynamic(x, dim)
    graph = compiled(f, *args, torch.randn(D))
    assert record(graph).rewritten == 1
    assert copies(graph) == 0
    assert [s.status for s in graph.sites if s.kind == "rope"] == ["raised"]


@pytest.mark.parametrize("what", ["cos", "weight"])
def test_heads_that_differ_after_the_copy_stay(what):
    """A table or a norm for each head of the copies makes them different heads."""
    table = torch.randn(1, H * G if what == "cos" else 1, N, D)
    weight = torch.randn(H * G, 1, D) if what == "weight" else torch.randn(D)

    def f(q, k, v, table, weight):
        return attend(q, rotate(rms(repeat_kv(k, G), weight), table, table), repeat_kv(v, G))

    graph = compiled(f, *qkv(), table, weight)
    assert record(graph).rewritten == 0
    conditions = [r.condition for r in graph.rejections if r.pass_name == "repeat_kv"]
    assert conditions == ["only the value heads are repeated"]
