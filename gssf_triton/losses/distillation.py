"""Distillation of one model's similarities into another's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton.losses.batch import Batch, Sides
from gssf_triton.losses.common import Loss, Product, Whole
from gssf_triton.metric import Metric
from gssf_triton.streaming.epilogues import log_sum_exp


@dataclass(frozen=True)
class _Distillation(Loss):
    """KL(softmax of the teacher's row ‖ softmax of the student's row); both similarities come from one pass."""

    NAME = "distillation_loss"
    GRADIENTS = 5

    def values(self, x: Product, scale: Tensor) -> tuple[Tensor, ...]:
        scalars = torch.stack((x.scaled(scale), x.scaled_teacher(scale)))
        row = self.stream("distillation", x, scalars).rows
        # Like terms first: the difference of two log-sum-exps of 100 would have lost three digits.
        loss = row[4] / row[3] + (row[0] - row[2]) + (row[1].log() - row[3].log()) if x.y.shape[0] else row[4]
        return loss, scalars, torch.stack((log_sum_exp(row[0:2]), log_sum_exp(row[2:4])))

    def slopes(
        self, x: Product, weight: Tensor, scale: Tensor, scalars: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.cat((lse, weight[None]))
        slope = self.stream("distillation_slope", x, scalars, rows, wants_slope=True)
        return slope.d_t, slope.d_y, slope.totals[0]

    def whole(self, x: Product, scale: Tensor) -> Whole:
        assert x.teacher_t is not None and x.teacher_y is not None
        S = x.t @ x.y.mT
        student = (S * scale if self.wants else S.mul_(scale)).log_softmax(1)
        teacher = ((x.teacher_t * scale) @ x.teacher_y.mT).log_softmax(1)
        p, ratio = teacher.exp(), teacher.sub_(student)
        if not self.wants:
            return Whole(p.mul_(ratio).sum(1))
        loss, slope = torch.linalg.vecdot(p, ratio), student.exp_().sub_(p)
        return Whole(loss, slope=slope, totals=(torch.linalg.vecdot(slope, S).sum(),))


def distillation_loss(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None = None,
    W_blocks: Tensor | None = None,
    *,
    teacher_a: Tensor,
    teacher_b: Tensor,
    teacher_W_diag: Tensor | None = None,
    teacher_W_blocks: Tensor | None = None,
    logit_scale: Tensor | float,
    normalize: bool = False,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Make the student's similarities rank as the teacher's do, without storing either's.

    $$L = \frac{1}{M} \sum_i \mathrm{KL}\big(\mathrm{softmax}_j(\tau S^{teacher}_{ij}) \,\|\,
    \mathrm{softmax}_j(\tau S_{ij})\big)$$

    Args:
        a: The student's queries, (M, D).
        b: The student's gallery, (N, D).
        W_diag: The student's diagonal weight, (D,), or None.
        W_blocks: The student's block-diagonal weight, (G, B, B) with G·B = D, or None.
        teacher_a: The teacher's queries, (M, E), of the same items as a; any E.
        teacher_b: The teacher's gallery, (N, E), of the same items as b.
        teacher_W_diag: The teacher's diagonal weight, (E,), or None.
        teacher_W_blocks: The teacher's block-diagonal weight, or None. Without either: plain dot products.
        logit_scale: τ of both softmaxes, a number or a tensor of one element.
        normalize: Put all four on the unit sphere first.
        reduction: "mean" over the queries, "sum", or "none" for one value a query.
        group: As in `info_nce`: each process passes its part of the queries and of the gallery.
        backend: "auto", "triton" or "torch".

    Returns:
        () or (M,), in float32 (float64 for float64 features). Differentiable once in a, b, the student's weights and
        logit_scale (through the student's softmax); never in anything of the teacher's.

    Raises:
        TypeError: an argument that is not what it should be.
        ValueError: shapes, dtypes or devices that do not agree, or no weight for the student.

    Source:
        Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, on rows of similarities.
        The similarity: Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch, gssf_triton
        >>> a = torch.eye(3)
        >>> gssf_triton.distillation_loss(a, a, torch.ones(3), teacher_a=a, teacher_b=a, logit_scale=5.0).item()
        0.0
        >>> gssf_triton.distillation_loss(a, a, torch.ones(3), teacher_a=a, teacher_b=a.flip(0), logit_scale=1.0)
        tensor(0.2428)
    """
    student = Sides(a, b, Metric(W_diag, W_blocks))
    teacher = Sides(teacher_a, teacher_b, Metric(teacher_W_diag, teacher_W_blocks))
    scalars = {"logit_scale": logit_scale}
    batch = Batch(student, normalize, reduction, group, backend, scalars, teacher=teacher)
    return batch.run(_Distillation)[0]
