"""Region–word scores by the Triton kernels.

The forward pass is one launch. The backward pass is the torch backend's, a chunk of pairs at a time, in which a kernel
finds the best regions or the softmax weights: the only arrays of a chunk's size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.constants import NORM_EPS
from gssf_triton.metric import accumulate_dtype
from gssf_triton.precision import HEADROOM, float16_unit
from gssf_triton.region_word import torch_backend
from gssf_triton.region_word.pairs import Loaded, PairChunks, Pooling, Side
from gssf_triton.similarity.torch_backend import unit_rows

if TYPE_CHECKING:
    from gssf_triton.kernels.late_interaction import Items


def _scale(x: Tensor) -> Tensor:
    """What normalises the products of these rows, (items, rows); 0 where a norm overflows."""
    wide = accumulate_dtype(x.dtype)
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp_min(NORM_EPS).reciprocal()


def _items(regions: Side, words: Side, x: Tensor, y: Tensor, parts: bool = False) -> tuple[Items, Items]:
    """Rows x and y of the two sides as the kernels take them, with what their products are multiplied by.

    They are multiplied in the features' dtype, which a folded side has left for float32. With `parts` what rounding a
    folded side to half precision leaves over comes as well.
    """
    dtype = min(regions.x.dtype, words.x.dtype, key=lambda dtype: dtype.itemsize)
    region_scale, word_scale = (_scale(rows) if side.unit else None for rows, side in ((x, regions), (y, words)))
    found = []
    for rows, side, other in ((x, regions, words), (y, words, regions)):
        # Folded rows may leave float16's range; and the others' norms, where they divide the product, float32's.
        unit = None
        if dtype == torch.float16:
            unit = float16_unit(rows) if side.x.dtype != dtype else None
        elif other.unit:
            unit = rows.new_full((), HEADROOM)
        if unit is not None:
            rows = rows / unit
            word_scale = unit.expand(y.shape[:2]) if word_scale is None else word_scale * unit
        rounded = rows.to(dtype)
        found.append((rounded, (rows - rounded).to(dtype) if parts and side.x.dtype != dtype else None))
    items = kernels.late_interaction.Items
    return items(*found[0], region_scale), items(*found[1], word_scale)


def _shares(words: Side, dtype: torch.dtype, mean: bool) -> Tensor:
    """What each word counts in its caption's score, (T, L)."""
    valid = words.x.new_ones(words.x.shape[:2], dtype=dtype) if words.mask is None else words.mask.to(dtype)
    return valid / valid.sum(1, keepdim=True).clamp_min(1) if mean else valid


def _order(words: Side) -> Tensor | None:
    """Captions by their last valid word, longest first: neighbours share tiles, and end together."""
    if words.mask is None:
        return None
    places = torch.arange(1, words.mask.shape[1] + 1, device=words.mask.device)
    return torch.argsort((words.mask * places).amax(1), descending=True, stable=True)


def _no_scores(regions: Side, words: Side, dtype: torch.dtype) -> Tensor | None:
    """Zeros where a side has no item or no row."""
    if all((*regions.x.shape[:2], *words.x.shape[:2])):
        return None
    return regions.x.new_zeros((regions.x.shape[0], words.x.shape[0]), dtype=dtype)


def late_interaction(regions: Side, words: Side, pooling: Pooling) -> Tensor:
    """Scores (I, T), in float32 at least."""
    wide = torch.promote_types(accumulate_dtype(regions.x.dtype), accumulate_dtype(words.x.dtype))
    scores = _no_scores(regions, words, wide)
    if scores is not None:
        return scores
    x, y = _items(regions, words, regions.x, words.x)
    x, y = replace(x, weight=regions.mask), replace(y, weight=_shares(words, wide, pooling.mean))
    sharpness = pooling.sharpness if pooling.smooth else None
    scores = kernels.late_interaction.scores(x, y, wide, _order(words), sharpness)
    return scores if regions.mask is None else scores.masked_fill_(~regions.mask.any(1)[:, None], 0)


class KernelChunks(PairChunks):
    """Chunks whose products a kernel makes and pools."""

    def _items(self, word: Loaded, region: Loaded) -> tuple[Items, Items]:
        x, y = _items(*self.sides, region.raw, word.raw, parts=True)
        padding = self.regions.padding(region.batch)
        shares = self.words.shares(word.batch, region.raw, mean=False)
        return replace(x, weight=None if padding is None else ~padding), replace(y, weight=shares)

    def best_regions(self, word: Loaded, region: Loaded) -> Tensor:
        return kernels.late_interaction.best_regions(*self._items(word, region))

    def region_weights(self, word: Loaded, region: Loaded, sharpness: float) -> Tensor:
        return kernels.late_interaction.region_weights(*self._items(word, region), self.dtype, sharpness)


def late_interaction_backward(grad: Tensor, regions: Side, words: Side, pooling: Pooling) -> tuple[Tensor, ...]:
    """The gradients of the regions and of the words, of the scores' gradient (I, T)."""
    return torch_backend.late_interaction_backward(grad, regions, words, pooling, KernelChunks)


def cross_attention(regions: Side, folded: Tensor, words: Side, smooth: float) -> Tensor:
    """Scores (I, T), in float32 at least; folded (I, R, D) is T of the regions on the unit sphere."""
    wide, dtype, x, y = folded.dtype, words.x.dtype, regions.x, words.x
    scores = _no_scores(regions, words, wide)
    if scores is not None:
        return scores
    unit, region_scale, word_scale = unit_rows(x.to(wide)), _scale(x), _scale(y)
    fold_unit = None
    if dtype == torch.float16:
        fold_unit = float16_unit(folded)
        folded = folded / fold_unit
    else:
        # Rows whose norm overflows are 0 on the unit sphere; what is not finite in them stays NaN.
        x, y = (rows * (scale != 0).to(dtype)[..., None] for rows, scale in ((x, region_scale), (y, word_scale)))
    items = kernels.late_interaction.Items
    scores = kernels.cross_attention.scores(
        items(x, scale=region_scale, weight=regions.mask),
        folded.to(dtype),
        items(y, scale=word_scale, weight=_shares(words, wide, mean=True)),
        torch.bmm(unit, unit.mT),
        _order(words),
        smooth,
    )
    return scores if fold_unit is None else scores * fold_unit


cross_attention_backward = torch_backend.cross_attention_backward
