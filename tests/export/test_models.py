"""Exports of other kinds of models; each takes some seconds, so they are slow tests."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from dspark_compile.export import ExportError, export_onnx  # noqa: E402
from dspark_compile.models import alibi, dense, gpt_fast, mla  # noqa: E402

from .tiny import llama, ops, qwen3, randomised  # noqa: E402

pytestmark = pytest.mark.slow


def ids(batch, rows):
    return torch.randint(0, 90, (batch, rows), generator=torch.Generator().manual_seed(rows))


def test_dense(tmp_path):
    torch.manual_seed(0)
    config = dense.DenseConfig(vocab=97, layers=2, width=48, heads=6, kv_heads=2, hidden=80)
    model = randomised(dense.Dense(config).eval())
    shapes = [{0: "batch", 1: "sequence"}]
    report = export_onnx(
        model, tmp_path / "m.onnx", (ids(2, 5),), dynamic_shapes=shapes, check_args=[(ids(1, 9),)]
    )
    assert report.error <= 1e-5
    count = ops(tmp_path / "m.onnx")
    assert (count["Attention"], count["RotaryEmbedding"]) == (2, 4)


def test_alibi(tmp_path):
    torch.manual_seed(0)
    model = randomised(alibi.Alibi.tiny())
    shapes = [{0: "batch", 1: "sequence"}]
    report = export_onnx(
        model, tmp_path / "m.onnx", (ids(2, 5),), dynamic_shapes=shapes, check_args=[(ids(1, 9),)]
    )
    assert report.error <= 1e-5
    assert ops(tmp_path / "m.onnx")["Attention"] == 2


@pytest.mark.parametrize("make", [gpt_fast.GPT, mla.MLA])
def test_caches_in_buffers_become_inputs_and_outputs(tmp_path, make):
    torch.manual_seed(0)
    model = randomised(make.tiny(batch=2))
    report = export_onnx(
        model, tmp_path / "m.onnx", (ids(2, 5), torch.arange(5)),
        dynamic_shapes=[{1: "sequence"}, {0: "sequence"}],
        check_args=[(ids(2, 1), torch.tensor([7]))],
    )  # fmt: skip
    assert report.error <= 1e-5
    assert len([n for n in report.inputs if n.startswith("past.")]) == 4
    assert [n.replace("past", "present") for n in report.inputs[2:]] == report.outputs[1:]
    assert ops(tmp_path / "m.onnx")["Attention"] == 2


def test_local_functions(tmp_path):
    import onnx

    report = export_onnx(llama(), tmp_path / "m.onnx", target="local")
    assert report.error <= 1e-5
    found = onnx.load(str(tmp_path / "m.onnx"))
    bodies = {f.name: f for f in found.functions}
    boxes = [n for n in found.graph.node if n.domain == "dspark"]
    assert {n.op_type for n in boxes} == set(bodies)
    for name in ("attention", "gated_mlp", "rope", "add_rms_norm", "linear"):
        assert name in bodies
    assert sum(n.op_type.startswith("attention") for n in boxes) == 2
    assert not {"Attention", "RMSNormalization", "MatMul"} & {n.op_type for n in found.graph.node}


@pytest.mark.parametrize("cache", ["static", "growing"])
def test_int8_cache_in_standard_ops(tmp_path, cache):
    path = tmp_path / "m.onnx"
    report = export_onnx(qwen3(), path, kv_cache="int8", cache=cache, opset=24)
    assert report.error <= 1e-2
    count = ops(path)
    assert (count["DequantizeLinear"], count["Attention"]) == (4, 2)
    session = onnxruntime.InferenceSession(str(path))
    kinds = {i.name: i.type for i in session.get_inputs()}
    assert kinds["past_key_values.0.key"] == "tensor(int8)"
    assert kinds["past_key_values.0.key_scale"] == "tensor(float)"


@pytest.mark.parametrize(("kv_cache", "bits", "tolerance"), [("int8", 8, 1e-2), ("int4", 4, 0.3)])
def test_static_scales_of_group_query_attention(tmp_path, kv_cache, bits, tolerance):
    path = tmp_path / "m.onnx"
    sample = ids(8, 128)
    report = export_onnx(llama(), path, target="gqa", kv_cache=kv_cache, calibration=sample)
    assert report.error <= tolerance
    import onnx

    nodes = [n for n in onnx.load(str(path)).graph.node if n.op_type == "GroupQueryAttention"]
    widths = [a.i for n in nodes for a in n.attribute if a.name == "kv_cache_bit_width"]
    assert widths == [bits, bits]
    with pytest.raises(ExportError, match=r"calibration=, text or token ids"):
        export_onnx(llama(), path, target="gqa", kv_cache=kv_cache)
    with pytest.raises(ExportError, match=r"token ids outside of 0 … 95"):
        export_onnx(
            llama(), path, target="gqa", kv_cache=kv_cache, calibration=torch.tensor([[5, 500]])
        )


def test_float16(tmp_path):
    report = export_onnx(llama(), tmp_path / "m.onnx", target="gqa", dtype="float16")
    assert report.error <= 1e-2
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_outputs()[0].type == "tensor(float16)"


@pytest.mark.parametrize(
    ("bits", "target"), [("int4", "gqa"), ("int8", "gqa"), ("int8", "portable")]
)
def test_torchao_weights(tmp_path, bits, target):
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = llama()
    quantize_(
        model, IntxWeightOnlyConfig(weight_dtype=getattr(torch, bits), granularity=PerGroup(32))
    )
    report = export_onnx(model, tmp_path / "m.onnx", target=target)
    assert report.error <= 1e-5
    count = ops(tmp_path / "m.onnx")
    op = "MatMulNBits" if target == "gqa" else "DequantizeLinear"
    assert count[op] >= 2 * 5


def test_draft(tmp_path):
    import numpy as np

    from tests.speculation.test_draft import make

    report = export_onnx(make(), tmp_path / "draft.onnx")
    assert report.error <= 1e-5
    assert report.outputs[:4] == ["tokens", "logits", "confidence", "new_lengths"]
    assert np.isfinite(report.error)


def test_taps_of_a_target(tmp_path):
    report = export_onnx(llama(3), tmp_path / "m.onnx", target="gqa", taps=[-1, 1])
    assert report.error <= 1e-5
    assert report.outputs[-2:] == ["hidden_states.-1", "hidden_states.1"]
    with pytest.raises(ExportError, match=r"taps holds 2; a tap is a decoder layer from 0 to 1"):
        export_onnx(llama(3), tmp_path / "m.onnx", taps=[2])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("target", ["gqa", "portable"])
def test_experts(tmp_path, family, target):
    from tests.zoo import families

    report = export_onnx(families.build(family), tmp_path / "m.onnx", target=target)
    assert report.error <= 1e-5
    if target == "gqa":
        assert report.nodes.get("com.microsoft::MoE")


def quantised_loop(bits, size):
    """A loop over experts whose linears torchao has quantised, in groups of ``size`` or by row."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    from tests.test_raise_moe import Loop

    torch.manual_seed(0)
    model = Loop("all", hidden=64, inner=96).eval()
    config = torchao.Int8WeightOnlyConfig()
    if size:
        kind = getattr(torch, f"int{bits}")
        config = torchao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(size))
    torchao.quantize_(model.experts, config)
    return model


