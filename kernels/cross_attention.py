"""The text-to-image attention kernel: two similarity tiles, the attention and a small Gram product in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gssf_triton.autotune import lookup
from gssf_triton.constants import ATTENTION_EPS, LEAKY_SLOPE
from gssf_triton.kernels.launch import (
    Metric,
    accumulator,
    launch,
    matrix,
    needs_wide_channels,
    numerics,
    options,
    pointer,
    precision,
    runs,
)
from gssf_triton.kernels.tile import cast, dot, inverse_norm, nearest, side_of, similarity_tile, stride_of


@triton.jit(do_not_specialize=["stride_gi", "stride_gr", "stride_gc", "I", "T", "R", "L", "chunks"])
def cross_attention_kernel(
    x_ptr,
    stride_xi,
    stride_xr,
    stride_xd,
    z_ptr,
    stride_zi,
    stride_zr,
    stride_zd,
    y_ptr,
    stride_yt,
    stride_yl,
    stride_yd,
    region_mask_ptr,
    region_scale_ptr,
    word_scale_ptr,
    word_share_ptr,
    gram_ptr,
    stride_gi,
    stride_gr,
    stride_gc,
    order_ptr,
    out_ptr,
    I,  # noqa: E741 (the paper's letter)
    T,
    R,
    L,
    D,
    chunks,
    smooth,
    slope,
    eps,
    BLOCK_M: tl.constexpr,
    CAPTIONS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_REGION_MASK: tl.constexpr,
    EVEN_GRAM: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAM_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Scores of one image, all of its regions, with CAPTIONS captions, all of their words.

    e = LeakyReLU(x·y), over its norm across a caption's words, through a softmax over the regions, gives α; with
    z = T(x) and G the image's Gram matrix the similarity of the attended region c = Σ_r α_r x_r with its word is
    Σ_r α_r (z_r·y) / sqrt(αᵀ G α). x and y come as they are, their scales bring them to the unit sphere; z and G are of
    the normalised x. Accumulation is float32, float64 for float64 features.
    Source: SCAN (arXiv 1803.08024), section 3.1; GSSF (arXiv 2410.15266).
    """
    BLOCK_N: tl.constexpr = CAPTIONS * WORDS
    image = (tl.program_id(0) % I).to(tl.int64)
    first_caption = tl.program_id(0) // I * CAPTIONS
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    valid_m = offs_m < R
    region = tl.where(valid_m, offs_m, 0).to(tl.int64)
    if HAS_REGION_MASK:
        valid_m = valid_m & (tl.load(region_mask_ptr + image * R + region, mask=valid_m, other=0) != 0)
    position = first_caption + offs_n // WORDS
    word = offs_n % WORDS
    in_range = (position < T) & (word < L)
    caption = tl.load(order_ptr + position, mask=position < T, other=0).to(tl.int64)
    word = tl.where(in_range, word, 0).to(tl.int64)
    share = tl.load(word_share_ptr + caption * L + word, mask=in_range, other=0.0).to(ACC)
    score = tl.zeros([CAPTIONS], ACC)
    if (tl.max(share, axis=0) > 0) & (tl.max(valid_m.to(tl.int32), axis=0) > 0):
        region_scale = tl.load(region_scale_ptr + image * R + region).to(ACC)
        word_scale = tl.load(word_scale_ptr + caption * L + word).to(ACC)
        y_rows = y_ptr + caption * stride_yt + word * stride_yl
        e, _ = similarity_tile(
            x_ptr + image * stride_xi + region * stride_xr, stride_xd, y_rows, stride_yd,
            x_ptr, 0, x_ptr, 0, 0, 0, D, chunks,
            0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
        )  # fmt: skip
        e *= region_scale[:, None] * word_scale[None, :]
        e = tl.where(e > 0, e, slope * e)
        e = tl.where((share > 0)[None, :], e, 0.0)
        by_caption = tl.reshape(e, [BLOCK_M, CAPTIONS, WORDS])
        norm = tl.sqrt(tl.sum(by_caption * by_caption, axis=2))[:, :, None]
        logits = tl.reshape(by_caption * (smooth / (norm + eps)), [BLOCK_M, BLOCK_N])
        logits = tl.where(valid_m[:, None], logits, float("-inf"))
        alpha = tl.exp(logits - tl.max(logits, axis=0)[None, :])
        alpha = tl.where(valid_m[:, None], alpha / tl.sum(alpha, axis=0)[None, :], 0.0)

        s, _ = similarity_tile(
            z_ptr + image * stride_zi + region * stride_zr, stride_zd, y_rows, stride_yd,
            x_ptr, 0, x_ptr, 0, 0, 0, D, chunks,
            0, 0, BLOCK_M, BLOCK_N, BLOCK_K, False, False, False, False, EVEN_D, WIDE, PRECISION, ACC,
        )  # fmt: skip
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


def scores(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    gram: Tensor,
    word_share: Tensor,
    region_scale: Tensor,
    word_scale: Tensor,
    region_mask: Tensor | None,
    order: Tensor | None,
    smooth: float,
) -> Tensor:
    """Scores (I, T) of regions x, their fold z (I, R, D) and words y (T, L, D), of one dtype; gram (I, R, R)."""
    out = torch.empty((x.shape[0], y.shape[0]), dtype=accumulator(x.dtype), device=x.device)
    if order is None:
        order = torch.arange(y.shape[0], device=x.device)
    for run in runs(x.shape[0], y.shape[0]):  # a program has a pair, at least
        mask = None if region_mask is None else region_mask[run]
        _launch(x[run], z[run], y, gram[run], word_share, region_scale[run], word_scale, mask, order, smooth, out[run])
    return out


def _launch(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    gram: Tensor,
    word_share: Tensor,
    region_scale: Tensor,
    word_scale: Tensor,
    region_mask: Tensor | None,
    order: Tensor,
    smooth: float,
    out: Tensor,
) -> None:
    (images, R, D), (captions, L, _) = x.shape, y.shape
    config = lookup.cross_attention(R, L, D, x.dtype, x.device)
    launch(
        cross_attention_kernel,
        (images * triton.cdiv(captions, config.CAPTIONS),),
        x.device,
        **pointer("x", x, "ird", x),
        **pointer("z", z, "ird", x),
        **pointer("y", y, "tld", x),
        region_mask_ptr=x if region_mask is None else region_mask.contiguous().view(torch.int8),
        region_scale_ptr=region_scale.contiguous(),
        word_scale_ptr=word_scale.contiguous(),
        word_share_ptr=word_share.contiguous(),
        **matrix("gram", gram, "irc", x, stride="g"),
        order_ptr=order,
        out_ptr=out,
        I=images, T=captions, R=R, L=L, D=D, chunks=triton.cdiv(D, config.BLOCK_K),
        smooth=smooth, slope=LEAKY_SLOPE, eps=ATTENTION_EPS,
        BLOCK_M=config.BLOCK_M, CAPTIONS=config.CAPTIONS, WORDS=config.WORDS, BLOCK_K=config.BLOCK_K,
        HAS_REGION_MASK=region_mask is not None,
        EVEN_D=Metric(None, None).is_even(D, config.BLOCK_K), WIDE=needs_wide_channels(x, z, y),
        **numerics(x),
        GRAM_PRECISION=precision(gram.dtype, x.device, whole_rows=True),
        **options(config),
    )  # fmt: skip
