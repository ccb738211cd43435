"""Routers and experts, however written, become the dialect's two ops, and stay exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dspark_compile
from dspark_compile.ops import OPS

OPTIONS = {"inner": "eager", "verify": True}
SETTINGS = {"hidden": 32, "inner": 48, "experts": 5, "k": 2}


def ops_of(report):
    counts: dict[str, int] = {}
    for graph in report.graphs:
        for name, number in graph.ops.items():
            counts[name] = counts.get(name, 0) + number
    return counts


def compiled(model, *args, **options):
    """(result, eager result, report) of ``model`` as one graph."""
    with torch.no_grad():
        want = model(*args)
        got = torch.compile(
            model, backend="dspark", fullgraph=True, options={**OPTIONS, **options}
        )(*args)
    return got, want, dspark_compile.last_report()


def close(got, want, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-6)


# -- Hugging Face ---------------------------------------------------------------------------------

FAMILIES = [
    ("qwen3_moe", "grouped_mm"),
    ("gpt_oss", "batched_mm"),
    ("deepseek_v3", "eager"),
    ("llama4_text", None),
    ("phimoe", None),
]
MORE = [
    (family, how)
    for family in ("mixtral", "olmoe", "granitemoe", "glm4_moe", "qwen2_moe", "deepseek_v2")
    for how in ("grouped_mm", "batched_mm", "eager")
] + [("gpt_oss", "eager"), ("aria_text", None)]


@pytest.mark.parametrize(
    ("family", "experts"),
    [*FAMILIES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_hugging_face(family, experts):
    pytest.importorskip("transformers")
    from tests.zoo import families

    model = families.build(family, torch.float32).eval()
    if experts:
        model.set_experts_implementation(experts)
    ids = families.tokens(family, 7)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        call = torch.compile(model, backend="dspark", fullgraph=True, options=OPTIONS)
        got = call(input_ids=ids, use_cache=False).logits
    close(got, want)
    report = dspark_compile.last_report()
    ops = ops_of(report)
    assert ops["moe_experts"] >= 1 and ops["moe_router"] == ops["moe_experts"]
    assert report.summary()["experts"] == {"raised": ops["moe_experts"], "rejected": 0}
    assert len(report.graphs) == 1


@pytest.mark.slow
def test_eager_experts_stay_eager_elsewhere():
    """Only graphs of this back end are traced with other experts."""
    transformers = pytest.importorskip("transformers")
    from tests.zoo import families

    torch.compile(nn.Linear(2, 2), backend="dspark")  # the registry has been taught
    model = families.build("mixtral", torch.float32).eval()
    model.set_experts_implementation("eager")
    ids = families.tokens("mixtral", 5)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        got = torch.compile(model, backend=count)(input_ids=ids, use_cache=False).logits
    close(got, want)
    assert len(graphs) > 1  # the loop breaks other back ends' graphs, as it did before
    assert transformers is not None


def test_experts_of_a_shard():
    """Expert-parallel code gives other ranks' experts the number of its own, and a weight of 0."""
    pytest.importorskip("transformers")
    from tests.zoo import families

    for how in ("grouped_mm", "batched_mm"):
        torch._dynamo.reset()
        model = families.build("mixtral", torch.float32).eval()
        model.set_experts_implementation(how)
        experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
        experts._is_expert_parallel = True
        count = experts.num_experts
        x = torch.randn(6, experts.gate_up_proj.shape[-1])
        index = torch.randint(0, count + 1, (6, 2))
        index[0] = count  # nothing of this token is here
        weight = torch.rand(6, 2).masked_fill(index == count, 0.0)
        got, want, report = compiled(experts, x, index, weight)
        close(got, want)
        assert ops_of(report)["moe_experts"] == 1, report.rejections


# -- user code ------------------------------------------------------------------------------------


