"""The streaming kernel: the similarity tile, and an epilogue in place of the store of S.

A program owns a span of each side, a run of row tiles by a run of column tiles, and walks it in a fixed order. Its row
states stay in registers along a row of tiles; its column states lie in a slice that no other program writes. So all of
S is one launch and one merge a side, whose memory grows with M + N, and the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice, epilogues, toolchain
from gssf_triton.kernels.args import Vector
from gssf_triton.kernels.configs import (
    MERGE_CONFIG,
    BoundedConfig,
    PairwiseConfig,
    may_store,
    stream_config,
    stream_spans,
)
from gssf_triton.kernels.epilogues import Pairs, StreamTile, Vectors, as_bits, merge_sums, negatives
from gssf_triton.kernels.launch import ALIGNMENT, architecture, cdiv, launch, matrix, tile
from gssf_triton.kernels.release import TRITON_RELEASE
from gssf_triton.kernels.stored import Stored, load_similarities, store_similarities
from gssf_triton.kernels.stream_values import Epilogue, Kept, Operands
from gssf_triton.kernels.tile import cast, clamped_rows, grouped_tile, product_tile, rows_of
from gssf_triton.kernels.warm import empty, remembered
from gssf_triton.metric import accumulate_dtype

#: float16 slopes are stored times this: softmaxes below 2⁻²⁴ would vanish otherwise. A power of two, so exact; slopes
#: are at most 2 in size (`losses.common.Loss.incoming`), so 2¹⁴ leaves them below float16's 65,504.
HALF_SLOPE_SCALE = 2.0**14


class Ids(NamedTuple):
    """Pointers to the rows' ids and the columns'."""

    rows: Any
    columns: Any


@triton.constexpr_function
def count(state):
    """How many outputs a state of the tile has."""
    return len(state)


@triton.jit
def store_all(vectors, values):
    for i in tl.static_range(len(values)):
        tl.store(vectors.at + i * vectors.stride, values[i], mask=vectors.mask)


@triton.jit
def load_all(vectors, OUTPUTS: tl.constexpr):
    state = ()
    for i in tl.static_range(OUTPUTS):
        state += (tl.load(vectors.at + i * vectors.stride, mask=vectors.mask, other=0.0),)  # type: ignore[assignment]
    return state


@triton.jit
def merge_into(vectors, first, new, MERGE: tl.constexpr, EMPTY: tl.constexpr, INDEX: tl.constexpr):
    """Merge new values into the state at `vectors`; at the `first` tile into the EMPTY state."""
    DTYPE: tl.constexpr = vectors.at.dtype.element_ty
    state = ()
    for i in tl.static_range(count(EMPTY)):
        empty = tl.full([], EMPTY[i], DTYPE)
        if i == INDEX:
            empty = as_bits(empty.to(tl.int32), DTYPE)
        old = tl.load(vectors.at + i * vectors.stride, mask=vectors.mask, other=0.0)
        state += (tl.where(first, empty, old),)  # type: ignore[assignment]
    store_all(vectors, MERGE(state, new))


@triton.jit
def span_of(number, tiles, spans):
    """(first, length) of a side's `number`-th run of tiles; the lengths differ by one at most."""
    first = number * (tiles // spans) + tl.minimum(number, tiles % spans)
    return first, tiles // spans + (number < tiles % spans).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "stride_rk", "stride_ck", "stride_sm", "M", "N", "chunks", "teacher_chunks", "diagonal", "first_m", "first_n",
        "tiles_m", "tiles_n", "spans_m", "spans_n", "stride_z",
    ]
)  # fmt: skip
def stream_kernel(
    t, y, teacher_t, teacher_y, ids, scalars, rows, stride_rk, columns, stride_ck, row_out, column_out, fresh, totals,
    slope, stride_sm, stored, stride_z, M, N, D, chunks, E, teacher_chunks, diagonal, slope_scale, first_m, first_n,
    tiles_m, tiles_n, spans_m, spans_n,
    EPILOGUE: tl.constexpr, MERGE: tl.constexpr, TILE: tl.constexpr, TEACHER: tl.constexpr,
):  # fmt: skip
    """What EPILOGUE keeps of a part of S = t yᵀ (M, N), t folded before: tiles_m × tiles_n from (first_m, first_n).

    One program owns a span of row tiles by a span of column tiles. Row states are (spans_n, outputs, M), column states
    (spans_m, outputs, N), totals (totals, programs); parts after the first add to what is there. `fresh` (programs,
    outputs, BLOCK_N) is for a program's use. S is in ACC and leaves the registers only as the slope, or as `stored`.
    Source: as `gssf_triton.losses` says of each loss.
    """
    pid = tl.program_id(0)
    span_m, span_n = grouped_tile(pid, spans_m, spans_n, TILE.GROUP_M)
    begin_m, height = span_of(span_m, tiles_m, spans_m)
    begin_n, width = span_of(span_n, tiles_n, spans_n)
    # One loop, and nothing hoisted: what the compiler would keep in registers is not worth a second program's room.
    tile_m = begin_m
    tile_n = begin_n
    for i in tl.range(0, height * width, disable_licm=True):
        offs_m, rows_m = clamped_rows(first_m + tile_m, M, TILE.BLOCK_M)
        offs_n, rows_n = clamped_rows(first_n + tile_n, N, TILE.BLOCK_N)
        mask_m = offs_m < M
        mask_n = offs_n < N
        if TILE.STORED == "read":
            s = load_similarities(stored, stride_z, offs_m, offs_n, first_n + tile_n, M, N, TILE.BLOCK_N, TILE.ACC)
        else:
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
        place = (first_m + tile_m) * TILE.BLOCK_M, (first_n + tile_n) * TILE.BLOCK_N
        pairs = Pairs(s, second, valid, match, same, place[0], place[1])
        if TILE.STORED == "write":
            store_similarities(
                stored, stride_z, s, negatives(pairs), offs_m, offs_n, first_n + tile_n, M, N, TILE.BLOCK_N
            )
        kept_rows, kept_columns, sums, slope_tile = EPILOGUE(pairs, of_rows, of_columns, scalars, TILE)
        if slope is not None:
            # Rows of the slope end at a multiple of 16, and so does what is stored of them: 16 bytes at a time,
            # whatever N.
            local_m = tile_m * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
            local_n = tile_n * TILE.BLOCK_N + tl.arange(0, TILE.BLOCK_N)
            ptrs = slope + (local_m.to(tl.int64) * (stride_sm // 16 * 16))[:, None] + local_n[None, :]
            inside = mask_m[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
            tl.store(ptrs, cast(slope_tile * slope_scale, slope.dtype.element_ty), mask=inside)
        if row_out is not None:
            at = row_out + ((span_n * count(TILE.OF_ROWS)).to(tl.int64) * M + place[0])
            of_row = Vectors(at + tl.arange(0, TILE.BLOCK_M), M, mask_m)
            merge_into(of_row, first_n + tile_n == begin_n, kept_rows, MERGE, TILE.OF_ROWS, TILE.INDEX)
        if column_out is not None:
            # By way of memory: a thread holds the sums of 16 columns, and would merge all of them, as others would.
            fresh_at = fresh + pid * (count(TILE.OF_COLUMNS) * TILE.BLOCK_N) + tl.arange(0, TILE.BLOCK_N)
            store_all(Vectors(fresh_at, TILE.BLOCK_N, mask_n), kept_columns)
            tl.debug_barrier()
            new_columns = load_all(Vectors(fresh_at, TILE.BLOCK_N, mask_n), count(TILE.OF_COLUMNS))
            at_n = column_out + ((span_m * count(TILE.OF_COLUMNS)).to(tl.int64) * N + place[1])
            of_column = Vectors(at_n + tl.arange(0, TILE.BLOCK_N), N, mask_n)
            merge_into(of_column, first_m + tile_m == begin_m, new_columns, MERGE, TILE.OF_COLUMNS, TILE.INDEX)
        if totals is not None:
            at_total = Vectors(totals + pid, spans_m * spans_n, i >= 0)
            merge_into(at_total, first_m + first_n + i == 0, sums, merge_sums, TILE.TOTALS, None)
        # The next tile reads back what other threads may have written.
        tl.debug_barrier()
        tile_n += 1
        if tile_n == begin_n + width:
            tile_n = begin_n
            tile_m += 1


@triton.jit(do_not_specialize=["spans", "length"])
def merge_kernel(states, out, spans, length, OUTPUTS: tl.constexpr, MERGE: tl.constexpr, BLOCK_M: tl.constexpr):
    """States (spans, outputs, length) as one (outputs, length), merged in order; one program owns BLOCK_M of length."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = offs < length
    stride = length.to(tl.int64)
    state = load_all(Vectors(states + offs, stride, mask), OUTPUTS)
    for span in tl.range(1, spans, loop_unroll_factor=4):
        state = MERGE(state, load_all(Vectors(states + span * OUTPUTS * stride + offs, stride, mask), OUTPUTS))
    store_all(Vectors(out + offs, stride, mask), state)


def merge(states: Tensor, function: Any) -> Tensor:
    """States (spans, outputs, length) as one (outputs, length), by a merging function of `epilogues`."""
    if states.dim() == 2:  # of one span
        return states
    spans, outputs, length = states.shape
    out = empty((outputs, length), states.dtype, states.device)
    launch(
        merge_kernel, (cdiv(length, MERGE_CONFIG.BLOCK_M),), states.device, MERGE_CONFIG,
        states=states, out=out, spans=spans, length=length,
        OUTPUTS=outputs, MERGE=function, BLOCK_M=MERGE_CONFIG.BLOCK_M,
    )  # fmt: skip
    return out


def vectors(x: Tensor | None) -> tuple[Vector | None, int]:
    """Vectors (count, length) as the kernel takes them; the stride between them is not specialised."""
    return (None, 0) if x is None else (Vector(x, x.stride(1)), x.stride(0))


@cache
def bounded(config: PairwiseConfig, dtype: torch.dtype, arch: str) -> PairwiseConfig:
    """The tile of a small epilogue, in 128 registers where the assembler would take up to 186 that it does not need.

    So do those of Triton 3.6 to 3.8 for sm_90. That of 3.9 takes 128 or fewer itself, and would spill some if told to.
    """
    takes_more = arch.startswith("sm_90") and TRITON_RELEASE < toolchain.SOUND_TRITON
    if takes_more and dtype.itemsize == 2 and config == stream_config(dtype, arch):
        return BoundedConfig(**vars(config))
    return config


class Part(NamedTuple):
    """A part of S: where it lies, and its slope (R, C), which the next part overwrites; None without one."""

    rows: slice
    columns: slice
    slope: Tensor | None


class Pass:
    """A pass over all of S, neither of whose sides is empty.

    Args:
        x: The operands. Half-precision ones have half-precision slopes, times `slope_scale`.
        epilogue: What is kept.
        part: Rows and columns of S to take at a time, with their slope; None for all of S at once, and no slope.
        stores: S is stored, for a later pass; where that cannot be, the later pass computes it.
    """

    def __init__(
        self, x: Operands, epilogue: Epilogue, part: tuple[int, int] | None = None, stores: bool = False
    ) -> None:
        t, y = x.t, x.y
        (M, D), N = t.shape, y.shape[0]
        kernel: Literal["stream", "stream_teacher"] = "stream_teacher" if epilogue.teacher else "stream"
        # The tile is chosen by all of S: equal rows must have equal similarities in the last part, too.
        config = choice.choose(kernel, t.device, t.dtype, M, N, D)
        if part is None and not (epilogue.sums or epilogue.teacher):
            config = bounded(config, t.dtype, architecture(t.device))
        block_m, block_n = config.BLOCK_M, config.BLOCK_N
        tiles_m, tiles_n = cdiv(M, block_m), cdiv(N, block_n)
        slope = None
        if part is not None:
            # Whole tiles, but for the last part's.
            tiles_m = tiles_m if part[0] >= M else max(1, part[0] // block_m)
            tiles_n = tiles_n if part[1] >= N else max(1, part[1] // block_n)
            R, C = min(M, tiles_m * block_m), min(N, tiles_n * block_n)
            slope = empty((R, cdiv(C, ALIGNMENT) * ALIGNMENT), t.dtype, t.device)
        spans_m, spans_n = stream_spans(M, N, tiles_m, tiles_n, architecture(t.device))
        self.size, self.step, self.config = (M, N), (tiles_m * block_m, tiles_n * block_n), config
        self.grid, self.merge = (spans_m * spans_n,), getattr(epilogues, epilogue.merge.__name__)
        totals, of_columns = epilogue.totals_of(part is not None), len(epilogue.columns)

        def states(*shape: int) -> Tensor | None:
            return empty(shape, accumulate_dtype(t.dtype), t.device) if all(shape) else None

        self.states = Kept(
            states(*several(spans_n), len(epilogue.rows), M), states(*several(spans_m), of_columns, N),
            states(totals, *self.grid), slope,
        )  # fmt: skip
        if x.tops is not None and x.tops.shape[1] != cdiv(N, block_n):
            # Another tile is chosen than when S was stored: it is computed again.
            x = x._replace(stored=None, tops=None)
        self.stored = None if x.stored is None else (x.stored, x.tops)
        stores = stores and may_store(t.dtype, architecture(t.device), sums=epilogue.sums)
        if stores:
            tops = empty((2, cdiv(N, block_n), M), torch.float32, t.device) if t.dtype == torch.float16 else None
            like = torch.int16 if t.dtype == torch.float16 else t.dtype
            self.stored = empty((M, cdiv(N, ALIGNMENT) * ALIGNMENT), like, t.device), tops
        mode = "write" if stores else "" if self.stored is None else "read"
        shape = tile(
            config, t, y, kind=StreamTile, STORED=mode,
            COLUMNS=epilogue.both, SUMS=epilogue.sums, SLOPE=slope is not None,
            OF_ROWS=epilogue.rows, OF_COLUMNS=epilogue.columns, INDEX=epilogue.index, TOTALS=(0.0,) * totals,
        )  # fmt: skip
        teacher: dict[str, Any] = dict.fromkeys(("teacher_t", "teacher_y", "E", "teacher_chunks", "TEACHER"))
        if x.teacher_t is not None and x.teacher_y is not None:
            E = x.teacher_t.shape[1]
            teacher = {
                "teacher_t": matrix(x.teacher_t), "teacher_y": matrix(x.teacher_y), "E": E,
                "teacher_chunks": cdiv(E, config.BLOCK_K),
                "TEACHER": tile(config, x.teacher_t, x.teacher_y, PRECISION=shape.PRECISION, ACC=shape.ACC),
            }  # fmt: skip
        ids = None
        if x.row_ids is not None and x.column_ids is not None:
            ids = Ids(x.row_ids.contiguous(), x.column_ids.contiguous())
        (rows, stride_rk), (columns, stride_ck) = vectors(x.rows), vectors(x.columns)
        self.arguments: dict[str, Any] = {
            "t": matrix(t), "y": matrix(y), **teacher, "ids": ids, "scalars": x.scalars,
            "rows": rows, "stride_rk": stride_rk, "columns": columns, "stride_ck": stride_ck,
            "row_out": self.states.rows, "column_out": self.states.columns,
            "fresh": states(*self.grid, of_columns, block_n), "totals": self.states.totals,
            "slope": slope, "stride_sm": 0 if slope is None else slope.shape[1],
            "stored": None if self.stored is None else Stored(*self.stored),
            "stride_z": 0 if self.stored is None else self.stored[0].shape[1],
            "M": M, "N": N, "D": D, "chunks": cdiv(D, config.BLOCK_K),
            "diagonal": x.offset, "slope_scale": slope_scale(t.dtype), "spans_m": spans_m, "spans_n": spans_n,
            "EPILOGUE": getattr(epilogues, epilogue.triton), "MERGE": self.merge, "TILE": shape,
        }  # fmt: skip

    def parts(self) -> Iterator[Part]:
        """Launch part after part, in order; without slopes all of S is one."""
        (M, N), (step_m, step_n), slope = self.size, self.step, self.states.slope
        for row in range(0, M, step_m):
            for column in range(0, N, step_n):
                R, C = min(step_m, M - row), min(step_n, N - column)
                self.launch(row, column, R, C)
                yield Part(slice(row, row + R), slice(column, column + C), None if slope is None else slope[:R, :C])

    def launch(self, row: int, column: int, R: int, C: int) -> None:
        """Launch the part (R, C) that begins at a row and a column."""
        config = self.config
        launch(
            stream_kernel, self.grid, self.arguments["scalars"].device, config, **self.arguments,
            first_m=row // config.BLOCK_M, tiles_m=cdiv(R, config.BLOCK_M),
            first_n=column // config.BLOCK_N, tiles_n=cdiv(C, config.BLOCK_N),
        )  # fmt: skip

    def kept(self) -> Kept:
        """What is kept of all parts: states (outputs, M) and (outputs, N), and totals."""
        rows, columns, totals = self.merged()
        return Kept(rows, columns, None if totals is None else totals.sum(1))

    def merged(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """States (outputs, M) and (outputs, N), and the programs' totals (totals, programs)."""
        rows, columns, totals, _ = self.states
        rows, columns = (None if side is None else merge(side, self.merge) for side in (rows, columns))
        return rows, columns, totals


def whole(
    x: Operands, epilogue: Epilogue, wants_slope: bool, stores: bool
) -> tuple[Kept, Tensor | None, Tensor | None]:
    """What is kept of all of S, and S as it is stored, from one launch and a merge a side."""
    rows, columns, totals, slope, stored, tops = _whole(x, epilogue, wants_slope, stores)
    if slope is not None and slope.shape[1] > x.y.shape[0]:
        slope = slope[:, : x.y.shape[0]]
    return Kept(rows, columns, None if totals is None else totals.sum(1), slope), stored, tops


@remembered
def _whole(x: Operands, epilogue: Epilogue, wants_slope: bool, stores: bool) -> tuple[Tensor | None, ...]:
    size = x.t.shape[0], x.y.shape[0]
    streamed = Pass(x, epilogue, size if wants_slope else None, stores)
    streamed.launch(0, 0, *size)
    return *streamed.merged(), streamed.states.slope, *((streamed.stored if stores else None) or (None, None))


def several(spans: int) -> tuple[int, ...]:
    """The leading dimension of states: none of one span, which needs no merge."""
    return () if spans == 1 else (spans,)


def slope_scale(dtype: torch.dtype) -> float:
    """What slopes of this dtype are stored times."""
    return HALF_SLOPE_SCALE if dtype == torch.float16 else 1.0
