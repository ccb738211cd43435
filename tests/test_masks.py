"""Proofs of masks: what is proved equals the mask itself, element by element; the rest is refused.

The oracle runs the traced graph on fresh inputs, reads the nodes that the proof names, and
compares `ops.predicate.evaluate` with the mask tensor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dspark_compile.ops.predicate import evaluate
from dspark_compile.passes.masks import (
    MaskProof,
    MaskProver,
    Unproved,
    prove,
    recognise_constant,
)

MIN = torch.finfo(torch.float32).min


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def trace(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], mode: str = "fake", functional: bool = True
) -> tuple[fx.GraphModule, fx.Node]:
    """The functional graph of ``f`` and the node of its result."""
    run = torch.func.functionalize(f) if functional else f
    module = make_fx(run, tracing_mode=mode)(*inputs)
    return module, next(n for n in module.graph.nodes if n.op == "output").args[0]


def four(shape: Sequence[Any]) -> tuple[Any, ...]:
    return (1,) * (4 - len(shape)) + tuple(shape)


def meaning(module: fx.GraphModule, node: fx.Node, proof: MaskProof, inputs: Sequence[Tensor]):
    """``(the mask as the graph computes it, allowed keys by the proof, bias or None)``."""
    recorder = _Recorder(module)
    recorder.run(*inputs)
    mask = recorder.values[node]
    values = [n if isinstance(n, int) else recorder.values[n] for n in proof.ints]
    allowed = evaluate(
        proof.predicate,
        [recorder.values[t] for t in proof.tensors],
        values,
        four(mask.shape),
        mask.device,
    ).expand(four(mask.shape))
    return mask, allowed, None if proof.bias is None else recorder.values[proof.bias]


def check(
    f: Callable[..., Tensor],
    *inputs: Tensor,
    others: Sequence[Sequence[Tensor]] = (),
    mode: str = "fake",
    functional: bool = True,
    score: Sequence[Any] | None = None,
) -> MaskProof:
    """Prove the mask that ``f`` returns and compare it on ``inputs`` and on ``others``."""
    module, node = trace(f, inputs, mode, functional)
    shape = score or four(node.meta["val"].shape)
    proof = MaskProver(module).prove(node, shape)
    assert isinstance(proof, MaskProof), f"{proof}\n{module.code}"
    module.graph.lint()
    module.recompile()
    for args in (inputs, *others):
        mask, allowed, bias = meaning(module, node, proof, args)
        if mask.dtype == torch.bool:
            torch.testing.assert_close(allowed.reshape(mask.shape), mask)
            assert proof.mask_value is None and proof.bias is None
            continue
        value = -math.inf if proof.mask_value is None else proof.mask_value
        zero = torch.zeros((), dtype=torch.float64)
        expected = torch.where(allowed, zero, value)
        got = four_dims(mask)
        if bias is not None:
            expected = expected + four_dims(bias).double()
        if proof.exact and bias is None:
            torch.testing.assert_close(got.double(), expected)
        else:
            torch.testing.assert_close(got[allowed].double(), expected[allowed])
            assert (got[~allowed].double() <= value * 0.999).all()
    return proof


def four_dims(x: Tensor) -> Tensor:
    return x.reshape(four(x.shape))


def refuse(f: Callable[..., Tensor], *inputs: Tensor, mode: str = "fake") -> Unproved:
    _, node = trace(f, inputs, mode)
    result = prove(node, four(node.meta["val"].shape))
    assert isinstance(result, Unproved), result
    return result


def padding(b: int, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return (torch.rand(b, n) > 0.3).to(dtype)


# --- Hugging Face mask functions --------------------------------------------------------------

hf = pytest.importorskip("transformers.masking_utils")


def sdpa(function: Callable, q: int, n: int, offset: Any = 0, mask: Tensor | None = None, **kw):
    return hf.sdpa_mask(
        batch_size=2,
        q_length=q,
        kv_length=n,
        q_offset=offset,
        mask_function=function,
        attention_mask=None if mask is None else mask.to(torch.bool),
        allow_is_causal_skip=False,
        **kw,
    )


def test_causal():
    proof = check(lambda x: sdpa(hf.causal_mask_function, 5, 5), torch.zeros(1))
    assert (proof.predicate, proof.tensors, proof.kind) == ("k <= q", (), "causal")


def test_causal_with_offset_and_padding():
    proof = check(
        lambda am: sdpa(hf.causal_mask_function, 3, 7, 4, am),
        padding(2, 7),
        others=[(padding(2, 7),)],
    )
    assert proof.predicate == "(k <= q + 4) & (t0[b, k] != 0)"
    assert proof.kind == "causal+padding"


def test_bool_padding_needs_no_comparison():
    proof = check(lambda am: sdpa(hf.causal_mask_function, 6, 6, 0, am), padding(2, 6, torch.bool))
    assert proof.predicate == "(k <= q) & t0[b, k]"


def test_padding_shorter_than_a_static_cache():
    proof = check(lambda am: sdpa(hf.causal_mask_function, 3, 9, 4, am), padding(2, 7))
    assert proof.kind == "causal+padding"
    assert proof.tensors[0].name.startswith("constant_pad_nd")


def test_sliding_window():
    f = hf.sliding_window_causal_mask_function(3)
    proof = check(lambda x: sdpa(f, 4, 9, 5), torch.zeros(1))
    assert (proof.predicate, proof.kind) == (
        "(k <= q + 5) & (k >= q + 3)",
        "causal+sliding(3)",
    )


def test_window_wider_than_the_context_is_causal():
    f = hf.sliding_window_causal_mask_function(512)
    assert check(lambda x: sdpa(f, 4, 9, 5), torch.zeros(1)).kind == "causal"


def test_bidirectional_window_and_full():
    f = hf.sliding_window_bidirectional_mask_function(2)
    proof = check(lambda x: sdpa(f, 7, 7), torch.zeros(1))
    assert proof.predicate == "(k <= q + 2) & (k >= q - 2)"
    proof = check(lambda x: sdpa(hf.bidirectional_mask_function, 7, 7), torch.zeros(1))
    assert (proof.predicate, proof.kind, proof.mask_value) == ("", "full", None)


def test_chunked():
    def inside(x: Tensor) -> Tensor:
        left = torch.zeros(2, dtype=torch.int64)
        return sdpa(hf.chunked_causal_mask_function(4, left), 9, 9)

    proof = check(inside, torch.zeros(1))
    assert proof.kind == "causal+chunked(4)"
    assert proof.predicate == "(k <= q) & ((k // 4) == (q // 4))"


def test_chunked_with_left_padding():
    def f(am: Tensor) -> Tensor:
        left = (am.cumsum(-1) == 0).sum(-1)
        return sdpa(hf.chunked_causal_mask_function(4, left), 9, 9, 0, am)

    am = torch.ones(2, 9, dtype=torch.int64)
    am[0, :3] = 0
    proof = check(f, am, others=[(torch.ones_like(am),)])
    assert proof.kind == "causal+chunked(4)+padding"


def test_packed():
    def f(position_ids: Tensor) -> Tensor:
        ids = hf.find_packed_sequence_indices(position_ids)
        f = hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(ids))
        return sdpa(f, 6, 6)

    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    proof = check(f, position_ids, functional=False)
    assert (proof.predicate, proof.kind) == (
        "(k <= q) & (t0[b, k] == t0[b, q])",
        "causal+packed",
    )
    assert proof.tensors[0].name.startswith("cumsum")


def test_packed_with_remapped_positions():
    def f(position_ids: Tensor) -> Tensor:
        ids = hf.find_packed_sequence_indices(position_ids)
        window = hf.sliding_window_causal_mask_function(2)
        return sdpa(hf.packed_sequence_compatibility_function(window, position_ids, ids), 6, 6)

    check(f, torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]), functional=False)


def test_blockwise():
    def f(ids: Tensor) -> Tensor:
        return sdpa(hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(ids)), 6, 6)

    proof = check(f, torch.tensor([[-1, 0, 0, -1, 1, 1], [-1, -1, -1, 2, 2, 2]]))
    assert "|" in proof.predicate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("use_vmap", [False, True])
def test_eager_mask(dtype: torch.dtype, use_vmap: bool):
    def f(am: Tensor) -> Tensor:
        return hf.eager_mask(
            2, 3, 7, 4, 0, hf.sliding_window_causal_mask_function(4),
            attention_mask=am.to(torch.bool), dtype=dtype, use_vmap=use_vmap,
        )  # fmt: skip

    proof = check(f, padding(2, 7), functional=not use_vmap)
    assert proof.predicate == "(k <= q + 4) & (k >= q + 1) & (t0[b, k] != 0)"
    assert proof.mask_value == torch.finfo(dtype).min


def test_static_cache_length_is_a_tensor():
    def f(length: Tensor) -> Tensor:
        return sdpa(hf.sliding_window_causal_mask_function(4), 2, 8, length)

    proof = check(f, torch.tensor(3), others=[(torch.tensor(5),)])
    assert (proof.predicate, proof.kind) == (
        "(k <= q + t0) & (k >= q + t0 - 3)",
        "causal+sliding(4)",
    )


def test_decode_step():
    proof = check(lambda x: sdpa(hf.causal_mask_function, 1, 8, 7), torch.zeros(1))
    assert proof.predicate == ""
    proof = check(
        lambda n: sdpa(hf.sliding_window_causal_mask_function(4), 1, 8, n), torch.tensor(6)
    )
    assert proof.predicate == "(k <= t0) & (k >= t0 - 3)"
    assert proof.kind == "causal+sliding(4)"


@pytest.mark.parametrize("name", ["causal", "sliding", "chunked"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_create_masks_of_a_model(name: str, attention: str):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, sliding_window=3,
        attention_chunk_size=3, attn_implementation=attention,
    )  # fmt: skip
    create = {
        "causal": hf.create_causal_mask,
        "sliding": hf.create_sliding_window_causal_mask,
        "chunked": hf.create_chunked_causal_mask,
    }[name]

    def f(embeds: Tensor, am: Tensor) -> Tensor:
        return create(config, inputs_embeds=embeds, attention_mask=am, past_key_values=None)

    proof = check(f, torch.randn(2, 7, 8), padding(2, 7), functional=False)
    assert proof.kind.startswith("causal") and proof.kind.endswith("padding")
    assert name == "causal" or f"{name}(3)" in proof.kind
    assert proof.mask_value == (MIN if attention == "eager" else None)


# --- symbolic shapes --------------------------------------------------------------------------


def test_symbolic_batch_and_context():
    def f(am: Tensor, x: Tensor) -> Tensor:
        n, m = am.shape[1], x.shape[1]
        return hf.sdpa_mask(
            am.shape[0], m, n, n - m, 0, hf.sliding_window_causal_mask_function(3),
            attention_mask=am.to(torch.bool), allow_is_causal_skip=False,
        )  # fmt: skip

    module, node = trace(f, (padding(2, 7), torch.randn(2, 3)), "symbolic")
    guards = len(node.meta["val"].shape[0].node.shape_env.guards)
    proof = MaskProver(module).prove(node, node.meta["val"].shape)
    assert isinstance(proof, MaskProof)
    assert len(node.meta["val"].shape[0].node.shape_env.guards) == guards
    assert proof.predicate == "(k <= q + n1 - n0) & (k >= q + n1 - n0 - 2) & (t0[b, k] != 0)"
    assert proof.kind == "causal+sliding(3)+padding"
    for b, m, n in ((2, 3, 7), (3, 4, 4), (4, 2, 11)):
        mask, allowed, _ = meaning(module, node, proof, (padding(b, n), torch.randn(b, m)))
        assert torch.equal(mask, allowed)


def test_symbolic_decode_is_full():
    """M = 1, N = past + 1: the causal bound is a tautology by sizes alone."""

    def f(past: Tensor) -> Tensor:
        n = past.shape[0]
        k, q = torch.arange(n + 1), torch.arange(1) + n
        return (k[None, :] <= q[:, None])[None, None]

    assert check(f, torch.zeros(5), mode="symbolic").predicate == ""


def test_symbolic_size_without_a_node_gets_one():
    def f(x: Tensor, y: Tensor) -> Tensor:
        return (torch.arange(6)[None, :] <= torch.arange(5)[:, None] + x.shape[0])[None, None]

    module, node = trace(f, (torch.zeros(3), torch.zeros(4)), "symbolic")
    for n in list(module.graph.nodes):
        if n.target is torch.ops.aten.sym_size.int and n.users:
            assert len(n.users) == 1
    proof = MaskProver(module).prove(node, node.meta["val"].shape)
    assert isinstance(proof, MaskProof) and len(proof.ints) == 1
    assert proof.predicate == "k <= q + n0"


def test_unrelated_sizes_are_refused():
    """A mask whose length cannot be proved to be the keys' is not assumed to be."""

    def f(x: Tensor, y: Tensor) -> Tensor:
        return torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril()

    module, node = trace(f, (torch.zeros(5), torch.zeros(6)), "symbolic")
    y = [n for n in module.graph.nodes if n.op == "placeholder"][1].meta["val"].shape[0]
    result = MaskProver(module).prove(node, (1, 1, y, y))
    assert isinstance(result, Unproved) and "broadcast" in result.reason


