"""The sigmoid loss of SigLIP over GSSF similarities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    scalar,
    wants_gradient,
)
from gssf_triton.losses.ranks import gather_rows, spread
from gssf_triton.streaming.op import stream_op


@dataclass(frozen=True)
class _Sigmoid(Loss):
    """−Σ_j log σ(y_ij (scale·S_ij + bias)) of every row i.

    There is no normaliser to wait for: of a summed loss the gradients come out of the forward pass (`at_once`), up
    to the factor that comes in backward, so S is computed once. A loss a pair has weights that are known only backward,
    and recomputes. `links` say that a gradient made at once is one of t and y, and hold none of their memory.
    """

    NAME = "sigmoid_loss"
    GRADIENTS = 4

    at_once: bool

    def forward(
        self, t: Tensor, y: Tensor, scale: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, unit_t: Tensor,
        unit_y: Tensor, row_ids: Tensor | None, column_ids: Tensor | None, *links: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weight = t.new_ones((1, t.shape[0]))
        row, *gradients = self._stream(
            scale, bias, rows, columns, unit_t, unit_y, row_ids, column_ids, weight, self.at_once
        )
        return self.total(row[0]), *(gradients if self.at_once else ())

    def saved(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        """Nothing of the product's where its gradients are made already."""
        return (*inputs[2:4], None, None, *inputs[6:]) if self.at_once else inputs[2:]

    def backward(
        self, grad: Tensor, scale: Tensor, bias: Tensor, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None, *made: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        factor, weight = incoming(grad, scale, self.ranks)
        gradients = made[2:]
        if not self.at_once:
            weight = weight.expand(t.shape[0])[None]
            gradients = self._stream(scale, bias, t, y, unit_t, unit_y, row_ids, column_ids, weight, True)[1:]
        totals, d_t, d_y = gradients
        d_scale, d_bias = totals * factor
        return d_t * (factor * scale * unit_y), d_y * (factor * scale * unit_t), d_scale * unit_t * unit_y, d_bias

    def _stream(
        self, scale: Tensor, bias: Tensor, t: Tensor, y: Tensor, unit_t: Tensor, unit_y: Tensor,
        row_ids: Tensor | None, column_ids: Tensor | None, weight: Tensor, wants_slope: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """(row state, totals, slope @ y, slopeᵀ @ t)."""
        scalars = torch.stack((scale * unit_t * unit_y, bias))
        row, _, totals, d_t, d_y = stream_op(
            "sigmoid", t, y, None, None, weight, weight.new_empty((0, y.shape[0])), row_ids, column_ids, scalars,
            self.ranks.own.start, wants_slope, self.backend,
        )  # fmt: skip
        return row, totals, d_t, d_y


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    ids: Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""SigLIP's sigmoid loss over the similarities of a batch of matching pairs, without storing them.

    $$L = -\frac{1}{N} \sum_i \sum_j \log \sigma\left(y_{ij} (\tau S_{ij} + \beta)\right),$$ with y = 1 for matching
    pairs and equal ids, −1 elsewhere. Every pair is judged alone, so the loss and its gradients need S only once.

    Args:
        a: Queries, (N, D).
        b: Gallery, (N, D), of a's dtype and device; b[i] matches a[i].
        W_diag: Diagonal weight, (D,), or None.
        W_blocks: Block-diagonal weight, (G, B, B) with G·B = D, or None.
        logit_scale: τ, a number or a tensor of one element.
        logit_bias: β, a number or a tensor of one element; SigLIP starts it at −10.
        ids: (N,) integers or None; pairs of equal ids are positives.
        normalize: Put both sides on the unit sphere first.
        reduction: "mean" over the rows, "sum", or "none" for one value a row.
        group: As in `info_nce`.
        backend: "auto", "triton" or "torch".

    Returns:
        () or (N,), in float32 (float64 for float64 features). Differentiable once in a, b, the weights, logit_scale and
        logit_bias.

    Raises:
        TypeError: an argument that is not what it should be.
        ValueError: shapes, dtypes or devices that do not agree, no weight, or ids of the wrong length.

    Source:
        Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, eq. in section 3.2.
        The similarity: Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a = torch.eye(3)
        >>> gssf_triton.sigmoid_loss(a, a, torch.ones(3), logit_scale=10.0, logit_bias=-5.0)
        tensor(0.0201)
    """
    check_reduction(reduction, group)
    inputs = check_inputs(a, b, W_diag, W_blocks, normalize, backend)
    check_ids(ids, a)
    options.check_scalar("logit_scale", logit_scale, "a", a)
    options.check_scalar("logit_bias", logit_bias, "a", a)
    sides = fold_sides(inputs)
    scale, bias = scalar(logit_scale, sides.t), scalar(logit_bias, sides.t)
    same = described(
        "sigmoid_loss", inputs, sides, scale, bias, logit_scale=logit_scale, logit_bias=logit_bias,
        ids=ids is not None, reduction=reduction,
    )  # fmt: skip
    (ranks,) = spread(group, (a.shape[0],), a.device, same)
    ids = None if ids is None else ids.to(torch.int64)
    column_ids = None if ids is None else ranks.gather(ids)
    y, summed = gather_rows(sides.y, ranks), reduction != "none"
    at_once = summed and wants_gradient(sides.t, y, scale, bias)
    links = [x[:0].clone() for x in (sides.t, y)] if at_once else []
    op = _Sigmoid(summed, ranks, sides.backend, at_once)
    (loss,) = op(sides.t, y, scale, bias, *operands(sides.t, y, sides.half, sides.backend), ids, column_ids, *links)
    return reduce(loss, reduction, ranks.pairs)
