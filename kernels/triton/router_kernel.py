"""The router as one kernel: logits, scores, groups, top-k, normalisation.

    logits = x W^T + b
    scores = scoring(logits); indices = top-k of (scores + correction) within the best groups
    weights = normalise(scores[indices]) * scale

A program computes the logits of BLOCK_M tokens and BLOCK_N experts. With several programs for one
block of tokens (SPLIT), each counts itself when its logits lie in memory, and the one that counts
last makes the choice for all experts: E is spread over the machine, and nothing runs behind it.

Equal values go to the lower index. The choice is made on integers that are ordered as the floats
are, with NaN above all: a chosen or missing expert is lower than every float, so that each index is
chosen once, even among -inf. Reference: `dspark_compile.ops.moe.route`.
"""

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-(2**31))
HIGHEST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """int32 in the order of the floats ``x``; NaN is the largest."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, HIGHEST, bits ^ ((bits >> 31) & HIGHEST))


@triton.jit
def largest(key, names, none):
    """The name ``[rows]`` of each row's largest key, the lowest where several are."""
    best = tl.max(key, axis=1)
    return tl.min(tl.where(key == best[:, None], names, none), axis=1)


@triton.jit
def scored(z, inside, SCORING: tl.constexpr):
    """Scores of logits ``[rows, experts]``."""
    if SCORING == "softmax":
        p = tl.where(inside, tl.exp(z - tl.max(z, axis=1)[:, None]), 0.0)
        return p / tl.sum(p, axis=1)[:, None]
    elif SCORING == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    elif SCORING == "sqrt_softplus":
        # log(1 + e^z) without overflow, and without losing a small e^z beside the 1.
        small = tl.exp(-tl.abs(z))
        u = 1.0 + small
        log = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
        return tl.sqrt(tl.maximum(z, 0.0) + log)
    else:
        return z


