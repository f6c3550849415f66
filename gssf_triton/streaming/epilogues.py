"""Epilogues in plain torch: what is kept of one chunk of S, and how what several chunks kept is merged.

An epilogue sees the chunk's similarities `s` (R, C) and vectors along its rows and columns. It returns what it keeps
of every row (`rows`) and every column (`columns`), sums over the whole chunk (`totals`), and the chunk's slope
∂loss/∂(scale·s) where one is asked for. A new loss is a new record in `EPILOGUES` and two functions, one here and one
in `gssf_triton.kernels.epilogues`; CONTRIBUTING.md has a worked example.

What is kept of a row is a state: a few numbers that sum up the columns seen so far. Two states of the same row, of
columns that do not overlap, merge into one of both. The chunks and the processes of a group use `Epilogue.merge`, the
kernel's tiles the function of the same name in `gssf_triton.kernels.epilogues`, all in a fixed order:

    softmax        m = max(m₁, m₂),  l = l₁·e^(m₁−m) + l₂·e^(m₂−m),  plain sums added (z's, the count, the match's s)
    hinge          the larger (value, index), of equal values the lower index, NaN above all;  or (Σ, count) added
    sigmoid        Σ added
    distillation   (m, l) of both models as in softmax,  c = c₁·e^(t₁−t) + c₂·e^(t₂−t),  t the teacher's maximum

An empty state (m = −inf, l = 0, index −1, sums 0) changes nothing it is merged with. Sources: Milakov and Gimelshein,
"Online normalizer calculation for softmax", arXiv 1805.02867, for the first; the others are sums and maxima.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gssf_triton.kernels.stream_values import Epilogue, Kept, Operands

#: A maximum of no similarity.
EMPTY_MAX = float("-inf")
#: All rows, or all columns.
WHOLE = slice(0, None)


class Chunk:
    """Similarities of a run of rows with a run of columns, and what the epilogue may know of both.

    Attributes:
        s: (R, C), which may be overwritten, as may `teacher` and `same`.
        teacher: The similarities of the second product, (R, C), or None.
        same: Pairs of equal ids, matching pairs included, (R, C); None without ids.
        rows: Vectors along the rows, (count, R, 1).
        columns: Vectors along the columns, (count, 1, C).
        scalars: The scale first, then the epilogue's own.
        first: Its place in S: row, column.
        diagonal: Row i matches column i + diagonal.
        epilogue: The record, for its flags.
        wants_slope: Whether the slope is asked for.
    """

    def __init__(
        self, x: Operands, epilogue: Epilogue, wants_slope: bool, rows: slice = WHOLE, columns: slice = WHOLE
    ) -> None:
        self.s = x.t[rows] @ x.y[columns].mT if x.stored is None else x.stored[rows, columns].clone()
        self.teacher = self.same = None
        if x.teacher_t is not None and x.teacher_y is not None:
            self.teacher = x.teacher_t[rows] @ x.teacher_y[columns].mT
        if x.row_ids is not None and x.column_ids is not None:
            self.same = x.row_ids[rows, None] == x.column_ids[columns]
        nothing = x.scalars.new_empty(0)
        self.rows = nothing if x.rows is None else x.rows[:, rows, None]
        self.columns = nothing if x.columns is None else x.columns[:, None, columns]
        self.scalars, self.first = x.scalars, (rows.start, columns.start)
        self.diagonal = rows.start + x.offset - columns.start
        self.epilogue, self.wants_slope = epilogue, wants_slope

    def matches(self, x: Tensor) -> Tensor:
        """The view of a chunk-shaped x that holds its matching pairs; empty where the chunk has none."""
        R, C = x.shape
        if self.diagonal <= -R or self.diagonal >= C:
            return x.new_empty(0)
        return x.diagonal(self.diagonal)

    def duplicates(self) -> Tensor | None:
        """Pairs of equal ids other than the matching ones, which are never negatives."""
        if self.same is not None:
            self.matches(self.same).fill_(False)
        return self.same

    def positives(self) -> Tensor | None:
        """Pairs of equal ids and the matching ones; None where only these are."""
        if self.same is not None:
            self.matches(self.same).fill_(True)
        return self.same


# ------------------------------------------------------------------------------------------------------------- merging


def _shift(old: Tensor, new: Tensor) -> Tensor:
    """exp(old − new) of running maxima, 1 where they are equal: also at ±inf, where the difference is not a number."""
    return torch.where(old == new, 1.0, torch.exp(old - new))


def index_bits(state: Tensor) -> Tensor:
    """A state's index output, which lies there as an integer's bits: float32 counts to 2²⁴ alone. A view."""
    return state.view(torch.int32 if state.dtype == torch.float32 else torch.int64)


def as_bits(index: Tensor, dtype: torch.dtype) -> Tensor:
    """An index as a number of the same bits."""
    return index.to(torch.int32 if dtype == torch.float32 else torch.int64).view(dtype)


def merge_softmax(old: Tensor, new: Tensor) -> Tensor:
    """Two states (max, Σ exp(z − max), then plain sums): rescaled to the larger maximum, and added."""
    top = torch.maximum(old[0], new[0])
    total = old[1] * _shift(old[0], top) + new[1] * _shift(new[0], top)
    return torch.cat((top[None], total[None], old[2:] + new[2:]))


def merge_sums(old: Tensor, new: Tensor) -> Tensor:
    return old + new


def merge_hardest(old: Tensor, new: Tensor) -> Tensor:
    """Two states (value, index): the larger value, and at equal ones the lower index, which is the older state's.

    A NaN wins over every number, as in torch.max.
    """
    wins = (new[0] > old[0]) | (new[0].isnan() & ~old[0].isnan())
    return torch.where(wins, new, old)


def merge_distillation(old: Tensor, new: Tensor) -> Tensor:
    """Two states (student's max and sum, teacher's max and sum, Σ exp(teacher − its max)·(teacher − student))."""
    student, teacher = merge_softmax(old[0:2], new[0:2]), merge_softmax(old[2:4], new[2:4])
    cross = old[4] * _shift(old[2], teacher[0]) + new[4] * _shift(new[2], teacher[0])
    return torch.cat((student, teacher, cross[None]))


def log_sum_exp(state: Tensor, less: Tensor | float | None = None) -> Tensor:
    """log Σ exp(z) − `less` of a merged state (max, sum, …); −inf where nothing was merged.

    `less` is taken off the maximum first: of a match that is the maximum nothing is lost, however large both are.
    """
    top = state[0] if less is None else state[0] - less
    return top + torch.log(state[1])


# ------------------------------------------------------------------------------------------------------------- helpers


def _max_and_sum(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    top = z.amax(dim)
    floor = torch.where(top == EMPTY_MAX, 0.0, top)  # all excluded: exp(−inf − 0) = 0, no NaN
    return top, (z - floor.unsqueeze(dim)).exp_().sum(dim)


def _weighted_sum(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y of two chunks, with no third chunk, by rows: one float32 sum over a whole chunk drifts by 4e-5."""
    return torch.linalg.vecdot(x, y.to(x.dtype)).sum()


