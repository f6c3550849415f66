"""The rank kernel: each query's best match in a first pass, the items that come before it in a second."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels.ranked_tile import ABSENT, Marks, launch_ranked, ranked_tile
from gssf_triton.kernels.tile import clamped_rows


@triton.jit(do_not_specialize=["stride_mm", "stride_mn", "spans", "tiles", "first", "M", "N", "chunks"])
def rank_kernel(
    a, b, marks, bar_ptr, part_ptr, stride_mm, stride_mn, spans, tiles, first, M, N, D, chunks, TILE: tl.constexpr,
):  # fmt: skip
    """part[i, span] = max_j key_ij over i's matches, or, with a bar, #{j : key_ij > bar_i}, j over the span's columns.

    One program owns a tile of rows and a span of `tiles` column tiles. Scores are summed in ACC, keys compared exactly:
    both passes see the same scores, and the parts may be combined in any order.
    """
    offs_m, rows_m = clamped_rows(tl.program_id(0), M, TILE.BLOCK_M)
    span = tl.program_id(1)
    if bar_ptr is not None:
        part = tl.zeros([TILE.BLOCK_M], tl.int64)
        bar = tl.load(bar_ptr + rows_m)
    else:
        part = tl.full([TILE.BLOCK_M], ABSENT, tl.int64)
    for tile_n in range(span * tiles, tl.minimum((span + 1) * tiles, tl.cdiv(N, TILE.BLOCK_N))):
        keys, same_id = ranked_tile(
            tile_n, offs_m, rows_m, a, b, marks, stride_mm, stride_mn, first, N, D, chunks, TILE
        )
        if bar_ptr is not None:
            part += tl.sum((keys > bar[:, None]).to(tl.int32), axis=1)
        else:
            part = tl.maximum(part, tl.max(tl.where(same_id, keys, ABSENT), axis=1))
    tl.store(part_ptr + offs_m.to(tl.int64) * spans + span, part, mask=offs_m < M)


def best_matches(queries: Tensor, items: Tensor, marks: Marks, first: int) -> Tensor:
    """The largest key (Q,) among each query's matches, ABSENT where it has none."""
    return launch_ranked(rank_kernel, queries, items, marks, first, bar_ptr=None).amax(1)


def counts_above(queries: Tensor, items: Tensor, marks: Marks, first: int, bar: Tensor) -> Tensor:
    """How many items' keys (Q,) are larger than the query's bar (Q,)."""
    return launch_ranked(rank_kernel, queries, items, marks, first, bar_ptr=bar).sum(1)
