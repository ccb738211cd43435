"""The attention kernel: one tile of query rows against a range of keys, by online softmax.

    s = scale * q @ k^T          [* k_scale, int8 caches]
    s = softcap * tanh(s / softcap)
    s = s + bias;   s = s where allowed, else -inf (or s + mask_value)
    top' = max(top, max s);  p = exp(s - top');  mass' = mass exp(top - top') + sum p
    acc' = acc exp(top - top') + (p [* v_scale]) @ v

A tile's rows are the query heads of one key head times consecutive queries (row = query * GROUP
+ head of the group), so that keys and values are read once for the group. With SPLIT the keys of
a tile are dealt to several programs, whose partial (acc, top, mass) `combine_kernel` merges
(flash-decoding); without, the program finishes its rows (flash-attention 2, arXiv 2307.08691).

Scores are kept in units of log2(e), so that exponentials are exp2.

This file is also a template. `codegen.triton.attention` prints a mask predicate into it: the
three functions between the ``mask`` lines are replaced, and each line ``# mask: …`` becomes the
parameters or arguments that the predicate needs. As it stands it allows every key.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NOT_SPECIALISED = ["M", "N", "splits"]


@triton.jit
def floor_divide(a, b):
    """Integer division that rounds down, as Python's does."""
    b = b + a * 0
    r = a % b
    return a // b - tl.where((r != 0) & ((r < 0) != (b < 0)), 1, 0)


@triton.jit
def floor_modulo(a, b):
    """The remainder with the divisor's sign, as Python's has."""
    b = b + a * 0
    r = a % b
    return r + tl.where((r != 0) & ((r < 0) != (b < 0)), b, 0)


@triton.jit
def wrap_index(index, size):
    """A negative index counts from the end."""
    index = (index + size * 0).to(tl.int64)
    return tl.where(index < 0, index + size, index)


# mask: functions
@triton.jit
def mask_allowed(b, h, q, k, inside):
    """Whether query row q of head h may see key k; blocks that broadcast."""
    return inside


@triton.jit
def mask_upper(b, h, q):
    """Exclusive bound on the keys that a row may see."""
    return q


@triton.jit
def mask_lower(b, h, q):
    """Inclusive bound on the keys that a row may see."""
    return q


# mask: end