@pytest.mark.parametrize(("bits", "size", "op"), [(8, 0, "QMoE"), (4, 32, "QMoE"), (8, 32, "MoE")])
def test_quantised_experts(tmp_path, bits, size, op):
    """Over blocks of 8 bits the CPU's QMoE rounds activations: those experts are dequantised."""
    report = export_onnx(
        quantised_loop(bits, size), tmp_path / "m.onnx", (torch.randn(7, 64),),
        dynamic_shapes=[{0: "tokens"}], check_args=[(torch.randn(1, 64),)], target="gqa",
    )  # fmt: skip
    assert report.error <= 1e-5
    assert {k for k in report.nodes if "MoE" in k} == {f"com.microsoft::{op}"}
    assert any("rounds activations" in why for _, why in report.fallbacks) == (op == "MoE")


def test_quantised_stacks_of_experts(tmp_path):
    """Hugging Face's stacked experts in torchao's int8, which run as the eager loop only."""
    torchao = pytest.importorskip("torchao.quantization")
    from tests.zoo import families

    model = families.build("qwen3_moe")
    model.set_experts_implementation("eager")
    config = torchao.Int8WeightOnlyConfig(version=2)
    names = ("re:.*experts.gate_up_proj", "re:.*experts.down_proj")
    torchao.quantize_(model, torchao.FqnToConfig(dict.fromkeys(names, config)), filter_fn=None)
    report = export_onnx(model, tmp_path / "m.onnx", target="gqa")
    assert report.error <= 1e-5
    assert report.nodes["com.microsoft::QMoE"] == model.config.num_hidden_layers
    assert "com.microsoft::MoE" not in report.nodes


def test_linears_of_one_input_that_are_no_neighbours(tmp_path):
    """GPT-J's query and key are reshaped before its value is computed: one product all the same."""
    from tests.zoo import families

    model = families.build("gptj")
    report = export_onnx(model, tmp_path / "m.onnx", target="gqa")
    assert report.error <= 1e-5
    # For each layer: q, k and v; output; up; down. And the head.
    assert report.nodes["MatMul"] == 4 * model.config.num_hidden_layers + 1


def test_a_draft_borrows_in_another_dtype(tmp_path):
    """The vocabulary matrices of a bfloat16 target go into a float32 graph of its draft."""
    from tests.speculation.test_draft import make

    model = llama(4, vocab_size=12).bfloat16()
    draft = make(
        vocab_size=12, hidden_size=64, mask_token_id=11, target_layer_ids=(0, 2),
        num_target_layers=4, block_size=3,
    )  # fmt: skip
    draft.embed_tokens = draft.lm_head = None
    draft.bind(model)
    report = export_onnx(draft, tmp_path / "m.onnx", dtype="float32")
    assert report.error <= 1e-5
    assert draft.borrowed.head.weight.dtype == torch.bfloat16
