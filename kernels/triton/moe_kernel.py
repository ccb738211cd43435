"""Experts as two kernels: gate, up and activation; then down and the weighted sum.

    up_kernel    hidden[choice] = act(x G_e^T) * (x U_e^T)
    down_kernel  y[token] = sum over its choices of weight * (hidden[choice] D_e^T)

A *choice* is token * k + j. Few tokens (at most BLOCK_M) need no sorting: a program of `up_kernel`
takes a choice, leaves it to an earlier one of the same expert if there is one, and works for all
tokens that chose the expert; a program of `down_kernel` takes columns of y and goes through all
experts that are hit. Every expert is read once, and nothing is added atomically. Many tokens
(SORTED) come sorted by expert and cut into blocks of BLOCK_M rows of one expert.

Weights have any strides: transposed and alternating ones are read where they lie. Sums are float32.
Reference: `dspark_compile.ops.moe`.
"""

import triton
import triton.language as tl

from dspark_compile.kernels.triton.linear_kernel import activate


@triton.jit
def chosen_by(Index_ptr, expert, k, tokens, KP: tl.constexpr, BLOCK_M: tl.constexpr):
    """For BLOCK_M tokens: which of their choices is ``expert``, -1 if none."""
    token = tl.arange(0, BLOCK_M)
    j = tl.arange(0, KP)
    inside = (token[:, None] < tokens) & (j[None, :] < k)
    index = tl.load(Index_ptr + token[:, None] * k + j[None, :], mask=inside, other=-1)
    place = tl.where(inside & (index == expert), j[None, :], -1)
    return tl.max(place, axis=1)


@triton.jit
def is_first(Index_ptr, p, expert, PAIRS: tl.constexpr):
    """Whether no choice before ``p`` has the same expert."""
    other = tl.arange(0, PAIRS)
    index = tl.load(Index_ptr + other, mask=other < p, other=-1)
    return tl.sum(((index == expert) & (other < p)).to(tl.int32), axis=0) == 0


@triton.jit
def product(
    X_ptr, x_row_stride, rows, live, W_ptr, w_n_stride, w_k_stride, n, N, K, scale,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, BLOCK_M]`` of W x^T for columns n of the result and rows of X."""
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, K, BLOCK_K):
        c = start + tl.arange(0, BLOCK_K)
        inside = c < K
        w = tl.load(
            W_ptr + n[:, None] * w_n_stride + c[None, :] * w_k_stride,
            mask=(n[:, None] < N) & inside[None, :],
            other=0.0,
        )
        x = tl.load(
            X_ptr + rows[None, :] * x_row_stride + c[:, None],
            mask=inside[:, None] & live[None, :],
            other=0.0,
        )
        if SCALED:
            x = x * scale[None, :].to(x.dtype)
        if BLOCK_M >= 16:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc += tl.sum(w.to(tl.float32) * tl.trans(x).to(tl.float32), axis=1)[:, None]
    return acc


@triton.jit
def bounded(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``clamp(x, LOW, HIGH)``; None is no bound."""
    if LOW is not None:
        x = tl.where(x < LOW, LOW, x)
    if HIGH is not None:
        x = tl.where(x > HIGH, HIGH, x)
    return x


