"""What the metrics share: means in percent, the progress bar, and average precision from ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def percent(hits: Tensor) -> float:
    """The mean of (Q,) hits or fractions, in percent; NaN where there is no query."""
    return 100.0 * float(hits.double().mean())


def recalls(first: Tensor, ks: tuple[int, ...], name: str) -> dict[str, float]:
    """Share of the ranks (Q,) below each k; a rank of −1, no match, is below none."""
    return {f"{name}{k}": percent((first >= 0) & (first < k)) for k in ks}


def progress_bar(wanted: bool, description: str) -> Callable[[Iterator[T]], Iterator[T]]:
    """tqdm around an iterator of batches, or nothing.

    Raises:
        ImportError: where a bar is wanted and tqdm is not installed.
    """
    if not wanted:
        return lambda batches: batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or leave progress=False") from error

    def bar(batches: Iterator[T]) -> Iterator[T]:
        steps = list(batches)
        return iter(tqdm(steps, desc=description, unit="batch"))

    return bar


def valid_places(ranks: Tensor, counts: Tensor) -> Tensor:
    """(r, m): True where a column of `match_ranks`' ranks belongs to a match."""
    return torch.arange(ranks.shape[1], device=ranks.device)[None] < counts[:, None]


def precisions(ranks: Tensor) -> Tensor:
    """Precision at each match of ranks (r, m), ascending from 0: j + 1 matches among the first rank + 1 items."""
    place = torch.arange(1, ranks.shape[1] + 1, dtype=torch.float64, device=ranks.device)
    return place[None] / (ranks + 1)
