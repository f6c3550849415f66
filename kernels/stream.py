"""The streaming kernel: the similarity tile, and an epilogue in place of the store of S."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice, epilogues
from gssf_triton.kernels.args import Vector
from gssf_triton.kernels.epilogues import Pairs, StreamTile, Vectors
from gssf_triton.kernels.launch import ALIGNMENT, cdiv, launch, matrix, tile
from gssf_triton.kernels.stream_values import Epilogue, Kept, Operands
from gssf_triton.kernels.tile import cast, clamped_rows, grouped_tile, product_tile, rows_of
from gssf_triton.metric import accumulate_dtype

#: float16 slopes are stored times this: softmaxes below 2⁻²⁴ would vanish otherwise. A power of two, so exact; slopes
#: are at most 2 in size (`losses.common.Loss.incoming`), so 2¹⁴ leaves them below float16's 65,504.
HALF_SLOPE_SCALE = 2.0**14


class Ids(NamedTuple):
    """Pointers to the rows' ids and the columns'."""

    rows: Any
    columns: Any


@triton.jit
def store_all(vectors, values):
    for i in tl.static_range(len(values)):
        tl.store(vectors.at + i * vectors.stride, values[i], mask=vectors.mask)


@triton.jit(do_not_specialize=["stride_rk", "stride_ck", "stride_sm", "M", "N", "chunks", "teacher_chunks", "diagonal"])
def stream_kernel(
    t, y, teacher_t, teacher_y, ids, scalars, rows, stride_rk, columns, stride_ck, row_out, column_out, totals, slope,
    stride_sm, M, N, D, chunks, E, teacher_chunks, diagonal, slope_scale,
    EPILOGUE: tl.constexpr, TILE: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """What EPILOGUE keeps of S = t yᵀ (M, N), t folded before; one program owns one [BLOCK_M, BLOCK_N] tile.

    Its outputs are (outputs, tiles of the other side, length), which the host merges in a fixed order; S is in ACC and
    never leaves the registers but as the slope. Source: as `gssf_triton.losses` says of each loss.
    """
    tiles_m = tl.cdiv(M, TILE.BLOCK_M)
    tiles_n = tl.cdiv(N, TILE.BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_tile(pid, tiles_m, tiles_n, TILE.GROUP_M)
    offs_m, rows_m = clamped_rows(tile_m, M, TILE.BLOCK_M)
    offs_n, rows_n = clamped_rows(tile_n, N, TILE.BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    s = product_tile(rows_of(t, rows_m), rows_of(y, rows_n), D, chunks, TILE)
    second = None
    if TEACHER is not None:
        second = product_tile(rows_of(teacher_t, rows_m), rows_of(teacher_y, rows_n), E, teacher_chunks, TEACHER)
    valid = mask_m[:, None] & mask_n[None, :]
    match = offs_n[None, :] == offs_m[:, None] + diagonal
    same = match & (match == 0)
    if ids is not None:
        same = tl.load(ids.rows + rows_m)[:, None] == tl.load(ids.columns + rows_n)[None, :]
    of_rows = None
    if rows is not None:
        of_rows = Vectors(rows.ptr + rows_m * rows.stride, stride_rk, mask_m)
    of_columns = None
    if columns is not None:
        of_columns = Vectors(columns.ptr + rows_n * columns.stride, stride_ck, mask_n)
    pairs = Pairs(s, second, valid, match, same, tile_m * TILE.BLOCK_M, tile_n * TILE.BLOCK_N)
    kept_rows, kept_columns, sums, slope_tile = EPILOGUE(pairs, of_rows, of_columns, scalars, TILE)
    if row_out is not None:
        store_all(Vectors(row_out + tile_n.to(tl.int64) * M + offs_m, tiles_n.to(tl.int64) * M, mask_m), kept_rows)
    if column_out is not None:
        store_all(
            Vectors(column_out + tile_m.to(tl.int64) * N + offs_n, tiles_m.to(tl.int64) * N, mask_n), kept_columns
        )
    if totals is not None:
        store_all(Vectors(totals + pid, tiles_m * tiles_n, None), sums)
    if slope is not None:
        # Rows of the slope end at a multiple of 16, and so does what is stored of them: 16 bytes at a time, whatever N.
        ptrs = slope + (offs_m.to(tl.int64) * (stride_sm // 16 * 16))[:, None] + offs_n[None, :]
        stored = mask_m[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
        tl.store(ptrs, cast(slope_tile * slope_scale, slope.dtype.element_ty), mask=stored)


def vectors(x: Tensor | None) -> tuple[Vector | None, int]:
    """Vectors (count, length) as the kernel takes them; the stride between them is not specialised."""
    return (None, 0) if x is None else (Vector(x, x.stride(1)), x.stride(0))


def stream(x: Operands, epilogue: Epilogue, wants_slope: bool, whole: tuple[int, int]) -> Kept:
    """What the epilogue keeps of a chunk, which is part of an S of the shape `whole`.

    States are (outputs, tiles, length), not merged yet, and totals (totals, tiles). Half-precision operands have
    half-precision slopes, times `slope_scale`.
    """
    t, y = x.t, x.y
    (M, D), N = t.shape, y.shape[0]
    kernel: Literal["stream", "stream_teacher"] = "stream_teacher" if epilogue.teacher else "stream"
    config = choice.choose(kernel, t.device, t.dtype, *whole, D)
    tiles_m, tiles_n = cdiv(M, config.BLOCK_M), cdiv(N, config.BLOCK_N)

    def output(count: int, *shape: int) -> Tensor | None:
        return t.new_empty((count, *shape), dtype=accumulate_dtype(t.dtype)) if count else None

    row_out, column_out = output(len(epilogue.rows), tiles_n, M), output(len(epilogue.columns), tiles_m, N)
    totals = output(epilogue.totals if wants_slope or not epilogue.slope else 0, tiles_m * tiles_n)
    pitch = cdiv(N, ALIGNMENT) * ALIGNMENT
    slope = t.new_empty((M, pitch)) if wants_slope else None
    (rows, stride_rk), (columns, stride_ck) = vectors(x.rows), vectors(x.columns)
    ids = None
    if x.row_ids is not None and x.column_ids is not None:
        ids = Ids(x.row_ids.contiguous(), x.column_ids.contiguous())
    shape = tile(config, t, y, kind=StreamTile, COLUMNS=epilogue.both, SUMS=epilogue.sums, SLOPE=wants_slope)
    teacher: dict[str, Any] = {"teacher_t": None, "teacher_y": None, "E": None, "teacher_chunks": None, "TEACHER": None}
    if x.teacher_t is not None and x.teacher_y is not None:
        E = x.teacher_t.shape[1]
        teacher = {
            "teacher_t": matrix(x.teacher_t), "teacher_y": matrix(x.teacher_y), "E": E,
            "teacher_chunks": cdiv(E, config.BLOCK_K),
            "TEACHER": tile(config, x.teacher_t, x.teacher_y, PRECISION=shape.PRECISION, ACC=shape.ACC),
        }  # fmt: skip
    launch(
        stream_kernel, (tiles_m * tiles_n,), t.device, config,
        t=matrix(t), y=matrix(y), **teacher, ids=ids, scalars=x.scalars,
        rows=rows, stride_rk=stride_rk, columns=columns, stride_ck=stride_ck,
        row_out=row_out, column_out=column_out, totals=totals, slope=slope, stride_sm=pitch,
        M=M, N=N, D=D, chunks=cdiv(D, config.BLOCK_K),
        diagonal=x.offset, slope_scale=slope_scale(t.dtype),
        EPILOGUE=getattr(epilogues, epilogue.triton), TILE=shape,
    )  # fmt: skip
    return Kept(row_out, column_out, totals, None if slope is None else slope[:, :N])


def slope_scale(dtype: torch.dtype) -> float:
    """What slopes of this dtype are stored times."""
    return HALF_SLOPE_SCALE if dtype == torch.float16 else 1.0
