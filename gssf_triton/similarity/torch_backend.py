"""The similarity in plain torch: any device, any float dtype, differentiable any number of times.

All use the fold, S = T(a) bᵀ: T costs D·B multiply-adds a row and the product D·N, so S costs about what cosine does.
No intermediate is larger than S, T(a) or b, in float32 at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype, as_rows
from gssf_triton.precision import SLOW_ON_CPU, float16_operands, full_precision, product_dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype; faster than a `to` that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) on the unit sphere, x / max(‖x‖₂, 1e-12), as torch.nn.functional.normalize.

    As there, a row whose norm overflows becomes 0, and NaN where it holds an infinity.
    """
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS)


def unit_rows_vjp(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient with respect to x, given the one with respect to `unit_rows(x)`; a norm at its floor is a constant."""
    wide_x, wide_grad = x.to(accumulate_dtype(x.dtype)), grad.to(accumulate_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True)
    unit = wide_x / norm.clamp_min(NORM_EPS)
    radial = torch.where(norm > NORM_EPS, (unit * wide_grad).sum(-1, keepdim=True), 0)
    return ((wide_grad - unit * radial) / norm.clamp_min(NORM_EPS)).to(x.dtype)


def fold(x: Tensor, metric: Metric, normalize: bool = False) -> Tensor:
    """T(x) = x ⊙ W_diag + [x_1 W_1 | … | x_G W_G], (..., D) to (..., D) in x's dtype; x itself without weights.

    Weights of one metric a head, (H, D) and (H, G, B, B), fold x (..., H, D).
    """
    with full_precision(x):
        return fold_plainly(x, metric, normalize)


def fold_plainly(x: Tensor, metric: Metric, normalize: bool = False) -> Tensor:
    """The same where autocast is off."""
    if metric.is_identity and not normalize:
        return x
    dtype = x.dtype
    wide = accumulate_dtype(dtype)
    rows, W_diag, W_blocks = as_dtype(x, wide), metric.W_diag, metric.W_blocks
    if normalize:
        rows = unit_rows(rows)
    if W_blocks is None:
        return as_dtype(rows if W_diag is None else rows * as_dtype(W_diag, wide), dtype)
    weight = as_dtype(W_blocks, wide)
    if W_diag is not None:
        # With the diagonal added to the blocks one batched product folds both terms, without a second pass over
        # the rows.
        diagonal = as_dtype(W_diag, wide).view(*W_diag.shape[:-1], *weight.shape[-3:-1])
        weight = weight + torch.diag_embed(diagonal)
    *heads, groups, size, _ = weight.shape
    if heads:
        weight, groups = weight.flatten(0, 1), heads[0] * groups
    shape = x.shape
    rows = rows.reshape(math.prod(shape[: -1 - len(heads)]), groups, size)
    products = torch.bmm(rows.transpose(0, 1), weight)
    return as_dtype(products.transpose(0, 1).reshape(*shape), dtype)


def product(t: Tensor, y: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """t (..., M, D) times y (..., N, D) transposed, in `out_dtype`: operands of `dtype`, sums in float32 at least."""
    if out_dtype != dtype or (dtype in SLOW_ON_CPU and t.device.type == "cpu"):
        dtype = torch.promote_types(accumulate_dtype(dtype), out_dtype)
    elif dtype == torch.float16:
        t, y = float16_operands(t, y)
    return as_dtype(torch.matmul(as_dtype(t, dtype), as_dtype(y, dtype).mT), out_dtype)


def folds_left(a: Tensor, b: Tensor) -> bool:
    """Whether to fold a: True unless b has fewer rows.

    With traced sizes, which must not be guarded, True unless a is larger for all values of them.
    """
    larger: Any = a.numel() > b.numel()
    if torch.compiler.is_compiling() or isinstance(larger, torch.SymBool):
        larger = torch.fx.experimental.symbolic_shapes.statically_known_true(larger)
    return not larger


def operands(
    a: Tensor, b: Tensor, metric: Metric, normalize: bool, fold: Callable[[Tensor, Metric, bool], Tensor]
) -> tuple[Tensor, Tensor]:
    """(t (..., M, D), y (..., N, D)): S = t yᵀ; the side with fewer rows is folded, in float32 at least."""
    wide = accumulate_dtype(a.dtype)

    def as_they_are(x: Tensor) -> Tensor:
        return fold(as_dtype(x, wide), IDENTITY, True) if normalize else x

    if folds_left(a, b):
        return fold(as_dtype(a, wide), metric, normalize), as_they_are(b)
    return as_they_are(a), fold(as_dtype(b, wide), metric.mT, normalize)


def pairwise(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """S (..., M, N) of a (..., M, D) and b (..., N, D)."""
    dtype = product_dtype(a)
    with full_precision(a):
        return product(*operands(a, b, metric, normalize, fold_plainly), dtype, out_dtype)


def pairwise_terms(
    a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The diagonal and the block term of S, each (..., M, N)."""
    diagonal, block = Metric(metric.W_diag), Metric(None, metric.W_blocks)
    return pairwise(a, b, diagonal, normalize, out_dtype), pairwise(a, b, block, normalize, out_dtype)


def paired(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The diagonal of S, (..., N): a[i] against b[i]."""
    wide = accumulate_dtype(a.dtype)
    with full_precision(a):
        folded = fold_plainly(as_dtype(a, wide), metric, normalize)
        return as_dtype((folded * fold_plainly(as_dtype(b, wide), IDENTITY, normalize)).sum(-1), out_dtype)


def gradient(
    p: Tensor | None, x: Tensor, y: Tensor | None, metric: Metric, block_size: int, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(T'(R), dW_diag, dW_blocks) of R = P x, or R = x without P; those that `needs` asks for, the others None.

    R is rounded to the operands' dtype, as by the library's product, but not to float16: R may leave its range though
    the gradients do not.
    """
    needs_rows, needs_diag, needs_blocks = needs
    product_dtype = x.dtype if p is None else torch.promote_types(p.dtype, x.dtype)
    wide = accumulate_dtype(product_dtype)
    operands = wide if product_dtype == torch.float16 else product_dtype
    R = x if p is None else torch.matmul(p.to(operands), x.to(operands))
    rows = d_diag = d_blocks = None
    if needs_rows:
        rows = as_dtype(fold_plainly(R, metric.mT), x.dtype)
    if needs_diag or needs_blocks:
        assert y is not None
        wide_y, wide_R = as_dtype(as_rows(y), wide), as_dtype(as_rows(R), wide)
        if needs_blocks:
            count, channels = wide_R.shape
            shape = count, channels // block_size, block_size
            d_blocks = torch.bmm(wide_y.view(shape).permute(1, 2, 0), wide_R.view(shape).transpose(0, 1))
            if needs_diag:
                d_diag = torch.diagonal_copy(d_blocks, dim1=-2, dim2=-1).flatten()
        elif needs_diag:
            d_diag = (wide_y * wide_R).sum(0)
    return rows, d_diag, d_blocks
