"""The section of `benchmarks.gpu` about routers and experts: Qwen3-30B-A3B's layer.

Experts that no cache holds: every call goes to others of one stack. Bytes are those of the experts
that the tokens hit, each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._gpu_kernels import ours, tuned
from benchmarks._gpu_timing import Bench, Call, Skip, memory, verdict

# Experts, experts a token, features, width of an expert.
LAYER = (128, 8, 2048, 768)
SMOKE_LAYER = (6, 2, 32, 24)
TOKENS = (1, 2, 4, 8, 16, 4096)


def experts(bench: Bench) -> Iterator[dict[str, Any]]:
    """Routers and experts at every number of tokens."""
    layer = SMOKE_LAYER if bench.smoke else LAYER
    for tokens in (1, 3) if bench.smoke else TOKENS:
        for what in (one_router, one_block):
            row: dict[str, Any] = {"op": what.__name__.removeprefix("one_"), "tokens": tokens}
            if bench.left < 8:
                yield {**row, "skipped": "no time left"}
                continue
            try:
                with memory():
                    yield {**row, **what(bench, tokens, *layer)}
            except (Skip, torch.OutOfMemoryError) as error:
                yield {**row, "skipped": str(error).splitlines()[0]}


def one_router(
    bench: Bench, tokens: int, count: int, k: int, features: int, inner: int
) -> dict[str, Any]:
    """Logits, softmax, the k largest and their sum, as one kernel and as torch has it."""
    nbytes = count * features * bench.dtype.itemsize
    weights = [bench.randn(count, features) for _ in range(bench.copies(nbytes))]
    x = bench.randn(tokens, features)

    def plain(weight: Tensor) -> Tensor:
        scores = F.linear(x, weight).float().softmax(-1)
        values = scores.topk(k, -1).values
        return (values / values.sum(-1, keepdim=True)).to(x.dtype)

    torch._dynamo.reset()
    compiled = tuned(plain, bench)
    dtypes = (bench.dtype, bench.dtype)
    contenders: dict[str, Call] = {
        "dspark": lambda w: ours.moe_router(x, w, None, None, k, "softmax", "sum", *dtypes)[1],
        "eager": plain,
        "inductor max-autotune": lambda w: compiled(w),
    }
    row = {"bytes": nbytes, **bench.measure(contenders, weights)}
    return verdict(row, bench, flops=2.0 * tokens * count * features)


def one_block(
    bench: Bench, tokens: int, count: int, k: int, features: int, inner: int
) -> dict[str, Any]:
    """Gate, up, activation, down and the weighted sum of the experts that tokens chose."""
    size = 3 * inner * features * bench.dtype.itemsize
    bench.copies(count * size)  # raises where the stack does not fit
    both, down = bench.randn(count, 2 * inner, features), bench.randn(count, features, inner)
    gate, up = both.chunk(2, 1)
    x = bench.randn(tokens, features) * features**-0.5
    choices = []
    for _ in range(bench.copies(min(tokens * k, count) * size)):
        order = torch.rand(tokens, count, device=bench.device).argsort(-1)[:, :k].contiguous()
        share = torch.rand(tokens, k, device=bench.device)
        choices.append((order, (share / share.sum(-1, keepdim=True)).to(bench.dtype)))
    hit = sum(int(c.unique().numel()) for c, _ in choices) / len(choices)

    def batched(choice: tuple[Tensor, Tensor]) -> Tensor:
        index, share = choice[0].flatten(), choice[1]
        rows = x.repeat_interleave(k, 0).unsqueeze(-1)
        g, u = torch.bmm(both[index], rows).squeeze(-1).chunk(2, -1)
        y = torch.bmm(down[index], (F.silu(g) * u).unsqueeze(-1)).view(tokens, k, features)
        return (y * share.unsqueeze(-1)).sum(1)

    def grouped(choice: tuple[Tensor, Tensor]) -> Tensor:
        index, order = choice[0].flatten().sort(stable=True)
        ends = torch.searchsorted(index, torch.arange(count, device=x.device), right=True).int()
        g, u = torch._grouped_mm(x[order // k], both.mT, offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(g) * u, down.mT, offs=ends)
        y = y * choice[1].flatten()[order].unsqueeze(-1)
        back = torch.empty_like(y).index_copy_(0, order, y)
        return back.view(tokens, k, features).sum(1)

    none: list[Tensor] = []
    contenders: dict[str, Call] = {
        "dspark": lambda c: ours.moe_experts(x, *c, [gate], [up], [down], none, none, none, "silu"),
    }
    if tokens <= 16:
        contenders["batched"] = batched
    if not bench.smoke:
        contenders["grouped"] = grouped
    row = {"bytes": int(hit * size), "experts_hit": hit, **bench.measure(contenders, choices)}
    return verdict(row, bench, flops=6.0 * tokens * k * inner * features)
