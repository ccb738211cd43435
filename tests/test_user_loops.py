"""Loops of decode steps in user code: one step is compiled, and the text is that of eager code."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import dspark_compile
from dspark_compile.models.gpt_fast import GPT

QUICK = {"inner": "eager"}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    for p in model.parameters():
        p.data.mul_(4)  # so that the text does not repeat itself
    return model


def sharp_gpt(length: int = 128) -> GPT:
    torch.manual_seed(2)
    model = GPT.tiny(length=length)
    for p in model.parameters():
        p.data.mul_(2)
    return model


def filled(model: LlamaForCausalLM, room: int = 128) -> tuple[StaticCache, torch.Tensor]:
    """A static cache that holds a prompt, and the token behind it."""
    cache = StaticCache(config=model.config, max_cache_len=room)
    logits = model(torch.tensor([[5, 17, 3, 60]]), past_key_values=cache).logits
    return cache, logits[:, -1:].argmax(-1)


def check(function, *args, options=QUICK, loops=1, fullgraph=True):
    """Run eagerly and compiled, on copies; compare results and what is left in caches."""
    theirs, ours = copy.deepcopy(args), copy.deepcopy(args)
    with torch.no_grad():
        want = function(*theirs)
        compiled = torch.compile(function, backend="dspark", fullgraph=fullgraph, options=options)
        got = compiled(*ours)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    report = dspark_compile.last_report()
    assert sum(g.ops.get("decode_loop", 0) for g in report.graphs) == loops, notes(report)
    assert not report.fallbacks
    return report


def tensors(args):
    for x in args:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, torch.nn.Module):
            yield from x.buffers()
        elif isinstance(x, StaticCache):
            for layer in x.layers:
                yield from (layer.keys, layer.values, layer.cumulative_length)


def notes(report) -> str:
    return "\n".join(n for g in report.graphs for n in g.notes)


def hf_greedy(model, cache, tok, n):
    out = []
    for _ in range(n):
        outputs = model(tok, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        tok = outputs.logits[:, -1].argmax(-1, keepdim=True)
        out.append(tok)
    return torch.cat(out, dim=1)


def own_greedy(model, tok, pos, n):
    out = []
    for i in range(n):
        logits = model(tok, torch.tensor([pos + i]))
        tok = logits[:, -1:].argmax(-1)
        out.append(tok)
    return torch.cat(out, 1), logits


@torch.no_grad()
def test_hugging_face_static_cache():
    model = llama()
    cache, tok = filled(model)
    report = check(hf_greedy, model, cache, tok, 64)
    assert "64 steps, one compiled once" in notes(report)


def test_own_cache_in_buffers_and_a_python_position():
    report = check(own_greedy, sharp_gpt(), torch.tensor([[3]]), 2, 64)
    assert len(report.graphs) == 1


@torch.no_grad()
def test_native_loop(monkeypatch):
    monkeypatch.delenv("DSPARK_KERNELS", raising=False)
    model = llama()
    cache, tok = filled(model)
    report = check(hf_greedy, model, cache, tok, 64, options={})
    assert "a native loop" in notes(report)


# ------------------------------------------------------------------------------ forms of loops


class Own(torch.nn.Module):
    """One layer of attention over a cache of the caller's, written at a Python position."""

    def __init__(self, how: str = "slice") -> None:
        super().__init__()
        torch.manual_seed(3)
        self.how = how
        self.embed = torch.nn.Embedding(61, 16)
        self.qkv = torch.nn.Linear(16, 48)
        self.out = torch.nn.Linear(16, 61)
        for p in self.parameters():
            p.data.mul_(2)

    def forward(self, tok, k_cache, v_cache, pos):
        x = self.embed(tok)
        q, k, v = (t.unsqueeze(1) for t in self.qkv(x).chunk(3, -1))  # [B, 1, 1, 16]
        if self.how == "slice":
            k_cache[:, :, pos : pos + 1] = k
            v_cache[:, :, pos : pos + 1] = v
        elif self.how == "row":
            k_cache[:, :, pos] = k[:, :, 0]
            v_cache[:, :, pos] = v[:, :, 0]
        else:
            at = torch.arange(1) + pos if self.how == "tensor" else torch.arange(pos, pos + 1)
            k_cache.index_copy_(2, at, k)
            v_cache.index_copy_(2, at, v)
        allowed = (torch.arange(k_cache.shape[2]) <= pos)[None]
        y = torch.nn.functional.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=allowed)
        return self.out(x + y[:, 0])