@triton.jit
def attend(
    acc,
    top,
    mass,
    q,
    begin,
    end,
    N,
    batch,
    head,
    query,
    K_ptr,
    V_ptr,
    K_scale_ptr,
    V_scale_ptr,
    Bias_ptr,
    K_stride_n,
    K_stride_d,
    V_stride_n,
    V_stride_d,
    K_scale_stride_n,
    V_scale_stride_n,
    Bias_stride_n,
    # mask: parameters
    scale,
    softcap,
    mask_value,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOOL_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADD_MASK: tl.constexpr,
    CHECKED: tl.constexpr,
    PRECISION: tl.constexpr,
    VALUE: tl.constexpr,
):
    """Take the keys ``[begin, end)``, a multiple of BLOCK_N long or checked against N."""
    d = tl.arange(0, BLOCK_D)[:, None]
    dv = tl.arange(0, BLOCK_DV)[None, :]
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        inside = key < N
        wide = key.to(tl.int64)

        k_ptrs = K_ptr + wide[None, :] * K_stride_n + d * K_stride_d
        if CHECKED:
            k = tl.load(k_ptrs, mask=inside[None, :] & (d < D), other=0.0)
        elif BLOCK_D > D:
            k = tl.load(k_ptrs, mask=d < D, other=0.0)
        else:
            k = tl.load(k_ptrs)
        s = tl.dot(q, k.to(q.dtype), input_precision=PRECISION)
        if K_scale_ptr is not None:
            k_scale = tl.load(K_scale_ptr + wide * K_scale_stride_n, mask=inside, other=0.0)
            s *= k_scale.to(tl.float32)[None, :]
        s *= scale
        if SOFTCAP:
            # tanh(s), exact at both ends.
            s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E)) + 1.0))
        if Bias_ptr is not None:
            b_ptrs = Bias_ptr + wide[None, :] * Bias_stride_n
            bias = tl.load(b_ptrs, mask=inside[None, :], other=0)
            if not BOOL_BIAS:
                s += bias.to(tl.float32) * LOG2E
        if CHECKED:
            if HAS_MASK or BOOL_BIAS:
                keep = inside[None, :]
                if HAS_MASK:
                    keep = keep & mask_allowed(
                        batch,
                        head[:, None],
                        query[:, None],
                        key[None, :],
                        inside[None, :],
                        # mask: arguments
                    )
                if BOOL_BIAS:
                    keep = keep & (bias != 0)
                if ADD_MASK:
                    s = tl.where(keep, s, s + mask_value)
                    s = tl.where(inside[None, :], s, -float("inf"))
                else:
                    s = tl.where(keep, s, -float("inf"))
            else:
                s = tl.where(inside[None, :], s, -float("inf"))

        new_top = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        mass = mass * shrink + tl.sum(p, axis=1)
        top = new_top
        acc = acc * shrink[:, None]

        if V_scale_ptr is not None:
            v_scale = tl.load(V_scale_ptr + wide * V_scale_stride_n, mask=inside, other=0.0)
            p *= v_scale.to(tl.float32)[None, :]
        v_ptrs = V_ptr + wide[:, None] * V_stride_n + dv * V_stride_d
        if CHECKED:
            v = tl.load(v_ptrs, mask=inside[:, None] & (dv < DV), other=0.0)
        elif BLOCK_DV > DV:
            v = tl.load(v_ptrs, mask=dv < DV, other=0.0)
        else:
            v = tl.load(v_ptrs)
        acc = tl.dot(p.to(VALUE), v.to(VALUE), acc, input_precision=PRECISION)
    return acc, top, mass


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def attention_kernel(
    Q_ptr,
    K_ptr,
    V_ptr,
    K_scale_ptr,
    V_scale_ptr,
    Bias_ptr,
    Sinks_ptr,
    Out_ptr,
    Part_ptr,
    Max_ptr,
    Sum_ptr,
    Q_stride_b,
    Q_stride_h,
    Q_stride_m,
    Q_stride_d,
    K_stride_b,
    K_stride_h,
    K_stride_n,
    K_stride_d,
    V_stride_b,
    V_stride_h,
    V_stride_n,
    V_stride_d,
    K_scale_stride_b,
    K_scale_stride_h,
    K_scale_stride_n,
    V_scale_stride_b,
    V_scale_stride_h,
    V_scale_stride_n,
    Bias_stride_b,
    Bias_stride_h,
    Bias_stride_m,
    Bias_stride_n,
    Out_stride_b,
    Out_stride_h,
    Out_stride_m,
    # mask: parameters
    M,
    N,
    splits,
    scale,
    softcap,
    mask_value,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPPER: tl.constexpr,  # whether mask_upper may end the loop
    LOWER: tl.constexpr,  # whether mask_lower may start it
    WITNESS: tl.constexpr,  # bounds hold only where each row has an allowed key
    EXACT: tl.constexpr,  # all keys below every row's upper bound are allowed
    BOOL_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADD_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,  # dtype of q @ k
    VALUE: tl.constexpr,  # dtype of p @ v
):
    rows = M * GROUP
    blocks = tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0)
    # Last rows first: under a causal mask they have the most keys.
    block = blocks - 1 - tile % blocks
    kv_head = tile // blocks % KV_HEADS
    batch = tile // blocks // KV_HEADS
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < rows
    # Rows past the end repeat the last one, so that they loosen no bound.
    row = tl.minimum(row, rows - 1)
    query = row // GROUP
    head = kv_head * GROUP + row % GROUP

    b = batch.to(tl.int64)
    h = kv_head.to(tl.int64)
    wide_head = head.to(tl.int64)
    wide_query = query.to(tl.int64)
    K_ptr += b * K_stride_b + h * K_stride_h
    V_ptr += b * V_stride_b + h * V_stride_h
    if K_scale_ptr is not None:
        K_scale_ptr += b * K_scale_stride_b + h * K_scale_stride_h
    if V_scale_ptr is not None:
        V_scale_ptr += b * V_scale_stride_b + h * V_scale_stride_h
    if Bias_ptr is not None:
        Bias_ptr += b * Bias_stride_b
        Bias_ptr += (wide_head * Bias_stride_h + wide_query * Bias_stride_m)[:, None]

    d = tl.arange(0, BLOCK_D)[None, :]
    q_ptrs = Q_ptr + b * Q_stride_b + d * Q_stride_d
    q_ptrs += (wide_head * Q_stride_h + wide_query * Q_stride_m)[:, None]
    q = tl.load(q_ptrs, mask=d < D, other=0.0).to(COMPUTE)

    low = N * 0
    high = N
    if UPPER or LOWER:
        last = tl.zeros([BLOCK_R], tl.int32)
        if UPPER:
            upper = last + mask_upper(
                batch,
                head,
                query,
                # mask: arguments
            )
            high = tl.minimum(tl.maximum(tl.max(upper, axis=0), 0), N).to(tl.int32)
            last = tl.minimum(tl.maximum(upper - 1, 0), N - 1).to(tl.int32)
        if LOWER:
            lower = tl.zeros([BLOCK_R], tl.int32) + mask_lower(
                batch,
                head,
                query,
                # mask: arguments
            )
            low = tl.minimum(tl.maximum(tl.min(lower, axis=0), 0), N).to(tl.int32)
            if not UPPER:
                last = tl.minimum(tl.maximum(lower, 0), N - 1).to(tl.int32)
        if WITNESS:
            # A row without any allowed key averages over all of them, so that none may be
            # skipped. The key at each row's own bound shows that there is one.
            seen = mask_allowed(
                batch,
                head[:, None],
                query[:, None],
                last[:, None],
                (last >= 0)[:, None],
                # mask: arguments
            )
            seen = seen & (last >= 0)[:, None]
            if BOOL_BIAS:
                seen = seen & (tl.load(Bias_ptr + last[:, None] * Bias_stride_n) != 0)
            if tl.min(tl.min(seen.to(tl.int32), axis=1), axis=0) == 0:
                low = N * 0
                high = N

    begin = low // BLOCK_N * BLOCK_N
    end = high
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - begin, BLOCK_N), splits) * BLOCK_N
        begin += tl.program_id(1) * share
        end = tl.minimum(begin + share, high)

    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    middle = begin
    if EXACT:
        # Whole blocks that every row sees need no test.
        full = N
        if UPPER:
            full = tl.minimum(tl.maximum(tl.min(upper, axis=0), 0), N).to(tl.int32)
        middle = tl.maximum(tl.minimum(full, end) // BLOCK_N * BLOCK_N, begin)
        acc, top, mass = attend(
            acc, top, mass, q, begin, middle, N, batch, head, query,
            K_ptr, V_ptr, K_scale_ptr, V_scale_ptr, Bias_ptr,
            K_stride_n, K_stride_d, V_stride_n, V_stride_d,
            K_scale_stride_n, V_scale_stride_n, Bias_stride_n,
            # mask: arguments
            scale, softcap, mask_value, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_MASK, BOOL_BIAS, SOFTCAP, ADD_MASK, False, PRECISION, VALUE,
        )  # fmt: skip
    acc, top, mass = attend(
        acc, top, mass, q, middle, end, N, batch, head, query,
        K_ptr, V_ptr, K_scale_ptr, V_scale_ptr, Bias_ptr,
        K_stride_n, K_stride_d, V_stride_n, V_stride_d,
        K_scale_stride_n, V_scale_stride_n, Bias_stride_n,
        # mask: arguments
        scale, softcap, mask_value, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_MASK, BOOL_BIAS, SOFTCAP, ADD_MASK, True, PRECISION, VALUE,
    )  # fmt: skip

    dv = tl.arange(0, BLOCK_DV)[None, :]
    if SPLIT:
        heads = KV_HEADS * GROUP
        part = ((b * heads + wide_head) * M + wide_query) * splits + tl.program_id(1)
        tl.store(Max_ptr + part, top, mask=in_rows)
        tl.store(Sum_ptr + part, mass, mask=in_rows)
        some = in_rows & (mass > 0)
        tl.store(Part_ptr + part[:, None] * DV + dv, acc, mask=some[:, None] & (dv < DV))
    else:
        if Sinks_ptr is not None:
            sink = tl.load(Sinks_ptr + head).to(tl.float32) * LOG2E
            base = tl.maximum(top, sink)
            base = tl.where(base == -float("inf"), 0.0, base)
            shrink = tl.exp2(top - base)
            acc *= shrink[:, None]
            mass = mass * shrink + tl.exp2(sink - base)
        acc = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        out = b * Out_stride_b + wide_head * Out_stride_h + wide_query * Out_stride_m
        tl.store(
            Out_ptr + out[:, None] + dv,
            acc.to(Out_ptr.dtype.element_ty),
            mask=in_rows[:, None] & (dv < DV),
        )


@triton.jit(do_not_specialize=["M", "splits"])
def combine_kernel(
    Part_ptr,
    Max_ptr,
    Sum_ptr,
    Sinks_ptr,
    Out_ptr,
    Out_stride_b,
    Out_stride_h,
    Out_stride_m,
    M,
    splits,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge the parts of one row: ``sum acc_i 2^(top_i - top) / sum mass_i 2^(top_i - top)``."""
    row = tl.program_id(0).to(tl.int64)
    head = row // M % HEADS
    split = tl.arange(0, BLOCK_S)
    maxima = tl.load(Max_ptr + row * splits + split, mask=split < splits, other=-float("inf"))
    sums = tl.load(Sum_ptr + row * splits + split, mask=split < splits, other=0.0)
    top = tl.max(maxima, axis=0)
    if Sinks_ptr is not None:
        sink = tl.load(Sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(sums * tl.exp2(maxima - top), axis=0)
    if Sinks_ptr is not None:
        total += tl.exp2(sink - top)

    dv = tl.arange(0, BLOCK_DV)[None, :]
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, CHUNK):
        i = start + tl.arange(0, CHUNK)
        stat = row * splits + i
        weight = tl.load(Max_ptr + stat, mask=i < splits, other=-float("inf"))
        filled = tl.load(Sum_ptr + stat, mask=i < splits, other=0.0) > 0
        part = tl.load(
            Part_ptr + stat[:, None] * DV + dv, mask=filled[:, None] & (dv < DV), other=0.0
        )
        acc += tl.sum(part * tl.exp2(weight - top)[:, None], axis=0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    Out_ptr += row // M // HEADS * Out_stride_b + head * Out_stride_h + row % M * Out_stride_m
    dv = tl.arange(0, BLOCK_DV)
    tl.store(Out_ptr + dv, acc.to(Out_ptr.dtype.element_ty), mask=dv < DV)
