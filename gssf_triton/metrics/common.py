"""What the metrics share: means in percent, and average precision from ranks.

Ranks come from the features' device; what is averaged over them is float64 on the host, since not every device has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

#: A metric's caller, as `warnings.warn` counts: `no_grad` lies between.
BELOW_CALLER = 3


def to_host(parts: Sequence[Tensor]) -> NDArray[np.int64]:
    """Batches of ranks (q,), one after the other."""
    return np.concatenate([np.zeros(0, np.int64), *(part.cpu().numpy() for part in parts)])


def percent(hits: NDArray[np.generic]) -> float:
    """The mean of (Q,) hits or fractions, in percent; NaN where there is no query."""
    return 100.0 * float(hits.mean(dtype=np.float64)) if hits.size else math.nan


def recalls(first: NDArray[np.int64], ks: tuple[int, ...], name: str) -> dict[str, float]:
    """Share of the ranks (Q,) below each k; a rank of −1, no match, is below none."""
    return {f"{name}{k}": percent((first >= 0) & (first < k)) for k in ks}


def are_matches(ranks: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(q, m): True where a column of `match_ranks`' ranks belongs to a match."""
    return np.arange(ranks.shape[1]) < counts[:, None]


def average_precision(
    ranks: NDArray[np.int64], counts: NDArray[np.int64], counted: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """(q,): the sum of the precisions at the matches that are `counted`, of `match_ranks`' ranks (q, m), over `counts`.

    The precision at match j, of rank r, both from 0: j + 1 matches among the first r + 1 items.
    """
    precision = np.arange(1, ranks.shape[1] + 1) / (ranks + 1)
    sums: NDArray[np.float64] = (precision * counted).sum(1)
    return sums / counts
