"""An operator's two forms: our kernel, and torch's own operations for where `kernels.toolchain` keeps it from running.

Triton is imported at the first call of a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.precision import full_precision
from gssf_triton.similarity import torch_backend


def fold(x: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool) -> Tensor:
    """T(x) of x (M, D), contiguous; a metric with no weights only normalises."""
    if not may_launch("fold", x.dtype, x.device, has_diag=W_diag is not None, has_blocks=W_blocks is not None):
        with full_precision(x):
            return torch_backend.fold(x, W_diag, W_blocks, normalize)
    from gssf_triton.kernels import fold as kernels
    from gssf_triton.kernels.launch import Metric

    return kernels.fold(x, Metric(W_diag, W_blocks), normalize)


def paired(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """The diagonal of S, (N,), of a and b (N, D)."""
    if not may_launch("paired", a.dtype, a.device, has_diag=W_diag is not None, has_blocks=W_blocks is not None):
        with full_precision(a):
            return torch_backend.paired(a, b, W_diag, W_blocks, normalize, out_dtype)
    from gssf_triton.kernels import paired as kernels
    from gssf_triton.kernels.launch import Metric

    return kernels.paired(a, b, Metric(W_diag, W_blocks), normalize, out_dtype)


def pairwise_terms(
    a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(diagonal, block) terms of S, each (Z, M, N)."""
    if not may_launch("pairwise", a.dtype, a.device, has_diag=True, has_blocks=True):
        with full_precision(a):
            return torch_backend.pairwise_terms(a, b, W_diag, W_blocks, normalize, out_dtype)
    from gssf_triton.kernels import pairwise as kernels
    from gssf_triton.kernels.launch import Metric

    return kernels.pairwise_terms(a, b, Metric(W_diag, W_blocks), normalize, out_dtype)


def gradient(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    block_size: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(T'(R), dW_diag, dW_blocks) of R = P x, or R = x without P, those of them that `needs` asks for."""
    needs_rows, _, needs_blocks = needs
    has_blocks = needs_blocks or (needs_rows and W_blocks is not None)
    if not may_launch("gradient", x.dtype, x.device, has_blocks=has_blocks):
        with full_precision(x):
            return _torch_gradient(p, x, y, W_diag, W_blocks, block_size, needs)
    from gssf_triton.kernels import gradient as kernels
    from gssf_triton.kernels.launch import Metric

    return kernels.gradient(p, x, y, Metric(W_diag, W_blocks), block_size, needs)


def _torch_gradient(
    p: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    block_size: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """R is rounded to the operands' dtype, as by the library's product of the plan that is no one-pass plan.

    Not to float16, whose range it may leave where the gradients do not.
    """
    needs_rows, needs_diag, needs_blocks = needs
    product_dtype = x.dtype if p is None else torch.promote_types(p.dtype, x.dtype)
    wide = torch.promote_types(product_dtype, torch.float32)
    operands = wide if product_dtype == torch.float16 else product_dtype
    R = x if p is None else torch.matmul(p.to(operands), x.to(operands))
    rows = d_diag = d_blocks = None
    if needs_rows:
        rows = torch_backend.fold(R, W_diag, None if W_blocks is None else W_blocks.mT).to(x.dtype)
    if needs_diag or needs_blocks:
        assert y is not None
        wide_y, wide_R = (torch_backend.as_rows(rows).to(wide) for rows in (y, R))
        if needs_diag:
            d_diag = (wide_y * wide_R).sum(0)
        if needs_blocks:
            shape = (wide_R.shape[0], x.shape[-1] // block_size, block_size)
            d_blocks = torch.bmm(wide_y.view(shape).permute(1, 2, 0), wide_R.view(shape).transpose(0, 1))
    return rows, d_diag, d_blocks
