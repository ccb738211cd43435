"""The parts of an export that need no model: masks, packing, writing."""

from __future__ import annotations

import pytest
import torch

from dspark_compile.export import ExportError
from dspark_compile.export import ops as export_ops
from dspark_compile.export.masks import structure
from dspark_compile.export.weights import groups_of, pack_nbits
from dspark_compile.export.write import move_folder, plain_name, scratch
from dspark_compile.ops.predicate import evaluate

ROWS, KEYS = 3, 8


@pytest.mark.parametrize(
    ("text", "ints", "causal", "window"),
    [
        ("k <= q + n0", [5], True, -1),
        ("k < q + 6", [], True, -1),
        ("q + n0 >= k", [5], True, -1),
        ("(k <= q + n0) & (k > q + n0 - 4)", [5], True, 4),
        ("(k <= q + n0) & (k >= q + 2)", [5], True, 4),
        ("(k <= q + n0) & (q + n0 - k < 4)", [5], True, 4),
        ("True", [], False, -1),
        ("", [], False, -1),
    ],
)
def test_structure_of_a_mask(text, ints, causal, window):
    found = structure(text, [], ints, ROWS, KEYS)
    assert (found.other, found.causal, found.window) == ("", causal, window)
    # What is said means what the predicate means.
    told = " & ".join(
        (["(k <= q + 5)"] if found.causal else [])
        + ([f"(k > q + 5 - {window})"] if window > 0 else [])
    )
    shape = (1, 1, ROWS, KEYS)
    want = evaluate(text, [], ints, shape, torch.device("cpu")).expand(shape)
    assert torch.equal(evaluate(told, [], [], shape, torch.device("cpu")).expand(shape), want)


@pytest.mark.parametrize(
    ("text", "ints"),
    [
        ("k <= q + n0", [4]),  # a key less than causal
        ("(k <= q + n0) | (k < 2)", [5]),
        ("(k // 4 == q // 4)", []),
        ("k * 2 <= q", []),
    ],
)
def test_other_masks_are_named(text, ints):
    assert structure(text, [], ints, ROWS, KEYS).other


def test_a_loaded_pad_is_a_view_and_an_offset_one_is_not():
    pad = torch.tensor([[True, False, True], [False, True, True]])
    shape = (2, 4, 5, 3)
    viewed = evaluate("t0[b, k]", [pad], [], shape, torch.device("cpu"))
    assert torch.equal(viewed, pad[:, None, None, :])
    turned = evaluate("t0[k, b]", [pad.t()], [], shape, torch.device("cpu"))
    assert torch.equal(turned, pad[:, None, None, :])
    shifted = evaluate("t0[b, k // 2]", [pad], [], shape, torch.device("cpu"))
    assert torch.equal(shifted[:, 0, 0], pad[:, torch.tensor([0, 0, 1])])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", [False, True])
def test_packed_weights_mean_the_same(bits, zero):
    top = 7 if bits == 4 else 127
    torch.manual_seed(0)
    q = torch.randint(-top - 1, top + 1, (6, 96), dtype=torch.int8)
    scale = torch.rand(6, 3) + 0.1
    zeros = torch.randint(-4, 4, (6, 3), dtype=torch.int8) if zero else None
    found = groups_of(q, scale, zeros)
    assert found is not None
    block, scales, zero_points = found
    assert block == 32
    data, scales, zero_points, packed_bits = pack_nbits(q, scales, zero_points, block)
    assert packed_bits == bits
    x = torch.randn(2, 96)
    got = export_ops.matmul_nbits(x, data, scales, zero_points, 96, 6, bits, block)
    shift = 0 if zeros is None else zeros.repeat_interleave(32, 1).float()
    want = x @ ((q.float() - shift) * scale.repeat_interleave(32, 1)).t()
    assert torch.allclose(got, want, atol=1e-4)


def test_groups_that_no_block_divides():
    q = torch.zeros(4, 90, dtype=torch.int8)
    assert groups_of(q, torch.ones(4, 3), None) is None
    assert groups_of(q[:, :80], torch.ones(4), None) is not None  # one scale a row: blocks of 16


