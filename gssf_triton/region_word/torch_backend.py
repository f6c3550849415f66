"""Region–word scores in plain torch, a chunk of image–caption pairs at a time, forward and backward.

Text-to-image attention: with x the regions and y the words on the unit sphere, z = T(x), and G = x xᵀ an image's Gram
matrix, the attended region c = Σ_r α_r x_r is never formed: s(c, y) = Σ_r α_r (z_r·y) / sqrt(αᵀ G α). A chunk holds a
handful of arrays [words, images, regions]; the backward pass recomputes them.

Source: Lee et al., "Stacked Cross Attention for Image-Text Matching", ECCV 2018 (arXiv 1803.08024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gssf_triton.constants import ATTENTION_EPS, LEAKY_SLOPE, NORM_EPS
from gssf_triton.region_word.pairs import Loaded, PairChunks, Pooling, Side, products, smooth_weights

#: Arrays of a chunk's size that attention holds at once.
ATTENTION_ARRAYS = 6

# ---------------------------------------------------------------------------------------------------- late interaction


def late_interaction(regions: Side, words: Side, pooling: Pooling) -> Tensor:
    """Scores (I, T), in float32 at least."""
    pairs = PairChunks(regions, words)

    def values(word: Loaded, region: Loaded) -> Tensor:
        S = pairs.masked_products(word, region)
        return smooth_weights(S, pooling.sharpness)[0] if pooling.smooth else S.amax(-1)

    return pairs.scores(values, pooling.mean)


def late_interaction_backward(
    grad: Tensor, regions: Side, words: Side, pooling: Pooling, kind: type[PairChunks] = PairChunks
) -> tuple[Tensor, ...]:
    """The gradients of the regions and of the words, of the scores' gradient (I, T).

    `kind` finds a chunk's best regions or its softmax weights.
    """
    pairs = kind(regions, words)

    def of_chunk(word: Loaded, region: Loaded, weights: Tensor, d_word: Tensor) -> tuple[Tensor, ...]:
        if pooling.smooth:
            dS = pairs.region_weights(word, region, pooling.sharpness).mul_(weights[..., None]).flatten(1)
            d_word += torch.mm(dS, region.matrix)
            return (torch.mm(dS.T, word.matrix),)
        best = pairs.best_regions(word, region)
        from_words, from_regions = _best_gradients(best, weights, word, region)
        d_word += from_words
        return (from_regions,)

    return pairs.gradients(grad, pooling.mean, of_chunk)


def _best_gradients(best: Tensor, weights: Tensor, word: Loaded, region: Loaded) -> tuple[Tensor, Tensor]:
    """(d words, d regions) where each word meets its best region only, weighted (words, images).

    One region in R takes part: sums of gathered rows, R / 2 times fewer operations than the product with a matrix of
    zeros and weights.
    """
    images, R = region.rows.shape[:2]
    row = best + torch.arange(images, device=best.device) * R
    d_words = embedding_bag(row, region.matrix, mode="sum", per_sample_weights=weights)
    # Words by region: each region's bag is a run of its image's words sorted by their best region.
    by_region, order = best.T.contiguous().sort(dim=1, stable=True)
    first = torch.searchsorted(by_region, torch.arange(R, device=best.device).expand(images, R).contiguous())
    first += torch.arange(images, device=best.device)[:, None] * by_region.shape[1]
    sorted_weights = weights.T.gather(1, order)
    d_regions = embedding_bag(
        order.flatten(), word.matrix, first.flatten(), mode="sum", per_sample_weights=sorted_weights.flatten()
    )
    return d_words, d_regions


# ----------------------------------------------------------------------------------------------------- cross attention


class Attention(NamedTuple):
    """What a chunk's scores are made of; [words, images, regions] but where said otherwise."""

    z: Tensor  # T of the normalised regions, [images, regions, D]
    e: Tensor  # LeakyReLU(x·y)
    word_norm: Tensor  # ‖e‖ over the words of a caption, [captions, 1, images, regions]
    alpha: Tensor  # softmax over the regions
    s: Tensor  # z·y
    attended: Tensor  # G α
    squares: Tensor  # ‖c‖², [words, images]
    value: Tensor  # s(c, y), [words, images]


def _attend(pairs: PairChunks, word: Loaded, region: Loaded, folded: Tensor, smooth: float) -> Attention:
    captions, L = word.rows.shape[:2]
    z = pairs.regions.load(folded, region.batch, pairs.dtype)
    gram = torch.bmm(region.rows, region.rows.mT)
    e = torch.nn.functional.leaky_relu_(products(word, region), LEAKY_SLOPE)
    by_caption = e.view(captions, L, *e.shape[1:])
    word_norm = torch.linalg.vector_norm(by_caption, dim=1, keepdim=True)
    logits = (by_caption * (smooth / (word_norm + ATTENTION_EPS))).view_as(e)
    padding, no_region = pairs.regions.padding(region.batch), pairs.no_region(region)
    if padding is not None and no_region is not None:
        logits.masked_fill_(padding & ~no_region[:, None], -torch.inf)
    alpha = logits.softmax(-1)
    s = torch.mm(word.matrix, z.flatten(0, 1).T).view_as(e)
    attended = torch.matmul(alpha.transpose(0, 1), gram).transpose(0, 1)
    squares = (alpha * attended).sum(-1).clamp_min(0)
    value = (alpha * s).sum(-1) / squares.sqrt().clamp_min(NORM_EPS)
    return Attention(z, e, word_norm, alpha, s, attended, squares, value)


def cross_attention(regions: Side, folded: Tensor, words: Side, smooth: float) -> Tensor:
    """Scores (I, T), in float32 at least; folded (I, R, D) is T of the regions on the unit sphere."""
    pairs = PairChunks(regions, words, ATTENTION_ARRAYS)
    return pairs.scores(lambda word, region: _attend(pairs, word, region, folded, smooth).value, mean=True)


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
) -> tuple[Tensor, ...]:
    """The gradients of the regions, of the words and of the fold, of the scores' gradient (I, T)."""
    pairs = PairChunks(regions, words, ATTENTION_ARRAYS)

    def of_chunk(word: Loaded, region: Loaded, d_value: Tensor, d_word: Tensor) -> tuple[Tensor, ...]:
        at = _attend(pairs, word, region, folded, smooth)
        d_products, d_s, d_gram = _attention_gradients(at, d_value, smooth, len(word.batch))
        d_products, d_s = d_products.flatten(1), d_s.flatten(1)
        d_word.addmm_(d_products, region.matrix).addmm_(d_s, at.z.flatten(0, 1))
        d_x = torch.mm(d_products.T, word.matrix).view_as(region.rows)
        d_x = torch.baddbmm(d_x, d_gram, region.rows, alpha=2)  # G = x xᵀ, and d_gram is symmetric
        return d_x, torch.mm(d_s.T, word.matrix)

    return pairs.gradients(grad, True, of_chunk, folded)
