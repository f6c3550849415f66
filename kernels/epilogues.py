"""Epilogues of the streaming kernel: what is kept of one tile of S.

The same mathematics in torch, with what each input and output means, is `gssf_triton.streaming.epilogues`.

An epilogue is called with the tile's similarities `s` [BLOCK_M, BLOCK_N] in the accumulator's dtype and

* `teacher` [BLOCK_M, BLOCK_N], the teacher's similarities (s again where there is no teacher);
* `valid`, `match`, `same` [BLOCK_M, BLOCK_N]: inside S; the matching pair; equal ids, the matching pair included;
* `column_index` [BLOCK_N], `row_index` [BLOCK_M]: within the chunk;
* `rows`, `columns`: pointers [BLOCK_M], [BLOCK_N] to what it reads, one vector every `stride_r`, `stride_c`;
* `scalars`: a pointer to the scale, and what follows it;
* `row_out`, `column_out`: pointers to what it keeps, one output every `stride_ro`, `stride_co`; `mask_m`, `mask_n`;
* `totals`: a pointer to its sums over the tile, one every `stride_to`;
* `SLOPE`: whether a slope is wanted.

It returns the slope ∂loss/∂(scale·s), or s where it makes none. Outputs of tiles never overlap: no atomics, so the
same call gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Stands for "nothing seen yet" in running maxima.
EMPTY_MAX = tl.constexpr(float("-inf"))


@triton.jit
def max_and_sum(z, AXIS: tl.constexpr):
    """(max, Σ exp(z − max)) along an axis, 0 for the sum where all of it is −inf."""
    top = tl.max(z, AXIS)
    floor = tl.where(top == EMPTY_MAX, 0.0, top)
    return top, tl.sum(tl.exp(z - tl.expand_dims(floor, AXIS)), AXIS)


@triton.jit
def sum_tile(x):
    """Σ over a whole tile."""
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def softmax_stats(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Each row's and column's (max, Σ exp) of the logits, with SUMS Σ z and the count, and last the rows' matches."""
    candidate = valid & (match | (same == 0))
    logits = s * tl.load(scalars)
    z = tl.where(candidate, logits, EMPTY_MAX)
    top, total = max_and_sum(z, 1)
    tl.store(row_out, top, mask=mask_m)
    tl.store(row_out + stride_ro, total, mask=mask_m)
    at_match = tl.sum(tl.where(match & valid, s, 0.0), 1)
    if SUMS:
        tl.store(row_out + 2 * stride_ro, tl.sum(tl.where(candidate, logits, 0.0), 1), mask=mask_m)
        tl.store(row_out + 3 * stride_ro, tl.sum(candidate.to(s.dtype), 1), mask=mask_m)
        tl.store(row_out + 4 * stride_ro, at_match, mask=mask_m)
    else:
        tl.store(row_out + 2 * stride_ro, at_match, mask=mask_m)
    if COLUMNS:
        top, total = max_and_sum(z, 0)
        tl.store(column_out, top, mask=mask_n)
        tl.store(column_out + stride_co, total, mask=mask_n)
        if SUMS:
            tl.store(column_out + 2 * stride_co, tl.sum(tl.where(candidate, logits, 0.0), 0), mask=mask_n)
            tl.store(column_out + 3 * stride_co, tl.sum(candidate.to(s.dtype), 0), mask=mask_n)
    return s


