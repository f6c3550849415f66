"""The late-interaction kernel: the similarity tile, pooled over the regions of several images in its epilogue.

Three epilogues: the scores; each word's best region; each word's softmax weights over the regions. The last two are
what a backward pass needs of a chunk of pairs, and hold no more than that chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.kernels import choice
from gssf_triton.kernels.args import Rows, Tile
from gssf_triton.kernels.launch import cdiv, launch, matrix, runs, tile
from gssf_triton.kernels.tile import cast, grouped_tile, product_tile

#: Epilogues.
SCORES, BEST, WEIGHTS = (tl.constexpr(mode) for mode in range(3))


class RowValues(NamedTuple):
    """Pointers to what rows (items, rows) carry beside their features, contiguous; or None.

    `scale` multiplies a row's products. `weight` is, of regions, int8 and not 0 where they are valid, and of words what
    they count in their caption's score, 0 for padding.
    """

    scale: Any
    weight: Any


@dataclass(frozen=True)
class Items:
    """One side of the products: rows (items, rows, D) and their values, as in `RowValues`; a mask of booleans will do.

    `rest` is what rounding left over of the rows, with their strides, or None. One side at most has a rest.
    """

    rows: Tensor
    rest: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None

    def part(self, items: slice) -> Items:
        x = self.rows, self.rest, self.scale, self.weight
        return Items(*(None if values is None else values[items] for values in x))  # type: ignore[arg-type]

    def values(self) -> RowValues:
        """For a kernel."""
        weight = None if self.weight is None else self.weight.contiguous()
        if weight is not None and weight.dtype == torch.bool:
            weight = weight.view(torch.int8)
        return RowValues(None if self.scale is None else self.scale.contiguous(), weight)


@dataclass(frozen=True, eq=False)
class LateInteractionTile(Tile):
    """WORDS words of each of CAPTIONS captions beside the regions of IMAGES images; MODE is an epilogue."""

    CAPTIONS: int = 1
    WORDS: int = 1
    IMAGES: int = 1
    MODE: int = 0


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
    x, x_rest, y_rows, y_rest_rows, values, word_scale, images, regions, valid, R, D, chunks, TILE: tl.constexpr
):  # fmt: skip
    """(whether any region is valid, S [BLOCK_M, BLOCK_N] with those that are not at −inf); no product if none is."""
    images = tl.where(valid, images, 0).to(tl.int64)
    regions = tl.where(valid, regions, 0).to(tl.int64)
    if values.weight is not None:
        valid = valid & (tl.load(values.weight + images * R + regions, mask=valid, other=0) != 0)
    some = tl.max(valid.to(tl.int32), axis=0) > 0
    s = tl.full([TILE.BLOCK_M, TILE.BLOCK_N], float("-inf"), TILE.ACC)
    if some:
        offs = images * x.batch + regions * x.row
        product = product_tile(Rows(x.ptr + offs, x.channel), y_rows, D, chunks, TILE)
        if x_rest is not None:
            product += product_tile(Rows(x_rest + offs, x.channel), y_rest_rows, D, chunks, TILE)
        if values.scale is not None:
            product *= tl.load(values.scale + images * R + regions)[:, None]
        s = tl.where(valid[:, None], product * word_scale[None, :], float("-inf"))
    return some, s


@triton.jit
def pool_tile(s, slots, regions, sharpness, PADDED: tl.constexpr, TILE: tl.constexpr):
    """(maximum, sum of exponentials relative to it, lowest region that has it) by image, [PADDED, BLOCK_N] each."""
    row = tl.arange(0, PADDED)[:, None]
    top = tl.full([PADDED, TILE.BLOCK_N], float("-inf"), TILE.ACC)
    total = tl.zeros([PADDED, TILE.BLOCK_N], TILE.ACC)
    best = tl.zeros([PADDED, TILE.BLOCK_N], tl.int32)
    for k in tl.static_range(TILE.IMAGES):
        if TILE.IMAGES == 1:
            part = s
        else:
            part = tl.where((slots == k)[:, None], s, float("-inf"))
        top_k = column_top(part, 0)
        top = tl.where(row == k, top_k[None, :], top)
        if sharpness is not None:
            total_k = tl.sum(tl.exp(sharpness * (part - finite_shift(top_k)[None, :])), axis=0)
            total = tl.where(row == k, total_k[None, :], total)
        else:
            is_best = (part == top_k[None, :]) | (part != part)
            if TILE.IMAGES > 1:
                is_best &= (slots == k)[:, None]
            best_k = tl.min(tl.where(is_best, regions[:, None], 2147483647), axis=0)
            best = tl.where(row == k, best_k[None, :], best)
    return top, total, best


@triton.jit(do_not_specialize=["I", "T", "R", "L", "chunks"])
def late_interaction_kernel(
    x, x_rest, y, y_rest, region_values, word_values, order_ptr, out_ptr, I, T, R, L, D, chunks, sharpness,  # noqa: E741
    TILE: tl.constexpr,
):  # fmt: skip
    """score[i, t] = Σ_l weight[t, l] · pool_r(x[i, r] · y[t, l]); one program owns IMAGES images × CAPTIONS captions.

    Rows of x are a run of whole images' regions, or BLOCK_M regions of one image at a time, with a running maximum and
    sum. Words are taken WORDS of each caption at a time; a tile with no valid word, or no valid region, is passed over.
    `order` holds the captions longest first, so that neighbours end together. One side was folded before; with rests
    S = x·y + x_rest·y_rest. Pooling is the maximum or, with a sharpness, the log-sum-exp. Accumulation is float32,
    float64 for float64 features.

    MODE: SCORES fills out (I, T). BEST fills out (T·L, I) with each word's best region, the lowest of equals. WEIGHTS
    fills out (T·L, I, R) with each word's softmax over the regions, 0 where none is valid.
    Source: ColBERT (arXiv 2004.12832), eq. 3; SCAN (arXiv 1803.08024); GSSF (arXiv 2410.15266).
    """
    ACC: tl.constexpr = TILE.ACC
    IMAGES: tl.constexpr = TILE.IMAGES
    CAPTIONS: tl.constexpr = TILE.CAPTIONS
    WORDS: tl.constexpr = TILE.WORDS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    PADDED: tl.constexpr = 1 if IMAGES == 1 else 2 if IMAGES == 2 else 4 if IMAGES <= 4 else 8
    tl.static_assert(IMAGES <= 8)
    tile_i, tile_t = grouped_tile(tl.program_id(0), tl.cdiv(I, IMAGES), tl.cdiv(T, CAPTIONS), TILE.GROUP_M)
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
        share = tl.load(word_values.weight + flat, mask=in_range, other=0.0).to(ACC)
        if tl.max(share, axis=0) > 0:
            y_rows = Rows(y.ptr + caption * y.batch + word * y.row, y.channel)
            y_rest_rows = y_rows
            if y_rest is not None:
                y_rest_rows = Rows(y_rest + caption * y.batch + word * y.row, y.channel)
            word_scale = tl.full([BLOCK_N], 1.0, ACC)
            if word_values.scale is not None:
                word_scale = tl.load(word_values.scale + flat).to(ACC)
            top = tl.full([PADDED, BLOCK_N], float("-inf"), ACC)
            total = tl.zeros([PADDED, BLOCK_N], ACC)
            best = tl.zeros([PADDED, BLOCK_N], tl.int32)
            for first in range(0, R, BLOCK_M):
                regions = first + inner
                some, s = masked_tile(
                    x, x_rest, y_rows, y_rest_rows, region_values, word_scale, images, regions, own & (regions < R),
                    R, D, chunks, TILE,
                )  # fmt: skip
                if some:
                    top_s, total_s, best_s = pool_tile(s, slots, regions, sharpness, PADDED, TILE)
                    new_top = tl.maximum(top, top_s, propagate_nan=tl.PropagateNan.ALL)
                    if sharpness is not None:
                        shift = finite_shift(new_top)
                        before = total * tl.exp(sharpness * (finite_shift(top) - shift))
                        now = total_s * tl.exp(sharpness * (finite_shift(top_s) - shift))
                        total = tl.where(top == float("-inf"), 0.0, before)
                        total += tl.where(top_s == float("-inf"), 0.0, now)
                    else:
                        better = (top_s > top) | ((top_s != top_s) & (top == top))
                        best = tl.where(better, best_s, best)
                    top = new_top
            if sharpness is not None:
                pooled = finite_shift(top) + tl.log(total) / sharpness
            else:
                pooled = top
            if TILE.MODE == SCORES:
                value = tl.where((share > 0)[None, :], pooled * share[None, :], 0.0)
                score += tl.sum(tl.reshape(value, [PADDED, CAPTIONS, WORDS]), axis=2)
            if TILE.MODE == BEST:
                ptrs = out_ptr + (flat * I)[None, :] + image_of[:, None]
                tl.store(ptrs, best, mask=own_image[:, None] & in_range[None, :])
            if TILE.MODE == WEIGHTS:
                for first in range(0, R, BLOCK_M):
                    regions = first + inner
                    valid = own & (regions < R)
                    some, s = masked_tile(
                        x, x_rest, y_rows, y_rest_rows, region_values, word_scale, images, regions, valid,
                        R, D, chunks, TILE,
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
    if TILE.MODE == SCORES:
        at = tile_t * CAPTIONS + tl.arange(0, CAPTIONS)
        caption_of = tl.load(order_ptr + at, mask=at < T, other=0)
        ptrs = out_ptr + (image_of.to(tl.int64) * T)[:, None] + caption_of[None, :]
        tl.store(ptrs, score, mask=own_image[:, None] & (at < T)[None, :])


def _launch(
    mode: tl.constexpr, regions: Items, words: Items, out: Tensor, order: Tensor | None, sharpness: float | None
) -> None:
    x, y = regions.rows, words.rows
    (images, R, D), (captions, L, _) = x.shape, y.shape
    config = choice.choose("late_interaction", x.device, x.dtype, R, L, D)
    together = config.images(R)
    x_rest, y_rest = regions.rest, words.rest
    if x_rest is not None or y_rest is not None:
        x_rest, y_rest = (rows if rest is None else rest for rows, rest in ((x, x_rest), (y, y_rest)))
        assert x_rest.stride() == x.stride() and y_rest.stride() == y.stride()
    launch(
        late_interaction_kernel,
        (cdiv(images, together) * cdiv(captions, config.CAPTIONS),),
        x.device,
        config,
        x=matrix(x), x_rest=x_rest, y=matrix(y), y_rest=y_rest,
        region_values=regions.values(), word_values=words.values(),
        order_ptr=torch.arange(captions, device=x.device) if order is None else order, out_ptr=out,
        I=images, T=captions, R=R, L=L, D=D, chunks=cdiv(D, config.BLOCK_K), sharpness=sharpness,
        TILE=tile(
            config, x, y, kind=LateInteractionTile, BLOCK_N=config.CAPTIONS * config.WORDS, IMAGES=together,
            MODE=mode.value,
        ),
    )  # fmt: skip


def scores(regions: Items, words: Items, dtype: torch.dtype, order: Tensor | None, sharpness: float | None) -> Tensor:
    """Scores (I, T) in `dtype`, of the regions of I images and the words of T captions, all of one dtype.

    Args:
        regions: Rows (I, R, D).
        words: Rows (T, L, D) and weights.
        dtype: The scores', float32 or float64.
        order: (T,), the captions in the order in which they are taken: those of like lengths together; or None.
        sharpness: Of the log-sum-exp over the regions; None for their maximum.
    """
    out = torch.empty((regions.rows.shape[0], words.rows.shape[0]), dtype=dtype, device=regions.rows.device)
    for run in runs(*out.shape):  # a program has a pair, at least
        _launch(SCORES, regions.part(run), words, out[run], order, sharpness)
    return out


def best_regions(regions: Items, words: Items) -> Tensor:
    """Each word's best region, (T·L, I) int64; 0 for words in tiles with no valid one."""
    x, y = regions.rows, words.rows
    out = torch.zeros((y.shape[0] * y.shape[1], x.shape[0]), dtype=torch.int32, device=x.device)
    _launch(BEST, regions, words, out, None, None)
    return out.long()


def region_weights(regions: Items, words: Items, dtype: torch.dtype, sharpness: float) -> Tensor:
    """Each word's softmax weights over the regions, (T·L, I, R) in `dtype`."""
    x, y = regions.rows, words.rows
    out = torch.zeros((y.shape[0] * y.shape[1], x.shape[0], x.shape[1]), dtype=dtype, device=x.device)
    _launch(WEIGHTS, regions, words, out, None, sharpness)
    return out
