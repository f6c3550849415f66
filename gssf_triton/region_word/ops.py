"""The operators of region–word scores and of their gradients, for both backends, with fake implementations.

They take rows that were folded before, so the weights' gradients are the fold's own. The gradients recompute the
products, and have no gradient themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.metric import accumulate_dtype
from gssf_triton.once import Once
from gssf_triton.precision import full_precision
from gssf_triton.region_word import torch_backend, triton_backend
from gssf_triton.region_word.pairs import Pooling, Side

BACKENDS = {"torch": torch_backend, "triton": triton_backend}


class Options(NamedTuple):
    """The operator's arguments that are no tensors: which sides it normalises, the pooling and the backend."""

    unit_regions: bool
    unit_words: bool
    pooling: str
    sharpness: float
    backend: str


_SCHEMA = (
    "Tensor regions, Tensor words, Tensor? folded, Tensor? region_mask, Tensor? word_mask, bool unit_regions, "
    "bool unit_words, str pooling, float sharpness, str backend"
)


def _call(
    regions: Tensor,
    words: Tensor,
    folded: Tensor | None,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    *options: Any,
) -> tuple[Side, Side, Tensor | None, Pooling]:
    given = Options(*options)
    sides = Side(regions, region_mask, given.unit_regions), Side(words, word_mask, given.unit_words)
    return *sides, folded, Pooling(given.pooling, given.sharpness)


@torch.library.custom_op("gssf::region_word_scores", mutates_args=(), schema=f"({_SCHEMA}) -> Tensor")
def _scores(*inputs: Any) -> Tensor:
    regions, words, folded, pooling = _call(*inputs)
    backend = BACKENDS[inputs[-1]]
    with full_precision(words.x):
        if folded is None:
            return backend.late_interaction(regions, words, pooling)
        if not may_launch("cross_attention", words.x.dtype, words.x.device):
            backend = torch_backend
        return backend.cross_attention(regions, folded, words, pooling.sharpness)


@_scores.register_fake
def _(regions: Tensor, words: Tensor, *_: Any) -> Tensor:
    dtype = torch.promote_types(accumulate_dtype(regions.dtype), accumulate_dtype(words.dtype))
    return regions.new_empty((regions.shape[0], words.shape[0]), dtype=dtype)


@torch.library.custom_op(
    "gssf::region_word_scores_backward", mutates_args=(), schema=f"(Tensor grad, {_SCHEMA}) -> Tensor[]"
)
def _scores_backward(grad: Tensor, *inputs: Any) -> list[Tensor]:
    regions, words, folded, pooling = _call(*inputs)
    with full_precision(grad):
        if folded is None:
            return list(BACKENDS[inputs[-1]].late_interaction_backward(grad, regions, words, pooling))
        return list(torch_backend.cross_attention_backward(grad, regions, folded, words, pooling.sharpness))


@_scores_backward.register_fake
def _(grad: Tensor, regions: Tensor, words: Tensor, folded: Tensor | None, *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in (regions, words, folded) if x is not None]


@dataclass(frozen=True)
class _RegionWord(Once):
    """Scores (I, T) of regions (I, R, D), words (T, L, D), folded, region_mask, word_mask."""

    options: Options

    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return (_scores(*inputs, *self.options),)

    def backward(self, grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(_scores_backward(grad, *inputs, *self.options))


class LateInteraction(_RegionWord):
    """One of the sides is folded already; `folded` is None."""

    NAME = "late_interaction"
    GRADIENTS = 2


class CrossAttention(_RegionWord):
    """Regions and words as they are; `folded` (I, R, D) is T of the normalised regions; the sharpness is `smooth`."""

    NAME = "cross_attention_sim"
    GRADIENTS = 3