@triton.jit
def softmax_slope(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """w·(exp(z − lse) − u) of the row, and with COLUMNS of the column; 0 for matches, which are added outside."""
    z = s * tl.load(scalars)
    negative = valid & (match == 0) & (same == 0)
    lse = tl.load(rows, mask=mask_m, other=0.0)[:, None]
    weight = tl.load(rows + stride_r, mask=mask_m, other=0.0)[:, None]
    uniform = tl.load(rows + 2 * stride_r, mask=mask_m, other=0.0)[:, None]
    at_match = tl.load(rows + 3 * stride_r, mask=mask_m, other=0.0)[:, None]
    slope = tl.where(negative, weight * (tl.exp(z - lse) - uniform), 0.0)
    total = tl.sum(tl.where(negative, slope * (s - at_match), 0.0), 1)
    if COLUMNS:
        lse = tl.load(columns, mask=mask_n, other=0.0)[None, :]
        weight = tl.load(columns + stride_c, mask=mask_n, other=0.0)[None, :]
        uniform = tl.load(columns + 2 * stride_c, mask=mask_n, other=0.0)[None, :]
        at_match = tl.load(columns + 3 * stride_c, mask=mask_n, other=0.0)[None, :]
        part = tl.where(negative, weight * (tl.exp(z - lse) - uniform), 0.0)
        total += tl.sum(tl.where(negative, part * (s - at_match), 0.0), 1)
        slope += part
    tl.store(totals, tl.sum(total, 0))
    return slope


@triton.jit
def log1p(x):
    """log(1 + x) of 0 ≤ x ≤ 1 with x's own digits, however small it is: where 1 + x would round them away, its series.

    In float64 by Kahan's quotient, which needs no longer series but more registers than float32's tiles have left.
    """
    u = 1.0 + x
    if x.dtype == tl.float64:
        return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        # At 1/16 the series is off by x⁶/7 = 1e-8 of it, and the logarithm by 2⁻²⁴/x = 1e-6 at most.
        series = 1.0 - x * (0.5 - x * (1 / 3 - x * (0.25 - x * (0.2 - x * (1 / 6)))))
        return tl.where(x < 0.0625, x * series, tl.log(u))


@triton.jit
def sigmoid(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Row sums of softplus(x), x = −y·(scale·s + bias), and the slope −y·w·σ(x)."""
    sign = tl.where(match | same, -1.0, 1.0)
    x = sign * (s * tl.load(scalars) + tl.load(scalars + 1))
    # exp of what is never positive: neither side overflows.
    small = tl.exp(-tl.abs(x))
    loss = tl.where(x > 0, x, 0.0) + log1p(small)
    loss = tl.where(x == x, loss, x)
    tl.store(row_out, tl.sum(tl.where(valid, loss, 0.0), 1), mask=mask_m)
    slope = s
    if SLOPE:
        weight = tl.load(rows, mask=mask_m, other=0.0)[:, None]
        slope = sign * weight * tl.where(x > 0, 1.0, small) / (1.0 + small)
        slope = tl.where(valid, tl.where(x == x, slope, x), 0.0)
        tl.store(totals, sum_tile(tl.where(valid, slope * s, 0.0)))
        tl.store(totals + stride_to, sum_tile(slope))
    return slope


@triton.jit
def hardest_of(s, negative, AXIS: tl.constexpr):
    """(value, index) of the largest negative along an axis, the lowest index of equal ones; NaN wins."""
    z = tl.where(negative, s, EMPTY_MAX)
    is_nan = z != z
    top, index = tl.max(tl.where(is_nan, EMPTY_MAX, z), AXIS, return_indices=True, return_indices_tie_break_left=True)
    any_nan = tl.max(is_nan.to(tl.int32), AXIS) > 0
    return tl.where(any_nan, float("nan"), top), index


@triton.jit
def hinge_hardest(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Each row's and column's hardest negative: its similarity, and its index within the chunk (exact below 2²⁴)."""
    negative = valid & (match == 0) & (same == 0)
    z = s * tl.load(scalars)
    top, index = hardest_of(z, negative, 1)
    tl.store(row_out, top, mask=mask_m)
    tl.store(row_out + stride_ro, (tl.min(column_index, 0) + index).to(s.dtype), mask=mask_m)
    top, index = hardest_of(z, negative, 0)
    tl.store(column_out, top, mask=mask_n)
    tl.store(column_out + stride_co, (tl.min(row_index, 0) + index).to(s.dtype), mask=mask_n)
    return s


@triton.jit
def hinge_all(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Σ max(0, room + s) over each row's and column's negatives, room = margin − match, and how many are above 0."""
    negative = valid & (match == 0) & (same == 0)
    z = s * tl.load(scalars)
    by_row = z + tl.load(rows, mask=mask_m, other=0.0)[:, None]
    by_column = z + tl.load(columns, mask=mask_n, other=0.0)[None, :]
    # Not "> 0": a NaN must stay in the loss.
    row_violation = negative & ((by_row <= 0) == 0)
    column_violation = negative & ((by_column <= 0) == 0)
    tl.store(row_out, tl.sum(tl.where(row_violation, by_row, 0.0), 1), mask=mask_m)
    tl.store(row_out + stride_ro, tl.sum(row_violation.to(s.dtype), 1), mask=mask_m)
    tl.store(column_out, tl.sum(tl.where(column_violation, by_column, 0.0), 0), mask=mask_n)
    tl.store(column_out + stride_co, tl.sum(column_violation.to(s.dtype), 0), mask=mask_n)
    slope = s
    if SLOPE:
        row_weight = tl.load(rows + stride_r, mask=mask_m, other=0.0)[:, None]
        column_weight = tl.load(columns + stride_c, mask=mask_n, other=0.0)[None, :]
        slope = tl.where(row_violation, row_weight, 0.0) + tl.where(column_violation, column_weight, 0.0)
    return slope


@triton.jit
def distillation(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Each row's (max, Σ exp) of both models' logits, and Σ exp(t − max t)·(t − s)."""
    student_logits = s * tl.load(scalars)
    teacher_logits = teacher * tl.load(scalars + 1)
    top, total = max_and_sum(tl.where(valid, student_logits, EMPTY_MAX), 1)
    tl.store(row_out, top, mask=mask_m)
    tl.store(row_out + stride_ro, total, mask=mask_m)
    top, total = max_and_sum(tl.where(valid, teacher_logits, EMPTY_MAX), 1)
    tl.store(row_out + 2 * stride_ro, top, mask=mask_m)
    tl.store(row_out + 3 * stride_ro, total, mask=mask_m)
    cross = tl.exp(teacher_logits - top[:, None]) * (teacher_logits - student_logits)
    tl.store(row_out + 4 * stride_ro, tl.sum(tl.where(valid, cross, 0.0), 1), mask=mask_m)
    return s


@triton.jit
def distillation_slope(
    s, teacher, valid, match, same, row_index, column_index, rows, stride_r, columns, stride_c, scalars,
    row_out, stride_ro, column_out, stride_co, mask_m, mask_n, totals, stride_to, SLOPE: tl.constexpr,
    COLUMNS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """w·(softmax(student) − softmax(teacher))."""
    student_lse = tl.load(rows, mask=mask_m, other=0.0)[:, None]
    teacher_lse = tl.load(rows + stride_r, mask=mask_m, other=0.0)[:, None]
    weight = tl.load(rows + 2 * stride_r, mask=mask_m, other=0.0)[:, None]
    student = tl.exp(s * tl.load(scalars) - student_lse)
    slope = weight * (student - tl.exp(teacher * tl.load(scalars + 1) - teacher_lse))
    slope = tl.where(valid, slope, 0.0)
    tl.store(totals, sum_tile(tl.where(valid, slope * s, 0.0)))
    return slope


#: By the names of `gssf_triton.streaming.epilogues.EPILOGUES`: (function, COLUMNS, SUMS).
EPILOGUES = {
    "softmax_rows": (softmax_stats, False, False),
    "softmax_both": (softmax_stats, True, False),
    "softmax_sums_rows": (softmax_stats, False, True),
    "softmax_sums_both": (softmax_stats, True, True),
    "softmax_slope_rows": (softmax_slope, False, False),
    "softmax_slope_both": (softmax_slope, True, False),
    "sigmoid": (sigmoid, False, False),
    "hinge_hardest": (hinge_hardest, True, False),
    "hinge_all": (hinge_all, True, False),
    "distillation": (distillation, False, False),
    "distillation_slope": (distillation_slope, False, False),
}
