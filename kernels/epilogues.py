"""Epilogues of the streaming kernel: what is kept of one tile of S, and how two tiles' states are merged.

The same mathematics in torch, with what each input and output means, is `gssf_triton.streaming.epilogues`.

An epilogue takes the tile's `Pairs`, `Vectors` along its rows and columns, a pointer to the scalars, the scale of S
first, and the launch's `StreamTile`. It returns four things, `()` where there is nothing: what it keeps of its rows,
[BLOCK_M] each; of its columns, [BLOCK_N] each; sums over the tile; and, where TILE.SLOPE, the slope ∂loss/∂(scale·s)
[BLOCK_M, BLOCK_N]. Outside S (`valid` false) nothing may count.

The kernel merges the states of tiles, and those of programs, by a function here that has the name of the record's
`merge`. It takes two tuples of vectors, the older state first. The order is fixed, and no two programs write the same
state: no atomics, so the same call gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from gssf_triton.kernels.args import Tile

#: A maximum of nothing.
EMPTY_MAX = tl.constexpr(float("-inf"))


class Pairs(NamedTuple):
    """A tile of similarities and what is known of its pairs, [BLOCK_M, BLOCK_N] each.

    `teacher` is None without a second product. `valid` pairs lie inside S. `same` marks pairs of equal ids, the
    matching ones included. `first_row` and `first_column` are the tile's place in S.
    """

    s: Any
    teacher: Any
    valid: Any
    match: Any
    same: Any
    first_row: Any
    first_column: Any


class Vectors(NamedTuple):
    """Vectors along one side of the tile: pointers [BLOCK] to the first, the stride to the next, what entries exist."""

    at: Any
    stride: Any
    mask: Any


@dataclass(frozen=True, eq=False)
class StreamTile(Tile):
    """The tile, and what the epilogue is to make of it.

    Attributes:
        COLUMNS: Columns are treated as rows are.
        SUMS: Plain sums are kept too.
        SLOPE: The slope is wanted.
        OF_ROWS: A row's state before anything is merged; empty where nothing is kept of rows.
        OF_COLUMNS: A column's.
        INDEX: Which output of a state is an index, as an integer's bits.
        TOTALS: How many sums are kept.
        STORED: "write" stores S, "read" takes it from an earlier pass.
    """

    COLUMNS: bool = False
    SUMS: bool = False
    SLOPE: bool = False
    OF_ROWS: tuple[float, ...] = ()
    OF_COLUMNS: tuple[float, ...] = ()
    INDEX: int | None = None
    STORED: str = ""
    TOTALS: int = 0


@triton.jit
def row(vectors, i: tl.constexpr):
    """Vector i along the rows, [BLOCK_M, 1]."""
    return tl.load(vectors.at + i * vectors.stride, mask=vectors.mask, other=0.0)[:, None]


@triton.jit
def column(vectors, i: tl.constexpr):
    """Vector i along the columns, [1, BLOCK_N]."""
    return tl.load(vectors.at + i * vectors.stride, mask=vectors.mask, other=0.0)[None, :]


@triton.jit
def as_bits(index, dtype: tl.constexpr):
    """An index as a float32 or float64 of the same bits: float32 counts to 2²⁴ alone."""
    if dtype == tl.float64:
        index = index.to(tl.int64)
    return index.to(dtype, bitcast=True)


# ------------------------------------------------------------------------------------------------------------- merging


@triton.jit
def merge_sums(old, new):
    merged = ()
    for i in tl.static_range(len(old)):
        merged += (old[i] + new[i],)  # type: ignore[assignment]
    return merged


@triton.jit
def shift(old, new):
    """exp(old − new) of running maxima, 1 where they are equal: also at ±inf, where the difference is not a number."""
    return tl.where(old == new, 1.0, tl.exp(old - new))


@triton.jit
def merge_softmax(old, new):
    """Two states (max, Σ exp(z − max), then plain sums): rescaled to the larger maximum, and added."""
    top = tl.maximum(old[0], new[0])
    merged = (top, old[1] * shift(old[0], top) + new[1] * shift(new[0], top))
    for i in tl.static_range(2, len(old)):
        merged += (old[i] + new[i],)  # type: ignore[assignment]
    return merged


@triton.jit
def merge_hardest(old, new):
    """Two states (value, index): the larger value, the older one of equal values; NaN wins."""
    wins = (new[0] > old[0]) | ((new[0] != new[0]) & (old[0] == old[0]))
    return tl.where(wins, new[0], old[0]), tl.where(wins, new[1], old[1])


@triton.jit
def merge_distillation(old, new):
    """Two states (student's max and sum, teacher's max and sum, Σ exp(teacher − its max)·(teacher − student))."""
    student = merge_softmax((old[0], old[1]), (new[0], new[1]))
    teacher = merge_softmax((old[2], old[3]), (new[2], new[3]))
    cross = old[4] * shift(old[2], teacher[0]) + new[4] * shift(new[2], teacher[0])
    return student + teacher + (cross,)


# ------------------------------------------------------------------------------------------------------------- helpers


@triton.jit
def negatives(pairs):
    """Neither matching pairs nor pairs of equal ids."""
    return pairs.valid & (pairs.match == 0) & (pairs.same == 0)


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


# ----------------------------------------------------------------------------------------------------------- epilogues


@triton.jit
def softmax_state(logits, candidate, AXIS: tl.constexpr, SUMS: tl.constexpr):
    """(max, Σ exp) of the candidates' logits along an axis, with SUMS also Σ and the count."""
    state = max_and_sum(tl.where(candidate, logits, EMPTY_MAX), AXIS)
    if SUMS:
        state += tl.sum(tl.where(candidate, logits, 0.0), AXIS), tl.sum(candidate.to(logits.dtype), AXIS)
    return state