# --- older spellings --------------------------------------------------------------------------


def test_triu_of_full():
    def f(x: Tensor) -> Tensor:
        return torch.triu(torch.full((5, 5), MIN), 1)[None, None]

    proof = check(f, torch.zeros(1))
    assert (proof.predicate, proof.mask_value) == ("k <= q", MIN)


def test_triu_with_infinity():
    proof = check(lambda x: torch.full((4, 6), -math.inf).triu(3), torch.zeros(1))
    assert (proof.predicate, proof.mask_value) == ("k <= q + 2", None)


def test_transformers_4_causal_mask():
    """`_prepare_4d_causal_attention_mask_with_cache_position` of transformers 4.4x."""

    def f(am: Tensor, cache_position: Tensor) -> Tensor:
        m, n = 3, 8
        mask = torch.full((m, n), fill_value=MIN)
        mask = torch.triu(mask, diagonal=1)
        mask = mask * (torch.arange(n) > cache_position.reshape(-1, 1))
        mask = mask[None, None, :, :].expand(am.shape[0], 1, -1, -1)
        mask = mask.clone()
        length = am.shape[-1]
        pad = mask[:, :, :, :length] + am[:, None, None, :]
        pad = pad == 0
        mask[:, :, :, :length] = mask[:, :, :, :length].masked_fill(pad, MIN)
        return mask

    am = torch.ones(2, 6, dtype=torch.int64)
    am[0, :2] = 0
    proof = check(f, am, torch.tensor([3, 4, 5]), others=[(am, torch.tensor([0, 1, 2]))])
    assert proof.mask_value == MIN
    assert {t.name for t in proof.tensors} == {"am_1", "cache_position_1"}


