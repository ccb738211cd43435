"""Steps kept for the next process: what is found, what is not, and that both compute alike."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import sympy
import torch
import transformers as tf
from torch import nn

import dspark_compile
from dspark_compile.codegen.cpp.emit import Source
from dspark_compile.codegen.cpp.layout import Layout, Result
from dspark_compile.reuse import files, key, layout
from dspark_compile.reuse.model_key import model_key
from dspark_compile.runtime import captured, expert_load, kept_rounds
from dspark_compile.runtime.generate import free

ON = {"kernels": "cpp", "reuse": "on"}


class Small(nn.Module):
    def __init__(self, eps: float = 1e-5, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=eps)
        self.up = nn.Linear(width, 96, bias=False)
        self.down = nn.Linear(96, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


pytestmark = pytest.mark.usefixtures("steps")


def compiled(model, *args, **options):
    """The result of a fresh compilation, and its graph's report."""
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend="dspark", dynamic=False, options={**ON, **options})(
            *args
        )
    return out, dspark_compile.last_report().graphs[-1]


def check(model, expect_found, *args, **options):
    args = args or (torch.randn(2, 64),)
    out, graph = compiled(model, *args, **options)
    assert graph.from_cache == expect_found
    with torch.no_grad():
        torch.testing.assert_close(out, model(*args), rtol=1e-5, atol=1e-5)
    return graph


def test_the_next_compilation_finds_the_step_and_its_report(steps):
    model = Small()
    first = check(model, False)
    second = check(model, True)
    assert second.sites == first.sites
    assert second.kernels == first.kernels
    assert second.ops == first.ops
    assert [p.name for p in second.passes] == [p.name for p in first.passes]
    assert set(first.notes) < set(second.notes)
    assert "trace" not in second.seconds
    # Other weights of the same shapes are read where they lie.
    check(Small(), True)


def test_what_differs_has_another_key(monkeypatch):
    check(Small(), False)
    check(Small(eps=1e-2), False)
    check(Small(), False, torch.randn(3, 64))
    check(Small(), False, torch.randn(64, 2).T)
    check(Small(), False, disable=["raise_norm"])
    check(Small().bfloat16().float(), True)
    monkeypatch.setenv("DSPARK_CPU_ISA", "portable")
    check(Small(), False)


def test_an_upgrade_finds_nothing(monkeypatch):
    check(Small(), False)
    monkeypatch.setattr(key, "_package", lambda: "other sources")
    check(Small(), False)


def test_sources_newer_than_the_code_that_runs_keep_nothing(monkeypatch, steps):
    monkeypatch.setattr(key, "_STARTED", 0.0)
    graph = check(Small(), False)
    assert any("changed after it may have been imported" in n for n in graph.notes)
    assert not list(steps.glob("*"))


def test_inputs_that_share_memory_are_others():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Linear(64, 64, bias=False)

        def forward(self, x, y):
            return self.down(x) + y

    whole, model = torch.randn(4, 64), Add()
    check(model, False, whole[:2], torch.randn(2, 64))
    check(model, False, whole[:2], whole[2:])
    check(model, False, whole[:2], whole[1:3])
    check(model, True, whole[:2], whole[2:])


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
def test_a_damaged_entry_is_no_entry(steps, damage):
    model = Small()
    check(model, False)
    (path,) = steps.glob("*.json")
    text = path.read_text()
    if damage == "other":  # whole, but not what is expected
        files.write(path.stem, {"layout": {"names": []}, "form": [], "report": {}})
    else:
        half = text[: len(text) // 2]
        path.write_text({"cut": half, "changed": text.replace("64", "65"), "empty": ""}[damage])
    check(model, False)
    check(model, True)


def test_a_layout_that_points_outside_of_itself_is_refused(steps):
    check(Small(), False)
    (path,) = steps.glob("*.json")
    data = files.read(path.stem)
    data["layout"]["fixes"][0][0] = 10**6
    files.write(path.stem, data)
    check(Small(), False)


def test_an_entry_that_others_can_write_is_not_read(steps):
    check(Small(), False)
    (path,) = steps.glob("*.json")
    path.chmod(0o666)
    graph = check(Small(), False)
    assert any("can be written by others" in n for n in graph.notes)
    path.chmod(0o600)
    steps.chmod(0o777)
    graph = check(Small(), False)
    assert any("can be written by others" in n for n in graph.notes)


def test_nothing_is_kept_where_options_say_so(steps):
    for options in ({"reuse": "off"}, {"verify": True}, {"keep_programs": True}):
        check(Small(), False, **options)
    assert not steps.exists()


def test_what_only_this_process_knows_is_not_kept(steps):
    @torch.library.custom_op("reuse_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    gm = torch.fx.symbolic_trace(lambda x: torch.ops.reuse_test.twice(x))
    with pytest.raises(key.NoKey, match="reuse_test"):
        key.graph_key(gm, [torch.ones(2)], dspark_compile.Options())
    local = torch.fx.Graph()
    x = local.placeholder("x")
    local.output(local.call_function(check, (x,)))
    with pytest.raises(key.NoKey, match="check"):
        key.graph_key(
            torch.fx.GraphModule(nn.Module(), local), [torch.ones(2)], dspark_compile.Options()
        )


def test_constants_belong_to_the_key():
    def module(value):
        root, graph = nn.Module(), torch.fx.Graph()
        root.c = torch.full((4,), value)
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.add, (x, graph.get_attr("c"))))
        return torch.fx.GraphModule(root, graph)

    one, same, other = (
        key.graph_key(module(v), [torch.ones(4)], dspark_compile.Options()) for v in (1.0, 1.0, 2.0)
    )
    assert one == same != other


