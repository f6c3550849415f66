"""The sigmoid loss of SigLIP over GSSF similarities."""

from __future__ import annotations

from typing import Any

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
    scalar,
    wants_gradient,
)
from gssf_triton.losses.ranks import Ranks, gather_rows, spread
from gssf_triton.streaming.op import stream_op


class _Sigmoid(torch.autograd.Function):
    """−Σ_j log σ(y_ij (scale·S_ij + bias)) of every row i.

    There is no normaliser to wait for: of a summed loss the gradients come out of the forward pass, up to the factor
    that comes in backward, so S is computed once. A loss a pair has weights that are known only backward, and
    recomputes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        y: Tensor,
        scale: Tensor,
        bias: Tensor,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        half: bool,
        summed: bool,
        wants_slope: bool,
        ranks: Ranks,
        backend: str,
    ) -> Tensor:
        left, right = operand(t, half, backend), operand(y, half, backend)
        ctx.ranks, ctx.backend, ctx.summed = ranks, backend, summed
        scalars = torch.stack((scale * left.unit * right.unit, bias))
        weight = t.new_ones((1, t.shape[0]))
        nothing = t.new_empty((0, y.shape[0]))
        at_once = summed and wants_slope
        row, _, totals, d_t, d_y = stream_op(
            "sigmoid", left.rows, right.rows, None, None, weight, nothing, row_ids, column_ids, scalars,
            ranks.own.start, at_once, backend,
        )  # fmt: skip
        first, second = (d_t, d_y) if at_once else (left.rows, right.rows)
        ctx.save_for_backward(left.unit, right.unit, scale, scalars, first, second, totals, row_ids, column_ids)
        return ranks.sum(row[0].sum()).to(t.dtype) if summed else row[0].to(t.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit_t, unit_y, scale, scalars, d_t, d_y, totals, row_ids, column_ids = ctx.saved_tensors
        factor, weight = incoming(grad, scale, ctx.ranks)
        if not ctx.summed:
            t, y = d_t, d_y
            nothing = scale.new_empty((0, y.shape[0]))
            _, _, totals, d_t, d_y = stream_op(
                "sigmoid", t, y, None, None, weight[None], nothing, row_ids, column_ids, scalars,
                ctx.ranks.own.start, True, ctx.backend,
            )  # fmt: skip
        d_scale, d_bias = totals.to(scale.dtype) * factor
        return (
            d_t * (factor * scale * unit_y),
            d_y * (factor * scale * unit_t),
            d_scale * unit_t * unit_y,
            d_bias,
            *(None,) * 7,
        )


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
    same = described("sigmoid_loss", a, sides, ids=ids is not None, reduction=reduction)
    (ranks,) = spread(group, (a.shape[0],), a.device, same)
    ids = None if ids is None else ids.to(torch.int64)
    column_ids = None if ids is None else ranks.gather(ids)
    loss: Tensor = _Sigmoid.apply(
        sides.t, gather_rows(sides.y, ranks), scale, bias, ids, column_ids, sides.half, reduction != "none",
        wants_gradient(sides.t, sides.y, scale, bias), ranks, sides.backend,
    )  # fmt: skip
    return reduce(loss, reduction, ranks.pairs)
