"""Products of a few rows: ``Y[m, n] = epilogue(sum_k prologue(X)[m, k] W[n, k])``, M at most 16.

    prologue   none, RMS norm or layer norm of a row, with weight offset
    product    float32 sums; one weight, or two (gate and up) read in the same pass
    epilogue   bias, activation, gate * up, residual; up to four outputs side by side in n

Every element of W is used M times only, so the time is that of reading W. One row (BLOCK_M = 1)
is multiplied without matrix units: a ``[BLOCK_N, BLOCK_K]`` tile of float32 sums lies in
registers, and is summed over k once, at the end. Several rows are padded to 16 and stand on the
*right* of ``W x^T``, so that the long side of the matrix instruction is filled by rows of W.

Where blocks of n alone do not fill the device, k is dealt to ``splits`` programs; each writes its
partial sums to a workspace, and `finish_kernel` adds them in order: results do not depend on
timing. The roundings between steps are those of `dspark_compile.ops.linear`, ``.mlp`` and
``.norm``.

With PDL (programmatic dependent launch, sm_90 on) the program may start while the kernel in front
of it still runs, asks for its first tile of W to be brought to L2, and then waits: nothing that
another kernel may have written is *read* before that.
"""

import triton
import triton.language as tl

from dspark_compile.kernels.triton._launch import round_to

NOT_SPECIALISED = ["M", "end_0", "end_1", "end_2"]