def test_expanded_mask_of_bool():
    def f(am: Tensor) -> Tensor:
        inverted = 1.0 - am[:, None, None, :].to(torch.float32)
        pad = inverted.masked_fill(inverted.to(torch.bool), MIN)
        causal = torch.where(torch.ones(5, 5, dtype=torch.bool).tril(), 0.0, MIN)
        return pad.expand(2, 1, 5, 5).masked_fill(causal.bool(), MIN)

    proof = check(f, padding(2, 5, torch.bool))
    assert (proof.predicate, proof.kind) == ("(k <= q) & t0[b, k]", "causal+padding")


def test_one_minus_mask_times_min():
    def f(am: Tensor) -> Tensor:
        return (1.0 - am[:, None, None, :].float()) * MIN

    proof = check(f, padding(2, 5, torch.bool))
    assert (proof.predicate, proof.mask_value, proof.kind) == (
        "t0[b, 0, 0, k]",
        MIN,
        "padding",
    ) or (proof.predicate == "t0[b, k]")
    # Integers might be anything: (1 - 3) * min is not a mask.
    refuse(f, padding(2, 5))


@pytest.mark.parametrize("value", [MIN, -1e4])
def test_sum_of_masks(value: float):
    def f(am: Tensor) -> Tensor:
        causal = torch.full((5, 5), value).triu(1)
        return causal[None, None] + torch.where(am[:, None, None, :] != 0, 0.0, value)

    proof = check(f, padding(2, 5))
    assert (proof.kind, proof.mask_value, proof.exact) == (
        "causal+padding",
        torch.tensor(value).item(),
        False,
    )


