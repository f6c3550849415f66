"""Text-to-image attention in plain torch, a chunk of image–caption pairs at a time, forward and backward.

With x the regions and y the words on the unit sphere, z = T(x), and G = x xᵀ an image's Gram matrix, the attended
region c = Σ_r α_r x_r is never formed: s(c, y) = Σ_r α_r (z_r·y) / sqrt(αᵀ G α). A chunk holds a handful of arrays
[words, images, regions]; the backward pass recomputes them.

Source: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018 (arXiv 1803.08024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gssf_triton.constants import ATTENTION_EPS, LEAKY_SLOPE, NORM_EPS
from gssf_triton.region_word.packing import Chunk
from gssf_triton.region_word.torch_backend import LoadedChunk, Side, Stream, products, store_gradient

#: Arrays of a chunk's size that live at once.
LIVE_ARRAYS = 6


class Attention(NamedTuple):
    """What a chunk's scores are made of; [words, images, regions] but where said otherwise."""

    e: Tensor  # LeakyReLU(x·y)
    word_norm: Tensor  # ‖e‖ over the words of a caption, [captions, 1, images, regions]
    alpha: Tensor  # softmax over the regions
    s: Tensor  # z·y
    attended: Tensor  # G α
    squares: Tensor  # ‖c‖², [words, images]
    value: Tensor  # s(c, y), [words, images]


def _attend(
    stream: Stream, word: LoadedChunk, region: LoadedChunk, folded: Tensor, gram: Tensor, smooth: float
) -> Attention:
    captions, L = word.rows.shape[:2]
    e = torch.nn.functional.leaky_relu_(products(word, region), LEAKY_SLOPE)
    by_caption = e.view(captions, L, *e.shape[1:])
    word_norm = torch.linalg.vector_norm(by_caption, dim=1, keepdim=True)
    logits = (by_caption * (smooth / (word_norm + ATTENTION_EPS))).view_as(e)
    padding, no_region = stream.regions.padding(region.chunk), stream.no_region(region)
    if padding is not None and no_region is not None:
        logits.masked_fill_(padding & ~no_region[:, None], -torch.inf)
    alpha = logits.softmax(-1)
    s = torch.mm(word.matrix, folded.flatten(0, 1).T).view_as(e)
    attended = torch.matmul(alpha.transpose(0, 1), gram).transpose(0, 1)
    squares = (alpha * attended).sum(-1).clamp_min(0)
    value = (alpha * s).sum(-1) / squares.sqrt().clamp_min(NORM_EPS)
    return Attention(e, word_norm, alpha, s, attended, squares, value)


def cross_attention(regions: Side, folded: Tensor, words: Side, smooth: float) -> Tensor:
    """Scores (I, T), in float32 at least; folded (I, R, D) is T of the regions on the unit sphere."""
    stream = Stream(regions, words, LIVE_ARRAYS)
    scores = stream.scores()
    if regions.x.shape[1] and words.x.shape[1]:
        for word in stream.word_chunks():
            for region in stream.region_chunks():
                z = stream.regions.load(folded, region.chunk, stream.dtype)
                gram = torch.bmm(region.rows, region.rows.mT)
                value = _attend(stream, word, region, z, gram, smooth).value
                scores[word.chunk.items, region.chunk.items] = stream.summed(value, word, region, mean=True)
    return stream.finished(scores)


def _attention_gradients(at: Attention, d_value: Tensor, smooth: float, captions: int) -> tuple[Tensor, ...]:
    """(d e before LeakyReLU, d s, d G) of a chunk, from the gradient of its values [words, images]."""
    norm = at.squares.sqrt().clamp_min(NORM_EPS)
    d_numerator = d_value / norm
    d_squares = torch.where(at.squares > NORM_EPS**2, -0.5 * d_value * at.value / norm.square(), 0)
    d_alpha = d_numerator[..., None] * at.s + (2 * d_squares)[..., None] * at.attended
    d_s = d_numerator[..., None] * at.alpha
    by_image = at.alpha.transpose(0, 1)  # [images, words, regions]
    d_gram = torch.bmm((by_image * d_squares.T[..., None]).mT, by_image)
    d_logits = at.alpha * (d_alpha - (at.alpha * d_alpha).sum(-1, keepdim=True))
    # logits = smooth e / (‖e‖ + eps), the norm over a caption's words. e / ‖e‖ is taken first: it is exactly ±1 where a
    # caption has one word, whose gradient is a difference of equals.
    d_unit = (smooth * d_logits).view(captions, -1, *at.e.shape[1:])
    e, scale = at.e.view_as(d_unit), at.word_norm + ATTENTION_EPS
    direction = torch.where(at.word_norm > 0, e / at.word_norm, 0)
    radial = (d_unit * direction).sum(1, keepdim=True) * (at.word_norm / scale)
    d_e = (d_unit - direction * radial) / scale
    d_products = torch.where(e > 0, d_e, LEAKY_SLOPE * d_e)
    return d_products.view_as(at.e), d_s, d_gram


def cross_attention_backward(
    grad: Tensor, regions: Side, folded: Tensor, words: Side, smooth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the regions, of their fold and of the words, of the scores' gradient (I, T)."""
    stream = Stream(regions, words, LIVE_ARRAYS)
    incoming = stream.incoming(grad)
    d_regions, d_folded, d_words = (torch.zeros_like(x) for x in (regions.x, folded, words.x))
    if not regions.x.numel() or not words.x.numel():
        return d_regions, d_folded, d_words
    sums: dict[Chunk, tuple[Tensor, Tensor]] = {}
    for word in stream.word_chunks():
        word_sum = torch.zeros_like(word.matrix)
        for region in stream.region_chunks():
            z = stream.regions.load(folded, region.chunk, stream.dtype)
            gram = torch.bmm(region.rows, region.rows.mT)
            at = _attend(stream, word, region, z, gram, smooth)
            d_value = stream.spread(incoming, word, region, mean=True)
            d_products, d_s, d_gram = _attention_gradients(at, d_value, smooth, len(word.chunk))
            d_products, d_s = d_products.flatten(1), d_s.flatten(1)
            word_sum.addmm_(d_products, region.matrix).addmm_(d_s, z.flatten(0, 1))
            d_x = torch.mm(d_products.T, word.matrix).view_as(region.rows)
            d_x = torch.baddbmm(d_x, d_gram, region.rows, alpha=2)  # G = x xᵀ, and d_gram is symmetric
            d_z = torch.mm(d_s.T, word.matrix)
            if region.chunk in sums:
                d_x, d_z = (before.add_(now) for before, now in zip(sums[region.chunk], (d_x, d_z), strict=True))
            sums[region.chunk] = d_x, d_z
        store_gradient(stream.words, words, word, word_sum, d_words)
    for region in stream.region_chunks():
        if region.chunk in sums:
            d_x, d_z = sums.pop(region.chunk)
            store_gradient(stream.regions, regions, region, d_x, d_regions)
            stream.regions.store(d_folded, region.chunk, d_z.view_as(region.rows))
    return d_regions, d_folded, d_words