def caches(rows: int = 2, room: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, 1, room, 16), torch.zeros(rows, 1, room, 16)


@pytest.mark.parametrize("how", ["slice", "row", "arange"])
def test_own_cache_written_at_a_python_position(how):
    def decode(model, tok, k, v, pos, n):
        text = torch.zeros(tok.shape[0], n, dtype=torch.long)
        ids = tok
        for i in range(n):
            logits = model(tok, k, v, pos)
            tok = logits[:, -1:].argmax(-1)
            text[:, i] = tok[:, 0]
            ids = torch.cat([ids, tok], dim=-1)
            pos += 1
        return text, ids, pos, i, logits

    check(decode, Own(how).eval(), torch.tensor([[3], [4]]), *caches(), 2, 30)


def test_what_was_before_a_step_and_several_lists():
    def decode(model, tok, k, v, n):
        before, text, sums = tok, [], []
        for i in range(3, n):
            logits = model(tok, k, v, i)
            text.append(before)
            text.append(tok)
            sums.append(logits.sum((1, 2)))
            before = tok
            tok = (logits[:, -1:].argmax(-1) + before) % 61
        return torch.cat(text, 1), torch.stack(sums), before, tok

    check(decode, Own().eval(), torch.tensor([[3], [4]]), *caches(), 30)


def test_values_change_places():
    def decode(model, a, b, k, v, n):
        for i in range(n):
            c = model(a, k, v, i)[:, -1:].argmax(-1)
            a, b = b, (a + c) % 61
        return a, b

    check(decode, Own().eval(), torch.tensor([[3], [4]]), torch.tensor([[5], [9]]), *caches(), 12)


def test_the_first_step_is_another():
    def decode(model, prompt, cache, n):
        tok, out = prompt, []
        for _ in range(n):
            logits = model(tok, past_key_values=cache).logits
            tok = logits[:, -1:].argmax(-1)
            out.append(tok)
        return torch.cat(out, 1)

    model = llama()
    cache = StaticCache(config=model.config, max_cache_len=64)
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    report = check(decode, model, torch.tensor([[5, 17, 3]]), cache, 20)
    assert "19 steps" in notes(report)


def test_a_prompt_and_two_loops_in_one_function():
    def decode(model, ids, k, v, n):
        for i in range(4):
            logits = model(ids[:, i : i + 1], k, v, i)
        tok = logits[:, -1:].argmax(-1)
        first = []
        for i in range(n):
            tok = model(tok, k, v, i + 4)[:, -1:].argmax(-1)
            first.append(tok)
        tok = (tok + 1) % 61
        second = []
        for i in range(n):
            tok = model(tok, k, v, i + n + 4)[:, -1:].argmax(-1)
            second.append(tok)
        return torch.cat([*first, *second], 1)

    ids = torch.randint(0, 61, (2, 4))
    check(decode, Own().eval(), ids, *caches(), 8, loops=3)


def test_a_loop_in_a_function_that_is_called():
    def outer(model, tok, k, v, n):
        return inner_greedy(model, tok * 1, k, v, n) + 1

    check(outer, Own().eval(), torch.tensor([[3], [4]]), *caches(), 12)


def inner_greedy(model, tok, k, v, n):
    out = []
    for i in range(n):
        tok = model(tok, k, v, i)[:, -1:].argmax(-1)
        out.append(tok)
    return torch.cat(out, 1)


def test_steps_do_not_cost_compile_time():
    """Graphs, their nodes and what is traced are the same for 8 steps and for 100."""
    seen = []
    for n in (8, 100):
        torch._dynamo.reset()
        report = check(inner_greedy, Own().eval(), torch.tensor([[3], [4]]), *caches(room=128), n)
        seen.append([(g.num_nodes_before, g.num_nodes_after, g.ops) for g in report.graphs])
    assert seen[0] == seen[1]


# ---------------------------------------------------------------------------- torch.while_loop