@triton.jit
def softmax_stats(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """Each row's and column's (max, Σ exp) of the logits, with SUMS Σ z and the count, and last the rows' matches."""
    candidate = pairs.valid & (pairs.match | (pairs.same == 0))
    logits = pairs.s * tl.load(scalars)
    at_match = (tl.sum(tl.where(pairs.match & pairs.valid, pairs.s, 0.0), 1),)
    # Rows first: a thread holds two of them, but 16 columns.
    of_rows = softmax_state(logits, candidate, 1, TILE.SUMS) + at_match
    of_columns = ()
    if TILE.COLUMNS:
        of_columns = softmax_state(logits, candidate, 0, TILE.SUMS)
    return of_rows, of_columns, (), ()


@triton.jit
def softmax_slope(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """w·(exp(z − lse) − u) of the row, and with COLUMNS of the column; 0 for matches, which are added outside."""
    s, negative = pairs.s, negatives(pairs)
    z = s * tl.load(scalars)
    slope = tl.where(negative, row(rows, 1) * (tl.exp(z - row(rows, 0)) - row(rows, 2)), 0.0)
    total = tl.sum(tl.where(negative, slope * (s - row(rows, 3)), 0.0), 1)
    if TILE.COLUMNS:
        part = tl.where(negative, column(columns, 1) * (tl.exp(z - column(columns, 0)) - column(columns, 2)), 0.0)
        total += tl.sum(tl.where(negative, part * (s - column(columns, 3)), 0.0), 1)
        slope += part
    return (), (), (tl.sum(total, 0),), slope


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
def sigmoid(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """Row sums of softplus(x), x = −y·(scale·s + bias), and the slope −y·w·σ(x)."""
    sign = tl.where(pairs.match | pairs.same, -1.0, 1.0)
    x = sign * (pairs.s * tl.load(scalars) + tl.load(scalars + 1))
    # exp of what is never positive: neither side overflows.
    small = tl.exp(-tl.abs(x))
    loss = tl.where(x > 0, x, 0.0) + log1p(small)
    loss = tl.where(x == x, loss, x)
    of_rows = (tl.sum(tl.where(pairs.valid, loss, 0.0), 1),)
    if TILE.SLOPE:
        slope = sign * row(rows, 0) * tl.where(x > 0, 1.0, small) / (1.0 + small)
        slope = tl.where(pairs.valid, tl.where(x == x, slope, x), 0.0)
        return of_rows, (), (sum_tile(tl.where(pairs.valid, slope * pairs.s, 0.0)), sum_tile(slope)), slope
    else:
        return of_rows, (), (), ()


@triton.jit
def hardest_of(s, negative, AXIS: tl.constexpr):
    """(value, index) of the largest negative along an axis, the lowest index of equal ones; NaN wins."""
    z = tl.where(negative, s, EMPTY_MAX)
    is_nan = z != z
    top, index = tl.max(tl.where(is_nan, EMPTY_MAX, z), AXIS, return_indices=True, return_indices_tie_break_left=True)
    any_nan = tl.max(is_nan.to(tl.int32), AXIS) > 0
    return tl.where(any_nan, float("nan"), top), index


@triton.jit
def hinge_hardest(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """Each row's and column's hardest negative: its similarity, and the bits of its index in S."""
    negative = negatives(pairs)
    z = pairs.s * tl.load(scalars)
    row_top, at_column = hardest_of(z, negative, 1)
    column_top, at_row = hardest_of(z, negative, 0)
    of_rows = row_top, as_bits(pairs.first_column + at_column, z.dtype)
    return of_rows, (column_top, as_bits(pairs.first_row + at_row, z.dtype)), (), ()


@triton.jit
def hinge_all(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """Σ max(0, room + s) over each row's and column's negatives, room = margin − match, and how many are above 0."""
    negative = negatives(pairs)
    z = pairs.s * tl.load(scalars)
    by_row = z + row(rows, 0)
    by_column = z + column(columns, 0)
    # Not "> 0": a NaN must stay in the loss.
    row_violation = negative & ((by_row <= 0) == 0)
    column_violation = negative & ((by_column <= 0) == 0)
    of_rows = tl.sum(tl.where(row_violation, by_row, 0.0), 1), tl.sum(row_violation.to(z.dtype), 1)
    of_columns = tl.sum(tl.where(column_violation, by_column, 0.0), 0), tl.sum(column_violation.to(z.dtype), 0)
    slope = ()
    if TILE.SLOPE:
        slope = tl.where(row_violation, row(rows, 1), 0.0) + tl.where(column_violation, column(columns, 1), 0.0)
    return of_rows, of_columns, (), slope


@triton.jit
def distillation(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """Each row's (max, Σ exp) of both models' logits, and Σ exp(t − max t)·(t − s)."""
    student_logits = pairs.s * tl.load(scalars)
    teacher_logits = pairs.teacher * tl.load(scalars + 1)
    # The teacher first: one tile less is alive in the end, which sm_80 has registers for.
    teacher = max_and_sum(tl.where(pairs.valid, teacher_logits, EMPTY_MAX), 1)
    cross = tl.exp(teacher_logits - teacher[0][:, None]) * (teacher_logits - student_logits)
    cross_sum = (tl.sum(tl.where(pairs.valid, cross, 0.0), 1),)
    student = max_and_sum(tl.where(pairs.valid, student_logits, EMPTY_MAX), 1)
    return student + teacher + cross_sum, (), (), ()


@triton.jit
def distillation_slope(pairs, rows, columns, scalars, TILE: tl.constexpr):
    """w·(softmax(student) − softmax(teacher))."""
    student = tl.exp(pairs.s * tl.load(scalars) - row(rows, 0))
    slope = row(rows, 2) * (student - tl.exp(pairs.teacher * tl.load(scalars + 1) - row(rows, 1)))
    slope = tl.where(pairs.valid, slope, 0.0)
    return (), (), (sum_tile(tl.where(pairs.valid, slope * pairs.s, 0.0)),), slope
