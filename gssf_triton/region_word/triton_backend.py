"""Region–word scores by the Triton kernels: what they take of two sides. Triton is imported at the first call.

The forward pass is one launch. The backward pass is the torch backend's, a chunk of pairs at a time, in which a kernel
finds the best regions or the softmax weights: the only arrays of a chunk's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gssf_triton.constants import NORM_EPS
from gssf_triton.precision import HEADROOM, float16_unit
from gssf_triton.region_word import torch_backend, torch_cross_attention
from gssf_triton.region_word.torch_backend import LoadedChunk, Side, Stream
from gssf_triton.similarity.torch_backend import accumulate_dtype, unit_rows


def _product_dtype(regions: Side, words: Side) -> torch.dtype:
    """The features' dtype: of two, the folded side is float32 and the other one tells."""
    dtypes = regions.x.dtype, words.x.dtype
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def _scale(x: Tensor, side: Side) -> Tensor | None:
    """What normalises the products of these rows, (items, rows); 0 where a norm overflows."""
    if not side.unit:
        return None
    wide = accumulate_dtype(x.dtype)
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).clamp_min(NORM_EPS).reciprocal()


def _operands(x: Tensor, y: Tensor, regions: Side, words: Side, parts: bool) -> dict[str, Any]:
    """Rows x and y of the two sides as the kernels take them, with what their products are multiplied by.

    With `parts` what rounding a folded side to half precision leaves over comes as x2 or y2.
    """
    dtype = _product_dtype(regions, words)
    found: dict[str, Any] = {"region_scale": _scale(x, regions), "word_scale": _scale(y, words)}
    for name, rows, side, other in (("x", x, regions, words), ("y", y, words, regions)):
        # Folded rows may leave float16's range; and the others' norms, where they divide the product, float32's.
        unit = None
        if dtype == torch.float16:
            unit = float16_unit(rows) if side.x.dtype != dtype else None
        elif other.unit:
            unit = rows.new_full((), HEADROOM)
        if unit is not None:
            rows = rows / unit
            scale = found["word_scale"]
            found["word_scale"] = unit.expand(y.shape[:2]) if scale is None else scale * unit
        found[name] = rows.to(dtype)
        if parts:
            found[f"{name}2"] = None if side.x.dtype == dtype else (rows - found[name]).to(dtype)
    return found


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


def late_interaction(regions: Side, words: Side, pooling: str, sharpness: float) -> Tensor:
    """Scores (I, T), in float32 at least."""
    from gssf_triton.kernels import late_interaction as kernels

    wide = torch.promote_types(accumulate_dtype(regions.x.dtype), accumulate_dtype(words.x.dtype))
    if not all((*regions.x.shape[:2], *words.x.shape[:2])):
        return regions.x.new_zeros((regions.x.shape[0], words.x.shape[0]), dtype=wide)
    scores = kernels.scores(
        **_operands(regions.x, words.x, regions, words, parts=False),
        word_share=_shares(words, wide, pooling != "max-sum"),
        dtype=wide,
        region_mask=regions.mask,
        order=_order(words),
        sharpness=sharpness if pooling == "lse-mean" else None,
    )
    return scores if regions.mask is None else scores.masked_fill_(~regions.mask.any(1)[:, None], 0)


def _chunk_arguments(stream: Stream, word: LoadedChunk, region: LoadedChunk) -> dict[str, Any]:
    regions, words = stream.sides
    padding = stream.regions.padding(region.chunk)
    return {
        **_operands(region.raw, word.raw, regions, words, parts=True),
        "word_share": stream.words.shares(word.chunk, region.raw, mean=False),
        "region_mask": None if padding is None else ~padding,
    }


def _best_regions(stream: Stream, word: LoadedChunk, region: LoadedChunk) -> Tensor:
    from gssf_triton.kernels import late_interaction as kernels

    return kernels.best_regions(**_chunk_arguments(stream, word, region))


def _region_weights(stream: Stream, word: LoadedChunk, region: LoadedChunk, sharpness: float) -> Tensor:
    from gssf_triton.kernels import late_interaction as kernels

    arguments = _chunk_arguments(stream, word, region)
    return kernels.region_weights(**arguments, dtype=stream.dtype, sharpness=sharpness)


def late_interaction_backward(
    grad: Tensor, regions: Side, words: Side, pooling: str, sharpness: float
) -> tuple[Tensor, Tensor]:
    """The gradients of the regions and of the words, of the scores' gradient (I, T)."""
    recompute = _best_regions, _region_weights
    return torch_backend.late_interaction_backward(grad, regions, words, pooling, sharpness, recompute)


def cross_attention(regions: Side, folded: Tensor, words: Side, smooth: float) -> Tensor:
    """Scores (I, T), in float32 at least; folded (I, R, D) is T of the regions on the unit sphere."""
    from gssf_triton.kernels import cross_attention as kernels

    wide, dtype = folded.dtype, words.x.dtype
    if not all((*regions.x.shape[:2], *words.x.shape[:2])):
        return regions.x.new_zeros((regions.x.shape[0], words.x.shape[0]), dtype=wide)
    unit = unit_rows(regions.x.to(wide))
    region_scale, word_scale = _scale(regions.x, regions), _scale(words.x, words)
    assert region_scale is not None and word_scale is not None
    x, y = regions.x, words.x
    fold_unit = None
    if dtype == torch.float16:
        fold_unit = float16_unit(folded)
        folded = folded / fold_unit
    else:
        # Rows whose norm overflows are 0 on the unit sphere; what is not finite in them stays NaN.
        x, y = (rows * (scale != 0).to(dtype)[..., None] for rows, scale in ((x, region_scale), (y, word_scale)))
    scores = kernels.scores(
        x,
        folded.to(dtype),
        y,
        torch.bmm(unit, unit.mT),
        _shares(words, wide, mean=True),
        region_scale,
        word_scale,
        regions.mask,
        _order(words),
        smooth,
    )
    return scores if fold_unit is None else scores * fold_unit


cross_attention_backward = torch_cross_attention.cross_attention_backward
