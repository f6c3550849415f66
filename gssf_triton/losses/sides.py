"""Both ends of a loss's product: features to its operands, and the operands' gradients back to features and weights.

On Triton either is one or two launches, with no float32 array of the features' size in between. The torch forms below
are the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.constants import NORM_EPS
from gssf_triton.metric import Metric, accumulate_dtype
from gssf_triton.operators import operator
from gssf_triton.similarity import torch_backend


class Side(NamedTuple):
    """One operand of the product. Rows times `unit` are T(x̂), x̂ = x or, normalised, x · inverse.

    Attributes:
        rows: (M, D).
        unit: A power of two, (); None for 1. It keeps float16 in range.
        inverse: 1 / max(‖x‖₂, 1e-12), (M,); None where rows are not normalised.
    """

    rows: Tensor
    unit: Tensor | None
    inverse: Tensor | None


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


@operator(
    "gssf::prepare",
    "(Tensor x, Tensor? w_diag, Tensor? w_blocks, Tensor? unit, bool normalize, ScalarType dtype) -> (Tensor, Tensor)",
)
def _prepare(
    x: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, unit: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The kernel's operand and inverse norms; the latter are empty where rows are not normalised."""
    rows, inverse = kernels.prepare.prepare(x, Metric(w_diag, w_blocks), normalize, dtype, unit)
    return rows, rows.new_empty(0) if inverse is None else inverse


@_prepare.register_fake
def _(x: Tensor, w_diag: Any, w_blocks: Any, unit: Any, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse = x.new_empty(x.shape[0] if normalize else 0, dtype=accumulate_dtype(x.dtype) if normalize else dtype)
    return x.new_empty(x.shape, dtype=dtype), inverse


@operator(
    "gssf::finish",
    "(Tensor R, Tensor x, Tensor rows, Tensor? unit, Tensor? inverse, Tensor? w_diag, Tensor? w_blocks, Tensor factor, "
    "bool needs_x, bool needs_diag, bool needs_blocks) -> (Tensor, Tensor, Tensor)",
)
def _finish(
    R: Tensor, x: Tensor, rows: Tensor, unit: Tensor | None, inverse: Tensor | None, w_diag: Tensor | None,
    w_blocks: Tensor | None, factor: Tensor, *needs: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The kernel's gradients of (x, W_diag, W_blocks); empty where there is none."""
    needs_x, needs_diag, needs_blocks = needs
    metric = Metric(w_diag, w_blocks)
    grads = kernels.prepare.finish(R, x, rows, unit, inverse, metric, factor, (needs_x, needs_diag, needs_blocks))
    return tuple(R.new_empty(0) if grad is None else grad for grad in grads)


@_finish.register_fake
def _(
    R: Tensor, x: Tensor, rows: Any, unit: Any, inverse: Any, w_diag: Any, w_blocks: Any, factor: Any, *needs: bool
) -> tuple[Tensor, ...]:
    like = (x.new_empty(x.shape), w_diag, w_blocks)
    return tuple(
        R.new_empty(what.shape, dtype=x.dtype if what is like[0] else R.dtype) if wanted else R.new_empty(0)
        for what, wanted in zip(like, needs, strict=True)
    )


def unit_of(x: Tensor, metric: Metric, form: Form) -> Tensor | None:
    """The unit of x's side, from a bound on its rows; None where operands are not float16."""
    if not form.is_float16:
        return None
    unit = kernels.prepare.bound(metric, form.normalize, x)
    return torch.ones((), device=x.device) if unit is None else unit


def prepare(x: Tensor, metric: Metric, form: Form, unit: Tensor | None) -> Side:
    """The operand of x (M, D)."""
    if form.backend == "triton":
        rows, inverse = _prepare(x, metric.W_diag, metric.W_blocks, unit, form.normalize, form.dtype(x))
        return Side(rows, unit, inverse if form.normalize else None)
    rows, inverse = x.to(accumulate_dtype(x.dtype)), None
    if form.normalize:
        inverse = torch.linalg.vector_norm(rows, dim=1).clamp_min_(NORM_EPS).reciprocal_()
        rows = rows * inverse.unsqueeze(1)
    if not metric.is_identity:
        rows = torch_backend.fold(rows, metric)
    # What a function of autograd's keeps must not be one of its inputs.
    return Side(rows.clone() if rows is x else rows, None, inverse)


def finish(
    R: Tensor, x: Tensor, side: Side, metric: Metric, factor: Tensor, needs: tuple[bool, bool, bool], form: Form
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W_diag and W_blocks, those that `needs` says; factor · R is that of T(x̂)."""
    if not any(needs):
        return None, None, None
    if form.backend == "triton":
        grads = _finish(R, x, *side, metric.W_diag, metric.W_blocks, factor, *needs)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, needs, strict=True))
    needs_x, needs_diag, needs_blocks = needs
    g, unit_x = R * factor, side.rows
    dx = d_diag = d_blocks = None
    inverse = None if side.inverse is None else side.inverse.unsqueeze(1)
    if not metric.is_identity:
        unit_x = x.to(g.dtype)
        if inverse is not None:
            unit_x = unit_x * inverse
        if needs_diag or needs_blocks:
            _, d_diag, d_blocks = torch_backend.gradient(
                None, g, unit_x, metric, metric.block_size, (False, needs_diag, needs_blocks)
            )
    if needs_x:
        dx = g if metric.is_identity else torch_backend.fold(g, metric.mT)
        if inverse is not None:
            # At the smallest norm the divisor is constant.
            radial = torch.linalg.vecdot(side.rows, g).unsqueeze(1).masked_fill_(inverse >= 1 / NORM_EPS, 0.0)
            dx = dx.addcmul_(unit_x, radial, value=-1).mul_(inverse)
        dx = dx.to(x.dtype)
    return dx, d_diag, d_blocks
