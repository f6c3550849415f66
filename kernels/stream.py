"""The streaming kernel: the similarity tile, and an epilogue in place of the store of S."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.configs import TRITON_CHUNK_ARRAYS
from gssf_triton.kernels.epilogues import EPILOGUES
from gssf_triton.kernels.launch import (
    ALIGNMENT,
    Metric,
    acc_type,
    accumulator,
    launch,
    needs_wide_channels,
    options,
    pointer,
)
from gssf_triton.kernels.launch import precision as product_precision
from gssf_triton.kernels.pairwise import pairwise
from gssf_triton.kernels.tile import cast, clamped_rows, grouped_tile, similarity_tile
from gssf_triton.streaming import epilogues
from gssf_triton.streaming.driver import Operands
from gssf_triton.streaming.epilogues import Kept

#: float16 slopes are stored times this: softmaxes below 2⁻²⁴ would vanish otherwise. A power of two, so exact; slopes
#: are at most 2 in size (`losses.common.incoming`), so 2¹⁴ leaves them below float16's 65,504.
HALF_SLOPE_SCALE = 2.0**14

#: A multiple of every BLOCK_K there is.
LONGEST_STEP = 128


@triton.jit(do_not_specialize=["stride_rk", "stride_ck", "stride_sm", "M", "N", "chunks", "teacher_chunks", "diagonal"])
def stream_kernel(
    t_ptr,
    stride_tm,
    stride_td,
    y_ptr,
    stride_yn,
    stride_yd,
    teacher_t_ptr,
    stride_um,
    stride_ud,
    teacher_y_ptr,
    stride_vn,
    stride_vd,
    row_in_ptr,
    stride_rk,
    stride_rm,
    column_in_ptr,
    stride_ck,
    stride_cn,
    row_ids_ptr,
    column_ids_ptr,
    scalars_ptr,
    row_out_ptr,
    column_out_ptr,
    totals_ptr,
    slope_ptr,
    stride_sm,
    M,
    N,
    D,
    chunks,
    E,
    teacher_chunks,
    diagonal,
    slope_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EPILOGUE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    TEACHER: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SLOPE: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_E: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """What EPILOGUE keeps of S = t yᵀ (M, N), t folded before; one program owns one [BLOCK_M, BLOCK_N] tile.

    Its outputs are (outputs, tiles of the other side, length), which the host merges in a fixed order; S is in ACC and
    never leaves the registers but as the slope. Source: as `gssf_triton.losses` says of each loss.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_tile(pid, tiles_m, tiles_n, GROUP_M)
    offs_m, rows_m = clamped_rows(tile_m, M, BLOCK_M)
    offs_n, rows_n = clamped_rows(tile_n, N, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    s, _ = similarity_tile(
        t_ptr + rows_m * stride_tm, stride_td, y_ptr + rows_n * stride_yn, stride_yd,
        t_ptr, 0, t_ptr, 0, 0, 0, D, chunks,
        0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
    )  # fmt: skip
    teacher = s
    if TEACHER:
        teacher, _ = similarity_tile(
            teacher_t_ptr + rows_m * stride_um, stride_ud, teacher_y_ptr + rows_n * stride_vn, stride_vd,
            t_ptr, 0, t_ptr, 0, 0, 0, E, teacher_chunks,
            0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_E, WIDE, PRECISION, ACC,
        )  # fmt: skip
    valid = mask_m[:, None] & mask_n[None, :]
    match = offs_n[None, :] == offs_m[:, None] + diagonal
    same = match & (match == 0)
    if HAS_IDS:
        same = tl.load(row_ids_ptr + rows_m)[:, None] == tl.load(column_ids_ptr + rows_n)[None, :]
    slope = EPILOGUE(
        s, teacher, valid, match, same, offs_m, offs_n,
        row_in_ptr + rows_m * stride_rm, stride_rk, column_in_ptr + rows_n * stride_cn, stride_ck, scalars_ptr,
        row_out_ptr + tile_n.to(tl.int64) * M + offs_m, tiles_n.to(tl.int64) * M,
        column_out_ptr + tile_m.to(tl.int64) * N + offs_n, tiles_m.to(tl.int64) * N,
        mask_m, mask_n, totals_ptr + pid, tiles_m * tiles_n, SLOPE, COLUMNS, SUMS,
    )  # fmt: skip
    if SLOPE:
        # Rows of the slope end at a multiple of 16, and so does what is stored of them: 16 bytes at a time, whatever N.
        ptrs = slope_ptr + (offs_m.to(tl.int64) * (stride_sm // 16 * 16))[:, None] + offs_n[None, :]
        stored = mask_m[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
        tl.store(ptrs, cast(slope * slope_scale, slope_ptr.dtype.element_ty), mask=stored)


class TritonEngine:
    """Chunks by `stream_kernel`, which stores slopes alone; half-precision operands have half-precision slopes."""

    ARRAYS: ClassVar[int] = TRITON_CHUNK_ARRAYS

    def __init__(self, chunk: tuple[int, int]) -> None:
        self.chunk = chunk

    def tile(self, operands: Operands, rows: slice, columns: slice, epilogue: str, wants_slope: bool) -> Kept:
        t, y = operands.t[rows], operands.y[columns]
        shape = epilogues.EPILOGUES[epilogue]
        function, both, sums = EPILOGUES[epilogue]
        has_teacher = shape.uses_teacher
        M, N, D = t.shape[0], y.shape[0], t.shape[1]
        # By all of S, not by the chunk: equal rows must have equal similarities in the last chunk, too.
        whole = operands.t.shape[0], operands.y.shape[0]
        config = lookup.stream(*whole, D, t.dtype, t.device, teacher=has_teacher)
        tiles_m, tiles_n = triton.cdiv(M, config.BLOCK_M), triton.cdiv(N, config.BLOCK_N)
        acc = accumulator(t.dtype)
        row_out = t.new_empty((len(shape.row_empty), tiles_n, M), dtype=acc)
        column_out = t.new_empty((len(shape.column_empty), tiles_m, N), dtype=acc)
        totals = t.new_empty((shape.totals, tiles_m * tiles_n), dtype=acc)
        if not wants_slope and shape.makes_slope:
            totals.zero_()
        pitch = triton.cdiv(N, ALIGNMENT) * ALIGNMENT
        slope = t.new_empty((M, pitch)) if wants_slope else None
        teacher_t = None if operands.teacher_t is None else operands.teacher_t[rows]
        teacher_y = None if operands.teacher_y is None else operands.teacher_y[columns]
        E = 0 if teacher_t is None else teacher_t.shape[1]
        has_ids = operands.row_ids is not None and operands.column_ids is not None
        launch(
            stream_kernel,
            (tiles_m * tiles_n,),
            t.device,
            **pointer("t", t, "md", t),
            **pointer("y", y, "nd", t),
            **pointer("teacher_t", teacher_t, "md", t, stride="u"),
            **pointer("teacher_y", teacher_y, "nd", t, stride="v"),
            **pointer("row_in", operands.rows[:, rows], "km", t, stride="r"),
            **pointer("column_in", operands.columns[:, columns], "kn", t, stride="c"),
            row_ids_ptr=t if operands.row_ids is None else operands.row_ids[rows].contiguous(),
            column_ids_ptr=t if operands.column_ids is None else operands.column_ids[columns].contiguous(),
            scalars_ptr=operands.scalars, row_out_ptr=row_out, column_out_ptr=column_out, totals_ptr=totals,
            slope_ptr=t if slope is None else slope, stride_sm=pitch,
            M=M, N=N, D=D, chunks=triton.cdiv(D, config.BLOCK_K), E=E, teacher_chunks=triton.cdiv(E, config.BLOCK_K),
            diagonal=rows.start + operands.offset - columns.start, slope_scale=slope_scale(t.dtype),
            BLOCK_M=config.BLOCK_M, BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, GROUP_M=config.GROUP_M,
            EPILOGUE=function, COLUMNS=both, SUMS=sums, TEACHER=has_teacher, HAS_IDS=has_ids, SLOPE=wants_slope,
            EVEN_D=D % config.BLOCK_K == 0, EVEN_E=E % config.BLOCK_K == 0,
            WIDE=needs_wide_channels(t, y, *(x for x in (teacher_t, teacher_y) if x is not None)),
            PRECISION=product_precision(t.dtype, t.device), ACC=acc_type(acc),
            **options(config),
        )  # fmt: skip
        return Kept(row_out, column_out, totals.sum(1), None if slope is None else slope[:, :N])

    def add_product(self, out: Tensor, p: Tensor, x: Tensor) -> None:
        if p.dtype == out.dtype:
            out.addmm_(p, x)
            return
        alpha = 1 / slope_scale(p.dtype)
        if adds_halves_in_float32(p.dtype, out.dtype, p.device):
            torch.addmm(out, p, x, alpha=alpha, out_dtype=out.dtype, out=out)
            return
        # This library would round a half-precision product to half precision before it is added. Ours takes whole steps
        # of the sum alone, which need no masks: what is left of a batch would be another kernel for every kind of size.
        steps = p.shape[1] // LONGEST_STEP * LONGEST_STEP
        if steps:
            product = torch.empty((1, *out.shape), dtype=out.dtype, device=out.device)
            pairwise(p[None, :, :steps], x[:steps].mT[None], Metric(None, None), False, product)
            out.add_(product[0], alpha=alpha)
        out.addmm_(p[:, steps:].to(out.dtype), x[steps:].to(out.dtype), alpha=alpha)


@cache
def adds_halves_in_float32(dtype: torch.dtype, sums: torch.dtype, device: torch.device) -> bool:
    """True where the library adds products of `dtype` to a matrix of `sums` with none of them rounded to `dtype`.

    Asked of the library itself, once, by a small product: newer versions of torch do so on some devices.
    """
    x, out = torch.zeros((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), dtype=sums, device=device)
    try:
        torch.addmm(out, x, x, out_dtype=sums, out=out)
    except (RuntimeError, TypeError):  # not on this device, and no such argument
        return False
    return True


def slope_scale(dtype: torch.dtype) -> float:
    """What slopes of this dtype are stored times."""
    return HALF_SLOPE_SCALE if dtype == torch.float16 else 1.0