class Expert(nn.Module):
    def __init__(self, hidden, inner, bias=False):
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=bias)
        self.w3 = nn.Linear(hidden, inner, bias=bias)
        self.w2 = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Loop(nn.Module):
    """A Mixtral block as transformers 4 and many others write it."""

    def __init__(self, style, hidden=32, inner=48, experts=5, k=2, bias=False):
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner, bias) for _ in range(experts))
        self.style, self.k = style, k

    def forward(self, x):
        weight, choice = torch.topk(F.softmax(self.gate(x), dim=1, dtype=torch.float), self.k)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        hot = F.one_hot(choice, num_classes=len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            mask = choice == number
            if self.style == "one_hot":
                slot, token = torch.where(hot[number])
                part = expert(x[None, token].reshape(-1, x.shape[-1]))
                out.index_add_(0, token, part * weight[token, slot, None])
            elif self.style == "where":
                token, slot = torch.where(mask)
                out[token] += weight[token, slot, None] * expert(x[token])
            elif self.style == "mask":
                token = mask.any(-1)
                out[token] += torch.where(mask, weight, 0).sum(-1)[token, None] * expert(x[token])
            else:
                out = out + expert(x) * (weight * mask).sum(-1, keepdim=True)
        return out


@pytest.mark.parametrize("style", ["one_hot", "where", "mask", "all"])
def test_loops(style):
    model = Loop(style, bias=style == "where").eval()
    got, want, report = compiled(model, torch.randn(7, 32))
    close(got, want)
    ops = ops_of(report)
    assert ops["moe_experts"] == ops["moe_router"] == 1
    assert not {"gated_mlp", "mlp"} & set(ops)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_experts_stay_right(bits):
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    model = Loop("all", hidden=64, inner=96).eval()
    config = torchao.Int8WeightOnlyConfig()
    if bits == 4:
        config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    torchao.quantize_(model.experts, config)
    got, want, report = compiled(model, torch.randn(7, 64))
    close(got, want)
    assert "moe_experts" not in ops_of(report)
    assert any("quantised" in r.condition for r in report.rejections if r.kind == "experts")


@pytest.mark.slow
def test_a_quantised_stack_behind_the_eager_loop():
    """The loop runs with torchao's int8 stacks, grouped products do not: they are dequantised."""
    torchao = pytest.importorskip("torchao.quantization")
    from tests.zoo import families

    model = families.build("qwen3_moe")
    model.set_experts_implementation("eager")
    config = torchao.Int8WeightOnlyConfig(version=2)
    names = ("re:.*experts.gate_up_proj", "re:.*experts.down_proj")
    torchao.quantize_(model, torchao.FqnToConfig(dict.fromkeys(names, config)), filter_fn=None)
    ids = families.tokens("qwen3_moe", 6, batch=1)
    got, want, _ = compiled(model, ids)
    close(got.logits, want.logits)


def test_a_loop_with_a_gap_is_left_alone():
    class Gap(Loop):
        def forward(self, x):
            weight, choice = torch.topk(F.softmax(self.gate(x), dim=1), self.k)
            out = torch.zeros_like(x)
            for number in (0, 2, 3):
                token, slot = torch.where(choice == number)
                out[token] += weight[token, slot, None] * self.experts[number](x[token])
            return out

    got, want, report = compiled(Gap("").eval(), torch.randn(7, 32))
    close(got, want)
    assert "moe_experts" not in ops_of(report)
    reasons = [r.condition for r in report.rejections if r.kind == "experts"]
    assert any("without a gap" in r for r in reasons), reasons


def test_another_experts_weights_are_noticed():
    """Each expert's rows meet another expert's weights: no mixture of the dialect's."""

    class Crossed(Loop):
        def forward(self, x):
            weight, choice = torch.topk(F.softmax(self.gate(x), dim=1), self.k)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                token, _ = torch.where(choice == number)
                slot = torch.where(choice == (number + 1) % 5)[1][: token.shape[0]]
                if slot.shape[0] == token.shape[0]:
                    pass
                out.index_add_(0, token, expert(x[token]) * weight[token, 0, None])
            return out

    model = Crossed("").eval()
    x = torch.randn(7, 32)
    with torch.no_grad():
        want = model(x)
        got = torch.compile(model, backend="dspark", options={"inner": "eager"})(x)
    close(got, want)


# -- routers --------------------------------------------------------------------------------------


def grouped_sigmoid(logits, bias):
    scores = logits.sigmoid()
    choice = (scores + bias).view(-1, 4, 2)
    best = choice.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1, sorted=False)[1]
    mask = torch.zeros(logits.shape[0], 4).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 4, 2)
    choice = choice.masked_fill(~mask.bool(), 0.0).reshape(-1, 8)
    index = choice.topk(3, dim=-1, sorted=False)[1]
    weight = scores.gather(1, index)
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * 2.5, index


def softmax_all(logits, bias):
    weight, index = logits.softmax(-1).topk(3, -1)
    return weight, index


def softmax_renormalised(logits, bias):
    weight, index = logits.softmax(-1).topk(3, -1)
    return weight / weight.sum(-1, keepdim=True), index


def softmax_chosen(logits, bias):
    weight, index = logits.topk(3, -1)
    return weight.softmax(-1), index


def exponentials(logits, bias):
    e = (logits - logits.amax(-1, keepdim=True)).exp()
    weight, index = e.topk(3, -1)
    return weight / weight.sum(-1, keepdim=True), index


def sorted_scores(logits, bias):
    order = logits.sort(-1, descending=True)
    return 0.5 * order.values[:, :3].sigmoid(), order.indices[:, :3]


ROUTERS = {
    "deepseek": (grouped_sigmoid, {"scoring": "sigmoid", "groups": 4, "group_score": "top2"}),
    "softmax": (softmax_all, {"scoring": "softmax", "normalise": "none"}),
    "renormalised": (softmax_renormalised, {"normalise": "sum"}),
    "gpt_oss": (softmax_chosen, {}),
    "exponentials": (exponentials, {}),
    "sort": (sorted_scores, {"scoring": "sigmoid"}),
}


