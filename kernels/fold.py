"""The fold kernel: T(x), the tile's own fold with no product after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.launch import cdiv, lanes, launch, matrix, tile, weights
from gssf_triton.kernels.tile import (
    cast,
    channels,
    clamped_rows,
    fold_chunk,
    folded,
    inverse_norm,
    load_chunk,
    nothing_of,
    rows_of,
)
from gssf_triton.metric import Metric


@triton.jit(do_not_specialize=["M", "chunks", "chunks_per_program"])
def fold_kernel(
    x, weights, out, M, D, chunks, chunks_per_program, TILE: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """T(x) for a tile of rows and a run of chunks; with NORMALIZE of the rows put on the unit sphere first.

    The norm needs the whole row before the first channel is written, so the row is read twice, the second time from
    cache; it is also why normalising programs still read all chunks when they write only some of them.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    rows = rows_of(x, rows_m)
    if NORMALIZE:
        squares = tl.zeros([TILE.BLOCK_M], TILE.ACC)
        nothing = tl.zeros([TILE.BLOCK_M], TILE.ACC)
        for chunk in range(0, chunks):
            value = load_chunk(rows, chunk, D, TILE).to(TILE.ACC)
            squares += tl.sum(value * value, axis=1)
            nothing += tl.sum(nothing_of(value, TILE.ACC), axis=1)
        scale = inverse_norm(squares)
        overflown = (squares == float("inf")) & (nothing == 0)
    first = tl.program_id(1) * chunks_per_program
    for chunk in range(first, tl.minimum(first + chunks_per_program, chunks)):
        value, diagonal, block = fold_chunk(rows, weights, chunk, D, True, TILE)
        t = folded(value, diagonal, block, weights, TILE.ACC)
        if NORMALIZE:
            # T of a row whose norm overflows may, too, and 0 times that be NaN.
            t = tl.where(overflown[:, None], 0.0, t * scale[:, None])
        offs, valid = channels(chunk, D, TILE)
        ptrs = out.ptr + (offs_m.to(tl.int64) * out.row)[:, None] + (offs * out.channel)[None, :]
        tl.store(ptrs, cast(t, out.ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & valid[None, :])


def fold(x: Tensor, metric: Metric, normalize: bool) -> Tensor:
    """T(x) of x (M, D), in x's dtype, contiguous; a metric with no weights only normalises."""
    (M, D), B = x.shape, metric.block_size
    out = torch.empty((M, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = choice.choose("fold", x.device, x.dtype, M, 0, D, B)
    chunks = cdiv(lanes(D, B), config.BLOCK_K)
    chunks_per_program = cdiv(chunks, min(chunks, config.column_programs))
    launch(
        fold_kernel, (cdiv(M, config.BLOCK_M), cdiv(chunks, chunks_per_program)), x.device, config,
        x=matrix(x), weights=weights(metric, x), out=matrix(out), M=M, D=D, chunks=chunks,
        chunks_per_program=chunks_per_program, TILE=tile(config, x, B=B), NORMALIZE=normalize,
    )  # fmt: skip
    return out
