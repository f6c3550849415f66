"""The rank kernel: each query's best match in a first pass, the items that come before it in a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.launch import launch
from gssf_triton.kernels.ranked_tile import ABSENT, join_keys, ranked_tile, spans_of, split_keys, tile_arguments
from gssf_triton.kernels.tile import clamped_rows
from gssf_triton.retrieval.scoring import Exclusions, Gallery, Scores


@triton.jit(do_not_specialize=["stride_mm", "stride_mn", "spans", "tiles", "first", "M", "N", "chunks"])
def rank_kernel(
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
    bar_ptr,
    part_ptr,
    spans,
    tiles,
    first,
    M,
    N,
    D,
    chunks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COUNT: tl.constexpr,
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
    """part[i, span] = max_j key_ij over i's matches, or, with COUNT, #{j : key_ij > bar_i}, j over the span's columns.

    One program owns a tile of rows and a span of `tiles` column tiles. Scores are summed in ACC, keys compared exactly:
    both passes see the same scores, and the parts may be combined in any order.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, BLOCK_M)
    span = tl.program_id(1)
    if COUNT:
        part = tl.zeros([BLOCK_M], tl.int64)
        bar = tl.load(bar_ptr + rows_m)
    else:
        part = tl.full([BLOCK_M], ABSENT, tl.int64)
    for tile_n in range(span * tiles, tl.minimum((span + 1) * tiles, tl.cdiv(N, BLOCK_N))):
        keys, same_id = ranked_tile(
            tile_n, offs_m, rows_m, a_ptr, stride_am, stride_ad, b_ptr, stride_bn, stride_bd, scale_ptr, exclude_ptr,
            mask_ptr, stride_mm, stride_mn, a_ids_ptr, b_ids_ptr, a_cams_ptr, b_cams_ptr, first, N, D, chunks,
            BLOCK_M, BLOCK_N, BLOCK_K, HAS_SCALE, HAS_EXCLUDE, HAS_MASK, HAS_IDS, HAS_CAMS, EVEN_MASK, EVEN_D, WIDE,
            PRECISION, ACC,
        )  # fmt: skip
        if COUNT:
            part += tl.sum((keys > bar[:, None]).to(tl.int32), axis=1)
        else:
            part = tl.maximum(part, tl.max(tl.where(same_id, keys, ABSENT), axis=1))
    tl.store(part_ptr + offs_m.to(tl.int64) * spans + span, part, mask=offs_m < M)


def _parts(
    scores: Scores, block: Tensor, first: int, offset: int, exclusions: Exclusions, bar: Tensor | None
) -> Tensor:
    """(Q, spans) int64 of one block of the gallery; with a bar, keys (Q,), the counts."""
    queries = scores.queries
    config = lookup.ranked(queries.shape[1], queries.dtype, queries.device)
    row_tiles, spans, tiles = spans_of(queries.shape[0], block.shape[0], config)
    parts = torch.empty((queries.shape[0], spans), dtype=torch.int64, device=queries.device)
    if parts.numel() == 0:
        return parts
    launch(
        rank_kernel,
        (row_tiles, spans),
        queries.device,
        **tile_arguments(scores, block, first, offset, exclusions, config),
        bar_ptr=parts if bar is None else bar,
        part_ptr=parts,
        spans=spans,
        tiles=tiles,
        COUNT=bar is not None,
    )
    scores.tick(queries.shape[0] * block.shape[0])
    return parts


def best_match(scores: Scores, gallery: Gallery, exclusions: Exclusions) -> tuple[Tensor, Tensor]:
    """As `gssf_triton.retrieval.scan.best_match`."""
    queries = scores.queries
    best = torch.full((queries.shape[0],), ABSENT.value, dtype=torch.int64, device=queries.device)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        parts = _parts(scores, block, first, gallery.offset, exclusions, None)
        if parts.shape[1]:
            best = torch.maximum(best, parts.amax(1))
    return split_keys(best)


def count_before(scores: Scores, gallery: Gallery, exclusions: Exclusions, keys: Tensor, indices: Tensor) -> Tensor:
    """As `gssf_triton.retrieval.scan.count_before`."""
    bar = join_keys(keys, indices)
    counts = torch.zeros_like(bar)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        counts += _parts(scores, block, first, gallery.offset, exclusions, bar).sum(1)
    return counts