def test_clamped_sum_is_exact():
    def f(am: Tensor) -> Tensor:
        causal = torch.full((5, 5), MIN).triu(1)
        return (causal + torch.where(am[:, None, None, :] != 0, 0.0, MIN)).clamp(min=MIN)

    assert check(f, padding(2, 5)).exact


def test_gpt2_buffer_is_data_unless_its_values_are_given():
    def f(bias: Tensor) -> Tensor:
        return bias[:, :, 2:5, :5]

    buffer = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    assert "data" in refuse(f, buffer).reason
    module, node = trace(f, (buffer,))
    place = next(iter(module.graph.nodes))
    proof = MaskProver(module, {place: buffer}).prove(node, (1, 1, 3, 5))
    assert isinstance(proof, MaskProof)
    assert (proof.predicate, proof.constants) == ("k <= q + 2", (place,))
    buffer[0, 0, 3, 7] = True
    assert isinstance(MaskProver(module, {place: buffer}).prove(node, (1, 1, 3, 5)), Unproved)


def test_recognise_constant():
    ones = torch.ones(6, 6)
    assert recognise_constant(ones.tril()) == "k <= q"
    assert recognise_constant(ones.tril(-1)[None, None].bool()) == "k <= q - 1"
    assert recognise_constant(ones.triu()) == "k >= q"
    assert recognise_constant(ones.tril().triu(-2)) == "(k <= q) & (k >= q - 2)"
    assert recognise_constant(ones) == ""
    assert recognise_constant(ones.tril() * 2) is None
    assert recognise_constant(torch.rand(6, 6) > 0.5) is None
    assert recognise_constant(torch.ones(6)) is None


