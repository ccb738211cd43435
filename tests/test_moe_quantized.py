"""Experts whose weights torchao has quantised: right answers, decode and prompt, in any batch.

torchao's int8 tensors of three dimensions know neither transposition nor grouped products, so that
Hugging Face's stacks run with ``experts_implementation="eager"`` alone, with torchao and here; its
int4 takes matrices only, that is experts in a ``ModuleList``. gpt-oss's transposed stacks, which
meet rows in ``mm``, do not run quantised in eager mode either.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dspark_compile
from tests.test_expert_loops import EXPERTS, HIDDEN, Expert, K
from tests.zoo import families

torchao = pytest.importorskip("torchao.quantization")
OPTIONS = {"inner": "eager", "verify": True}
NATIVE = {"kernels": "auto", "verify": True}


def ops():
    """The dialect's ops of the graphs compiled last, of which none may have been handed on."""
    graphs = dspark_compile.last_report().graphs
    assert all(graph.ops for graph in graphs)
    return {name for graph in graphs for name in graph.ops}


def quantise(model, bits):
    """Stacks of experts in int8 by rows; matrices of experts in int8, or int4 in groups of 32."""
    if bits == 4:
        from torchao.quantization.granularity import PerGroup

        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        torchao.quantize_(model.experts, config)
        return model
    stacks = [n for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3]
    if not stacks:
        torchao.quantize_(model.experts, torchao.Int8WeightOnlyConfig())
        return model
    config = torchao.FqnToConfig(dict.fromkeys(stacks, torchao.Int8WeightOnlyConfig(version=2)))
    torchao.quantize_(model, config, filter_fn=None)
    return model


def close(got, want):
    assert torch.isfinite(got).all()
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-5


class Mixture(nn.Module):
    """A loop over modules as users write it, with the rows of experts that are hit, or sorted."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        for expert in self.experts:
            expert.w2 = nn.Linear(64, HIDDEN, bias=False)
            expert.w1, expert.w3 = (nn.Linear(HIDDEN, 64, bias=False) for _ in range(2))

    def forward(self, x):
        rows = x.flatten(0, 1)
        weight, choice = torch.topk(self.gate(rows).softmax(-1), K)
        out = torch.zeros_like(rows)
        if self.style == "sorted":
            order = choice.flatten().argsort(stable=True)
            sizes = torch.bincount(choice.flatten(), minlength=EXPERTS).tolist()
            parts = rows[order // K].split(sizes)
            parts = [e(part) for e, part in zip(self.experts, parts, strict=True)]
            out.index_add_(0, order // K, torch.cat(parts) * weight.flatten()[order, None])
            return out.view_as(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(choice == e)
            if self.style == "hit" and len(token) == 0:
                continue
            out.index_add_(0, token, expert(rows[token]) * weight[token, slot, None])
        return out.view_as(x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "style", ["all", *(pytest.param(s, marks=pytest.mark.slow) for s in ("hit", "sorted"))]
)
def test_modules(style, bits):
    torch.manual_seed(0)
    model = quantise(Mixture(style).eval(), bits)
    call = torch.compile(model, backend="dspark", options=OPTIONS)
    with torch.no_grad():
        for shape in ((1, 7), (3, 5), (1, 1), (3, 1)):
            x = torch.randn(*shape, HIDDEN)
            close(call(x), model(x))


@pytest.mark.parametrize(
    ("style", "bits"),
    [("all", 8), *(pytest.param(*p, marks=pytest.mark.slow) for p in (("hit", 4), ("sorted", 8)))],
)
def test_modules_are_read_quantised(style, bits):
    torch.manual_seed(0)
    model = quantise(Mixture(style).eval(), bits)
    call = torch.compile(model, backend="dspark", options=NATIVE)
    with torch.no_grad():
        for shape in ((1, 7), (3, 1)):
            x = torch.randn(*shape, HIDDEN)
            close(call(x), model(x))
    assert f"moe_experts_int{bits}" in ops()
    assert not {"moe_experts", "dequantize_weight", f"gated_mlp_int{bits}"} & ops()


class Stacked(nn.Module):
    """A router and experts that are slices of quantised stacks, their gates and ups of one."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.q = nn.ParameterList(
            nn.Parameter(torch.randint(-127, 128, shape, dtype=torch.int8), requires_grad=False)
            for shape in ((EXPERTS, 128, HIDDEN), (EXPERTS, HIDDEN, 64))
        )
        self.scale = nn.ParameterList(
            nn.Parameter((torch.rand(*q.shape[:2], 1) + 0.5) / 500) for q in self.q
        )

    def weights(self):
        return [q.float() * s for q, s in zip(self.q, self.scale, strict=True)]

    def forward(self, x):
        weight, choice = torch.topk(self.gate(x).softmax(-1), K)
        both, down = self.weights()
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            gate, up = nn.functional.linear(x, both[e]).chunk(2, -1)
            part = nn.functional.linear(nn.functional.silu(gate) * up, down[e])
            out = out + part * (weight * (choice == e)).sum(-1, keepdim=True)
        return out


