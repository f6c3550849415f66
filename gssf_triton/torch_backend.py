"""The same functions in plain torch: any device, any float dtype, differentiable any number of times.

Everything rests on the fold, S = T(a) bᵀ: T costs D·B multiply-adds a row, the product D·N, so S costs what cosine
does. No intermediate is larger than S or T(a).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gssf_triton.constants import NORM_EPS


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision features are folded and normalised in float32, and rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as one matrix of rows; the number of rows is spelled out, so that D = 0 works too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) on the unit sphere, x / max(‖x‖₂, 1e-12), as torch.nn.functional.normalize."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS)


def prepare(x: Tensor, normalize: bool) -> Tensor:
    """x (..., D) as the product's plain operand, in x's own dtype."""
    return unit_rows(x.to(accumulate_dtype(x.dtype))).to(x.dtype) if normalize else x


def fold(x: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool = False) -> Tensor:
    """T(x) = x ⊙ W_diag + [x_1 W_1 | … | x_G W_G], (..., D) to (..., D) in x's dtype."""
    wide = accumulate_dtype(x.dtype)
    rows = as_rows(x).to(wide)
    if normalize:
        rows = unit_rows(rows)
    if W_blocks is None:
        assert W_diag is not None
        folded = rows * W_diag.to(wide)
    else:
        groups, size, _ = W_blocks.shape
        weight = W_blocks.to(wide)
        if W_diag is not None:
            # The diagonal rides in the blocks, (G, B, B) numbers: one batched product folds both terms, and no
            # elementwise pass over the rows is left.
            weight = weight + torch.diag_embed(W_diag.to(wide).view(groups, size))
        folded = (
            torch.bmm(rows.reshape(rows.shape[0], groups, size).transpose(0, 1), weight)
            .transpose(0, 1)
            .reshape(rows.shape)
        )
    return folded.to(x.dtype).view(x.shape)


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a (..., M, D) times b (..., N, D) transposed, accumulated in float32 at least, in `out_dtype`."""
    if out_dtype == a.dtype:
        return torch.matmul(a, b.mT)
    wide = torch.promote_types(accumulate_dtype(a.dtype), out_dtype)
    return torch.matmul(a.to(wide), b.to(wide).mT).to(out_dtype)


def pairwise(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """S (..., M, N); folds the side with fewer rows."""
    if a.numel() <= b.numel():
        return product(fold(a, W_diag, W_blocks, normalize), prepare(b, normalize), out_dtype)
    transposed = None if W_blocks is None else W_blocks.mT
    return product(prepare(a, normalize), fold(b, W_diag, transposed, normalize), out_dtype)


def pairwise_terms(
    a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The diagonal and the block term of S, each (..., M, N)."""
    diagonal = pairwise(a, b, W_diag, None, normalize, out_dtype)
    return diagonal, pairwise(a, b, None, W_blocks, normalize, out_dtype)


def paired(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """The diagonal of S, (..., N): a[i] against b[i]."""
    wide = accumulate_dtype(a.dtype)
    folded = fold(a.to(wide), W_diag, W_blocks, normalize)
    return (folded * prepare(b.to(wide), normalize)).sum(-1).to(out_dtype)