def test_buffer_slices_by_shape():
    """A tril made in the graph and sliced to (past, past + m), as GPT-2 does."""

    def f(x: Tensor) -> Tensor:
        buffer = torch.ones(16, 16, dtype=torch.bool).tril().view(1, 1, 16, 16)
        k = x.shape[0] + 3
        return buffer[:, :, k - 3 : k, :k]

    proof = check(f, torch.zeros(4), mode="symbolic")
    assert proof.predicate == "k <= q + n0"


def alibi(heads: int, n: int) -> Tensor:
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(heads)])
    return slopes[:, None, None] * torch.arange(n)[None, None, :]


@pytest.mark.parametrize("order", [0, 1])
def test_alibi_stays_a_bias(order: int):
    def f(x: Tensor) -> Tensor:
        a, mask = alibi(3, 5)[None], torch.full((5, 5), MIN).triu(1)
        return a + mask if order else mask + a

    proof = check(f, torch.zeros(1))
    assert (proof.predicate, proof.mask_value, proof.kind) == ("k <= q", MIN, "causal+bias")
    assert proof.bias is not None and proof.bias.name.startswith("unsqueeze")


def test_masked_alibi_and_two_masks():
    def f(am: Tensor) -> Tensor:
        a = alibi(3, 5)[None].masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        return a + torch.where(am[:, None, None, :] != 0, 0.0, -math.inf)

    proof = check(f, padding(2, 5))
    assert (proof.kind, proof.mask_value) == ("causal+padding+bias", None)


def test_alibi_alone_is_no_mask():
    assert isinstance(refuse(lambda x: alibi(3, 5)[None] * x, torch.ones(1)), Unproved)


