"""Whole exports: one model a target, its numbers, its structure, and what the files say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx  # noqa: E402

import dspark_compile  # noqa: E402
from dspark_compile.export import VerificationError, export_onnx  # noqa: E402

from .tiny import llama, ops, qwen3, relative  # noqa: E402


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """(model, path, report) of a static-cache graph in standard ops."""
    model, path = qwen3(), tmp_path_factory.mktemp("portable") / "model.onnx"
    return model, path, dspark_compile.export_onnx(model, path)


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    """(model, path, report) of a Llama in contrib ops."""
    model, path = llama(), tmp_path_factory.mktemp("gqa") / "model.onnx"
    return model, path, export_onnx(model, path, target="gqa", external_data=True)


def test_portable_is_exact_and_standard(portable):
    _, path, report = portable
    assert report.error <= 1e-5
    names = [c.case for c in report.checks]
    assert "batch 2, 3 new, 5 cached" in names and any("padded" in n for n in names)
    found = onnx.load(str(path))
    assert {(o.domain, o.version) for o in found.opset_import} == {("", 24)}
    assert found.ir_version <= 13
    count = ops(path)
    assert (count["Attention"], count["TensorScatter"], count["RotaryEmbedding"]) == (2, 4, 4)
    assert count["RMSNormalization"] == 2 * 4 + 1
    # What the op replaces is gone: no softmax, one mask for all layers.
    assert not {"Softmax", "Sqrt", "Where", "GatherND"} & set(count)
    assert count["LessOrEqual"] == 1


def test_inputs_and_outputs(portable):
    model, path, report = portable
    found = onnx.load(str(path))

    def dims(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {i.name: dims(i) for i in found.graph.input}
    outputs = {o.name: dims(o) for o in found.graph.output}
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, "max_length", 16]
    assert outputs["present.1.value"] == inputs["past_key_values.1.value"]
    assert outputs["logits"] == ["batch_size", "sequence_length", model.config.vocab_size]
    assert report.inputs == list(inputs) and report.outputs == list(outputs)


def test_tied_weights_are_stored_once(portable):
    model, path, _ = portable
    size = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size < 1.3 * size


def test_caches_are_bound_in_place(portable):
    """Greedy decoding with past and present in one buffer, as a host program would do it."""
    model, path, _ = portable
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = torch.randint(3, 90, (1, 6))
    caches = {
        f"past_key_values.{i}.{kind}": onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, 2, 20, 16), np.float32)
        )
        for i in range(2)
        for kind in ("key", "value")
    }
    tokens, new = ids[0].tolist(), ids
    for _ in range(8):
        total = len(tokens)
        rows = new.shape[1]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", new.numpy())
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(total - rows, total)[None])
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        tokens.append(int(logits[0, -1].argmax()))
        new = torch.tensor([[tokens[-1]]])
    want = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0]
    assert tokens == want.tolist()


def test_nodes_say_where_they_come_from(portable):
    _, path, report = portable
    found = onnx.load(str(path))
    attention = next(n for n in found.graph.node if n.op_type == "Attention")
    said = {p.key: p.value for p in attention.metadata_props}
    assert said["dspark.op"] == "dspark::attention"
    assert said["dspark.module"] == "model.layers.0.self_attn"
    assert ":" in said["dspark.source"] and "/" not in said["dspark.source"].split(":")[0]
    for node in found.graph.node:
        keys = {p.key for p in node.metadata_props}
        assert not any(key.startswith("pkg.") for key in keys), node.name
    assert report.translations["dspark::cache_append"]["TensorScatter"] == 4
    assert report.fallbacks == []
    assert json.loads(report.to_json())["version"] == 1


def test_gqa_has_one_attention_two_norms_and_no_reshape_a_layer(gqa):
    _, path, report = gqa
    assert report.error <= 1e-5
    layers = 2
    # For each layer: QKV, attention, output, two norms, gate and up, split, SiLU, product, down.
    assert report.nodes == {
        "Cast": 2, "Gather": 1, "MatMul": 4 * layers + 1, "Mul": layers, "RMSNormalization": 1,
        "ReduceSum": 1, "Shape": 1, "Split": layers, "Sub": 1,
        "com.microsoft::GroupQueryAttention": layers, "com.microsoft::QuickGelu": layers,
        "com.microsoft::SkipSimplifiedLayerNormalization": 2 * layers,
    }  # fmt: skip
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        places = {e.key: e.value for e in tensor.external_data}
        assert places.get("location", "model.onnx.data") == "model.onnx.data"


def test_gqa_serves_a_shared_buffer(gqa):
    model, path, _ = gqa
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = torch.randint(3, 90, (1, 7))
    capacity = 16
    caches = [
        onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, 2, capacity, 16), np.float32))
        for _ in range(4)
    ]
    names = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    for start, end in ((0, 5), (5, 6), (6, 7)):
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids[:, start:end].numpy())
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        for name, cache in zip(names, caches, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        got = torch.from_numpy(binding.get_outputs()[-1].numpy())
        with torch.no_grad():
            want = model(ids[:, :end]).logits[:, start:end]
        assert relative(got, want) <= 1e-5


def test_gqa_takes_padding_on_the_right(gqa):
    """A prompt of five tokens and one of three, then a step of both."""
    model, path, _ = gqa
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    lengths, names = (5, 3), [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int64)
    feed = {
        "input_ids": ids[:, :5].numpy(),
        "attention_mask": mask,
        "position_ids": np.arange(5)[None].repeat(2, 0),
        **{f"past_key_values.{n}": np.zeros((2, 2, 0, 16), np.float32) for n in names},
    }
    prompt = dict(zip([o.name for o in session.get_outputs()], session.run(None, feed)))
    feed = {
        "input_ids": ids[:, 5:6].numpy(),
        "attention_mask": np.array([[1] * 6, [1, 1, 1, 1, 0, 0]], np.int64),
        "position_ids": np.array(lengths)[:, None],
        **{f"past_key_values.{n}": prompt[f"present.{n}"] for n in names},
    }
    step = session.run(["logits"], feed)[0]
    for row, length in enumerate(lengths):
        whole = torch.cat((ids[row, :length], ids[row, 5:6]))[None]
        with torch.no_grad():
            want = model(whole).logits[0]
        got = torch.from_numpy(prompt["logits"][row, :length])
        assert relative(got, want[:length]) <= 1e-5
        assert relative(torch.from_numpy(step[row, 0]), want[length]) <= 1e-5


def test_a_wrong_translation_is_found_and_named(tmp_path, monkeypatch):
    from dspark_compile.export import emit

    right = emit.table

    def wrong(opset):
        made = right(opset)
        overload = torch.ops.dspark_onnx.rms_norm.default
        norm = made[overload]
        calls = []

        def third(x, weight, eps):
            calls.append(x)
            return norm(x, weight, 0.5 if len(calls) == 3 else eps)

        return {**made, overload: third}

    monkeypatch.setattr(emit, "table", wrong)
    with pytest.raises(VerificationError) as caught:
        export_onnx(qwen3(1), tmp_path / "m.onnx", shapes=[(1, 3, 0)])
    text = str(caught.value)
    assert "batch 1, 3 new" in text and "tolerance 1e-05" in text
    assert "first node that differs is RMSNormalization 'model.layers.0.self_attn.k_norm" in text
    assert "dspark::rms_norm" in text
    assert list(tmp_path.iterdir()) == []


def test_nothing_changes_in_the_model(portable):
    model, _, _ = portable
    fresh = qwen3()
    for (name, a), (_, b) in zip(
        model.state_dict().items(), fresh.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