# ------------------------------------------------------------------------------------------------------------- softmax


def _softmax_state(z: Tensor, dim: int, excluded: Tensor | None, sums: bool) -> Tensor:
    state = [*_max_and_sum(z, dim)]
    if sums:
        kept = z if excluded is None else z.masked_fill(excluded, 0.0)
        state.append(kept.sum(dim))
        size = float(z.shape[dim])
        state.append(torch.full_like(state[0], size) if excluded is None else size - excluded.sum(dim))
    return torch.stack(state)


def _softmax_stats(chunk: Chunk) -> Kept:
    """(max, Σ exp, then with `sums` Σ z and the count) of the scaled logits z, of each row, with `both` each column.

    Rows also keep their match's similarity, last: from the product that fills the sums, so that a row with no negative
    has a loss of exactly 0.
    """
    excluded, sums = chunk.duplicates(), chunk.epilogue.sums
    match = chunk.s.new_zeros(chunk.s.shape[0])
    first = max(0, -chunk.diagonal)
    on_diagonal = chunk.matches(chunk.s)
    match[first : first + len(on_diagonal)] = on_diagonal
    z = chunk.s.mul_(chunk.scalars[0])
    if excluded is not None:
        z = z.masked_fill_(excluded, EMPTY_MAX)
    rows = torch.cat((_softmax_state(z, 1, excluded, sums), match[None]))
    return Kept(rows, _softmax_state(z, 0, excluded, sums) if chunk.epilogue.both else None)