@pytest.mark.parametrize("bits", [8, 4])
def test_static_cache_scales_round_trip(bits):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 16)
    scale = x.abs().amax((0, 2), keepdim=True) / (127 if bits == 8 else 7)
    packed = export_ops.quantize_static(x, scale, bits)
    back = export_ops.dequantize_static(packed, scale, bits)
    assert packed.shape[-1] == (16 if bits == 8 else 8)
    assert ((back - x).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 3)])
@pytest.mark.parametrize("zero", [False, True])
def test_packed_experts_mean_the_same(bits, groups, zero):
    from dspark_compile.export.qmoe import Stack, dequantised, interleaved, packed

    torch.manual_seed(0)
    top = 7 if bits == 4 else 127

    def stack(rows, columns):
        numbers = torch.randint(-top - 1, top + 1, (3, rows, columns), dtype=torch.int8)
        zeros = torch.randint(-4, 4, (3, rows, groups), dtype=torch.int8) if zero else None
        return Stack(numbers, torch.rand(3, rows, groups) + 0.1, zeros)

    def wide(s):
        size = s.numbers.shape[-1] // groups
        shift = 0 if s.zeros is None else s.zeros.repeat_interleave(size, -1).float()
        return (s.numbers.float() - shift) * s.scales.repeat_interleave(size, -1)

    gate, up, down = stack(48, 96), stack(48, 96), stack(96, 48)
    both = interleaved(gate, up)
    made = packed(both, down)
    assert not isinstance(made, str)
    assert made[0].bits == bits and made[0].block == (0 if groups == 1 else 16)
    want = torch.stack((wide(gate), wide(up)), 2).flatten(1, 2)
    assert torch.allclose(dequantised(made[0]), want, atol=1e-5)
    assert torch.allclose(dequantised(made[1]), wide(down), atol=1e-5)


def test_blocks_of_eight_bits_are_no_qmoe():
    from dspark_compile.export.qmoe import Stack, packed

    numbers = torch.full((2, 8, 64), 100, dtype=torch.int8)
    found = packed(*[Stack(numbers, torch.ones(2, 8, 2), None)] * 2)
    assert isinstance(found, str) and "rounds activations" in found


@pytest.mark.parametrize("rotation", [None, (16, False), (16, True), (8, False)])
def test_scales_bound_what_rope_makes_of_a_key(rotation):
    """Keys at other positions are the sample's keys turned: none is clipped."""
    from dspark_compile.export.calibrate import _largest
    from dspark_compile.ops import OPS

    torch.manual_seed(0)
    x = torch.randn(2, 3, 40, 16)
    largest = _largest(x, rotation)
    assert largest.shape == (1, 3, 1, 16) and (x.abs() <= largest * 1.00001).all()
    if rotation is None:
        assert torch.equal(largest, x.abs().amax((0, 2), keepdim=True))
        return
    width, interleaved = rotation
    angle = torch.rand(1, 1, 40, width // 2) * 6.28
    turned = OPS["rope"].reference(x, angle.cos(), angle.sin(), width, interleaved)
    assert (turned.abs() <= largest * 1.00001).all()
    assert torch.equal(largest[..., width:], x[..., width:].abs().amax((0, 2), keepdim=True))


def test_four_bits_take_the_scale_with_the_least_error():
    from dspark_compile.export.calibrate import _least_squares, headroom

    torch.manual_seed(0)
    x = torch.randn(2, 3, 400, 16)

    def error(scale):
        packed = export_ops.quantize_static(x, scale, 4)
        return (export_ops.dequantize_static(packed, scale, 4) - x).square().sum()

    assert error(_least_squares(x)) < 0.9 * error(x.abs().amax((0, 2), keepdim=True) / 7)
    assert headroom(100_000) == 1.25 and headroom(256) == 1.5


def test_an_interrupted_export_leaves_nothing(tmp_path):
    target = tmp_path / "model.onnx"
    with pytest.raises(KeyboardInterrupt), scratch(target) as folder:
        (folder / "model.onnx").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path):
    target, made = tmp_path / "out", tmp_path / "made"
    for folder, text in ((target, "old"), (made, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    (target / "stale").write_text("")
    move_folder(made, target)
    assert [p.name for p in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["../x.onnx", "a/b.onnx", "", "..", "/abs.onnx", "a\\b.onnx"])
def test_names_stay_in_their_folder(name):
    with pytest.raises(ExportError, match="plain file name"):
        plain_name(name)
