"""The hinge loss of VSE++, over the hardest negatives or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.losses.batch import Batch, Sides
from gssf_triton.losses.common import Loss, Product, Whole
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype
from gssf_triton.similarity.functional import BACKENDS
from gssf_triton.streaming.driver import Result
from gssf_triton.streaming.epilogues import EMPTY_MAX, index_bits, merge_hardest, merge_sums


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """out[at[i]] += rows[i], in a fixed order: on a GPU index_put_ sorts the indices and sums each one's run."""
    if out.device.type == "cpu":
        out.index_add_(0, at, rows)
    else:
        out.index_put_((at,), rows, accumulate=True)


@dataclass(frozen=True)
class _Hinge(Loss):
    """Its second result, how many negatives violate the margin, may be empty without `return_violations`."""

    NAME = "triplet_loss"
    RESULTS = 2

    margin: float
    hardest: bool
    return_violations: bool

    def match(self, x: Product) -> Tensor:
        """The matching pairs' similarities, (M,)."""
        s = BACKENDS[self.form.backend].paired(x.t, x.y[self.parts.own], IDENTITY, False, accumulate_dtype(x.t.dtype))
        return s if x.unit is None else s * x.unit

    def unit(self, x: Product) -> Tensor:
        """What S is of t yᵀ, (1,)."""
        return x.t.new_ones(1, dtype=accumulate_dtype(x.t.dtype)) if x.unit is None else x.unit[None]


@dataclass(frozen=True)
class _HardestHinge(_Hinge):
    """max(0, m + max_j S_ij − S_ii) of every row, and of every column.

    One product keeps the value and the index of the hardest negative each way. The gradient has at most two entries a
    row and a column: a gather and a segment sum, no product.
    """

    MAKES_SLOPES = False

    def values(self, x: Product) -> tuple[Tensor, ...]:
        own = self.parts.own
        row, column, *_ = self.stream("hinge_hardest", x, self.unit(x))
        if self.parts.group is not None:
            index_bits(column[1]).add_(own.start)
            column = self.parts.merge(column, merge_hardest)
        hardest = torch.stack((index_bits(row[1]), index_bits(column[1, own]))).long()
        return self._of(torch.stack((row[0], column[0, own])), hardest, self.match(x))

    def stored(self, x: Product, *scalars: Tensor) -> tuple[Tensor, ...]:
        s = x.t @ x.y.mT
        match = s.diagonal().clone()
        if x.row_ids is not None and x.column_ids is not None:
            s.masked_fill_(x.row_ids[:, None] == x.column_ids, EMPTY_MAX)
        s.fill_diagonal_(EMPTY_MAX)
        if not len(s):
            return self._of(s.new_empty(2, 0), s.new_empty(2, 0, dtype=torch.int64), match)
        if not self.wants:
            # Without indices, which take longer to find.
            return self._of(torch.stack((s.amax(1), s.amax(0))), None, match)
        (row, at_column), (column, at_row) = s.max(1), s.max(0)
        return self._of(torch.stack((row, column)), torch.stack((at_column, at_row)), match)

    def _of(self, negative: Tensor, hardest: Tensor | None, match: Tensor) -> tuple[Tensor, ...]:
        """Of every row and every column, (2, M), the hardest negative's similarity and, for a gradient, its index."""
        # In this order: the margin is small beside a large similarity.
        losses = (negative - match).add_(self.margin).clamp_min_(0)
        if not (self.wants or self.return_violations):
            return losses.sum(0), match.new_empty(0)
        violated = losses > 0
        return losses.sum(0), self.parts.sum(violated.sum(1)), *(() if hardest is None else (violated, hardest))

    def slopes(self, x: Product, weight: Tensor, violated: Tensor, hardest: Tensor) -> tuple[Tensor, ...]:
        parts, own = self.parts, self.parts.own
        y = x.y[own]
        # Not a product: an infinite weight times no violation is 0.
        by_row, by_column = torch.where(violated, weight, 0)[..., None]
        # A column's hardest row may lie in another process: all of them gather every process's rows and columns.
        all_t = parts.gather(x.t)
        # Into range from either side: on the stub of a GPU no kernel has written them.
        at_column, at_row = hardest.clamp(0, all_t.shape[0] - 1)
        match = by_row + by_column
        d_t = (by_row * x.y.index_select(0, at_column)).addcmul_(match, y, value=-1)
        d_y = (by_column * all_t.index_select(0, at_row)).addcmul_(match, x.t, value=-1)
        if parts.group is not None:
            d_t, d_y = (d.new_zeros(all_t.shape).slice_scatter(d, 0, own.start, own.stop) for d in (d_t, d_y))
        add_rows(d_t, at_row, by_column * y)
        add_rows(d_y, at_column, by_row * x.t)
        return parts.sum_own(d_t), d_y


