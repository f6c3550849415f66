"""Region–word scores in plain torch, a chunk of image–caption pairs at a time, forward and backward.

A chunk's products S [words, images, regions] are all of the regions × words that are ever held: pooled, or turned into
their own gradient, before the next chunk. The backward pass recomputes them. Everything is summed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gssf_triton.region_word.packing import Chunk, Packing, reorder
from gssf_triton.similarity.bilinear import unit_rows_vjp
from gssf_triton.similarity.torch_backend import accumulate_dtype, unit_rows

#: Bytes of one chunk's products. On the CPU they stay in the caches (measured: 2 MiB of float32, 1 MiB of L2 a core).
CHUNK_BYTES = {"cpu": 2 << 20}
CHUNK_BYTES_ELSEWHERE = 64 << 20


class Side(NamedTuple):
    """One side of the product: its rows (items, rows, D), where they are valid, and whether to normalise them."""

    x: Tensor
    mask: Tensor | None
    unit: bool


class LoadedChunk(NamedTuple):
    """A chunk with its rows as the product takes them; `raw` are those before normalisation."""

    chunk: Chunk
    raw: Tensor
    rows: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.rows.flatten(0, 1)


class Stream:
    """The chunks of a call: `for word_chunk … for region_chunk …`, each side's rows loaded, cast and normalised."""

    def __init__(self, regions: Side, words: Side, live: int = 1) -> None:
        """`live` arrays of a chunk's size are held at once."""
        self.sides = regions, words
        self.regions, self.words = (Packing(side.x, side.mask) for side in (regions, words))
        self.dtype = torch.promote_types(accumulate_dtype(regions.x.dtype), accumulate_dtype(words.x.dtype))
        budget = CHUNK_BYTES.get(regions.x.device.type, CHUNK_BYTES_ELSEWHERE)
        products = budget // (self.dtype.itemsize * live)
        # Square chunks read the fewest rows; a side with fewer rows than that leaves the other more.
        self.region_rows = max(1, min(regions.x.shape[0] * regions.x.shape[1], math.isqrt(products)))
        self.word_rows = max(1, products // self.region_rows)

    def _load(self, packing: Packing, side: Side, rows: int) -> Iterator[LoadedChunk]:
        for chunk in packing.chunks(rows):
            raw = packing.load(side.x, chunk, self.dtype)
            yield LoadedChunk(chunk, raw, unit_rows(raw) if side.unit else raw)

    def word_chunks(self) -> Iterator[LoadedChunk]:
        return self._load(self.words, self.sides[1], self.word_rows)

    def region_chunks(self) -> Iterator[LoadedChunk]:
        return self._load(self.regions, self.sides[0], self.region_rows)

    def summed(self, values: Tensor, word: LoadedChunk, region: LoadedChunk, mean: bool) -> Tensor:
        """Sum or mean over each caption's words of values [words, images]: (captions, images), 0 for padding alone."""
        values = self._without_padding(values.view(*word.rows.shape[:2], -1), word, region)
        return (values * self.words.shares(word.chunk, values, mean)[..., None]).sum(1)

    def spread(self, incoming: Tensor, word: LoadedChunk, region: LoadedChunk, mean: bool) -> Tensor:
        """The gradient of `summed`'s values [words, images], of the scores' gradient."""
        grad = incoming[word.chunk.items, None, region.chunk.items]
        shares = self.words.shares(word.chunk, incoming, mean)
        return self._without_padding(shares[..., None] * grad, word, region).flatten(0, 1)

    def _without_padding(self, values: Tensor, word: LoadedChunk, region: LoadedChunk) -> Tensor:
        """Values [captions, words, images], 0 for padded words and for images with no valid region."""
        padding, no_region = self.words.padding(word.chunk), self.no_region(region)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0)
        return values if no_region is None else values.masked_fill(no_region, 0)

    def scores(self) -> Tensor:
        """Zeroed scores (captions, images), in the packings' order."""
        return self.sides[0].x.new_zeros((self.words.count, self.regions.count), dtype=self.dtype)

    def finished(self, scores: Tensor) -> Tensor:
        """Scores (images, captions) in the caller's order, of those in the packings'."""
        return reorder(scores, self.words, self.regions, back=True).T.contiguous()

    def incoming(self, grad: Tensor) -> Tensor:
        """The scores' gradient (captions, images) in the packings' order, of the caller's (images, captions)."""
        return reorder(grad.to(self.dtype), self.regions, self.words).T

    def masked(self, products: Tensor, region: LoadedChunk) -> Tensor:
        """Products [words, images, regions], those of padded regions made −inf in place."""
        padding = self.regions.padding(region.chunk)
        return products if padding is None else products.masked_fill_(padding, -torch.inf)

    def no_region(self, region: LoadedChunk) -> Tensor | None:
        """True for the chunk's images that have no valid region, (images,)."""
        padding = self.regions.padding(region.chunk)
        return None if padding is None else padding.all(1)


