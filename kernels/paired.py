"""The matched-pairs kernel: the diagonal of S, from the tile's fold and a row-wise dot product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.launch import blocks_like, cdiv, lanes, launch, matrix, tile, weights
from gssf_triton.kernels.tile import (
    cast,
    clamped_rows,
    fold_chunk,
    folded,
    inverse_norm,
    load_chunk,
    rows_of,
    scaled,
    squares_of,
)
from gssf_triton.kernels.warm import empty, remembered
from gssf_triton.metric import Metric


@triton.jit(do_not_specialize=["M", "chunks"])
def paired_kernel(a, b, weights, s_ptr, M, D, chunks, TILE: tl.constexpr, NORMALIZE: tl.constexpr):
    """s[i] = T(a[i]) · b[i] for a tile of rows, every channel of them; T(a) stays in ACC and is never rounded."""
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    rows_a, rows_b = rows_of(a, rows_m), rows_of(b, rows_m)
    s = tl.zeros([TILE.BLOCK_M], TILE.ACC)
    if NORMALIZE:
        squares_a = tl.zeros([TILE.BLOCK_M], TILE.ACC)
        squares_b = tl.zeros([TILE.BLOCK_M], TILE.ACC)
    for chunk in range(0, chunks):
        x, diagonal, block = fold_chunk(rows_a, weights, chunk, D, False, TILE)
        y = load_chunk(rows_b, chunk, D, TILE).to(TILE.ACC)
        s += tl.sum(folded(x, diagonal, block, weights, TILE.ACC) * y, axis=1)
        if NORMALIZE:
            squares_a += tl.sum(squares_of(x, TILE.ACC), axis=1)
            squares_b += tl.sum(squares_of(y, TILE.ACC), axis=1)
    if NORMALIZE:
        s = scaled(s, inverse_norm(squares_a), inverse_norm(squares_b))
    tl.store(s_ptr + offs_m, cast(s, s_ptr.dtype.element_ty), mask=offs_m < M)


def paired(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The similarity of a[i] with b[i], (M,), of a and b (M, D)."""
    return _paired(a, b, blocks_like(a, metric), normalize, out_dtype)


@remembered
def _paired(a: Tensor, b: Tensor, metric: Metric, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    (M, D), B = a.shape, metric.block_size
    if M == 0 or D == 0:
        return torch.zeros(M, dtype=out_dtype, device=a.device)
    out = empty((M,), out_dtype, a.device)
    config = choice.choose("paired", a.device, a.dtype, M, 0, D, B)
    launch(
        paired_kernel, (cdiv(M, config.BLOCK_M),), a.device, config,
        a=matrix(a), b=matrix(b), weights=weights(metric), s_ptr=out, M=M, D=D,
        chunks=cdiv(lanes(D, B), config.BLOCK_K), TILE=tile(config, a, b, B=B), NORMALIZE=normalize,
    )  # fmt: skip
    return out
