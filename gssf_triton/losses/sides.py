"""Both ends of a loss's product: features to its operands, and the operands' gradients back to features and weights.

On Triton either is one or two launches, with no float32 array of the features' size in between. The torch forms below
are the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.constants import NORM_EPS
from gssf_triton.metric import Metric, accumulate_dtype
from gssf_triton.similarity import sides, torch_backend
from gssf_triton.similarity.sides import Side


@dataclass(frozen=True)
class Form:
    """How features become operands.

    Attributes:
        normalize: Rows are put on the unit sphere first.
        half: Operands are float16. Not bfloat16: its 8 bits, times a logit scale of 100, would put errors of a percent
            into the gradients. float16 has 11 bits at the same speed.
        backend: "triton" or "torch". torch multiplies in float32 at least.
    """

    normalize: bool
    half: bool
    backend: str

    @property
    def is_float16(self) -> bool:
        return self.half and self.backend == "triton"

    def dtype(self, x: Tensor) -> torch.dtype:
        """The operands' dtype."""
        return torch.float16 if self.is_float16 else accumulate_dtype(x.dtype)


def unit_of(x: Tensor, metric: Metric, form: Form) -> Tensor | None:
    """The unit of x's side, from a bound on its rows; None where operands are not float16."""
    if not form.is_float16:
        return None
    unit = kernels.prepare.bound(metric, form.normalize, x)
    return torch.ones((), device=x.device) if unit is None else unit


def prepare(x: Tensor, metric: Metric, form: Form, unit: Tensor | None) -> Side:
    """The operand of x (M, D)."""
    if form.backend == "triton":
        rows, inverse = sides.prepare(x, metric.W_diag, metric.W_blocks, unit, form.normalize, form.dtype(x))
        return Side(rows, unit, inverse if form.normalize else None)
    rows, inverse = torch_backend.as_dtype(x, accumulate_dtype(x.dtype)), None
    if form.normalize:
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(NORM_EPS)
        rows, inverse = rows / norm, norm.reciprocal()
    if not metric.is_identity:
        rows = torch_backend.fold_plainly(rows, metric)
    # What a function of autograd's keeps must not be one of its inputs.
    return Side(rows.clone() if rows is x else rows, None, inverse)


def finish(
    R: Tensor, x: Tensor, side: Side, metric: Metric, factor: Tensor, needs: tuple[bool, bool, bool], form: Form
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W_diag and W_blocks, those that `needs` says; factor · R is that of T(x̂)."""
    if not any(needs):
        return None, None, None
    if form.backend == "triton":
        grads = sides.finish(R, x, *side, metric.W_diag, metric.W_blocks, factor, *needs)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))
    inverse, rows = side.inverse, torch_backend.as_dtype(x, R.dtype)
    g = R * (factor if inverse is None else factor * inverse)
    dx, d_diag, d_blocks = torch_backend.gradient(None, g, rows, metric, metric.block_size, needs)
    if dx is None:
        return None, d_diag, d_blocks
    if inverse is not None:
        # At the smallest norm the divisor is constant.
        radial = torch.linalg.vecdot(side.rows, g).unsqueeze(1).masked_fill_(inverse >= 1 / NORM_EPS, 0.0)
        # Not radial · inverse, which leaves float32's range where rows are long.
        dx.addcmul_(side.rows if metric.is_identity else rows * inverse, radial, value=-1)
    return torch_backend.as_dtype(dx, x.dtype), d_diag, d_blocks
