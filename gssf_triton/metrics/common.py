"""What the metrics share: means in percent, and average precision from ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def percent(hits: Tensor) -> float:
    """The mean of (Q,) hits or fractions, in percent; NaN where there is no query."""
    return 100.0 * float(hits.double().mean())


def recalls(first: Tensor, ks: tuple[int, ...], name: str) -> dict[str, float]:
    """Share of the ranks (Q,) below each k; a rank of −1, no match, is below none."""
    return {f"{name}{k}": percent((first >= 0) & (first < k)) for k in ks}


def valid_places(ranks: Tensor, counts: Tensor) -> Tensor:
    """(r, m): True where a column of `match_ranks`' ranks belongs to a match."""
    return torch.arange(ranks.shape[1], device=ranks.device)[None] < counts[:, None]


def precisions(ranks: Tensor) -> Tensor:
    """Precision at each match of ranks (r, m), ascending from 0: j + 1 matches among the first rank + 1 items."""
    place = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64, device=ranks.device)
    return place[None] / (ranks + 1)