def _softmax_slope(chunk: Chunk) -> Kept:
    """w·(exp(z − lse) − u) of the row, and with `both` of the column; 0 for matches, which are added outside.

    Rows and columns hold (lse, w, u, the match's similarity), u = ε/K of label smoothing. The total, the scale's
    gradient, is Σ slope·(s − match) of both: every row's slopes sum to 0 with its match's, so the match's similarity
    may be taken off, and with it goes the difference of two large sums that float32 would not survive.
    """
    excluded = chunk.duplicates()
    scaled = chunk.s * chunk.scalars[0]
    total = chunk.s.new_zeros(())
    slope = None
    for side, dim in ((chunk.rows, 1), (chunk.columns, 0))[: 2 if chunk.epilogue.both else 1]:
        lse, weight, uniform, match = side
        part = (scaled - lse).exp_().sub_(uniform).mul_(weight)
        chunk.matches(part).zero_()
        if excluded is not None:
            part.masked_fill_(excluded, 0.0)
        total = total + _weighted_sum(part, chunk.s) - (part.sum(dim) * match.squeeze(dim)).sum()
        slope = part if slope is None else slope.add_(part)
    return Kept(totals=total[None], slope=slope)


# ------------------------------------------------------------------------------------------------------------- sigmoid


def _sigmoid(chunk: Chunk) -> Kept:
    """Row sums of −log σ(y·(scale·s + bias)), y = 1 for matching pairs and equal ids, else −1; rows hold (w,).

    The totals are Σ slope·s and Σ slope: the gradients of the scale and the bias.
    """
    positives = chunk.positives()

    def negate_positives(x: Tensor) -> Tensor:
        if positives is not None:
            return torch.where(positives, -x, x)
        chunk.matches(x).neg_()
        return x

    x = negate_positives(torch.addcmul(chunk.scalars[1], chunk.s, chunk.scalars[0]))  # = −y·(scale·s + bias)
    # By default everything above 20 is taken to be its own softplus, which costs float64 seven of its digits.
    rows = F.softplus(x, threshold=40.0).sum(1)[None]
    if not chunk.wants_slope:
        return Kept(rows)
    slope = negate_positives(x.sigmoid_().mul_(chunk.rows[0]))
    return Kept(rows, totals=torch.stack((_weighted_sum(slope, chunk.s), slope.sum())), slope=slope)


# --------------------------------------------------------------------------------------------------------------- hinge


def _hinge_hardest(chunk: Chunk) -> Kept:
    """(value, index's bits) of the most similar negative of each row and each column; lowest index first."""
    s = chunk.s.mul_(chunk.scalars[0])
    if chunk.same is not None:
        s = s.masked_fill_(chunk.same, EMPTY_MAX)
    chunk.matches(s).fill_(EMPTY_MAX)
    states = []
    for dim in (1, 0):
        value, index = s.max(dim)
        index = (index + chunk.first[dim]).masked_fill_(value == EMPTY_MAX, -1)
        states.append(torch.stack((value, as_bits(index, s.dtype))))
    return Kept(*states)