@triton.jit
def up_kernel(
    X_ptr, Index_ptr, Weight_ptr, Order_ptr, Expert_ptr, Start_ptr, End_ptr, Hidden_ptr,
    Gate_ptr, Up_ptr, GateBias_ptr, UpBias_ptr, x_row_stride, w_e_stride, w_n_stride, w_k_stride,
    bias_e_stride, bias_n_stride, tokens, k, experts, inner, features,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, GATE_LOW: tl.constexpr, GATE_HIGH: tl.constexpr,
    UP_LOW: tl.constexpr, UP_HIGH: tl.constexpr, OFFSET: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, WEIGH_INPUT: tl.constexpr, SORTED: tl.constexpr, KP: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SORTED:
        e = tl.load(Expert_ptr + p).to(tl.int64)
        place = tl.load(Start_ptr + p) + tl.arange(0, BLOCK_M)
        live = place < tl.load(End_ptr + p)
        choice = tl.load(Order_ptr + place, mask=live, other=0)
        token = choice // k
        mine = e < experts
    else:
        e = tl.load(Index_ptr + p).to(tl.int64)
        mine = (e >= 0) & (e < experts) & is_first(Index_ptr, p, e, PAIRS)
        slot = chosen_by(Index_ptr, e, k, tokens, KP, BLOCK_M)
        token = tl.arange(0, BLOCK_M)
        live = slot >= 0
        choice = token * k + tl.maximum(slot, 0)
    if mine:
        scale = tl.zeros([BLOCK_M], tl.float32)
        if WEIGH_INPUT:
            scale = tl.load(Weight_ptr + choice, mask=live, other=0.0).to(tl.float32)
        u = product(
            X_ptr, x_row_stride, token, live, Up_ptr + e * w_e_stride, w_n_stride, w_k_stride, n,
            inner, features, scale, WEIGH_INPUT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        b = e * bias_e_stride + n * bias_n_stride
        if BIAS:
            u += tl.load(UpBias_ptr + b, mask=n < inner, other=0.0).to(tl.float32)[:, None]
        g = u
        if GATED:
            g = product(
                X_ptr, x_row_stride, token, live, Gate_ptr + e * w_e_stride, w_n_stride,
                w_k_stride, n, inner, features, scale, WEIGH_INPUT, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if BIAS:
                g += tl.load(GateBias_ptr + b, mask=n < inner, other=0.0).to(tl.float32)[:, None]
        g = bounded(g, GATE_LOW, GATE_HIGH)
        if SLOPE == 1.0:
            h = activate(g, ACTIVATION, tl.float32)
        else:
            h = activate(g * SLOPE, ACTIVATION, tl.float32) / SLOPE
        if GATED:
            h *= bounded(u, UP_LOW, UP_HIGH) + OFFSET
        tl.store(
            Hidden_ptr + choice[None, :].to(tl.int64) * inner + n[:, None],
            h.to(Hidden_ptr.dtype.element_ty),
            mask=(n[:, None] < inner) & live[None, :],
        )


@triton.jit
def down_kernel(
    Hidden_ptr, Index_ptr, Weight_ptr, Y_ptr, Down_ptr, Bias_ptr, w_e_stride, w_n_stride,
    w_k_stride, bias_e_stride, bias_n_stride, tokens, k, experts, inner, outputs,
    BIAS: tl.constexpr, WEIGH_INPUT: tl.constexpr, KP: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for p in range(tokens * k):
        e = tl.load(Index_ptr + p).to(tl.int64)
        if (e >= 0) & (e < experts) & is_first(Index_ptr, p, e, PAIRS):
            slot = chosen_by(Index_ptr, e, k, tokens, KP, BLOCK_M)
            live = slot >= 0
            choice = token * k + tl.maximum(slot, 0)
            w = tl.load(Weight_ptr + choice, mask=live, other=0.0).to(tl.float32)
            if WEIGH_INPUT:
                w = live.to(tl.float32)
            part = product(
                Hidden_ptr, inner, choice, live, Down_ptr + e * w_e_stride, w_n_stride, w_k_stride,
                n, outputs, inner, w, False, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            if BIAS:
                b = Bias_ptr + e * bias_e_stride + n * bias_n_stride
                part += tl.load(b, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
            total += part * w[None, :]
    tl.store(
        Y_ptr + token[None, :] * outputs + n[:, None],
        total.to(Y_ptr.dtype.element_ty),
        mask=(n[:, None] < outputs) & (token[None, :] < tokens),
    )


@triton.jit
def down_sorted_kernel(
    Hidden_ptr, Order_ptr, Expert_ptr, Start_ptr, End_ptr, Weight_ptr, Part_ptr, Down_ptr,
    Bias_ptr, w_e_stride, w_n_stride, w_k_stride, bias_e_stride, bias_n_stride, experts, inner,
    outputs, BIAS: tl.constexpr, WEIGH_INPUT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each choice's weighted row, float32 ``[choices, outputs]``; they are summed over k behind."""
    p = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.load(Expert_ptr + p).to(tl.int64)
    place = tl.load(Start_ptr + p) + tl.arange(0, BLOCK_M)
    live = place < tl.load(End_ptr + p)
    if e < experts:
        choice = tl.load(Order_ptr + place, mask=live, other=0)
        w = tl.load(Weight_ptr + choice, mask=live, other=0.0).to(tl.float32)
        if WEIGH_INPUT:
            w = live.to(tl.float32)
        part = product(
            Hidden_ptr, inner, choice, live, Down_ptr + e * w_e_stride, w_n_stride, w_k_stride, n,
            outputs, inner, w, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if BIAS:
            b = Bias_ptr + e * bias_e_stride + n * bias_n_stride
            part += tl.load(b, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
        tl.store(
            Part_ptr + choice[None, :].to(tl.int64) * outputs + n[:, None],
            part * w[None, :],
            mask=(n[:, None] < outputs) & live[None, :],
        )
