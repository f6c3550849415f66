"""The fold kernel: T(x), the tile's own fold with no product after it."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import dot_precision
from gssf_triton.kernels.launch import architecture, blocks_like, cdiv, lanes, launch, matrix, tile, weights
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
from gssf_triton.kernels.toolchain import overwrites_operands
from gssf_triton.kernels.warm import empty, remembered
from gssf_triton.metric import Metric, accumulate_dtype

#: Programs that fill a GPU. Beyond, a normalising program writes whole rows: each one reads them whole for their norms.
PROGRAMS = 512
#: Rows of a program whose products are not to be sm_90's asynchronous ones. With those, what is widened on its way to
#: a product is not loaded ahead, and takes twice the registers.
SYNCHRONOUS_ROWS = 32


@triton.jit
def inverse_power(x):
    """1 / x of a power of two within float32's normal numbers, exactly: the sign of its exponent changes."""
    return (0x7F000000 - x.to(tl.float32).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "chunks", "chunks_per_program"])
def fold_kernel(
    x, weights, out, unit_ptr, inverse_ptr, M, D, chunks, chunks_per_program,
    TILE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """T(x) / unit for a tile of rows and a run of chunks; with NORMALIZE of the rows put on the unit sphere first.

    The norm needs the whole row before the first channel is written, so the row is read twice, the second time from
    cache; it is also why normalising programs still read all chunks when they write only some of them. `inverse_ptr`
    gets the inverse norms, `unit_ptr` holds a power of two; either may be None.
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
        if inverse_ptr is not None:
            tl.store(inverse_ptr + offs_m, scale, mask=offs_m < tl.where(tl.program_id(1) == 0, M, 0))
    first = tl.program_id(1) * chunks_per_program
    for chunk in range(first, tl.minimum(first + chunks_per_program, chunks)):
        value, diagonal, block = fold_chunk(rows, weights, chunk, D, True, TILE)
        t = folded(value, diagonal, block, weights, TILE.ACC)
        if NORMALIZE:
            # T of a row whose norm overflows may, too, and 0 times that be NaN.
            t = tl.where(overflown[:, None], 0.0, t * scale[:, None])
        if unit_ptr is not None:
            t *= inverse_power(tl.load(unit_ptr)).to(TILE.ACC)  # loaded here, where ptxas spills nothing
        offs, valid = channels(chunk, D, TILE)
        ptrs = out.ptr + (offs_m.to(tl.int64) * out.row)[:, None] + (offs * out.channel)[None, :]
        tl.store(ptrs, cast(t, out.ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & valid[None, :])


def fold(x: Tensor, metric: Metric, normalize: bool) -> Tensor:
    """T(x) of x (M, D), in x's dtype, contiguous; a metric with no weights only normalises."""
    return folded_rows(x, blocks_like(x, metric), normalize, x.dtype)[0]


def unit_fold(x: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """(`fold` of x (M, D) on the unit sphere, 1 / max(‖x‖₂, 1e-12), (M,), in float32 at least)."""
    out, inverse = folded_rows(x, blocks_like(x, metric), True, x.dtype, None, True)
    assert inverse is not None
    return out, inverse


@remembered
def folded_rows(
    x: Tensor, metric: Metric, normalize: bool, dtype: torch.dtype, unit: Tensor | None = None, norms: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(T(x) / unit in `dtype`, inverse norms) of x (M, D), on the unit sphere with `normalize`; norms with `norms`.

    The blocks' product is in W_blocks' dtype: x's, or float32 beside half-precision x, where it runs in TF32, which
    holds every number of x.
    """
    out = empty(x.shape, dtype, x.device)
    inverse = empty(x.shape[:1], accumulate_dtype(x.dtype), x.device) if norms else None
    if out.numel() == 0:
        return out, None if inverse is None else inverse.fill_(1 / NORM_EPS)
    (M, D), B, arch = x.shape, metric.block_size, architecture(x.device)
    product, numerics = x.dtype if metric.W_blocks is None else metric.W_blocks.dtype, {}
    config = choice.choose("fold", x.device, product, M, 0, D, B)
    if product != x.dtype:
        numerics["PRECISION"] = dot_precision(product, arch, tf32=True)
    if B and arch.startswith("sm_9") and (product != x.dtype or overwrites_operands(arch)):
        config = replace(config, BLOCK_M=min(config.BLOCK_M, SYNCHRONOUS_ROWS))
    chunks, tiles_m = cdiv(lanes(D, B), config.BLOCK_K), cdiv(M, config.BLOCK_M)
    columns = min(config.column_programs, cdiv(PROGRAMS, tiles_m)) if normalize else config.column_programs
    chunks_per_program = cdiv(chunks, min(chunks, columns))
    launch(
        fold_kernel, (tiles_m, cdiv(chunks, chunks_per_program)), x.device, config,
        x=matrix(x), weights=weights(metric), out=matrix(out), unit_ptr=unit, inverse_ptr=inverse,
        M=M, D=D, chunks=chunks, chunks_per_program=chunks_per_program,
        TILE=tile(config, x, B=B, **numerics), NORMALIZE=normalize,
    )  # fmt: skip
    return out, inverse
