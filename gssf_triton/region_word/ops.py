"""The operators of region–word scores, for both backends: `torch.library` ops `gssf::…` with fake implementations.

They take rows that were folded before, so the weights' gradients are the fold's own. Their gradients recompute the
products, and have no gradient themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gssf_triton.kernels.toolchain import may_launch
from gssf_triton.once import Once
from gssf_triton.precision import full_precision
from gssf_triton.region_word import torch_backend, torch_cross_attention, triton_backend
from gssf_triton.region_word.torch_backend import Side
from gssf_triton.similarity.torch_backend import accumulate_dtype

POOLINGS = ("max-mean", "lse-mean", "max-sum")


def _backend(name: str) -> ModuleType:
    return triton_backend if name == "triton" else torch_backend


def _scores_like(regions: Tensor, words: Tensor) -> Tensor:
    dtype = torch.promote_types(accumulate_dtype(regions.dtype), accumulate_dtype(words.dtype))
    return regions.new_empty((regions.shape[0], words.shape[0]), dtype=dtype)


# ---------------------------------------------------------------------------------------------------- late interaction


@torch.library.custom_op(
    "gssf::late_interaction",
    mutates_args=(),
    schema="(Tensor regions, Tensor words, Tensor? region_mask, Tensor? word_mask, bool unit_regions, bool unit_words, "
    "str pooling, float sharpness, str backend) -> Tensor",
)
def _late_interaction(
    regions: Tensor,
    words: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    unit_regions: bool,
    unit_words: bool,
    pooling: str,
    sharpness: float,
    backend: str,
) -> Tensor:
    sides = Side(regions, region_mask, unit_regions), Side(words, word_mask, unit_words)
    with full_precision(regions):
        return _backend(backend).late_interaction(*sides, pooling, sharpness)


@_late_interaction.register_fake
def _(regions: Tensor, words: Tensor, *_: Any) -> Tensor:
    return _scores_like(regions, words)


@torch.library.custom_op(
    "gssf::late_interaction_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor regions, Tensor words, Tensor? region_mask, Tensor? word_mask, bool unit_regions, "
    "bool unit_words, str pooling, float sharpness, str backend) -> (Tensor, Tensor)",
)
def _late_interaction_backward(
    grad: Tensor,
    regions: Tensor,
    words: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    unit_regions: bool,
    unit_words: bool,
    pooling: str,
    sharpness: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    sides = Side(regions, region_mask, unit_regions), Side(words, word_mask, unit_words)
    with full_precision(regions):
        return _backend(backend).late_interaction_backward(grad, *sides, pooling, sharpness)


@_late_interaction_backward.register_fake
def _(grad: Tensor, regions: Tensor, words: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(regions), torch.empty_like(words)


@dataclass(frozen=True)
class LateInteraction(Once):
    """Scores (I, T) of regions (I, R, D) and words (T, L, D), one of them folded; `unit_…` normalises the other."""

    NAME = "late_interaction"
    GRADIENTS = 2

    unit_regions: bool
    unit_words: bool
    pooling: str
    sharpness: float
    backend: str

    def _options(self) -> tuple[Any, ...]:
        return self.unit_regions, self.unit_words, self.pooling, self.sharpness, self.backend

    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Of regions, words, region_mask, word_mask."""
        return (_late_interaction(*inputs, *self._options()),)

    def backward(self, grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, Tensor] = _late_interaction_backward(grad, *inputs, *self._options())
        return gradients


# ----------------------------------------------------------------------------------------------------- cross attention


@torch.library.custom_op(
    "gssf::cross_attention",
    mutates_args=(),
    schema="(Tensor regions, Tensor folded, Tensor words, Tensor? region_mask, Tensor? word_mask, float smooth, "
    "str backend) -> Tensor",
)
def _cross_attention(
    regions: Tensor,
    folded: Tensor,
    words: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    smooth: float,
    backend: str,
) -> Tensor:
    sides = Side(regions, region_mask, True), folded, Side(words, word_mask, True)
    with full_precision(regions):
        runs = backend == "triton" and may_launch("cross_attention", words.dtype, words.device)
        module = triton_backend if runs else torch_cross_attention
        return module.cross_attention(*sides, smooth)


@_cross_attention.register_fake
def _(regions: Tensor, folded: Tensor, words: Tensor, *_: Any) -> Tensor:
    return _scores_like(regions, words)


@torch.library.custom_op(
    "gssf::cross_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor regions, Tensor folded, Tensor words, Tensor? region_mask, Tensor? word_mask, "
    "float smooth, str backend) -> (Tensor, Tensor, Tensor)",
)
def _cross_attention_backward(
    grad: Tensor,
    regions: Tensor,
    folded: Tensor,
    words: Tensor,
    region_mask: Tensor | None,
    word_mask: Tensor | None,
    smooth: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    sides = Side(regions, region_mask, True), folded, Side(words, word_mask, True)
    with full_precision(regions):
        return torch_cross_attention.cross_attention_backward(grad, *sides, smooth)


@_cross_attention_backward.register_fake
def _(grad: Tensor, regions: Tensor, folded: Tensor, words: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(regions), torch.empty_like(folded), torch.empty_like(words)


@dataclass(frozen=True)
class CrossAttention(Once):
    """Scores (I, T) of regions (I, R, D) and words (T, L, D) as they are, and of T of the normalised regions."""

    NAME = "cross_attention_sim"
    GRADIENTS = 3

    smooth: float
    backend: str

    def forward(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Of regions, their fold, words, region_mask, word_mask."""
        return (_cross_attention(*inputs, self.smooth, self.backend),)

    def backward(self, grad: Tensor, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, Tensor, Tensor] = _cross_attention_backward(grad, *inputs, self.smooth, self.backend)
        return gradients
