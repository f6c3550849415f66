"""The hinge loss of VSE++, over the hardest negatives or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.losses.common import Batch, Loss, Product, check_features
from gssf_triton.metric import Metric
from gssf_triton.streaming.driver import Result
from gssf_triton.streaming.epilogues import index_bits, merge_hardest, merge_sums


def add_rows(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """out[at[i]] += rows[i], in a fixed order: on a GPU index_put_ sorts the indices and sums each one's run."""
    if out.device.type == "cpu":
        out.index_add_(0, at, rows)
    else:
        out.index_put_((at,), rows, accumulate=True)


@dataclass(frozen=True)
class _Hinge(Loss):
    NAME = "triplet_loss"
    RESULTS = 2

    margin: float
    hardest: bool

    def match(self, x: Product) -> Tensor:
        """The matching pairs' similarities, (M,)."""
        wide = x.unit_t.dtype
        return (x.t.to(wide) * x.y[self.parts.own].to(wide)).sum(1) * (x.unit_t * x.unit_y)


@dataclass(frozen=True)
class _HardestHinge(_Hinge):
    """max(0, m + max_j S_ij − S_ii) of every row, and of every column.

    One product keeps the value and the index of the hardest negative each way. The gradient has at most two entries a
    row and a column: a gather and a segment sum, no product.
    """

    def values(self, x: Product) -> tuple[Tensor, ...]:
        own = self.parts.own
        row, column, *_ = self.stream("hinge_hardest", x, (x.unit_t * x.unit_y)[None])
        if self.parts.group is not None:
            index_bits(column[1]).add_(own.start)
            column = self.parts.merge(column, merge_hardest)
        losses = (self.margin + (torch.stack((row[0], column[0, own])) - self.match(x))).clamp_min(0)
        violated = losses > 0
        hardest = torch.stack((index_bits(row[1]), index_bits(column[1, own]))).long()
        return losses.sum(0), self.parts.sum(violated.sum(1)), violated, hardest

    def backward(self, grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        _, x, (violated, hardest) = self.unpacked(saved)
        parts, own, wide = self.parts, self.parts.own, x.unit_t.dtype
        t, y = x.t.to(wide) * x.unit_t, x.y.to(wide) * x.unit_y
        factor, weight = self.incoming(grad, t)
        # Not a product: an infinite weight times no violation is 0.
        by_row, by_column = torch.where(violated, factor * weight, 0)
        # A column's hardest row may lie in another process: all of them gather every process's rows and columns.
        all_t = parts.gather(t)
        at_column, at_row = hardest.clamp_min(0)
        d_t, d_y = torch.zeros_like(all_t), torch.zeros_like(y)
        match = -(by_row + by_column)[:, None]
        d_t[own] = by_row[:, None] * y[at_column] + match * y[own]
        add_rows(d_t, at_row, by_column[:, None] * y[own])
        d_y[own] = by_column[:, None] * all_t[at_row] + match * t
        add_rows(d_y, at_column, by_row[:, None] * t)
        return parts.sum_own(d_t), d_y


@dataclass(frozen=True)
class _AllHinge(_Hinge):
    """Σ_j max(0, m + S_ij − S_ii) of every row, and of every column; one product each way, S computed once.

    The gradients of a summed loss come out of the forward pass (`at_once`), up to a factor.
    """

    def values(self, x: Product) -> tuple[Tensor, ...]:
        own = self.parts.own
        room = self.margin - self.match(x)
        kept = self._stream(x, room, torch.ones_like(room), self.at_once)
        row, column = kept.rows, self.parts.merge(kept.columns, merge_sums)[:, own]
        losses, counts = row + column
        violations = self.parts.sum(torch.stack((row[1], column[1])).long().sum(1))
        return losses, violations, room, counts, *((kept.d_t, kept.d_y) if self.at_once else ())

    def slopes(
        self, x: Product, weight: Tensor, room: Tensor, counts: Tensor, *made: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        own, wide = self.parts.own, room.dtype
        d_t, d_y = made if self.at_once else self._stream(x, room, weight, True)[3:]
        # Not a product: an infinite weight times no violation is 0.
        at_match = torch.where(counts > 0, -counts * weight, 0)
        d_t = torch.addcmul(d_t, at_match[:, None], x.y[own].to(wide))
        d_y = d_y.clone()
        d_y[own].addcmul_(at_match[:, None], x.t.to(wide))
        return d_t, d_y, room.new_empty(0)

    def _stream(self, x: Product, room: Tensor, weight: Tensor, wants_slope: bool) -> Result:
        rows = torch.stack((room, weight))
        columns = self.parts.gather(rows.mT).mT.contiguous() if self.parts.group is not None else rows
        return self.stream("hinge_all", x, (x.unit_t * x.unit_y)[None], rows, columns, wants_slope=wants_slope)


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
    student = check_features(a, b, Metric(W_diag, W_blocks), normalize, backend)
    batch, options = Batch(student, reduction, group, ids, {}), {"margin": float(margin), "hardest": hardest}
    loss, violations = batch.run(_HardestHinge if hardest else _AllHinge, at_once=not hardest, **options)
    return (loss, violations) if return_violations else loss