def test_cat_of_masks():
    """A prefix that all may see, before a causal block."""

    def f(am: Tensor) -> Tensor:
        causal = torch.ones(4, 4, dtype=torch.bool).tril() & am[:, None, None, :]
        prefix = torch.ones(2, 1, 4, 3, dtype=torch.bool)
        return torch.cat([prefix, causal], -1)

    proof = check(f, padding(2, 4, torch.bool))
    assert "min(" in proof.predicate or "max(" in proof.predicate  # reads stay in range


def test_padded_full_mask():
    def f(am: Tensor) -> Tensor:
        causal = torch.ones(4, 4, dtype=torch.bool).tril() & am[:, None, None, :]
        return torch.nn.functional.pad(causal, (0, 3), value=False)

    check(f, padding(2, 4, torch.bool))


def test_position_tensors():
    def f(positions: Tensor) -> Tensor:
        return (torch.arange(8)[None, None, :] <= positions[:, :, None])[:, None]

    proof = check(f, torch.tensor([[2, 3, 4], [5, 6, 7]]))
    assert (proof.predicate, proof.kind) == ("k <= t0[b, q]", "causal")


def test_data_indices_make_the_result_a_leaf():
    """Indices read from a tensor may be negative: the gathered tensor is the leaf."""

    def f(table: Tensor, places: Tensor) -> Tensor:
        return (table[places][None, :] > torch.arange(3)[:, None])[None, None]

    proof = check(f, torch.tensor([5, 0, 2]), torch.tensor([-1, 0, 1, -2]))
    assert proof.tensors[0].name.startswith("index")


def test_narrow_integers_do_not_wrap():
    def f(ids: Tensor) -> Tensor:
        wide = ids.to(torch.int64)
        return (wide[:, None, :] - wide[:, :, None] > -3)[:, None]

    check(f, torch.randint(0, 255, (2, 5), dtype=torch.uint8))
    # Here the graph itself wraps; the difference is data.
    refuse(
        lambda ids: (ids[:, None, :] - ids[:, :, None] > 3)[:, None],
        torch.randint(0, 255, (2, 5), dtype=torch.uint8),
    )


def test_float_positions_are_followed_only_where_exact():
    def f(x: Tensor) -> Tensor:
        p = torch.arange(300).to(x.dtype)
        return (p[None, :] <= p[:, None])[None, None]

    check(f, torch.zeros(1))
    reason = refuse(f, torch.zeros(1, dtype=torch.bfloat16)).reason
    assert "rounded" in reason


# --- what is not proved -----------------------------------------------------------------------


def test_data_dependent_mask_is_refused():
    result = refuse(lambda x: (x @ x.transpose(-1, -2) > 0)[:, None], torch.randn(2, 5, 4))
    assert result.node.name.startswith("bmm") and "query and key" in result.reason


def test_mask_given_as_an_input_is_refused():
    result = refuse(lambda m: m & torch.ones(5, 5, dtype=torch.bool).tril(), padding(5, 5).bool())
    assert result.node.op == "placeholder"


def test_reduction_is_a_leaf_only_when_small():
    def f(x: Tensor) -> Tensor:
        full = (x[:, :, None, :] > x[:, None, :, :]).any(-1)
        return full[:, None]

    assert refuse(f, torch.randn(2, 5, 4)).node.name.startswith("any")
    proof = check(
        lambda x: (x > 0).any(-1)[:, None, None, :].expand(2, 1, 5, 5), torch.randn(2, 5, 4)
    )
    assert proof.kind == "padding"


def test_values_written_before_the_use_are_refused():
    def f(length: Tensor) -> Tensor:
        mask = (torch.arange(6)[None, :] <= torch.arange(2)[:, None] + length)[None, None]
        length.add_(1)
        return mask

    module = make_fx(f, tracing_mode="fake")(torch.tensor(2))
    node = next(n for n in module.graph.nodes if n.op == "output").args[0]
    result = prove(node, (1, 1, 2, 6))
    assert isinstance(result, Unproved) and "written" in result.reason


