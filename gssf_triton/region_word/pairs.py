"""All image–caption pairs of a call, a chunk of them at a time, forward and backward.

A chunk's products S [words, images, regions] are all of the regions × words that are ever held: pooled, or turned into
their own gradient, before the next chunk. The backward pass recomputes them. Everything is summed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gssf_triton.metric import accumulate_dtype
from gssf_triton.region_word.packing import ItemBatch, Packing, reorder
from gssf_triton.similarity.torch_backend import unit_rows, unit_rows_vjp

#: Bytes of one chunk's products. On the CPU they stay in the caches (measured: 2 MiB of float32, 1 MiB of L2 a core).
CHUNK_BYTES = {"cpu": 2 << 20}
CHUNK_BYTES_ELSEWHERE = 64 << 20

POOLINGS = ("max-mean", "lse-mean", "max-sum")


class Side(NamedTuple):
    """One side of the product: its rows (items, rows, D), where they are valid, and whether to normalise them."""

    x: Tensor
    mask: Tensor | None
    unit: bool


class Pooling(NamedTuple):
    """One of `POOLINGS`, and the sharpness of "lse-mean"."""

    name: str
    sharpness: float

    @property
    def mean(self) -> bool:
        """Over the words; else their sum."""
        return self.name != "max-sum"

    @property
    def smooth(self) -> bool:
        """Over the regions; else their maximum."""
        return self.name == "lse-mean"


class Loaded(NamedTuple):
    """A batch with its rows as the product takes them; `raw` are those before normalisation."""

    batch: ItemBatch
    raw: Tensor
    rows: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.rows.flatten(0, 1)


#: What becomes of a chunk of pairs, (words, regions).
OfChunk = Callable[[Loaded, Loaded], Tensor]


def products(word: Loaded, region: Loaded) -> Tensor:
    """S [words, images, regions] of a chunk."""
    return torch.mm(word.matrix, region.matrix.T).view(-1, *region.rows.shape[:2])


def smooth_weights(S: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """(log-sum-exp over the last dimension, its softmax weights made in S's place)."""
    top = S.amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0)
    weights = S.sub_(top).mul_(sharpness).exp_()
    total = weights.sum(-1, keepdim=True)
    return (top + total.log() / sharpness).squeeze(-1), weights.div_(total)


class PairChunks:
    """The chunks of a call: each side's rows are loaded, cast and normalised a batch at a time."""

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

    def _load(self, packing: Packing, side: Side, rows: int) -> Iterator[Loaded]:
        for batch in packing.batches(rows):
            raw = packing.load(side.x, batch, self.dtype)
            yield Loaded(batch, raw, unit_rows(raw) if side.unit else raw)

    def word_batches(self) -> Iterator[Loaded]:
        return self._load(self.words, self.sides[1], self.word_rows)

    def region_batches(self) -> Iterator[Loaded]:
        return self._load(self.regions, self.sides[0], self.region_rows)

    def scores(self, values: OfChunk, mean: bool) -> Tensor:
        """Scores (images, captions): the sum or mean over each caption's words of `values` [words, images] of a chunk.

        0 where an image or a caption is padding alone.
        """
        scores = self.sides[0].x.new_zeros((self.words.count, self.regions.count), dtype=self.dtype)
        if self.regions.rows and self.words.rows:
            for word in self.word_batches():
                for region in self.region_batches():
                    found = values(word, region).view(*word.rows.shape[:2], -1)
                    found = self._without_padding(found, word, region)
                    found = (found * self.words.shares(word.batch, found, mean)[..., None]).sum(1)
                    scores[word.batch.items, region.batch.items] = found
        return reorder(scores, self.words, self.regions, back=True).T.contiguous()

    def gradients(
        self,
        grad: Tensor,
        mean: bool,
        of_chunk: Callable[[Loaded, Loaded, Tensor, Tensor], tuple[Tensor, ...]],
        folded: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The gradients of the regions, of the words and, if given, of `folded`, of the regions' shape.

        Args:
            grad: The scores' gradient, (images, captions).
            mean: As in `scores`.
            of_chunk: Of words, regions, the gradient of the chunk's values [words, images] and the words' gradient so
                far [words, D], to which it adds: the gradients of the region rows, and of the folded ones.
            folded: Rows that are packed as the regions are.
        """
        regions, words = self.sides
        out = tuple(torch.zeros_like(x) for x in (regions.x, words.x, folded) if x is not None)
        if not regions.x.numel() or not words.x.numel():
            return out
        incoming = reorder(grad.to(self.dtype), self.regions, self.words).T
        sums: dict[ItemBatch, tuple[Tensor, ...]] = {}
        for word in self.word_batches():
            d_word = torch.zeros_like(word.matrix)
            for region in self.region_batches():
                parts = of_chunk(word, region, self._spread(incoming, word, region, mean), d_word)
                if region.batch in sums:
                    parts = tuple(before.add_(now) for before, now in zip(sums[region.batch], parts, strict=True))
                sums[region.batch] = parts
            _store(self.words, words, word, d_word, out[1])
        for region in self.region_batches():
            if region.batch in sums:
                d_region, *d_folded = sums.pop(region.batch)
                _store(self.regions, regions, region, d_region, out[0])
                for part, d_rows in zip(d_folded, out[2:], strict=True):
                    self.regions.store(d_rows, region.batch, part.view(region.rows.shape))
        return out

    def _spread(self, incoming: Tensor, word: Loaded, region: Loaded, mean: bool) -> Tensor:
        """The gradient of a chunk's values [words, images], of the scores' (captions, images)."""
        grad = incoming[word.batch.items, None, region.batch.items]
        shares = self.words.shares(word.batch, incoming, mean)
        return self._without_padding(shares[..., None] * grad, word, region).flatten(0, 1)

    def _without_padding(self, values: Tensor, word: Loaded, region: Loaded) -> Tensor:
        """Values [captions, words, images], 0 for padded words and for images with no valid region."""
        padding, no_region = self.words.padding(word.batch), self.no_region(region)
        if padding is not None:
            values = values.masked_fill(padding[..., None], 0)
        return values if no_region is None else values.masked_fill(no_region, 0)

    def no_region(self, region: Loaded) -> Tensor | None:
        """True for the batch's images that have no valid region, (images,)."""
        padding = self.regions.padding(region.batch)
        return None if padding is None else padding.all(1)

    def masked_products(self, word: Loaded, region: Loaded) -> Tensor:
        """S [words, images, regions] of a chunk, −inf for padded regions."""
        S, padding = products(word, region), self.regions.padding(region.batch)
        return S if padding is None else S.masked_fill_(padding, -torch.inf)

    def best_regions(self, word: Loaded, region: Loaded) -> Tensor:
        """Each word's best region of each image, the lowest of equals, [words, images]."""
        return self.masked_products(word, region).max(-1).indices

    def region_weights(self, word: Loaded, region: Loaded, sharpness: float) -> Tensor:
        """Each word's softmax weights over the regions of each image, [words, images, regions]."""
        S, no_region = self.masked_products(word, region), self.no_region(region)
        if no_region is not None:
            S = S.masked_fill_(no_region[:, None], 0)  # else 0 / 0
        return smooth_weights(S, sharpness)[1]


def _store(packing: Packing, side: Side, loaded: Loaded, grad: Tensor, out: Tensor) -> None:
    """Write the gradient of a batch's rows, through their normalisation where there is one."""
    rows = grad.view(loaded.rows.shape)
    through = unit_rows_vjp(loaded.raw, rows) if side.unit else rows
    assert through is not None
    packing.store(out, loaded.batch, through)
