"""A whole decode step as one native call: whole models against eager, and the program itself."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers as tf

from dspark_compile.codegen.cpp import emit
from dspark_compile.codegen.cpp.layout import Result, lay_out
from dspark_compile.codegen.cpp.program import NativeProgram, Program
from dspark_compile.diagnostics import state
from dspark_compile.kernels.cpp._launch import Call
from dspark_compile.kernels.cpp.linear import linear_call
from dspark_compile.models.gpt_fast import GPT, GPTConfig

SMALL = {
    "vocab_size": 199, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD = {"vocab_size": 199, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "qwen3": lambda: tf.Qwen3Config(**SMALL, head_dim=32),
    "llama": lambda: tf.LlamaConfig(**SMALL),
    # Norms behind attention and MLP, soft caps, an embedding that is scaled, two kinds of layers.
    "gemma2": lambda: tf.Gemma2Config(**SMALL, head_dim=16, sliding_window=64),
    # Attention and MLP in parallel: one residual takes two sums.
    "gpt_neox": lambda: tf.GPTNeoXConfig(
        **OLD, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    ),
    "cohere": lambda: tf.CohereConfig(**SMALL),
    "granite": lambda: tf.GraniteConfig(**SMALL),
}  # fmt: skip


def model_of(family, dtype=torch.float32):
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model.to(dtype)


def decode(family, *, dtype=torch.float32, rows=1, batch=1, steps=3, options=()):
    """Distance of the compiled model's logits from eager's, step by step, and the report."""
    model = model_of(family, dtype)
    reference = model_of(family, dtype).float()
    reference.load_state_dict(model.state_dict())
    settings = {"kernels": "auto", "verify": True, **dict(options)}
    compiled = torch.compile(model, backend="dspark", dynamic=False, options=settings)
    caches = [tf.StaticCache(model.config, max_cache_len=48) for _ in range(3)]
    errors = []
    with torch.no_grad():
        prompt = torch.randint(3, 199, (batch, 20))
        first = compiled if "kv_cache" in settings else model
        for run, cache in zip((first, model, reference), caches):
            run(prompt, past_key_values=cache)
        for _ in range(steps):
            ids = torch.randint(3, 199, (batch, rows))
            got, eager, exact = (
                run(ids, past_key_values=cache).logits.double()
                for run, cache in zip((compiled, model, reference), caches)
            )
            scale = exact.abs().max()
            errors.append([((x - exact).abs().max() / scale).item() for x in (got, eager)])
    return errors, state.last_report()


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_a_model_is_one_native_call(family):
    errors, report = decode(family)
    assert max(mine for mine, _ in errors) < 1e-5
    (graph,) = report.graphs
    assert graph.notes[-1].startswith("one native call"), graph.notes
    assert not graph.fallbacks
    assert {site.impl for site in graph.sites if site.status == "raised"} == {"native"}
    assert all(kernel.impl == "native" for kernel in graph.kernels)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_stages(bits):
    quantization = pytest.importorskip("torchao.quantization")
    four = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
    )
    model = tf.Qwen3ForCausalLM(tf.Qwen3Config(**{**SMALL, "intermediate_size": 96}, head_dim=32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig() if bits == 8 else four)
    options = {"kernels": "auto", "fallback": "error", "verify": True}
    compiled = torch.compile(model.eval(), backend="dspark", dynamic=False, options=options)
    caches = [tf.StaticCache(model.config, max_cache_len=32) for _ in range(2)]
    prompt = torch.randint(3, 199, (1, 20))
    for cache in caches:
        model(prompt, past_key_values=cache)
    for _ in range(2):
        ids = torch.randint(3, 199, (1, 1))
        got, want = (
            run(ids, past_key_values=cache).logits
            for run, cache in zip((compiled, model), caches, strict=True)
        )
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    (graph,) = state.last_report().graphs
    assert graph.notes[-1].startswith("one native call"), graph.notes
    assert sum(f"int{bits}" in kernel.op for kernel in graph.kernels) == 2 * 5 + 1


def test_neighbours_are_taken_in():
    """Norms and residuals are part of the products, q, k and v are one product."""
    _, report = decode("qwen3", steps=1)
    names = [kernel.op for kernel in report.graphs[0].kernels]
    kinds = [n.split("_f32")[0] for n in names if not n.startswith("glue")]
    layer = ["linear", "qk_norm_rope_append", "attention", "linear", "gated_mlp"]
    assert kinds == [*layer, *layer, "linear"]
    assert sum("rms" in n for n in names) == 2 * 2 + 1  # in front of qkv, of the MLP, of lm_head


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("rows,batch", [(1, 1), (4, 1), (1, 3)])
def test_families(family, rows, batch):
    errors, report = decode(family, rows=rows, batch=batch)
    assert max(mine for mine, _ in errors) < 1e-5
    assert report.graphs[0].notes[-1].startswith("one native call"), report.graphs[0].notes


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 8])
def test_bfloat16_is_no_further_from_float32_than_eager(rows):
    errors, report = decode("qwen3", dtype=torch.bfloat16, rows=rows)
    assert report.graphs[0].notes[-1].startswith("one native call")
    mine, eager = (sum(e[i] for e in errors) for i in (0, 1))
    assert mine < 1.3 * eager


@pytest.mark.slow
def test_int8_cache():
    errors, report = decode("qwen3", options={"kv_cache": "int8"})
    assert max(mine for mine, _ in errors) < 2e-2
    assert report.graphs[-1].notes[-1].startswith("one native call")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(bits):
    """torchao's weight-only models decode as one native call too."""
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("llama")
    if bits == 8:
        config = quantization.Int8WeightOnlyConfig()
    else:
        from torchao.quantization.granularity import PerGroup

        config = quantization.IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32))
    # Sizes that are multiples of 32 only: 112 is none.
    chosen = lambda m, name: isinstance(m, torch.nn.Linear) and "self_attn" in name  # noqa: E731
    quantization.quantize_(model, config, filter_fn=chosen)
    compiled = torch.compile(
        model, backend="dspark", dynamic=False, options={"kernels": "auto", "verify": True}
    )
    caches = [tf.StaticCache(model.config, max_cache_len=16) for _ in range(2)]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.randint(3, 199, (2, 1))
            got, want = (
                run(ids, past_key_values=cache).logits
                for run, cache in zip((compiled, model), caches)
            )
            assert (got - want).abs().max() < 1e-5 * want.abs().max()
    # The first graph also makes the cache.
    notes = state.last_report().graphs[1].notes
    assert notes[-1].startswith("one native call"), notes


