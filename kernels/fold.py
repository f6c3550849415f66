"""The fold kernel: T(x), the tile's own fold with no product after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.launch import Metric, launch, needs_wide_channels, numerics, options, pointer
from gssf_triton.kernels.tile import (
    cast,
    channels,
    clamped_rows,
    fold_chunk,
    folded,
    inverse_norm,
    load_masked,
    nothing_of,
)


@triton.jit(do_not_specialize=["M", "chunks", "chunks_per_program"])
def fold_kernel(
    x_ptr,
    stride_xm,
    stride_xd,
    w_diag_ptr,
    stride_wd,
    w_blocks_ptr,
    stride_wg,
    stride_wp,
    stride_wq,
    t_ptr,
    stride_tm,
    stride_td,
    M,
    D,
    chunks,
    chunks_per_program,
    B: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_DIAG: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """T(x) for a tile of rows and a run of chunks; with NORMALIZE of the rows put on the unit sphere first.

    The norm needs the whole row before the first channel is written, so the row is read twice, the second time from
    cache; it is also why normalising programs still read all chunks when they write only some of them.
    """
    tile_m = tl.program_id(0)
    offs_m, rows = clamped_rows(tile_m, M, BLOCK_M)
    x_rows = x_ptr + rows * stride_xm
    if NORMALIZE:
        squares = tl.zeros([BLOCK_M], ACC)
        nothing = tl.zeros([BLOCK_M], ACC)
        for chunk in range(0, chunks):
            offs, valid = channels(chunk, D, B, BLOCK_B, BLOCK_K, WIDE)
            x = load_masked(x_rows[:, None] + (offs * stride_xd)[None, :], valid[None, :], EVEN_D).to(ACC)
            squares += tl.sum(x * x, axis=1)
            nothing += tl.sum(nothing_of(x, ACC), axis=1)
        scale = inverse_norm(squares)
        overflown = (squares == float("inf")) & (nothing == 0)
    first = tl.program_id(1) * chunks_per_program
    for chunk in range(first, tl.minimum(first + chunks_per_program, chunks)):
        x, diagonal, block = fold_chunk(
            chunk, x_rows, stride_xd, w_diag_ptr, stride_wd, w_blocks_ptr, stride_wg, stride_wp, stride_wq, D,
            B, BLOCK_B, BLOCK_M, BLOCK_K, HAS_DIAG, HAS_BLOCKS, EVEN_D, WIDE, True, PRECISION, ACC,
        )  # fmt: skip
        t = folded(x, diagonal, block, HAS_DIAG, HAS_BLOCKS, ACC)
        if NORMALIZE:
            # T of a row whose norm overflows may, too, and 0 times that be NaN.
            t = tl.where(overflown[:, None], 0.0, t * scale[:, None])
        offs, valid = channels(chunk, D, B, BLOCK_B, BLOCK_K, WIDE)
        ptrs = t_ptr + (offs_m.to(tl.int64) * stride_tm)[:, None] + (offs * stride_td)[None, :]
        tl.store(ptrs, cast(t, t_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & valid[None, :])


def fold(x: Tensor, metric: Metric, normalize: bool) -> Tensor:
    """T(x) of x (M, D), in x's dtype, contiguous; a metric with no weights only normalises."""
    M, D = x.shape
    out = torch.empty((M, D), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = lookup.rows(M, D, metric.block_size, x.dtype, x.device, kernel="fold")
    chunks = triton.cdiv(metric.lanes(D), config.BLOCK_K)
    runs = min(chunks, config.column_programs)
    chunks_per_program = triton.cdiv(chunks, runs)
    launch(
        fold_kernel,
        (triton.cdiv(M, config.BLOCK_M), triton.cdiv(chunks, chunks_per_program)),
        x.device,
        **pointer("x", x, "md", x),
        **metric.arguments(x),
        **pointer("t", out, "md", x),
        M=M, D=D, chunks=chunks, chunks_per_program=chunks_per_program,
        BLOCK_M=config.BLOCK_M, BLOCK_K=config.BLOCK_K,
        NORMALIZE=normalize, EVEN_D=metric.is_even(D, config.BLOCK_K), WIDE=needs_wide_channels(x),
        **numerics(x),
        **options(config),
    )  # fmt: skip
    return out
