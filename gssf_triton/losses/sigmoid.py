"""The sigmoid loss of SigLIP over GSSF similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gssf_triton.losses.batch import Batch, Sides
from gssf_triton.losses.common import Loss, Product, Whole
from gssf_triton.metric import Metric
from gssf_triton.streaming.driver import Result


@dataclass(frozen=True)
class _Sigmoid(Loss):
    """−Σ_j log σ(y_ij (scale·S_ij + bias)) of every row i.

    There is no normaliser to wait for: of a summed loss the gradients come out of the forward pass (`at_once`), up
    to the factor that comes in backward, so S is computed once. A loss a pair has weights that are known only backward,
    and recomputes.
    """

    NAME = "sigmoid_loss"
    GRADIENTS = 6

    def values(self, x: Product, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (self._stream(x, None, scale, bias).rows[0],)

    def slopes(self, x: Product, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        kept = self._stream(x, weight, scale, bias)
        return kept.d_t, kept.d_y, *kept.totals.unbind()

    def at_once(self, x: Product, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        kept = self._stream(x, scale.new_ones(x.t.shape[0]), scale, bias)
        return kept.rows[0], kept.d_t, kept.d_y, *kept.totals.clone().unbind()

    def whole(self, x: Product, scale: Tensor, bias: Tensor) -> Whole:
        S = x.t @ x.y.mT
        z = torch.addcmul(bias, S, scale)
        positives = None
        if x.row_ids is not None and x.column_ids is not None:
            positives = (x.row_ids[:, None] == x.column_ids).fill_diagonal_(True)

        def negate_positives(v: Tensor) -> Tensor:
            if positives is not None:
                return torch.where(positives, -v, v)
            v.diagonal().neg_()
            return v

        z = negate_positives(z)
        rows = F.softplus(z, threshold=40.0).sum(1)  # as in the epilogue
        if not self.wants:
            return Whole(rows)
        slope = negate_positives(z.sigmoid_())
        return Whole(rows, slope=slope, totals=(torch.linalg.vecdot(slope, S).sum(), slope.sum()))

    def _stream(self, x: Product, weight: Tensor | None, scale: Tensor, bias: Tensor) -> Result:
        """With slopes if their rows' weights are given."""
        scalars = torch.stack((x.scaled(scale), bias))
        rows = None if weight is None else weight[None]
        return self.stream("sigmoid", x, scalars, rows, wants_slope=weight is not None)


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
    student, scalars = Sides(a, b, Metric(W_diag, W_blocks)), {"logit_scale": logit_scale, "logit_bias": logit_bias}
    return Batch(student, normalize, reduction, group, backend, scalars, ids).run(_Sigmoid)[0]
