"""Training a draft: the loss, the anchors, the data, and whole runs that resume and evaluate."""

from __future__ import annotations

import dataclasses
import json
import math
import xml.etree.ElementTree as ElementTree

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from dspark_compile.models.draft import DraftModel
from dspark_compile.models.draft_config import DraftError
from dspark_compile.models.draft_vocabulary import cut_vocabulary
from dspark_compile.runtime.speculation.reference import speculate
from dspark_compile.training.anchors import block_targets, sample_anchors
from dspark_compile.training.batches import Batches
from dspark_compile.training.data import prompts, read
from dspark_compile.training.evaluate import Evaluation, evaluate
from dspark_compile.training.loop import learning_rate, train_draft
from dspark_compile.training.loss import draft_loss
from dspark_compile.training.options import TrainError, TrainOptions
from dspark_compile.training.plot import render
from dspark_compile.training.regenerate import Text, regenerate
from dspark_compile.training.step import learn, observe

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")


class Letters:
    """A tokenizer: a token a character."""

    pad_token_id, eos_token_id, mask_token_id, chat_template = 0, 1, None, None

    def __call__(self, text, add_special_tokens=False, verbose=False):
        return {"input_ids": [2 + ord(c) % 30 for c in text]}

    def get_vocab(self):
        return {chr(97 + i): i for i in range(32)}


def target(seed=0):
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=33, hidden_size=24, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.25,
        eos_token_id=None, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all. " * 8
SMALL = TrainOptions(
    layers=1, block_size=4, taps=(0, 2), markov_rank=4, prompts=24, prompt_tokens=20,
    new_tokens=14, text_batch=8, max_length=40, steps=4, batch=3, anchors=8, held_out=0.2,
    dtype="float32", lr=3e-3, temperatures=(0.0, 1.0), seed=3,
)  # fmt: skip


# -- loss


