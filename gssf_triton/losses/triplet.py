"""The hinge loss of VSE++, over the hardest negatives or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import options
from gssf_triton.losses.common import (
    Loss,
    check_ids,
    check_inputs,
    check_reduction,
    described,
    fold_sides,
    incoming,
    operands,
    reduce,
    wants_gradient,
)
from gssf_triton.losses.ranks import gather_rows, spread
from gssf_triton.streaming.epilogues import index_bits, merge_hardest, merge_sums
from gssf_triton.streaming.op import stream_op


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """out[at[i]] += rows[i], in a fixed order: on a GPU index_put_ sorts the indices and sums each one's run."""
    if out.device.type == "cpu":
        out.index_add_(0, at, rows)
    else:
        out.index_put_((at,), rows, accumulate=True)


@dataclass(frozen=True)
class _HardestHinge(Loss):
    """max(0, m + max_j S_ij − S_ii) of every row, and of every column.

    One product keeps the value and the index of the hardest negative each way. The gradient has at most two entries a
    row and a column: a gather and a segment sum, no product.
    """

    NAME = "triplet_loss"
    RESULTS = 2

    margin: float

    def forward(
        self, t: Tensor, y: Tensor, rows: Tensor, columns: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        unit, ranks = unit_t * unit_y, self.ranks
        own = ranks.own
        nothing = t.new_empty((0, t.shape[0])), t.new_empty((0, y.shape[0]))
        row, column, _, _, _ = stream_op(
            "hinge_hardest", rows, columns, None, None, *nothing, row_ids, column_ids, unit[None], own.start, False,
            self.backend,
        )  # fmt: skip
        if ranks.group is not None:
            index_bits(column[1]).add_(own.start)
            column = ranks.merge(column, merge_hardest)
        match = (rows.to(t.dtype) * columns[own].to(t.dtype)).sum(1) * unit
        losses = (self.margin + (torch.stack((row[0], column[0, own])) - match)).clamp_min(0)
        violated = losses > 0
        hardest = torch.stack((index_bits(row[1]), index_bits(column[1, own]))).long()
        return self.total(losses.sum(0)), ranks.sum(violated.sum(1)), violated, hardest

    def backward(
        self, grad: Tensor, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor, row_ids: Tensor | None,
        column_ids: Tensor | None, violated: Tensor, hardest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ranks, wide = self.ranks, unit_t.dtype
        t, y = t.to(wide) * unit_t, y.to(wide) * unit_y
        own = ranks.own
        factor, weight = incoming(grad, t, ranks)
        # Not a product: an infinite weight times no violation is 0.
        by_row, by_column = torch.where(violated, factor * weight, 0)
        # A column's hardest row may lie in another process: all of them gather every process's rows and columns.
        all_t = ranks.gather(t)
        at_column, at_row = hardest.clamp_min(0)
        d_t, d_y = torch.zeros_like(all_t), torch.zeros_like(y)
        match = -(by_row + by_column)[:, None]
        d_t[own] = by_row[:, None] * y[at_column] + match * y[own]
        add_rows(d_t, at_row, by_column[:, None] * y[own])
        d_y[own] = by_column[:, None] * all_t[at_row] + match * t
        add_rows(d_y, at_column, by_row[:, None] * t)
        return ranks.sum_own(d_t), d_y


@dataclass(frozen=True)
class _AllHinge(Loss):
    """Σ_j max(0, m + S_ij − S_ii) of every row, and of every column; one product each way, S computed once.

    `at_once`: the gradients of a summed loss come out of the forward pass, up to a factor.
    """

    NAME = "triplet_loss"
    RESULTS = 2

    margin: float
    at_once: bool

    def forward(
        self, t: Tensor, y: Tensor, rows: Tensor, columns: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own = self.ranks.own
        room = self.margin - (rows.to(t.dtype) * columns[own].to(t.dtype)).sum(1) * (unit_t * unit_y)
        row, column, *gradients = self._stream(
            rows, columns, unit_t, unit_y, row_ids, column_ids, room, torch.ones_like(room), self.at_once
        )
        column = self.ranks.merge(column, merge_sums)[:, own]
        losses, counts = row + column
        violations = self.ranks.sum(torch.stack((row[1], column[1])).long().sum(1))
        return self.total(losses), violations, room, counts, *(gradients if self.at_once else ())

    def backward(
        self, grad: Tensor, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor, row_ids: Tensor | None,
        column_ids: Tensor | None, room: Tensor, counts: Tensor, *gradients: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        factor, weight = incoming(grad, room, self.ranks)
        if not self.at_once:
            weights = weight.expand(t.shape[0])
            gradients = self._stream(t, y, unit_t, unit_y, row_ids, column_ids, room, weights, True)[2:]
        d_t, d_y = gradients
        own, wide = self.ranks.own, room.dtype
        # Not a product: an infinite weight times no violation is 0.
        at_match = torch.where(counts > 0, -counts * weight, 0)
        d_t = torch.addcmul(d_t, at_match[:, None], y[own].to(wide))
        d_y = d_y.clone()
        d_y[own].addcmul_(at_match[:, None], t.to(wide))
        return d_t * (factor * unit_y), d_y * (factor * unit_t)

    def _stream(
        self, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor, row_ids: Tensor | None, column_ids: Tensor | None,
        room: Tensor, weight: Tensor, wants_slope: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(row state, column state, slope @ y, slopeᵀ @ t)."""
        rows = torch.stack((room, weight))
        columns = self.ranks.gather(rows.mT).mT.contiguous() if self.ranks.group is not None else rows
        row, column, _, d_t, d_y = stream_op(
            "hinge_all", t, y, None, None, rows, columns, row_ids, column_ids, (unit_t * unit_y)[None],
            self.ranks.own.start, wants_slope, self.backend,
        )  # fmt: skip
        return row, column, d_t, d_y


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
    check_reduction(reduction, group)
    options.check_number("margin", margin)
    options.check_flags(hardest=hardest, return_violations=return_violations)
    inputs = check_inputs(a, b, W_diag, W_blocks, normalize, backend)
    check_ids(ids, a)
    sides = fold_sides(inputs)
    same = described(
        "triplet_loss", inputs, sides, ids=ids is not None, margin=margin, hardest=hardest, reduction=reduction
    )
    (ranks,) = spread(group, (a.shape[0],), a.device, same)
    ids = None if ids is None else ids.to(torch.int64)
    column_ids = None if ids is None else ranks.gather(ids)
    y, summed = gather_rows(sides.y, ranks), reduction != "none"
    common = summed, ranks, sides.backend, float(margin)
    op = _HardestHinge(*common) if hardest else _AllHinge(*common, summed and wants_gradient(sides.t, y))
    loss, violations = op(sides.t, y, *operands(sides.t, y, sides.half, sides.backend), ids, column_ids)
    loss = reduce(loss, reduction, ranks.pairs)
    return (loss, violations) if return_violations else loss
