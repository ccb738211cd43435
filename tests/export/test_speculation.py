"""A DSpark pair in ONNX Runtime: a host program speculates with the two graphs.

Greedy decoding is lossless: the tokens equal those that the eager target chooses one by one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from dspark_compile.export import export_onnx  # noqa: E402
from dspark_compile.models.draft_vocabulary import cut_vocabulary  # noqa: E402
from tests.speculation.test_draft import make  # noqa: E402

from .tiny import llama, qwen3  # noqa: E402

pytestmark = pytest.mark.slow

VOCAB, TAPS, CAPACITY = 7, (0, 2), 64  # few tokens, so that random drafts are right at times


class Graph:
    """A session whose caches live in buffers that are past and present at once."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.caches = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past"):
                shape = (1, value.shape[1], CAPACITY, value.shape[3])
                zeros = np.zeros(shape, np.float32)
                self.caches[value.name] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros)

    def __call__(self, **feed: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs that are no caches."""
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self.caches.items():
            binding.bind_ortvalue_input(name, cache)
            present = name.replace("past_key_values", "present").replace("past.", "present.")
            binding.bind_ortvalue_output(present, cache)
        wanted = [o.name for o in self.session.get_outputs() if not o.name.startswith("present")]
        for name in wanted:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        values = dict(zip(self._bound(wanted), binding.get_outputs(), strict=True))
        return {name: values[name].numpy() for name in wanted}

    def _bound(self, wanted: list[str]) -> list[str]:
        """Names in the order in which outputs were bound."""
        caches = [
            n.replace("past_key_values", "present").replace("past.", "present.")
            for n in self.caches
        ]
        return [*caches, *wanted]


def speculate(target: Graph, draft: Graph, prompt: list[int], count: int) -> tuple[list[int], int]:
    """``(tokens, rounds)``: ``count`` tokens behind the prompt, drafted and verified."""
    tokens, held, rounds = list(prompt), 0, 0

    def verify(new: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The target's choice behind each new token ``[N]``, and the taps ``[1, N, m * width]``."""
        total = held + len(new)
        out = target(
            input_ids=np.array([new], np.int64),
            attention_mask=np.ones((1, total), np.int64),
            position_ids=np.arange(held, total, dtype=np.int64)[None],
        )
        taps = np.concatenate([out[f"hidden_states.{i}"] for i in TAPS], -1)
        return out["logits"][0].argmax(-1), taps

    chosen, taps = verify(prompt)
    held, lengths = len(prompt), np.zeros(1, np.int64)
    tokens.append(int(chosen[-1]))
    while len(tokens) < len(prompt) + count:
        anchor = tokens[-1]
        drafted = draft(
            anchor=np.array([anchor], np.int64),
            taps=taps,
            counts=np.array([taps.shape[1]], np.int64),
            lengths=lengths,
        )
        lengths = drafted["new_lengths"]
        assert int(lengths[0]) == held and np.isfinite(drafted["confidence"]).all()
        block = drafted["tokens"][0].tolist()
        chosen, taps = verify([anchor, *block])
        accepted = 0
        while accepted < len(block) and block[accepted] == chosen[accepted]:
            accepted += 1
        # Rejected rows stay in the buffer: the next call says how many are valid.
        tokens += [*block[:accepted], int(chosen[accepted])]
        held += 1 + accepted
        taps = np.ascontiguousarray(taps[:, : 1 + accepted])
        rounds += 1
    return tokens[: len(prompt) + count], rounds


@pytest.mark.parametrize(
    ("build", "target", "cut"),
    [(qwen3, "gqa", False), (llama, "portable", False), (llama, "gqa", True)],
    ids=["gqa", "portable", "a part of the vocabulary"],
)
def test_a_host_program_speculates(tmp_path, build, target, cut):
    model = build(4, vocab_size=VOCAB)
    width = model.config.hidden_size
    draft = make(
        vocab_size=VOCAB, hidden_size=width, mask_token_id=VOCAB - 1, target_layer_ids=TAPS,
        num_target_layers=4, block_size=4,
    )  # fmt: skip
    draft.embed_tokens = draft.lm_head = None
    if cut:
        draft = cut_vocabulary(draft, torch.tensor([0, 2, 3, 5, 6]))
    # In another dtype, as shipped: the export converts it with what it borrows.
    draft = draft.bind(model).to(torch.bfloat16).bind(model)
    report = export_onnx(model, tmp_path / "target.onnx", target=target, taps=list(TAPS))
    assert report.error <= 1e-5
    assert export_onnx(draft, tmp_path / "draft.onnx", dtype="float32").error <= 1e-5

    prompt = [3, 1, 4, 1, 5]
    graphs = Graph(tmp_path / "target.onnx"), Graph(tmp_path / "draft.onnx")
    tokens, rounds = speculate(*graphs, prompt, 36)
    want = list(prompt)
    with torch.no_grad():
        while len(want) < len(tokens):
            want.append(int(model(torch.tensor([want])).logits[0, -1].argmax()))
    assert tokens == want
    assert rounds < 36, "no drafted token was ever accepted"