@pytest.mark.parametrize("part", [False, True], ids=["whole vocabulary", "draft vocabulary"])
@pytest.mark.parametrize("confident", [True, False])
def test_loss_is_the_published_one(part, confident):
    n, k, v = 5, 4, 11
    vocabulary = torch.tensor([0, 2, 3, 7, 10]) if part else None
    logits = torch.randn(n, k, 5 if part else v, requires_grad=True)
    confidence = torch.randn(n, k, requires_grad=True) if confident else None
    theirs, labels = torch.randn(n, k, v) * 2, torch.randint(0, v, (n, k))
    mask = torch.rand(n, k) > 0.3
    terms = draft_loss(logits, confidence, theirs, labels, mask, vocabulary)
    got = torch.autograd.grad(terms.total, [t for t in (logits, confidence) if t is not None])

    wide = logits
    if part:
        wide = torch.full((n, k, v), -torch.inf).index_copy(-1, vocabulary, logits)
    p_d, p_t = wide.softmax(-1), theirs.softmax(-1)
    l1 = (p_d - p_t).abs().sum(-1)
    ce = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none").view(n, k)
    ce = torch.where(ce.isfinite(), ce, torch.zeros(()))
    weight = mask * torch.exp(-torch.arange(k) / 4)
    total = 0.1 * ce + 0.9 * l1
    if confident:
        total = total + F.binary_cross_entropy_with_logits(
            confidence, (1 - l1 / 2).detach(), reduction="none"
        )
    want = (weight * total).sum()
    torch.testing.assert_close(terms.total, want)
    torch.testing.assert_close(terms.l1, (weight * l1).sum().detach())
    grads = torch.autograd.grad(want, [t for t in (logits, confidence) if t is not None])
    for a, b in zip(got, grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_pieces_of_a_large_vocabulary_add_up():
    model = target()
    draft = trained_shape(model)
    ids, mine = torch.randint(0, 30, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    blocks = observe(model, draft, ids, mine, 6, torch.Generator().manual_seed(0))
    found = []
    for elements in (2**30, 5 * 33 * 4):
        draft.zero_grad()
        weight, terms = learn(draft, blocks, torch.float32, elements)
        found.append(
            (float(terms.total.detach()) / weight, [p.grad.clone() for p in draft.parameters()])
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def trained_shape(model) -> DraftModel:
    from dspark_compile.training.draft_config import new_config
    from dspark_compile.training.initialize import initialize

    options = SMALL.resolve(1_000, 24, 4)
    draft = DraftModel(new_config(model, Letters(), options))
    initialize(draft, model)
    return draft.bind(model)


# -- anchors and batches


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000))
def test_anchors_and_their_targets(length, count, block, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, length, generator=g) > 0.4
    ids = torch.randint(0, 50, (3, length), generator=g)
    anchors, keep = sample_anchors(mask, count, g)
    previous, labels, where, counts = block_targets(ids, mask, anchors, keep, block)
    for row in range(3):
        legal = [i for i in range(length - 1) if mask[row, i] and mask[row, i + 1]]
        chosen = anchors[row][keep[row]].tolist()
        assert chosen == sorted(set(chosen)) and set(chosen) <= set(legal)
        assert len(chosen) == min(count, length - 1, len(legal))
        for a in range(anchors.shape[1]):
            p, going = int(anchors[row, a]), bool(keep[row, a])
            for k in range(block):
                going = going and p + k + 1 < length and bool(mask[row, p + k + 1])
                assert bool(counts[row, a, k]) == going
                if going:
                    assert labels[row, a, k] == ids[row, p + k + 1]
                    assert previous[row, a, k] == ids[row, p + k]
                    assert int(where[row, a, k]) == p + k


def test_batches_depend_on_the_step_only():
    texts = [Text(torch.arange(n), 2, 0.0) for n in (9, 30, 5, 14, 22, 8, 60)]
    one, other = Batches(texts, 2, 24, seed=1), Batches(texts, 2, 24, seed=1)
    for step in (5, 0, 9, 3):
        for a, b in zip(one.batch(step), other.batch(step)):
            assert a.equal(b)
    ids, mine = one.batch(0)
    assert ids.shape == mine.shape and ids.shape[1] <= 24
    seen = sorted(int(m.sum()) for step in range(len(one)) for m in one.batch(step)[1])
    assert len(seen) == 7  # each text once in a pass


def test_learning_rate():
    assert learning_rate(0.0, 1.0) < 0.05 < learning_rate(0.02, 1.0) < learning_rate(0.04, 1.0)
    assert learning_rate(1.0, 1.0) == pytest.approx(0, abs=1e-9)


# -- data


def test_data_forms(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"prompt": "once upon a time"}) + "\n\n" + json.dumps({"text": TEXT}) + "\n"
    )
    (tmp_path / "c.json").write_text(json.dumps([TEXT, {"prompt": "and then"}]))
    (tmp_path / "d.png").write_bytes(b"\x89PNG\xff")
    kinds = [kind for kind, _ in read(tmp_path)]
    assert sorted(kinds) == ["prompt", "prompt", "text", "text", "text"]
    found = prompts(tmp_path, Letters(), longest=40, count=20, seed=0)
    assert len(found) == 20 and all(1 <= len(p) <= 40 for p in found)
    assert found == prompts(tmp_path, Letters(), longest=40, count=20, seed=0)
    assert [len(p) for p in found if p == Letters()("and then")["input_ids"]] == [8]