@dataclass(frozen=True)
class _AllHinge(_Hinge):
    """Σ_j max(0, m + S_ij − S_ii) of every row, and of every column; one product each way, S computed once.

    The gradients of a summed loss come out of the forward pass, up to a factor.
    """

    def values(self, x: Product) -> tuple[Tensor, ...]:
        room = self.margin - self.match(x)
        losses, violations, counts, _ = self._of(x, room, torch.ones_like(room), False)
        return losses, violations, room, counts

    def slopes(self, x: Product, weight: Tensor, room: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        # Not a product: an infinite weight times no violation is 0.
        at_match = torch.where(counts > 0, -counts * weight, 0)
        return self._with_matches(x, at_match, self._stream(x, room, weight, True))

    def at_once(self, x: Product) -> tuple[Tensor, ...]:
        room = self.margin - self.match(x)
        losses, violations, counts, kept = self._of(x, room, torch.ones_like(room), True)
        return losses, violations, *self._with_matches(x, -counts, kept)

    def whole(self, x: Product) -> Whole:
        s = x.t @ x.y.mT
        room, excluded = self.margin - s.diagonal(), None
        if x.row_ids is not None and x.column_ids is not None:
            excluded = x.row_ids[:, None] == x.column_ids

        def direction(violation: Tensor, dim: int) -> tuple[Tensor, Tensor]:
            """(Σ violation along `dim`, 1 for each violation, else 0)."""
            if excluded is not None:
                violation.masked_fill_(excluded, 0.0)
            total = violation.fill_diagonal_(0.0).relu_().sum(dim)
            # Numbers, not booleans, which take ten times as long. NaN is a violation: it must not vanish from the loss.
            return total, violation.ne_(0) if self.wants or self.return_violations else violation

        (of_rows, slope), (of_columns, by_column) = direction(s + room[:, None], 1), direction(s.add_(room), 0)
        losses = of_rows + of_columns
        if not (self.wants or self.return_violations):
            return Whole(losses, (losses.new_empty(0),))
        row, column = slope.sum(1), by_column.sum(0)
        counts = torch.stack((row, column)).long().sum(1)
        if not self.wants:
            return Whole(losses, (counts,))
        slope = slope.add_(by_column)
        torch.neg(row + column, out=slope.diagonal())
        return Whole(losses, (counts,), slope)

    def _of(self, x: Product, room: Tensor, weight: Tensor, wants_slope: bool) -> tuple[Tensor, Tensor, Tensor, Result]:
        """(losses, how many pairs violate the margin each way, the same a row and column together, what was kept)."""
        kept = self._stream(x, room, weight, wants_slope)
        row, column = kept.rows, self.parts.merge(kept.columns, merge_sums)[:, self.parts.own]
        losses, counts = row + column
        return losses, self.parts.sum(torch.stack((row[1], column[1])).long().sum(1)), counts, kept

    def _with_matches(self, x: Product, at_match: Tensor, kept: Result) -> tuple[Tensor, ...]:
        """The slope's products, with its values at the matching pairs, (M,)."""
        own, at_match = self.parts.own, at_match[:, None]
        kept.d_t.addcmul_(at_match, x.y[own])
        kept.d_y[own].addcmul_(at_match, x.t)
        return kept.d_t, kept.d_y

    def _stream(self, x: Product, room: Tensor, weight: Tensor, wants_slope: bool) -> Result:
        rows = torch.stack((room, weight))
        # A view, so that a launcher can tell both sides apart.
        columns = self.parts.gather(rows.mT).mT.contiguous() if self.parts.group is not None else rows.view_as(rows)
        return self.stream("hinge_all", x, self.unit(x), rows, columns, wants_slope=wants_slope)


@overload
def triplet_loss(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    ids: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "sum",
    return_violations: Literal[False] = False,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def triplet_loss(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    ids: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "sum",
    return_violations: Literal[True],
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def triplet_loss(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    margin: float = 0.2,
    hardest: bool = True,
    ids: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "sum",
    return_violations: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""VSE++'s hinge loss over the similarities of a batch of matching pairs, without storing them.

    $$L = \sum_i \max_j\,[m + S_{ij} - S_{ii}]_+ + \sum_j \max_i\,[m + S_{ij} - S_{jj}]_+$$ over the negatives, the
    hardest one of every row and column; with `hardest=False` the sum over all of them in place of the maximum.

    Args:
        a: Queries, (N, D).
        b: Gallery, (N, D), of a's dtype and device; b[i] matches a[i].
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        margin: m.
        hardest: The hardest negative (VSE++), or all of them, which is the usual warm-up of the first epochs. Under
            torch.compile each is a graph of its own, compiled at its first call; switching compiles nothing again.
        ids: (N,) integers or None; pairs of equal ids are never negatives of each other.
        normalize: Put both sides on the unit sphere first.
        reduction: "sum" over the batch, "mean" over its pairs, or "none" for one value a pair, both directions added.
        return_violations: Return as well how many negatives violate the margin. Training with the hardest negatives
            dies by all features becoming one: the loss then stays at 2 · margin · N and both counts at N.
        group: As in `info_nce`.
        backend: "auto", "triton" or "torch".

    Returns:
        () or (N,), in float32 (float64 for float64 features), differentiable once in a, b and the weights. With
        `return_violations` also (2,) int64: rows and columns whose hardest negative violates the margin, or with
        `hardest=False` the pairs that do. Of equally hard negatives the one of the lowest index gets the gradient.

    Raises:
        TypeError: an argument that is not what it should be.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or ids of the wrong length.

    Source:
        Faghri et al., "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives", BMVC 2018, eq. 5 and 6.
        The similarity: Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.9, 1.0]])
        >>> gssf_triton.triplet_loss(a, b, torch.ones(2), margin=0.2)
        tensor(0.2000)
        >>> gssf_triton.triplet_loss(a, b, torch.ones(2), margin=0.2, return_violations=True)
        (tensor(0.2000), tensor([1, 1]))
    """
    checks.check_number("margin", margin)
    checks.check_flags(hardest=hardest, return_violations=return_violations)
    batch = Batch(Sides(a, b, Metric(W_diag, W_blocks)), normalize, reduction, group, backend, {}, ids)
    form = _HardestHinge if hardest else _AllHinge
    loss, violations = batch.run(form, margin=margin, hardest=hardest, return_violations=return_violations)
    return (loss, violations) if return_violations else loss