class ScaledByColumn(Stacked):
    """One scale for each input: no kernel's."""

    def weights(self):
        both, down = super().weights()
        return [both * both.new_ones(1, 1, HIDDEN), down]


@pytest.mark.parametrize("model", [Stacked, ScaledByColumn])
def test_stacks(model):
    torch.manual_seed(0)
    model = model().eval()
    call = torch.compile(model, backend="dspark", options=NATIVE)
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        close(call(x), model(x))
    if type(model) is Stacked:
        assert "moe_experts_int8" in ops()
        return
    assert "moe_experts" in ops()
    graphs = dspark_compile.last_report().graphs
    reasons = [r for g in graphs for r in g.rejections if r.pass_name == "fuse_quantized_experts"]
    assert [r.hint for r in reasons] == ["all experts are dequantised at every call"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_whole_models_are_read_quantised(family, batch):
    """A prompt and two steps over its cache, native ones."""
    torch.manual_seed(0)
    model = families.build(family)
    model.set_experts_implementation("eager")
    quantise(model, 8)
    call = torch.compile(model, backend="dspark", options=NATIVE)
    ids = families.tokens(family, 6, batch=batch)
    with torch.no_grad():
        got = call(ids, use_cache=True)
        close(got.logits, model(ids).logits)
        for _ in range(2):
            new = got.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), 1)
            got = call(new, past_key_values=got.past_key_values)
            close(got.logits, model(ids).logits[:, -1:])
    assert "moe_experts_int8" in ops() and "moe_experts" not in ops()


@pytest.mark.slow
def test_a_decode_step_is_one_native_call():
    from tests.cpp.test_moe import decode, moe_model

    model = moe_model(torch.float32)
    model.set_experts_implementation("eager")
    quantise(model, 8)
    call = torch.compile(model, backend="dspark", dynamic=False, fullgraph=True, options=NATIVE)
    ids = torch.randint(0, 199, (3, 9))
    close(decode(model, call, ids, 3), decode(model, model, ids, 3))
    graph = dspark_compile.last_report().graphs[-1]
    assert any("one native call" in note for note in graph.notes), graph.notes
    assert graph.ops["moe_experts_int8"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_whole_models(family, batch):
    """A prompt and two steps over its cache."""
    torch.manual_seed(0)
    model = families.build(family)
    model.set_experts_implementation("eager")
    quantise(model, 8)
    call = torch.compile(model, backend="dspark", options=OPTIONS)
    ids = families.tokens(family, 6, batch=batch)
    with torch.no_grad():
        got = call(ids, use_cache=True)
        ops = [name for graph in dspark_compile.last_report().graphs for name in graph.ops]
        assert "moe_experts" in ops
        close(got.logits, model(ids).logits)
        for _ in range(2):
            new = got.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, new), 1)
            got = call(new, past_key_values=got.past_key_values)
            close(got.logits, model(ids).logits[:, -1:])