@triton.jit
def tanh(x):
    """``tanh(x)`` for float32 x: a polynomial near 0, where the exponential form cancels."""
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 - square * 0.053968254)))
    return tl.where(tl.abs(x) < 0.125, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def activate(x, NAME: tl.constexpr, COMPUTE: tl.constexpr):
    """``ACTIVATIONS[NAME](x)`` of `dspark_compile.ops.mlp`, rounded to COMPUTE as there."""
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        x = x * round_to(tl.sigmoid(round_to(1.702 * x, COMPUTE)), COMPUTE)
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "tanh":
        x = tanh(x)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
    return round_to(x, COMPUTE)


@triton.jit
def statistics(
    X_row, in_rows, K, eps,
    CENTRE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """``(mean, 1 / sqrt(variance + eps))`` of whole rows, each ``[BLOCK_M, 1]``; mean 0 for RMS."""
    mean = tl.zeros([BLOCK_M, 1], tl.float32)
    k = tl.arange(0, BLOCK_S)[None, :]
    if CENTRE:
        total = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
        for start in range(0, K, BLOCK_S):
            x = tl.load(X_row + start + k, mask=in_rows & (start + k < K), other=0.0)
            total += x.to(tl.float32)
        mean = tl.sum(total, axis=1)[:, None] / K
    square = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    for start in range(0, K, BLOCK_S):
        inside = in_rows & (start + k < K)
        x = tl.load(X_row + start + k, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean, 0.0)
        square += x * x
    return mean, tl.rsqrt(tl.sum(square, axis=1)[:, None] / K + eps)


@triton.jit
def normalise(
    x, mean, scale, Norm_ptr, Shift_ptr, k, inside, weight_offset,
    IN_COMPUTE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of x ``[BLOCK_M, BLOCK_K]`` normed; the weight before or after the rounding."""
    y = (x.to(tl.float32) - mean) * scale
    if not IN_COMPUTE:
        y = round_to(y, DTYPE)
    if Norm_ptr is not None:
        weight = tl.load(Norm_ptr + k, mask=inside, other=0.0).to(tl.float32) + weight_offset
        if IN_COMPUTE:
            y = y * weight
        else:
            y = round_to(y * round_to(weight, DTYPE), DTYPE)
    if Shift_ptr is not None:
        y = y + tl.load(Shift_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, y, 0.0).to(DTYPE)


@triton.jit
def finish(
    sums, up_sums, Bias_ptr, Up_bias_ptr, Residual_ptr, Residual_row_stride, n, m, inside,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sums to results, float32 holding values of DTYPE; ``n [BLOCK_N, 1]``, ``m [1, BLOCK_M]``."""
    if Bias_ptr is not None:
        sums += tl.load(Bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    y = round_to(sums, DTYPE)
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION, COMPUTE)
    if GATED:
        if Up_bias_ptr is not None:
            up_sums += tl.load(Up_bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
        y = round_to(y * round_to(up_sums, DTYPE), COMPUTE)
    if Residual_ptr is not None:
        at = Residual_ptr + m.to(tl.int64) * Residual_row_stride + n
        y = round_to(y, DTYPE) + tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def store_part(Y_ptr, y, n, m, inside, start, end):
    """The columns of ``y`` from start to end, as an output of its own ``[M, end - start]``."""
    at = Y_ptr + m.to(tl.int64) * (end - start) + (n - start)
    tl.store(at, y.to(Y_ptr.dtype.element_ty), mask=inside & (n >= start) & (n < end))


@triton.jit
def store(Y_ptr, Y1_ptr, Y2_ptr, Y3_ptr, y, n, m, inside, N, end_0, end_1, end_2):
    """``y`` to one output, or each part of its columns to its own."""
    if Y1_ptr is None:
        store_part(Y_ptr, y, n, m, inside, 0, N)
    else:
        store_part(Y_ptr, y, n, m, inside, 0, end_0)
        if Y2_ptr is None:
            store_part(Y1_ptr, y, n, m, inside, end_0, N)
        else:
            store_part(Y1_ptr, y, n, m, inside, end_0, end_1)
            if Y3_ptr is None:
                store_part(Y2_ptr, y, n, m, inside, end_1, N)
            else:
                store_part(Y2_ptr, y, n, m, inside, end_1, end_2)
                store_part(Y3_ptr, y, n, m, inside, end_2, N)


@triton.jit
def fetch(pointers):
    """Ask for the lines at ``pointers`` to be in L2; nothing is read into the program."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def skinny_kernel(
    X_ptr,
    W_ptr,
    Up_ptr,
    Bias_ptr,
    Up_bias_ptr,
    Norm_ptr,
    Shift_ptr,
    Residual_ptr,
    Y_ptr,
    Y1_ptr,
    Y2_ptr,
    Y3_ptr,
    Part_ptr,
    X_row_stride,
    W_row_stride,
    Up_row_stride,
    Residual_row_stride,
    M,
    N,
    K,
    span,
    end_0,
    end_1,
    end_2,
    eps,
    weight_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,  # width of the loop over a row's statistics
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_K divides K
    LINE: tl.constexpr,  # elements of a cache line
    GATED: tl.constexpr,
    NORM: tl.constexpr,  # None, "rms" or "layer"
    NORM_IN_COMPUTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of the activation and of gate * up
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, K)
    # Rows of W past its end are the last one again; what they give is not stored.
    row = tl.minimum(n, N - 1).to(tl.int64)
    W_row = W_ptr + row * W_row_stride
    Up_row = W_row
    if GATED:
        Up_row = Up_ptr + row * Up_row_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        line = tl.minimum(start + tl.arange(0, BLOCK_K // LINE)[None, :] * LINE, K - 1)
        fetch(W_row + line)
        if GATED:
            fetch(Up_row + line)
        tl.extra.cuda.gdc_wait()

    x_m = tl.arange(0, BLOCK_M)[:, None]
    in_rows = x_m < M
    X_row = X_ptr + x_m.to(tl.int64) * X_row_stride
    if NORM is not None:
        mean, scale = statistics(X_row, in_rows, K, eps, NORM == "layer", BLOCK_M, BLOCK_S)

    # One row: sums apart for every k of a tile. Several: the matrix units' sums.
    WIDE: tl.constexpr = BLOCK_K if BLOCK_M == 1 else BLOCK_M
    acc = tl.zeros([BLOCK_N, WIDE], tl.float32)
    up_acc = tl.zeros([BLOCK_N, WIDE if GATED else 1], tl.float32)
    for at in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        if EVEN:
            inside = tl.full([1, BLOCK_K], True, tl.int1)
            w = tl.load(W_row + at + k)
            if GATED:
                u = tl.load(Up_row + at + k)
        else:
            inside = at + k < stop
            w = tl.load(W_row + at + k, mask=inside, other=0.0)
            if GATED:
                u = tl.load(Up_row + at + k, mask=inside, other=0.0)
        x = tl.load(X_row + at + k, mask=in_rows & inside, other=0.0)
        if NORM is not None:
            x = normalise(
                x, mean, scale, Norm_ptr, Shift_ptr, at + k, in_rows & inside, weight_offset,
                NORM_IN_COMPUTE, DTYPE,
            )  # fmt: skip
        if BLOCK_M == 1:
            x = x.to(tl.float32)
            acc += w.to(tl.float32) * x
            if GATED:
                up_acc += u.to(tl.float32) * x
        else:
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
            if GATED:
                up_acc = tl.dot(u, tl.trans(x), up_acc, input_precision=PRECISION)
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=1)[:, None]
        up_acc = tl.sum(up_acc, axis=1)[:, None]

    inside = (n < N) & (m < M)
    if Part_ptr is not None:
        part = tl.program_id(1) * (2 if GATED else 1)
        at = (part * M + m).to(tl.int64) * N + n
        tl.store(Part_ptr + at, acc, mask=inside)
        if GATED:
            tl.store(Part_ptr + at + M * N, up_acc, mask=inside)
    else:
        y = finish(
            acc, up_acc, Bias_ptr, Up_bias_ptr, Residual_ptr, Residual_row_stride, n, m, inside,
            GATED, ACTIVATION, COMPUTE, DTYPE,
        )  # fmt: skip
        store(Y_ptr, Y1_ptr, Y2_ptr, Y3_ptr, y, n, m, inside, N, end_0, end_1, end_2)


@triton.jit(do_not_specialize=[*NOT_SPECIALISED, "splits"])
def finish_kernel(
    Part_ptr,
    Bias_ptr,
    Up_bias_ptr,
    Residual_ptr,
    Y_ptr,
    Y1_ptr,
    Y2_ptr,
    Y3_ptr,
    Residual_row_stride,
    M,
    N,
    splits,
    end_0,
    end_1,
    end_2,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,  # splits, rounded up to a power of 2
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the partial sums ``[splits, 1 or 2, M, N]`` of one row and do the epilogue."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.program_id(1) + tl.zeros([1, 1], tl.int32)
    part = tl.arange(0, BLOCK_P)[None, :]
    PARTS: tl.constexpr = 2 if GATED else 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = n < N
    at = (part * PARTS * M + m).to(tl.int64) * N + n
    some = inside & (part < splits)
    sums = tl.sum(tl.load(Part_ptr + at, mask=some, other=0.0), axis=1)[:, None]
    up_sums = sums
    if GATED:
        up_sums = tl.sum(tl.load(Part_ptr + at + M * N, mask=some, other=0.0), axis=1)[:, None]
    y = finish(
        sums, up_sums, Bias_ptr, Up_bias_ptr, Residual_ptr, Residual_row_stride, n, m, inside,
        GATED, ACTIVATION, COMPUTE, DTYPE,
    )  # fmt: skip
    store(Y_ptr, Y1_ptr, Y2_ptr, Y3_ptr, y, n, m, inside, N, end_0, end_1, end_2)