def _hinge_all(chunk: Chunk) -> Kept:
    """Σ max(0, margin + s − positive) over the negatives of each row and each column, and how many are above 0.

    Rows hold (margin − positive, w), so do columns.
    """
    s = chunk.s.mul_(chunk.scalars[0])
    excluded = chunk.positives()
    slope = torch.zeros_like(s) if chunk.wants_slope else None
    states = []
    for dim, vectors in ((1, chunk.rows), (0, chunk.columns)):
        violation = s + vectors[0]
        if excluded is None:
            chunk.matches(violation).zero_()
        else:
            violation.masked_fill_(excluded, 0.0)
        # NaN stays a violation: it must not vanish from the loss.
        positive = ~(violation <= 0)
        count = positive.to(violation.dtype)
        states.append(torch.stack((violation.mul_(count).sum(dim), count.sum(dim))))
        if slope is not None:
            # Not a product: an infinite weight times no violation is 0.
            slope += torch.where(positive, vectors[1], 0.0)
    return Kept(states[0], states[1], slope=slope)


# -------------------------------------------------------------------------------------------------------- distillation


def _distillation_stats(chunk: Chunk) -> Kept:
    """Each row's (max, Σ exp) of the student's and of the teacher's logits, and Σ exp(t − max t)·(t − s)."""
    assert chunk.teacher is not None
    student, teacher = chunk.s.mul_(chunk.scalars[0]), chunk.teacher.mul_(chunk.scalars[1])
    top_s, sum_s = _max_and_sum(student, 1)
    top_t = teacher.amax(1)
    weight = (teacher - top_t.unsqueeze(1)).exp_()
    return Kept(torch.stack((top_s, sum_s, top_t, weight.sum(1), weight.mul_(teacher.sub_(student)).sum(1))))


def _distillation_slope(chunk: Chunk) -> Kept:
    """w·(softmax(student) − softmax(teacher)); rows hold (student's lse, teacher's lse, w). The total is Σ slope·s."""
    assert chunk.teacher is not None
    lse_s, lse_t, weight = chunk.rows
    slope = (chunk.s * chunk.scalars[0]).sub_(lse_s).exp_()
    slope.sub_(chunk.teacher.mul_(chunk.scalars[1]).sub_(lse_t).exp_()).mul_(weight)
    return Kept(totals=_weighted_sum(slope, chunk.s)[None], slope=slope)


_STATE = (EMPTY_MAX, 0.0)
_SUMS = (*_STATE, 0.0, 0.0)
_MATCH = (0.0,)
_HARDEST = (EMPTY_MAX, -1.0)
_STATS = partial(Epilogue, _softmax_stats, "softmax_stats", merge_softmax)
_SLOPE = partial(Epilogue, merge=merge_sums, totals=1, slope=True)

EPILOGUES = {
    "softmax_rows": _STATS(rows=_STATE + _MATCH),
    "softmax_both": _STATS(rows=_STATE + _MATCH, columns=_STATE, both=True),
    "softmax_sums_rows": _STATS(rows=_SUMS + _MATCH, sums=True),
    "softmax_sums_both": _STATS(rows=_SUMS + _MATCH, columns=_SUMS, both=True, sums=True),
    "softmax_slope_rows": _SLOPE(_softmax_slope, "softmax_slope"),
    "softmax_slope_both": _SLOPE(_softmax_slope, "softmax_slope", both=True),
    "sigmoid": _SLOPE(_sigmoid, "sigmoid", rows=(0.0,), totals=2),
    "hinge_hardest": Epilogue(_hinge_hardest, "hinge_hardest", merge_hardest, _HARDEST, _HARDEST, index=1, both=True),
    "hinge_all": _SLOPE(_hinge_all, "hinge_all", rows=(0.0, 0.0), columns=(0.0, 0.0), totals=0, both=True),
    "distillation": Epilogue(
        _distillation_stats, "distillation", merge_distillation, (*_STATE, *_STATE, 0.0), teacher=True
    ),
    "distillation_slope": _SLOPE(_distillation_slope, "distillation_slope", teacher=True),
}