@triton.jit
def grouped(
    choice, e, inside, fill, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """``choice`` with the experts outside of the best groups set to ``fill``."""
    low = float("-inf")
    group = tl.broadcast_to(e // GROUP_SIZE, choice.shape)
    score = choice
    for g in range(GROUPS):
        mine = (group == g) & inside
        value = tl.where(mine, choice, low)
        total = tl.max(value, axis=1)
        if TOP2:
            first = largest(tl.where(mine, ordered(choice), LOWEST), e, HIGHEST)
            rest = tl.where(e == first[:, None], low, value)
            total = total + tl.max(rest, axis=1)
        score = tl.where(mine, total[:, None], score)
    key = tl.where(inside, ordered(score), LOWEST)
    for _ in range(TOP_GROUPS):
        best = largest(key, group, HIGHEST)
        key = tl.where(group == best[:, None], LOWEST, key)
    return tl.where(inside & (key != LOWEST), fill, choice)


@triton.jit
def choose(
    Logits_ptr, Correction_ptr, Weights_ptr, Index_ptr, start, tokens, experts, scale, eps, fill,
    TOP_K: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr, CORRECTED: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    ROWS: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Choose for ROWS tokens from ``start`` on, whose logits lie in memory."""
    token = start + tl.arange(0, ROWS)
    e = tl.arange(0, EP)[None, :]
    j = tl.arange(0, KP)[None, :]
    live = token[:, None] < tokens
    inside = tl.broadcast_to(e < experts, [ROWS, EP])
    at = Logits_ptr + token[:, None] * experts + e
    z = tl.load(at, mask=inside & live, other=float("-inf")).to(tl.float32)
    scores = scored(z, inside, SCORING)
    choice = scores
    if CORRECTED:
        correction = tl.load(Correction_ptr + e, mask=e < experts, other=0.0)
        choice = scores + correction.to(tl.float32)
    if GROUPS > 1:
        choice = grouped(choice, e, inside, fill, GROUPS, GROUP_SIZE, TOP_GROUPS, TOP2)
    key = tl.where(inside, ordered(choice), LOWEST)
    weights = tl.zeros([ROWS, KP], tl.float32)
    indices = tl.zeros([ROWS, KP], tl.int32)
    for t in range(TOP_K):
        index = largest(key, e, HIGHEST)
        hit = e == index[:, None]
        if SCORING == "sparsemixer":
            best = tl.sum(tl.where(hit, z, 0.0), axis=1)[:, None]
            far = (best - z) / tl.maximum(tl.abs(z), best) > 2.0 * eps
            near = inside & (key != LOWEST) & (~far)
            weight = 1.0 / tl.sum(tl.where(near, tl.exp(z - best), 0.0), axis=1)
        else:
            weight = tl.sum(tl.where(hit, scores, 0.0), axis=1)
        key = tl.where(hit, LOWEST, key)
        weights = tl.where(j == t, weight[:, None], weights)
        indices = tl.where(j == t, index[:, None], indices)
    kept = j < TOP_K
    if NORMALISE == "sum":
        weights = weights / (tl.sum(weights, axis=1)[:, None] + eps)
    elif NORMALISE == "softmax":
        top = tl.max(tl.where(kept, weights, float("-inf")), axis=1)
        weights = tl.where(kept, tl.exp(weights - top[:, None]), 0.0)
        weights = weights / tl.sum(weights, axis=1)[:, None]
    place = token[:, None] * TOP_K + j
    weights = (weights * scale).to(Weights_ptr.dtype.element_ty)
    tl.store(Weights_ptr + place, weights, mask=kept & live)
    tl.store(Index_ptr + place, indices.to(tl.int64), mask=kept & live)


@triton.jit
def router_kernel(
    X_ptr, W_ptr, Bias_ptr, Correction_ptr, Count_ptr, Logits_ptr, Weights_ptr, Index_ptr,
    x_row_stride, w_row_stride, tokens, experts, features, scale, eps, fill,
    COMPUTE: tl.constexpr, BIAS: tl.constexpr, CORRECTED: tl.constexpr, SPLIT: tl.constexpr,
    TOP_K: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr, ROWS: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program ``(block of tokens, block of experts)``. COMPUTE is what both factors are cast to,
    None if they are alike."""
    block = tl.program_id(0)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = m.to(tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, features, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        w = tl.load(
            W_ptr + n[:, None] * w_row_stride + c[None, :],
            mask=(n[:, None] < experts) & (c[None, :] < features),
            other=0.0,
        )
        x = tl.load(
            X_ptr + rows[None, :] * x_row_stride + c[:, None],
            mask=(c[:, None] < features) & (m[None, :] < tokens),
            other=0.0,
        )
        if COMPUTE is not None:
            w = w.to(COMPUTE)
            x = x.to(COMPUTE)
        if BLOCK_M >= 16:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc += tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), axis=1)[:, None]
    if BIAS:
        bias = tl.load(Bias_ptr + n, mask=n < experts, other=0.0)
        acc += bias.to(Logits_ptr.dtype.element_ty).to(tl.float32)[:, None]
    tl.store(
        Logits_ptr + rows[None, :] * experts + n[:, None],
        acc.to(Logits_ptr.dtype.element_ty),
        mask=(n[:, None] < experts) & (m[None, :] < tokens),
    )
    # What other threads of this program have stored is read next, or counted as stored.
    tl.debug_barrier()
    last = True
    if SPLIT:
        last = tl.atomic_add(Count_ptr + block, 1) == tl.num_programs(1) - 1
    if last:
        first = block.to(tl.int64) * BLOCK_M
        for r in range(0, BLOCK_M, ROWS):
            choose(
                Logits_ptr, Correction_ptr, Weights_ptr, Index_ptr, first + r, tokens,
                experts, scale, eps, fill, TOP_K, SCORING, NORMALISE, CORRECTED, GROUPS, GROUP_SIZE,
                TOP_GROUPS, TOP2, ROWS, EP, KP,
            )  # fmt: skip