def test_odd_values_are_refused():
    refuse(lambda x: torch.ones(5, 5).tril() * 3, torch.zeros(1))
    refuse(lambda x: torch.ones(5, 5).triu(1) * -math.inf, torch.zeros(1))  # 0 * inf is nan
    refuse(lambda x: torch.ones(5, 5, dtype=torch.int64).tril(), torch.zeros(1))


# --- the prover -------------------------------------------------------------------------------


def test_equal_masks_print_alike():
    spellings = [
        lambda x: torch.ones(6, 6, dtype=torch.bool).tril(),
        lambda x: torch.arange(6)[None, :] <= torch.arange(6)[:, None],
        lambda x: ~(torch.arange(6)[None, :] > torch.arange(6)[:, None]),
        lambda x: torch.arange(6)[:, None] + 1 > torch.arange(6)[None, :],
        lambda x: torch.full((6, 6), 1.0).triu(1) == 0,
        lambda x: torch.rsub(torch.arange(6)[None, :], 2 * torch.arange(6)[:, None], alpha=2) >= 0,
        lambda x: (torch.arange(6)[:, None] - torch.arange(6)[None, :]).clamp(min=-1) >= 0,
    ]
    assert {check(f, torch.zeros(1)).predicate for f in spellings} == {"k <= q"}


def test_proofs_are_shared_and_fast():
    def f(am: Tensor) -> Tensor:
        return sdpa(hf.sliding_window_causal_mask_function(4), 9, 9, 0, am)

    module, node = trace(f, (padding(2, 9),))
    MaskProver(module).prove(node, (2, 1, 9, 9))  # imports and caches
    prover = MaskProver(module)
    start = time.perf_counter()
    proof = prover.prove(node, (2, 1, 9, 9))
    assert time.perf_counter() - start < 1  # about 10 ms; far from a limit on a busy machine
    assert prover.prove(node, (2, 1, 9, 9)) is proof
    # Broadcast over heads: another score shape, the same text.
    wide = prover.prove(node, (2, 4, 9, 9))
    assert isinstance(wide, MaskProof) and wide.predicate == proof.predicate


def test_a_proof_is_made_again_when_its_nodes_are_gone():
    module, node = trace(lambda am: sdpa(hf.causal_mask_function, 6, 6, 0, am), (padding(2, 6),))
    prover = MaskProver(module)
    proof = prover.prove(node, (2, 1, 6, 6))
    assert isinstance(proof, MaskProof)
    (old,) = proof.tensors
    with module.graph.inserting_after(old):
        new = module.graph.placeholder("renamed")
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(new)
    module.graph.erase_node(old)
    again = prover.prove(node, (2, 1, 6, 6))
    assert isinstance(again, MaskProof) and again.tensors == (new,)


# --- random programs --------------------------------------------------------------------------

B, M, N = 2, 4, 6
SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def integers(draw: Any, env: dict[str, Tensor], depth: int) -> Tensor:
    kind = draw(st.integers(0, 9 if depth else 5))
    if kind == 0:
        return torch.arange(N)
    if kind in (1, 2):
        return (torch.arange(M) + draw(st.integers(-2, 4)))[:, None]
    if kind == 3:
        return env["ids"][:, None, :]
    if kind == 4:
        return env["positions"][:, None]
    if kind == 5:
        return env["length"]
    a, b = integers(draw, env, depth - 1), integers(draw, env, depth - 1)
    if kind == 6:
        return a + b
    if kind == 7:
        return a - b
    if kind == 8:
        c = draw(st.integers(1, 3))
        return draw(st.sampled_from([a * c, a // c, a % c, -a, a.abs()]))
    return draw(st.sampled_from([torch.minimum, torch.maximum]))(a, b)


def booleans(draw: Any, env: dict[str, Tensor], depth: int) -> Tensor:
    kind = draw(st.integers(0, 9 if depth else 3))
    if kind <= 1:
        op = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]))
        a, b = integers(draw, env, 2), integers(draw, env, 2)
        return getattr(torch, op)(a, b)
    if kind == 2:
        return env["pad"][:, None, :]
    if kind == 3:
        d = draw(st.integers(-2, 3))
        ones = torch.ones(M, N, dtype=torch.bool)
        return draw(st.sampled_from([ones.tril(d), ones.triu(d)]))
    a, b = booleans(draw, env, depth - 1), booleans(draw, env, depth - 1)
    if kind == 4:
        return ~a
    if kind == 5:
        return torch.where(a, b, booleans(draw, env, depth - 1))
    if kind == 6:
        return a ^ b
    return a & b if kind != 9 else a | b