def test_while_loop_with_an_early_exit():
    def decode(model, tok, k, v, limit, eos=-1):
        def condition(i, tok, text):
            return (i < limit) & (tok != eos).any()

        def body(i, tok, text):
            tok = model(tok, k, v, i)[:, -1:].argmax(-1)
            return i + 1, tok, text.index_copy(1, i.reshape(1), tok)

        text = torch.zeros(2, 30, dtype=torch.long)
        return torch.while_loop(condition, body, (torch.tensor(0), tok, text))

    model = Own("tensor").eval()
    args = (torch.tensor([[3], [3]]), *caches())
    with torch.no_grad():
        _, _, text = decode(model, *copy.deepcopy(args), torch.tensor(30))
    eos = int(text[0, 20])
    for limit, stop in ((30, -1), (5, -1), (0, -1), (30, eos)):
        report = check(decode, model, *args, torch.tensor(limit), stop)
        assert "as many steps as its condition has" in notes(report)
    with torch.no_grad():
        assert int(decode(model, *copy.deepcopy(args), torch.tensor(30), eos)[0]) <= 21


# ------------------------------------------------------------------------------------ sampling


def sampled(model, cache, tok, n):
    out = []
    for _ in range(n):
        p = (model(tok, past_key_values=cache).logits[:, -1] / 4).softmax(-1)
        tok = torch.multinomial(p, 1)
        out.append(tok)
    return torch.cat(out, 1)


@torch.no_grad()
def test_sampling_draws_what_eager_code_draws():
    model = llama()
    cache, tok = filled(model)
    mine = copy.deepcopy(cache)
    compiled = torch.compile(sampled, backend="dspark", fullgraph=True, options=QUICK)
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(compiled(model, copy.deepcopy(mine), tok, 40))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    torch.manual_seed(0)
    assert torch.equal(sampled(model, cache, tok, 40), texts[0])
    assert "40 steps, one compiled once" in notes(dspark_compile.last_report())


# ------------------------------------------------------------------------- loops that are refused


def refused(function, *args, because: str, fullgraph=True):
    report = check(function, *args, loops=0, fullgraph=fullgraph)
    assert because in notes(report), notes(report)


def test_steps_that_differ():
    def alternate(model, tok, k, v, n):
        for i in range(n):
            tok = model(tok, k, v, i)[:, -1:].argmax(-1)
            if i % 2:
                tok = tok + 1
        return tok

    def grows(model, tok, k, v, n):
        for i in range(n):
            seen = k[:, :, : i + 1].sum().long()
            tok = (model(tok, k, v, i)[:, -1:].argmax(-1) + seen) % 61
        return tok

    args = (Own().eval(), torch.tensor([[3], [4]]), *caches(), 5)
    refused(alternate, *args, because="its steps depend on a number")
    refused(grows, *args, because="stays as it is: it decides how long a slice is")


def test_lists_that_are_read_and_layers():
    def looks_back(model, tok, k, v, n):
        out = [tok]
        for i in range(n):
            out.append(model(out[-1], k, v, i)[:, -1:].argmax(-1))
        return torch.cat(out, 1)

    def layers(model, x, n):
        for i in range(n):
            x = model[i](x)
        return x

    refused(looks_back, Own().eval(), torch.tensor([[3], [4]]), *caches(), 5, because="out")
    stack = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
    check(layers, stack, torch.randn(2, 8), 6, loops=0)


def test_one_weight_many_times_is_no_decoding():
    def weight_tied(layer, x, n):
        for _ in range(n):
            x = layer(x).tanh()
        return x

    refused(weight_tied, torch.nn.Linear(8, 8), torch.randn(2, 8), 6, because="chooses no token")


def test_break_and_python_effects():
    def breaks(model, tok, k, v, n):
        for i in range(n):
            tok = model(tok, k, v, i)[:, -1:].argmax(-1)
            if i == 2:
                break
        return tok

    def effects(model, tok, k, v, n):
        model.seen = []
        for i in range(n):
            tok = model(tok, k, v, i)[:, -1:].argmax(-1)
            model.seen.append(tok)
        return tok, torch.cat(model.seen, 1)

    args = (Own().eval(), torch.tensor([[3], [4]]), *caches(), 5)
    refused(breaks, *args, because="it may break off")
    refused(effects, *args, because="stays as it is")


def test_gradients_are_not_for_loops():
    model, (k, v) = Own(), caches()
    compiled = torch.compile(inner_greedy, backend="dspark", options=QUICK)
    text = compiled(model, torch.tensor([[3], [4]]), k, v, 5)
    assert text.shape == (2, 5)
    assert "gradients are needed" in notes(dspark_compile.last_report())


