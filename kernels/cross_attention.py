"""The text-to-image attention kernel: two similarity tiles, the attention and a small Gram product in its epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.constants import ATTENTION_EPS, LEAKY_SLOPE
from gssf_triton.kernels import choice
from gssf_triton.kernels.args import Rows, Tile
from gssf_triton.kernels.late_interaction import Items
from gssf_triton.kernels.launch import cdiv, launch, matrix, pair_strides, precision, runs, tile
from gssf_triton.kernels.tile import cast, dot, inverse_norm, nearest, product_tile, side_of, stride_of
from gssf_triton.metric import accumulate_dtype


@dataclass(frozen=True, eq=False)
class CrossAttentionTile(Tile):
    """All words, at most WORDS, of each of CAPTIONS captions beside all regions of an image, at most BLOCK_M.

    EVEN_GRAM: the contiguous side and the other strides of the Gram matrices are multiples of 16.
    """

    CAPTIONS: int = 1
    WORDS: int = 1
    EVEN_GRAM: bool = False
    GRAM_PRECISION: str = "ieee"


@triton.jit(do_not_specialize=["stride_gi", "stride_gr", "stride_gc", "I", "T", "R", "L", "chunks"])
def cross_attention_kernel(
    x, z, y, region_values, word_values, gram_ptr, stride_gi, stride_gr, stride_gc, order_ptr, out_ptr,
    I, T, R, L, D, chunks, smooth, slope, eps, TILE: tl.constexpr,  # noqa: E741
):  # fmt: skip
    """Scores of one image, all of its regions, with CAPTIONS captions, all of their words.

    e = LeakyReLU(x·y), over its norm across a caption's words, through a softmax over the regions, gives α; with
    z = T(x) and G the image's Gram matrix the similarity of the attended region c = Σ_r α_r x_r with its word is
    Σ_r α_r (z_r·y) / sqrt(αᵀ G α). x and y come as they are, their scales bring them to the unit sphere; z and G are of
    the normalised x. Accumulation is float32, float64 for float64 features.
    Source: SCAN (arXiv 1803.08024), section 3.1; GSSF (arXiv 2410.15266).
    """
    ACC: tl.constexpr = TILE.ACC
    CAPTIONS: tl.constexpr = TILE.CAPTIONS
    WORDS: tl.constexpr = TILE.WORDS
    BLOCK_M: tl.constexpr = TILE.BLOCK_M
    BLOCK_N: tl.constexpr = TILE.BLOCK_N
    EVEN_GRAM: tl.constexpr = TILE.EVEN_GRAM
    GRAM_PRECISION: tl.constexpr = TILE.GRAM_PRECISION
    image = (tl.program_id(0) % I).to(tl.int64)
    first_caption = tl.program_id(0) // I * CAPTIONS
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    valid_m = offs_m < R
    region = tl.where(valid_m, offs_m, 0).to(tl.int64)
    if region_values.weight is not None:
        valid_m = valid_m & (tl.load(region_values.weight + image * R + region, mask=valid_m, other=0) != 0)
    position = first_caption + offs_n // WORDS
    word = offs_n % WORDS
    in_range = (position < T) & (word < L)
    caption = tl.load(order_ptr + position, mask=position < T, other=0).to(tl.int64)
    word = tl.where(in_range, word, 0).to(tl.int64)
    share = tl.load(word_values.weight + caption * L + word, mask=in_range, other=0.0).to(ACC)
    score = tl.zeros([CAPTIONS], ACC)
    if (tl.max(share, axis=0) > 0) & (tl.max(valid_m.to(tl.int32), axis=0) > 0):
        region_scale = tl.load(region_values.scale + image * R + region).to(ACC)
        word_scale = tl.load(word_values.scale + caption * L + word).to(ACC)
        y_rows = Rows(y.ptr + caption * y.batch + word * y.row, y.channel)
        e = product_tile(Rows(x.ptr + image * x.batch + region * x.row, x.channel), y_rows, D, chunks, TILE)
        e *= region_scale[:, None] * word_scale[None, :]
        e = tl.where(e > 0, e, slope * e)
        e = tl.where((share > 0)[None, :], e, 0.0)
        by_caption = tl.reshape(e, [BLOCK_M, CAPTIONS, WORDS])
        norm = tl.sqrt(tl.sum(by_caption * by_caption, axis=2))[:, :, None]
        logits = tl.reshape(by_caption * (smooth / (norm + eps)), [BLOCK_M, BLOCK_N])
        logits = tl.where(valid_m[:, None], logits, float("-inf"))
        alpha = tl.exp(logits - tl.max(logits, axis=0)[None, :])
        alpha = tl.where(valid_m[:, None], alpha / tl.sum(alpha, axis=0)[None, :], 0.0)

        s = product_tile(Rows(z.ptr + image * z.batch + region * z.row, z.channel), y_rows, D, chunks, TILE)
        # Padding has no weight; what it holds, times 0, might still be NaN.
        s = tl.where(valid_m[:, None], s, 0.0)
        numerator = tl.sum(alpha * s, axis=0) * word_scale

        gram_rows = gram_ptr + image * stride_of(stride_gi, EVEN_GRAM) + offs_m * stride_of(stride_gr, EVEN_GRAM)
        pair = valid_m[:, None] & (valid_m & (offs_m < side_of(R, stride_gc, EVEN_GRAM)))[None, :]
        gram = tl.load(gram_rows[:, None] + offs_m[None, :] * stride_of(stride_gc, EVEN_GRAM), mask=pair, other=0.0)
        weights = nearest(cast(alpha, gram.dtype), GRAM_PRECISION)
        attended = dot(nearest(gram, GRAM_PRECISION), weights, tl.zeros([BLOCK_M, BLOCK_N], ACC), GRAM_PRECISION)
        squares = tl.maximum(tl.sum(alpha * attended, axis=0), 0.0, propagate_nan=tl.PropagateNan.ALL)
        value = tl.where(share > 0, numerator * inverse_norm(squares) * share, 0.0)
        score = tl.sum(tl.reshape(value, [CAPTIONS, WORDS]), axis=1)
    at = first_caption + tl.arange(0, CAPTIONS)
    caption_of = tl.load(order_ptr + at, mask=at < T, other=0)
    tl.store(out_ptr + image * T + caption_of, score, mask=at < T)


def scores(regions: Items, folded: Tensor, words: Items, gram: Tensor, order: Tensor | None, smooth: float) -> Tensor:
    """Scores (I, T) of the regions of I images and the words of T captions.

    Args:
        regions: Rows (I, R, D) and scales.
        folded: T of the regions on the unit sphere, (I, R, D) of their dtype.
        words: Rows (T, L, D) of the regions' dtype, scales and weights.
        gram: The inner products of an image's regions on the unit sphere, (I, R, R).
        order: (T,), the captions in the order in which they are taken: those of like lengths together; or None.
        smooth: Inverse temperature of the attention.
    """
    y = words.rows
    out = torch.empty((folded.shape[0], y.shape[0]), dtype=accumulate_dtype(y.dtype), device=y.device)
    if order is None:
        order = torch.arange(y.shape[0], device=y.device)
    for run in runs(*out.shape):  # a program has a pair, at least
        _launch(regions.part(run), folded[run], words, gram[run], order, smooth, out[run])
    return out


def _launch(regions: Items, z: Tensor, words: Items, gram: Tensor, order: Tensor, smooth: float, out: Tensor) -> None:
    x, y = regions.rows, words.rows
    (images, R, D), (captions, L, _) = x.shape, y.shape
    config = choice.choose("cross_attention", x.device, x.dtype, R, L, D)
    stride_gi, stride_gr, stride_gc, even = pair_strides(gram)
    launch(
        cross_attention_kernel,
        (images * cdiv(captions, config.CAPTIONS),),
        x.device,
        config,
        x=matrix(x), z=matrix(z), y=matrix(y), region_values=regions.values(), word_values=words.values(),
        gram_ptr=gram, stride_gi=stride_gi, stride_gr=stride_gr, stride_gc=stride_gc, order_ptr=order, out_ptr=out,
        I=images, T=captions, R=R, L=L, D=D, chunks=cdiv(D, config.BLOCK_K),
        smooth=smooth, slope=LEAKY_SLOPE, eps=ATTENTION_EPS,
        TILE=tile(
            config, x, z, y, kind=CrossAttentionTile, BLOCK_N=config.CAPTIONS * config.WORDS, EVEN_GRAM=even,
            GRAM_PRECISION=precision(gram.dtype, x.device, whole_rows=True),
        ),
    )  # fmt: skip
