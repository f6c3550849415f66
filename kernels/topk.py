"""The top-k kernel: a running list of the best keys in the epilogue, one list a span of the gallery."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.launch import launch
from gssf_triton.kernels.ranked_tile import ABSENT, ranked_tile, spans_of, split_keys, tile_arguments
from gssf_triton.kernels.retrieval_configs import padded_k
from gssf_triton.kernels.tile import clamped_rows
from gssf_triton.retrieval.scan import Lists
from gssf_triton.retrieval.scoring import Exclusions, Gallery, Scores


@triton.jit(do_not_specialize=["stride_mm", "stride_mn", "spans", "tiles", "first", "M", "N", "chunks"])
def topk_kernel(
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
    K: tl.constexpr,
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
    """part[i, span, :] = the K largest keys of row i over the span's columns, in no order.

    One program owns a tile of rows and a span of `tiles` column tiles, and keeps K keys a row in registers. A tile
    gives up its largest key, one a row at a time, for as long as one of them beats the smallest of its row's list:
    K times for the first tile, hardly ever once the lists are good. Scores are summed in ACC, keys compared exactly.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, BLOCK_M)
    span = tl.program_id(1)
    slots = tl.arange(0, K)
    # Below every item's key, and all different, so that exactly one slot is the smallest.
    best = tl.full([BLOCK_M, K], ABSENT, tl.int64) + slots.to(tl.int64)[None, :]
    lowest = tl.min(best, axis=1)
    for tile_n in range(span * tiles, tl.minimum((span + 1) * tiles, tl.cdiv(N, BLOCK_N))):
        keys, _ = ranked_tile(
            tile_n, offs_m, rows_m, a_ptr, stride_am, stride_ad, b_ptr, stride_bn, stride_bd, scale_ptr, exclude_ptr,
            mask_ptr, stride_mm, stride_mn, a_ids_ptr, b_ids_ptr, a_cams_ptr, b_cams_ptr, first, N, D, chunks,
            BLOCK_M, BLOCK_N, BLOCK_K, HAS_SCALE, HAS_EXCLUDE, HAS_MASK, HAS_IDS, HAS_CAMS, EVEN_MASK, EVEN_D, WIDE,
            PRECISION, ACC,
        )  # fmt: skip
        highest = tl.max(keys, axis=1)
        while tl.max((highest > lowest).to(tl.int32), axis=0) > 0:
            replaced = (best == lowest[:, None]) & (highest > lowest)[:, None]
            best = tl.where(replaced, highest[:, None], best)
            keys = tl.where(keys == highest[:, None], ABSENT, keys)
            lowest = tl.min(best, axis=1)
            highest = tl.max(keys, axis=1)
    ptrs = part_ptr + ((offs_m.to(tl.int64) * spans + span) * K)[:, None] + slots[None, :]
    tl.store(ptrs, best, mask=(offs_m < M)[:, None] & (slots >= 0)[None, :])


def _block_lists(
    scores: Scores, block: Tensor, first: int, offset: int, exclusions: Exclusions, k: int
) -> tuple[Tensor, Tensor]:
    """(keys, indices), best first, of the items of one block of the gallery, at most k."""
    queries = scores.queries
    config = lookup.ranked(queries.shape[1], queries.dtype, queries.device)
    row_tiles, spans, tiles = spans_of(queries.shape[0], block.shape[0], config)
    K = padded_k(k)
    parts = torch.empty((queries.shape[0], spans, K), dtype=torch.int64, device=queries.device)
    launch(
        topk_kernel,
        (row_tiles, spans),
        queries.device,
        **tile_arguments(scores, block, first, offset, exclusions, config),
        part_ptr=parts,
        spans=spans,
        tiles=tiles,
        K=K,
    )
    scores.tick(queries.shape[0] * block.shape[0])
    # Keys of different items differ, so the sort has one answer.
    return split_keys(parts.flatten(1).sort(dim=1, descending=True).values[:, :k])


def topk(scores: Scores, gallery: Gallery, exclusions: Exclusions, k: int) -> Lists:
    """As `gssf_triton.retrieval.scan.topk`, for k up to `LARGEST_KERNEL_K`, float32 scores and at least one query."""
    Q = scores.queries.shape[0]
    lists = Lists.empty(Q, k, scores.dtype, scores.queries.device)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        keys, indices = _block_lists(scores, block, first, gallery.offset, exclusions, k)
        lists.add(slice(0, Q), keys, indices)
    return lists