def test_the_oldest_entries_go(steps, monkeypatch):
    monkeypatch.setattr(files, "MOST", 3)
    for i in range(5):
        files.write(f"{i}", {"i": i})
    kept = [files.read(f"{i}") for i in range(5)]
    assert kept[4] == {"i": 4}
    assert sum(k is not None for k in kept) == 3


def test_a_layout_as_json_and_back():
    n, m = sympy.symbols("n m", integer=True)
    before = Layout(
        names=["a", "b"], sources=[Source("k", "text", (("p", "x"), ("i", "N")))], kernels=[0, 0],
        words=[0] * 20, inner=[(1, 8)], fixes=[(8, 0, 64)], cells=[(10, "a.b", 4, 96)],
        dynamic=[(9, 3 * n * m + n**2 - 4)],
        numbers={n: 5, m: 2}, buffers=2, arena=[(1, 0)], arena_bytes=128, draws=[], inputs=[(0, 1)],
        made=[], results=[Result(1, 0, torch.bfloat16, (2, 3), (3, 1))],
    )  # fmt: skip
    after = layout.from_data(json.loads(json.dumps(layout.to_data(before))))
    for name in vars(before):
        if name not in ("dynamic", "numbers"):
            assert getattr(after, name) == getattr(before, name), name
    values = {symbol: {5: 7, 2: 11}[i] for symbol, i in after.numbers.items()}
    assert after.dynamic[0][0] == 9
    assert after.dynamic[0][1].xreplace(values) == 3 * 77 + 49 - 4
    with pytest.raises(layout.CannotKeep, match=r"polynomial|fractions"):
        layout.to_data(Layout(**{**vars(before), "dynamic": [(9, sympy.floor(n / 2))]}))


def tiny():
    torch.manual_seed(1)
    config = tf.Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


def text(model, ids, new):
    """What generate makes, equal to transformers'; its statistics."""
    greedy = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    got, stats = dspark_compile.generate(model, ids, return_stats=True, options=ON, **greedy)
    assert torch.equal(got, model.generate(ids, **greedy))
    return stats


def begin_anew(model):
    """As a new process would."""
    free(model)
    torch._dynamo.reset()


def no_trace(*args, **kwargs):
    raise AssertionError("it was traced")


def test_generate_finds_its_step(monkeypatch):
    """The room of the cache is a symbol in what is kept."""
    model = tiny()
    short, long = torch.randint(3, 97, (1, 5)), torch.randint(3, 97, (1, 40))
    assert text(model, short, 4).path == "native"
    begin_anew(model)
    with monkeypatch.context() as patch:  # by its graph
        patch.setattr(kept_rounds, "model_key", no_key)
        assert text(model, short, 4).path == "native"
        assert dspark_compile.last_report().graphs[-1].from_cache
    begin_anew(model)
    monkeypatch.setattr(captured, "trace_whole", no_trace)  # by the model
    stats = text(model, short, 4)
    assert stats.path == "native"
    report = dspark_compile.last_report()
    assert report.summary()["attention"] == {"raised": 1, "rejected": 0}
    assert text(model, long, 240).path == "native"  # the cache grows
    other = tiny()  # another object, and other weights
    other.load_state_dict({k: v + 0.01 for k, v in other.state_dict().items()})
    assert text(other, long, 9).path == "native"
    free()


def no_key(model):
    raise key.NoKey("it is not asked for")


