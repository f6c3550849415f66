"""What the retrieval kernels share: a tile of scores as sortable keys, and the arguments that make one.

A key is 64 bits: the score's 32, mapped so that integers compare as the scores do (NaN above all, −0 as 0), over the
item's index, complemented. The larger key comes first in the order of retrieval, no two items have the same, and what
may not be ranked gets a key below all: every epilogue is a comparison of integers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels.launch import Metric, matrix, needs_wide_channels, numerics, options, pointer
from gssf_triton.kernels.retrieval_configs import RetrievalConfig
from gssf_triton.kernels.tile import clamped_rows, similarity_tile, stride_of
from gssf_triton.retrieval.scoring import Exclusions, Scores

#: The key of what may not be ranked.
ABSENT = tl.constexpr(-(1 << 63))
#: The low half of a key; it bounds a gallery's indices.
INDEX_MASK = 0xFFFFFFFF


@triton.jit
def score_keys(s, index):
    """Keys [BLOCK_M, BLOCK_N] of scores s and the items' indices [BLOCK_N] (int64)."""
    s = tl.where(s == 0, 0.0, s)
    bits = s.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    bits = tl.where(s == s, bits, 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - index)[None, :]


@triton.jit
def ranked_tile(
    tile_n,
    offs_m,
    rows_m,
    a_ptr,
    stride_am,
    stride_ad,
    b_ptr,
    stride_bn,
    stride_bd,
    scale_ptr,
    exclude_ptr,
    mask_ptr,
    stride_mm,
    stride_mn,
    a_ids_ptr,
    b_ids_ptr,
    a_cams_ptr,
    b_cams_ptr,
    first,
    N,
    D,
    chunks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_CAMS: tl.constexpr,
    EVEN_MASK: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """(keys, same_id) of a tile of folded queries and column tile `tile_n`, [BLOCK_M, BLOCK_N] each.

    Keys of columns past the gallery and of excluded items are ABSENT. `first` is the index of the gallery's first row.
    Without ids, same_id is true everywhere.
    """
    offs_n, rows_n = clamped_rows(tile_n, N, BLOCK_N)
    s, _ = similarity_tile(
        a_ptr + rows_m * stride_am, stride_ad, b_ptr + rows_n * stride_bn, stride_bd,
        a_ptr, 0, a_ptr, 0, 0, 0, D, chunks,
        0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
    )  # fmt: skip
    if HAS_SCALE:
        s *= tl.load(scale_ptr + rows_n)[None, :]
    index = rows_n + first
    keys = score_keys(s, index)
    keep = (offs_n < N)[None, :] & (offs_m >= 0)[:, None]
    if HAS_EXCLUDE:
        keep &= tl.load(exclude_ptr + rows_m)[:, None] != index[None, :]
    if HAS_MASK:
        mask_rows = mask_ptr + rows_m * stride_of(stride_mm, EVEN_MASK)
        keep &= tl.load(mask_rows[:, None] + (rows_n * stride_of(stride_mn, EVEN_MASK))[None, :]) != 0
    same_id = keep
    if HAS_IDS:
        same_id = tl.load(a_ids_ptr + rows_m)[:, None] == tl.load(b_ids_ptr + rows_n)[None, :]
        if HAS_CAMS:
            same_camera = tl.load(a_cams_ptr + rows_m)[:, None] == tl.load(b_cams_ptr + rows_n)[None, :]
            keep &= (same_id & same_camera) == 0
    return tl.where(keep, keys, ABSENT), same_id


def tile_arguments(
    scores: Scores, block: Tensor, first: int, offset: int, exclusions: Exclusions, config: RetrievalConfig
) -> dict[str, Any]:
    """Everything `ranked_tile` takes for a block of the gallery, whose rows are those from `first` on of the shard."""
    queries = scores.queries
    items, D = block.shape
    assert offset + first + items <= INDEX_MASK, "a key holds 32 bits of an index"
    columns = slice(first, first + items)
    scale = scores.scale(block)
    mask = None if exclusions.mask is None else exclusions.mask[:, columns].view(torch.uint8)

    def labels(name: str, values: Tensor | None) -> dict[str, Tensor]:
        return {f"{name}_ptr": queries if values is None else values.to(torch.int64).contiguous()}

    def of_block(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[columns]

    return {
        **pointer("a", queries, "md", queries),
        **pointer("b", block, "nd", queries),
        "scale_ptr": queries if scale is None else scale,
        **labels("exclude", exclusions.exclude),
        **matrix("mask", mask, "mn", queries, stride="m"),
        **labels("a_ids", exclusions.query_ids),
        **labels("b_ids", of_block(exclusions.gallery_ids)),
        **labels("a_cams", exclusions.query_cams),
        **labels("b_cams", of_block(exclusions.gallery_cams)),
        "first": offset + first, "M": queries.shape[0], "N": items, "D": D, "chunks": triton.cdiv(D, config.BLOCK_K),
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K,
        "HAS_SCALE": scale is not None, "HAS_EXCLUDE": exclusions.exclude is not None, "HAS_MASK": mask is not None,
        "HAS_IDS": exclusions.query_ids is not None, "HAS_CAMS": exclusions.query_cams is not None,
        "EVEN_D": Metric(None, None).is_even(D, config.BLOCK_K), "WIDE": needs_wide_channels(queries, block),
        **numerics(queries),
        **options(config),
    }  # fmt: skip


def spans_of(queries: int, items: int, config: RetrievalConfig) -> tuple[int, int, int]:
    """(row tiles, spans, column tiles a span): the launch grid, and what one program walks."""
    row_tiles, column_tiles = triton.cdiv(queries, config.BLOCK_M), max(triton.cdiv(items, config.BLOCK_N), 1)
    tiles = triton.cdiv(column_tiles, config.spans(row_tiles, column_tiles))
    return row_tiles, triton.cdiv(column_tiles, tiles), tiles


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of `gssf_triton.retrieval.order` (int32) and indices that a kernel's keys consist of; −1 where ABSENT."""
    high = (keys >> 32).to(torch.int32)
    missing = high == torch.iinfo(torch.int32).min
    return high, (INDEX_MASK - (keys & INDEX_MASK)).masked_fill_(missing, -1)


def join_keys(high: Tensor, indices: Tensor) -> Tensor:
    """A kernel's keys; the largest one there is, which nothing comes before, where an index is −1."""
    keys = (high.to(torch.int64) << 32) | (INDEX_MASK - indices)
    return keys.masked_fill_(indices < 0, torch.iinfo(torch.int64).max)
