"""The same functions in plain torch: any device, any float dtype, differentiable any number of times.

Everything rests on the fold, S = T(a) bᵀ: T costs D·B multiply-adds a row, the product D·N, so S costs what cosine
does. No intermediate has more numbers than S or T(a).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.precision import float16_operands


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision features are folded and normalised in float32, and rounded once."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def as_rows(x: Tensor) -> Tensor:
    """x (..., D) as one matrix of rows; the number of rows is spelled out, so that D = 0 works too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_rows(x: Tensor) -> Tensor:
    """x (..., D) on the unit sphere, x / max(‖x‖₂, 1e-12), as torch.nn.functional.normalize.

    As there, a row whose norm overflows becomes 0, and NaN where it holds an infinity.
    """
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS)


def fold(x: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool = False) -> Tensor:
    """T(x) = x ⊙ W_diag + [x_1 W_1 | … | x_G W_G], (..., D) to (..., D) in x's dtype; x itself without weights."""
    if W_diag is None and W_blocks is None and not normalize:
        return x
    wide = accumulate_dtype(x.dtype)
    rows = as_rows(x).to(wide)
    if normalize:
        rows = unit_rows(rows)
    if W_blocks is None:
        folded = rows if W_diag is None else rows * W_diag.to(wide)
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


def product(t: Tensor, y: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """t (..., M, D) times y (..., N, D) transposed, in `out_dtype`: operands of `dtype`, sums in float32 at least."""
    # A CPU multiplies float32 faster than float16, and its range is no concern.
    if out_dtype != dtype or (dtype == torch.float16 and t.device.type == "cpu"):
        dtype = torch.promote_types(accumulate_dtype(dtype), out_dtype)
    elif dtype == torch.float16:
        t, y = float16_operands(t, y)
    return torch.matmul(t.to(dtype), y.to(dtype).mT).to(out_dtype)


def folds_left(a: Tensor, b: Tensor) -> bool:
    """Whether a is the side to fold, that of fewer rows.

    Of traced sizes no guard may fix which is larger: a is folded unless it is the larger one whatever they are.
    """
    larger: Any = a.numel() > b.numel()
    if torch.compiler.is_compiling() or isinstance(larger, torch.SymBool):
        larger = torch.fx.experimental.symbolic_shapes.statically_known_true(larger)
    return not larger


def operands(
    a: Tensor,
    b: Tensor,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    normalize: bool,
    fold_rows: Callable[[Tensor, Tensor | None, Tensor | None, bool], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(t (..., M, D), y (..., N, D)): S = t yᵀ; the side with fewer rows is folded, in float32 at least."""
    wide, fold_rows = accumulate_dtype(a.dtype), fold_rows or fold

    def as_they_are(x: Tensor) -> Tensor:
        return fold_rows(x.to(wide), None, None, True) if normalize else x

    if folds_left(a, b):
        return fold_rows(a.to(wide), W_diag, W_blocks, normalize), as_they_are(b)
    transposed = None if W_blocks is None else W_blocks.mT
    return as_they_are(a), fold_rows(b.to(wide), W_diag, transposed, normalize)


def pairwise_terms(
    a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor, normalize: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The diagonal and the block term of S, each (..., M, N)."""
    diagonal = product(*operands(a, b, W_diag, None, normalize), a.dtype, out_dtype)
    return diagonal, product(*operands(a, b, None, W_blocks, normalize), a.dtype, out_dtype)


def paired(
    a: Tensor, b: Tensor, W_diag: Tensor | None, W_blocks: Tensor | None, normalize: bool, out_dtype: torch.dtype
) -> Tensor:
    """The diagonal of S, (..., N): a[i] against b[i]."""
    wide = accumulate_dtype(a.dtype)
    folded = fold(a.to(wide), W_diag, W_blocks, normalize)
    return (folded * fold(b.to(wide), None, None, normalize)).sum(-1).to(out_dtype)