class Routed(nn.Module):
    def __init__(self, route):
        super().__init__()
        self.route = route
        self.gate = nn.Parameter(torch.randn(8, 32) * 0.5)
        self.bias = nn.Parameter(torch.randn(8) * 0.2)
        self.up = nn.Parameter(torch.randn(8, 96, 32) * 0.2)
        self.down = nn.Parameter(torch.randn(8, 32, 48) * 0.2)

    def forward(self, x):
        weight, index = self.route(F.linear(x, self.gate), self.bias)
        flat = index.reshape(-1)
        rows = x.repeat_interleave(index.shape[-1], 0)
        gate, up = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        rows = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (rows * weight.reshape(-1, 1)).view(len(x), -1, 32).sum(1)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name):
    route, expected = ROUTERS[name]
    options = {"keep_programs": True}
    got, want, report = compiled(Routed(route).eval(), torch.randn(9, 32), **options)
    close(got, want)
    assert ops_of(report)["moe_router"] == 1, report.rejections
    program = report.graphs[-1].programs["after raise_moe_router"]
    line = next(line for line in program.splitlines() if "moe_router" in line)
    assert all(str(value) in line for value in expected.values()), line


def test_a_router_that_asks_which_logits_are_close(monkeypatch):
    # One token at a time: some of the logits that the rewrite tries must lie within 1 %.
    pytest.importorskip("transformers")
    from dspark_compile.passes import raise_moe_router
    from tests.zoo import families

    seen, recognise = [], raise_moe_router.recognise
    monkeypatch.setattr(
        raise_moe_router, "recognise", lambda found: seen.append(recognise(found)) or seen[-1]
    )
    model = families.build("phimoe").eval()
    model.config.use_cache = False
    ids = torch.tensor([[7]])
    with torch.no_grad():
        step = torch.compile(model, backend="dspark", options={"inner": "eager"}, dynamic=False)
        close(step(ids).logits, model(ids).logits)
    expected = model.config.router_jitter_noise
    assert seen and all(s["eps"] == pytest.approx(expected) for s in seen)


def test_a_router_of_another_kind_is_left_alone():
    def odd(logits, bias):
        weight, index = (logits.softmax(-1) ** 2).topk(3, -1)
        return weight, index

    got, want, report = compiled(Routed(odd).eval(), torch.randn(9, 32))
    close(got, want)
    ops = ops_of(report)
    assert "moe_router" not in ops and ops["moe_experts"] == 1
    assert any(r.pass_name == "raise_moe_router" for r in report.rejections)


def test_activations_with_other_numbers():
    """The bounds are the program's, not a family's."""

    class Bounded(Routed):
        def forward(self, x):
            weight, index = self.route(F.linear(x, self.gate), self.bias)
            flat = index.reshape(-1)
            rows = x.repeat_interleave(index.shape[-1], 0)
            both = torch.bmm(self.up[flat], rows.unsqueeze(-1)).squeeze(-1)
            up, gate = both[:, ::2].clamp(-0.75, 0.5), both[:, 1::2].clamp(max=0.25)
            rows = gate * torch.sigmoid(gate * 1.25) * (up + 0.5)
            rows = torch.bmm(self.down[flat], rows.unsqueeze(-1)).squeeze(-1)
            return (rows * weight.reshape(-1, 1)).view(len(x), -1, 32).sum(1)

    got, want, report = compiled(Bounded(softmax_all).eval(), torch.randn(9, 32))
    close(got, want)
    assert ops_of(report)["moe_experts"] == 1, report.rejections


# -- the ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_edges(tokens):
    """No tokens, top-k = E, all tokens to one expert, foreign experts."""
    x = torch.randn(tokens, 8)
    up, down = torch.randn(3, 6, 8), torch.randn(3, 8, 6)
    weights = torch.rand(tokens, 3)
    every = torch.arange(3).expand(tokens, 3)
    run = torch.ops.dspark.moe_experts
    tail = ([], [], [], "relu")
    got = run(x, every, weights, [], [up], [down], *tail)
    parts = [F.linear(F.linear(x, up[e]).relu(), down[e]) * weights[:, e, None] for e in range(3)]
    torch.testing.assert_close(got, sum(parts))
    one = torch.full((tokens, 1), 2)
    got = run(x, one, weights[:, :1], [], list(up), list(down), *tail)
    torch.testing.assert_close(got, F.linear(F.linear(x, up[2]).relu(), down[2]) * weights[:, :1])
    foreign = torch.where(every == 1, 1, -every - 3)
    torch.testing.assert_close(run(x, foreign, weights, [], [up], [down], *tail), parts[1])


def test_bad_settings():
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    run = OPS["moe_router"].reference
    for bad in ({"scoring": "tanh"}, {"normalise": "max"}):
        given = {"scoring": "softmax", "normalise": "none", **bad}
        with pytest.raises(ValueError, match="is not one of"):
            run(x, w, None, None, 1, *given.values(), torch.float32, torch.float32)