def test_a_step_of_another_model_is_seen_by_its_logits(monkeypatch):
    """Were the key to miss a difference, the comparison with an eager step finds it."""
    monkeypatch.setattr(kept_rounds, "model_key", lambda model: "all alike")
    model, ids = tiny(), torch.randint(3, 97, (1, 5))
    text(model, ids, 4)
    model.model.layers[0].self_attn.scaling *= 3
    begin_anew(model)
    traced, trace = [], captured.trace_whole
    monkeypatch.setattr(captured, "trace_whole", lambda *a, **k: traced.append(1) or trace(*a, **k))
    assert text(model, ids, 4).path == "native"
    assert traced
    free()


def test_the_key_of_a_model_sees_code_and_attributes(monkeypatch):
    from transformers.models.qwen3 import modeling_qwen3

    model = tiny()
    before = model_key(model)
    assert model_key(tiny()) == before
    changes = [
        (model.model.layers[0].self_attn, "scaling", 0.5),
        (model.config, "sliding_window", 8),
        (modeling_qwen3, "rotate_half", lambda x: -x),
        (modeling_qwen3.Qwen3MLP, "forward", lambda self, x: x),
        (model.model.norm, "forward", lambda x: x),
        (model.model.layers[0].mlp, "act_fn", torch.relu),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            if isinstance(owner, nn.Module) and name == "act_fn":
                patch.delitem(owner._modules, name)
            patch.setattr(owner, name, value, raising=False)
            assert model_key(model) != before, name
    assert model_key(model) == before
    assert model_key(model.bfloat16()) != before
    model.register_forward_hook(lambda *a: None)
    with pytest.raises(key.NoKey, match="hooks"):
        model_key(model)


def mixture(kind):
    torch.manual_seed(1)
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2}
    if kind == "jetmoe":  # the sizes of its experts' rows are data
        config = tf.JetMoeConfig(
            **shape, kv_channels=8, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
        )
    else:
        config = tf.Qwen3MoeConfig(
            **shape, head_dim=8, num_attention_heads=4, moe_intermediate_size=16, num_experts=8,
            num_experts_per_tok=2,
        )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["qwen3_moe", "jetmoe"])
def test_steps_with_experts_count_where_this_process_does(kind, monkeypatch):
    """What a step counts its experts' load into has another address in every process."""
    model, ids = mixture(kind), torch.randint(3, 97, (1, 5))
    assert text(model, ids, 4).path == "native"
    begin_anew(model)
    before = list(expert_load._CELLS.values())
    counted = [list(cell.numbers) for cell in before]  # by other tests too
    assert before
    monkeypatch.setattr(expert_load, "_CELLS", {})  # as in a new process
    monkeypatch.setattr(captured, "trace_whole", no_trace)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **greedy)
    with expert_load.expert_load() as load:
        assert torch.equal(dspark_compile.generate(model, ids, options=ON, **greedy), want)
        layers = load.layers()
    assert layers and all(x.calls == 7 and x.tokens == 7 for x in layers)
    assert all(int(x.tokens_per_expert.sum()) == 14 for x in layers)
    assert [list(cell.numbers) for cell in before] == counted
    free()


def test_operators_of_others_are_not_known():
    """An operator that transformers makes of a Python function is known by its code."""
    import transformers.integrations.moe  # noqa: F401 - defines it

    name = key._function(torch.ops.transformers.grouped_mm_fallback.default)
    assert name.startswith("transformers.grouped_mm_fallback") and "def " in name

    @torch.library.custom_op("dspark_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with pytest.raises(key.NoKey, match="twice"):
        key._function(torch.ops.dspark_test.twice.default)


@pytest.mark.slow
def test_another_process_finds_experts(tmp_path):
    script = """
import torch, transformers, dspark_compile
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2,
)).eval()
options = {"kernels": "cpp", "reuse": "on"}
greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
ids = torch.tensor([[5, 6, 7]])
assert torch.equal(dspark_compile.generate(model, ids, options=options, **greedy),
                   model.generate(ids, **greedy))
print("FOUND", dspark_compile.last_report().graphs[-1].from_cache)
"""
    assert twice(script, tmp_path) == ["FOUND False", "FOUND True"]


def twice(script, folder):
    """What two processes say last."""
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**__import__("os").environ, "DSPARK_CACHE_DIR": str(folder)},
        )  # fmt: skip
        said.append(done.stdout.strip().splitlines()[-1])
    return said


@pytest.mark.slow
def test_another_process_finds_it(tmp_path):
    script = """
import torch, dspark_compile
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 64, bias=False))
with torch.no_grad():
    x = torch.randn(1, 64)
    options = {"kernels": "cpp", "reuse": "on"}
    out = torch.compile(model, backend="dspark", dynamic=False, options=options)(x)
    assert torch.allclose(out, model(x), atol=1e-5)
print("FOUND", dspark_compile.last_report().graphs[-1].from_cache)
"""
    assert twice(script, tmp_path) == ["FOUND False", "FOUND True"]
