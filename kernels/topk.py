"""The top-k kernel: a running list of the best keys in the epilogue, one list a span of the gallery."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels.ranked_tile import ABSENT, Marks, launch_ranked, ranked_tile
from gssf_triton.kernels.retrieval_configs import padded_k
from gssf_triton.kernels.tile import clamped_rows


@triton.jit(do_not_specialize=["stride_mm", "stride_mn", "spans", "tiles", "first", "M", "N", "chunks"])
def topk_kernel(
    a, b, marks, part_ptr, stride_mm, stride_mn, spans, tiles, first, M, N, D, chunks,
    K: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """part[i, span, :] = the K largest keys of row i over the span's columns, in no order.

    One program owns a tile of rows and a span of `tiles` column tiles, and keeps K keys a row in registers. A tile
    gives up its largest key, one a row at a time, for as long as one of them beats the smallest of its row's list:
    K times for the first tile, hardly ever once the lists are good. Scores are summed in ACC, keys compared exactly.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    span = tl.program_id(1)
    slots = tl.arange(0, K)
    # Below every item's key, and all different, so that exactly one slot is the smallest.
    best = tl.full([TILE.BLOCK_M, K], ABSENT, tl.int64) + slots.to(tl.int64)[None, :]
    lowest = tl.min(best, axis=1)
    for tile_n in range(span * tiles, tl.minimum((span + 1) * tiles, tl.cdiv(N, TILE.BLOCK_N))):
        keys, _ = ranked_tile(tile_n, offs_m, rows_m, a, b, marks, stride_mm, stride_mn, first, N, D, chunks, TILE)
        highest = tl.max(keys, axis=1)
        while tl.max((highest > lowest).to(tl.int32), axis=0) > 0:
            replaced = (best == lowest[:, None]) & (highest > lowest)[:, None]
            best = tl.where(replaced, highest[:, None], best)
            keys = tl.where(keys == highest[:, None], ABSENT, keys)
            lowest = tl.min(best, axis=1)
            highest = tl.max(keys, axis=1)
    ptrs = part_ptr + ((offs_m.to(tl.int64) * spans + span) * K)[:, None] + slots[None, :]
    tl.store(ptrs, best, mask=(offs_m < M)[:, None] & (slots >= 0)[None, :])


def largest_keys(queries: Tensor, items: Tensor, marks: Marks, first: int, k: int) -> Tensor:
    """The k largest keys of every query, at least one, largest first; of fewer items, fewer or ABSENT ones."""
    K = padded_k(k)
    parts = launch_ranked(topk_kernel, queries, items, marks, first, K, K=K)
    # Keys of different items differ, so the sort has one answer.
    return parts.flatten(1).sort(dim=1, descending=True).values[:, :k]