def store_gradient(packing: Packing, side: Side, loaded: LoadedChunk, grad: Tensor, out: Tensor) -> None:
    """Write the gradient of a chunk's rows, through their normalisation where there is one."""
    rows = grad.view(loaded.rows.shape)
    through = unit_rows_vjp(loaded.raw, rows) if side.unit else rows
    assert through is not None
    packing.store(out, loaded.chunk, through)


def products(word: LoadedChunk, region: LoadedChunk) -> Tensor:
    """S [words, images, regions] of a chunk."""
    return torch.mm(word.matrix, region.matrix.T).view(-1, *region.rows.shape[:2])


def _smooth_weights(S: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """(log-sum-exp over the last dimension, its softmax weights made in S's place)."""
    top = S.amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0)
    weights = S.sub_(top).mul_(sharpness).exp_()
    total = weights.sum(-1, keepdim=True)
    return (top + total.log() / sharpness).squeeze(-1), weights.div_(total)


def _pooled(S: Tensor, pooling: str, sharpness: float) -> Tensor:
    """Each word's value over the regions of each image, [words, images], of S, which may be overwritten."""
    return _smooth_weights(S, sharpness)[0] if pooling == "lse-mean" else S.amax(-1)


def late_interaction(regions: Side, words: Side, pooling: str, sharpness: float) -> Tensor:
    """Scores (I, T), in float32 at least."""
    stream = Stream(regions, words)
    scores = stream.scores()
    if regions.x.shape[1] and words.x.shape[1]:
        for word in stream.word_chunks():
            for region in stream.region_chunks():
                values = _pooled(stream.masked(products(word, region), region), pooling, sharpness)
                scores[word.chunk.items, region.chunk.items] = stream.summed(values, word, region, pooling != "max-sum")
    return stream.finished(scores)


def best_regions(stream: Stream, word: LoadedChunk, region: LoadedChunk) -> Tensor:
    """Each word's best region of each image, the lowest of equals, [words, images]."""
    return stream.masked(products(word, region), region).max(-1).indices


def region_weights(stream: Stream, word: LoadedChunk, region: LoadedChunk, sharpness: float) -> Tensor:
    """Each word's softmax weights over the regions of each image, [words, images, regions]."""
    S, no_region = stream.masked(products(word, region), region), stream.no_region(region)
    if no_region is not None:
        S = S.masked_fill_(no_region[:, None], 0)  # else 0 / 0
    return _smooth_weights(S, sharpness)[1]


def _best_gradients(best: Tensor, weights: Tensor, word: LoadedChunk, region: LoadedChunk) -> tuple[Tensor, Tensor]:
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


def _smooth_gradients(dS: Tensor, word: LoadedChunk, region: LoadedChunk) -> tuple[Tensor, Tensor]:
    """(d words, d regions) of the products' gradient [words, images, regions]."""
    dS = dS.flatten(1)
    return torch.mm(dS, region.matrix), torch.mm(dS.T, word.matrix)


def late_interaction_backward(
    grad: Tensor,
    regions: Side,
    words: Side,
    pooling: str,
    sharpness: float,
    recompute: tuple[Callable[..., Tensor], Callable[..., Tensor]] = (best_regions, region_weights),
) -> tuple[Tensor, Tensor]:
    """The gradients of the regions and of the words, of the scores' gradient (I, T).

    `recompute` are what finds a chunk's best regions and its softmax weights.
    """
    stream = Stream(regions, words)
    incoming = stream.incoming(grad)
    d_regions, d_words = torch.zeros_like(regions.x), torch.zeros_like(words.x)
    if not regions.x.numel() or not words.x.numel():
        return d_regions, d_words
    sums: dict[Chunk, Tensor] = {}
    for word in stream.word_chunks():
        word_sum = torch.zeros_like(word.matrix)
        for region in stream.region_chunks():
            weights = stream.spread(incoming, word, region, pooling != "max-sum")
            if pooling == "lse-mean":
                dS = recompute[1](stream, word, region, sharpness).mul_(weights[..., None])
                d_word, d_region = _smooth_gradients(dS, word, region)
            else:
                best = recompute[0](stream, word, region)
                d_word, d_region = _best_gradients(best, weights, word, region)
            word_sum += d_word
            sums[region.chunk] = sums[region.chunk].add_(d_region) if region.chunk in sums else d_region
        store_gradient(stream.words, words, word, word_sum, d_words)
    for region in stream.region_chunks():
        if region.chunk in sums:
            store_gradient(stream.regions, regions, region, sums.pop(region.chunk), d_regions)
    return d_regions, d_words