def test_another_position_and_another_number_of_steps():
    """Dynamo takes a number that changed between calls as a symbol."""

    def decode(model, tok, k, v, pos, n):
        for _ in range(n):
            tok = model(tok, k, v, pos)[:, -1:].argmax(-1)
            pos = pos + 1
        return tok, pos

    model, tok, (k, v) = Own().eval(), torch.tensor([[3], [4]]), caches()
    compiled = torch.compile(decode, backend="dspark", fullgraph=True, options=QUICK)
    with torch.no_grad():
        for pos, n in ((0, 6), (6, 6), (12, 6), (18, 9), (27, 5)):
            want = decode(model, tok, k.clone(), v.clone(), pos, n)
            got = compiled(model, tok, k, v, pos, n)
            assert torch.equal(got[0], want[0]) and got[1] == want[1]
            tok = got[0]
    report = dspark_compile.last_report()
    assert all("one compiled once" in notes(report) for g in report.graphs), notes(report)
    assert "stays as it is" not in notes(report), notes(report)
    assert len(report.graphs) <= 4, notes(report)


@torch.no_grad()
def test_a_name_of_the_body_that_is_the_loops_variable_too():
    """``v, _ = logits.topk(k)`` under ``for _ in range(n)``."""
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(4))

    def decode(x, n):
        out = []
        for _ in range(n):
            scores = x @ weights
            best, _ = scores.topk(3, dim=-1)
            scores = scores.masked_fill(scores < best[:, [-1]], -1.0)
            chosen = scores.argmax(-1, keepdim=True)
            x = torch.nn.functional.one_hot(chosen[:, 0], 40).float() + scores / 40
            out.append(chosen)
        return torch.cat(out, 1), _

    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    want = decode(x, 9)
    got = torch.compile(decode, backend="dspark", fullgraph=True, dynamic=False)(x, 9)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    notes = [n for g in dspark_compile.last_report().graphs for n in g.notes]
    assert any("decode_loop, 9 steps" in n for n in notes), notes


@torch.no_grad()
def test_a_loops_number_that_the_body_changes():
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(4))

    def decode(x, n):
        out = []
        for i in range(n):
            i = i + 2
            x = (x @ weights).softmax(-1) * i
            out.append(x.argmax(-1))
        return torch.stack(out)

    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    got = torch.compile(decode, backend="dspark", fullgraph=True, dynamic=False)(x, 5)
    assert torch.equal(got, decode(x, 5))
    notes = [n for g in dspark_compile.last_report().graphs for n in g.notes]
    assert any("it assigns its own variable i" in n for n in notes), notes


@torch.no_grad()
def test_a_loop_that_data_ends_says_why_it_is_none():
    """Not in terms of loops over experts, which break likewise."""
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(4))

    def decode(x, n):
        out = []
        for _ in range(n):
            x = (x @ weights).softmax(-1)
            out.append(x.argmax(-1))
            if (out[-1] == 99).all():
                break
        return torch.stack(out)

    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    got = torch.compile(decode, backend="dspark", dynamic=False)(x, 5)
    assert torch.equal(got, decode(x, 5))
    (said,) = dspark_compile.last_report().graph_breaks
    assert "it may break off: torch.while_loop has a condition" in said, said
    assert "expert" not in said


@pytest.mark.parametrize("how", ["while", "enumerate", "list"])
@torch.no_grad()
def test_loops_of_other_kinds_are_unrolled_and_named(how):
    weights = torch.randn(40, 40, generator=torch.Generator().manual_seed(4))

    def step(x):
        x = (x @ weights).softmax(-1)
        return x, x.argmax(-1)

    def decode(x, n):
        out, i, all_x = [], 0, [x]
        if how == "while":
            while i < n:
                x, token = step(x)
                out.append(token)
                i += 1
        elif how == "enumerate":
            for _, _ in enumerate(range(n)):
                x, token = step(x)
                out.append(token)
        else:
            for _ in range(n):
                all_x.append(step(all_x[-1])[0])
            out = [x.argmax(-1) for x in all_x]
        return torch.stack(out)

    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(5))
    got = torch.compile(decode, backend="dspark", fullgraph=True, dynamic=False)(x, 5)
    assert torch.equal(got, decode(x, 5))
    (graph,) = dspark_compile.last_report().graphs
    said = [n for n in graph.notes if "in a loop that is not taken as one step" in n]
    assert said and "in step: return x, x.argmax(-1): traced 5 times" in said[0], graph.notes