def full_extent(x: Tensor) -> Tensor:
    return x.expand(B, M, N)[:, None]


@SETTINGS
@given(st.data())
def test_random_programs(data: st.DataObject):
    """Whatever is proved is right, and programs of these ops are all proved."""
    inputs = (
        torch.randint(-2, 7, (B, N)), torch.randint(0, 6, (M,)), torch.tensor(2),
        torch.rand(B, N) > 0.3,
    )  # fmt: skip
    others = (
        torch.randint(-2, 7, (B, N)), torch.randint(0, 6, (M,)), torch.tensor(4),
        torch.rand(B, N) > 0.3,
    )  # fmt: skip

    def f(ids: Tensor, positions: Tensor, length: Tensor, pad: Tensor) -> Tensor:
        env = {"ids": ids, "positions": positions, "length": length, "pad": pad}
        return full_extent(booleans(data.draw, env, 2))

    check(f, *inputs, others=[others])


@SETTINGS
@given(st.data())
def test_random_views(data: st.DataObject):
    """Views, slices and scatters move indices as torch does."""

    def f(pad: Tensor) -> Tensor:
        rows, columns = data.draw(st.integers(M, 6)), data.draw(st.integers(N, 8))
        x = torch.arange(columns)[None, :] <= torch.arange(rows)[:, None] + 1
        for _ in range(data.draw(st.integers(0, 3))):
            kind = data.draw(st.integers(0, 6))
            if kind == 0:
                x = x.t().contiguous().t()
            elif kind == 1:
                x = x.reshape(-1).view(1, rows * columns).reshape(rows, columns)
            elif kind == 2:
                x = x[None].expand(3, rows, columns)[1]
            elif kind == 3:
                x = x.index_select(0, torch.arange(rows - 1, -1, -1)).clone()
                x[:, 1:3] = ~x[:, 1:3]
            elif kind == 4:
                x = torch.cat([x[:, 2:], x[:, :2]], 1)
            elif kind == 5:
                x = x[torch.arange(rows)[:, None], torch.arange(columns)]
            else:
                x = torch.nn.functional.pad(x[1:, :-2], (1, 1, 0, 1), value=True)
        start = data.draw(st.integers(0, columns - N))
        x = x[-M:, start : start + N]
        return x[None, None] & pad[:, None, None, :]

    check(f, torch.rand(B, N) > 0.3)


@SETTINGS
@given(st.data(), st.sampled_from([MIN, -math.inf, -1e4]))
def test_random_additive(data: st.DataObject, value: float):
    def f(pad: Tensor, bias: Tensor) -> Tensor:
        env = {"ids": pad.long(), "positions": torch.arange(M), "length": torch.tensor(2),
               "pad": pad}  # fmt: skip
        total = torch.zeros(())
        for _ in range(data.draw(st.integers(1, 2))):
            allowed = full_extent(booleans(data.draw, env, 1))
            style = data.draw(st.integers(0, 2))
            if style == 0:
                term = torch.where(allowed, 0.0, value)
            elif style == 1:
                term = torch.zeros(B, 1, M, N).masked_fill(~allowed, value)
            elif math.isinf(value):
                term = torch.full((B, 1, M, N), value).masked_fill(allowed, 0)
            else:
                term = (1 - allowed.float()) * value
            total = total + term
        return total + bias if data.draw(st.booleans()) else total

    check(f, torch.rand(B, N) > 0.3, torch.randn(B, 1, 1, N))
