"""The hinge loss of VSE++, over the hardest negatives or all of them."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gssf_triton import options
from gssf_triton.losses.common import (
    check_ids,
    check_inputs,
    check_reduction,
    described,
    fold_sides,
    incoming,
    operand,
    reduce,
    wants_gradient,
)
from gssf_triton.losses.ranks import Ranks, gather_rows, spread
from gssf_triton.streaming.epilogues import merge_hardest, merge_sums
from gssf_triton.streaming.op import stream_op


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """out[at[i]] += rows[i], in a fixed order: on a GPU index_put_ sorts the indices and sums each one's run."""
    if out.device.type == "cpu":
        out.index_add_(0, at, rows)
    else:
        out.index_put_((at,), rows, accumulate=True)


class _HardestHinge(torch.autograd.Function):
    """max(0, m + max_j S_ij − S_ii) of every row, and of every column.

    One product keeps the value and the index of the hardest negative each way. The gradient has at most two entries a
    row and a column: a gather and a segment sum, no product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        y: Tensor,
        margin: float,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        half: bool,
        summed: bool,
        ranks: Ranks,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        left, right = operand(t, half, backend), operand(y, half, backend)
        unit, own = left.unit * right.unit, ranks.own
        nothing = t.new_empty((0, t.shape[0])), t.new_empty((0, y.shape[0]))
        row, column, _, _, _ = stream_op(
            "hinge_hardest", left.rows, right.rows, None, None, *nothing, row_ids, column_ids, unit[None],
            own.start, False, backend,
        )  # fmt: skip
        if ranks.group is not None:
            column[1] += own.start
            column = ranks.merge(column, merge_hardest)
        match = (left.rows.to(t.dtype) * right.rows[own].to(t.dtype)).sum(1) * unit
        losses = torch.stack(
            (
                (margin + row[0] - match.double()).clamp_min(0),
                (margin + column[0, own] - match.double()).clamp_min(0),
            )
        )
        violations = ranks.sum((losses > 0).sum(1))
        hardest = torch.stack((row[1], column[1, own])).long()
        ctx.save_for_backward(left.rows, right.rows, left.unit, right.unit, losses > 0, hardest)
        ctx.mark_non_differentiable(violations)
        ctx.ranks, ctx.wide = ranks, t.dtype
        loss = losses.sum(0)
        return (ranks.sum(loss.sum()) if summed else loss).to(t.dtype), violations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        t, y, unit_t, unit_y, violated, hardest = ctx.saved_tensors
        ranks, wide = ctx.ranks, ctx.wide
        t, y = t.to(wide) * unit_t, y.to(wide) * unit_y
        own = ranks.own
        factor, weight = incoming(grad, t, ranks)
        by_row, by_column = violated.to(wide) * (factor * weight)
        # A column's hardest row may lie in another process: all of them gather every process's rows and columns.
        all_t = ranks.gather(t)
        at_column, at_row = hardest.clamp_min(0)
        d_t, d_y = torch.zeros_like(all_t), torch.zeros_like(y)
        match = -(by_row + by_column)[:, None]
        d_t[own] = by_row[:, None] * y[at_column] + match * y[own]
        add_rows(d_t, at_row, by_column[:, None] * y[own])
        d_y[own] = by_column[:, None] * all_t[at_row] + match * t
        add_rows(d_y, at_column, by_row[:, None] * t)
        return ranks.sum_own(d_t), d_y, *(None,) * 7


class _AllHinge(torch.autograd.Function):
    """Σ_j max(0, m + S_ij − S_ii) of every row, and of every column; one product each way, S computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        y: Tensor,
        margin: float,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        half: bool,
        summed: bool,
        wants_slope: bool,
        ranks: Ranks,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        left, right = operand(t, half, backend), operand(y, half, backend)
        unit, own = left.unit * right.unit, ranks.own
        match = (left.rows.to(t.dtype) * right.rows[own].to(t.dtype)).sum(1) * unit
        room = margin - match
        at_once = summed and wants_slope
        rows = torch.stack((room, torch.ones_like(room)))
        columns = ranks.gather(rows.mT).mT.contiguous() if ranks.group is not None else rows
        row, column, _, d_t, d_y = stream_op(
            "hinge_all", left.rows, right.rows, None, None, rows, columns, row_ids, column_ids, unit[None],
            own.start, at_once, backend,
        )  # fmt: skip
        column = ranks.merge(column, merge_sums)
        states = row + column[:, own]
        violations = ranks.sum(torch.stack((row[1].sum(), column[1, own].sum())).long())
        first, second = (d_t, d_y) if at_once else (left.rows, right.rows)
        ctx.save_for_backward(
            left.rows, right.rows, left.unit, right.unit, room, row[1], column[1, own], first, second, row_ids,
            column_ids,
        )  # fmt: skip
        ctx.mark_non_differentiable(violations)
        ctx.ranks, ctx.backend, ctx.summed = ranks, backend, summed
        return (ranks.sum(states[0].sum()) if summed else states[0]).to(t.dtype), violations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        t, y, unit_t, unit_y, room, row_count, column_count, d_t, d_y, row_ids, column_ids = ctx.saved_tensors
        ranks, wide = ctx.ranks, room.dtype
        own = ranks.own
        factor, weight = incoming(grad, room, ranks)
        if not ctx.summed:
            rows = torch.stack((room, weight))
            columns = ranks.gather(rows.mT).mT.contiguous() if ranks.group is not None else rows
            _, _, _, d_t, d_y = stream_op(
                "hinge_all", t, y, None, None, rows, columns, row_ids, column_ids, (unit_t * unit_y)[None],
                own.start, True, ctx.backend,
            )  # fmt: skip
        at_match = -(row_count + column_count).to(wide) * weight
        d_t = torch.addcmul(d_t, at_match[:, None], y[own].to(wide))
        d_y = d_y.clone()
        d_y[own].addcmul_(at_match[:, None], t.to(wide))
        return d_t * (factor * unit_y), d_y * (factor * unit_t), *(None,) * 8


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
    same = described("triplet_loss", a, sides, ids=ids is not None, margin=margin, hardest=hardest, reduction=reduction)
    (ranks,) = spread(group, (a.shape[0],), a.device, same)
    ids = None if ids is None else ids.to(torch.int64)
    column_ids = None if ids is None else ranks.gather(ids)
    y, summed = gather_rows(sides.y, ranks), reduction != "none"
    shared = (float(margin), ids, column_ids, sides.half, summed)
    if hardest:
        loss, violations = _HardestHinge.apply(sides.t, y, *shared, ranks, sides.backend)
    else:
        loss, violations = _AllHinge.apply(sides.t, y, *shared, wants_gradient(sides.t, y), ranks, sides.backend)
    loss = reduce(loss, reduction, ranks.pairs)
    return (loss, violations) if return_violations else loss