def test_chats_use_the_template(tmp_path):
    class Chatty(Letters):
        chat_template = "x"

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return "|".join(m["role"] + ":" + m["content"] for m in messages) + "|assistant:"

    chat = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "secret"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": chat}))
    (found,) = prompts(tmp_path, Chatty(), longest=99, count=3, seed=0)
    assert found == Letters()("user:hi|assistant:")["input_ids"]
    with pytest.raises(ValueError, match="no chat template"):
        prompts(tmp_path, Letters(), longest=99, count=3, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "{", "a.jsonl:1 is not JSON"),
        ("a.jsonl", '{"answer": 1}', "none of: prompt, messages"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "without role and content"),
        ("a.json", "{}", "no list"),
        ("a.txt", "   ", "no text"),
        ("a.txt", "short", "17 tokens"),
    ],
)
def test_bad_data(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        prompts(tmp_path / name, Letters(), longest=20, count=3, seed=0)


def test_missing_data(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        list(read(tmp_path / "none"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"steps": -1}, "steps=-1"),
        ({"markov_head": "gru"}, "markov_head='gru'"),
        ({"temperatures": ()}, "temperatures"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"init": ""}, "init=''"),
        ({"minutes": 0}, "minutes=0"),
        ({"minutes": math.nan}, "minutes=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"temperatures": (0.0, math.nan)}, "temperatures=.*nan"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(TrainError, match=words):
        dataclasses.replace(SMALL, **changes)


def test_defaults_follow_the_target():
    tiny = TrainOptions().resolve(5_000_000, 256, 6)
    large = TrainOptions().resolve(4_000_000_000, 2560, 36)
    assert (tiny.markov_rank, large.markov_rank) == (32, 256)
    assert large.taps == (1, 9, 17, 25, 33) and max(tiny.taps) == 4
    assert large.layers == 5 and large.anchors == 512 and large.lr == 6e-4 and tiny.lr == 1e-3


# -- text


def test_regenerated_text_is_the_targets_and_is_kept(tmp_path):
    model = target()
    given_prompts = [[3, 4, 5], [6, 7, 8, 9], [10] * 7, [4, 4]]
    options = {"new_tokens": 6, "temperatures": (0.0,), "batch": 2, "pad": 0, "eos": [], "seed": 0}
    done = []
    texts = regenerate(model, given_prompts, tmp_path, progress=done.append, **options)
    assert done == [2, 4]
    for text in texts:
        ids = text.ids[: text.prompt][None]
        assert ids[0].tolist() in given_prompts
        for token in text.ids[text.prompt :]:
            with torch.no_grad():
                assert int(model(ids).logits[0, -1].argmax()) == int(token)
            ids = torch.cat((ids, token.view(1, 1)), dim=1)
    # A killed run has some of the chunks; the others come out as they would have.
    files = sorted(tmp_path.glob("*.safetensors"))
    files[1].unlink()
    again = regenerate(model, given_prompts, tmp_path, **options)
    assert [t.ids.tolist() for t in again] == [t.ids.tolist() for t in texts]


# -- runs


def folder_data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


def test_a_run_resumes_where_it_was_killed(tmp_path):
    data, model = folder_data(tmp_path), target()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def run(name, steps):
        return train_draft(
            model, data, tmp_path / name, tokenizer=Letters(), quiet=True,
            options=dataclasses.replace(SMALL, steps=steps, minutes=None),
        )  # fmt: skip

    straight = run("straight", 6)
    # A schedule of six steps, killed after three.
    from dspark_compile.training.loop import Trainer

    original = Trainer.run

    def killed(self, quiet=False):
        progress = Trainer.progress
        Trainer.progress = property(lambda t: 1.0 if t.step >= 3 else progress.fget(t))
        try:
            original(self, quiet)
        finally:
            Trainer.progress = progress
        raise KeyboardInterrupt

    Trainer.run = killed
    try:
        with pytest.raises(KeyboardInterrupt):
            run("killed", 6)
    finally:
        Trainer.run = original
    resumed = run("killed", 6)
    assert resumed.steps == straight.steps == 6
    # The third step of the killed run had the learning rate of its end: only that may differ.
    assert resumed.evaluation.anchors == straight.evaluation.anchors
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])
    loaded = DraftModel.from_pretrained(tmp_path / "straight", target=model, tokenizer=Letters())
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, straight.draft.state_dict()[name])
    assert loaded.calibration == straight.draft.calibration
    assert len(loaded.calibration["temperatures"]) == 4
    numbers = json.loads((tmp_path / "straight" / "training.json").read_text())
    assert numbers["steps"] == 6 and numbers["held_out"]["anchors"] > 0
    ElementTree.parse(tmp_path / "straight" / "evaluation.svg")
    with pytest.raises(TrainError, match="other values of block_size, draft"):
        train_draft(
            model, data, tmp_path / "straight", tokenizer=Letters(), quiet=True,
            options=dataclasses.replace(SMALL, block_size=3),
        )  # fmt: skip


