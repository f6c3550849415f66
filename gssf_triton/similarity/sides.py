"""Both ends of a product of folded rows, by Triton: rows to its operand, and its gradient back to rows and weights.

Either is one or two launches, with no float32 array of the rows' size in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.constants import NORM_EPS
from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype, as_rows
from gssf_triton.operators import is_plain, operator
from gssf_triton.precision import full_precision
from gssf_triton.similarity import torch_backend


def has_kernel(kernel: str, x: Tensor, metric: Metric) -> bool:
    """Whether Triton's kernel may run. If not, torch's own operations compute the operator."""
    has_diag, has_blocks = metric.W_diag is not None, metric.W_blocks is not None
    return may_launch(kernel, x.dtype, x.device, has_diag=has_diag, has_blocks=has_blocks)


class Side(NamedTuple):
    """One operand of the product. Rows times `unit` are T(x̂), x̂ = x or, normalised, x · inverse.

    Attributes:
        rows: (M, D).
        unit: A power of two, (); None for 1. It keeps float16 in range.
        inverse: 1 / max(‖x‖₂, 1e-12), (M,), on torch (M, 1); None where rows are not normalised.
    """

    rows: Tensor
    unit: Tensor | None
    inverse: Tensor | None


@operator(
    "gssf::prepare",
    "(Tensor x, Tensor? w_diag, Tensor? w_blocks, Tensor? unit, bool normalize, ScalarType dtype) -> (Tensor, Tensor)",
)
def prepare(
    x: Tensor, w_diag: Tensor | None, w_blocks: Tensor | None, unit: Tensor | None, normalize: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The kernel's operand and inverse norms."""
    return kernels.prepare.prepare(x, Metric(w_diag, w_blocks), normalize, dtype, unit)


@prepare.register_fake
def _(x: Tensor, w_diag: Any, w_blocks: Any, unit: Any, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse = x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype)) if normalize else x.new_empty(0)
    return x.new_empty(x.shape, dtype=dtype), inverse


@operator(
    "gssf::finish",
    "(Tensor R, Tensor x, Tensor rows, Tensor? unit, Tensor? inverse, Tensor? w_diag, Tensor? w_blocks, "
    "Tensor? factor, bool needs_x, bool needs_diag, bool needs_blocks) -> (Tensor, Tensor, Tensor)",
)
def finish(
    R: Tensor, x: Tensor, rows: Tensor, unit: Tensor | None, inverse: Tensor | None, w_diag: Tensor | None,
    w_blocks: Tensor | None, factor: Tensor | None, *needs: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The kernel's gradients of (x, W_diag, W_blocks)."""
    needs_x, needs_diag, needs_blocks = needs
    metric = Metric(w_diag, w_blocks)
    return kernels.prepare.finish(R, x, rows, unit, inverse, metric, factor, (needs_x, needs_diag, needs_blocks))


@finish.register_fake
def _(
    R: Tensor, x: Tensor, rows: Any, unit: Any, inverse: Any, w_diag: Any, w_blocks: Any, factor: Any, *needs: bool
) -> tuple[Tensor, ...]:
    dtypes = x.dtype, *(accumulate_dtype(R.dtype),) * 2
    return tuple(
        like.new_empty(like.shape, dtype=dtype) if wanted else R.new_empty(0)
        for like, dtype, wanted in zip((x, w_diag, w_blocks), dtypes, needs, strict=True)
    )


def unit_fold(x: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """(T of x (..., D) on the unit sphere, contiguous, in x's dtype; inverse norms, one vector)."""
    rows = as_rows(x)
    if has_kernel("fold", x, metric):
        folded, inverse = kernels.fold.unit_fold(rows, metric)
    else:
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulate_dtype(x.dtype))
        folded, inverse = torch_backend.fold(rows, metric, True).contiguous(), norms.clamp_min_(NORM_EPS).reciprocal_()
    return folded if x.dim() == 2 else folded.view(x.shape), inverse


def gradients(
    dS: Tensor, a: Tensor, b: Tensor, metric: Metric, needs: Sequence[bool], kept: Sequence[Tensor], fold_b: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of S with respect to (a, b, W_diag, W_blocks), those that `needs` says, of normalised rows.

    Args:
        dS: S's own, (..., M, N), in the operands' dtype.
        a: (..., M, D), with as many leading dimensions as b.
        b: (..., N, D).
        metric: The weights.
        needs: Which of the four to compute; the others are None.
        kept: T of the folded side, the other side's unit rows, the inverse norms of the first and of the second.
        fold_b: b's side is folded.
    """
    folded, unit, inverse_rows, inverse_columns = kept
    needs_rows, needs_columns, needs_diag, needs_blocks = needs
    rows, columns, weights = a, b, metric
    if fold_b:
        rows, columns, dS, weights = b, a, dS.mT, metric.mT
        needs_rows, needs_columns = needs_columns, needs_rows

    def finished(dT: Tensor, x: Tensor, operand: Tensor, inverse: Tensor, metric: Metric, *needs: bool) -> Any:
        flat = (as_rows(dT), as_rows(x), as_rows(operand), None, inverse, metric.W_diag, metric.W_blocks, None)
        dx, *of_weights = (finish.function if is_plain(dS) else finish)(*flat, *needs)
        return dx.view(x.shape) if needs[0] and x.dim() > 2 else dx, *of_weights

    d_rows = d_columns = d_diag = d_blocks = None
    with full_precision(dS):
        if needs_rows or needs_diag or needs_blocks:
            dT, wanted = torch.matmul(dS, unit), (needs_rows, needs_diag, needs_blocks)
            d_rows, d_diag, d_blocks = finished(dT, rows, folded, inverse_rows, weights, *wanted)
        if needs_columns:
            dT = torch.matmul(dS.mT, folded)
            d_columns = finished(dT, columns, unit, inverse_columns, IDENTITY, True, False, False)[0]
    d_diag, d_blocks = d_diag if needs_diag else None, d_blocks if needs_blocks else None
    d_rows, d_columns = d_rows if needs_rows else None, d_columns if needs_columns else None
    if fold_b:
        return d_columns, d_rows, d_diag, None if d_blocks is None else d_blocks.mT
    return d_rows, d_columns, d_diag, d_blocks
