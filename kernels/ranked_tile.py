"""What the retrieval kernels share: a tile of scores as sortable keys, and the arguments that make one.

A key is 64 bits: the score's 32, mapped so that integers compare as the scores do (NaN above all, −0 as 0), over the
item's index, complemented. The larger key comes first in the order of retrieval, no two items have the same, and what
may not be ranked gets a key below all: every epilogue is a comparison of integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.args import Tile
from gssf_triton.kernels.launch import cdiv, launch, matrix, pair_strides, tile
from gssf_triton.kernels.retrieval_configs import RANKED_ROWS
from gssf_triton.kernels.tile import clamped_rows, product_tile, rows_of, stride_of

#: The key of what may not be ranked.
ABSENT = tl.constexpr(-(1 << 63))
#: The low half of a key; it bounds a gallery's indices.
INDEX_MASK = 0xFFFFFFFF


class Marks(NamedTuple):
    """What queries and items carry beside their features: contiguous tensors on the host, pointers in a kernel.

    Any of them may be None; ids are given on both sides or neither, cameras only with ids.
    """

    #: (N,), what normalises an item's scores.
    scale: Any = None
    #: (M,) int64, the index of an item that its query may not find.
    exclude: Any = None
    #: (M, N) uint8 of any strides, not 0 where an item may be ranked.
    mask: Any = None
    #: (M,) and (N,) int64.
    query_ids: Any = None
    item_ids: Any = None
    query_cams: Any = None
    item_cams: Any = None


@dataclass(frozen=True, eq=False)
class RankedTile(Tile):
    """EVEN_MASK: the mask's contiguous side and its other stride are multiples of 16."""

    EVEN_MASK: bool = False


@triton.jit
def score_keys(s, index):
    """Keys [BLOCK_M, BLOCK_N] of scores s and the items' indices [BLOCK_N] (int64)."""
    s = tl.where(s == 0, 0.0, s)
    bits = s.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(s == s, bits, 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index)[None, :]


@triton.jit
def ranked_tile(tile_n, offs_m, rows_m, a, b, marks, stride_mm, stride_mn, first, N, D, chunks, TILE: tl.constexpr):
    """(keys, same_id) of a tile of folded queries and column tile `tile_n`, [BLOCK_M, BLOCK_N] each.

    Keys of columns past the gallery and of excluded items are ABSENT. `first` is the index of the gallery's first row,
    stride_mm and stride_mn are the mask's strides. Without ids, same_id is true wherever an item is kept.
    """
    offs_n, rows_n = clamped_rows(tile_n, N, TILE.BLOCK_N)
    s = product_tile(rows_of(a, rows_m), rows_of(b, rows_n), D, chunks, TILE)
    if marks.scale is not None:
        s *= tl.load(marks.scale + rows_n)[None, :]
    index = rows_n + first
    keys = score_keys(s, index)
    keep = (offs_n < N)[None, :] & (offs_m >= 0)[:, None]
    if marks.exclude is not None:
        keep &= tl.load(marks.exclude + rows_m)[:, None] != index[None, :]
    if marks.mask is not None:
        mask_rows = marks.mask + rows_m * stride_of(stride_mm, TILE.EVEN_MASK)
        keep &= tl.load(mask_rows[:, None] + (rows_n * stride_of(stride_mn, TILE.EVEN_MASK))[None, :]) != 0
    same_id = keep
    if marks.query_ids is not None:
        same_id = tl.load(marks.query_ids + rows_m)[:, None] == tl.load(marks.item_ids + rows_n)[None, :]
        if marks.query_cams is not None:
            same_camera = tl.load(marks.query_cams + rows_m)[:, None] == tl.load(marks.item_cams + rows_n)[None, :]
            keep &= (same_id & same_camera) == 0
    return tl.where(keep, keys, ABSENT), same_id


def launch_ranked(
    kernel: Any, queries: Tensor, items: Tensor, marks: Marks, first: int, *length: int, **arguments: Any
) -> Tensor:
    """What `kernel` keeps of each query's keys, for each span of the items: (M, spans, *length) int64.

    Args:
        kernel: The top-k or the rank kernel.
        queries: (M, D), folded.
        items: (N, D), of the same dtype.
        marks: What else they carry.
        first: The index of the first item.
        *length: The shape of a row's part.
        **arguments: What this kernel takes beside the others.
    """
    (M, D), N = queries.shape, items.shape[0]
    assert first + N <= INDEX_MASK, "a key holds 32 bits of an index"
    config = choice.choose("ranked", queries.device, queries.dtype, *RANKED_ROWS, D)
    row_tiles, column_tiles = cdiv(M, config.BLOCK_M), max(cdiv(N, config.BLOCK_N), 1)
    tiles = cdiv(column_tiles, config.spans(row_tiles, column_tiles))
    spans = cdiv(column_tiles, tiles)
    parts = torch.empty((M, spans, *length), dtype=torch.int64, device=queries.device)
    if parts.numel() == 0:
        return parts
    _, stride_mm, stride_mn, even = (None, None, None, False) if marks.mask is None else pair_strides(marks.mask)
    launch(
        kernel, (row_tiles, spans), queries.device, config,
        a=matrix(queries), b=matrix(items), marks=marks, part_ptr=parts, stride_mm=stride_mm, stride_mn=stride_mn,
        spans=spans, tiles=tiles, first=first, M=M, N=N, D=D, chunks=cdiv(D, config.BLOCK_K),
        TILE=tile(config, queries, items, kind=RankedTile, EVEN_MASK=even), **arguments,
    )  # fmt: skip
    return parts


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores' bits (int32, mapped as in a key) and the indices that keys consist of; −1 where ABSENT."""
    high = (keys >> 32).to(torch.int32)
    missing = high == torch.iinfo(torch.int32).min
    return high, (INDEX_MASK - (keys & INDEX_MASK)).masked_fill_(missing, -1)


def join_keys(high: Tensor, indices: Tensor) -> Tensor:
    """Keys; the largest one there is, which nothing comes before, where an index is −1."""
    keys = (high.to(torch.int64) << 32) | (INDEX_MASK - indices)
    return keys.masked_fill_(indices < 0, torch.iinfo(torch.int64).max)