def test_a_weight_that_is_cast_and_turned_keeps_its_strides():
    """The result of a cast has the strides of what was cast; a product reads rows."""

    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Buffer(torch.randint(-9, 9, (24, 8), dtype=torch.int8))
            self.last = torch.nn.Linear(24, 8)

        def forward(self, x):
            weight = self.weight.T.to(x.dtype).T
            return self.last(torch.nn.functional.linear(x, weight))

    module, x = Turned().eval(), torch.randn(2, 8)
    compiled = torch.compile(module, backend="dspark", options={"kernels": "auto"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


def test_what_has_no_stage_is_said():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return torch.logcumsumexp(self.linear(x), -1)

    odd, x = Odd().eval(), torch.randn(2, 8)
    compiled = torch.compile(odd, backend="dspark", options={"kernels": "auto"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), odd(x))
    assert any("logcumsumexp" in note for note in state.last_report().graphs[0].notes)


def test_a_token_outside_of_the_vocabulary_is_an_error():
    model = model_of("llama")
    compiled = torch.compile(model, backend="dspark", dynamic=False, options={"kernels": "auto"})
    cache = tf.StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        compiled(torch.tensor([[5]]), past_key_values=cache)
        with pytest.raises(IndexError, match="outside"):
            compiled(torch.tensor([[199]]), past_key_values=cache)
        assert compiled(torch.tensor([[5]]), past_key_values=cache).logits.isfinite().all()


class Indexed(torch.nn.Module):
    """Reads tables by integer tensors in several places."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.register_buffer("table", torch.randn(6, 5, 8))
        self.register_buffer("large", torch.randn(64, 3, 300).transpose(0, 1))

    def forward(self, x, i, j):
        x = self.linear(x)
        return (
            x + self.table[i, 0], self.table[:, j], self.table[i, :, j], self.table[i, j[:1]],
            self.table[:, i, j].neg(), self.table.index_select(-1, i),
            self.large[:, i[:, None] * 7],
        )  # fmt: skip


def test_indices_are_stages():
    module = Indexed().eval()
    x, i, j = torch.randn(2, 8), torch.tensor([3, -2]), torch.tensor([4, 1], dtype=torch.int32)
    i[1] = 4
    compiled = torch.compile(module, backend="dspark", options={"kernels": "auto"}, dynamic=False)
    with torch.no_grad():
        for turn in range(3):
            got, want = compiled(x, i, j), module(x, i, j)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b)
            i, j = (i + 1 + turn) % 5, -1 - j
        notes = state.last_report().graphs[0].notes
        assert any("one native call" in n for n in notes), notes
        with pytest.raises(IndexError, match="outside"):
            compiled(x, torch.tensor([0, 6]), j)
        with pytest.raises(IndexError, match="outside"):  # index_select counts from 0
            compiled(x, torch.tensor([0, -1]), j)
        torch.testing.assert_close(compiled(x, i, j)[0], module(x, i, j)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpolation_and_products_that_are_added(dtype):
    linear = torch.nn.Linear(8, 8).to(dtype)

    def step(x, y, weight):
        x = linear(x)
        near, far = torch.lerp(x, y, weight), torch.lerp(x, y, 0.7)
        return near, far, torch.addcmul(x, y, weight, value=0.3)

    args = [torch.randn(2, 8).to(dtype), torch.randn(2, 8).to(dtype), torch.rand(8).to(dtype)]
    compiled = torch.compile(step, backend="dspark", options={"kernels": "auto"}, dynamic=False)
    with torch.no_grad():
        for got, want in zip(compiled(*args), step(*args), strict=True):
            torch.testing.assert_close(got, want)
    notes = state.last_report().graphs[0].notes
    assert any("one native call" in n for n in notes), notes


def test_rows_of_a_cache_that_grows_are_read():
    """One program for every room; what lies outside of it is an error."""
    linear = torch.nn.Linear(8, 8)

    def step(cache, x, at, back):
        new = linear(x).view(1, 1, -1, 16)
        torch.ops.dspark.cache_append_(cache, new, at)
        return linear(cache.index_select(2, back).reshape(-1, 2, 8) + 1)

    compiled = torch.compile(step, backend="dspark", options={"kernels": "auto"})
    with torch.no_grad():
        for size in (12, 20, 33):
            cache = torch.randn(1, 1, size, 16)
            torch._dynamo.mark_dynamic(cache, 2)
            other, x = cache.clone(), torch.randn(1, 2, 8)
            at, back = torch.tensor([size - 1]), torch.tensor([size - 1, 0, size - 2])
            torch.testing.assert_close(compiled(cache, x, at, back), step(other, x, at, back))
            torch.testing.assert_close(cache, other)
            for outside in (size, -1):
                with pytest.raises(IndexError, match="outside"):
                    compiled(cache, x, at, torch.tensor([0, outside, 1]))
        assert len(state.last_report().graphs) == 1
        notes = state.last_report().graphs[0].notes
        assert any("one native call" in n for n in notes), notes


def test_gpt_fast_is_one_native_call():
    torch.manual_seed(0)
    config = GPTConfig(vocab=64, layers=2, width=64, heads=4, kv_heads=2, hidden=96)
    model, plain = GPT(config).eval(), GPT(config).eval()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="dspark", dynamic=False, options={"kernels": "auto"})
    with torch.no_grad():
        for m in (model, plain):
            m.setup_caches(1, 32)
            m(torch.tensor([[5, 9, 2]]), torch.arange(3))
        for step in range(3, 6):
            ids, where = torch.tensor([[7 + step]]), torch.tensor([step])
            torch.testing.assert_close(compiled(ids, where), plain(ids, where))
    assert any("one native call" in n for n in state.last_report().graphs[-1].notes)


# ------------------------------------------------------------------------------- the program


def chain(count: int, size: int = 48):
    """x -> W1 x -> W2 W1 x ..., every product a stage."""
    weights = [torch.randn(size, size) / size**0.5 for _ in range(count)]
    x = torch.randn(1, size)
    program = Program()
    for number, tensor in enumerate([x, *weights]):
        program.add_input(tensor, number)
    now = x
    for i, weight in enumerate(weights):
        out = torch.empty(1, size)
        program.add(linear_call(now, [(weight, None, out)]), f"product {i}")
        now = out
    program.keep(now)
    place = program.place(now)
    result = Result(place.buffer, place.offset, torch.float32, (1, size), (size, 1))
    return NativeProgram(lay_out(program, [result], {})), x, weights


def test_a_chain_shares_its_memory():
    native, x, weights = chain(7)
    want = x
    for weight in weights:
        want = want @ weight.T
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        torch.testing.assert_close(native([x, *weights])[0], want)
    # Two intermediate results live at a time.
    assert native.arena_bytes == 2 * 192


def test_inputs_may_move_between_calls():
    native, x, weights = chain(3)
    first = native([x, *weights])[0].clone()
    moved = [w.clone() for w in weights]
    for w in weights:
        w.zero_()
    torch.testing.assert_close(native([x.clone(), *moved])[0], first)


def test_threads_may_share_a_program():
    native, x, weights = chain(5)
    inputs = [torch.randn_like(x) for _ in range(8)]
    want = [native([i, *weights])[0] for i in inputs]
    wrong = []

    def work(which):
        for _ in range(50):
            if not torch.equal(native([inputs[which], *weights])[0], want[which]):
                wrong.append(which)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_failing_stage_stops_the_program():
    touched = torch.zeros(1)
    fails = emit.source("fails", "A test.", "parallel.h", ["p x"], "return 3;")
    sets = emit.source("sets", "A test.", "parallel.h", ["p x"], "*(float*)x = 1; return 0;")
    program = Program()
    program.add_input(touched, 0)
    first = emit.source("passes", "A test.", "parallel.h", ["p x"], "return 0;")
    program.add(Call(first, (touched,), 0, (touched,)), "passes")
    program.add(Call(fails, (touched,), 0, (touched,)), "fails")
    program.add(Call(sets, (touched,), 0, (touched,)), "sets")
    native = NativeProgram(lay_out(program, [], {}))
    for _ in range(2000):  # one thread may leave the stage before when the other fails
        with pytest.raises(IndexError):
            native([touched])
    assert touched.item() == 0


def test_a_copy_made_while_planning_is_refused():
    from dspark_compile.codegen.cpp.program import PlanError

    program, x = Program(), torch.randn(4, 4)
    program.add_input(x, 0)
    out = torch.empty(4, 4)
    with pytest.raises(PlanError, match="copy"):
        program.add(linear_call(x.T.contiguous(), [(x, None, out)]), "product")


def test_a_bound_program_whose_memory_is_replaced():
    """Another number of threads wants other memory: what a call packed is packed again."""
    native, x, weights = chain(4)
    first, second = native.bind([x, *weights]), native.bind([x.clone(), *weights])
    expected = first()[0].clone()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second.stage_seconds()
        first.stage_seconds()  # enters, and packs nothing
        assert torch.allclose(first()[0], expected, rtol=1e-5, atol=1e-5)
        assert 0 < first.took < 10
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(second()[0], expected, rtol=1e-5, atol=1e-5)
