"""Rows that are no numbers: how many, and a warning of them. Looking at values waits for the device."""

from __future__ import annotations

import warnings

import numpy as np
from torch import Tensor

#: Values that are looked at in one step.
STEP = 1 << 24


def bad_rows(name: str, x: Tensor | np.ndarray) -> str | None:
    """How many rows of x (n, D) hold NaN or infinity, and which is the first; None where none does."""
    count, first = 0, -1
    step = max(1, STEP // max(x.shape[1], 1))
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
