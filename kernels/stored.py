"""S as a streaming pass stores it for a later one."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gssf_triton.kernels.epilogues import EMPTY_MAX
from gssf_triton.kernels.tile import cast

#: The largest number that is stored, the smallest being its negative, and what NaN and Inf are stored as.
LARGEST_STORED, NOT_A_NUMBER = tl.constexpr(32767.0), tl.constexpr(-32768.0)


class Stored(NamedTuple):
    """Pointers to all of S as it is stored, and to what is known of each row of a tile.

    Of half-precision operands it is where s lies between the smallest and the largest of its tile's row, in 16
    bits; tops are (2, column tiles, M), the largest ones and how far the smallest lie below them. A floating-point
    exponential would lose what is small in its row, and may be large in its column. Of others it is s itself.
    """

    ptr: Any
    tops: Any


@triton.jit
def store_similarities(stored, stride_z, s, negative, offs_m, offs_n, tile_n, M, N, BLOCK_N: tl.constexpr):
    """Store a tile of S. Only negatives are read again, and only they have a top."""
    if stored.tops is not None:
        finite = negative & (tl.abs(s) < float("inf"))
        top = tl.max(tl.where(finite, s, EMPTY_MAX), 1)
        reach = top - tl.min(tl.where(finite, s, float("inf")), 1)
        # Of rows with nothing finite, or one number, any.
        top = tl.where(top == EMPTY_MAX, 0.0, top)
        reach = tl.where((reach > 0) & (reach < float("inf")), reach, 1.0)
        at_top = stored.tops + tile_n.to(tl.int64) * M + offs_m
        tl.store(at_top, top, mask=offs_m < M)
        tl.store(at_top + tl.cdiv(N, BLOCK_N).to(tl.int64) * M, reach, mask=offs_m < M)
        step = (s - top[:, None]) / reach[:, None] * (2 * LARGEST_STORED) + LARGEST_STORED
        # Matches and other excluded pairs may lie beyond; what a softmax makes NaN of has a number of its own.
        step = tl.floor(tl.minimum(tl.maximum(step, -LARGEST_STORED), LARGEST_STORED) + 0.5)
        s = tl.where(s < float("inf"), step, NOT_A_NUMBER)
    at = stored.ptr + (offs_m.to(tl.int64) * (stride_z // 16 * 16))[:, None] + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
    tl.store(at, cast(s, stored.ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_similarities(stored, stride_z, offs_m, offs_n, tile_n, M, N, BLOCK_N: tl.constexpr, ACC: tl.constexpr):
    """A tile of S that `store_similarities` has stored, [BLOCK_M, BLOCK_N] in ACC."""
    at = stored.ptr + (offs_m.to(tl.int64) * (stride_z // 16 * 16))[:, None] + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < tl.cdiv(N, 16) * 16)[None, :]
    s = tl.load(at, mask=mask, other=0).to(ACC)
    if stored.tops is not None:
        at_top = stored.tops + tile_n.to(tl.int64) * M + offs_m
        top = tl.load(at_top, mask=offs_m < M, other=0.0)
        reach = tl.load(at_top + tl.cdiv(N, BLOCK_N).to(tl.int64) * M, mask=offs_m < M, other=0.0)
        near = (s - LARGEST_STORED) * (0.5 / LARGEST_STORED) * reach[:, None] + top[:, None]
        s = tl.where(s == NOT_A_NUMBER, float("nan"), near)
    return s
