"""The late-interaction kernel: the similarity tile, pooled over the regions of several images in its epilogue.

Three epilogues: the scores; each word's best region; each word's softmax weights over the regions. The last two are
what a backward pass needs of a chunk of pairs, and hold no more than that chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.kernels.launch import Metric, launch, needs_wide_channels, numerics, options, pointer, runs
from gssf_triton.kernels.tile import cast, grouped_tile, similarity_tile

#: Epilogues.
SCORES, BEST, WEIGHTS = (tl.constexpr(mode) for mode in range(3))


@triton.jit
def column_top(s, axis: tl.constexpr):
    """The maximum over an axis, NaN where one is: Triton's own reduction would drop it."""
    has_nan = tl.max((s != s).to(tl.int32), axis=axis) > 0
    return tl.where(has_nan, float("nan"), tl.max(s, axis=axis))


@triton.jit
def finite_shift(top):
    """What exponentials are taken relative to: the maximum, or 0 where that is infinite."""
    return tl.where((top == float("inf")) | (top == float("-inf")), 0.0, top)


@triton.jit
def masked_tile(
    x_ptr, stride_xi, stride_xr, stride_xd, x2_ptr, y_rows, y2_rows, stride_yd,
    region_mask_ptr, region_scale_ptr, word_scale, images, regions, valid, R, D, chunks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TWO_PARTS: tl.constexpr, HAS_REGION_MASK: tl.constexpr, SCALE_REGIONS: tl.constexpr,
    EVEN_D: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(whether any region is valid, S [BLOCK_M, BLOCK_N] with those that are not at −inf); no product if none is."""
    images = tl.where(valid, images, 0).to(tl.int64)
    regions = tl.where(valid, regions, 0).to(tl.int64)
    if HAS_REGION_MASK:
        valid = valid & (tl.load(region_mask_ptr + images * R + regions, mask=valid, other=0) != 0)
    some = tl.max(valid.to(tl.int32), axis=0) > 0
    s = tl.full([BLOCK_M, BLOCK_N], float("-inf"), ACC)
    if some:
        offs = images * stride_xi + regions * stride_xr
        product, _ = similarity_tile(
            x_ptr + offs, stride_xd, y_rows, stride_yd, x_ptr, 0, x_ptr, 0, 0, 0, D, chunks,
            0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
        )  # fmt: skip
        if TWO_PARTS:
            rest, _ = similarity_tile(
                x2_ptr + offs, stride_xd, y2_rows, stride_yd, x_ptr, 0, x_ptr, 0, 0, 0, D, chunks,
                0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
            )  # fmt: skip
            product += rest
        if SCALE_REGIONS:
            product *= tl.load(region_scale_ptr + images * R + regions)[:, None]
        s = tl.where(valid[:, None], product * word_scale[None, :], float("-inf"))
    return some, s


@triton.jit
def pool_tile(
    s, slots, regions, sharpness,
    IMAGES: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, SMOOTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of exponentials relative to it, lowest region that has it) by image, [PADDED, BLOCK_N] each."""
    row = tl.arange(0, PADDED)[:, None]
    top = tl.full([PADDED, BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([PADDED, BLOCK_N], ACC)
    best = tl.zeros([PADDED, BLOCK_N], tl.int32)
    for k in tl.static_range(IMAGES):
        if IMAGES == 1:
            part = s
        else:
            part = tl.where((slots == k)[:, None], s, float("-inf"))
        top_k = column_top(part, 0)
        top = tl.where(row == k, top_k[None, :], top)
        if SMOOTH:
            total_k = tl.sum(tl.exp(sharpness * (part - finite_shift(top_k)[None, :])), axis=0)
            total = tl.where(row == k, total_k[None, :], total)
        else:
            is_best = (part == top_k[None, :]) | (part != part)
            if IMAGES > 1:
                is_best &= (slots == k)[:, None]
            best_k = tl.min(tl.where(is_best, regions[:, None], 2147483647), axis=0)
            best = tl.where(row == k, best_k[None, :], best)
    return top, total, best


@triton.jit(do_not_specialize=["I", "T", "R", "L", "chunks"])
def late_interaction_kernel(
    x_ptr,
    stride_xi,
    stride_xr,
    stride_xd,
    x2_ptr,
    y_ptr,
    stride_yt,
    stride_yl,
    stride_yd,
    y2_ptr,
    region_mask_ptr,
    region_scale_ptr,
    word_scale_ptr,
    word_share_ptr,
    order_ptr,
    out_ptr,
    I,  # noqa: E741 (the paper's letter)
    T,
    R,
    L,
    D,
    chunks,
    sharpness,
    BLOCK_M: tl.constexpr,
    CAPTIONS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IMAGES: tl.constexpr,
    MODE: tl.constexpr,
    SMOOTH: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    HAS_REGION_MASK: tl.constexpr,
    SCALE_REGIONS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """score[i, t] = Σ_l share[t, l] · pool_r(x[i, r] · y[t, l]); one program owns IMAGES images × CAPTIONS captions.

    Rows of x are a run of whole images' regions, or BLOCK_M regions of one image at a time, with a running maximum and
    sum. Words are taken WORDS of each caption at a time; a tile with no valid word, or no valid region, is passed over.
    `order` holds the captions longest first, so that neighbours end together. One side was folded before; with
    TWO_PARTS it comes as a sum of two half-precision parts, S = x·y + x2·y2. Accumulation is float32, float64 for
    float64 features.

    MODE: SCORES fills out (I, T). BEST fills out (T·L, I) with each word's best region, the lowest of equals. WEIGHTS
    fills out (T·L, I, R) with each word's softmax over the regions, 0 where none is valid.
    Source: ColBERT (arXiv 2004.12832), eq. 3; SCAN (arXiv 1803.08024); GSSF (arXiv 2410.15266).
    """
    BLOCK_N: tl.constexpr = CAPTIONS * WORDS
    PADDED: tl.constexpr = 1 if IMAGES == 1 else 2 if IMAGES == 2 else 4 if IMAGES <= 4 else 8
    tl.static_assert(IMAGES <= 8)
    tile_i, tile_t = grouped_tile(tl.program_id(0), tl.cdiv(I, IMAGES), tl.cdiv(T, CAPTIONS), GROUP_M)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    rows_per_image = tl.minimum(R, BLOCK_M)
    slots = offs_m // rows_per_image
    inner = offs_m % rows_per_image
    images = tile_i * IMAGES + slots
    own = (slots < IMAGES) & (images < I)
    position = tile_t * CAPTIONS + offs_n // WORDS
    caption = tl.load(order_ptr + position, mask=position < T, other=0).to(tl.int64)
    image_of = tile_i * IMAGES + tl.arange(0, PADDED)  # [PADDED]
    own_image = (tl.arange(0, PADDED) < IMAGES) & (image_of < I)
    score = tl.zeros([PADDED, CAPTIONS], ACC)
    for first_word in range(0, L, WORDS):
        word = first_word + offs_n % WORDS
        in_range = (position < T) & (word < L)
        word = tl.where(in_range, word, 0).to(tl.int64)
        flat = caption * L + word
        share = tl.load(word_share_ptr + flat, mask=in_range, other=0.0).to(ACC)
        if tl.max(share, axis=0) > 0:
            y_rows = y_ptr + caption * stride_yt + word * stride_yl
            y2_rows = y2_ptr + caption * stride_yt + word * stride_yl
            word_scale = tl.full([BLOCK_N], 1.0, ACC)
            if SCALE_WORDS:
                word_scale = tl.load(word_scale_ptr + flat).to(ACC)
            top = tl.full([PADDED, BLOCK_N], float("-inf"), ACC)
            total = tl.zeros([PADDED, BLOCK_N], ACC)
            best = tl.zeros([PADDED, BLOCK_N], tl.int32)
            for first in range(0, R, BLOCK_M):
                regions = first + inner
                some, s = masked_tile(
                    x_ptr, stride_xi, stride_xr, stride_xd, x2_ptr, y_rows, y2_rows, stride_yd,
                    region_mask_ptr, region_scale_ptr, word_scale, images, regions, own & (regions < R), R, D, chunks,
                    BLOCK_M, BLOCK_N, BLOCK_K, TWO_PARTS, HAS_REGION_MASK, SCALE_REGIONS,
                    EVEN_D, WIDE, PRECISION, ACC,
                )  # fmt: skip
                if some:
                    top_s, total_s, best_s = pool_tile(
                        s, slots, regions, sharpness, IMAGES, PADDED, BLOCK_N, SMOOTH, ACC
                    )
                    new_top = tl.maximum(top, top_s, propagate_nan=tl.PropagateNan.ALL)
                    if SMOOTH:
                        shift = finite_shift(new_top)
                        before = total * tl.exp(sharpness * (finite_shift(top) - shift))
                        now = total_s * tl.exp(sharpness * (finite_shift(top_s) - shift))
                        total = tl.where(top == float("-inf"), 0.0, before)
                        total += tl.where(top_s == float("-inf"), 0.0, now)
                    else:
                        better = (top_s > top) | ((top_s != top_s) & (top == top))
                        best = tl.where(better, best_s, best)
                    top = new_top
            if SMOOTH:
                pooled = finite_shift(top) + tl.log(total) / sharpness
            else:
                pooled = top
            if MODE == SCORES:
                value = tl.where((share > 0)[None, :], pooled * share[None, :], 0.0)
                score += tl.sum(tl.reshape(value, [PADDED, CAPTIONS, WORDS]), axis=2)
            if MODE == BEST:
                ptrs = out_ptr + (flat * I)[None, :] + image_of[:, None]
                tl.store(ptrs, best, mask=own_image[:, None] & in_range[None, :])
            if MODE == WEIGHTS:
                for first in range(0, R, BLOCK_M):
                    regions = first + inner
                    valid = own & (regions < R)
                    some, s = masked_tile(
                        x_ptr, stride_xi, stride_xr, stride_xd, x2_ptr, y_rows, y2_rows, stride_yd,
                        region_mask_ptr, region_scale_ptr, word_scale, images, regions, valid, R, D, chunks,
                        BLOCK_M, BLOCK_N, BLOCK_K, TWO_PARTS, HAS_REGION_MASK, SCALE_REGIONS,
                        EVEN_D, WIDE, PRECISION, ACC,
                    )  # fmt: skip
                    weight = tl.zeros([BLOCK_M, BLOCK_N], ACC)
                    for k in tl.static_range(IMAGES):
                        row = (tl.arange(0, PADDED) == k)[:, None]
                        top_k = column_top(tl.where(row, top, float("-inf")), 0)
                        total_k = tl.sum(tl.where(row, total, 0.0), axis=0)
                        share_k = tl.exp(sharpness * (s - finite_shift(top_k)[None, :])) / total_k[None, :]
                        weight = tl.where((slots == k)[:, None] & (s != float("-inf")), share_k, weight)
                    # An image's rows follow the one's before it: all of a tile's are a run.
                    run = (tile_i * IMAGES).to(tl.int64) * R + first + offs_m
                    ptrs = out_ptr + (flat * I)[None, :] * R + run[:, None]
                    tl.store(ptrs, cast(weight, out_ptr.dtype.element_ty), mask=valid[:, None] & in_range[None, :])
    if MODE == SCORES:
        at = tile_t * CAPTIONS + tl.arange(0, CAPTIONS)
        caption_of = tl.load(order_ptr + at, mask=at < T, other=0)
        ptrs = out_ptr + (image_of.to(tl.int64) * T)[:, None] + caption_of[None, :]
        tl.store(ptrs, score, mask=own_image[:, None] & (at < T)[None, :])


def _launch(
    mode: tl.constexpr,
    x: Tensor,
    y: Tensor,
    out: Tensor,
    word_share: Tensor,
    *,
    x2: Tensor | None = None,
    y2: Tensor | None = None,
    region_mask: Tensor | None = None,
    region_scale: Tensor | None = None,
    word_scale: Tensor | None = None,
    order: Tensor | None = None,
    sharpness: float | None = None,
) -> None:
    (images, R, D), (captions, L, _) = x.shape, y.shape
    assert x2 is None or x2.stride() == x.stride()
    assert y2 is None or y2.stride() == y.stride()
    config = lookup.late_interaction(R, L, D, x.dtype, x.device)
    together = config.images(R)
    identity = Metric(None, None)
    grid = (triton.cdiv(images, together) * triton.cdiv(captions, config.CAPTIONS),)
    if order is None:
        order = torch.arange(captions, device=x.device)

    def bare(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor.contiguous()

    launch(
        late_interaction_kernel,
        grid,
        x.device,
        **pointer("x", x, "ird", x),
        x2_ptr=x if x2 is None else x2,
        **pointer("y", y, "tld", x),
        y2_ptr=y if y2 is None else y2,
        region_mask_ptr=x if region_mask is None else region_mask.contiguous().view(torch.int8),
        region_scale_ptr=bare(region_scale),
        word_scale_ptr=bare(word_scale),
        word_share_ptr=bare(word_share),
        order_ptr=order,
        out_ptr=out,
        I=images, T=captions, R=R, L=L, D=D, chunks=triton.cdiv(D, config.BLOCK_K),
        sharpness=1.0 if sharpness is None else sharpness,
        BLOCK_M=config.BLOCK_M, CAPTIONS=config.CAPTIONS, WORDS=config.WORDS, BLOCK_K=config.BLOCK_K,
        GROUP_M=config.GROUP_M, IMAGES=together,
        MODE=mode, SMOOTH=sharpness is not None, TWO_PARTS=x2 is not None or y2 is not None,
        HAS_REGION_MASK=region_mask is not None,
        SCALE_REGIONS=region_scale is not None, SCALE_WORDS=word_scale is not None,
        EVEN_D=identity.is_even(D, config.BLOCK_K), WIDE=needs_wide_channels(x, y),
        **numerics(x),
        **options(config),
    )  # fmt: skip


def scores(
    x: Tensor,
    y: Tensor,
    word_share: Tensor,
    dtype: torch.dtype,
    *,
    region_mask: Tensor | None = None,
    region_scale: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    """Scores (I, T), in `dtype`, of regions x (I, R, D) and words y (T, L, D), of one dtype; `word_share` (T, L)."""
    out = torch.empty((x.shape[0], y.shape[0]), dtype=dtype, device=x.device)
    for run in runs(x.shape[0], y.shape[0]):  # a program has a pair, at least
        _launch(
            SCORES,
            x[run],
            y,
            out[run],
            word_share,
            region_mask=None if region_mask is None else region_mask[run],
            region_scale=None if region_scale is None else region_scale[run],
            **arguments,
        )
    return out


def best_regions(x: Tensor, y: Tensor, word_share: Tensor, **arguments: Any) -> Tensor:
    """Each word's best region, (T·L, I) int64; 0 for words in tiles with no valid one."""
    out = torch.zeros((y.shape[0] * y.shape[1], x.shape[0]), dtype=torch.int32, device=x.device)
    _launch(BEST, x, y, out, word_share, **arguments)
    return out.long()


def region_weights(x: Tensor, y: Tensor, word_share: Tensor, dtype: torch.dtype, **arguments: Any) -> Tensor:
    """Each word's softmax weights over the regions, (T·L, I, R) in `dtype`."""
    out = torch.zeros((y.shape[0] * y.shape[1], x.shape[0], x.shape[1]), dtype=dtype, device=x.device)
    _launch(WEIGHTS, x, y, out, word_share, **arguments)
    return out
