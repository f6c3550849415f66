"""Checks of regions, words and their masks."""

from __future__ import annotations

from torch import Tensor

from gssf_triton.checks import check_features, check_same_device, check_tensor, shape_of


def check_items(name: str, x: object, row: str) -> None:
    """Features of items that have several rows each, (items, rows, D)."""
    check_features(name, x, min_dim=1)
    assert isinstance(x, Tensor)
    if x.dim() != 3:
        raise ValueError(f"{name} must have shape (items, {row}, D), got {shape_of(x)}")


def check_regions_and_words(regions: object, words: object) -> None:
    """Regions (I, R, D) and words (T, L, D) of one D and device."""
    check_items("regions", regions, "regions")
    check_items("words", words, "words")
    assert isinstance(regions, Tensor) and isinstance(words, Tensor)
    if regions.shape[-1] != words.shape[-1]:
        raise ValueError(
            f"regions and words must have the same D: regions is {shape_of(regions)}, words is {shape_of(words)}"
        )
    check_same_device("regions", regions, "words", words)


def check_regions_and_words_dtype(regions: Tensor, words: Tensor) -> None:
    if regions.dtype != words.dtype:
        raise ValueError(
            f"regions and words must have the same dtype: regions is {regions.dtype}, words is {words.dtype}"
        )


def check_mask(name: str, mask: object, of: str, x: Tensor) -> None:
    """A mask of x's items and rows, True (or not 0) where a row is valid."""
    if mask is None:
        return
    check_tensor(name, mask)
    assert isinstance(mask, Tensor)
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(f"{name} must be bool (or integer), true where a row is valid, got {mask.dtype}")
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{name} must have shape {shape_of(x)[:2]}, the items and rows of {of} {shape_of(x)}, got {shape_of(mask)}"
        )
    check_same_device(of, x, name, mask)
