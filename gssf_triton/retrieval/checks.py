"""Checks of galleries, of one label a row, of masks and of cut-offs, and the count of rows that are no numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gssf_triton.checks import check_same_device, check_tensor, shape_of
from gssf_triton.options import check_count

#: Features that are looked through at a time.
LOOKED_AT = 1 << 24


def bad_rows(name: str, x: Tensor | np.ndarray) -> str | None:
    """How many rows of x (n, D) hold NaN or infinity, and which is the first; None where none does."""
    count, first = 0, -1
    step = max(1, LOOKED_AT // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        good = part.isfinite().all(1).cpu().numpy() if isinstance(part, Tensor) else np.isfinite(part).all(1)
        (found,) = np.nonzero(~good)
        if found.size and first < 0:
            first = start + int(found[0])
        count += found.size
    if not count:
        return None
    return f"{count} of the {x.shape[0]} rows of {name} hold{'s' * (count == 1)} NaN or infinity, the first is {first}"


def warn_of_bad_rows(stacklevel: int, **features: Tensor | np.ndarray) -> None:
    """One such row can rank before every other, for every query: a warning for each of `features` that has any."""
    for name, x in features.items():
        found = bad_rows(name, x)
        if found is not None:
            warnings.warn(f"{found}: NaN ranks before every number", stacklevel=stacklevel + 1)


def check_matrix(name: str, x: Tensor, wanted: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape {wanted}, got {shape_of(x)}")


def check_gallery_array(queries: Tensor, gallery: np.ndarray) -> None:
    """A gallery that is read from an array: (N, D) of the queries' dtype."""
    if gallery.ndim != 2:
        raise ValueError(f"gallery must have shape (N, D), got {gallery.shape}")
    wanted = str(queries.dtype).removeprefix("torch.")
    if gallery.dtype.name != wanted:
        raise ValueError(
            f"queries and gallery must have the same dtype: queries is {queries.dtype}, gallery is an array of "
            f"{gallery.dtype}"
        )
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(
            f"queries and gallery must have the same D: queries is {shape_of(queries)}, gallery is {gallery.shape}"
        )


def check_labels(name: str, labels: object, count: int, of: str, features: Tensor) -> Tensor:
    """One whole number for each of the `count` rows of `of`, on the features' device: of any integer dtype, as int64.

    As `Tensor.long` has them: uint64 beyond 2⁶³ count on from −2⁶³, which keeps different ones different.
    """
    check_tensor(name, labels)
    assert isinstance(labels, Tensor)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if shape_of(labels) != (count,):
        raise ValueError(f"{name} must have shape ({count},), one for each row of {of}, got {shape_of(labels)}")
    check_same_device(of, features, name, labels)
    return labels.long()


def check_pair_mask(name: str, mask: object, shape: tuple[int, int], queries: Tensor) -> Tensor:
    """The mask as booleans."""
    check_tensor(name, mask)
    assert isinstance(mask, Tensor)
    if mask.is_floating_point() or mask.is_complex():
        wanted = "bool or integers, True or not 0 where an item may be ranked"
        raise ValueError(f"{name} must be {wanted}, got {mask.dtype}")
    if shape_of(mask) != shape:
        raise ValueError(f"{name} must have shape {shape}, queries by gallery, got {shape_of(mask)}")
    check_same_device("queries", queries, name, mask)
    return mask if mask.dtype == torch.bool else mask != 0


def check_k(k: object, gallery: int | None = None) -> None:
    """k of a gallery whose size is known, or may still have to be asked for."""
    check_count("k", k, 0)
    assert isinstance(k, int)
    if gallery is not None and k > gallery:
        raise ValueError(f"k must lie between 0 and the gallery's {gallery} items, got {k}")


def check_ks(ks: object) -> None:
    """The cut-offs of a metric: positive ints."""
    if not isinstance(ks, Sequence):
        raise TypeError(f"ks must be a sequence of ints, got {type(ks).__name__}")
    if not ks:
        raise ValueError(f"ks must be a sequence of at least one int, got {ks!r}")
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"ks must hold ints, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"ks must hold ints of at least 1, got {k}")