def test_what_a_run_cannot_begin_with(tmp_path):
    data = folder_data(tmp_path)
    (tmp_path / "file").write_text("")
    for out, changes, words in (
        ("file", {}, r"--out '.*file' is a file; give a folder"),
        ("file/below", {}, r"--out '.*below' cannot be written"),
        ("out", {"device": "nowhere"}, "device='nowhere' cannot be used here"),
        ("out", {"device": "meta"}, "device='meta' cannot be used here: it holds no numbers"),
        ("out", {"draft_vocab_size": 1000}, r"draft_vocab_size=1000: the target has \d+ tokens"),
    ):
        with pytest.raises(TrainError, match=words):
            train_draft(
                target(), data, tmp_path / out, tokenizer=Letters(), quiet=True,
                options=dataclasses.replace(SMALL, **changes),
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_was_not_measured_is_not_a_number(tmp_path):
    found = evaluate(target(), trained_shape(target()), [], SMALL.resolve(1_000, 24, 4))
    assert found.tau_greedy is None and found.to_dict()["tau_sampled"] is None
    assert "tau not measured at T=0" in render(found)


def test_a_draft_to_go_on_from(tmp_path):
    data, model = folder_data(tmp_path), target()

    def run(name, **changes):
        options = dataclasses.replace(SMALL, steps=1, **changes)
        return train_draft(
            model, data, tmp_path / name, tokenizer=Letters(), quiet=True, options=options
        )

    first = run("first").draft
    second = run("second", init=str(tmp_path / "first"), block_size=6, lr=1e-12).draft
    assert second.config.block_size == 6
    for name, tensor in second.state_dict().items():
        torch.testing.assert_close(tensor, first.state_dict()[name])
    for number, (changes, words) in enumerate((
        ({"markov_rank": 2}, r"confidence_head.* has the shape \(1, 28\) there and \(1, 26\) here"),
        ({"layers": 2}, r"layers.1.* has the shape None there"),
        ({"taps": (0, 1)}, r"reads the layers \(0, 2\) of its target"),
    )):  # fmt: skip
        with pytest.raises(TrainError, match=words):
            run(f"other{number}", init=str(tmp_path / "first"), **changes)
    with pytest.raises(TrainError, match="init='zeros': give target, random, or a draft"):
        run("third", init="zeros")


def test_a_smaller_vocabulary(tmp_path):
    data, model = folder_data(tmp_path), target()
    options = dataclasses.replace(SMALL, steps=2, draft_vocab_size=12)
    result = train_draft(
        model, data, tmp_path / "out", tokenizer=Letters(), quiet=True, options=options
    )
    draft = DraftModel.from_pretrained(tmp_path / "out", target=model, tokenizer=Letters())
    kept = draft.d2t.tolist()
    assert len(kept) == 12 == draft.config.draft_vocab_size and kept == result.draft.d2t.tolist()
    assert draft.markov_head.markov_w2.weight.shape == (12, 4)
    # What is kept is proposed as before; greedy text is the target's.
    whole = train_draft(
        model, data, tmp_path / "whole", tokenizer=Letters(), quiet=True,
        options=dataclasses.replace(options, draft_vocab_size=0),
    ).draft  # fmt: skip
    for name, tensor in draft.state_dict().items():
        if name != "d2t":
            wanted = whole.state_dict()[name]
            torch.testing.assert_close(tensor, wanted[kept] if "w2" in name else wanted)
    ids = torch.tensor([[3, 4, 5, 6]])
    (text,) = speculate(model, draft, ids, max_new_tokens=12).generated
    assert torch.equal(text, speculate(model, None, ids, max_new_tokens=12).generated[0])
    again = cut_vocabulary(draft, torch.tensor(kept[2:7]))
    assert again.d2t.tolist() == kept[2:7]
    assert again.markov_head.markov_w2.weight.equal(draft.markov_head.markov_w2.weight[2:7])
    missing = next(i for i in range(33) if i not in kept)
    for ids in ([missing], [kept[0], 99], []):
        with pytest.raises(DraftError, match="cannot be cut"):
            cut_vocabulary(draft, torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize(
    "changes",
    [{"markov_head": "rnn", "optimizer": "muon"},
     {"markov_rank": 0, "confidence": False, "given_share": 0.5, "init": "random"},
     {"minutes": 0.01}],
    ids=["rnn, muon", "dflash, given text", "minutes"],
)  # fmt: skip
def test_kinds_of_runs(tmp_path, changes):
    options = dataclasses.replace(SMALL, steps=2, **changes)
    result = train_draft(
        target(), folder_data(tmp_path), tmp_path / "out", tokenizer=Letters(), options=options,
        quiet=True,
    )  # fmt: skip
    loaded = DraftModel.from_pretrained(tmp_path / "out", target=target())
    assert loaded.config.markov_rank == options.markov_rank
    assert (result.evaluation.fitted is None) == (not options.confidence)


def test_evaluation_is_what_decoding_does():
    """Teacher-forced numbers equal those of generating with the draft."""
    model = target()
    draft = trained_shape(model)
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.02 * torch.randn_like(p))
    options = SMALL.resolve(1_000, 24, 4)
    prompt = torch.tensor([[3, 9, 4, 7, 5]])
    out = speculate(model, draft, prompt, max_new_tokens=30)
    text = Text(out.sequences[0], 6, 0.0)  # the first generated token is the first anchor
    found = evaluate(model, draft, [text], options)
    rounds = found.rounds
    assert rounds >= 5
    # The last rounds of the loop are cut short by its end; the walk has those that fit whole.
    whole = speculate(model, draft, prompt, max_new_tokens=31)
    assert found.tau_greedy == pytest.approx(whole.stats.tau, abs=0.35)
    assert found.conditional[0] <= 1 and len(found.conditional) == 4


@pytest.mark.slow
def test_training_raises_the_accepted_length(tmp_path):
    options = dataclasses.replace(
        SMALL, steps=250, prompts=200, new_tokens=24, anchors=16, batch=8, temperatures=(0.0,)
    )
    result = train_draft(
        target(), folder_data(tmp_path), tmp_path / "out", tokenizer=Letters(), options=options,
        quiet=True,
    )  # fmt: skip
    assert result.evaluation.tau_greedy > 1.6
    log = [json.loads(line) for line in (tmp_path / "out/.training/log.jsonl").open()]
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]


def test_plot_without_confidences():
    ElementTree.fromstring(render(Evaluation(conditional=[0.5, 0.4], accept_sampled=[0.6, 0.5])))


def test_command_line_errors(tmp_path):
    from typer.testing import CliRunner

    from dspark_compile.cli import app

    def run(*args):
        result = CliRunner().invoke(app, ["train-draft", *args])
        assert result.exit_code != 0
        return " ".join(result.output.replace("│", " ").split())

    base = ["--target", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "o")]
    assert "not a list of numbers" in run(*base, "--taps", "1,x")
    assert "markov_head='gru'" in run(*base, "--markov-head", "gru")
    assert "cannot be loaded" in run(*base)
